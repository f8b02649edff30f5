"""CoTracker as a method: published checkpoints, protocols, both directions, dense tracks, the border, the contract."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from golden.fill import filled
from trackpl_cotracker import weights as weights_of
from trackpl_cotracker.grids import global_grid, local_grid
from trackpl_cotracker.method import CoTracker

import trackpl
from trackpl.errors import CheckpointError, DataError, Error
from trackpl.testing import check_method, moving_clip

GOLDEN = Path(__file__).parents[1] / "golden" / "cotracker"
MANIFEST = json.loads((GOLDEN / "manifest.json").read_text())
CASES = {case["name"]: case for case in MANIFEST["cases"]}
SMALL = {
    "width": 32,
    "depth": 1,
    "iterations": 1,
    "window": 4,
    "resolution": (64, 64),
    "support_grid": 2,
    "local_grid": 2,
}
KINDS = [{"version": 1}, {"version": 2}, {"version": 3, "mode": "online"}, {"version": 3}]


def golden(name):
    return {k: torch.from_numpy(np.asarray(v)) for k, v in np.load(GOLDEN / f"{name}.npz").items()}


def published_state(weight_set, window=None, scale=None):
    """A state dict as the authors publish it, with drawn weights."""
    state = {k: filled(k, tuple(s), scale) for k, s in MANIFEST["weight_sets"][weight_set].items()}
    if weight_set == "v2":
        state |= {"time_emb": torch.zeros(1, window, 456), "pos_emb": torch.zeros(1, 456, 96, 128)}
    if weight_set == "v3":
        state |= {"time_emb": torch.zeros(1, window, 1110)}
    return state


def small(seed=0, **options):
    torch.manual_seed(seed)
    return CoTracker(**(SMALL | options)).eval()


def queries_of(clip, frames):
    queries = torch.cat([torch.zeros_like(clip.tracks[:, 0, :, :1]), clip.tracks[:, 0]], -1)
    queries[..., 0] = torch.tensor(frames)
    return queries


# Published checkpoints ----------------------------------------------------------------------------------------------


def test_grids_equal_the_goldens():
    frame, d = (384, 512), golden("grids_v1")
    ours = {
        "v1_0": global_grid(1, 5, frame),
        "v1_1": global_grid(1, 6, frame),
        "v1_2": local_grid(1, 6, torch.tensor([[40.5, 100.25]]))[0],
        "v1_3": local_grid(1, 6, torch.tensor([[33.0, 0.0]]))[0],
        "v1_4": global_grid(1, 1, frame),
        "v1_5": global_grid(1, 10, (96, 128)),
        "v1_6": local_grid(1, 8, torch.tensor([[0.0, 0.0]]))[0],
    }
    d |= golden("grids_v2_v3")
    for version in (2, 3):
        ours |= {
            "g0": global_grid(version, 5, frame),
            "g1": global_grid(version, 6, frame),
            "g2": local_grid(version, 8, torch.tensor([[40.5, 100.25]]))[0],
            "g3": global_grid(version, 1, frame),
            "g4": global_grid(version, 10, (96, 128)),
        }
        assert ours.keys() == d.keys()
        for name, points in ours.items():
            assert (points - d[name]).abs().max() < 1e-4, name
    assert local_grid(1, 0, torch.zeros(3, 2)).shape == (3, 0, 2)


def load_case(name, tmp_path, **options):
    """Load the weights of a golden in their published form; the arrays, the clip and its queries in our pixels."""
    case, d = CASES[name], golden(name)
    window = case["args"].get("window_len")
    torch.save({"model": published_state(case["weight_set"], window, case["scale"])}, tmp_path / "published.pth")
    size = tuple(case["args"]["interp_shape"])
    method = trackpl.load("cotracker", tmp_path / "published.pth", resolution=size, **options)
    clip = trackpl.Clip(video=d["video"][None])
    h, w = clip.size
    # The authors' places are those of centres at integers; version 1 scales them as if they were of corners.
    shift = torch.tensor([0.5 * w / size[1], 0.5 * h / size[0]] if method.version == 1 else [0.5, 0.5])
    if "queries" in d:
        queries = d["queries"] + torch.cat([torch.zeros(1), shift])
    else:  # a grid of the model's frame, of which a mask left some
        chosen = d["model_queries_first_call"][: d["tracks"].shape[1]]
        queries = torch.cat([chosen[:, :1], method.to_pixels(chosen[:, 1:] / 4, clip.size)], -1)
    return method, d, clip, queries[None], shift


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["v1_pred_queries_backward", "v1_pred_grid_mask", "v2_pred_queries_backward", "v3_pred_grid_mask"],
)
def test_tracks_equal_those_of_the_published_predictors(tmp_path, name):
    method, d, clip, queries, shift = load_case(name, tmp_path, backward="backward" in name)
    assert method.version == int(name[1])
    tracks = method.track(clip, queries, reference_merge=True) if method.version == 1 else method.track(clip, queries)
    told = torch.ones_like(d["visible"], dtype=torch.bool)
    if method.version == 1 and not method.looks_back:  # what the authors call a track before the query means nothing
        told = torch.arange(clip.frames)[:, None] >= queries[0, :, 0]
    assert ((tracks.xy[0] - shift) - d["tracks"])[told].abs().max() < CASES[name]["tolerance"]["tracks_px"]
    clear = (tracks.visible[0] - 0.9).abs() > 1e-3
    assert torch.equal((tracks.visible[0] > 0.9)[told & clear], d["visible"].bool()[told & clear])
    if method.version == 3:
        away = torch.arange(clip.frames)[:, None] != queries[0, :, 0]
        n = tracks.visible.shape[2]
        assert (tracks.visible[0] - d["model_vis"][:, :n])[away].abs().max() < 2e-3
        assert (tracks.confidence[0] - d["model_conf"][:, :n])[away].abs().max() < 2e-3


@pytest.mark.slow
def test_the_single_point_protocol_equals_the_published_one(tmp_path):
    method, d, clip, queries, shift = load_case(
        "v1_eval_single_point", tmp_path, protocol="single", support_grid=6, local_grid=6, backward=False
    )
    tracks = method.track(clip, queries)
    time = torch.arange(clip.frames)[:, None]
    after, before = time > queries[0, :, 0], time < queries[0, :, 0]
    assert ((tracks.xy[0] - shift) - d["tracks"])[after].abs().max() < 1e-3
    assert (tracks.visible[0] - d["visibility"])[after].abs().max() < 1e-4
    assert (tracks.visible[0][before] == 0).all()
    assert torch.equal(tracks.xy[0][before], queries[0, :, 1:].expand(clip.frames, -1, -1)[before])


@pytest.mark.parametrize(
    ("weight_set", "window", "file", "expected"),
    [
        ("v1", None, "mine.pth", (1, 4, 8, "offline")),
        ("v1", None, "cotracker_stride_4_wind_12.pth", (1, 4, 12, "offline")),
        ("v1", None, "cotracker_stride_8_wind_16.pth", (1, 8, 16, "offline")),
        ("v2", 8, "cotracker2.pth", (2, 4, 8, "offline")),
        ("v2", 16, "mine.pth", (2, 4, 16, "offline")),
        ("v3", 60, "mine.pth", (3, 4, 60, "offline")),
        ("v3", 16, "scaled_online.pth", (3, 4, 16, "online")),
    ],
)
def test_a_published_checkpoint_tells_its_version_window_and_licence(
    tmp_path, monkeypatch, capsys, weight_set, window, file, expected
):
    state = {k: torch.zeros(()).expand(v) for k, v in MANIFEST["weight_sets"][weight_set].items()}
    if window is not None:
        state["time_emb"] = torch.zeros(1, window, 1)
    form = {f"module.{k}": v for k, v in state.items()} if file == "mine.pth" else {"model": state}
    torch.save(form, tmp_path / file)
    monkeypatch.setattr("torch.nn.init.xavier_uniform_", lambda x: x)
    method = trackpl.load("cotracker", tmp_path / file)
    model = method.model
    assert (method.version, model.stride, model.window, method.mode) == expected
    assert getattr(model, "entangled", False) == (weight_set == "v1")
    assert not any(p.any() for p in method.parameters())
    assert capsys.readouterr().err == f"trackpl: {file}: non-commercial weights, CC-BY-NC-4.0\n"


def test_options_given_go_before_those_of_a_published_checkpoint(tmp_path):
    state = {k: torch.zeros(()).expand(v) for k, v in MANIFEST["weight_sets"]["v1"].items()}
    torch.save(state, tmp_path / "cotracker_stride_4_wind_12.pth")
    method = trackpl.load("cotracker", tmp_path / "cotracker_stride_4_wind_12.pth", stride=8, window=4)
    assert (method.model.stride, method.model.window) == (8, 4)


def test_a_checkpoint_of_another_version_is_refused_whole(tmp_path, capsys):
    state = {k: torch.zeros(()).expand(v) for k, v in MANIFEST["weight_sets"]["v3"].items()}
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="does not fit CoTracker"):
        trackpl.load("cotracker", tmp_path / "a.pth", version=2)
    assert capsys.readouterr().err == ""


def test_our_own_checkpoint_is_loaded_without_a_notice(tmp_path, capsys):
    method = small(version=2)
    torch.save({"state_dict": method.state_dict(), "hyper_parameters": dict(method.hparams)}, tmp_path / "a.ckpt")
    again = trackpl.load("cotracker", tmp_path / "a.ckpt")
    assert (again.version, again.model.window) == (2, 4)
    assert capsys.readouterr().err == ""


def test_every_published_checkpoint_is_listed_with_its_licence():
    assert len(weights_of.PUBLISHED) == 9
    assert not any(p.commercial for p in weights_of.PUBLISHED)
    assert len({p.address for p in weights_of.PUBLISHED}) == 9


# Protocols ----------------------------------------------------------------------------------------------------------


def damped(method):
    """Let a method with drawn weights move points by a few pixels, not by tens."""
    with torch.no_grad():
        for name, parameter in method.model.named_parameters():
            if name in ("transformer.output.weight", "output.weight", "move.weight"):
                parameter[:2] = torch.randn_like(parameter[:2]) * 0.02
    return method


@pytest.mark.parametrize("kind", KINDS[:3], ids=str)
@pytest.mark.parametrize("protocol", ["joint", "single"])
def test_the_backward_pass_is_the_forward_pass_over_the_reversed_video(kind, protocol):
    method = damped(small(protocol=protocol, **kind))
    if protocol == "joint":
        method.support_grid = 0  # support stays in the first frame of the video
    clip = moving_clip(9, points=3)
    queries = queries_of(clip, [8, 5, 2])
    tracks = method.track(clip, queries)
    method.looks_back = False
    forward = method.track(clip, queries)
    reversed_queries = queries.clone()
    reversed_queries[..., 0] = 8 - queries[..., 0]
    other = method.track(trackpl.Clip(video=clip.video.flip(1)), reversed_queries)
    before = torch.arange(9)[:, None] < queries[0, :, 0]
    assert (tracks.xy - forward.xy)[0][~before].abs().max() == 0
    assert (tracks.xy - other.xy.flip(1))[0][before].abs().max() < 1e-3
    assert (tracks.visible - other.visible.flip(1))[0][before].abs().max() < 1e-4
    moved = (tracks.xy - queries[:, None, :, 1:]).norm(dim=-1)[0][before]
    assert (moved > 1e-3).any()
    assert (forward.visible[0][before] == 0).all()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_single_protocol_equals_a_loop_over_targets(kind):
    method = damped(small(protocol="single", chunk=6, **kind))
    clip = moving_clip(9, points=5, batch=2)
    queries = queries_of(clip, [0, 3, 8, 7, 3])
    queries[1, :, 0] = queries[1, :, 0].flip(0)
    together = method.track(clip, queries)
    method.looks_back = False
    for b in range(2):
        for n in range(5):
            frame = int(queries[b, n, 0])
            crop = 0 if method.version == 3 else frame
            query = queries[b, n].clone()
            query[0] -= crop
            alone = method.track(trackpl.Clip(video=clip.video[b : b + 1, crop:]), query[None, None])
            since = slice(frame - crop, None)
            assert (together.xy[b, frame:, n] - alone.xy[0, since, 0]).abs().max() < 1e-3
            assert (together.visible[b, frame:, n] - alone.visible[0, since, 0]).abs().max() < 1e-4


def test_support_points_are_seen_by_others_and_not_returned():
    clip = moving_clip(5, points=3)
    queries = queries_of(clip, [0, 0, 0])
    method = damped(small(version=2))
    tracks = method.track(clip, queries)
    assert tracks.xy.shape == (1, 5, 3, 2)
    method.support_grid = 0
    without = method.track(clip, queries)
    assert (tracks.xy - without.xy).abs().max() > 1e-4
    support = method.to_pixels(global_grid(2, 2, (64, 64)) / 4, clip.size)
    more = torch.cat([queries, torch.nn.functional.pad(support, (1, 0))[None]], 1)
    assert (method.track(clip, more).xy[:, :, :3] - tracks.xy).abs().max() < 1e-3


def test_targets_are_tracked_a_bounded_number_at_a_time(monkeypatch):
    sizes = []
    import trackpl_cotracker.method as module

    real = module.track_groups
    monkeypatch.setattr(module, "track_groups", lambda *a: sizes.append(a[4].shape) or real(*a))
    method = small(protocol="single", chunk=20)  # a target has eight support points
    clip = moving_clip(4, points=5)
    method.track(clip, queries_of(clip, [0, 1, 2, 3, 3]))
    assert all(g * n <= 20 and n == 9 for g, n in sizes)
    # Points of the last frame have no way forwards, the one of the first frame none back.
    assert sum(g for g, _ in sizes) == 3 + 4


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("frames", [1, 2, 3])
def test_short_clips_are_tracked(kind, frames):
    method = damped(small(**kind, window=8))
    clip = moving_clip(frames, points=2)
    tracks = method.track(clip, queries_of(clip, [0, frames - 1]))
    assert tracks.xy.isfinite().all()
    if frames > 1:
        assert (tracks.xy[:, 1:, 0] - clip.tracks[:, :1, 0]).abs().min() > 0
        assert tracks.visible[0, 1, 0] not in (0, 1)


# Dense tracks, features ---------------------------------------------------------------------------------------------


def test_dense_tracks_are_those_of_passes_over_interleaved_pixels(monkeypatch):
    method = damped(small(version=2, chunk=160))
    clip = moving_clip(5, size=(33, 46), points=2)
    extracted = []
    real = method.extract
    monkeypatch.setattr(method, "extract", lambda video: extracted.append(len(video)) or real(video))
    dense = method.track_dense(clip, source=2)
    assert extracted == [5]
    assert dense.xy.shape == (1, 5, 2, 33, 46) and dense.visible.shape == (1, 5, 33, 46)
    y, x = torch.meshgrid(torch.arange(33) + 0.5, torch.arange(46) + 0.5, indexing="ij")
    assert torch.equal(dense.xy[0, 2], torch.stack([x, y]))  # each pixel is itself in the source frame
    assert (dense.visible[0, 2] == 1).all()
    step = 4  # 33 * 46 pixels in 16 passes of 160 at most
    places = torch.stack([x[1::step, 3::step], y[1::step, 3::step]], -1).flatten(0, 1)
    tracks = method.track(clip, torch.nn.functional.pad(places, (1, 0), value=2.0)[None])
    part = dense.xy[0, :, :, 1::step, 3::step].flatten(2).transpose(1, 2)
    assert (part - tracks.xy[0]).abs().max() < 1e-3
    with pytest.raises(DataError, match="source frame 5 is outside the clip; allowed: 0 to 4"):
        method.track_dense(clip, 5)


def test_features_are_kept_for_the_same_clip_and_weights_alone(monkeypatch):
    method = small()
    clip = moving_clip(4, points=2)
    queries = queries_of(clip, [0, 1])
    calls = []
    real = method.extract
    monkeypatch.setattr(method, "extract", lambda video: calls.append(1) or real(video))
    first = method.track(clip, queries)
    again = method.track(trackpl.Clip(video=clip.video.clone()), queries)
    assert len(calls) == 1 and torch.equal(first.xy, again.xy)
    method.track(trackpl.Clip(video=clip.video * 0.5), queries)
    assert len(calls) == 2
    with torch.no_grad():
        method.model.encoder.stem.bias += 1
    method.track(trackpl.Clip(video=clip.video * 0.5), queries)
    assert len(calls) == 3
    method.forget()
    method.features(clip)
    method.track(clip, queries)
    assert len(calls) == 4
    method.train().eval()
    method.track(clip, queries)
    assert len(calls) == 5
    with pytest.raises(DataError, match="keeps features of one video, got a batch of 2"):
        method.features(moving_clip(2, batch=2))


# The border ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [1, 2, 3])
def test_pixels_go_to_the_model_and_back(version):
    method = small(version=version, resolution=(96, 128))
    xy = torch.rand(50, 2) * torch.tensor([300.0, 200.0])
    assert (method.to_pixels(method.to_features(xy, (200, 300)), (200, 300)) - xy).abs().max() < 1e-3
    corners = method.to_features(torch.tensor([[0.5, 0.5], [299.5, 199.5]]), (200, 300)) * 4
    if version > 1:  # their resize keeps the centres of the corner pixels
        assert (corners - torch.tensor([[0.0, 0.0], [127.0, 95.0]])).abs().max() < 1e-4
    else:
        corners = method.to_features(torch.tensor([[0.0, 0.0], [300.0, 200.0]]), (200, 300)) * 4
        assert (corners - torch.tensor([[-0.5, -0.5], [127.5, 95.5]])).abs().max() < 1e-4


def test_a_frame_of_the_models_size_is_shifted_by_half_a_pixel():
    for version in (1, 2, 3):
        method = small(version=version, resolution=(64, 64))
        assert torch.allclose(method.to_features(torch.tensor([8.5, 4.5]), (64, 64)), torch.tensor([2.0, 1.0]))


@pytest.mark.parametrize("version", [1, 2, 3])
def test_without_a_resolution_frames_keep_their_size_but_for_whole_cells(version):
    method = small(version=version, resolution=None)
    clip = moving_clip(2, size=(97, 131), points=2)
    assert method.model_size(clip.size) == (96, 132)
    assert method.extract(clip.video[0]).size == (96, 132)
    assert method.track(clip, queries_of(clip, [0, 1])).xy.isfinite().all()


def test_visibility_is_weighed_by_the_confidence_when_asked():
    clip = moving_clip(3, points=2)
    queries = queries_of(clip, [0, 1])
    plain = small(version=3).track(clip, queries)
    weighed = small(version=3, weigh_visible=True).track(clip, queries)
    away = torch.arange(3)[:, None] != queries[0, :, 0]
    assert torch.equal(plain.confidence, weighed.confidence)
    assert torch.allclose(weighed.visible[0][away], (plain.visible * plain.confidence)[0][away])
    assert (weighed.visible[0][~away] == 1).all()
    assert small(version=2).track(clip, queries).confidence is None


# Options and the contract -------------------------------------------------------------------------------------------


def test_the_window_is_the_published_one_unless_given():
    for options, window in (
        ({}, 8),
        ({"stride": 8}, 16),
        ({"version": 2}, 8),
        ({"version": 3}, 60),
        ({"version": 3, "mode": "online"}, 16),
        ({"window": 6}, 6),
    ):
        assert CoTracker(width=8, depth=1, **options).model.window == window


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"version": 4}, "no version 4; allowed: 1, 2, 3"),
        ({"mode": "live"}, "no mode live; allowed: offline, online"),
        ({"protocol": "all"}, "no protocol all; allowed: joint, single"),
        ({"stride": 2}, "no stride 2; allowed: 4, 8"),
        ({"hidden_loss": "l2"}, "no hidden_loss l2; allowed: huber, l1"),
        ({"window": 7}, "even window of 2 frames or more, got 7"),
        ({"iterations": 0}, "iterations of 1 or more, got 0"),
        ({"chunk": 0}, "chunk of 1 or more, got 0"),
        ({"train_points": 0}, "train_points of 1 or more, got 0"),
        ({"support_grid": -1}, "support_grid of 0 or more, got -1"),
        ({"width": 12}, "multiple of 8, got 12"),
        ({"resolution": (66, 64)}, r"multiples of its stride 4, 16 at least; got \(66, 64\)"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(Error, match=message):
        CoTracker(**options)


def test_queries_outside_the_clip_and_clips_without_tracks_are_refused():
    method, clip = small(), moving_clip(2, points=1)
    with pytest.raises(DataError, match="outside the clip"):
        method.track(clip, torch.tensor([[[2.0, 1.0, 1.0]]]))
    with pytest.raises(DataError, match="cotracker learns from tracks"):
        method.losses(trackpl.Clip(video=clip.video))


@pytest.mark.slow
@pytest.mark.parametrize("options", [*KINDS, {"version": 1, "protocol": "single"}], ids=str)
def test_conformance(options):
    done = check_method("cotracker", **(SMALL | options))
    assert {"check_points", "check_batch", "check_half_precision", "check_checkpoint", "check_overfit"} <= set(done)
