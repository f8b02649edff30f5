"""Streams: counting, windows, flow; adding points later; what the conformance suite catches; recording as it goes."""

import resource
from typing import ClassVar

import pytest
import torch

from trackpl import Clip, Info, Method, Tracks, testing
from trackpl.errors import DataError, Error
from trackpl.streams import FlowStream, Stream, WindowStream

SIZE = (24, 40)
STEP = torch.tensor([1.0, 0.5])  # pixels a unit of brightness


def numbered(frames, start=0):
    """Frames of which the t-th has brightness t."""
    t = torch.arange(start, start + frames, dtype=torch.uint8)
    return t[:, None, None, None].expand(-1, 3, *SIZE)


class Points(Method):
    """Moves points by `STEP` a unit of brightness; drifts by 0.25 px a frame from its query on, so windows show."""

    info: ClassVar[Info] = Info("Points", "none", "Apache-2.0")

    def __init__(self, drift=0.25):
        super().__init__()
        self.drift, self.calls = drift, []

    def track(self, clip, queries):
        self.calls.append((int(clip.video[0, 0, 0, 0, 0]), clip.frames, queries.shape[1]))
        t = (
            clip.video[:, :, 0, 0, 0].float()[..., None]
            - clip.video[:, :, 0, 0, 0].float().gather(1, queries[..., 0].long())[:, None]
        )
        xy = queries[:, None, :, 1:] + t[..., None] * STEP
        xy[..., 0] += self.drift * t.abs().sqrt()
        seen = (xy[..., 0] % 4 < 3).float()
        return Tracks(xy, torch.where(t == 0, 1.0, seen))


class Flows(Method):
    """Knows that everything moves by `STEP` a unit of brightness."""

    info: ClassVar[Info] = Info("Flows", "none", "Apache-2.0")

    def encode(self, images):
        return (images.mean((1, 2, 3)) * 255).round()

    def match(self, source, target, size):
        return ((target - source)[:, None] * STEP)[..., None, None].expand(-1, -1, *size)


def queries(*times):
    return torch.tensor([[float(t), 3.0 + n, 5.0 + n] for n, t in enumerate(times)])


def same(a, b):
    assert a.xy.shape == b.xy.shape
    torch.testing.assert_close(a.xy, b.xy, atol=1e-4, rtol=0)
    torch.testing.assert_close(a.visible, b.visible, atol=1e-5, rtol=0)


def run(method, points, video, portions=(1,), window=8):
    stream = WindowStream(method, window)
    stream.add(points)
    return testing.run_stream(stream, video, portions)


@pytest.mark.parametrize("frames", [1, 3, 4, 5, 8, 9, 12, 13, 30])
def test_windows_hand_out_each_frame_once_however_frames_come(frames):
    points, video = queries(0, frames // 2, frames - 1), numbered(frames)
    one = run(Points(), points, video)
    assert one.xy.shape == (1, frames, 3, 2) and one.visible.shape == (1, frames, 3)
    for portions in ([frames], [3], [5, 1, 7]):
        same(one, run(Points(), points, video, portions))
    if frames <= 8:
        whole = Points().track(Clip(video=video[None]), points[None])
        since = torch.arange(frames)[:, None] >= points[:, 0]
        assert torch.equal(one.xy[0][since], whole.xy[0][since])


def test_frames_settle_half_a_window_at_a_time_and_the_rest_may_be_looked_at():
    stream = WindowStream(Points(0.0), 8)
    stream.add(queries(0))
    assert stream.step(numbered(7)).xy.shape == (1, 0, 1, 2) and stream.latest() is None
    first = stream.step(numbered(1, 7))
    assert first.xy.shape[1] == 4 == stream.settled and stream.frames == 8
    latest = stream.latest()
    want = queries(0)[0, 1:] + torch.arange(8)[:, None] * STEP
    torch.testing.assert_close(torch.cat([first.xy, latest.xy], 1)[0, :, 0], want)
    assert stream.step(numbered(9, 8)).xy.shape[1] == 8 and stream.settled == 12
    assert stream.finish().xy.shape[1] == 5 and stream.settled == stream.frames == 17


def test_windows_start_where_a_point_was_last_surely_seen():
    """Not where it is at the window's first frame: the state is carried, and no window is done twice."""
    method, video = Points(), numbered(20)
    run(method, queries(0), video, [20])
    assert method.calls == [(0, 8, 1), (4, 8, 1), (8, 8, 1), (12, 8, 1)]
    hidden = Points(0.0)
    hidden_track = hidden.track

    def unseen(clip, points):
        found = hidden_track(clip, points)
        return Tracks(found.xy, torch.where(found.visible.cumsum(1) <= 1, found.visible, 0.0))

    hidden.track = unseen
    found = run(hidden, queries(0), video)
    want = queries(0)[0, 1:] + torch.arange(20)[:, None] * STEP
    torch.testing.assert_close(found.xy[0, :, 0], want)  # also never seen again, it is carried on


@pytest.mark.parametrize("at", [0, 1, 4, 7, 8, 9, 11, 12])
def test_points_added_later_are_as_if_asked_for_from_the_start(at):
    video, points = numbered(21), queries(0, 2, 12, 13, 20)
    early = run(Points(), points, video)
    stream = WindowStream(Points(), 8)
    stream.add(points[:2])
    parts = [stream.step(video[:at])] if at else []
    settled = stream.settled
    stream.add(points[2:])
    late = testing.run_stream(stream, video[at:], [2])
    assert late.xy.shape == (1, 21 - settled, 5, 2)
    same(Tracks(early.xy[:, settled:], early.visible[:, settled:]), late)
    if parts:
        same(Tracks(early.xy[:, :settled, :2], early.visible[:, :settled, :2]), parts[0])


def test_points_wait_for_their_frame_at_their_query():
    found = run(Points(), queries(0, 9, 40), numbered(12))
    assert torch.equal(found.xy[0, :9, 1], queries(0, 9)[1, 1:].expand(9, 2)) and not found.visible[0, :9, 1].any()
    assert found.visible[0, 9, 1] == 1
    assert torch.equal(found.xy[0, :, 2], queries(0, 9, 40)[2, 1:].expand(12, 2)) and not found.visible[0, :, 2].any()


@pytest.mark.parametrize("frames", [1, 2, 30, 60])
def test_streams_of_flow_settle_every_frame_and_equal_track(frames):
    points, video = queries(0, frames // 3, frames - 1), numbered(frames)
    stream = Flows().stream(points)
    assert isinstance(stream, FlowStream) and stream.equals_track
    assert stream.step(video[:1]).xy.shape[1] == 1 == stream.settled
    stream.reset()
    stream.add(points)
    found = testing.run_stream(stream, video, [1, 4])
    whole = Flows().track(Clip(video=video[None]), points[None])
    since = torch.arange(frames)[:, None] >= points[:, 0]
    assert torch.equal(found.xy[0][since], whole.xy[0][since])
    assert torch.equal(found.visible[0][since], whole.visible[0][since])
    assert torch.equal(found.confidence[0][since], whole.confidence[0][since])


def test_streams_of_flow_that_is_given_whole_equal_track():
    class Whole(Flows):
        encode, match = Method.encode, Method.match

        def flow(self, clip, pairs):
            from trackpl import Flow

            t = clip.video[:, :, 0, 0, 0].float()
            move = torch.stack([(t[:, b] - t[:, a])[:, None] * STEP for a, b in pairs], 1)
            return Flow(move[..., None, None].expand(*move.shape, *SIZE), tuple(pairs))

    points, video = queries(0, 5), numbered(40)
    found = testing.run_stream(Whole().stream(points), video, [7])
    torch.testing.assert_close(found.xy, testing.run_stream(Flows().stream(points), video, [7]).xy)


def test_points_added_to_a_stream_of_flow():
    points, video = queries(0, 30, 33), numbered(50)
    early = testing.run_stream(Flows().stream(points), video, [1])
    stream = Flows().stream(points[:1])
    stream.step(video[:30])
    stream.add(points[1:])
    same(Tracks(early.xy[:, 30:], early.visible[:, 30:]), testing.run_stream(stream, video[30:], [1]))


def test_memory_does_not_grow_with_the_frames():
    stream = WindowStream(Points(), 8)
    stream.add(queries(0))
    frames = torch.zeros(8, 3, 256, 256, dtype=torch.uint8)  # 1.6 MB
    for _ in range(10):
        stream.step(frames)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(120):
        stream.step(frames)
    assert stream.frames == 1040
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 20 << 20  # frames alone: 189 MB


WRONG = [
    (lambda s: s.add(torch.zeros(3, 2)), DataError, r"must have shape \(N, 3\) of \(t, x, y\), got \(3, 2\)"),
    (lambda s: s.add(queries(3)), DataError, r"query 1 \(t=3, x=3, y=5\) cannot be tracked: t is .* from 4 on"),
    (lambda s: s.add(queries(9) + 0.5), DataError, r"query 1 \(t=9.5"),
    (lambda s: s.add(torch.tensor([[9.0, 41, 3]])), DataError, r"x in \[0, 40\], y in \[0, 24\]"),
    (lambda s: s.step(torch.zeros(3, 24, 40)), DataError, r"must have shape \(n, 3, H, W\), n >= 1, got \(3, 24, 40\)"),
    (lambda s: s.step(torch.zeros(0, 3, 24, 40)), DataError, "n >= 1"),
    (lambda s: s.step(torch.zeros(1, 3, 24, 41)), DataError, r"one size: \(24, 40\) before, \(24, 41\) now"),
    (lambda s: [s.finish(), s.step(numbered(1))], Error, "is finished; reset it"),
    (lambda s: [s.finish(), s.add(queries(9))], Error, "is finished; reset it"),
]


@pytest.mark.parametrize(("do", "kind", "message"), WRONG)
def test_wrong_calls_say_what_is_wrong(do, kind, message):
    stream = WindowStream(Points(), 8)
    stream.add(queries(0))
    stream.step(numbered(9))
    with pytest.raises(kind, match=message):
        do(stream)


def test_points_given_before_the_first_frame_are_checked_when_it_comes():
    stream = Points().stream(torch.tensor([[[0.0, 50, 3]]]))  # a batch of one is taken, as `track` takes it
    with pytest.raises(DataError, match=r"query 0 .* x in \[0, 40\]"):
        stream.step(numbered(1))
    with pytest.raises(Error, match="2 frames or more, got 1"):
        WindowStream(Points(), 1)


def test_a_stream_without_points_or_frames():
    stream = Points().stream()
    assert stream.finish().xy.shape == (1, 0, 0, 2)
    assert run(Points(), queries(0)[:0], numbered(20)).xy.shape == (1, 20, 0, 2)


class Plane(Points):
    """Stands still, as the points of a still plane do; passes the suite."""

    def track(self, clip, queries):
        xy = queries[:, None, :, 1:].repeat(1, clip.frames, 1, 1)
        return Tracks(xy, torch.ones(xy.shape[:3]))


class Broken(Stream):
    """Settles each frame at once; `fault` names what is wrong with it."""

    def __init__(self, fault):
        self.fault = fault
        super().__init__("cpu")
        self.equals_track = fault == "claims"

    def _step(self, frames):
        xy = self.queries[None, None, :, 1:].repeat(1, len(frames), 1, 1)
        since = (self.frames + torch.arange(len(frames)))[:, None] > self.queries[:, 0]
        wrong = {"portions": len(frames), "claims": 1.0, "adds": float(self.added > 1)}.get(self.fault, 0.0)
        xy[0] += wrong * since[..., None]
        if self.fault == "query":
            xy += 1
        return Tracks(xy, torch.ones(xy.shape[:3]))

    def _finish(self):
        raise AssertionError("nothing is left")

    added = 0

    def _add(self, queries):
        self.added += 1

    def _reset(self):
        self.added = 0


FAULTS = [
    ("portions", "in other portions"),
    ("claims", "which the stream claims"),
    ("adds", "points added later and at the start"),
    ("query", "away from its own query"),
]


@pytest.mark.parametrize(("fault", "message"), FAULTS)
def test_the_suite_finds_broken_streams(fault, message):
    class Wrong(Plane):
        def stream(self, queries=None):
            stream = Broken(fault)
            stream.add(queries)
            return stream

    with pytest.raises(AssertionError, match=message):
        testing.check_stream(Wrong)


@pytest.mark.parametrize("method", [Plane, Flows])
def test_the_suite_passes_the_platforms_streams(method):
    testing.check_stream(method)
