"""The walk: equal to the dense float64 reference, and the invariants that any walk has."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden.crw import dense_reference as reference
from hypothesis import given, settings
from hypothesis import strategies as st
from trackpl_crw.method import MultiscaleCRW
from trackpl_crw.smoothness import smoothness
from trackpl_crw.transition import Matcher, Transition, local_correlation, median_filter, transition
from trackpl_crw.walk import cycle_loss, path_inside, pull, push, return_of_pair, returns_of_walk, transpose

from trackpl.testing import moving_clip

GOLDEN = Path(__file__).parent / "golden" / "crw"
CYCLES = [("cycle_k2", 2, 0.15), ("cycle_k2_r5", 5, 0.07), ("cycle_k3", 2, 0.15), ("cycle_k4", 2, 0.15)]


def golden(name):
    return {k: torch.from_numpy(v) for k, v in np.load(GOLDEN / f"{name}.npz").items()}


def hops(emb, flow_fw, flow_bw, r, tau):
    """Transitions of a clip (k, d, h, w) with given incoming flows, forwards and backwards."""
    pairs = range(len(emb) - 1)
    return (
        [transition(emb[i : i + 1], emb[i + 1 : i + 2], flow_fw[i : i + 1], r, tau) for i in pairs],
        [transition(emb[i + 1 : i + 2], emb[i : i + 1], flow_bw[i : i + 1], r, tau) for i in pairs],
    )


def random_clip(seed, k=2, d=6, h=7, w=9, motion=1.5, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    emb = torch.randn(k, d, h, w, generator=g, dtype=dtype)
    flows = torch.randn(2, k - 1, 2, h, w, generator=g, dtype=dtype) * motion
    return emb, flows[0], flows[1]


def dense(emb_s, emb_t, flow, r, tau):
    """T = A B as an N x N matrix, by the float64 reference."""
    return reference.splat_T(emb_s, emb_t, flow, r, tau)


@pytest.mark.parametrize("name, r, tau", CYCLES)
@pytest.mark.parametrize("dtype, tol", [(torch.float64, (1e-10, 1e-9, 1e-9)), (torch.float32, (2e-5, 1e-4, 1e-3))])
def test_cycles_equal_the_dense_reference(name, r, tau, dtype, tol):
    d = golden(name)
    emb = d["emb"].to(dtype).requires_grad_()
    forward, backward = hops(emb, d["flow_fw"].to(dtype), d["flow_bw"].to(dtype), r, tau)
    h, w = emb.shape[-2:]
    every = returns_of_walk(forward, backward, torch.arange(h * w)[None])
    for m, truth in enumerate(d["R_splat"]):
        assert (every[m].view(h, w) - truth).abs().max() < tol[0]
    assert (return_of_pair(forward[0], backward[0])[0] - d["R_splat"][0]).abs().max() < tol[0]
    for valid, truth in zip(path_inside(forward), d["valid"], strict=True):
        assert torch.equal(valid[0], truth)
    loss = cycle_loss(forward, backward)
    loss.backward()
    assert (loss - d["loss_splat"]).abs() < tol[1]
    assert (emb.grad - d["grad_splat"]).abs().max() < tol[2] * (
        1 if dtype == torch.float64 else d["grad_splat"].abs().max()
    )


def test_transition_equals_the_golden():
    d = golden("transition")
    args = d["emb_s"][None], d["emb_t"][None], d["flow"][None], 3, 0.1
    step = transition(*args)
    assert (step.probability[0].permute(2, 0, 1) - d["A"]).abs().max() < 2e-5
    assert (step.flow[0] - d["flow_paper"]).abs().max() < 2e-5
    assert (transition(*args, "exact").flow[0] - d["flow_exact"]).abs().max() < 2e-5
    assert (dense(d["emb_s"].double(), d["emb_t"].double(), d["flow"].double(), 3, 0.1) - d["T"]).abs().max() < 2e-5


def test_smoothness_equals_the_golden():
    d = golden("crw_regressor_losses")
    image, total = d["image"].float() / 255, 0.0
    for level in reversed(range(5)):
        image = F.avg_pool2d(image, 4 if level == 4 else 2)
        value = smoothness(d[f"flow_l{level}"], image)
        assert value == pytest.approx(float(d[f"smooth_l{level}"]), rel=2e-4, abs=1e-7)
        total += value
    assert total == pytest.approx(float(d["smooth_sum"]), rel=2e-4)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 999), h=st.integers(3, 19), w=st.integers(3, 19), r=st.integers(1, 5), d=st.integers(1, 9))
def test_local_correlation_is_shifted_products(seed, h, w, r, d):
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, 2, d, h, w, generator=g, dtype=torch.float64)
    y = F.pad(y, [r] * 4)
    side = 2 * r + 1
    want = [(x * y[:, :, i : i + h, j : j + w]).sum(1) for i in range(side) for j in range(side)]
    assert torch.allclose(local_correlation(x, y, r), torch.stack(want, -1))


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 999), motion=st.sampled_from([0.0, 0.7, 3.0, 30.0]))
def test_both_ways_to_compute_a_pair_agree_and_are_probabilities(seed, motion):
    emb, fw, bw = random_clip(seed, motion=motion)
    forward, backward = hops(emb, fw, bw, 2, 0.2)
    pair = return_of_pair(forward[0], backward[0]).flatten(1)
    walk = returns_of_walk(forward, backward, torch.arange(pair.shape[1])[None])[0]
    assert torch.allclose(pair, walk, atol=1e-12)
    assert pair.min() >= 0 and pair.max() <= 1 + 1e-12
    t, back = dense(emb[0], emb[1], fw[0], 2, 0.2), dense(emb[1], emb[0], bw[0], 2, 0.2)
    assert torch.allclose(t.sum(1), torch.ones_like(t[0]))
    assert torch.allclose(pair[0], (t * back.T).sum(1), atol=1e-12)


def test_a_displaced_end_view_asks_for_the_displaced_node():
    emb, fw, bw = random_clip(3)
    forward, backward = hops(emb, fw, bw, 2, 0.2)
    h, w = emb.shape[-2:]
    product = dense(emb[0], emb[1], fw[0], 2, 0.2) @ dense(emb[1], emb[0], bw[0], 2, 0.2)
    for sx, sy in ((1, 0), (0, -2), (2, 1)):
        got = return_of_pair(forward[0], backward[0], (sx, sy))[0]
        walk = returns_of_walk(forward, backward, torch.arange(h * w)[None], (sx, sy))[0].view(h, w)
        for y in range(h):
            for x in range(w):
                there = 0 <= x - sx < w and 0 <= y - sy < h
                want = product[y * w + x, (y - sy) * w + x - sx] if there else 0.0
                assert got[y, x] == pytest.approx(float(want), abs=1e-12)
                assert walk[y, x] == pytest.approx(float(want), abs=1e-12)


def test_gradients_are_those_of_finite_differences():
    emb, fw, bw = random_clip(1, k=3, d=3, h=4, w=5)

    def loss(e):
        return cycle_loss(*hops(e, fw, bw, 2, 0.3))

    assert torch.autograd.gradcheck(loss, (emb.requires_grad_(),), atol=1e-6, fast_mode=True)


def test_gradients_of_pushing_and_pulling_a_batch_are_those_of_finite_differences():
    g = torch.Generator().manual_seed(0)
    a = torch.randn(2, 3, 3, 9, generator=g, dtype=torch.float64)
    flow = torch.randn(2, 2, 3, 3, generator=g, dtype=torch.float64)
    columns = torch.randn(2, 9, 2, generator=g, dtype=torch.float64)
    for move in (push, pull):

        def moved(a, columns, move=move):
            return move(Transition(transpose(transpose(a)), flow, flow), columns)  # nothing leaves the grid

        assert torch.autograd.gradcheck(moved, (a.requires_grad_(), columns.requires_grad_()))


def test_pushing_is_the_adjoint_of_pulling():
    emb, fw, _ = random_clip(4)
    step = hops(emb, fw, fw, 2, 0.2)[0][0]
    u, v = torch.randn(2, 1, 63, 3, dtype=torch.float64)
    assert torch.allclose((u * pull(step, v)).sum(), (push(step, u) * v).sum())


@pytest.mark.parametrize("batch", [2, 3])
def test_walks_over_four_frames_of_a_batch_are_the_mean_of_its_clips(batch):
    method = MultiscaleCRW(levels=2, embed_dim=8, radius=2, starts=384)  # every node of the finest level
    clips = moving_clip(4, (64, 96), batch=batch)
    loss = method.losses(clips)
    torch.stack(list(loss.values())).sum().backward()
    grads = [p.grad.clone() for p in method.parameters()]
    method.zero_grad()
    alone = [method.losses(clips.map(lambda x, i=i: x[i : i + 1])) for i in range(batch)]
    for key, value in loss.items():
        assert torch.allclose(value, torch.stack([each[key] for each in alone]).mean(), rtol=1e-4)
    (torch.stack([x for each in alone for x in each.values()]).sum() / batch).backward()
    for together, p in zip(grads, method.parameters(), strict=True):
        assert (together - p.grad).abs().max() < 1e-3 * p.grad.abs().max() + 1e-6


def test_a_pair_in_a_batch_is_the_pair_alone():
    parts = [random_clip(s) for s in (1, 2)]
    e, fw, bw = (torch.stack(x) for x in zip(*parts, strict=True))
    forward = transition(e[:, 0], e[:, 1], fw[:, 0], 2, 0.2)
    backward = transition(e[:, 1], e[:, 0], bw[:, 0], 2, 0.2)
    both = return_of_pair(forward, backward)
    for i, part in enumerate(parts):
        alone = return_of_pair(*(x[0] for x in hops(*part, 2, 0.2)))
        assert torch.allclose(both[i], alone[0])


def test_distinct_features_come_home_and_constant_ones_do_not():
    n = torch.eye(35).view(35, 5, 7)[None].repeat(2, 1, 1, 1)
    still = torch.zeros(1, 2, 5, 7)
    forward, backward = hops(n, still, still, 2, 0.01)
    assert return_of_pair(forward[0], backward[0]).min() > 0.999
    flat = torch.ones(2, 4, 15, 15)
    still = torch.zeros(1, 2, 15, 15)
    forward, backward = hops(flat, still, still, 2, 0.07)
    middle = return_of_pair(forward[0], backward[0])[0, 7, 7]
    assert middle == pytest.approx(1 / 25, rel=1e-4)


def test_scale_and_order_of_channels_do_not_matter():
    emb, fw, bw = random_clip(5)
    base = cycle_loss(*hops(emb, fw, bw, 2, 0.1))
    order = torch.randperm(emb.shape[1], generator=torch.Generator().manual_seed(0))
    assert torch.allclose(cycle_loss(*hops(emb[:, order] * 7, fw, bw, 2, 0.1)), base)


def test_sampling_every_start_is_the_full_walk():
    emb, fw, bw = random_clip(6, k=3)
    forward, backward = hops(emb, fw, bw, 2, 0.2)
    assert torch.allclose(cycle_loss(forward, backward, starts=63), cycle_loss(forward, backward, starts=10**6))


def test_transposing_twice_changes_nothing_inside_the_grid():
    a = transition(*torch.randn(2, 1, 4, 6, 8), torch.zeros(1, 2, 6, 8), 2, 0.2).probability
    assert torch.equal(transpose(transpose(a)), a)


def test_flow_is_a_constant_of_the_next_level():
    g = torch.Generator().manual_seed(0)
    pyramid = [torch.randn(1, 4, 4 * 2**i, 4 * 2**i, generator=g, requires_grad=True) for i in range(3)]
    other = [torch.randn(1, 4, 4 * 2**i, 4 * 2**i, generator=g) for i in range(3)]
    steps = Matcher(2, 0.1).transitions(pyramid, other)
    assert all(isinstance(s, Transition) and not s.flow_in.requires_grad for s in steps)
    steps[-1].flow.sum().backward()
    assert pyramid[0].grad is None and pyramid[2].grad is not None


def test_median_filter_is_that_of_rows_then_columns():
    flow = torch.randn(2, 2, 9, 12, generator=torch.Generator().manual_seed(0))
    want = F.pad(flow, [2] * 4, mode="replicate").unfold(3, 5, 1).median(-1).values.unfold(2, 5, 1).median(-1).values
    assert torch.equal(median_filter(flow, 5), want)
    assert torch.equal(median_filter(flow, 1), flow)
    lone = torch.zeros(1, 2, 8, 8)
    lone[0, :, 3, 4] = 50
    assert median_filter(lone, 5).abs().max() == 0


def test_staying_keeps_even_regions_where_the_flow_is():
    flat = torch.ones(1, 4, 12, 12)
    flow = torch.zeros(1, 2, 12, 12)
    drift = transition(flat, flat, flow, 5, 0.07).flow.abs().max()
    assert drift > 2 > transition(flat, flat, flow, 5, 0.07, stay=0.5).flow.abs().max()


@pytest.mark.parametrize("expected", ["paper", "exact"])
@pytest.mark.parametrize("median, stay", [(1, 0.0), (5, 0.3)])
def test_flow_without_transitions_is_the_flow_of_the_transitions(expected, median, stay):
    g = torch.Generator().manual_seed(0)
    pyramids = [[torch.randn(2, 4, 5 * 2**i, 7 * 2**i, generator=g) for i in range(3)] for _ in "st"]
    matcher = Matcher(3, 0.1, expected, median, stay)
    want = median_filter(matcher.transitions(*pyramids)[-1].flow, median)
    assert torch.allclose(matcher.flow(*pyramids), want, atol=1e-4)
