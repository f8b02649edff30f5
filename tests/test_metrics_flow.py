"""Flow figures: equal to the references, and the same whatever the batch and what lies under the masks."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trackpl.errors import DataError
from trackpl.metrics.flow import FIGURES, REPORTED, FlowMetrics, epe, flow_scores, outliers

GOLDEN = Path(__file__).parent / "golden" / "data_metrics"
few = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**31)


def golden(name):
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {k: torch.from_numpy(file[k]) for k in file.files}


def example(seed, shape=(3, 2)):
    g = torch.Generator().manual_seed(seed)
    truth = 30 * torch.randn(*shape, 2, 5, 6, generator=g)
    visible = torch.rand(*shape, 5, 6, generator=g) > 0.4
    visible.flatten(0, -3)[0] = True  # an image without occluded pixels
    return {
        "pred": truth + 4 * torch.randn(*shape, 2, 5, 6, generator=g),
        "truth": truth,
        "visible": visible,
        "valid": torch.rand(*shape, 5, 6, generator=g) > 0.2,
    }


def result(*updates):
    metric = FlowMetrics()
    for update in updates:
        metric.update(**update)
    return metric.compute()


def assert_same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-9, equal_nan=True)


# Equal to the references ------------------------------------------------------------------------------------


def ptlflow_batches():
    arrays = golden("flow_ptlflow")
    return arrays, [
        {
            "pred": arrays[f"batch{b}__pred"],
            "truth": arrays[f"batch{b}__gt"],
            "visible": arrays[f"batch{b}__occ"][:, 0] == 0,
            "valid": arrays[f"batch{b}__valid"][:, 0] > 0,
        }
        for b in (0, 1)
    ]


def test_every_figure_of_ptlflow_is_its():
    arrays, batches = ptlflow_batches()
    per_image = [flow_scores(**batch) for batch in batches]
    regions = {"all": "", "visible": "_non_occ", "occluded": "_occ"}
    for kind, theirs in {
        "EPE": "epe", "Fl": "flall", "px1": "px1", "px3": "px3", "px5": "px5", "WAUC": "wauc"
    }.items():  # fmt: skip
        unit = 100 if kind in ("px1", "px3", "px5") else 1  # theirs: a fraction
        atol = 1e-6 if kind == "EPE" else 1e-4  # percentages of theirs are float32: 1e-6 of the whole
        for region, suffix in regions.items():
            ours = kind if region == "all" and kind != "Fl" else f"{kind}_{region}"
            mean = torch.cat([scores[ours] for scores in per_image]).mean()
            expected = unit * arrays[f"epoch_mean__{theirs}{suffix}"]
            torch.testing.assert_close(mean, expected.double(), rtol=0, atol=atol, msg=f"{ours} {mean} {expected}")


def test_reported_averages_over_images_are_ptlflows():
    arrays, batches = ptlflow_batches()
    out = result(*batches)
    for ours, theirs in {
        "EPE": "epe",
        "EPE_visible": "epe_non_occ",
        "EPE_occluded": "epe_occ",
        "Fl_all": "flall",
        "Fl_visible": "flall_non_occ",
        "Fl_occluded": "flall_occ",
    }.items():
        atol = 1e-6 if ours.startswith("EPE") else 1e-4
        assert abs(out[ours] - arrays[f"epoch_mean__{theirs}"]) < atol, ours
    assert out["images"] == 3


def test_kitti_figures_over_images_and_over_pixels_are_the_references():
    arrays = golden("flow_kitti")
    out = result(
        *(
            {
                "pred": arrays[f"img{i}__pred"].permute(2, 0, 1)[None],
                "truth": arrays[f"img{i}__gt"].permute(2, 0, 1)[None],
                "visible": arrays[f"img{i}__valid_noc"][None],
                "valid": arrays[f"img{i}__valid_occ"][None],
            }
            for i in range(3)  # three sizes
        )
    )
    for ours, theirs, unit in (
        ("EPE", "epe_occ", 1),
        ("EPE_visible", "epe_noc", 1),
        ("Fl_all", "er_occ", 100),
        ("Fl_visible", "er_noc", 100),
    ):
        assert abs(out[ours] / unit - arrays[f"per_image__{theirs}"]) < 1e-6, ours
        assert abs(out[f"{ours}_pooled"] / unit - arrays[f"pooled__{theirs}"]) < 1e-6, ours


# What the figures say ---------------------------------------------------------------------------------------


def test_an_outlier_is_off_by_more_than_3_pixels_and_by_more_than_5_percent():
    x = torch.tensor([0.0, 0.0, 60.0, 100.0, 100.0]).reshape(5, 1, 1)
    truth = torch.stack([x, torch.zeros_like(x)], 1)  # (5, 2, 1, 1)
    off = torch.tensor([3.0, 3.5, 3.0, 5.0, 5.5]).reshape(5, 1, 1)
    pred = truth.clone()
    pred[:, 1] += off
    assert torch.equal(epe(pred, truth), off.double())
    assert outliers(pred, truth).flatten().tolist() == [False, True, False, False, True]
    assert outliers(pred * torch.nan, truth).all()


def test_zero_motion_scores_what_EPE_zero_says():
    case = example(0)
    still = result(case | {"pred": torch.zeros_like(case["truth"])})
    moved = result(case)
    assert still["EPE_visible"] == moved["EPE_zero_visible"] > moved["EPE_visible"]
    assert still["EPE"] == moved["EPE_zero"]


@few
@given(seeds)
def test_a_perfect_prediction_has_no_error(seed):
    case = example(seed)
    out = result(case | {"pred": case["truth"]})
    for key in ("EPE", "EPE_visible", "EPE_occluded", "Fl_all", "EPE_pooled", "Fl_all_pooled"):
        assert out[key] == 0, key
    assert out["px1"] == out["px5"] == 100


@few
@given(seeds)
def test_batches_frame_pairs_and_single_images_give_the_same(seed):
    case = example(seed)
    whole = result(case)
    assert whole["images"] == 6
    assert_same(result({k: v.flatten(0, 1) for k, v in case.items()}), whole)
    assert_same(result(*({k: v[i : i + 1] for k, v in case.items()} for i in range(3))), whole)


@few
@given(seeds)
def test_pixels_that_are_not_valid_count_for_nothing(seed):
    case = example(seed)
    spoilt = {k: v.clone() for k, v in case.items()}
    spoilt["truth"].masked_fill_(~case["valid"].unsqueeze(-3), torch.nan)
    spoilt["pred"].masked_fill_(~case["valid"].unsqueeze(-3), torch.inf)
    assert_same(result(spoilt), result(case))
    nothing = {k: v[:1].clone() for k, v in case.items()}
    nothing["valid"][:] = False  # whole images without truth
    with_nothing, without = result(case, nothing), result(case)
    assert with_nothing.pop("images") == without.pop("images") + 2
    assert_same(with_nothing, without)


def test_a_region_without_pixels_is_nan_and_a_prediction_that_is_nan_is_not_hidden():
    case = example(1)
    del case["visible"]
    out = result(case)
    assert all(out[k].isnan() == k.endswith(("_visible", "_occluded")) for k in REPORTED)
    case["pred"][0, 0] = torch.nan
    out = result(case)
    assert out["EPE"].isnan()
    assert out["Fl_all"] > result(example(1))["Fl_all"]
    assert set(flow_scores(**{k: v[0] for k, v in case.items()})) == set(FIGURES)


def test_flow_that_does_not_fit_its_truth_is_refused():
    case = example(2)
    with pytest.raises(DataError, match=r"got \(3, 1, 2, 5, 6\) for a truth of \(3, 2, 2, 5, 6\)"):
        result(case | {"pred": case["pred"][:, :1]})
    with pytest.raises(DataError, match=r"`visible` of a flow must have shape \(3, 2, 5, 6\)"):
        result(case | {"visible": case["visible"][:, :1]})
