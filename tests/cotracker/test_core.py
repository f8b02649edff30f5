"""CoTracker's encoder, version 1 and windows: equal to the goldens; groups, streams, precision, gradients."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden.fill import filled
from trackpl_cotracker import correlation, embeddings
from trackpl_cotracker.correlation import correlate
from trackpl_cotracker.encoder import Encoder
from trackpl_cotracker.features import Features, extract, joined, pyramid, sample
from trackpl_cotracker.version1 import Version1
from trackpl_cotracker.weights import translate
from trackpl_cotracker.windows import Sliding, track_groups, unroll

HERE = Path(__file__).parents[1] / "golden" / "cotracker"
SHARED = Path(__file__).parents[3] / "shared" / "golden" / "cotracker"


def golden(name):
    """Arrays and description of a case, ours or, where the project's shared folder is, one of the larger."""
    for folder in (HERE, SHARED):
        if (folder / f"{name}.npz").exists():
            manifest = json.loads((folder / "manifest.json").read_text())
            case = next(case for case in manifest["cases"] if case["name"] == name)
            keys = manifest["weight_sets"][case["weight_set"]].items()
            state = translate({k: filled(k, tuple(shape), case["scale"]) for k, shape in keys})
            case["state"] = {k.removeprefix("model."): v for k, v in state.items()}
            return {k: torch.from_numpy(np.asarray(v)) for k, v in np.load(folder / f"{name}.npz").items()}, case
    pytest.skip(f"{name} is not in this checkout")


def images_of(d):
    return d["video"].float() / 255 * 2 - 1


def joint(model, d, iterations):
    """Arguments of the windows: one group with all queries of a golden."""
    frames = torch.arange(len(d["video"]))[None]
    queries = d["queries"][None]
    return frames, torch.tensor([len(d["video"])]), queries[..., 0].long(), queries[..., 1:] / model.stride, iterations


@pytest.mark.parametrize("gradients", [False, True])
def test_the_encoder_equals_the_golden_at_every_stage(gradients):
    d, case = golden("encoder_s4")
    encoder = Encoder(4)
    encoder.load_state_dict({k.removeprefix("encoder."): v for k, v in case["state"].items()})
    seen = [[] for _ in encoder.stages]
    for stage, outputs in zip(encoder.stages, seen, strict=True):
        stage.register_forward_hook(lambda _stage, _x, out, outputs=outputs: outputs.append(out[0].clone()))
    with torch.set_grad_enabled(gradients):
        out = encoder(images_of(d))
    tolerance = case["tolerance"]["features"]
    assert (out[0] - d["features_frame0"]).abs().max() < tolerance
    assert (out[1, ::8] - d["features_frame1_every8"]).abs().max() < tolerance
    for i, outputs in enumerate(seen):
        assert (outputs[0][::16] - d[f"layer{i + 1}_frame0_every16"]).abs().max() < tolerance


def close(ours, theirs, tolerance):
    assert (ours - theirs).abs().max() < tolerance


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        "v1_s4_w8_iter1_undamped",
        pytest.param("v1_s4_w8_long", marks=pytest.mark.slow),
        pytest.param("v1_s8_w16_long", marks=pytest.mark.slow),
    ],
)
def test_version_1_equals_the_golden_in_every_window(name, gradients):
    d, case = golden(name)
    model = Version1(case["args"]["stride"], case["args"]["S"], entangled=True)
    model.load_state_dict(case["state"])
    tolerance = case["tolerance"]
    with torch.set_grad_enabled(gradients):
        features = model.encode(images_of(d))
        windows = list(unroll(model, features, *joint(model, d, case["call"]["iters"])))
    assert [w.start for w in windows] == d["window_starts"].tolist()
    for j, window in enumerate(windows):
        coords, mask = d[f"w{j}_coords"], d[f"w{j}_track_mask"]
        who = d["sort_inds"].long()[: mask.shape[1]]
        assert window.started[0].nonzero()[:, 0].tolist() == sorted(who.tolist())
        assert torch.equal(window.mask[0, : len(mask), who].float(), mask)
        assert not window.mask[0, len(mask) :].any()
        for state, expected in zip(window.states, coords if gradients else coords[-1:], strict=True):
            close(state.place[0][:, who] * model.stride, expected, tolerance["tracks_px"])
        close(window.states[-1].visible[0][:, who], d[f"w{j}_vis_logits"], tolerance["intermediates"])
    if not gradients:
        xy, visible, _ = track_groups(model, features, *joint(model, d, case["call"]["iters"]))
        close(xy[0] * model.stride, d["tracks"], tolerance["tracks_px"])
        close(visible[0], d["visibility"], tolerance["visibility"])


def test_embeddings_equal_the_golden():
    d, _ = golden("v1_s4_w8_iter1_undamped")
    h, w = (side // 4 for side in d["video"].shape[-2:])
    place = d["queries"][d["sort_inds"].long(), 1:] / 4
    assert torch.equal(embeddings.waves(8, 456, torch.device("cpu")), d["times_embed"])
    close(embeddings.position(place, (h, w), 456), d["pos_embed"], 1e-6)


# Parts -------------------------------------------------------------------------------------------------------------


def reference(levels, index, place, track, padding):
    """Local correlation by sampling the features themselves."""
    out = []
    offsets = torch.arange(-3.0, 4)
    around = torch.stack(torch.meshgrid(offsets, offsets, indexing="ij"), -1)  # x, then y
    for i, level in enumerate(levels):
        h, w = level.shape[1:3]
        where = place[:, None, None] / 2**i + around
        where = 2 * (where + 0.5) / torch.tensor([w, h]) - 1  # centres at integers, without dividing by w - 1
        maps = level[index].permute(0, 3, 1, 2)
        found = F.grid_sample(maps, where, padding_mode=padding, align_corners=False)
        out.append(torch.einsum("mcxy,mc->mxy", found, track).flatten(1) / track.shape[1] ** 0.5)
    return torch.cat(out, 1)


@pytest.mark.parametrize("padding", ["zeros", "border"])
def test_correlation_equals_samples_of_the_features(padding):
    """Also far outside of the frame, and on a level of one cell."""
    g = torch.Generator().manual_seed(0)
    levels = tuple(pyramid(torch.randn(5, 16, 9, 13, generator=g)))
    assert levels[3].shape == (5, 1, 1, 16)
    place = torch.randn(1, 3, 40, 2, generator=g) * 12 + 6
    place[0, 0, 0] = torch.tensor([-1e6, 1e6])
    frames = torch.tensor([[4, 0, 2]])
    track = torch.randn(1, 3, 40, 16, generator=g)
    ours = correlate(Features(levels, (36, 52)), frames, place, track, border=padding == "border")
    index = frames[:, :, None].expand(1, 3, 40).flatten()
    theirs = reference(levels, index, place.flatten(0, 2), track.flatten(0, 2), padding)
    far = torch.zeros(120, dtype=torch.bool)
    far[0] = True  # where float32 holds no fraction
    close(ours.flatten(0, 2)[~far], theirs[~far], 1e-5)
    assert ours.isfinite().all()


def test_a_sample_is_bilinear_and_clamped():
    level = torch.arange(12.0).view(1, 3, 4, 1)
    place = torch.tensor([[1.5, 0.5], [-3.0, 0], [9, 9], [3, 1.25]])
    found = sample(level, torch.zeros(4, dtype=torch.long), place)
    assert found[:, 0].tolist() == pytest.approx([3.5, 0, 11, 8])


def test_features_do_not_depend_on_how_many_frames_are_in_work():
    g = torch.Generator().manual_seed(0)
    video = torch.randint(0, 256, (5, 3, 40, 48), generator=g, dtype=torch.uint8)
    encoder, sizes = Encoder(4), []

    def prepare(some):
        sizes.append(len(some))
        return some.float() / 127.5 - 1

    with torch.no_grad():
        parts = extract(encoder, video, prepare)
        two = joined([extract(encoder, video[:2], prepare), extract(encoder, video[2:], prepare)])
    assert max(sizes) == 1
    whole = extract(encoder, video, prepare)
    assert len(parts) == 5 and parts.size == whole.size == two.size == (40, 48) and sizes[-1] == 5
    for a, b, c in zip(parts.levels, whole.levels, two.levels, strict=True):
        assert a.shape == b.shape and a.is_contiguous()
        close(a, b, 1e-4)
        assert torch.equal(a, c)


# Windows -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small():
    """A small version 1 whose updates are tame, and features of 13 frames."""
    torch.manual_seed(0)
    model = Version1(window=4, dim=48, heads=2, time=2, space=1).eval()
    with torch.no_grad():  # damped, for the code of displacements amplifies rounding
        model.transformer.output.weight.mul_(0.005)
        model.transformer.output.bias.normal_(0, 0.1)
    g = torch.Generator().manual_seed(1)
    levels = tuple(pyramid(torch.randn(13, 128, 16, 20, generator=g)))
    return model, Features(levels, (64, 80))


def queries(*frames):
    g = torch.Generator().manual_seed(len(frames))
    return torch.tensor([frames]), torch.rand(1, len(frames), 2, generator=g) * 15


@torch.no_grad()
def track(small, frames, lengths, frame, place):
    model, features = small
    return track_groups(model, features, frames, lengths, frame, place, 2)


ALL = torch.arange(13)[None]
LENGTH = torch.tensor([13])


@torch.no_grad()
def test_the_order_of_the_points_matters_to_the_released_weights_alone(small):
    """In one update: displacements, whose code amplifies rounding, are still zero."""
    model, features = small
    frame, place = queries(3, 0, 0, 2, 1)
    order = torch.tensor([3, 2, 4, 0, 1])

    def change():
        one, other = (
            next(unroll(model, features, ALL[:, :4], torch.tensor([4]), frame[:, o], place[:, o], 1)).states[-1]
            for o in (torch.arange(5), order)
        )
        return (one.place[:, :, order] - other.place).abs().max()

    assert change() < 1e-5
    model.entangled = True
    try:
        assert change() > 5e-5
    finally:
        model.entangled = False


def test_points_have_estimates_from_their_first_window_on_and_see_those_alone_that_started(small):
    frame, place = queries(0, 1, 5, 9)
    xy, visible, _ = track(small, ALL, LENGTH, frame, place)
    for n, first in enumerate([0, 0, 2, 6]):
        assert (xy[0, :first, n] == 0).all() and (visible[0, :first, n] == 0.5).all()
        assert (xy[0, first:, n] != 0).all()
    alone = track(small, ALL, LENGTH, frame[:, :2], place[:, :2])
    close(xy[:, :2, :2], alone[0][:, :2], 1e-5)  # the first window's first half
    assert (xy[:, 4:, :2] - alone[0][:, 4:]).abs().max() > 1e-4  # from the third point on it is another video


def test_a_group_tracks_as_alone_whatever_else_is_tracked(small):
    """Groups of other lengths, cropped, reversed and with points that start at other times."""
    frame = torch.tensor([[0, 3, 1], [6, 2, 0], [8, 8, 8], [0, 0, 0]])
    place = torch.rand(4, 3, 2, generator=torch.Generator().manual_seed(2)) * 15
    frames = torch.stack([ALL[0], ALL[0].flip(0), (ALL[0] + 2).clamp(max=12), ALL[0]])
    lengths = torch.tensor([13, 13, 11, 1])
    xy, visible, _ = track(small, frames, lengths, frame, place)
    for g, length in enumerate(lengths.tolist()):
        one = slice(g, g + 1)
        alone = track(small, frames[one, :length], lengths[one], frame[one], place[one])
        close(xy[one, :length], alone[0], 1e-3)
        close(visible[one, :length], alone[1], 1e-3)
        assert (xy[g, length:] == 0).all()


@pytest.mark.parametrize("length", [1, 2])
def test_a_clip_of_half_a_window_or_less_repeats_its_last_frame(small, length):
    frame, place = queries(0, 0, length - 1)
    short = track(small, ALL[:, :length], torch.tensor([length]), frame, place)
    repeated = track(small, torch.arange(3).clamp(max=length - 1)[None], torch.tensor([3]), frame, place)
    close(short[0], repeated[0][:, :length], 1e-6)
    assert (short[0] != 0).all()


@torch.no_grad()
def stream(small, events, lengths=13):
    """Track window by window in a table of 6 frames; `events` are (frames seen before, frame, place) of new points."""
    model, features = small
    sliding, rows = None, torch.zeros(6, dtype=torch.long)
    table = Features(tuple(level[:6].clone() for level in features.levels), features.size)
    found = torch.zeros(lengths, sum(e[1].shape[1] for e in events), 2)
    start, last, events = 0, None, list(events)

    def advance(start, seen):
        time = torch.arange(start, start + 4).clamp(max=seen - 1)
        assert (rows[time % 6] == time).all()
        window = sliding.advance(table, (time % 6)[None], start, torch.tensor([seen]) if seen == lengths else None)
        if window is not None:
            keep = window.started[0]
            end = min(start + 4, lengths)
            found[start:end, : len(keep)][:, keep] = window.states[-1].place[0, : end - start, keep]

    for seen in range(1, lengths + 1):
        rows[(seen - 1) % 6] = seen - 1
        for part, level in zip(table.levels, features.levels, strict=True):
            part[(seen - 1) % 6] = level[seen - 1]
        while events and events[0][0] < seen:
            _, frame, place = events.pop(0)
            if sliding is None:
                sliding = Sliding(model, frame, place, 2)
                continue
            sliding.add(frame, place)
            if last is not None and (frame < last + 4).any():
                sliding.rewind()
                advance(last, seen - 1)
        if seen == start + 4 or (seen == lengths and seen > start + 2):
            advance(start, seen)
            start, last = start + 2, start
    return found


def test_a_stream_equals_the_whole_clip(small):
    frame, place = queries(0, 1, 6, 11)
    whole = track(small, ALL, LENGTH, frame, place)[0][0]
    close(stream(small, [(0, frame, place)]), whole, 1e-5)


@pytest.mark.parametrize("added", [2, 5, 6])
def test_a_point_added_later_is_as_if_asked_for_from_the_start(small, added):
    """Before and after the first window that holds it was done."""
    frame, place = queries(0, 1, 5)
    whole = track(small, ALL, LENGTH, frame, place)[0][0]
    parts = [(0, frame[:, :2], place[:, :2]), (added, frame[:, 2:], place[:, 2:])]
    ours = stream(small, parts)
    close(ours[4:], whole[4:], 1e-5)
    close(ours[5:, 2], whole[5:, 2], 1e-5)


@torch.no_grad()
def test_points_and_groups_can_be_dropped_on_the_way(small):
    model, features = small
    frame, place = torch.tensor([[0, 1, 2], [0, 3, 0]]), torch.rand(2, 3, 2) * 15
    sliding = Sliding(model, frame, place, 1)
    sliding.advance(features, ALL[:, :4].expand(2, -1), 0)
    sliding.remove(torch.tensor([True, False, True]))
    sliding.keep_groups(torch.tensor([1]))
    window = sliding.advance(features, ALL[:, 2:6], 2)
    assert window.states[-1].place.shape == (1, 4, 2, 2) and window.started.tolist() == [[True, True]]


# Precision and gradients -------------------------------------------------------------------------------------------


def test_bf16_keeps_places_in_float32_and_stays_near(small):
    model, features = small
    frame, place = queries(0, 0, 5, 7)
    exact = track(small, ALL, LENGTH, frame, place)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        (window, *_) = unroll(model, features, ALL, LENGTH, frame, place, 2)
        rough = track(small, ALL, LENGTH, frame, place)
        half = model.encode(torch.rand(2, 3, 64, 80))
    assert window.states[-1].place.dtype == window.states[-1].visible.dtype == torch.float32
    assert rough[0].isfinite().all() and rough[1].isfinite().all()
    assert half.levels[0].dtype == torch.bfloat16
    assert (exact[0] - rough[0]).abs().max() < 0.2


def test_gradients_cross_windows_and_gathering_again_does_not_change_them(small, monkeypatch):
    model, features = small
    frame, place = queries(0, 1, 4)

    def gradients():
        table = Features((features.levels[0].clone().requires_grad_(), *features.levels[1:]), features.size)
        windows = list(unroll(model, table, ALL[:, :6], torch.tensor([6]), frame, place, 2))
        assert len(windows) == 2 and all(len(w.states) == 2 for w in windows)
        v = windows[0].states[-1].visible
        (of_v,) = torch.autograd.grad(windows[1].states[-1].place.sum(), v, retain_graph=True)
        assert of_v.abs().max() > 0
        total = sum(w.states[-1].place.square().mean() + w.states[-1].visible.mean() for w in windows)
        return torch.autograd.grad(total, [table.levels[0], *model.transformer.parameters()])

    kept = gradients()
    monkeypatch.setattr(correlation, "ROWS_KEPT", 0)
    for a, b in zip(kept, gradients(), strict=True):
        assert a.isfinite().all() and torch.allclose(a, b, atol=1e-6, rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_equals_the_cpu(small):
    model, features = small
    frame, place = queries(0, 0, 5, 7)
    exact = track(small, ALL, LENGTH, frame, place)
    there = Features(tuple(level.cuda() for level in features.levels), features.size)
    found = track((model.cuda(), there), ALL.cuda(), LENGTH.cuda(), frame.cuda(), place.cuda())
    model.cpu()
    close(exact[0], found[0].cpu(), 1e-2)
