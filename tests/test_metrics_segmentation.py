"""J and F: equal to the references, and what they say."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trackpl.errors import DataError
from trackpl.metrics.segmentation import (
    FIGURES,
    VOID,
    RegionsAndBoundaries,
    boundary,
    boundary_accuracy,
    jf_frames,
    jf_scores,
    region_similarity,
    statistics,
)

GOLDEN = Path(__file__).parent / "golden"


def golden(name):
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return {k: arrays[k] for k in arrays.files}


def close(a, b, atol=1e-9):
    np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=0, atol=atol)


# Equal to the references ------------------------------------------------------------------------------------


def test_masks_score_as_the_golden_says():
    arrays = golden("crw/jf")
    objects, frames, h, w = arrays["shape"]
    truth, pred = (
        torch.from_numpy(np.unpackbits(arrays[k], axis=-1)[..., :w].astype(bool)).view(objects, frames, h, w)
        if arrays[k].ndim == 3
        else torch.from_numpy(np.unpackbits(arrays[k], axis=-1, count=w).astype(bool))
        for k in ("gt", "pred")
    )
    region, edge = region_similarity(pred, truth), boundary_accuracy(pred, truth)
    close(region, arrays["J"])
    close(edge, arrays["F"])
    close(boundary(truth[0, 0]), np.unpackbits(arrays["boundary_gt00"], axis=-1, count=w))
    stats = [torch.stack([statistics(row) for row in part]) for part in (region, edge)]
    close(stats[0], arrays["J_stats"])
    close(stats[1], arrays["F_stats"])
    means = torch.cat([s.mean(0) for s in stats])
    close(torch.cat([(means[:1] + means[3:4]) / 2, means]), arrays["JF"])


def test_a_sequence_scores_as_the_golden_says():
    arrays = golden("data_metrics/davis_jf")
    pred, truth = (torch.from_numpy(arrays[k]) for k in ("pred", "gt"))
    region, edge = jf_frames(pred, truth)
    close(region, arrays["out__J_per_frame"])
    close(edge, arrays["out__F_per_frame"])
    metric = RegionsAndBoundaries()
    metric.update(pred, truth)
    out = metric.compute()
    names = ("JandF_mean", "J_mean", "J_recall", "J_decay", "F_mean", "F_recall", "F_decay")
    for ours, theirs in zip(FIGURES, names, strict=True):
        close(out[ours], 100 * arrays[f"out__{theirs}"], 1e-7)
    assert out["objects"] == len(arrays["out__J_stats"])


CASES = (
    *("both_empty", "gt_empty", "pred_empty", "identical", "shift3", "full_vs_full"),
    *("single_pixel", "void_left", "corner_pixel", "touching_border", "size480x854"),
)


@pytest.mark.parametrize("case", CASES)
def test_edge_cases_score_as_the_golden_says(case):
    arrays = {k.removeprefix(f"{case}__"): v for k, v in golden("data_metrics/davis_jf_edges").items() if case in k}
    packed = case == "size480x854"
    masks = {}
    for key in ("gt", "pred", "void"):
        if key in arrays:
            bits = np.unpackbits(arrays[key], axis=1, count=854) if packed else arrays[key]
            masks[key] = torch.from_numpy(bits.astype(bool))
    truth, pred = masks["gt"], masks["pred"]
    if "boundary_gt" in arrays:
        close(boundary(truth), arrays["boundary_gt"])
    if "void" in masks:
        truth, pred = truth & ~masks["void"], pred & ~masks["void"]
    close(region_similarity(pred, truth), arrays["J"])
    close(boundary_accuracy(pred, truth), arrays["F"])


def test_quarters_are_right_however_long_the_sequence():
    arrays = golden("data_metrics/davis_statistics")
    close(statistics(torch.from_numpy(arrays["values90"])), arrays["out90"])
    close(statistics(torch.from_numpy(arrays["values300"]))[2], arrays["out300_decay_correct"])


# What the figures say ---------------------------------------------------------------------------------------


def scene(seed, frames=5, size=(24, 32)):
    """Label maps of two boxes."""
    random = np.random.default_rng(seed)
    labels = np.zeros((frames, *size), np.uint8)
    for i in (1, 2):
        y, x = random.integers(0, 12, 2)
        labels[:, y : y + 8, x : x + 10] = i
    labels[0, 0, 0], labels[0, 0, 1] = 1, 2  # both are there, even where one hides the other
    return torch.from_numpy(labels)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31))
def test_a_perfect_prediction_has_no_error_and_none_at_all_only_misses(seed):
    truth = scene(seed)
    perfect, nothing = jf_scores(truth, truth), jf_scores(torch.zeros_like(truth), truth)
    assert (perfect["J&F"] == 1).all() and (perfect["J_recall"] == 1).all() and (perfect["F_decay"] == 0).all()
    empty = torch.tensor([not (truth[1] == i).any() for i in (1, 2)])
    assert torch.equal(nothing["J"] > 0, empty) and torch.equal(nothing["F"] > 0, empty)


def test_first_and_last_frames_and_void_pixels_count_for_nothing():
    truth, pred = scene(1), scene(2)
    before = jf_scores(pred, truth)
    pred[0], pred[-1] = 0, 1
    torch.testing.assert_close(jf_scores(pred, truth), before, rtol=0, atol=0)
    truth = scene(1)
    truth[2, :4] = VOID
    spoilt = truth.clone()
    spoilt[2, :4] = 1
    kept = truth.clone()
    kept[2, :4] = 0
    torch.testing.assert_close(jf_scores(spoilt, truth), jf_scores(kept, truth), rtol=0, atol=0)


def test_decay_is_what_is_lost_from_the_first_quarter_to_the_last():
    mean, recall, decay = statistics(torch.tensor([1.0, 0.9, 0.8, 0.7, 0.4, 0.3, 0.2, 0.1], dtype=torch.float64))
    assert mean == pytest.approx(0.55) and recall == 0.5 and decay == pytest.approx((0.9 - 0.2), abs=0.01)


def test_objects_count_and_not_sequences():
    one, two = scene(3), scene(4)
    one[one == 2] = 0
    metric = RegionsAndBoundaries()
    metric.update(torch.zeros_like(one), one)
    metric.update(two, two)
    out = metric.compute()
    assert out["objects"] == 3 and out["J"] == pytest.approx(200 / 3)
    together = RegionsAndBoundaries()
    together.update(torch.stack([torch.zeros_like(one), two]), torch.stack([one, two]))
    torch.testing.assert_close(together.compute(), out)


def test_two_frames_leave_nothing_to_score():
    scores = jf_scores(scene(5, 2), scene(5, 2))
    assert all(v.isnan().all() and v.shape == (2,) for v in scores.values())


def test_maps_that_do_not_fit_are_refused():
    with pytest.raises(DataError, match=r"got \(5, 24, 32\) and \(4, 24, 32\)"):
        jf_frames(scene(0), scene(0, 4))
