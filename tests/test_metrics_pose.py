"""PCK: equal to the reference, and what it says."""

from pathlib import Path

import numpy as np
import pytest
import torch

from trackpl.errors import DataError
from trackpl.metrics.pose import PCK, THRESHOLDS, joint_distances, pck_counts

GOLDEN = Path(__file__).parent / "golden" / "crw" / "pck.npz"
SHARED = Path(__file__).parents[2] / "shared" / "golden" / "data_metrics" / "jhmdb_pck.npz"


def test_pck_of_each_joint_and_boxes_are_the_goldens():
    with np.load(GOLDEN) as arrays:
        metric, total = PCK(), 0
        for i, (h, w) in enumerate(arrays["sizes"]):
            truth, cells = (torch.from_numpy(arrays[f"{k}_{i}"]).permute(2, 1, 0) for k in ("gt", "pred"))
            found = cells[..., 0] >= 0
            pred = cells / 40 * cells.new_tensor([w, h])
            distances = joint_distances(pred, truth, found)
            off = (pred - truth).norm(dim=-1)
            boxes = (off / distances).nanmean(-1)
            np.testing.assert_allclose(boxes, arrays[f"box_{i}"], rtol=0, atol=1e-6)
            metric.update(pred, truth, found)
            total = total + pck_counts(pred, truth, found)[0]
        out = metric.compute()
        per_joint = 100 * metric.hits / metric.found
        np.testing.assert_allclose(per_joint, arrays["pck"][:, :15], rtol=0, atol=1e-6)
        for k, a in enumerate(THRESHOLDS):
            assert out[f"PCK@{a:g}"] == pytest.approx(arrays["pck"][k, 15], abs=1e-6)
        pooled = 100 * metric.hits.sum(1) / metric.found.sum()
        np.testing.assert_allclose(pooled, arrays["pck_micro"], rtol=0, atol=1e-6)
        assert torch.equal(total, metric.hits) and out["videos"] == 3


@pytest.mark.skipif(not SHARED.exists(), reason="the larger goldens are not here")
def test_clips_in_raster_coordinates_score_as_the_golden_says():
    with np.load(SHARED) as arrays:
        metric = PCK()
        for i in range(3):
            truth, pred, cells = (
                torch.from_numpy(arrays[f"video{i}__{k}"]).permute(2, 1, 0)
                for k in ("gt_pos_img", "pred_pixels", "pred_cells")
            )
            metric.update(pred + 0.5, truth - 0.5, cells[..., 0] >= 0)  # both half a pixel on: the same distances
        out = metric.compute()
        for a in THRESHOLDS:
            assert out[f"PCK@{a:g}"] == pytest.approx(arrays[f"videowalk__{a:.2f}"][15], abs=1e-3)


def person():
    """Two frames of a person whose box has a diagonal of 50 pixels: 30 pixels are one."""
    truth = torch.tensor([[0.0, 0], [30, 0], [30, 40], [10, 10]]).expand(2, 4, 2).clone()
    return truth, torch.ones(2, 4, dtype=torch.bool)


def scored(pred, truth, found, **options):
    metric = PCK(joints=4)
    metric.update(pred, truth, found, **options)
    return metric.compute()


def test_a_joint_is_found_within_a_share_of_the_box():
    truth, found = person()
    pred = truth.clone()
    pred[1] += torch.tensor([[1.5, 0], [0, 3.0], [0, 3.1], [6, 0]])
    out = scored(pred, truth, found)
    assert (out["PCK@0.05"], out["PCK@0.1"], out["PCK@0.2"]) == (25, 50, 100) and out["abstained"] == 0


def test_the_first_frame_is_not_scored():
    truth, found = person()
    pred = truth.clone()
    pred[0] += 99
    assert scored(pred, truth, found)["PCK@0.05"] == 100


def test_a_joint_that_was_given_no_place_is_in_no_figure_but_counted():
    truth, found = person()
    pred = truth.clone()
    pred[1, 3] = float("nan")
    out = scored(pred, truth, found)
    assert out["PCK@0.05"] == 100 and out["abstained"] == 25
    found[1, 2] = False  # now the box reaches from (0, 0) to (30, 0): 18 pixels are one
    pred[1, 0] += torch.tensor([2.0, 0])
    out = scored(pred, truth, found)
    assert out["abstained"] == 50 and out["PCK@0.1"] == 50 and out["PCK@0.2"] == 100


def test_what_is_not_known_counts_for_nothing():
    truth, found = person()
    known = found.clone()
    known[1, 3] = False
    spoilt = truth.clone()
    spoilt[1, 3] = 1e6
    out = scored(truth, spoilt, found, valid=known)
    assert out["PCK@0.05"] == 100 and out["abstained"] == 0


def test_a_single_joint_has_no_box_and_is_a_miss():
    truth, found = person()
    found[1, 1:] = False
    assert scored(truth, truth, found)["PCK@0.2"] == 0


def test_joints_that_do_not_fit_are_refused():
    truth, found = person()
    with pytest.raises(DataError, match=r"got \(2, 3, 2\), \(2, 4, 2\) and \(2, 4\)"):
        pck_counts(truth[:, :3], truth, found)
