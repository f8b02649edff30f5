"""Training of CoTracker: losses and gradients equal the goldens, points are drawn by their law, a clip is learned."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from golden.fill import filled
from trackpl_cotracker import method as method_module
from trackpl_cotracker.losses import Truth, Window, huber, paper_losses, version3_losses, windows_of
from trackpl_cotracker.method import CoTracker
from trackpl_cotracker.sampling import FAR, choose_points, choose_queries
from trackpl_cotracker.state import State

from trackpl import Clip
from trackpl.configs import find
from trackpl.errors import DataError
from trackpl.testing import moving_clip

GOLDEN = Path(__file__).parents[1] / "golden" / "cotracker"
MANIFEST = json.loads((GOLDEN / "manifest.json").read_text())
CASES = {case["name"]: case for case in MANIFEST["cases"]}
SMALL = {"resolution": None, "width": 64, "depth": 1, "train_points": None}


def golden(name):
    return {k: torch.from_numpy(np.asarray(v)) for k, v in np.load(GOLDEN / f"{name}.npz").items()}


def within(share, expected, n):
    """Whether a share of n draws lies within five standard deviations of its probability."""
    return abs(share - expected) < 5 * math.sqrt(expected * (1 - expected) / n)


# Losses -------------------------------------------------------------------------------------------------------------


def window(d, j, confident):
    """Window j of a golden, whose probabilities become logits again."""
    part = {k.removeprefix(f"w{j}_"): v for k, v in d.items() if k.startswith(f"w{j}_")}
    true = part["coords_gt"][None]

    def logits(name):
        values = torch.logit(part[name].double()).float()
        return values[:, None] if confident else values[None, None].expand(len(part["coords"]), -1, -1, -1)

    return Window(
        xy=part["coords"][:, None],
        visible=logits("vis_prob"),
        confidence=logits("conf_prob") if confident else None,
        true_xy=true,
        true_visible=part["vis_gt"][None] > 0,
        known=torch.ones(true.shape[:-1], dtype=torch.bool),
        valid=part["valid"][None] > 0,
        points=torch.tensor([true.shape[2]]),
    )


def test_losses_of_versions_1_and_2_equal_the_golden():
    d = golden("v1_losses")
    losses = paper_losses([window(d, j, False) for j in range(3)])
    assert torch.allclose(losses["track"], d["sequence_loss"], rtol=1e-5)
    assert torch.allclose(losses["visible"], 10 * d["balanced_ce_loss"], rtol=1e-5)
    assert torch.allclose(losses["track"] + losses["visible"], d["total"], rtol=1e-5)


def test_losses_of_version_3_equal_the_golden():
    d = golden("v3_losses")
    windows = [window(d, j, True) for j in range(3)]
    for hidden, name in (("l1", "seq_invisible_l1"), ("huber", "seq_invisible_huber")):
        losses = version3_losses(windows, hidden=hidden)
        assert torch.allclose(losses["track"], 0.05 * d["seq_visible_huber"], rtol=1e-5)
        assert torch.allclose(losses["occluded"], 0.01 * d[name], rtol=1e-5)
        assert torch.allclose(losses["visible"], d["vis_bce"], rtol=1e-5)
        assert torch.allclose(losses["confidence"], d["conf_bce"], rtol=1e-5)
    total = torch.stack(list(version3_losses(windows, hidden="l1").values())).sum()
    assert torch.allclose(total, d["total_kubric_as_released"], rtol=1e-5)


def test_the_switches_of_the_paper_losses():
    d = golden("v1_losses")
    windows = [window(d, j, False) for j in range(3)]
    whole, parts = paper_losses(windows, divide_by_points=False), [paper_losses([w]) for w in windows]
    assert torch.allclose(whole["track"], sum(p["track"] * n for p, n in zip(parts, (5, 7, 7), strict=True)))
    logit, truth = windows[0].visible[-1], windows[0].true_visible
    valid = windows[0].valid
    each = F.binary_cross_entropy_with_logits(logit, truth.float(), reduction="none")
    balanced = each[valid & truth].mean() + each[valid & ~truth].mean()
    assert torch.allclose(paper_losses(windows[:1], of_probability=False)["visible"], 10 * balanced / 5, rtol=1e-4)


def test_huber_is_quadratic_up_to_six_pixels():
    e = torch.tensor([-7.0, -6.0, -1.0, 0.0, 3.0, 6.0, 10.0], requires_grad=True)
    expected = torch.tensor([24.0, 18.0, 0.5, 0.0, 4.5, 18.0, 42.0])
    assert torch.equal(huber(e), expected)
    huber(e).sum().backward()
    assert torch.equal(e.grad, e.detach().clamp(-6, 6))


def states(length, groups, points, updates=2, confident=False):
    g = torch.Generator().manual_seed(length)
    place = torch.rand(updates, groups, length, points, 2, generator=g)
    logit = torch.randn(updates, groups, length, points, generator=g)
    return [State(place[m], logit[m], logit[m] if confident else None) for m in range(updates)]


def truth_of(frames=10, groups=2, points=4):
    """Truth whose x says the frame, and y the point."""
    t, n = torch.meshgrid(torch.arange(frames), torch.arange(points), indexing="ij")
    xy = torch.stack([t, n], -1).float().expand(groups, -1, -1, -1).clone()
    seen = torch.ones(groups, frames, points, dtype=torch.bool)
    first = torch.tensor([[0, 3, 7, 9], [0, 0, 4, 5]])[:groups, :points]
    return Truth(xy, seen, seen.clone(), first)


@pytest.mark.parametrize("version", [1, 2, 3])
def test_targets_are_aligned_by_the_frame_that_a_window_began_with(version):
    """Also where windows before it did not run, and each group began elsewhere."""
    truth = truth_of()
    starts = [4, torch.tensor([2, 6])]
    windows = windows_of([(s, states(8, 2, 4)) for s in starts], truth, 4, version)
    for w, start in zip(windows, ([4, 4], [2, 6]), strict=True):
        for g in range(2):
            for s in range(8):
                frame = start[g] + s
                for n in range(4):
                    first = int(truth.first[g, n])
                    runs = version > 1 or first < start[g] + 8
                    assert bool(w.known[g, s, n]) == (frame < 10 and runs)
                    assert bool(w.valid[g, s, n]) == (frame < 10 and runs and (version == 1 or frame >= first))
                    if frame < 10:
                        assert w.true_xy[g, s, n].tolist() == [frame, n]
    running = (truth.first < torch.tensor([[10], [14]])).sum(1)
    assert windows[1].points.tolist() == ([int(r) for r in running] if version == 1 else [4, 4])
    assert torch.allclose(windows[0].xy[0], 4 * states(8, 2, 4)[0].place)


def test_version_3_offline_supervises_frames_before_the_query():
    (w,) = windows_of([(0, states(10, 2, 4))], truth_of(), 4, 3, offline=True)
    assert w.valid.all() and w.known.all()


@pytest.mark.parametrize("version", [1, 2, 3])
def test_unknown_truth_and_frames_after_the_end_change_nothing(version):
    truth = truth_of()
    valid = torch.rand(2, 10, 4, generator=torch.Generator().manual_seed(0)) > 0.3
    unrolled = [(4, states(8, 2, 4, confident=version == 3))]
    lost, other = truth.xy.clone(), [dataclasses.replace(s, place=s.place.clone()) for s in unrolled[0][1]]
    lost[~valid] = float("nan")
    for s in other:
        s.place[:, 6:] = 1e6  # frames 10 and 11, which the clip has not
    loss = version3_losses if version == 3 else paper_losses
    expected = loss(windows_of(unrolled, dataclasses.replace(truth, valid=valid), 4, version))
    found = loss(windows_of([(4, other)], dataclasses.replace(truth, xy=lost), 4, version))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[k], found[k]) and expected[k].isfinite() for k in expected)


def test_a_batch_is_the_mean_of_its_clips():
    truth, unrolled = truth_of(), [(0, states(8, 2, 4)), (4, states(8, 2, 4))]
    both = paper_losses(windows_of(unrolled, truth, 4, 1))
    alone = []
    for g in range(2):
        one = Truth(*(getattr(truth, f.name)[g : g + 1] for f in dataclasses.fields(Truth)))
        part = [(s, [State(x.place[g : g + 1], x.visible[g : g + 1]) for x in xs]) for s, xs in unrolled]
        alone.append(paper_losses(windows_of(part, one, 4, 1)))
    for k in both:
        assert torch.allclose(both[k], (alone[0][k] + alone[1][k]) / 2)


# One step of training -----------------------------------------------------------------------------------------------


def trained(name, **options):
    """Take the losses of one golden step, and their gradients by the authors' keys, each whole and its norm."""
    d, case = golden(name), CASES[name]
    shapes = MANIFEST["weight_sets"][case["weight_set"]]
    method = CoTracker(resolution=None, train_points=None, **options)
    method.load_state_dict(
        method.import_weights({k: filled(k, tuple(shape), case["scale"]) for k, shape in shapes.items()})
    )
    xy = d["tracks_gt"][None] + 0.5
    seen = d["vis_gt"][None] > 0
    queries = d["queries"][None] + torch.tensor([0.0, 0.5, 0.5])
    losses = method.losses(Clip(d["video"][None], xy, seen, queries=queries))
    torch.stack(list(losses.values())).sum().backward()
    keys = list(shapes)
    numbers = method.import_weights({k: torch.full(tuple(shapes[k]), float(i)) for i, k in enumerate(keys)})
    ours: dict = {}
    for parameter, number in numbers.items():
        grad = method.get_parameter(parameter).grad
        ours.setdefault(keys[int(number.flatten()[0])], []).append(grad)
    return d, case, losses, {k: torch.cat(v) for k, v in ours.items()}


def check_gradients(d, case, grads):
    norms = dict(zip(case["grad_norm_keys"], d["grad_norms"], strict=True))
    assert norms.keys() == grads.keys()
    tolerance, largest = case["tolerance"], float(d["grad_norms"].max())
    checked = 0
    for key, norm in norms.items():
        if norm < tolerance["ignore_below_fraction_of_largest_norm"] * largest:
            continue
        close = tolerance["grad_relative_fnet" if key.startswith("fnet") else "grad_relative_non_fnet"]
        assert abs(grads[key].norm() - norm) < close * norm, key
        checked += 1
        if f"grad/{key}" in d:
            assert (grads[key] - d[f"grad/{key}"]).abs().max() < close * d[f"grad/{key}"].abs().max() * 2, key
    assert checked > 0.3 * len(norms)


@pytest.mark.slow
def test_a_step_of_version_1_equals_the_golden():
    d, case, losses, grads = trained("v1_train_step", version=1, entangled=True)
    assert torch.allclose(losses["track"], d["sequence_loss"], rtol=1e-4)
    assert torch.allclose(losses["visible"], 10 * d["balanced_ce_loss"], rtol=1e-4)
    check_gradients(d, case, grads)


@pytest.mark.slow
def test_a_step_of_version_3_online_equals_the_golden():
    d, case, losses, grads = trained("v3_online_train_step", version=3, mode="online", window=8, hidden_loss="l1")
    for ours, theirs in (
        ("track", "seq_visible"),
        ("occluded", "seq_invisible"),
        ("visible", "vis"),
        ("confidence", "conf"),
    ):
        assert torch.allclose(losses[ours], d[f"loss_{theirs}"], rtol=1e-4), ours
    check_gradients(d, case, grads)


@pytest.mark.filterwarnings("ignore:To get the last learning rate")
def test_the_schedule_of_the_configs_is_the_one_of_the_specification():
    for name in ("cotracker", "cotracker3"):
        given = yaml.safe_load(find(name).read_text())["model"]["init_args"]
        options, rate = given["lr_scheduler"]["init_args"], given["optimizer"]["init_args"]["lr"]
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=rate)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, **options)

        def at(step, schedule=schedule):
            schedule.last_epoch = step
            return schedule.get_lr()[0]

        assert at(0) == pytest.approx(2e-5) and at(2504) == pytest.approx(5e-4) and at(50099) == pytest.approx(2e-9)
        assert at(1252) == pytest.approx((5e-4 + 2e-5) / 2) and at(2503) < at(2504) > at(2505)
        quarter = at((3 * 2504 + 50099) // 4) / 5e-4
        assert quarter == pytest.approx(0.75 if name == "cotracker" else (1 + math.cos(math.pi / 4)) / 2, rel=1e-3)


# Points and queries -------------------------------------------------------------------------------------------------


def seen_clip(seen, batch=1, size=(100, 200)):
    """A clip whose tracks (T, N) are seen where told; x and y tell the frame and the track."""
    t, n = torch.meshgrid(*map(torch.arange, seen.shape), indexing="ij")
    tracks = torch.stack([t, n], -1).float().expand(batch, -1, -1, -1)
    visible = seen.expand(batch, -1, -1)
    video = torch.zeros(1, 1, 1, 1, 1).expand(batch, len(seen), 3, *size)
    return Clip(video, tracks, visible, torch.ones_like(visible))


def drawn(clip):
    """Which track each point of a clip is: (B, N)."""
    return clip.tracks[:, 0, :, 1].long()


def test_points_are_drawn_from_the_first_and_the_middle_frame_with_a_ticket_for_each():
    torch.manual_seed(0)
    seen = torch.zeros(8, 40, dtype=torch.bool)
    seen[0, :20] = True  # tracks 0..9 in the first frame alone, 10..19 in both, 20..29 in the middle one alone
    seen[4, 10:30] = True
    seen[7, 25:40] = True  # 30..39 are seen in the last alone
    batch, points = 4000, 12
    track = drawn(choose_points(seen_clip(seen, batch), points))
    assert track.shape == (batch, points) and track.max() == 29
    count = F.one_hot(track, 40).sum(1)
    both = torch.arange(10, 20)
    assert (
        count.max() == 2 and (count[:, both] <= 2).all() and (count[:, :10] <= 1).all() and (count[:, 20:] <= 1).all()
    )
    for n in range(30):  # 40 tickets, of which 12 are drawn without putting any back
        assert within(float((count[:, n] > 0).double().mean()), 0.3 if n not in both else 1 - 28 / 40 * 27 / 39, batch)
    twice = float((count[:, both] == 2).double().mean())
    assert abs(twice - 12 / 40 * 11 / 39) < 5 * math.sqrt(0.0846 / (batch * 10))
    for place in (0, 11):  # in random order, so that a quarter of all can be the first quarter
        assert within(float((track[:, place] < 15).double().mean()), 0.5, batch)
    late = drawn(choose_points(seen_clip(seen, batch), points, last=True))
    assert within(float((late >= 30).double().mean()), 10 / 55, batch * points)


def test_a_clip_with_few_points_has_as_many_and_the_rest_is_not_supervised():
    seen = torch.zeros(2, 6, 5, dtype=torch.bool)
    seen[0, 0, :4] = True
    seen[1, 0, 2] = True
    seen[1, 5, 3] = True  # never in the first or middle frame
    one = seen_clip(seen[0])
    clip = dataclasses.replace(seen_clip(seen[0], 2), visible=seen)
    out = choose_points(clip, 9)
    assert out.tracks.shape == (2, 6, 4, 2) and out.valid.all(1).tolist() == [[True] * 4, [True] + [False] * 3]
    assert drawn(out)[0].sort().values.tolist() == [0, 1, 2, 3] and drawn(out)[1, 0] == 2
    assert choose_points(one, 9).valid.all()
    without = dataclasses.replace(one, visible=seen[1:] & (torch.arange(5) == 3))
    assert drawn(choose_points(without, 9)).tolist() == [[3]]  # seen in no such frame, so any will do
    nothing = choose_points(dataclasses.replace(one, visible=torch.zeros_like(one.visible)), 9)
    queries, possible = choose_queries(nothing)
    assert not nothing.valid.any() and not possible.any() and queries.isfinite().all()


def test_tracks_out_of_the_frame_unsupervised_or_far_are_not_drawn():
    seen = torch.ones(4, 6, dtype=torch.bool)
    clip = seen_clip(seen)
    tracks, valid = clip.tracks.clone(), clip.valid.clone()
    tracks[:, :, 0] = -1.0
    tracks[:, :, 1] = float("nan")
    tracks[:, 3, 2] = 1500.0
    valid[:, :, 3] = False
    clip = dataclasses.replace(clip, tracks=tracks, valid=valid)
    assert set(drawn(choose_points(clip, 99))[0].tolist()) == {2, 4, 5}
    assert set(drawn(choose_points(clip, 99, far=FAR))[0].tolist()) == {4, 5}


def test_a_quarter_of_the_queries_is_in_a_random_visible_frame():
    torch.manual_seed(0)
    seen = torch.zeros(8, 10, dtype=torch.bool)
    seen[[1, 3, 6]] = True
    batch = 6000
    clip = seen_clip(seen, batch)
    queries, possible = choose_queries(clip)
    frame = queries[..., 0].long()
    assert possible.all() and torch.equal(queries[..., 1].long(), frame)  # x tells the frame
    assert torch.equal(queries[..., 2].long(), torch.arange(10).expand(batch, 10))
    assert (frame[:, 2:] == 1).all()  # floor(10 / 4) = 2 are random
    for n in range(2):
        for f in (1, 3, 6):
            assert within(float((frame[:, n] == f).double().mean()), 1 / 3, batch)
    assert within(float(((frame[:, 0] == 3) & (frame[:, 1] == 3)).double().mean()), 1 / 9, batch)
    offline, _ = choose_queries(clip, random=1.0)
    for f in (1, 3, 6):
        assert within(float((offline[..., 0] == f).double().mean()), 1 / 3, batch * 10)


@pytest.mark.parametrize(("version", "mode"), [(1, "offline"), (2, "offline"), (3, "online"), (3, "offline")])
def test_training_draws_points_and_queries_by_the_rule_of_the_version(version, mode, monkeypatch):
    """What losses() asks of `sampling`, and that a clip that names its queries is taken as it is."""
    asked = []
    for name in ("choose_points", "choose_queries"):
        real = getattr(method_module, name)
        spy = lambda *a, real=real, name=name, **k: (asked.append((name, a[1:], k)), real(*a, **k))[1]  # noqa: E731
        monkeypatch.setattr(method_module, name, spy)
    method = CoTracker(version, mode=mode, iterations=1, **(SMALL | {"train_points": 5}))
    clip = moving_clip(3, (64, 64), points=8)
    losses = method.losses(clip)
    offline = version == 3 and mode == "offline"
    far = FAR if version == 3 else None
    assert asked == [
        ("choose_points", (5,), {"last": offline, "far": far}),
        ("choose_queries", (), {"random": 1.0 if offline else 0.25}),
    ]
    assert set(losses) == ({"track", "occluded", "visible", "confidence"} if version == 3 else {"track", "visible"})
    asked.clear()
    named = dataclasses.replace(clip, queries=F.pad(clip.tracks[:, 0], (1, 0)))
    first, second = method.losses(named), method.losses(named)
    assert not asked and all(torch.equal(first[k], second[k]) for k in first)


def test_a_clip_without_tracks_is_refused():
    with pytest.raises(DataError, match="tracks"):
        CoTracker(1, **SMALL).losses(Clip(torch.zeros(1, 2, 3, 64, 64)))


# Learning -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("version", "mode"), [(1, "offline"), (2, "offline"), (3, "online"), (3, "offline")])
def test_the_unrolled_loss_overfits_one_clip_in_50_steps(version, mode):
    """Over two windows, with points that start in either of them."""
    torch.manual_seed(0)
    method = CoTracker(version, mode=mode, window=4, iterations=2, **SMALL).train()
    clip = moving_clip(5, (64, 64), points=8)
    frame = torch.arange(8) % 5
    xy = clip.tracks[0, frame, torch.arange(8)]
    clip = dataclasses.replace(clip, queries=torch.cat([frame[:, None], xy], 1)[None])
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-3)
    totals = []
    for _ in range(50):
        losses = method.losses(clip)
        total = torch.stack(list(losses.values())).sum()
        totals.append((float(losses["track"]), float(total)))
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(method.parameters(), 10.0)
        optimizer.step()
    start, end = totals[0], [sum(t[i] for t in totals[-3:]) / 3 for i in range(2)]
    assert end[0] < 0.5 * start[0] and end[1] < start[1], (start, end)
