"""CoTracker's versions 2 and 3: equal to the goldens; transformers, 4-D correlation, groups, chunks, precision."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden.fill import filled
from trackpl_cotracker import correlation4d, embeddings, transformer
from trackpl_cotracker.correlation4d import correlate, patches
from trackpl_cotracker.features import Features, pyramid
from trackpl_cotracker.state import Points, State
from trackpl_cotracker.transformer import CrossBlock, FactorisedTransformer, VirtualTransformer
from trackpl_cotracker.version2 import Version2
from trackpl_cotracker.version3 import Version3, motion_code, time_code
from trackpl_cotracker.weights import translate
from trackpl_cotracker.windows import track_groups, unroll

HERE = Path(__file__).parents[1] / "golden" / "cotracker"
SHARED = Path(__file__).parents[3] / "shared" / "golden" / "cotracker"
CASES = ("v2_w8_long", "v3_offline_T13", "v3_online_T27")


def golden(name):
    """Arrays and description of a case, ours or, where the project's shared folder is, one of the larger."""
    for folder in (HERE, SHARED):
        if (folder / f"{name}.npz").exists():
            manifest = json.loads((folder / "manifest.json").read_text())
            case = next(case for case in manifest["cases"] if case["name"] == name)
            case["weights"] = manifest["weight_sets"][case["weight_set"]]
            return {k: torch.from_numpy(v) for k, v in np.load(folder / f"{name}.npz").items()}, case
    pytest.skip(f"{name} is not in this checkout")


@pytest.fixture(scope="module")
def published():
    """Goldens with their models, made once each."""
    made = {}

    def get(name):
        if name not in made:
            arrays, case = golden(name)
            window = case["args"]["window_len"]
            model = Version2(window=window) if name[1] == "2" else Version3(window=window, sliding="online" in name)
            state = translate({k: filled(k, tuple(s), case["scale"]) for k, s in case["weights"].items()})
            model.load_state_dict({k.removeprefix("model."): v for k, v in state.items()})
            with torch.no_grad():
                features = model.eval().encode(arrays["video"].float() / 255 * 2 - 1)
            made[name] = arrays, case["tolerance"], model, features
        return made[name]

    return get


def given(d, model, features, iterations):
    """Arguments of the driver: the golden's clip as one group."""
    frames = torch.arange(len(d["video"]))
    query = d["queries"][None]
    return model, features, frames[None], frames[-1:] + 1, query[..., 0].long(), query[..., 1:] / 4, iterations


@pytest.mark.parametrize("name", CASES)
def test_the_first_update_equals_the_golden(published, name):
    d, tolerance, model, features = published(name)
    window = next(unroll(*given(d, model, features, 1)))
    coords = d["w0_coords"][0] if "w0_coords" in d else d["it0_coords"]
    assert (window.states[0].place[0] * 4 - coords).abs().max() < tolerance["tracks_px"]
    if "w0_track_mask" in d:
        assert torch.equal(window.mask[0].float(), d["w0_track_mask"])
        assert torch.equal(window.started[0].float(), d["w0_attention_mask"])
        sampled = embeddings.position(d["w0_coords_init"][0], (96, 128), 456)
        assert (sampled - d["pos_emb_sampled"]).abs().max() < tolerance["intermediates"]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_all_windows_and_updates_equal_the_golden(published, name):
    d, tolerance, model, features = published(name)
    windows = list(unroll(*given(d, model, features, 4)))
    assert len(windows) == (1 if name == "v3_offline_T13" else sum(key.endswith("_coords_init") for key in d))
    for j, window in enumerate(windows):
        for k, state in enumerate(window.states):
            coords = d[f"w{j}_coords"][k] if f"w{j}_coords" in d else d[f"it{k}_coords"]
            assert (state.place[0] * 4 - coords).abs().max() < tolerance["tracks_px"]
        if f"w{j}_vis_logits" in d:
            visible = window.states[-1].visible[0]
            assert (visible - d[f"w{j}_vis_logits"]).abs().max() < tolerance["intermediates"]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_tracks_equal_the_golden_without_gradients(published, name):
    d, tolerance, model, features = published(name)
    with torch.no_grad():
        xy, visible, confidence = track_groups(*given(d, model, features, 4))
    assert (xy[0] * 4 - d["tracks"]).abs().max() < tolerance["tracks_px"]
    assert (visible[0] - d["visibility"]).abs().max() < tolerance["visibility"]
    if name[1] == "3":
        assert (confidence[0] - d["confidence"]).abs().max() < tolerance["visibility"]


@pytest.mark.parametrize("name", CASES[1:])
def test_version_3_makes_the_golden_tokens(published, name):
    d, tolerance, model, features = published(name)
    length = d["it0_tokens"].shape[1]
    query, some = d["queries"], d["sub_points"].long()
    with torch.no_grad():
        supports = model.describe(features, query[None, :, 0].long(), query[None, :, 1:] / 4)
        place = (query[some, None, 1:] / 4).expand(-1, length, -1)
        index = torch.arange(length).expand(len(some), -1)
        for i, level in enumerate(features.levels):
            ours = correlate(level, index, place / 2**i, supports[i][0, some])[:, d["sub_frames"].long()]
            assert (ours.transpose(0, 1) - d[f"it0_corr_level{i}"]).abs().max() < tolerance["intermediates"]
        some_supports = tuple(s[:, some] for s in supports)
        found = model.correlation(features, index[:1], place[None], some_supports)
        tokens = torch.cat([torch.zeros(1, len(some), length, 2), found, motion_code(place[None])], -1)
        tokens += time_code(length, model.window, model.token, place.device)
    started = query[some, 0] < length
    assert (tokens[0] - d["it0_tokens"])[started].abs().max() < tolerance["intermediates"]
    if "time_emb_T" in d:
        assert (time_code(13, 60, 1110, place.device) - d["time_emb_T"]).abs().max() < 1e-5


# Small models, drawn at random ---------------------------------------------------------------------------------------


def small(version, **options):
    """A narrow model whose weights are large enough that all parts are felt."""
    torch.manual_seed(0)
    kind = {2: Version2, 3: Version3}[version]
    if version == 3:
        options = {"sliding": True, **options}
    model = kind(window=8, dim=32, heads=2, depth=2, virtual=5, **options)
    for key, parameter in model.named_parameters():
        if not key.endswith("norm.weight"):
            torch.nn.init.normal_(parameter, std=0.1 if parameter.ndim == 1 else parameter[0].numel() ** -0.5)
    torch.nn.init.normal_(model.transformer.virtual)
    move = model.output if version == 2 else model.move  # damped, as in the goldens: motion is coded by fast waves
    with torch.no_grad():
        move.weight[:2] *= 1e-3 if version == 2 else 0.08
    return model


def scene(groups, points, frames=8, seed=0):
    """Features of `groups` videos of random cells, and queries of the first half of each one's first window."""
    g = torch.Generator().manual_seed(seed)
    features = Features(
        tuple(pyramid(F.normalize(torch.randn(groups * frames, 128, 12, 16, generator=g), dim=1))), (48, 64)
    )
    place = torch.rand(groups, points, 2, generator=g) * torch.tensor([18.0, 14.0]) - 1.5  # some outside
    frame = torch.randint(0, 4, (groups, points), generator=g)
    return features, torch.arange(groups * frames).view(groups, frames), frame, place


def refined(model, features, frames, frame, place, started=None, iterations=2):
    """Refine one window from its beginning."""
    index = frames.gather(1, frame.clamp(max=frames.shape[1] - 1))
    points = Points(frame, place, model.describe(features, index, place))
    first = place[:, None].expand(-1, frames.shape[1], -1, -1)
    logit = first.new_full(first.shape[:3], model.START)
    begin = State(first, logit, logit if model.confident else None)
    mask = torch.arange(frames.shape[1])[:, None] >= frame[:, None]
    started = torch.ones_like(frame, dtype=torch.bool) if started is None else started
    return model.refine(features, frames, points, begin, mask, started, iterations)[-1]


def assert_equal(ours, theirs, tolerance=5e-5):
    assert (ours.place - theirs.place).abs().max() < tolerance
    assert (ours.visible - theirs.visible).abs().max() < tolerance
    if ours.confidence is not None:
        assert (ours.confidence - theirs.confidence).abs().max() < tolerance


def rows(state, which):
    return State(*(None if x is None else x[which] for x in (state.place, state.visible, state.confidence)))


@pytest.mark.parametrize("version", [2, 3])
@torch.no_grad()
def test_groups_do_not_feel_each_other(version):
    model = small(version)
    features, frames, frame, place = scene(3, 6)
    frame[1, 2], frame[2, :2] = 9, 20
    started = frame < 8
    together = refined(model, features, frames, frame, place, started)
    for g in range(3):
        one = slice(g, g + 1)
        alone = refined(model, features, frames[one], frame[one], place[one], started[one])
        assert_equal(rows(together, one), alone)


@pytest.mark.parametrize(("version", "options"), [(2, {}), (3, {"mask_unstarted": True})])
@pytest.mark.parametrize("points", [7, 64])
@torch.no_grad()
def test_points_that_have_not_started_are_not_felt(version, options, points):
    """Also with as many points as the published models have virtual tracks, where the authors' code mixes them up."""
    model = small(version, **options)
    features, frames, frame, place = scene(1, points)
    started = torch.arange(points)[None] % 3 != 1
    frame[~started] = 11
    among = refined(model, features, frames, frame, place, started)
    here = started[0]
    alone = refined(model, features, frames, frame[:, here], place[:, here])
    assert_equal(rows(among, (slice(None), slice(None), here)), alone)


@torch.no_grad()
def test_version_3_shows_points_that_have_not_started_as_published():
    model = small(3)
    features, frames, frame, place = scene(1, 7)
    started = torch.arange(7)[None] != 3
    among, here = refined(model, features, frames, frame, place, started), started[0]
    alone = refined(model, features, frames, frame[:, here], place[:, here])
    assert (among.visible[:, :, here] - alone.visible).abs().max() > 1e-3


@pytest.mark.parametrize("version", [2, 3])
@torch.no_grad()
def test_a_group_in_which_nobody_started_stays_finite(version):
    model = small(version, **({"mask_unstarted": True} if version == 3 else {}))
    features, frames, frame, place = scene(2, 5)
    started = torch.tensor([[False] * 5, [True] * 5])
    state = refined(model, features, frames, frame, place, started)
    assert state.place.isfinite().all() and state.visible.isfinite().all()


@pytest.mark.parametrize("version", [2, 3])
@torch.no_grad()
def test_small_parts_give_the_same(version, monkeypatch):
    model = small(version)
    args = scene(2, 9)
    whole = refined(model, *args)
    monkeypatch.setitem(transformer.TOKENS_A_CALL, "cpu", 20)
    for rows_a_call in (5, 16):  # less than the frames of one point; two points
        monkeypatch.setitem(correlation4d.ROWS_A_CALL, "cpu", rows_a_call)
        assert_equal(refined(model, *args), whole)


def test_recomputed_correlations_have_the_same_gradients(monkeypatch):
    model = small(3)
    features, frames, frame, place = scene(2, 5)
    found = []
    for kept, a_call in ((10**6, 10**6), (0, 40)):
        monkeypatch.setattr(correlation4d, "ROWS_KEPT", kept)
        monkeypatch.setattr(correlation4d, "ROWS_TRAINING", a_call)
        leaf = Features(tuple(level.clone().requires_grad_() for level in features.levels), features.size)
        model.zero_grad()
        state = refined(model, leaf, frames, frame, place)
        (state.place.sum() + state.visible.square().sum() + state.confidence.sum()).backward()
        found.append([x.grad.clone() for x in (*leaf.levels, *model.correlation.parameters())])
    for ours, theirs in zip(*found, strict=True):
        assert ours.abs().max() > 0
        assert (ours - theirs).abs().max() < 1e-4 * ours.abs().max()


@pytest.mark.parametrize("version", [2, 3])
def test_every_parameter_gets_a_finite_gradient(version):
    model = small(version)
    features, frames, frame, place = scene(1, 5)
    state = refined(model, features, frames, frame, place)
    sum(x.square().sum() for x in (state.place, state.visible, state.confidence) if x is not None).backward()
    for key, parameter in model.named_parameters():
        if not key.startswith("encoder."):
            assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), key


@pytest.mark.parametrize("version", [2, 3])
@torch.no_grad()
def test_bfloat16_keeps_places_in_float32_and_near(version):
    model = small(version)
    args = scene(1, 6)
    exact = refined(model, *args, iterations=1)
    with torch.autocast("cpu", torch.bfloat16):
        rough = refined(model, *args, iterations=1)
    for x in (rough.place, rough.visible, rough.confidence):
        assert x is None or (x.dtype == torch.float32 and x.isfinite().all())
    assert (rough.place - exact.place).abs().max() < 0.02


@torch.no_grad()
def test_places_far_outside_and_not_a_number_stay_in_bounds():
    model = small(3)
    features, frames, frame, place = scene(1, 4)
    place[0, 0], place[0, 1, 0] = 1e9, float("nan")
    state = refined(model, features, frames, frame, place)
    assert state.place.shape == (1, 8, 4, 2)


# Parts ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(12, 16), (1, 3), (1, 1)])
def test_the_correlation_is_that_of_sampled_patches(size):
    """Against `grid_sample` of the features, padded by their border, at and beyond the border too."""
    g = torch.Generator().manual_seed(0)
    level = torch.randn(3, *size, 8, generator=g)
    place = torch.rand(2, 3, 2, generator=g) * 24 - 4
    index = torch.tensor([[0, 1, 2], [2, 2, 0]])
    offsets = torch.arange(-3.0, 4)
    around = torch.stack(torch.meshgrid(offsets, offsets, indexing="ij"), -1).view(49, 2)  # x first
    scale = torch.tensor([max(size[1] - 1, 1), max(size[0] - 1, 1)])
    where = (place[..., None, :] + around) / scale * 2 - 1  # (2, 3, 49, 2)
    maps = level.permute(0, 3, 1, 2)[index.flatten()]
    sampled = F.grid_sample(maps, where.flatten(0, 1)[:, :, None], padding_mode="border", align_corners=True)
    sampled = sampled[..., 0].transpose(1, 2).unflatten(0, (2, 3))  # (2, 3, 49, C)
    if 1 in size:  # grid_sample cannot say where the one cell is: any place is in it
        where = (place[..., None, :] + around).clamp(min=0).minimum(torch.tensor([size[1] - 1.0, size[0] - 1.0]))
        low = where.floor().long()
        high = (low + 1).minimum(torch.tensor([size[1] - 1, size[0] - 1]))
        f = index[..., None]
        fx, fy = (where - low).unbind(-1)
        top = level[f, low[..., 1], low[..., 0]].lerp(level[f, low[..., 1], high[..., 0]], fx[..., None])
        below = level[f, high[..., 1], low[..., 0]].lerp(level[f, high[..., 1], high[..., 0]], fx[..., None])
        sampled = top.lerp(below, fy[..., None])
    assert (patches(level, index, place) - sampled).abs().max() < 1e-5
    support = torch.randn(2, 49, 8, generator=g)
    expected = torch.einsum("mspc,mqc->mspq", sampled, support).flatten(2)
    assert (correlate(level, index, place, support) - expected).abs().max() < 1e-4


def test_motion_is_coded_to_the_next_and_from_the_last_frame():
    place = torch.tensor([[1.0, 2.0], [1.5, 2.0], [1.5, 1.0]])[None, None]
    code = motion_code(place)[0, 0]
    assert code[:, :4].tolist() == [[-0.5, 0, 0, 0], [0, 1, 0.5, 0], [0, 0, 0, -1]]  # next (x, y), last (x, y)
    r = code[:, :4]
    for k in range(10):
        assert torch.allclose(code[:, 4 + 4 * k : 8 + 4 * k], (r * 2**k).sin(), atol=1e-5)
        assert torch.allclose(code[:, 44 + 4 * k : 48 + 4 * k], (r * 2**k).cos(), atol=1e-4)


def test_points_not_started_are_absent_from_the_factorised_attention():
    torch.manual_seed(0)
    model = FactorisedTransformer(10, 4, dim=16, heads=2, time=4, space=2)
    assert [len(model.time), len(model.space), model.every] == [4, 2, 2]
    tokens, started = torch.randn(2, 5, 3, 10), torch.tensor([[True, False, True, True, False], [True] * 5])
    among = model(tokens, started)
    assert (among[:1, started[0]] - model(tokens[:1, started[0]])).abs().max() < 1e-5
    assert (among[1:] - model(tokens[1:])).abs().max() < 1e-5
    assert model(tokens, torch.zeros(2, 5, dtype=torch.bool)).isfinite().all()


def test_no_space_blocks_leave_points_independent():
    torch.manual_seed(0)
    model = FactorisedTransformer(10, 4, dim=16, heads=2, time=2, space=0)
    tokens = torch.randn(1, 5, 3, 10)
    assert (model(tokens)[:, 1:3] - model(tokens[:, 1:3])).abs().max() < 1e-5


def test_a_hidden_query_looks_at_everything_alike():
    torch.manual_seed(0)
    block = CrossBlock(16, 2)
    x, context = torch.randn(1, 2, 16), torch.randn(1, 6, 16)
    seen = block.attention(x, context, queries=torch.tensor([[True, False]]))
    value = block.attention.kv(context).chunk(2, -1)[1].mean(1)
    assert torch.allclose(seen[:, 1], block.attention.out(value), atol=1e-5)
    assert torch.allclose(seen[:, 0], block.attention(x, context)[:, 0], atol=1e-5)


def test_virtual_tracks_cost_no_output():
    model = VirtualTransformer(10, dim=16, heads=2, depth=1, virtual=3)
    assert model(torch.randn(2, 5, 4, 10)).shape == (2, 5, 4, 16)
