"""The shaking camera: points stay on their pixels, and every choice has the probabilities of the specification."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from trackpl.augment import pixel_centres
from trackpl.camera_shake import CameraShake
from trackpl.errors import DataError
from trackpl.types import Clip, Flow

STILL = {
    "pad": 0,
    "scale": (1.0, 1.0),
    "scale_step": 0.0,
    "shift_step": 0,
    "horizontal_flip": 0.0,
    "vertical_flip": 0.0,
}
CLEAN = {"erase": 0.0, "replace": 0.0, "colour": 0.0, "blur": 0.0}
SIZE = (48, 64)


def ramp_clip(b=2, t=6, n=60, h=80, w=100):
    """A clip whose red and green say where a pixel of frame 0 came from; the scene moves by a step a frame."""
    g = torch.Generator().manual_seed(0)
    step = torch.tensor([1.5, -0.75])
    frames = torch.arange(t)
    source = pixel_centres((h, w)) - step[:, None, None] * frames[:, None, None, None]
    video = torch.cat([0.5 + (source - 40) / 250, torch.full((t, 1, h, w), 0.25)], 1)
    tracks = torch.rand(b, 1, n, 2, generator=g) * torch.tensor([w, h]) + step * frames[:, None, None]
    inside = (tracks >= 0).all(-1) & (tracks[..., 0] <= w) & (tracks[..., 1] <= h)
    return Clip(video.expand(b, -1, -1, -1, -1).clone(), tracks, inside, torch.ones_like(inside), name=("a", "b")[:b])


def at(video, xy):
    """Read (B, T, C, H, W) at (B, T, N, 2): (B, T, N, C)."""
    size = torch.tensor([video.shape[-1], video.shape[-2]])
    grid = (2 * xy / size - 1).flatten(0, 1)[:, None]
    found = F.grid_sample(video.flatten(0, 1), grid, padding_mode="border", align_corners=False)
    return found[:, :, 0].transpose(1, 2).unflatten(0, video.shape[:2])


def inner(xy, size, margin):
    return (xy > margin).all(-1) & (xy[..., 0] < size[1] - margin) & (xy[..., 1] < size[0] - margin)


def within(share, expected, n):
    return abs(share - expected) < 5 * math.sqrt(expected * (1 - expected) / n)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("occluders", [False, True])
def test_visible_points_stay_on_their_pixels(seed, occluders):
    clip = ramp_clip()
    boxes = {"erase": 1.0, "replace": 1.0, "boxes": 2, "box": (5, 15)} if occluders else {}
    out = CameraShake(SIZE, **(CLEAN | boxes))(clip, torch.tensor([seed, seed + 100]))
    assert out.video.shape == (2, 6, 3, *SIZE) and out.tracks.shape == clip.tracks.shape
    before, after = at(clip.video, clip.tracks), at(out.video, out.tracks)
    sure = out.visible & inner(clip.tracks, clip.size, 4) & inner(out.tracks, SIZE, 1)
    same = (before - after).abs().amax(-1) < 1e-4
    if occluders:  # interpolation mixes box and scene at the edge of a box
        assert same[sure].float().mean() > 0.85 and same[:, 0][sure[:, 0]].all()
        hidden = clip.visible & ~out.visible & inner(out.tracks, SIZE, 1) & inner(clip.tracks, clip.size, 4)
        assert hidden.any() and same[hidden].float().mean() < 0.3 and not hidden[:, 0].any()
    else:
        assert sure.sum() > 20 and same[sure].all()
        x, y = out.tracks.unbind(-1)
        inside = (x >= 0) & (x <= SIZE[1]) & (y >= 0) & (y <= SIZE[0])
        assert torch.equal(out.visible, clip.visible & inside)
    assert torch.equal(out.valid, clip.valid)
    assert out.video.min() >= 0 and out.video.max() <= 1


def test_a_clip_is_augmented_the_same_in_any_batch():
    clip, seeds = ramp_clip(), torch.tensor([3, 4])
    augment = CameraShake(SIZE, colour=0.5, blur=0.5, box=(2, 20))
    both = augment(clip, seeds)
    for i in range(2):
        one = clip.map(lambda x, i=i: x[i : i + 1])
        alone = augment(dataclasses.replace(one, name=clip.name[i : i + 1]), seeds[i : i + 1])
        assert (alone.video - both.video[i : i + 1]).abs().max() < 1e-5
        assert torch.equal(alone.tracks, both.tracks[i : i + 1])
        assert torch.equal(alone.visible, both.visible[i : i + 1])
    assert not torch.equal(both.video[0], both.video[1])


def test_flips_are_exact_and_the_reference_is_one_pixel_off():
    clip = ramp_clip(t=2, h=SIZE[0] + 11, w=SIZE[1] + 11)
    plain = CameraShake(SIZE, **CLEAN, **STILL)(clip, torch.tensor([1, 2]))
    flipping = CLEAN | STILL | {"horizontal_flip": 1.0}
    flipped = CameraShake(SIZE, **flipping)(clip, torch.tensor([1, 2]))
    assert torch.allclose(flipped.video, plain.video.flip(-1), atol=1e-5)
    mirrored = plain.tracks * torch.tensor([-1.0, 1.0]) + torch.tensor([float(SIZE[1]), 0.0])
    assert torch.allclose(flipped.tracks, mirrored, atol=1e-4)
    theirs = CameraShake(SIZE, **flipping, reference_flip=True)(clip, torch.tensor([1, 2]))
    assert torch.allclose(theirs.tracks, flipped.tracks + torch.tensor([1.0, 0.0]), atol=1e-4)
    assert torch.equal(theirs.video, flipped.video)


def test_the_crop_begins_around_the_points_seen_in_the_first_frame():
    clip = ramp_clip(t=2, h=200, w=300)
    tracks = clip.tracks.clone()
    tracks[..., :] = torch.tensor([220.0, 120.0])
    tracks[:, :, 0] = float("nan")
    visible = torch.ones_like(clip.visible)
    visible[:, :, 0] = False
    visible[1] = False
    out = CameraShake(SIZE, **CLEAN, **STILL)(dataclasses.replace(clip, tracks=tracks, visible=visible))
    assert torch.allclose(out.tracks[0, :, 1:], torch.tensor([SIZE[1] / 2, SIZE[0] / 2]).expand(2, 59, 2))
    start = 220 - out.tracks[1, :, 1:, 0], 120 - out.tracks[1, :, 1:, 1]  # nothing to see: around (width, height)
    assert (start[0] == SIZE[1] / 2).all() and (start[1] == SIZE[0] / 2).all()


def test_choices_have_the_probabilities_of_the_specification():
    augment, clip, n = CameraShake(), Clip(torch.zeros(1, 3, 3, 512, 512)), 4000
    draws = [augment._draw(clip, seed) for seed in range(n)]

    def all_of(name):
        return torch.stack([getattr(d, name) for d in draws]).double()

    for name, p in (("colour", 0.25), ("blur", 0.25)):
        assert within(float(all_of(name).mean()), p, n)
    for axis in range(2):
        assert within(float(all_of("flips")[:, axis].mean()), 0.5, n)
    assert within(float((all_of("flips").sum(1) == 2).double().mean()), 0.25, n)  # by themselves
    pads = all_of("pads")
    assert pads.min() == 0 and pads.max() == 24 and within(float((pads < 12).double().mean()), 12 / 25, 4 * n)
    base = all_of("base")
    assert base.min() >= 0.75 and base.max() <= 1.25 and within(float((base < 0.9).double().mean()), 0.3, n)
    sigma = all_of("sigma")
    assert sigma.min() >= 0.1 and sigma.max() <= 2 and within(float((sigma < 0.48).double().mean()), 0.2, 3 * n)
    for name, reach in (("zoom", 0.05), ("sway", 15)):
        swing = all_of(name) / reach
        assert swing.abs().max() <= 1 and within(float((swing < 0.5).double().mean()), 0.75, 6 * n)
    for name in ("erased", "replaced"):
        boxed = (all_of(name)[..., 2] > 0).any(-1)[:, 1:]
        assert within(float(boxed.double().mean()), 0.5, 2 * n)
    either = [(all_of(k)[..., 2] > 0).any(-1)[:, 1:] for k in ("erased", "replaced")]
    assert within(float((either[0] & either[1]).double().mean()), 0.25, 2 * n)
    source = all_of("source")
    assert all(within(float((source == f).double().mean()), 1 / 3, 30 * n) for f in range(3))
    hue = all_of("factors")[..., 3]
    assert hue.abs().max() <= 0.0797 and all_of("factors")[..., :3].min() >= 0.8


def test_the_path_is_that_of_the_specification():
    """Against the law written out for one clip and one frame after the other."""
    size, frames = (384, 512), 24
    augment, h, w = CameraShake(size), 512, 512
    clip = Clip(torch.zeros(1, frames, 3, h, w), torch.full((1, frames, 1, 2), 256.0), torch.ones(1, frames, 1) > 0)
    for seed in range(50):
        draw = augment._draw(clip, seed)
        grow, start = augment._path(clip, draw.map(lambda x: x[None]))
        left, top, right, bottom = draw.pads.tolist()
        old = (w + left + right, h + top + bottom)
        scale, change, offset, total, middle = [float(draw.base)] * 2, [0.0, 0.0], [0, 0], [0, 0], [0.0, 0.0]
        for t in range(frames):
            if t > 0:
                zoom, sway = draw.zoom[t].tolist(), draw.sway[t].tolist()
                change = zoom if t == 1 else [0.8 * c + 0.2 * u for c, u in zip(change, zoom, strict=True)]
                scale = [s + c for s, c in zip(scale, change, strict=True)]
                mean = sum(scale) / 2
                scale = [min(max((s + mean) / 2, 0.2), 2) for s in scale]
                if t == 1:
                    offset = [math.floor(u) for u in sway]
                    assert all(-15 <= o <= 14 for o in offset)
                else:
                    offset = [int(0.8 * o + 0.2 * u) for o, u in zip(offset, sway, strict=True)]
                total = [a + o for a, o in zip(total, offset, strict=True)]
            crop = (size[1], size[0])
            for axis, pad in ((0, left), (1, top)):
                new = max(int(old[axis] * scale[axis]), crop[axis] + 10)
                assert float(grow[0, t, axis]) == pytest.approx(new / old[axis], abs=1e-12)
                if t == 0:
                    middle[axis] = (256 + pad) * new / old[axis]
                begin = min(max(int(middle[axis] - crop[axis] / 2 + total[axis]), 0), new - crop[axis] - 1)
                assert float(start[0, t, axis]) == begin


def test_colours_and_blur_change_frames_of_some_clips_by_themselves():
    clip = ramp_clip(t=4, h=SIZE[0] + 11, w=SIZE[1] + 11)
    clip = dataclasses.replace(clip, video=(clip.video + torch.rand(1, 1, 3, *clip.size) * 0.2).clamp(0, 1))
    seeds = torch.arange(2)
    plain = CameraShake(SIZE, **CLEAN, **STILL)(clip, seeds).video
    coloured = CameraShake(SIZE, **(CLEAN | {"colour": 1.0}), **STILL)(clip, seeds).video
    ratio = (coloured / plain.clamp(min=0.05)).mean((2, 3, 4))
    assert (ratio[:, 1:] != ratio[:, :1]).all()
    blurred = CameraShake(SIZE, **(CLEAN | {"blur": 1.0}), **STILL)(clip, seeds).video

    def roughness(video):
        return (video[..., 1:] - video[..., :-1]).square().mean((2, 3, 4))

    assert (roughness(blurred) <= roughness(plain)).all() and (roughness(blurred) < 0.5 * roughness(plain)).any()


def test_queries_move_with_their_frames_and_those_that_are_lost_are_not_supervised():
    clip = ramp_clip()
    frame = torch.arange(60).expand(2, 60) % 6
    xy = clip.tracks.gather(1, frame[:, None, :, None].expand(-1, 1, -1, 2))[:, 0]
    clip = dataclasses.replace(clip, queries=torch.cat([frame[..., None].float(), xy], -1))
    out = CameraShake(SIZE, erase=1.0, replace=0.0, box=(5, 20))(clip, torch.tensor([5, 6]))
    moved = out.tracks.gather(1, frame[:, None, :, None].expand(-1, 1, -1, 2))[:, 0]
    kept = out.valid.all(1)
    assert torch.equal(kept, out.valid.any(1)) and kept.any() and not kept.all()
    assert torch.allclose(out.queries[..., 1:][kept], moved[kept], atol=1e-3)
    inside = clip.tracks.new_tensor([SIZE[1], SIZE[0]])
    assert (out.queries[..., 1:] >= 0).all() and (out.queries[..., 1:] <= inside).all()
    visible = out.visible.gather(1, frame[:, None])[:, 0]
    was = clip.visible.gather(1, frame[:, None])[:, 0]
    assert torch.equal(visible[was], kept[was])


def test_uint8_and_no_tracks_are_taken():
    clip = ramp_clip()
    byte = Clip(video=(clip.video * 255).round().byte())
    out = CameraShake(SIZE)(byte)
    assert out.video.dtype == torch.float32 and out.tracks is None and out.video.max() <= 1


def test_bad_options_and_fields_are_named():
    for bad in ({"erase": 1.5}, {"boxes": 0}, {"box": (9, 2)}, {"pad": -1}, {"blur": -0.1}, {"horizontal_flip": 2.0}):
        with pytest.raises(DataError, match=next(iter(bad))):
            CameraShake(**bad)
    clip = ramp_clip()
    flow = Flow(torch.zeros(2, 1, 2, *clip.size), ((0, 1),))
    with pytest.raises(DataError, match="flow"):
        CameraShake(SIZE)(dataclasses.replace(clip, flow=flow))
