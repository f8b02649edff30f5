"""LocoTrack: parity with the authors' PyTorch code, losses, training, cached features, contract."""

import copy
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from golden.fill import filled
from trackpl_locotrack.losses import point_losses
from trackpl_locotrack.method import LocoTrack, decay_groups, default_resolutions
from trackpl_locotrack.schedule import WarmupCosine
from trackpl_locotrack.weights import translate
from trackpl_locotrack.winograd import conv3x3, transformed

import trackpl
from trackpl.errors import DataError, Error
from trackpl.testing import check_method, check_mirror, moving_clip

GOLDEN = Path(__file__).parent / "golden" / "locotrack"
MANIFEST = json.loads((GOLDEN / "manifest.json").read_text())
TINY = {"initial_resolution": (64, 64), "iterations": 2}


def golden(name):
    return {k: torch.from_numpy(np.asarray(v)) for k, v in np.load(GOLDEN / f"{name}.npz").items()}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Checkpoints of the published form, with the goldens' weights."""
    folder = tmp_path_factory.mktemp("published")
    for size, keys in MANIFEST["keys"].items():
        state = {f"model.{key}": filled(key, tuple(shape)) for key, shape in keys}
        torch.save({"state_dict": state, "epoch": 3, "global_step": 7}, folder / f"{size}.ckpt")
    return folder


def clip_of(d):
    return trackpl.Clip(video=d["video_u8"].permute(0, 1, 4, 2, 3))


def elsewhere(d):
    """Where a point is not in its own query frame: (B, N, T)."""
    return torch.arange(d["video_u8"].shape[1]) != d["query_points"][..., :1]


@pytest.mark.parametrize(
    ("case", "size", "options"),
    [
        ("small_64x96", "small", {"initial_resolution": (64, 96)}),
        ("base_128_chunk3", "base", {"initial_resolution": (128, 128), "query_chunk": 3}),
        ("small_multires", "small", {"initial_resolution": (64, 64)}),
        ("small_alllevels", "small", {"initial_resolution": (64, 64), "schedule": "all"}),
    ],
)
def test_tracks_equal_the_goldens_through_a_published_checkpoint(published, case, size, options):
    d = golden(case)
    method = trackpl.load("locotrack", published / f"{size}.ckpt", **options)
    tracks = method.track(clip_of(d), d["query_points"][..., [0, 2, 1]])
    there = elsewhere(d)
    assert (tracks.xy.transpose(1, 2) - d["tracks"])[there].abs().max() < 1e-3
    assert (1 - tracks.visible.transpose(1, 2) - d["occluded_prob"])[there].abs().max() < 5e-4


def test_a_clip_of_another_size_equals_the_golden_inference(published):
    d = golden("inference_xyt")
    there = torch.arange(6) != d["query_points"][..., 2:]
    for resolution in (None, (64, 96)):
        method = trackpl.load("locotrack", published / "small.ckpt", initial_resolution=(64, 96), resolution=resolution)
        tracks = method.track(clip_of(d), d["query_points"][..., [2, 0, 1]])
        assert (tracks.xy.transpose(1, 2) - d["tracks"])[there].abs().max() < 1e-3
        assert torch.equal((tracks.visible.transpose(1, 2) <= 0.5)[there], d["occluded"][there])


@pytest.mark.parametrize(("case", "schedule"), [("small_64x96", "last"), ("small_alllevels", "all")])
def test_every_output_equals_the_golden_with_and_without_gradients(published, case, schedule):
    d = golden(case)
    resolution = (64, 96) if schedule == "last" else (64, 64)
    method = trackpl.load("locotrack", published / "small.ckpt", initial_resolution=resolution, schedule=schedule)
    h, w = d["video_u8"].shape[2:4]
    frame, place = d["query_points"][0, :, 0].long(), d["query_points"][0][:, [2, 1]] / torch.tensor([w, h])
    outputs = method._track_video(clip_of(d).video[0], frame, place)
    assert len(outputs) == len(d["tracks_iters"]) + (schedule == "all")
    for k, (xy, occluded, far) in enumerate(outputs[: len(d["tracks_iters"])]):
        assert (xy * torch.tensor([w, h]) - d["tracks_iters"][k, 0]).abs().max() < 1e-3
        assert (occluded - d["occlusion_iters"][k, 0]).abs().max() < 2e-3
        assert (far - d["expected_dist_iters"][k, 0]).abs().max() < 2e-3
    with torch.no_grad():
        last = method._track_video(clip_of(d).video[0], frame, place)[-1]
    for ours, same in zip(last, outputs[-1], strict=True):
        assert (ours - same).abs().max() < 1e-3


def test_both_paths_of_the_backbone_agree(published):
    d = golden("small_64x96")
    method = trackpl.load("locotrack", published / "small.ckpt")
    images = d["video_u8"][0, :1].permute(0, 3, 1, 2) / 255 * 2 - 1
    with torch.no_grad(), method.backbone.quick(images.device):
        fast = method.backbone(images)
    for ours, same in zip(fast, method.backbone(images), strict=True):
        assert (ours - same).abs().max() < 2e-5
    frame = int(d["feat_frame"])
    images = d["video_u8"][0, frame : frame + 1].permute(0, 3, 1, 2) / 255 * 2 - 1
    for level, (name, step) in enumerate((("s2", 4), ("s4", 2), ("s8", 1))):
        with torch.no_grad(), method.backbone.quick(images.device):
            ours = method.backbone(images)[level][:, ::step, ::step]
        assert (ours - d[f"feat_{name}"]).abs().max() < 2e-5


@pytest.mark.parametrize("shape", [(2, 16, 8, 8), (1, 32, 9, 13), (1, 16, 64, 40)])
def test_the_quick_convolution_is_one(shape):
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(shape, generator=g), torch.randn(24, shape[1], 3, 3, generator=g)
    exact = torch.nn.functional.conv2d(x.double(), weight.double(), padding=1)
    assert (conv3x3(x, transformed(weight)) - exact).abs().max() < 2e-5 * exact.abs().max()


# Losses and training ------------------------------------------------------------------------------------------------


def test_losses_and_their_gradients_equal_the_golden():
    d = golden("loss")
    size = d["video_shape"][[3, 2]].float()
    outputs = [d[k].requires_grad_() for k in ("tracks_iters", "occlusion_iters", "expected_dist_iters")]
    everywhere = torch.ones_like(d["occluded"])
    total = torch.zeros(())
    for k in range(5):
        losses = point_losses(
            outputs[0][k] / size, outputs[1][k], outputs[2][k], d["target_points"] / size, d["occluded"], everywhere
        )
        for ours, theirs in (("position", "position"), ("occlusion", "occlusion"), ("uncertainty", "prob")):
            assert torch.allclose(losses[ours], d[f"{theirs}_loss"][k], rtol=1e-5)
        total = total + torch.stack(list(losses.values())).sum()
    total.backward()
    assert torch.allclose(total, d["loss"], rtol=1e-5)
    for output, key in zip(outputs, ("grad_tracks", "grad_occlusion", "grad_expected_dist"), strict=True):
        assert (output.grad - d[key]).abs().max() < 1e-6


@pytest.mark.slow
def test_training_steps_equal_the_golden(published):
    d = golden("train_small")
    method = trackpl.load("locotrack", published / "small.ckpt", initial_resolution=(64, 64), query_chunk=5).train()
    clip = dataclasses.replace(
        clip_of(d),
        tracks=d["target_points"].transpose(1, 2),
        visible=~d["occluded"].transpose(1, 2),
        queries=d["query_points"][..., [0, 2, 1]],
    )
    groups = decay_groups(method.named_parameters())
    optimizer = torch.optim.AdamW(groups, lr=1e-3, weight_decay=1e-3, betas=(0.9, 0.95))
    named = dict(method.named_parameters())
    for step in range(3):
        losses = method.losses(clip)
        total = torch.stack(list(losses.values())).sum()
        optimizer.zero_grad()
        total.backward()
        tolerance = 1e-2 if step else 1e-5
        assert torch.allclose(total, d["loss_steps"][step], rtol=tolerance)
        if step == 0:
            for ours, theirs in (("position", "position"), ("occlusion", "occlusion"), ("uncertainty", "prob")):
                values = torch.stack([losses[f"{ours}_{k}"] for k in range(5)])
                assert torch.allclose(values, d[f"{theirs}_loss"], rtol=1e-5, atol=1e-5)
            for key, norm in zip(MANIFEST["param_order"], d["grad_norm_per_key"], strict=True):
                allowed = 2e-3 * norm if norm > 1e-3 else 1e-3
                assert (named[translate(key)].grad.norm() - norm).abs() < allowed, key
            for key, grad in d.items():
                if key.startswith("grad:"):
                    gap = (named[translate(key.removeprefix("grad:"))].grad - grad).abs().max()
                    assert gap < max(2e-3 * grad.abs().max(), 1e-5), key  # one of them is truly zero
        norm = torch.nn.utils.clip_grad_norm_(method.parameters(), 1.0)
        assert torch.allclose(norm, d["grad_norm_steps"][step], rtol=max(tolerance, 1e-3))
        optimizer.step()


def test_learning_rates_equal_the_golden():
    d = golden("lr_schedule")
    rates = {}
    for key, total in (("onecycle_lr", 300_000), ("warmup_cosine_lr", 300_000)):
        optimizer = torch.optim.AdamW([torch.zeros(1)], lr=1e-3, betas=(0.9, 0.95))
        if key == "onecycle_lr":
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total, pct_start=0.003)
            # Its values at a step follow from the step alone.
            for step, rate, beta in zip(d["step"], d[key], d["onecycle_beta1"], strict=True):
                schedule.last_epoch = int(step)
                schedule._step_count = int(step)
                assert abs(schedule.get_lr()[0] - rate) < 1e-9
                assert abs(optimizer.param_groups[0]["betas"][0] - beta) < 1e-9
            continue
        rates = WarmupCosine(optimizer, 1000, total).lr_lambdas[0]
        for step, rate in zip(d["step"], d[key], strict=True):
            assert abs(1e-3 * rates(int(step)) - rate) < 1e-9


def test_biases_have_no_weight_decay():
    method = LocoTrack(**TINY)
    optimizer = method.configure_optimizers()["optimizer"]
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert {name: decay[id(p)] for name, p in method.named_parameters()} == {
        name: 0.0 if name.endswith("bias") else 1e-3 for name, _ in method.named_parameters()
    }


@pytest.mark.slow
def test_twenty_steps_overfit_a_clip_to_under_a_pixel():
    torch.manual_seed(0)
    method = LocoTrack(initial_resolution=(64, 64)).train()
    clip = moving_clip(6, (64, 64), points=16)
    queries = torch.cat([torch.zeros(1, 16, 1), clip.tracks[:, 0]], -1)
    clip = dataclasses.replace(clip, queries=queries)
    optimizer = torch.optim.AdamW(decay_groups(method.named_parameters()), lr=1e-3, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, 21, cycle_momentum=False)
    for _ in range(20):
        loss = torch.stack(list(method.losses(clip).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(method.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    gap = (method.eval().track(clip, queries).xy - clip.tracks).norm(dim=-1)[clip.visible]
    assert gap.mean() < 1.0, f"{gap.mean():.2f} px after 20 steps"


def test_accumulated_gradients_are_those_of_the_joint_batch():
    torch.manual_seed(0)
    method = LocoTrack(iterations=1, initial_resolution=(64, 64)).train()
    clips = []
    for _ in range(2):
        clip = moving_clip(4, (64, 64), points=6)
        queries = torch.cat([torch.zeros(1, 6, 1), clip.tracks[:, 0]], -1)
        clips.append(dataclasses.replace(clip, video=clip.video * torch.rand(()), queries=queries))

    def gradients(*batches):
        method.zero_grad()
        for batch in batches:
            (torch.stack(list(method.losses(batch).values())).sum() / len(batches)).backward()
        return [p.grad.clone() for p in method.parameters() if p.grad is not None]

    one, two = gradients(trackpl.Clip.cat(clips)), gradients(*clips)
    scale = max(g.abs().max() for g in one)
    assert len(one) == len(two) > 100 and all((a - b).abs().max() < 1e-4 * scale for a, b in zip(one, two, strict=True))


def test_the_first_stage_trains_the_initial_track_alone():
    method = LocoTrack(initial_resolution=(64, 64), iterations=0)
    losses = method.losses(moving_clip(3, (64, 64)))
    assert set(losses) == {"position_0", "occlusion_0", "uncertainty_0"}
    torch.stack(list(losses.values())).sum().backward()
    trained = {name.split(".")[0] for name, p in method.named_parameters() if p.grad is not None}
    assert trained == {"backbone", "initial"}
    rest = {name.split(".")[0] for name, p in method.named_parameters() if not p.requires_grad}
    assert rest == {"refinement"}


def test_the_matching_loss_is_the_cross_entropy_of_the_true_cell():
    torch.manual_seed(0)
    clip = moving_clip(3, (64, 64), points=6)
    queries = torch.cat([torch.zeros(1, 6, 1), clip.tracks[:, 0]], -1)
    visible = clip.visible.clone()
    visible[:, 1:, 0] = False
    clip = dataclasses.replace(clip, queries=queries, visible=visible)
    method = LocoTrack(initial_resolution=(64, 64), iterations=0, matching_weight=2.0)
    loss = method.losses(clip)["matching"]
    maps = [features.detach() for features in method.backbone(clip.video[0] * 2 - 1)]
    cells = (clip.tracks[0] / 4).long()  # of stride 4, 16 x 16
    expected = []
    for t, n in visible[0].nonzero().tolist():
        scores = []
        for level, stride in ((2, 8), (1, 4)):
            # The query's feature, bilinear between cell centres, and its product with every cell of the frame.
            at = (clip.tracks[0, 0, n] / 32 - 1).view(1, 1, 1, 2)
            fine = maps[level].permute(0, 3, 1, 2)
            query = torch.nn.functional.grid_sample(fine[:1], at, align_corners=False, padding_mode="border")[
                0, :, 0, 0
            ]
            score = (fine[t] * query[:, None, None]).sum(0)[None, None]
            if stride == 8:
                score = torch.nn.functional.interpolate(score, (16, 16), mode="bilinear", align_corners=False)
            scores.append(score)
        mixed = 20 * method.initial.cost(torch.cat(scores, 1))[0, 0]
        expected.append(mixed.logsumexp((0, 1)) - mixed[cells[t, n, 1], cells[t, n, 0]])
    assert torch.isclose(loss, 2 * torch.stack(expected).mean(), rtol=1e-4)
    loss.backward()
    assert method.backbone.stem.weight.grad.abs().max() > 0


def test_the_tiny_size_is_ours_and_known_by_its_weights(tmp_path):
    torch.manual_seed(0)
    method = LocoTrack("tiny", **TINY).eval()
    torch.save({"state_dict": method.state_dict()}, tmp_path / "bare.ckpt")
    again = trackpl.load("locotrack", tmp_path / "bare.ckpt", **TINY)
    assert again.hparams["size"] == "tiny"
    clip = moving_clip(4, (64, 96), points=5)
    queries = torch.cat([torch.zeros(1, 5, 1), clip.tracks[:, 0]], -1)
    one, two = method.track(clip, queries), again.track(clip, queries)
    assert torch.equal(one.xy, two.xy) and one.xy.shape == (1, 4, 5, 2)


def test_the_shipped_weights_follow_a_plane_and_its_mirror_image():
    method = trackpl.load("locotrack")
    clip = moving_clip(6, (128, 160), points=32)
    queries = torch.cat([torch.zeros(1, 32, 1), clip.tracks[:, 0]], -1)
    tracks = method.track(clip, queries)
    gap = (tracks.xy - clip.tracks).norm(dim=-1)
    assert gap.median() < 0.5 and (gap < 2).float().mean() > 0.9, f"median {gap.median():.2f} px"
    assert (tracks.visible > 0.5).float().mean() > 0.8
    check_mirror(method)


def test_truth_of_hidden_points_and_tracks_never_seen_do_not_count():
    method = LocoTrack(**TINY)
    clip = moving_clip(3, (64, 64), points=4)
    visible = clip.visible.clone()
    visible[:, 1, 0] = False
    visible[:, :, 3] = False
    tracks = clip.tracks.clone()
    tracks[:, 1, 0] = torch.nan
    tracks[:, :, 3] = torch.nan
    losses = method.losses(dataclasses.replace(clip, tracks=tracks, visible=visible))
    torch.stack(list(losses.values())).sum().backward()
    assert all(v.isfinite() for v in losses.values())
    assert all(p.grad is None or p.grad.isfinite().all() for p in method.parameters())


def test_training_queries_are_frames_that_show_the_point():
    seen = []

    class Watched(LocoTrack):
        def _track_video(self, video, frame, place, kept=None):
            seen.append((frame, place))
            return super()._track_video(video, frame, place, kept)

    method = Watched(initial_resolution=(64, 64), iterations=0)
    clip = moving_clip(4, (64, 64), points=6)
    visible = torch.rand(1, 4, 6, generator=torch.Generator().manual_seed(1)) < 0.5
    visible[:, 2] = True
    clip = dataclasses.replace(clip, visible=visible & clip.visible)
    for _ in range(8):
        method.losses(clip)
    frames = torch.stack([f for f, _ in seen])
    shown = clip.visible[0, :, :].any(0)
    for n in shown.nonzero().flatten().tolist():
        assert clip.visible[0, frames[:, n], n].all()
    assert all(len(frames[:, n].unique()) > 1 for n in range(6) if clip.visible[0, :, n].sum() > 2)
    frame, place = seen[0]
    rows = clip.tracks[0, frame, torch.arange(6)] / 64
    assert torch.allclose(place[shown], rows[shown])


def test_a_second_stage_starts_from_the_first(tmp_path, monkeypatch):
    torch.manual_seed(1)
    first = LocoTrack(initial_resolution=(64, 64), iterations=0)
    torch.save({"state_dict": first.state_dict(), "hyper_parameters": dict(first.hparams)}, tmp_path / "first.ckpt")
    second = LocoTrack(**TINY, start_from=str(tmp_path / "first.ckpt"))
    second._trainer = type("Trainer", (), {"ckpt_path": None})()
    second.setup("fit")
    for key, value in second.state_dict().items():
        assert torch.equal(value, first.state_dict()[key])


# Contract -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_conformance():
    done = check_method("locotrack", train_size=(64, 64), **TINY)
    assert {"check_gradients", "check_overfit", "check_checkpoint", "check_points"} <= set(done)


def test_the_size_comes_from_the_checkpoint_and_a_wrong_one_is_refused(published):
    assert trackpl.load("locotrack", published / "base.ckpt").hparams["size"] == "base"
    with pytest.raises(Error, match="does not fit LocoTrack"):
        trackpl.load("locotrack", published / "base.ckpt", size="small")


def test_features_are_computed_once_a_clip():
    method = LocoTrack(**TINY).eval()
    calls = []
    method.backbone.register_forward_hook(lambda *_: calls.append(1))
    clip = moving_clip(4, (64, 64))
    queries = torch.cat([torch.zeros(1, 8, 1), clip.tracks[:, 0]], -1)
    method.features(clip)
    once = len(calls)
    first = method.track(clip, queries)
    again = method.track(trackpl.Clip(video=clip.video.clone()), queries)  # the same pixels elsewhere
    assert len(calls) == once and torch.equal(first.xy, again.xy)
    method.track(moving_clip(4, (64, 64), seed=1), queries)
    assert len(calls) == 2 * once
    method.forget()
    method.track(clip, queries)
    assert len(calls) == 3 * once


def test_kept_features_are_never_stale():
    torch.manual_seed(0)
    method = LocoTrack(**TINY).eval()
    clip = moving_clip(3, (64, 64))
    queries = torch.cat([torch.zeros(1, 8, 1), clip.tracks[:, 0]], -1)

    def fresh():
        twin = LocoTrack(**TINY).eval()
        twin.load_state_dict(method.state_dict())
        return twin.track(clip, queries).xy

    before = method.track(clip, queries).xy
    clip.video[:, 1] = clip.video[:, 1].flip(-1)  # in place: the same tensor
    changed = method.track(clip, queries).xy
    assert torch.equal(changed, fresh()) and not torch.equal(changed, before)
    clip.video.numpy()[:, 2] *= 0.5  # behind torch's back
    assert torch.equal(method.track(clip, queries).xy, fresh())
    method.backbone.stem.weight.data.mul_(-1)  # weights too
    assert torch.equal(method.track(clip, queries).xy, fresh())
    with torch.autocast("cpu", torch.bfloat16):
        half = method.track(clip, queries).xy
    assert torch.equal(method.track(clip, queries).xy, fresh()) and half.dtype == torch.float32
    calls = []
    again = copy.deepcopy(method)
    again.backbone.register_forward_hook(lambda *_: calls.append(1))
    again.track(clip, queries)
    assert calls  # a copy of the method took no features along


def test_half_precision_keeps_places_in_float32():
    """A bfloat16 place above 128 px would be a whole number."""
    torch.manual_seed(0)
    method = LocoTrack(initial_resolution=(64, 64)).eval()
    clip = moving_clip(3, (200, 300), points=16)
    queries = torch.cat([torch.zeros(1, 16, 1), clip.tracks[:, 0]], -1)
    with torch.autocast("cpu", torch.bfloat16):
        tracks = method.track(clip, queries)
    assert tracks.xy.dtype == torch.float32
    assert torch.equal(tracks.xy[:, 0], clip.tracks[:, 0])
    assert (tracks.xy[:, 1:] % 1 != 0).float().mean() > 0.9


def test_default_resolutions_equal_the_goldens():
    for case in MANIFEST["default_resolutions"]:
        expected = [tuple(size) for size in case["resolutions"]]
        assert default_resolutions(tuple(case["full"]), tuple(case["train"])) == expected


@pytest.mark.parametrize(
    "options",
    [
        {"size": "large"},
        {"schedule": "some"},
        {"iterations": -1},
        {"query_chunk": 0},
        {"temperature": 0.0},
        {"matching_weight": -1.0},
        {"initial_resolution": (60, 64)},
        {"resolution": 0},
    ],
)
def test_bad_options_are_refused(options):
    with pytest.raises(Error, match="locotrack needs"):
        LocoTrack(**options)


def test_bad_clips_are_refused():
    method = LocoTrack(**TINY)
    clip = moving_clip(2, (64, 64))
    with pytest.raises(DataError, match="learns from tracks"):
        method.losses(trackpl.Clip(video=clip.video))
    with pytest.raises(DataError, match=r"query 0 .* is outside the clip"):
        method.track(clip, torch.tensor([[[2.0, 1.0, 1.0]]]))
    with pytest.raises(DataError, match="one video"):
        method.features(moving_clip(2, (64, 64), batch=2))
