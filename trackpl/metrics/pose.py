"""Pose propagation on JHMDB: the share of joints that are found (PCK).

PCK@a      % of the joints whose distance to the truth is at most a times 0.6 of the diagonal of the person's box
abstained  % of the joints for which no place was given: they are in no PCK, so it belongs beside it

As in Jabri et al., "Space-Time Correspondence as a Contrastive Random Walk", 2020, and Bian et al., 2022; equal to
eval_pck.py of ajabri/videowalk. The box of a frame holds the true joints of those for which a place was given. Frame
0, whose joints are given, is not scored. Distances of a joint are pooled over all clips; PCK is the plain mean over
joints.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from trackpl.errors import DataError

THRESHOLDS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5)
SHARE = 0.6  # of the diagonal of the box


def joint_distances(pred: Tensor, truth: Tensor, found: Tensor) -> Tensor:
    """Return how far joints are off, in sizes of the person: (..., T, J) float64.

    Args:
        pred: (..., T, J, 2) pixels.
        truth: (..., T, J, 2) pixels; may be anything where not found.
        found: (..., T, J) bool: a place was predicted, and the true one is known.

    Returns:
        Distance / (0.6 of the diagonal of the box around the true joints of the frame that were found); NaN where not
        found, infinite where the box is a point.
    """
    truth, pred = truth.double(), pred.double()
    inf = torch.inf
    low = torch.where(found[..., None], truth, inf).amin(-2)
    high = torch.where(found[..., None], truth, -inf).amax(-2)
    box = SHARE * (high - low).square().sum(-1).sqrt()  # (..., T); not used where nothing was found
    off = (pred - truth).square().sum(-1).sqrt()
    size = box[..., None]
    return torch.where(found, torch.where(size > 0, off / size, inf), torch.nan)


def pck_counts(
    pred: Tensor, truth: Tensor, found: Tensor, valid: Tensor | None = None, thresholds: Sequence[float] = THRESHOLDS
) -> tuple[Tensor, Tensor, Tensor]:
    """Count the joints of one clip in the frames after the first.

    Args:
        pred: (T, J, 2) pixels.
        truth: (T, J, 2) pixels.
        found: (T, J) bool: a place was predicted.
        valid: (T, J) bool: the true place is known.
        thresholds: a of PCK@a.

    Returns:
        Joints within each threshold (thresholds, J), joints found (J,), joints known (J,), all float64.

    Raises:
        DataError: shapes that do not belong together.
    """
    t, j = found.shape
    valid = torch.ones_like(found) if valid is None else valid
    if pred.shape != (t, j, 2) or truth.shape != (t, j, 2) or valid.shape != (t, j):
        raise DataError(
            f"joints must have shape (T, J, 2), predicted as true, with (T, J) that say which were found; "
            f"got {tuple(pred.shape)}, {tuple(truth.shape)} and {tuple(found.shape)}"
        )
    judged = found & valid & pred.isfinite().all(-1)
    distances = joint_distances(pred, truth, judged)[1:]
    hits = torch.stack([(distances <= a).sum(0, dtype=torch.float64) for a in thresholds])  # NaN is not within
    return hits, judged[1:].sum(0, dtype=torch.float64), valid[1:].sum(0, dtype=torch.float64)


class PCK(Metric):
    """PCK over the clips of all processes.

    Args:
        joints: J.
        thresholds: a of PCK@a.
        kwargs: of `torchmetrics.Metric`.
    """

    full_state_update = False
    higher_is_better = True
    is_differentiable = False
    hits: Tensor
    found: Tensor
    known: Tensor
    videos: Tensor

    def __init__(self, joints: int = 15, thresholds: Sequence[float] = THRESHOLDS, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.thresholds = tuple(thresholds)
        for name, shape in (("hits", (len(self.thresholds), joints)), ("found", (joints,)), ("known", (joints,))):
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("videos", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, pred: Tensor, truth: Tensor, found: Tensor, valid: Tensor | None = None) -> None:
        """Add the joints of one clip. See `pck_counts`."""
        device, valid = self.device, torch.ones_like(found) if valid is None else valid
        places = pred.to(device), truth.to(device)
        hits, judged, known = pck_counts(*places, found.to(device), valid.to(device), self.thresholds)
        self.hits, self.found, self.known = self.hits + hits, self.found + judged, self.known + known
        self.videos = self.videos + 1

    def compute(self) -> dict[str, Tensor]:
        """Return PCK@a of each threshold and `abstained`, times 100, and the number of `videos`."""
        per_joint = 100 * self.hits / self.found  # a joint that was never found has none and is in no mean
        figures = {f"PCK@{a:g}": per_joint[i].nanmean() for i, a in enumerate(self.thresholds)}
        abstained = 100 * (1 - self.found.sum() / self.known.sum())
        return figures | {"abstained": abstained, "videos": self.videos.double()}
