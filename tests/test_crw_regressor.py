"""The regressor of the multiscale walk: its network, masks and losses against the goldens, and who teaches whom."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden.fill import filled
from hypothesis import given
from hypothesis import strategies as st
from trackpl_crw import occlusion, photometric, regressor
from trackpl_crw.method import MultiscaleCRW
from trackpl_crw.pwc import Regressor, cost_volume
from trackpl_crw.smoothness import smoothness
from trackpl_crw.transition import upsample, warp
from trackpl_crw.weights import shapes, translate

import trackpl
from trackpl.errors import DataError, Error
from trackpl.testing import check_method, moving_clip

GOLDEN = Path(__file__).parent / "golden" / "crw"
SMALL = {"levels": 1, "resolution": None, "regressor": True, "bound_crop": 8, "starts": 16}
SCALE = {
    "feature_pyramid_extractor.": 1.4,
    "flow_estimators.": 1.4,
    "context_networks.": 1.4,
    "conv_1x1.": 1.4,
    "flow_estimators.predict_flow.": 1.0,
    "context_networks.convs.6.": 0.5,
}
ZEROED = ("flow_estimators.predict_flow.0.bias", "context_networks.convs.6.0.bias")


def golden(name):
    return {k: torch.from_numpy(np.asarray(v)) for k, v in np.load(GOLDEN / f"{name}.npz").items()}


def far(a, b):
    return (a - b).abs().max().item()


def published_state(reduce_dense=True):
    state = {k: filled(k, shape, SCALE) for k, shape in shapes(reduce_dense).items()}
    return state | {k: torch.zeros(2) for k in ZEROED if k in state}


# Goldens ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_network_equals_the_golden():
    d = golden("pwclite_reduced")
    method = MultiscaleCRW(regressor=True, input_range="unit", resolution=None).eval()
    method.load_state_dict(translate(published_state(), method.embed_heads))
    images = d["images"].float() / 255
    first, second = (method.pyramid(images[:, i]) for i in (0, 1))
    assert far(cost_volume(first[0], second[0]), d["fw_l0_corr"]) < 2e-4
    flows = method.regressor(first, first, second)
    for level, flow in enumerate(flows):
        assert far(flow, d[f"fw_l{level}_flow_ctx"]) < 2e-4
    assert far(upsample(flows[1], 2), d["fw_l2_flow_in"]) < 2e-4
    assert far(upsample(flows[3], 4), d["flows_fw_1"]) < 8e-4
    assert far(upsample(method.regressor(second, second, first)[3], 4), d["flows_bw_1"]) < 8e-4
    flow = method.flow(trackpl.Clip(video=images), [(0, 1)])
    assert far(flow.xy[:, 0], upsample(flows[4], 4)) < 1e-3


def test_the_cost_volume_equals_the_golden():
    d = golden("local_corr_r4")
    assert far(cost_volume(d["a"], d["b"]), d["corr"]) < 2e-6


def test_warping_and_occlusion_equal_the_goldens():
    d = golden("warp_occ")
    image = d["image"].float() / 255
    assert far(warp(image, d["flow_fw"]), d["warp_border"]) < 2e-6
    assert far(occlusion.warp_zeros(image, d["flow_fw"]), d["warp_zeros"]) < 2e-6
    assert far(occlusion.range_map(d["flow_bw"]), d["corr_map"]) < 2e-6
    assert ((occlusion.reached(d["flow_bw"]) < 0.2) != d["occ_backward_th02"].bool()).float().mean() < 1e-3
    assert (occlusion.consistent(d["flow_fw"], d["flow_bw"]) == d["occ_bidirection"]).float().mean() < 1e-3
    d = golden("uflow_maps")
    there, back = d["flow_fw"], d["flow_bw"]
    assert torch.equal(occlusion.in_frame(there), d["valid"])
    assert far(occlusion.range_map(back), d["range_map1"]) < 2e-4
    assert far(occlusion.reached(back), d["notocc_wang"]) < 2e-4
    assert ((occlusion.range_map(back) >= 0.75) != d["notocc_wangthres"].bool()).float().mean() < 1e-3
    assert (occlusion.consistent(there, back) != d["notocc_brox"]).float().mean() < 1e-3
    assert torch.allclose(occlusion.disagreement(there, back)[0], d["fb_sq_diff"], rtol=1e-5, atol=3e-4)


def test_classical_photometric_terms_equal_the_goldens():
    d = golden("arflow_losses")
    a, b = d["im1"].float() / 255, warp(d["im2"].float() / 255, d["flow_fw"])
    for radius, name in ((1, "ternary_d1"), (3, "ternary_d3")):
        mean = photometric.hamming(a, b, radius) / (2 * radius + 1) ** 2
        assert far(photometric.without_border(mean, radius), d[name]) < 2e-5
    assert far(photometric.dissimilarity(a, b), d["ssim"]) < 2e-5
    d = golden("uflow_losses")
    a, b = (d["images"].float() / 255).unbind(1)
    assert far(photometric.census(a).sum(1, keepdim=True), d["census_patch7_sum"]) < 2e-4
    there, back = (_half_pixel(_half_pixel(d[f"flow_{k}_q"])) for k in ("fw", "bw"))
    to_a, to_b = occlusion.warp_zeros(b, there), occlusion.warp_zeros(a, back)
    for method in ("wang", "brox"):
        seen, seen_back = occlusion.visible(there, back, method), occlusion.visible(back, there, method)
        for kind, name in (("charbonnier", "photo"), ("census", "census")):
            loss = photometric.photometric(kind, a, to_a, seen) + photometric.photometric(kind, b, to_b, seen_back)
            assert loss.item() / 2 == pytest.approx(d[f"loss_{name}_{method}"].item(), rel=2e-4)


def _half_pixel(flow):
    return F.interpolate(flow, scale_factor=2, mode="bilinear", align_corners=False) * 2


def test_the_boundary_loss_equals_the_golden():
    d = golden("uflow_losses")
    student, student_back, teacher, teacher_back = (
        d[f"{who}_{way}_q"] for who in ("student", "teacher") for way in ("fw", "bw")
    )
    margin = 2  # 8 pixels
    assert far(regressor.agreement(student, student_back, 0.03), d["student_consistency"]) < 2e-4
    assert far(regressor.agreement(teacher, teacher_back, 0.003), d["teacher_consistency"]) < 2e-4
    assert far(regressor.crop_flow(teacher, margin), d["teacher_flow_cropped"]) < 2e-4
    both = [
        regressor.boundary_loss(student, student_back, teacher, teacher_back, margin),
        regressor.boundary_loss(student_back, student, teacher_back, teacher, margin),
    ]
    assert torch.stack(both).mean().item() == pytest.approx(d["loss_selfsup_wang"].item(), rel=2e-4)


def test_losses_of_a_level_equal_the_golden():
    d = golden("crw_regressor_losses")
    mask = occlusion.visible(d["flow_reg"], d["flow_bw"])
    assert far(mask, d["mask"]) < 2e-5
    flow = d["flow_reg"].requires_grad_()
    feature = regressor.feature_consistency(d["emb_s"], d["emb_t"], flow, mask)
    kept = regressor.constraint(flow, d["flow_np"])
    assert feature.item() == pytest.approx(d["feat"].item(), rel=2e-4)
    assert kept.item() == pytest.approx(d["constraint"].item(), rel=2e-4)
    (0.1 * feature + kept).backward()
    assert far(flow.grad, d["grad"]) < 2e-5
    image, total = d["image"].float() / 255, 0.0
    for level in range(5):
        small = F.avg_pool2d(image, 64 >> level)
        loss = smoothness(d[f"flow_l{level}"], small, 150.0)
        assert loss.item() == pytest.approx(d[f"smooth_l{level}"].item(), rel=2e-4, abs=1e-7)
        total += loss.item()
    assert total == pytest.approx(d["smooth_sum"].item(), rel=2e-4)


# The method -----------------------------------------------------------------------------------------------------------


def test_sizes_of_the_networks():
    count = [sum(p.numel() for p in Regressor(5, reduced).parameters()) for reduced in (True, False)]
    pyramid = 1_022_160
    assert [c + pyramid for c in count] == [2_236_660, 3_335_434]


@pytest.mark.slow
def test_conformance():
    done = check_method("crw_multiscale", **SMALL)
    assert {"check_gradients", "check_checkpoint", "check_points"} <= set(done)


OURS = {"regress_from": "walk", "constraint_on": "consistent", "bound_boxes": 2}


@pytest.mark.parametrize(
    "options",
    [{"cost_volume": "features"}, {"cost_volume": "embeddings"}, OURS, OURS | {"cost_volume": "embeddings"}],
    ids=["features", "embeddings", "from the walk", "from the walk, embeddings"],
)
def test_who_teaches_whom(options):
    """Table of spec 5.4: the walk's losses teach pyramid and heads, the regressor's teach the regressor alone."""
    torch.manual_seed(0)
    method = MultiscaleCRW(levels=2, regressor=True, bound_crop=8, photometric="census", **options)
    losses = method.losses(moving_clip(2, (32, 48)))
    walk = {f"{k}_{s}" for k in ("crw", "smooth") for s in (8, 4)}
    ours = {f"{k}_{s}" for k in ("feature", "constraint", "regressor_smooth") for s in (8, 4)} | {"census", "bound"}
    assert set(losses) == walk | ours
    for group in (walk, ours):
        method.zero_grad()
        torch.stack([losses[k] for k in group]).sum().backward(retain_graph=True)
        taught = {k.partition(".")[0] for k, p in method.named_parameters() if p.grad is not None and p.grad.any()}
        assert taught == ({"feature_pyramid_extractor", "embed_heads"} if group is walk else {"regressor"})


def test_the_walk_learns_as_it_does_without_a_regressor():
    plain = MultiscaleCRW(levels=2)
    method = MultiscaleCRW(levels=2, regressor=True, bound_weight=0.0)
    method.load_state_dict(plain.state_dict() | {k: v for k, v in method.state_dict().items() if "regressor" in k})
    clip = moving_clip(2, (32, 48))
    with torch.no_grad():
        losses, expected = method.losses(clip), plain.losses(clip)
    assert "bound" not in losses
    assert all(torch.equal(losses[k], v) for k, v in expected.items())


def test_three_frames_and_one_term_of_each_kind():
    for kind in ("charbonnier", "ssim"):
        method = MultiscaleCRW(**SMALL, photometric=kind, occlusion="brox", reduce_dense=False)
        losses = method.losses(moving_clip(3, (32, 32)))
        assert kind in losses and all(v.isfinite() for v in losses.values())


def test_the_regressor_alone_is_trained_on_request():
    method = MultiscaleCRW(**SMALL, train_walk=False)
    losses = method.losses(moving_clip(2, (32, 32)))
    assert not any(k.startswith(("crw", "smooth")) for k in losses)
    torch.stack(list(losses.values())).sum().backward()
    assert {k.partition(".")[0] for k, p in method.named_parameters() if p.requires_grad} == {"regressor"}
    assert all(p.grad is not None for p in method.regressor.parameters())


def test_the_boundary_loss_comes_when_it_is_due():
    method = MultiscaleCRW(**SMALL, bound_start=10, bound_ramp=4)
    share = method.regressor_losses.bound_share
    assert [share(s) for s in (0, 9, 10, 12, 14, 99)] == pytest.approx([0, 0, 0.2, 0.6, 1, 1])
    assert "bound" not in method.losses(moving_clip(2, (32, 32)))


def test_flow_says_where_it_is_seen():
    torch.manual_seed(0)
    method = MultiscaleCRW(**SMALL).eval()
    clip = moving_clip(3, (32, 40))
    flow = method.flow(clip, [(0, 1), (2, 0)])
    assert flow.xy.shape == (1, 2, 2, 32, 40) and flow.visible.shape == (1, 2, 32, 40)
    back = method.flow(clip, [(1, 0), (0, 2)])
    expected = occlusion.consistent(flow.xy[0], back.xy[0]) * occlusion.in_frame(flow.xy[0])
    assert torch.equal(flow.visible[0], expected[:, 0])
    assert method.flow(clip, []).xy.shape == (1, 0, 2, 32, 40)


def test_the_walk_gives_its_flow_on_request():
    plain = MultiscaleCRW(levels=2, resolution=None).eval()
    other = MultiscaleCRW(levels=2, resolution=None, regressor=True, flow_by="walk").eval()
    other.load_state_dict(plain.state_dict() | {k: v for k, v in other.state_dict().items() if "regressor" in k})
    clip = moving_clip(2, (32, 32))
    assert torch.equal(other.flow(clip, [(0, 1)]).xy, plain.flow(clip, [(0, 1)]).xy)
    assert plain.flow(clip, [(0, 1)]).visible is None


def both_flows(method, clip):
    """Flow of the walk, there and back, in pixels of the finest level."""
    first, second = (method.embed(clip.float_video()[:, i]) for i in (0, 1))
    return method.matcher.flow(first, second), method.matcher.flow(second, first)


@pytest.mark.parametrize("reduce_dense", [True, False])
def test_begun_at_the_walk_an_untrained_regressor_gives_its_flow_wherever_it_comes_home(reduce_dense):
    torch.manual_seed(0)
    method = MultiscaleCRW(levels=2, resolution=None, regressor=True, reduce_dense=reduce_dense, **OURS, median=5)
    with torch.no_grad():
        clip = moving_clip(2, (64, 80))
        walk, back = both_flows(method, clip)
        source, target = (method.encode(clip.float_video()[:, i]) for i in (0, 1))
        flow = method._regressed(source, target)
    home = (occlusion.consistent(walk, back) * occlusion.in_frame(walk)).bool()
    assert 0 < home.sum() < home.numel()
    assert torch.equal(flow[home.expand_as(flow)], walk[home.expand_as(walk)])
    assert not torch.equal(flow, walk)


def test_flow_at_use_is_that_of_training_begun_at_the_walk():
    torch.manual_seed(0)
    method = MultiscaleCRW(**SMALL | {"levels": 2, "resolution": None}, **OURS | {"bound_boxes": 0})
    for last in (method.regressor.flow_estimators.predict_flow, method.regressor.context_networks.convs[-1]):
        torch.nn.init.normal_(last[0].weight, std=0.1)
    seen = []
    method.regressor.register_forward_hook(lambda module, given, flows: seen.append(flows[-1]))
    clip = moving_clip(2, (32, 48))
    with torch.no_grad():
        method.losses(clip)
        method.flow(clip, [(0, 1)])
    learned, there, home = seen[0], *seen[-2:]  # `flow` matches there and, to tell what is seen, back
    assert far(learned, torch.cat([there, home])) < 1e-4 and there.abs().max() > 1e-3


def test_the_constraint_on_consistent_pixels_leaves_the_others_free():
    walk = torch.zeros(2, 2, 8, 8)
    walk[0, 0, :, :4] = 6.0  # lands where the flow back is zero: nothing brings it home
    flow = walk.clone().requires_grad_()
    shifted = flow + torch.tensor([1.0, 2.0]).view(1, 2, 1, 1)
    embedded, guide = [torch.rand(2, 1, 4, 8, 8)], [torch.rand(2, 3, 8, 8)]
    loss = regressor.RegressorLosses(constraint_on="consistent").of_levels([shifted], [walk], embedded, guide)
    assert loss["constraint_4"].item() == pytest.approx(5.0)
    loss["constraint_4"].backward()
    assert not flow.grad[0, :, :, :4].any() and flow.grad[0, :, :, 4:].all()


@given(count=st.integers(1, 4), height=st.integers(24, 80), width=st.integers(24, 80))
def test_boxes_have_the_sizes_that_they_promise(count, height, width):
    covered = regressor.boxes(torch.zeros(3, 3, height, width), count)
    assert covered.shape == (3, 1, height, width) and covered.dtype == torch.bool
    share = covered.float().mean((1, 2, 3))
    assert (share <= count * (1 / 3 + 1 / height) * (1 / 3 + 1 / width)).all() and (share > 0).all()


def test_what_is_painted_over_is_other_pixels_and_is_not_counted():
    torch.manual_seed(0)
    frames = torch.rand(2, 2, 3, 64, 64)
    plain, nothing = regressor.RegressorLosses(bound_crop=8).cropped(frames)
    losses = regressor.RegressorLosses(bound_crop=8, bound_boxes=2)
    painted, covered = losses.cropped(frames)
    assert nothing is None and covered.shape == (2, 2, 1, 64, 64)
    hidden = covered.bool().expand_as(painted)
    assert torch.equal(painted[~hidden], plain[~hidden]) and (painted[hidden] != plain[hidden]).any()
    assert torch.equal(painted[hidden], frames.roll(1, 1).flip(-1)[hidden])
    student = torch.zeros(4, 2, 16, 16, requires_grad=True)
    everywhere = torch.ones(2, 2, 1, 64, 64)
    teacher = torch.tensor([1.0, -1.0, -1.0, 1.0]).view(4, 1, 1, 1).expand(4, 2, 16, 16)
    assert losses.of_boundary(student + 3, teacher, everywhere).item() == 0.0
    assert losses.of_boundary(student + 3, teacher, 0 * everywhere).item() > 0.0


@pytest.mark.parametrize(
    "options",
    [
        {"regressor": True, "end_view_shift": 64},
        {"train_walk": False},
        {"regressor": True, "bound_crop": 6},
        {"regressor": True, "bound_ramp": -1},
        {"regressor": True, "bound_boxes": -1},
        {"regress_from": "below"},
        {"constraint_on": "some"},
        {"photometric": "l1"},
        {"flow_by": "magic"},
    ],
)
def test_bad_options_are_refused(options):
    with pytest.raises(Error, match="crw_multiscale needs"):
        MultiscaleCRW(**options)


def test_a_crop_that_leaves_nothing_is_refused():
    with pytest.raises(DataError, match="leaves nothing of frames of 32 x 32"):
        MultiscaleCRW(**SMALL | {"bound_crop": 16}).losses(moving_clip(2, (32, 32)))
