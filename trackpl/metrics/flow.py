"""Optical flow: end-point error and outliers, of all pixels, of those that stay visible and of the occluded.

EPE   |f^ - f| in pixels
Fl    % of outliers: EPE > 3 and EPE > 0.05 |f|
px1, px3, px5   % of pixels with an EPE below 1, 3, 5
WAUC  % of the area under the curve of correct pixels over thresholds up to 5 pixels, small ones weighing more
EPE_zero   |f|: the EPE of zero motion, what any method must beat

Two averages are in use and differ. Over images, as in the KITTI figures of UFlow and in
hmorimitsu/ptlflow: the mean over image pairs of the mean over their pixels. Over the pixels of all images
at once, as on the KITTI server, for Sintel and in RAFT: those names end in `_pooled`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from trackpl.errors import DataError

REGIONS = ("all", "visible", "occluded")
_KINDS = ("EPE", "Fl", "px1", "px3", "px5", "WAUC", "EPE_zero")
FIGURES = tuple(
    kind if region == "all" and kind != "Fl" else f"{kind}_{region}" for region in REGIONS for kind in _KINDS
)
REPORTED = (
    *("EPE", "EPE_visible", "EPE_occluded", "Fl_all", "Fl_visible", "Fl_occluded"),
    *("px1", "px3", "px5", "EPE_zero", "EPE_zero_visible"),
)
POOLED = ("EPE", "EPE_visible", "Fl_all", "Fl_visible")


def epe(pred: Tensor, truth: Tensor) -> Tensor:
    """Return the end-point error in pixels, float64; both (..., 2, H, W), the result (..., H, W)."""
    return _length(pred.double() - truth.double())


def outliers(pred: Tensor, truth: Tensor) -> Tensor:
    """Say which pixels KITTI counts as wrong: EPE > 3 and EPE > 0.05 |f|, or not a number; as `epe`, bool."""
    error = epe(pred, truth)
    return ~((error <= 3) | (error <= 0.05 * _length(truth.double())))


def flow_sums(
    pred: Tensor, truth: Tensor, visible: Tensor | None = None, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Sum the per-pixel quantities of each image pair over each region.

    Args:
        pred: (n, 2, H, W) pixels.
        truth: (n, 2, H, W) pixels; may be anything where not valid.
        visible: (n, H, W) bool; without it the regions "visible" and "occluded" are empty.
        valid: (n, H, W) bool.

    Returns:
        Sums (n, figures) in float64 in the order of `FIGURES`, percentages as 100 or 0 a pixel, and the
        number of pixels in each, (n, figures). A prediction that is not finite makes its EPE so.
    """
    error = epe(pred, truth)
    pixels = torch.stack(
        [
            error,
            100.0 * outliers(pred, truth),
            *(100.0 * (error < x) for x in (1, 3, 5)),
            100 * _wauc(error),
            _length(truth.double()),
        ],
        1,
    )  # (n, kinds, H, W)
    valid = torch.ones_like(error, dtype=torch.bool) if valid is None else valid
    nowhere = torch.zeros_like(valid)
    regions = (valid, nowhere, nowhere) if visible is None else (valid, valid & visible, valid & ~visible)  # as REGIONS
    # Chosen and not multiplied by the mask: truth may be NaN where it is not valid.
    sums = [torch.where(region[:, None], pixels, 0.0).sum((2, 3)) for region in regions]
    counts = [region.sum((1, 2))[:, None].expand(-1, len(_KINDS)) for region in regions]
    return torch.cat(sums, 1), torch.cat(counts, 1)


def flow_scores(
    pred: Tensor, truth: Tensor, visible: Tensor | None = None, valid: Tensor | None = None
) -> dict[str, Tensor]:
    """Return the `FIGURES` of each image pair, (n,) float64; NaN where a region is empty. See `flow_sums`."""
    sums, counts = flow_sums(pred, truth, visible, valid)
    return dict(zip(FIGURES, (sums / counts).unbind(1), strict=True))


class FlowMetrics(Metric):
    """Average the flow figures over all image pairs of all processes: `REPORTED`, and `POOLED` over pixels.

    Args:
        kwargs: of `torchmetrics.Metric`.
    """

    full_state_update = False
    is_differentiable = False
    mean_total: Tensor
    defined: Tensor
    pixel_total: Tensor
    pixels: Tensor
    images: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("mean_total", "pixel_total"):
            self.add_state(name, torch.zeros(len(FIGURES), dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("defined", "pixels"):
            self.add_state(name, torch.zeros(len(FIGURES), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, pred: Tensor, truth: Tensor, visible: Tensor | None = None, valid: Tensor | None = None) -> None:
        """Add a batch; every frame pair is an image pair of its own.

        Args:
            pred: (B, P, 2, H, W) or (B, 2, H, W) pixels.
            truth: as `pred`; may be anything where not valid.
            visible: (B, P, H, W) or (B, H, W) bool: the other frame shows the pixel.
            valid: as `visible`: truth is known.

        Raises:
            DataError: shapes that do not belong together.
        """
        if pred.ndim not in (4, 5) or pred.shape[-3] != 2 or pred.shape != truth.shape:
            raise DataError(
                f"flow must have shape (B, P, 2, H, W) or (B, 2, H, W), the same as its truth, "
                f"got {tuple(pred.shape)} for a truth of {tuple(truth.shape)}"
            )
        masks = []
        for name, mask in (("visible", visible), ("valid", valid)):
            shape = (*truth.shape[:-3], *truth.shape[-2:])
            if mask is not None and mask.shape != shape:
                raise DataError(f"`{name}` of a flow must have shape {shape}, got {tuple(mask.shape)}")
            masks.append(None if mask is None else mask.to(self.device).bool().flatten(0, -3))
        sums, counts = flow_sums(pred.to(self.device).flatten(0, -4), truth.to(self.device).flatten(0, -4), *masks)
        # Only images without a pixel in the region are left out; a prediction that is NaN must show.
        self.mean_total = self.mean_total + torch.where(counts > 0, sums / counts, 0.0).sum(0)
        self.defined = self.defined + (counts > 0).sum(0)
        self.pixel_total = self.pixel_total + sums.sum(0)
        self.pixels = self.pixels + counts.sum(0)
        self.images = self.images + len(sums)

    def compute(self) -> dict[str, Tensor]:
        """Return the figures, and over how many `images`; NaN where no image has a pixel of the region."""
        over_images = dict(zip(FIGURES, self.mean_total / self.defined, strict=True))
        over_pixels = dict(zip(FIGURES, self.pixel_total / self.pixels, strict=True))
        return (
            {name: over_images[name] for name in REPORTED}
            | {f"{name}_pooled": over_pixels[name] for name in POOLED}
            | {"images": self.images.double()}
        )


def _length(flow: Tensor) -> Tensor:
    # 25 times as fast on the CPU as `vector_norm` over a dimension that is not the last.
    return flow.square().sum(-3).sqrt()


def _wauc(error: Tensor) -> Tensor:
    """Return sum_i w_i [error <= i/20] / sum_i w_i for i = 1 ... 100, w_i = 1 - (i - 1)/100; NaN scores 0."""
    i = torch.arange(1, 101, dtype=torch.float64, device=error.device)
    weights = 1 - (i - 1) / 100
    beyond = weights.flip(0).cumsum(0).flip(0)  # beyond[k] = sum of w from k on
    share = torch.cat([beyond / weights.sum(), beyond.new_zeros(1)])
    return share[torch.bucketize(error, i / 20)]  # the index of the first threshold that holds the error
