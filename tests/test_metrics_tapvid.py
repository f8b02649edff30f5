"""TAP-Vid figures: equal to the reference, the same whatever the order, batch, frame size or processes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trackpl.errors import DataError
from trackpl.metrics.flow import FlowMetrics
from trackpl.metrics.tapvid import (
    FIGURES,
    THRESHOLDS,
    TapVid,
    first_queries,
    rescale,
    sample_queries,
    strided_queries,
    tapvid_scores,
)
from trackpl.types import Clip, Tracks

GOLDEN = Path(__file__).parent / "golden" / "data_metrics"
EDGES = (
    *("exact_threshold", "just_below_threshold", "visible_only_at_query", "visible_only_at_query_strided"),
    *("query_at_last_frame_first_mode", "all_predicted_occluded", "nan_and_inf_prediction"),
    "half_of_tracks_unevaluable",
)
REFERENCE_NAMES = {
    "OA": "occlusion_accuracy",
    "AJ": "average_jaccard",
    "delta_avg": "average_pts_within_thresh",
} | {f"delta_{x}": f"pts_within_{x}" for x in THRESHOLDS}


def golden(name, prefix=""):
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {k.removeprefix(prefix): file[k] for k in file.files if k.startswith(prefix)}


def inputs(arrays):
    """Turn the reference's (t, y, x) queries, occlusion and (B, N, T) order into ours."""

    def by_frame(key):
        return torch.from_numpy(arrays[key]).transpose(1, 2)

    return (
        torch.from_numpy(arrays["query_points"])[..., [0, 2, 1]],
        by_frame("gt_tracks"),
        ~by_frame("gt_occluded"),
        by_frame("pred_tracks"),
        ~by_frame("pred_occluded"),
    )


def assert_equal(scores, arrays, prefix, figures=FIGURES, scale=1.0):
    for figure in figures:
        expected = scale * arrays[prefix + REFERENCE_NAMES.get(figure, figure)]
        np.testing.assert_allclose(scores[figure].numpy(), expected, rtol=0, atol=1e-9 * scale, err_msg=figure)


def example(seed, b=2, t=8, n=6, size=(256, 256)):
    """Make random truth and a prediction some pixels off, as `TapVid.update` takes them."""
    g = torch.Generator().manual_seed(seed)
    h, w = size
    tracks = torch.rand(b, t, n, 2, generator=g, dtype=torch.float64) * torch.tensor([w, h])
    error = torch.randn(b, t, n, 2, generator=g, dtype=torch.float64) * torch.tensor([w, h]) / 60
    visible = torch.rand(b, t, n, generator=g) > 0.3
    visible[:, 2] = True  # every figure is defined, and every track is queried at the latest in frame 2
    return {
        "queries": first_queries(tracks, visible),
        "gt_tracks": tracks,
        "gt_visible": visible,
        "pred_tracks": tracks + error,
        "pred_visible": torch.rand(b, t, n, generator=g),
        "size": size,
    }


def result(*updates, **kwargs):
    metric = TapVid(**kwargs)
    for update in updates:
        metric.update(**update)
    return metric.compute()


def part(update, videos):
    return {k: v if k == "size" else v[videos] for k, v in update.items()}


def assert_same(a, b, keys=FIGURES):
    for key in keys:
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=1e-9, equal_nan=True, msg=key)


# Equal to the reference -------------------------------------------------------------------------------------


@pytest.mark.parametrize("queried", ["first", "strided"])
def test_scores_of_videos_and_of_tracks_are_the_references(queried):
    arrays = golden(f"tapvid_{queried}")
    assert_equal(tapvid_scores(*inputs(arrays), queried=queried), arrays, "video__")
    assert_equal(tapvid_scores(*inputs(arrays), queried=queried, per_track=True), arrays, "track__")


def test_batches_and_half_query_frames_are_the_references():
    arrays = golden("tapvid_batch")
    assert set(arrays["query_points"][..., 0].ravel() % 1) == {0, 0.5}
    for queried in ("first", "strided"):
        assert_equal(tapvid_scores(*inputs(arrays), queried=queried), arrays, f"{queried}__")
    assert_equal(tapvid_scores(*inputs(arrays), per_track=True), arrays, "track_first__")


@pytest.mark.parametrize("case", EDGES)
def test_edge_cases_are_the_references(case):
    arrays = golden("tapvid_edges", case + "__")
    queried = str(arrays["mode"])
    assert_equal(tapvid_scores(*inputs(arrays), queried=queried), arrays, "video_")
    per_track = tapvid_scores(*inputs(arrays), queried=queried, per_track=True)
    assert_equal(per_track, arrays, "track_", figures=("AJ", "delta_avg", "OA"))


def test_data_set_figure_is_the_references_times_100():
    arrays = golden("tapvid_batch")
    queries, tracks, visible, pred, pred_visible = inputs(arrays)
    metric = TapVid()
    for i in (slice(0, 2), slice(2, 3)):
        metric.update(queries[i], tracks[i], visible[i], pred[i], pred_visible[i].float())
    assert_equal(metric.compute(), arrays, "dataset_first__", scale=100)
    assert metric.compute()["videos"] == 3


def test_query_samplers_are_the_references():
    arrays = golden("tapvid_query_sampling")
    tracks = torch.from_numpy(arrays["points"] * 256).transpose(0, 1)
    visible = ~torch.from_numpy(arrays["occluded"]).T
    for queried, key in (("first", "first__"), ("strided", "strided__")):
        queries, index = sample_queries(tracks, visible, queried, stride=int(arrays["stride"]))
        np.testing.assert_allclose(queries[:, [0, 2, 1]], arrays[key + "query_points"][0], atol=1e-4)
        np.testing.assert_allclose(tracks[:, index].transpose(0, 1), arrays[key + "target_points"][0], atol=1e-4)
        np.testing.assert_array_equal(~visible[:, index].T, arrays[key + "occluded"][0])
    np.testing.assert_array_equal(index, arrays["strided__trackgroup"][0])


def test_positions_are_rescaled_as_the_reference_does():
    arrays = golden("grid_rescale")
    found = rescale(torch.from_numpy(arrays["xy"]), (480, 854))
    np.testing.assert_allclose(found, arrays["xy_256"], atol=1e-4)


# Queries ----------------------------------------------------------------------------------------------------


def test_batched_queries_agree_with_the_sampler_of_one_video():
    case = example(0, b=3, t=12)
    tracks, visible = case["gt_tracks"], case["gt_visible"]
    visible[1, :, 4] = False
    for queried, batched in (
        ("first", first_queries(tracks, visible)),
        ("strided", strided_queries(tracks, visible, stride=5)),
    ):
        assert batched.shape == (3, 6 if queried == "first" else 18, 3)
        for i in range(3):
            rows, index = sample_queries(tracks[i], visible[i], queried)
            n = torch.arange(batched.shape[1]) % 6
            keep = visible[i][batched[i, :, 0].long(), n]
            torch.testing.assert_close(batched[i][keep], rows)
            torch.testing.assert_close(n[keep], index)


def test_first_query_is_visible_and_valid_and_lies_in_the_frame_where_there_is_none():
    tracks = torch.full((1, 3, 2, 2), torch.nan)
    tracks[0, :, 0] = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    visible = torch.tensor([[[True, False], [True, False], [True, False]]])
    valid = torch.tensor([[[False, True], [False, True], [True, True]]])
    assert first_queries(tracks, visible).tolist() == [[[0, 1, 2], [0, 0.5, 0.5]]]
    assert first_queries(tracks, visible, valid).tolist() == [[[2, 5, 6], [0, 0.5, 0.5]]]


# Properties -------------------------------------------------------------------------------------------------

seeds = st.integers(0, 2**31)
few = settings(max_examples=25, deadline=None)


@few
@given(seeds, st.sampled_from(["first", "strided"]))
def test_a_perfect_prediction_scores_100_and_its_opposite_0(seed, queried):
    case = example(seed)
    case |= {"pred_tracks": case["gt_tracks"], "pred_visible": case["gt_visible"].float()}
    assert all(abs(result(case, queried=queried)[k] - 100) < 1e-9 for k in FIGURES)
    case |= {"pred_tracks": case["gt_tracks"] + 20, "pred_visible": 1 - case["pred_visible"]}
    assert all(result(case, queried=queried)[k] == 0 for k in FIGURES)


@few
@given(seeds, st.permutations(range(6)), st.sampled_from(["first", "strided"]))
def test_the_order_of_points_changes_nothing(seed, order, queried):
    case = example(seed)
    mixed = {k: v if k == "size" else v[:, order] if k == "queries" else v[:, :, order] for k, v in case.items()}
    assert_same(result(mixed, queried=queried), result(case, queried=queried))


@few
@given(seeds, st.tuples(st.integers(8, 900), st.integers(8, 900)))
def test_the_size_of_the_frame_changes_nothing(seed, size):
    case = example(seed)
    scale = torch.tensor([size[1] / 256, size[0] / 256], dtype=torch.float64)
    scaled = case | {"size": size} | {k: case[k] * scale for k in ("gt_tracks", "pred_tracks")}
    assert_same(result(scaled), result(case))


@few
@given(seeds, st.lists(st.integers(1, 3), min_size=1, max_size=4))
def test_how_videos_are_batched_changes_nothing(seed, batches):
    videos = sum(batches)
    case = example(seed, b=videos)
    ends = np.cumsum(batches)
    parts = [part(case, slice(e - b, e)) for e, b in zip(ends, batches, strict=True)]
    whole = result(case)
    assert whole["videos"] == videos
    assert_same(result(*parts), whole)


@few
@given(seeds, st.sampled_from(["first", "strided"]))
def test_invalid_entries_and_tracks_never_visible_change_nothing(seed, queried):
    case, rubbish = example(seed), example(seed + 1, n=4)
    rubbish["gt_visible"][:, :, :2] = False  # two tracks never visible, but valid
    valid = torch.ones(2, 8, 10, dtype=torch.bool)
    valid[:, :, 8:] = False  # two tracks visible, never valid
    more = {k: torch.cat([case[k], rubbish[k]], 1 if k == "queries" else 2) for k in case if k != "size"}
    assert_same(result(more | {"valid": valid}, queried=queried), result(case, queried=queried))

    valid = torch.ones(2, 8, 6, dtype=torch.bool)
    valid[:, 6:] = False  # the last two frames of every track
    for key in ("gt_tracks", "pred_tracks"):
        case[key][:, 6:] = torch.nan
    shorter = {k: v if k in ("size", "queries") else v[:, :6] for k, v in case.items()}
    assert_same(result(case | {"valid": valid}, queried=queried), result(shorter, queried=queried))


# The metric -------------------------------------------------------------------------------------------------


def clip_of(case, name=(), valid=None):
    b, t = case["gt_visible"].shape[:2]
    video = torch.zeros(b, t, 3, *case["size"], dtype=torch.uint8)
    return Clip(video, tracks=case["gt_tracks"], visible=case["gt_visible"], valid=valid, name=name)


def test_update_clip_gives_a_row_for_each_video_whose_mean_is_the_result():
    case = example(3, b=3, size=(40, 60))
    metric = TapVid()
    clip = clip_of(case, name=("a", "b", "c"))
    rows = metric.update_clip(clip, case["queries"], Tracks(case["pred_tracks"], case["pred_visible"]))
    assert [r["name"] for r in rows] == ["a", "b", "c"]
    out = metric.compute()
    for figure in FIGURES:
        assert abs(np.mean([r[figure] for r in rows]) - out[figure]) < 1e-9
    assert_same(out, result(case))
    unnamed = metric.update_clip(clip_of(case), case["queries"], Tracks(case["pred_tracks"], case["pred_visible"]))
    assert [r["name"] for r in unnamed] == ["video 3", "video 4", "video 5"]


def test_strided_update_clip_scores_the_rows_of_the_reference_sampler():
    case = example(4, b=1, t=12, size=(64, 48))
    tracks, visible = case["gt_tracks"], case["gt_visible"]
    visible[0, 5, :3] = False
    queries = strided_queries(tracks, visible)
    g = torch.Generator().manual_seed(1)
    xy = tracks.repeat(1, 1, 3, 1) + torch.randn(1, 12, 18, 2, generator=g)
    shown = torch.rand(1, 12, 18, generator=g)
    metric = TapVid("strided")
    metric.update_clip(clip_of(case), queries, Tracks(xy, shown))

    rows, index = sample_queries(tracks[0], visible[0], "strided")
    keep = visible[0][queries[0, :, 0].long(), torch.arange(18) % 6]
    assert keep.sum() == len(rows) < 18
    expected = tapvid_scores(
        rows[None],
        rescale(tracks[:, :, index], (64, 48)),
        visible[:, :, index],
        rescale(xy[:, :, keep], (64, 48)),
        shown[:, :, keep] > 0.5,
        queried="strided",
    )
    assert_same(metric.compute(), {k: 100 * v[0] for k, v in expected.items()})


def test_the_threshold_decides_what_is_visible():
    case = example(5) | {"pred_visible": torch.full((2, 8, 6), 0.7)}
    low, high = result(case, threshold=0.6), result(case, threshold=0.7)
    assert high["AJ"] == 0 < low["AJ"]
    assert high["delta_avg"] == low["delta_avg"]


def test_undefined_figures_are_left_out_and_counted():
    case = example(6, b=2)
    alone = result(part(case, slice(0, 1)))
    case["gt_visible"][1] = False  # nothing to score in the second video
    out = result(case)
    assert_same(out, alone)
    assert (out["videos"], out["nan_entries"]) == (2, len(FIGURES))
    assert alone["nan_entries"] == 0


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_without_a_video_or_without_points_figures_are_nan():
    empty = TapVid().compute()
    assert all(empty[k].isnan() for k in FIGURES)
    assert empty["videos"] == 0
    clip = Clip(
        torch.zeros(1, 2, 3, 4, 4),
        tracks=torch.zeros(1, 2, 0, 2),
        visible=torch.zeros(1, 2, 0, dtype=torch.bool),
    )
    metric = TapVid()
    queries = first_queries(clip.tracks, clip.visible)
    (row,) = metric.update_clip(clip, queries, Tracks(clip.tracks, torch.zeros(1, 2, 0)))
    assert np.isnan(row["AJ"])
    assert metric.compute()["videos"] == 1


def test_a_reset_metric_begins_anew_in_and_out_of_inference_mode():
    case = example(7)
    metric = TapVid()
    with torch.inference_mode():
        metric.update(**example(8))
        metric.compute()
        metric.reset()
    metric.update(**case)
    assert_same(metric.compute(), result(case))


def test_half_precision_predictions_are_scored():
    case = example(9)
    half = case | {k: case[k].bfloat16() for k in ("pred_tracks", "pred_visible")}
    exact = case | {k: half[k].double() for k in ("pred_tracks", "pred_visible")}
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(result(half), result(exact))


def test_what_does_not_belong_together_is_refused():
    case = example(10)
    with pytest.raises(DataError, match=r"predicted tracks must have shape \(2, 8, 6, 2\), got \(2, 8, 1, 2\)"):
        result(case | {"pred_tracks": case["pred_tracks"][:, :, :1]})
    with pytest.raises(DataError, match="no TAP-Vid protocol 'strides'; did you mean 'strided'"):
        TapVid("strides")
    clip = clip_of(case)
    tracks = Tracks(case["pred_tracks"], case["pred_visible"])
    with pytest.raises(DataError, match="6 tracks needs 6 queries, got 5"):
        TapVid().update_clip(clip, case["queries"][:, :5], tracks)
    with pytest.raises(DataError, match="both `tracks` and `visible`"):
        TapVid().update_clip(Clip(clip.video), case["queries"], tracks)


# Two processes ----------------------------------------------------------------------------------------------

SHARES = {"uneven": ([0, 1, 2], [3]), "none on one": ([0, 1, 2, 3], [])}


def flow_example():
    g = torch.Generator().manual_seed(1)
    truth = 8 * torch.randn(4, 2, 6, 7, generator=g)
    visible = torch.rand(4, 6, 7, generator=g) > 0.4
    visible[0] = True  # one image without occluded pixels
    return truth + torch.randn(4, 2, 6, 7, generator=g), truth, visible


def run_rank(rank, folder):
    """Score this process's share of the videos and image pairs, and save the result that it finds."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    found = {}
    for name, shares in SHARES.items():
        points, flow = TapVid(), FlowMetrics()
        for i in shares[rank]:
            points.update(**part(example(11, b=4), slice(i, i + 1)))
            flow.update(*(x[i : i + 1] for x in flow_example()))
        found[name] = points.compute() | flow.compute()
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_two_processes_with_unequal_shares_find_what_one_finds(tmp_path):
    flow = FlowMetrics()
    flow.update(*flow_example())
    expected = result(example(11, b=4)) | flow.compute()
    torch.multiprocessing.spawn(run_rank, (str(tmp_path),), nprocs=2)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        for name in SHARES:
            assert_same(found[name], expected, expected)
    assert (expected["videos"], expected["images"]) == (4, 4)
