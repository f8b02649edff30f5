"""The walks on whole nodes and on aligned frames, and walks on some levels: the dense reference, and invariants."""

import pytest
import torch
from test_crw_walk import CYCLES, golden, random_clip
from trackpl_crw.method import MultiscaleCRW
from trackpl_crw.other_walks import aligned_hops, log_return_of_pair, returns_of_hops, walk_loss, window_hops
from trackpl_crw.transition import Matcher, transition
from trackpl_crw.walk import returns_of_walk

from trackpl.errors import Error
from trackpl.testing import moving_clip

WALKS = ["splat", "window", "aligned"]
OTHER = WALKS[1:]


def batched(seed, clips=1, **options):
    """Embeddings (k, B, d, h, w) and incoming flows (k-1, B, 2, h, w) there and back."""
    parts = [random_clip(seed + i, **options) for i in range(clips)]
    return tuple(torch.stack(x, 1) for x in zip(*parts, strict=True))


def transitions(emb, there, back, matcher):
    args = matcher.radius, matcher.tau, "paper", matcher.stay
    pairs = range(len(emb) - 1)
    return (
        [transition(emb[i], emb[i + 1], there[i], *args) for i in pairs],
        [transition(emb[i + 1], emb[i], back[i], *args) for i in pairs],
    )


def loss_of(walk, emb, there, back, matcher, **options):
    return walk_loss(walk, matcher, emb, *transitions(emb, there, back, matcher), **options)


def hops_of(walk, emb, there, back, matcher):
    return window_hops(matcher, emb, there, back) if walk == "window" else aligned_hops(matcher, emb, there)


def every_return(walk, emb, there, back, matcher):
    """R_m (k-1, B, h, w) of all nodes."""
    _, b, _, h, w = emb.shape
    every = torch.arange(h * w).expand(b, -1)
    if walk == "splat":
        returns = returns_of_walk(*transitions(emb, there, back, matcher), every)
    else:
        returns = returns_of_hops(*hops_of(walk, emb, there, back, matcher), every)
    return torch.stack(returns).view(-1, b, h, w)


@pytest.mark.parametrize("walk", OTHER)
@pytest.mark.parametrize("name, r, tau", CYCLES)
@pytest.mark.parametrize("dtype, tol", [(torch.float64, (1e-10, 1e-9, 1e-9)), (torch.float32, (2e-5, 1e-4, 1e-3))])
def test_cycles_equal_the_dense_reference(walk, name, r, tau, dtype, tol):
    d, matcher = golden(name), Matcher(r, tau)
    emb, there, back = (d[key].to(dtype).unsqueeze(1) for key in ("emb", "flow_fw", "flow_bw"))
    truth, grad = d[f"R_{walk}"], d[f"grad_{walk}"]
    assert (every_return(walk, emb, there, back, matcher)[:, 0] - truth).abs().max() < tol[0]
    forward, backward = hops_of(walk, emb, there, back, matcher)
    assert (log_return_of_pair(forward[0], backward[0]).exp().view_as(truth[0]) - truth[0]).abs().max() < tol[0]
    loss = loss_of(walk, emb.requires_grad_(), there, back, matcher)
    loss.backward()
    assert (loss - d[f"loss_{walk}"]).abs() < tol[1]
    assert (emb.grad[:, 0] - grad).abs().max() < tol[2] * (1 if dtype == torch.float64 else grad.abs().max())


@pytest.mark.parametrize("stay", [0.0, 0.3])
def test_all_walks_agree_where_the_flow_is_of_whole_nodes_and_far_from_the_border(stay):
    emb, there, back = batched(2, k=3, h=17, w=19)
    step = torch.tensor([2.0, -1.0], dtype=emb.dtype).view(2, 1, 1)
    flows, matcher = (step.expand_as(there), -step.expand_as(back)), Matcher(1, 0.2, stay=stay)
    splat, window, aligned = (every_return(walk, emb, *flows, matcher) for walk in WALKS)
    middle = (..., slice(7, -7), slice(7, -7))
    assert (splat[middle] - window[middle]).abs().max() < 1e-12
    assert (splat[middle] - aligned[middle]).abs().max() < 1e-12
    assert (splat - window).abs().max() > 1e-3  # they differ at the border


@pytest.mark.parametrize("walk", OTHER)
@pytest.mark.parametrize("motion", [0.0, 0.7, 3.0, 30.0])
def test_returns_are_probabilities_and_the_ways_to_compute_them_agree(walk, motion):
    clip, matcher = batched(7, k=3, motion=motion), Matcher(2, 0.2)
    every = every_return(walk, *clip, matcher)
    forward, backward = hops_of(walk, *clip, matcher)
    assert torch.allclose(every[0].flatten(1), log_return_of_pair(forward[0], backward[0]).exp(), atol=1e-12)
    assert every.min() >= 0 and every.max() <= 1 + 1e-12
    starts = torch.tensor([[5, 40, 11]])
    assert torch.allclose(torch.stack(returns_of_hops(forward, backward, starts)), every.flatten(2)[..., starts[0]])
    losses = [loss_of(walk, *clip, matcher, starts=s) for s in (63, 10**6)]
    assert torch.allclose(*losses)


@pytest.mark.parametrize("walk", OTHER)
def test_distinct_features_come_home_and_constant_ones_do_not(walk):
    still = torch.zeros(1, 1, 2, 5, 7)
    distinct = torch.eye(35).view(1, 1, 35, 5, 7).repeat(2, 1, 1, 1, 1)
    assert every_return(walk, distinct, still, still, Matcher(2, 0.01)).min() > 0.999
    still = torch.zeros(1, 1, 2, 15, 15)
    middle = every_return(walk, torch.ones(2, 1, 4, 15, 15), still, still, Matcher(2, 0.07))[0, 0, 7, 7]
    assert middle == pytest.approx(1 / 25, rel=1e-4)


@pytest.mark.parametrize("walk", OTHER)
def test_gradients_of_a_batch_are_those_of_finite_differences_and_its_loss_is_the_mean(walk):
    (emb, *flows), matcher = batched(1, 2, k=3, d=3, h=4, w=5), Matcher(1, 0.3, stay=0.1)
    alone = [loss_of(walk, *(x[:, i : i + 1] for x in (emb, *flows)), matcher) for i in range(2)]
    assert torch.allclose(loss_of(walk, emb, *flows, matcher), torch.stack(alone).mean())

    def loss(e):
        return loss_of(walk, e, *flows, matcher)

    assert torch.autograd.gradcheck(loss, (emb.requires_grad_(),), atol=1e-6, fast_mode=True)


@pytest.mark.parametrize("walk", WALKS)
@pytest.mark.parametrize("motion", [3.0, 30.0])
def test_gradients_are_finite_where_nothing_comes_home_and_none_reaches_the_flow(walk, motion):
    emb, there, back = (x.float().requires_grad_() for x in batched(3, k=3, motion=motion))
    loss = loss_of(walk, emb, there, back, Matcher(1, 0.07))
    loss.backward()
    assert loss.isfinite() and emb.grad.isfinite().all()
    assert there.grad is None and back.grad is None


@pytest.mark.parametrize("walk", WALKS)
@pytest.mark.parametrize("frames", [2, 4])
def test_every_walk_trains_all_parameters_in_half_precision_too(walk, frames):
    method = MultiscaleCRW(levels=2, embed_dim=8, radius=2, starts=96, walk=walk)
    clips = moving_clip(frames, (64, 96), batch=2)
    plain = method.losses(clips)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = method.losses(clips)
    torch.stack(list(half.values())).sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in method.parameters())
    assert all(torch.allclose(half[key], plain[key], rtol=0.2) for key in plain if "crw" in key)


def test_the_flow_is_the_same_whichever_walk_was_the_loss():
    clip = moving_clip(2, (64, 64))
    splat = MultiscaleCRW(levels=2).eval()
    window = MultiscaleCRW(levels=2, walk="window").eval()
    window.load_state_dict(splat.state_dict())
    assert torch.equal(splat.flow(clip, [(0, 1)]).xy, window.flow(clip, [(0, 1)]).xy)
    assert splat.losses(clip)["smooth_8"] == window.losses(clip)["smooth_8"]
    assert torch.allclose(splat.losses(clip)["crw_8"], window.losses(clip)["crw_8"])  # no flow comes in
    assert not torch.allclose(splat.losses(clip)["crw_4"], window.losses(clip)["crw_4"])


@pytest.mark.parametrize("regressor", [False, True])
def test_a_walk_on_the_coarse_levels_teaches_what_they_use(regressor):
    options = {"levels": 3, "walk_levels": 2, "starts": 16, "regressor": regressor, "bound_crop": 16}
    method = MultiscaleCRW(**options)
    losses = method.losses(moving_clip(3, (64, 64)))
    walked = {key for key in losses if key.startswith(("crw", "smooth"))}
    assert walked == {f"{kind}_{stride}" for kind in ("crw", "smooth") for stride in (16, 8)}
    torch.stack(list(losses.values())).sum().backward()
    for name, p in method.named_parameters():
        learns = not name.startswith("embed_heads.2.")
        assert p.requires_grad == learns and (p.grad is not None) == learns, name


def test_a_walk_on_all_levels_is_the_walk():
    clip = moving_clip(2, (64, 64))
    every, plain = MultiscaleCRW(levels=2, walk_levels=2), MultiscaleCRW(levels=2)
    every.load_state_dict(plain.state_dict())
    assert every.losses(clip) == plain.losses(clip)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"walk": "windows"}, "walk one of splat, window, aligned; got 'windows'"),
        ({"walk": "window", "end_view_shift": 64}, "end_view_shift 0 with walk 'window'"),
        ({"levels": 3, "walk_levels": 4}, r"walk_levels in 1\.\.3.* got 4"),
        ({"walk_levels": 0}, r"walk_levels in 1\.\.5.* got 0"),
    ],
)
def test_what_a_walk_cannot_be_is_named(options, message):
    with pytest.raises(Error, match=message):
        MultiscaleCRW(**options)
