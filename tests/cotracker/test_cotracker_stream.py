"""CoTracker online: equal to the published streams and to offline, points added later, memory, what has no stream."""

import json
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from golden.fill import filled
from trackpl_cotracker.method import CoTracker
from trackpl_cotracker.stream import SlidingStream

from trackpl import Clip, Tracks, adapters
from trackpl.streams import WindowStream
from trackpl.testing import moving_clip, run_stream

GOLDEN = Path(__file__).parents[1] / "golden" / "cotracker"
SMALL = {"window": 8, "width": 32, "depth": 1, "iterations": 1, "resolution": (64, 64), "support_grid": 2}
KINDS = [
    {"version": 1},
    {"version": 1, "support_grid": 0},
    {"version": 2},
    {"version": 3, "mode": "online"},
    {"version": 3, "mode": "online", "mask_unstarted": True},
]


def small(**options):
    torch.manual_seed(0)
    return CoTracker(**SMALL | options).eval()


def published(name, **options):
    """The golden's arrays and a method of its weights; its coordinates are those of pixel centres at integers."""
    manifest = json.loads((GOLDEN / "manifest.json").read_text())
    case = next(case for case in manifest["cases"] if case["name"] == name)
    shapes = manifest["weight_sets"][case["weight_set"]]
    method = CoTracker(version=3, mode="online", **options).eval()
    state = method.import_weights({k: filled(k, tuple(s), case["scale"]) for k, s in shapes.items()})
    method.load_state_dict(state)
    return method


def arrays(name):
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
        return {k: torch.from_numpy(file[k]) for k in file.files}


def queries_of(d):
    return d["queries"] + torch.tensor([0, 0.5, 0.5])


def given(frames, times=(0, 2, 9)):
    clip = moving_clip(frames, (64, 80), points=len(times))
    t = torch.tensor([float(min(t, frames - 1)) for t in times])
    return clip, torch.cat([t[:, None], clip.tracks[0, 0]], 1)


def close(a, b, pixels=1e-4):
    assert a.xy.shape == b.xy.shape
    torch.testing.assert_close(a.xy, b.xy, atol=pixels, rtol=0)
    torch.testing.assert_close(a.visible, b.visible, atol=1e-5, rtol=0)


def test_the_stream_equals_the_published_one():
    d = arrays("v3_stream")
    method = published("v3_online_T27", resolution=(64, 80), iterations=4, support_grid=0)
    found = run_stream(method.stream(queries_of(d)), d["video"], [5])
    t = torch.arange(27)[:, None]
    after = t > d["queries"][:, 0]  # in its query frame a point is its query
    assert (found.xy[0] - 0.5 - d["stream_tracks"])[after].abs().max() < 5e-4
    assert (found.visible[0] - d["stream_visibility"])[after].abs().max() < 5e-5
    assert (found.confidence[0] - d["stream_confidence"])[after].abs().max() < 5e-5


def test_what_is_shown_at_each_step_equals_the_published_predictor():
    d = arrays("v3_online_pred_support")
    method = published("v3_online_pred_support", resolution=(64, 96), iterations=6, support_grid=6, weigh_visible=True)
    stream = method.stream(queries_of(d))
    parts, after = [], torch.arange(27)[:, None] > d["queries"][:, 0]
    for step, stop in enumerate((16, 24, 27)):
        parts.append(stream.step(d["video"][stream.frames : stop]))
        shown = stream.latest() if stop < 27 else stream.finish()
        xy = torch.cat([p.xy for p in [*parts, shown]], 1)[0]
        visible = torch.cat([p.visible for p in [*parts, shown]], 1)[0]
        assert xy.shape[0] == stop
        assert (xy - 0.5 - d[f"step{step}_tracks"])[after[:stop]].abs().max() < 1e-3
        sure = after[:stop] & ((visible - 0.6).abs() > 1e-3)
        assert torch.equal((visible > 0.6)[sure], d[f"step{step}_visible"][sure] > 0)


@pytest.mark.parametrize("frames", [1, 4, 13])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_online_equals_offline(kind, frames):
    method, (clip, queries) = small(**kind), given(frames)
    stream = method.stream(queries)
    assert isinstance(stream, SlidingStream) and stream.equals_track
    found = run_stream(stream, clip.video[0], [3, 1])
    whole = method.track(clip, queries[None])
    since = torch.arange(frames)[:, None] >= queries[:, 0]
    close(Tracks(found.xy[:, since], found.visible[:, since]), Tracks(whole.xy[:, since], whole.visible[:, since]))
    assert not found.visible[0][~since].any()


@pytest.mark.parametrize("at", [3, 9, 12])
@pytest.mark.parametrize("kind", [k for k in KINDS if k["version"] < 3 or "mask_unstarted" in k], ids=str)
def test_points_added_later_are_as_if_asked_for_from_the_start(kind, at):
    """Also where the last window must be done again: at 9 and 12 frames, for the points of frames 5 and 9."""
    method, (clip, queries) = small(**kind), given(17, (0, 2, 9, 9 if at == 12 else 5, 16))
    early = run_stream(method.stream(queries), clip.video[0], [17])
    stream = method.stream(queries[:2])
    assert stream.adds_alike
    stream.step(clip.video[0, :at])
    settled = stream.settled
    stream.add(queries[2:3])
    stream.add(queries[3:])
    latest = stream.latest()
    assert (latest is None) == (settled == 0) and (latest is None or latest.xy.shape == (1, 4, 5, 2))
    late = run_stream(stream, clip.video[0, at:], [1])
    close(Tracks(early.xy[:, settled:], early.visible[:, settled:]), late)


def test_version_3_as_published_feels_points_before_their_frame_if_it_knows_them():
    """Adding is exact while the only window without the point is the one done again, and nearly so later."""
    method, (clip, queries) = small(version=3, mode="online", iterations=4), given(17, (0, 2, 5, 14))
    early = run_stream(method.stream(queries[:3]), clip.video[0], [17])
    stream = method.stream(queries[:2])
    assert not stream.adds_alike
    stream.step(clip.video[0, :8])
    stream.add(queries[2:3])
    close(Tracks(early.xy[:, 4:], early.visible[:, 4:]), run_stream(stream, clip.video[0, 8:], [1]))
    early = run_stream(method.stream(queries), clip.video[0], [17])
    stream = method.stream(queries[:3])
    stream.step(clip.video[0, :14])
    stream.add(queries[3:])
    late = run_stream(stream, clip.video[0, 14:], [1])
    gap = (early.xy[:, 8:] - late.xy).abs()
    assert torch.equal(late.xy[0, 6, 3], queries[3, 1:]) and 0 < gap.max() < 0.5


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[4]], ids=str)
def test_a_long_video_equals_one_held_whole(kind, monkeypatch):
    """Backwards too, by a stream of the reversed video.

    Its first frame is that of the last query, here the end of the video, and its support points would lie there; those
    of the offline pass lie in the video's first frame.
    """
    method, (clip, queries) = small(**kind | {"support_grid": 0}), given(14, (0, 6, 13))

    class Video:
        frames, size = 14, (64, 80)

        def read(self, indices):
            return clip.video[0, list(indices)]

    whole = method.track(clip, queries[None])
    monkeypatch.setattr(adapters, "VIDEO_BYTES", 0)
    found = adapters.track_video(method, Video(), queries)
    close(found, whole, 1e-3)


def test_memory_does_not_grow_with_the_frames():
    method, (clip, queries) = small(version=2, support_grid=0), given(20, (0, 3))
    stream = method.stream(queries)
    for _ in range(3):
        stream.step(clip.video[0])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(7):
        stream.step(clip.video[0])
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert stream.frames == 200 and stream.settled == 196
    assert grown < 8 << 20  # features of 140 frames: 24 MB


@pytest.mark.parametrize("options", [{"version": 3}, {"version": 1, "protocol": "single", "local_grid": 2}], ids=str)
def test_methods_that_need_all_frames_get_windows_of_the_platform(options):
    method, (clip, queries) = small(**options), given(5)
    stream = method.stream(queries)
    assert isinstance(stream, WindowStream) and not stream.equals_track
    found = run_stream(stream, clip.video[0], [2])
    whole = method.track(clip, queries[None])  # that fits a window
    since = torch.arange(5)[:, None] >= queries[:, 0]
    close(Tracks(found.xy[:, since], found.visible[:, since]), Tracks(whole.xy[:, since], whole.visible[:, since]))


def test_a_stream_without_points_then_with():
    method, (clip, queries) = small(version=1), given(12)
    stream = method.stream()
    assert stream.step(clip.video[0]).xy.shape == (1, 8, 0, 2)
    stream.add(queries[2:] * torch.tensor([0.0, 1, 1]) + torch.tensor([9.0, 0, 0]))
    rest = stream.finish()
    assert rest.xy.shape == (1, 4, 1, 2) and rest.visible[0, 1, 0] == 1
    whole = method.track(Clip(video=clip.video), torch.cat([rest.xy.new_tensor([[9.0]]), rest.xy[0, 1]], 1)[None])
    close(Tracks(rest.xy[:, 1:], rest.visible[:, 1:]), Tracks(whole.xy[:, 9:], whole.visible[:, 9:]))
