"""What the platform makes of a method: tracks from flow, dense tracks from points, windows of long videos."""

from typing import ClassVar

import pytest
import torch

from trackpl import Clip, DenseTracks, Info, Method, Tracks, adapters, streams
from trackpl.errors import DataError, Error
from trackpl.testing import moving_clip

STEP = torch.tensor([2.0, 1.0])  # pixels a frame, as `moving_clip` moves


class Flows(Method):
    """Knows that everything moves by `STEP`, from frames coded by their brightness."""

    info: ClassVar[Info] = Info("Flows", "none", "Apache-2.0")

    def __init__(self):
        super().__init__()
        self.encoded, self.matched = [], []

    def encode(self, images):
        t = (images.mean((1, 2, 3)) * 255).round()
        self.encoded += [int(t[0])]
        return t

    def match(self, source, target, size):
        self.matched += [(int(source[0]), int(target[0]))]
        move = (target - source)[:, None] * STEP
        return move[..., None, None].expand(-1, -1, *size)


class Points(Method):
    """Moves points by `STEP` a unit of brightness and sees them as long as they are in the frame."""

    info: ClassVar[Info] = Info("Points", "none", "Apache-2.0")
    calls: ClassVar[list[tuple[int, int]]] = []

    def track(self, clip, queries):
        self.calls.append((clip.frames, queries.shape[1]))
        t = clip.video[:, :, 0, 0, 0].float()
        xy = queries[:, None, :, 1:] + (t[..., None] - t.gather(1, queries[..., 0].long())[:, None])[..., None] * STEP
        h, w = clip.size
        seen = ((xy >= 0) & (xy <= torch.tensor([w, h]))).all(-1)
        return Tracks(xy, seen.float())


class Dense(Method):
    """Gives every pixel of a frame, moved by `STEP`."""

    info: ClassVar[Info] = Info("Dense", "none", "Apache-2.0")

    def track_dense(self, clip, source=0):
        h, w = clip.size
        y, x = torch.meshgrid(torch.arange(h) + 0.5, torch.arange(w) + 0.5, indexing="ij")
        t = torch.arange(clip.frames)[:, None, None, None] - source
        xy = (torch.stack([x, y]) + t * STEP[:, None, None])[None].expand(clip.video.shape[0], -1, -1, -1, -1)
        return DenseTracks(xy, torch.ones(xy.shape[0], clip.frames, h, w), source)


class Video:
    """A video on demand whose frame t has brightness t."""

    fps = 24.0

    def __init__(self, frames, size):
        self.frames, self.size, self.most = frames, size, 0

    def read(self, indices):
        self.most = max(self.most, len(indices))
        return torch.stack([torch.full((3, *self.size), t, dtype=torch.uint8) for t in indices])


def numbered(frames, size=(40, 60)):
    return Clip(video=Video(frames, size).read(range(frames))[None])


def straight(frames, queries):
    t = torch.arange(frames)[None, :, None, None]
    return queries[:, None, :, 1:] + (t - queries[:, None, :, :1]) * STEP


QUERIES = torch.tensor([[[0, 5.0, 5.0], [3, 20.25, 10.5], [5, 30.0, 20.0]]])


def test_flow_made_of_encode_and_match_encodes_each_frame_once():
    method = Flows()
    flow = method.flow(numbered(4), [(0, 1), (1, 0), (0, 3)])
    assert flow.pairs == ((0, 1), (1, 0), (0, 3)) and flow.xy.shape == (1, 3, 2, 40, 60)
    assert torch.allclose(flow.xy[0, 2, :, 0, 0], 3 * STEP) and sorted(method.encoded) == [0, 1, 3]
    assert method.flow(numbered(4), []).xy.shape == (1, 0, 2, 40, 60)
    with pytest.raises(DataError, match=r"flow pair \(0, 4\) is outside the clip of 4 frames"):
        method.flow(numbered(4), [(0, 1), (0, 4)])


def test_points_that_go_back_and_points_that_come_share_the_flow_of_a_pair(monkeypatch):
    method = Flows()
    tracks = method.track(numbered(6), QUERIES)
    pairs = set(method.matched)
    assert len(pairs) == len(method.matched) and {(0, 1), (1, 0), (4, 5), (5, 4)} <= pairs
    monkeypatch.setattr("trackpl.adapters.FLOW_BYTES", 3 * 8 * 40 * 60)  # of three pairs
    again = method.track(numbered(6), QUERIES)
    assert torch.equal(again.xy, tracks.xy) and len(method.matched) > 2 * len(pairs)


def test_tracks_from_flow_follow_it_both_ways_in_time():
    tracks = Flows().track(numbered(6), QUERIES)
    assert torch.allclose(tracks.xy, straight(6, QUERIES), atol=1e-4)
    x, y = tracks.xy.unbind(-1)
    inside = (x >= 0) & (x <= 60) & (y >= 0) & (y <= 40)
    assert torch.equal(tracks.visible > 0.5, inside)


def test_tracks_from_flow_agree_with_the_truth_of_a_moving_clip():
    class True_(Flows):
        def encode(self, images):
            self.t = getattr(self, "t", -1) + 1
            return torch.full((images.shape[0],), float(self.t))

    clip = moving_clip(5, (64, 80), points=10)
    start = clip.tracks[:, :1].transpose(1, 2)[:, :, 0]
    queries = torch.cat([torch.zeros_like(start[..., :1]), start], -1)
    assert torch.allclose(True_().track(clip, queries).xy, clip.tracks, atol=1e-3)


def test_a_step_that_does_not_return_hides_the_point():
    class Inconsistent(Flows):
        def match(self, source, target, size):
            flow = super().match(source, target, size).clone()
            return flow + 30 if (target - source)[0] < 0 else flow

    tracks = Inconsistent().track(numbered(3), QUERIES[:, :1])
    assert tracks.visible[0, 0, 0] > 0.5 and (tracks.visible[0, 1:, 0] < 0.5).all()


def test_streaming_a_video_equals_the_clip_and_never_reads_it_whole():
    video, queries = Video(50, (40, 60)), QUERIES * torch.tensor([5.0, 1, 1])
    method, seen = Flows(), []
    streamed = adapters.track_video(method, video, queries[0], progress=lambda done, all_: seen.append((done, all_)))
    whole = Flows().track(numbered(50), queries)
    assert torch.allclose(streamed.xy, whole.xy, atol=1e-4) and torch.allclose(streamed.visible, whole.visible)
    assert video.most == 1 and seen[-1] == (50, 50)


@pytest.mark.parametrize("born", [[0, 0, 0], [0, 40, 99], [99, 57, 3]])
def test_windows_of_a_long_video_give_what_one_window_would(monkeypatch, born):
    queries = torch.tensor([[float(t), 200.0, 100.0] for t in born])
    video, method = Video(100, (300, 500)), Points()
    whole = adapters.track_video(method, video, queries)
    assert method.calls[-1] == (100, 3)
    monkeypatch.setattr(adapters, "VIDEO_BYTES", 0)
    monkeypatch.setattr(streams, "WINDOW", 16)
    windows = adapters.track_video(method, video, queries)
    inside = whole.visible > 0
    assert torch.allclose(windows.xy[inside], whole.xy[inside], atol=1e-3)
    assert torch.equal(windows.visible[inside], whole.visible[inside])


def test_dense_tracks_from_points_and_points_from_dense_tracks():
    clip = numbered(3, (6, 8))
    dense = Points().track_dense(clip, 1)
    assert dense.xy.shape == (1, 3, 2, 6, 8) and dense.visible.shape == (1, 3, 6, 8)
    want = torch.tensor([3.5, 2.5])[:, None] + (torch.arange(3) - 1) * STEP[:, None]
    assert torch.allclose(dense.xy[0, :, :, 2, 3], want.T)
    parts = adapters.track_dense(Points(), clip, 1, chunk=7)
    assert torch.equal(parts.xy, dense.xy)
    queries = torch.tensor([[[0, 3.25, 2.5], [2, 4.0, 4.0]]])
    assert torch.allclose(Dense().track(clip, queries).xy, straight(3, queries), atol=1e-4)


def test_a_method_without_any_capability_says_so():
    class Nothing(Method):
        info: ClassVar[Info] = Info("Nothing", "none", "Apache-2.0")

    with pytest.raises(Error, match="Nothing has neither `track` nor `flow` nor `track_dense`"):
        Nothing().track(numbered(2), QUERIES[:, :1])
    with pytest.raises(Error, match="Nothing gives no flow"):
        Nothing().flow(numbered(2), [(0, 1)])
    with pytest.raises(Error, match="no losses"):
        Nothing().losses(numbered(2))
