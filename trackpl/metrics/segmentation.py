"""Video object segmentation as DAVIS-2017 scores it: how well regions (J) and their boundaries (F) are followed.

J          intersection over union of an object's masks, 1 where both are empty
F          2PR / (P + R) of boundary pixels; P, R: share of the predicted, true ones within r pixels of one of the other
recall     share of an object's frames with a figure above 0.5
decay      mean of its first quarter of frames minus that of its last: what is lost on the way
J&F        mean of J and F

Pont-Tuset et al., "The 2017 DAVIS Challenge on Video Object Segmentation", 2017; equal to
davisvideochallenge/davis2017-evaluation, save that its quarters go wrong beyond 256 frames. Figures are of each object
over its frames, without the first and the last of a sequence, then means over objects, not sequences. Void pixels are
in no mask.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from trackpl.errors import DataError

FIGURES = ("J&F", "J", "J_recall", "J_decay", "F", "F_recall", "F_decay")
VOID = 255
TOLERANCE = 0.008
"""Share of the frame's diagonal within which a boundary counts as found."""


def region_similarity(pred: Tensor, truth: Tensor) -> Tensor:
    """Return J of masks (..., H, W) bool: (...) float64."""
    union = (pred | truth).sum((-2, -1), dtype=torch.float64)
    both = (pred & truth).sum((-2, -1), dtype=torch.float64)
    return torch.where(union > 0, both / union.clamp(min=1), 1.0)


def boundary(mask: Tensor) -> Tensor:
    """Return the pixels of masks (..., H, W) bool that differ from the one right, below or both; the same shape."""
    right = torch.cat([mask[..., 1:], mask[..., -1:]], -1)  # the last column and row have no neighbour to differ from
    below = torch.cat([mask[..., 1:, :], mask[..., -1:, :]], -2)
    across = torch.cat([right[..., 1:, :], right[..., -1:, :]], -2)
    return (mask ^ right) | (mask ^ below) | (mask ^ across)


def boundary_accuracy(pred: Tensor, truth: Tensor, tolerance: float = TOLERANCE) -> Tensor:
    """Return F of masks (..., H, W) bool: (...) float64, 0 where only one has a boundary, 1 where neither has."""
    found, wanted = boundary(pred), boundary(truth)
    radius = math.ceil(tolerance * math.hypot(*truth.shape[-2:]))
    near = _dilate(torch.stack([wanted, found]), radius)
    counts = torch.stack([found, wanted]).sum((-2, -1), dtype=torch.float64)
    hits = (torch.stack([found, wanted]) & near).sum((-2, -1), dtype=torch.float64)
    share = torch.where(counts > 0, hits / counts.clamp(min=1), 1.0)  # P and R; where only one is empty, the other is 0
    total = share.sum(0)
    return torch.where(total > 0, 2 * share.prod(0) / total.clamp(min=1e-300), 0.0)


def _dilate(mask: Tensor, radius: int) -> Tensor:
    """Set every pixel of masks (..., H, W) bool that lies within `radius` of a set one."""
    h, w = mask.shape[-2:]
    x = torch.arange(w, device=mask.device, dtype=torch.int16)
    far = torch.iinfo(torch.int16).max // 2  # frames are narrower
    left = x - torch.where(mask, x, -far).cummax(-1)[0]  # to the nearest set pixel of the row
    right = torch.where(mask, x, far).flip(-1).cummin(-1)[0].flip(-1) - x
    near = torch.minimum(left, right)
    out = near <= radius
    for dy in range(1, min(radius, h - 1) + 1):  # the disk, row by row of its own
        reach = near <= math.isqrt(radius**2 - dy**2)
        out[..., dy:, :] |= reach[..., :-dy, :]
        out[..., :-dy, :] |= reach[..., dy:, :]
    return out


def statistics(values: Tensor) -> Tensor:
    """Return mean, recall and decay (3,) of one figure over the frames (T,) of an object; NaN are in no mean."""
    n = len(values)
    if not n:
        return values.new_full((3,), torch.nan)
    edges = (torch.linspace(1, n, 5, dtype=torch.float64) + 1e-10).round().long() - 1
    first, last = values[edges[0] : edges[1] + 1], values[edges[3] : edges[4] + 1]
    recall = (values > 0.5).to(values.dtype).mean()
    return torch.stack([values.nanmean(), recall, first.nanmean() - last.nanmean()])


def object_ids(labels: Tensor) -> list[int]:
    """Return the ids of the objects in a label map (H, W), without background and void."""
    return [i for i in labels.unique().tolist() if i not in (0, VOID)]


def jf_frames(pred: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Score every object of the first frame in every frame but the first and the last.

    Args:
        pred: (T, H, W) integer label maps.
        truth: (T, H, W) integer label maps, 0 background, 255 void.

    Returns:
        J and F, (objects, T - 2) float64 each.

    Raises:
        DataError: maps that do not belong together.
    """
    if pred.ndim != 3 or pred.shape != truth.shape:
        raise DataError(
            f"label maps must have shape (T, H, W), predicted as true; got {tuple(pred.shape)} and {tuple(truth.shape)}"
        )
    ids = torch.tensor(object_ids(truth[0]), dtype=torch.long, device=truth.device)[:, None, None]
    region, edge = [], []
    for one, other in zip(pred[1:-1].long(), truth[1:-1].long(), strict=True):  # frame by frame: bounded memory
        known = other != VOID
        found, wanted = (one == ids) & known, other == ids
        region.append(region_similarity(found, wanted))
        edge.append(boundary_accuracy(found, wanted))
    if not region:
        return (nothing := truth.new_zeros((len(ids), 0), dtype=torch.float64)), nothing
    return torch.stack(region, 1), torch.stack(edge, 1)


def jf_scores(pred: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """Return the `FIGURES` of each object of a sequence as fractions, (objects,) float64. See `jf_frames`."""
    region, edge = (
        torch.stack([statistics(row) for row in part]) if len(part) else part.new_zeros(0, 3)
        for part in jf_frames(pred, truth)
    )
    return dict(zip(FIGURES, [(region[:, 0] + edge[:, 0]) / 2, *region.unbind(1), *edge.unbind(1)], strict=True))


class RegionsAndBoundaries(Metric):
    """Mean over the objects of all sequences of all processes of the `FIGURES`, times 100.

    Args:
        kwargs: of `torchmetrics.Metric`.
    """

    full_state_update = False
    higher_is_better = True
    is_differentiable = False
    total: Tensor
    defined: Tensor
    objects: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros(len(FIGURES), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("defined", torch.zeros(len(FIGURES), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("objects", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, pred: Tensor, truth: Tensor) -> None:
        """Add a batch of sequences of label maps (B, T, H, W), or one (T, H, W). See `jf_frames`."""
        pairs = [(pred, truth)] if truth.ndim == 3 else zip(pred, truth, strict=True)
        for one, other in pairs:
            scores = torch.stack(list(jf_scores(one.to(self.device), other.to(self.device)).values()))
            self.total = self.total + scores.nansum(1)
            self.defined = self.defined + (~scores.isnan()).sum(1)
            self.objects = self.objects + scores.shape[1]

    def compute(self) -> dict[str, Tensor]:
        """Return the `FIGURES` times 100 and over how many `objects`; NaN where none defines a figure."""
        figures = 100 * self.total / self.defined
        return dict(zip(FIGURES, figures, strict=True)) | {"objects": self.objects.double()}
