import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from trackpl.augment import Augment, pixel_centres, resize, reversed_clip, warp
from trackpl.errors import DataError
from trackpl.types import Camera, Clip, Flow

PLAIN = {"horizontal_flip": 0.0, "hue": 0.0, "brightness": 0.0}


def at(image: torch.Tensor, xy: torch.Tensor) -> torch.Tensor:
    """Read images (B, C, H, W) at pixels (B, N, 2): (B, N, C)."""
    size = torch.tensor([image.shape[-1], image.shape[-2]])
    found = F.grid_sample(image, (2 * xy / size - 1)[:, None], padding_mode="border", align_corners=False)
    return found[:, :, 0].transpose(1, 2)


def ramp_clip(b: int = 2, t: int = 3, n: int = 40, h: int = 40, w: int = 56, seed: int = 0) -> Clip:
    """A clip whose red and green say where a pixel of frame 0 came from; the whole scene moves by `step` a frame."""
    g = torch.Generator().manual_seed(seed)
    centres = pixel_centres((h, w))  # (2, H, W)
    step = torch.tensor([1.5, -0.75])
    frames = torch.arange(t)
    source = centres - step[:, None, None] * frames[:, None, None, None]  # (T, 2, H, W)
    video = torch.cat([0.5 + (source - 20) / 200, torch.full((t, 1, h, w), 0.25)], 1)
    start = torch.rand(b, 1, n, 2, generator=g) * torch.tensor([w, h])
    tracks = start + step * frames[:, None, None]
    inside = (tracks >= 0).all(-1) & (tracks[..., 0] <= w) & (tracks[..., 1] <= h)
    pairs = tuple((s, e) for s in range(t) for e in range(t) if s != e)
    xy = torch.stack([step * (e - s) for s, e in pairs])[:, :, None, None].expand(-1, -1, h, w)
    xy = xy * (1 + (centres[0] - 20) / 100)  # (P, 2, H, W), a field that varies
    ends = xy + centres
    seen = (ends[:, 0] >= 0) & (ends[:, 0] <= w) & (ends[:, 1] >= 0) & (ends[:, 1] <= h)
    tiles = ((centres[0] // 8 + 3 * (centres[1] // 8)) % 5).long()
    intrinsics = torch.tensor([50.0, 60.0, w / 2, h / 2]).expand(b, t, 4)
    return Clip(
        video=video.expand(b, -1, -1, -1, -1).clone(),
        tracks=tracks,
        visible=inside,
        valid=torch.rand(b, t, n, generator=g) > 0.1,
        depth=(2 + centres[0] / w).expand(b, t, 1, h, w).clone(),
        flow=Flow(xy.expand(b, -1, -1, -1, -1).clone(), pairs, seen.expand(b, -1, -1, -1).clone()),
        labels=tiles.expand(b, t, h, w).clone(),
        camera=Camera(intrinsics, torch.eye(4).expand(b, t, 4, 4)),
        name=tuple(f"clip {i}" for i in range(b)),
    )


def augmentations(**fixed):
    """Every geometry: crops, enlargements, flips."""
    return st.builds(
        lambda low, ratio, size, aspect, h, v: Augment(
            size=size, scale=(low, low * ratio), aspect=aspect, horizontal_flip=h, vertical_flip=v,
            **({"hue": 0.0, "brightness": 0.0} | fixed),
        ),
        low=st.floats(0.5, 1.5),
        ratio=st.floats(1, 2),
        size=st.sampled_from([None, (24, 32), (33, 21)]),
        aspect=st.floats(1, 1.5),
        h=st.sampled_from([0.0, 0.5, 1.0]),
        v=st.sampled_from([0.0, 0.5, 1.0]),
    )  # fmt: skip


SEEDS = st.lists(st.integers(0, 2**62), min_size=2, max_size=2).map(torch.tensor)


def far_from_edges(clip: Clip, old: torch.Tensor, new: torch.Tensor, size, margin: float = 4) -> torch.Tensor:
    """Where the pixels around a point are interpolated from pixels inside the old image, not continued at its edge."""

    def inner(xy, h, w, m):
        return (xy > m).all(-1) & (xy[..., 0] < w - m) & (xy[..., 1] < h - m)

    return inner(old, *clip.size, margin) & inner(new, *size, 1)


@settings(max_examples=60, deadline=None)
@given(augment=augmentations(), seeds=SEEDS)
def test_tracks_stay_on_their_pixels(augment, seeds):
    clip = ramp_clip()
    out = augment(clip, seeds)
    assert out.tracks.shape == clip.tracks.shape and out.size == (augment.size or clip.size)
    checked = 0
    for t in range(clip.frames):
        before, after = at(clip.video[:, t], clip.tracks[:, t]), at(out.video[:, t], out.tracks[:, t])
        sure = far_from_edges(clip, clip.tracks[:, t], out.tracks[:, t], out.size)
        checked += int(sure.sum())
        assert ((before - after).abs()[sure] < 1e-4).all()
    assume(checked > 0)


@settings(max_examples=60, deadline=None)
@given(augment=augmentations(), seeds=SEEDS)
def test_a_point_is_visible_if_it_was_and_lies_in_the_crop(augment, seeds):
    clip = ramp_clip()
    out = augment(clip, seeds)
    x, y = out.tracks.unbind(-1)
    inside = (x >= 0) & (x <= out.size[1]) & (y >= 0) & (y <= out.size[0])
    assert torch.equal(out.visible, clip.visible & inside)
    assert torch.equal(out.valid, clip.valid)


@settings(max_examples=60, deadline=None)
@given(augment=augmentations(), seeds=SEEDS)
def test_flow_is_the_motion_of_the_moved_pixels(augment, seeds):
    clip = ramp_clip()
    out = augment(clip, seeds)
    choices = [augment._choose(clip, int(s)) for s in seeds]
    scale = torch.stack([c.scale for c in choices]).float()[:, :, None, None]
    shift = torch.stack([c.shift for c in choices]).float()[:, :, None, None]
    new = pixel_centres(out.size).expand(2, 2, *out.size)
    old = (new - shift) / scale
    flat = old.flatten(2).transpose(1, 2)
    sure = far_from_edges(clip, flat, new.flatten(2).transpose(1, 2), out.size)
    for p in range(len(clip.flow.pairs)):
        before = at(clip.flow.xy[:, p], flat)  # exact between pixel centres: the field is linear
        moved = (flat + before) * scale[..., 0].transpose(1, 2) + shift[..., 0].transpose(1, 2)
        found = (new + out.flow.xy[:, p]).flatten(2).transpose(1, 2)
        assert ((moved - found).abs()[sure] < 1e-3).all()
    ends = new[:, None] + out.flow.xy
    inside = (ends >= 0).all(2) & (ends[:, :, 0] <= out.size[1]) & (ends[:, :, 1] <= out.size[0])
    assert not (out.flow.visible & ~inside).any()


@settings(max_examples=40, deadline=None)
@given(augment=augmentations(), seeds=SEEDS)
def test_labels_depth_and_camera_move_with_the_pixels(augment, seeds):
    clip = ramp_clip()
    out = augment(clip, seeds)
    points = torch.tensor([[0.1, -0.05, 2.0], [-0.2, 0.1, 3.0], [0.3, 0.2, 2.5]])

    def project(camera: Camera) -> torch.Tensor:
        f, c = camera.intrinsics[:, 0, None].split(2, -1)
        return f * points[:, :2] / points[:, 2:] + c

    choices = [augment._choose(clip, int(s)) for s in seeds]
    for i, c in enumerate(choices):
        moved = project(clip.camera)[i] * c.scale.float() + c.shift.float()
        assert torch.allclose(project(out.camera)[i], moved, atol=1e-3)
        old = (pixel_centres(out.size) - c.shift.float()[:, None, None]) / c.scale.float()[:, None, None]
        edge = ((old / 8) - (old / 8).round()).abs().amin(0) < 1e-3
        expected = (old[0] // 8 + 3 * (old[1] // 8)) % 5
        assert torch.equal(out.labels[i, 0][~edge], expected.long()[~edge])
        sure = (old[0] > 1) & (old[0] < clip.size[1] - 1)
        assert torch.allclose(out.depth[i, 0, 0][sure], (2 + old[0] / clip.size[1])[sure], atol=1e-4)


def assert_same(a: Clip, b: Clip) -> None:
    for field in ("video", "tracks", "visible", "valid", "depth", "labels"):
        assert torch.allclose(getattr(a, field).float(), getattr(b, field).float(), atol=1e-5), field
    assert a.flow.pairs == b.flow.pairs
    assert torch.equal(a.flow.xy, b.flow.xy) and torch.equal(a.flow.visible, b.flow.visible)
    assert torch.allclose(a.camera.intrinsics, b.camera.intrinsics)


@pytest.mark.parametrize("flips", [{"horizontal_flip": 1.0}, {"vertical_flip": 1.0}, {"reverse": 1.0}])
def test_a_flip_changes_everything_and_twice_nothing(flips):
    clip = ramp_clip()
    augment = Augment(**(PLAIN | flips))
    once = augment(clip)
    assert not torch.equal(once.video, clip.video) and not torch.equal(once.tracks, clip.tracks)
    assert_same(augment(once), clip)


def test_copies_keep_the_very_pixels():
    clip = ramp_clip()
    clip = dataclasses.replace(clip, video=(clip.video * 255).byte())
    out = Augment(size=(24, 32), **(PLAIN | {"horizontal_flip": 1.0}))(clip, torch.tensor([1, 2]))
    found = (out.video * 255).round().byte()
    windows = clip.video.flip(-1).unfold(3, 24, 1).unfold(4, 32, 1)  # B T 3 y x 24 32
    same = (windows == found[:, :, :, None, None]).all(-1).all(-1).all(2).all(1)
    assert same.flatten(1).any(1).all()


def test_flow_and_depth_are_not_mixed_across_a_jump():
    clip = ramp_clip(b=1)
    depth, xy = clip.depth.clone(), clip.flow.xy.clone()
    depth[..., :20], depth[..., 20:] = 1, torch.inf
    xy[..., :20], xy[..., 20:] = 0, 10
    clip = dataclasses.replace(clip, depth=depth, flow=Flow(xy, clip.flow.pairs))
    out = warp(clip, torch.tensor([[1.37, 1.37]]), torch.tensor([[-3.3, -2.1]]), (40, 56))
    assert set(out.depth.mul(1e5).round().unique().tolist()) == {1e5, torch.inf}
    assert set(out.flow.xy.mul(1e4).round().unique().tolist()) == {0, 137000}


def test_backwards_frames_and_pairs_are_renumbered():
    clip = ramp_clip(b=1, t=4)
    pairs = ((0, 1), (3, 1))
    order = [clip.flow.pairs.index(p) for p in pairs]
    clip = dataclasses.replace(clip, flow=dataclasses.replace(clip.flow.map(lambda x: x[:, order]), pairs=pairs))
    out = reversed_clip(clip)
    assert out.flow.pairs == ((3, 2), (0, 2))
    for p, (s, t) in enumerate(out.flow.pairs):
        start, end = pixel_centres(clip.size), pixel_centres(clip.size) + out.flow.xy[0, p]
        assert (s, t) == (3 - pairs[p][0], 3 - pairs[p][1]) and torch.equal(out.flow.xy, clip.flow.xy)
        assert ((end - start) - clip.flow.xy[0, p]).abs().max() < 1e-5
    assert torch.equal(out.video, clip.video.flip(1)) and torch.equal(out.visible, clip.visible.flip(1))


def test_each_clip_runs_in_its_own_direction():
    clip, seeds = ramp_clip(b=6), torch.arange(6)
    augment = Augment(reverse=0.5, **PLAIN)
    out = augment(clip, seeds)
    backwards = [not torch.equal(out.video[i], clip.video[i]) for i in range(6)]
    assert 0 < sum(backwards) < 6
    reverse = reversed_clip(clip)
    for i, b in enumerate(backwards):
        expected = reverse if b else clip
        for p, pair in enumerate(out.flow.pairs):
            assert torch.equal(out.flow.xy[i, p], expected.flow.xy[i, expected.flow.pairs.index(pair)])
        assert torch.equal(out.tracks[i], expected.tracks[i])
    assert out.name == clip.name


def test_one_way_flow_turns_the_whole_batch_or_none():
    clip = ramp_clip(b=6)
    one = dataclasses.replace(clip, flow=dataclasses.replace(clip.flow.map(lambda x: x[:, :1]), pairs=((0, 1),)))
    directions = set()
    for seed in range(8):
        out = Augment(reverse=0.5, **PLAIN)(one, torch.arange(6) + 100 * seed)
        turned = {not torch.equal(out.video[i], one.video[i]) for i in range(6)}
        assert len(turned) == 1 and out.flow.pairs == (((2, 1),) if turned == {True} else ((0, 1),))
        directions |= turned
    assert directions == {True, False}


ALL = {
    "size": (24, 32), "scale": (0.8, 1.4), "aspect": 1.2, "vertical_flip": 0.5, "reverse": 0.5, "saturation": 0.3,
    "contrast": 0.3, "swap_channels": 0.5, "jitter_hue": 0.1, "jitter_brightness": 0.1, "noise": 0.05,
}  # fmt: skip


def test_choices_follow_from_the_seed_and_not_from_the_batch():
    clip, seeds = ramp_clip(b=4), torch.tensor([5, 6, 7, 8])
    augment = Augment(**ALL)
    together = augment(clip, seeds)
    assert len({together.video[i].sum().item() for i in range(4)}) == 4
    for i in range(4):
        alone = augment(
            dataclasses.replace(clip.map(lambda x, i=i: x[i : i + 1]), name=clip.name[i : i + 1]), seeds[i : i + 1]
        )
        assert torch.allclose(alone.video[0], together.video[i], atol=1e-4)
        assert torch.equal(alone.tracks[0], together.tracks[i])
        assert alone.name == together.name[i : i + 1]
    assert together.video.dtype == torch.float32 and together.video.min() >= 0 and together.video.max() <= 1


def test_without_seeds_the_global_generator_decides():
    clip, augment = ramp_clip(), Augment()
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(augment(clip).video)
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])


def still(b: int = 2, t: int = 3) -> Clip:
    frame = torch.rand(1, 1, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.4 + 0.3
    return Clip(frame.expand(b, t, -1, -1, -1).clone())


def test_colours_change_alike_in_all_frames_and_otherwise_in_each_clip():
    options = {"hue": 0.5, "brightness": 0.1, "saturation": 0.5, "contrast": 0.5, "swap_channels": 0.5}
    out = Augment(horizontal_flip=0.0, **options)(still(), torch.tensor([3, 4])).video
    assert torch.equal(out, out[:, :1].expand_as(out))
    assert (out[0] - out[1]).abs().max() > 0.05 and (out - still().video).abs().amax((1, 2, 3, 4)).min() > 0.05


def test_jitter_leaves_the_first_frame():
    out = Augment(**PLAIN, jitter_brightness=0.3, jitter_hue=0.3)(still(), torch.tensor([3, 4])).video
    assert torch.allclose(out[:, 0], still().video[:, 0], atol=1e-5)
    assert (out[:, 1] - out[:, 0]).abs().amax((1, 2, 3)).min() > 0.02
    assert (out[:, 2] - out[:, 1]).abs().amax((1, 2, 3)).min() > 0.02


def test_brightness_is_a_shift_within_its_bounds():
    shifts = [
        (Augment(**(PLAIN | {"brightness": 0.1}))(still(1), torch.tensor([s])).video - still(1).video)
        for s in range(20)
    ]
    means = torch.stack([s.mean() for s in shifts])
    assert max(s.std() for s in shifts) < 1e-6
    assert means.abs().max() <= 0.1 and means.min() < -0.04 and means.max() > 0.04


def test_resize_multiplies_coordinates_and_keeps_the_type():
    clip = ramp_clip()
    out = resize(clip, (60, 28))
    assert out.size == (60, 28) and torch.allclose(out.tracks, clip.tracks * torch.tensor([0.5, 1.5]))
    assert torch.equal(out.visible, clip.visible)
    for t in range(clip.frames):
        sure = far_from_edges(clip, clip.tracks[:, t], out.tracks[:, t], out.size)
        before, after = at(clip.video[:, t], clip.tracks[:, t]), at(out.video[:, t], out.tracks[:, t])
        assert sure.any() and ((before - after).abs()[sure] < 1e-3).all()
    assert resize(Clip((clip.video * 255).byte()), (60, 28)).video.dtype == torch.uint8


def test_bare_videos_are_augmented_too():
    out = Augment(**ALL)(Clip((ramp_clip().video * 255).byte()))
    assert out.size == (24, 32) and out.tracks is None and out.flow is None


def test_what_cannot_be_is_refused():
    clip = ramp_clip()
    with pytest.raises(DataError, match="does not cover"):
        warp(clip, torch.ones(2, 2), torch.ones(2, 2), clip.size)
    for options in ({"hue": 0.7}, {"noise": -1}, {"scale": (2.0, 1.0)}, {"aspect": 0.5}, {"size": (0, 4)}):
        with pytest.raises(DataError, match="augmentation"):
            Augment(**options)


def test_queries_and_depths_go_with_their_tracks():
    t, n, size = 5, 6, (20, 30)
    tracks = torch.rand(2, t, n, 2) * torch.tensor([30.0, 20.0])
    frames = torch.randint(t, (2, n))
    queries = torch.cat(
        [frames[..., None].float(), tracks.gather(1, frames[:, None, :, None].expand(2, 1, n, 2))[:, 0]], -1
    )
    flow = Flow(torch.zeros(2, 1, 2, *size), ((0, 4),), depth=torch.rand(2, 1, *size) + 1)
    clip = Clip(
        torch.zeros(2, t, 3, *size),
        tracks,
        torch.ones(2, t, n) > 0,
        track_depth=torch.rand(2, t, n),
        queries=queries,
        flow=flow,
    )
    augment = Augment(size=(10, 16), scale=(0.8, 1.5), vertical_flip=0.5, reverse=0.5)
    for seed in range(8):
        out = augment(clip, torch.tensor([seed, seed + 100]))
        at = out.queries[..., :1].long()[:, None].expand(2, 1, n, 2)
        assert torch.allclose(out.tracks.gather(1, at)[:, 0], out.queries[..., 1:], atol=1e-4)
        order = out.track_depth[0, :, 0]
        assert order.equal(clip.track_depth[0, :, 0]) or order.equal(clip.track_depth[0, :, 0].flip(0))
        assert out.flow.depth.shape == (2, 1, 10, 16) and (out.flow.depth >= 1).all()
    elsewhere = reversed_clip(dataclasses.replace(clip, queries=queries.clone().fill_(-1))).queries
    assert (elsewhere[..., 0] == -1).all()
