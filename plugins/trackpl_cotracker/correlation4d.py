"""Correlation of the patch around the query with the patch around its present place, of version 3.

As in `correlation`, the samples share one fractional offset: the 8 x 8 whole cells around the place are correlated with
the 49 samples of the query's patch, and the products are mixed instead of the features.

G groups of N points over S frames, C channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trackpl_cotracker.correlation import RADIUS
from trackpl_cotracker.features import LEVELS, Features, cells, mixed

PATCH = (2 * RADIUS + 1) ** 2
ROWS_A_CALL = {"cpu": 128, "cuda": 8192}  # points x frames whose correlation is made at once, without gradients
ROWS_TRAINING = 32768  # with gradients: each call costs a gradient of the whole map
ROWS_KEPT = 512  # with gradients: what more than these need is made again in the backward pass


def patches(level: Tensor, index: Tensor, place: Tensor) -> Tensor:
    """Sample the 7 x 7 patch around each place, one cell apart, clamped to the border.

    Args:
        level: (F, h, w, C) of `Features.levels`.
        index: (...) long into F.
        place: (..., 2) of (x, y) in cells of this level, centres at integers.

    Returns:
        (..., 49, C), x offset before y offset, of the level's type.
    """
    rows, fraction, _ = cells(level, index.flatten(), place.flatten(0, -2), RADIUS)
    block = level.flatten(0, 2).index_select(0, rows.flatten()).float().view(*rows.shape, -1)
    return mixed(block, fraction).flatten(1, 2).to(level.dtype).unflatten(0, index.shape)


def correlate(level: Tensor, index: Tensor, place: Tensor, support: Tensor) -> Tensor:
    """Multiply all samples around places (M, S, 2) of frames (M, S) with all of the queries' patches (M, 49, C).

    Returns:
        (M, S, 2401) float32: x offset, y offset in the frame, then x offset, y offset around the query.
    """
    rows, fraction, _ = cells(level, index.flatten(), place.flatten(0, 1), RADIUS)  # (M S, 8, 8)
    block = level.flatten(0, 2).index_select(0, rows.flatten()).view(len(index), -1, level.shape[-1])
    products = torch.bmm(block, support.transpose(1, 2).to(block.dtype)).float().view(*rows.shape, PATCH)
    return mixed(products, fraction).reshape(*index.shape, PATCH**2)


class Correlation4D(nn.Module):
    """The correlations of all levels, each coded by the one perceptron that they share."""

    def __init__(self, hidden: int = 384, outputs: int = 256) -> None:
        super().__init__()
        self.expand, self.contract = nn.Linear(PATCH**2, hidden), nn.Linear(hidden, outputs)
        self.size = LEVELS * outputs

    def forward(self, features: Features, frames: Tensor, place: Tensor, supports: tuple[Tensor, ...]) -> Tensor:
        """Code the correlation at places, which get no gradient.

        Args:
            features: of all frames.
            frames: (G, S) long into them.
            place: (G, N, S, 2) of (x, y) in cells of level 0, centres at integers.
            supports: (G, N, 49, C) of each level: the `patches` of the queries.

        Returns:
            (G, N, S, 1024) float32, level by level.
        """
        groups, points, length, _ = place.shape
        place, index = place.detach().flatten(0, 1), frames.repeat_interleave(points, 0)
        training = torch.is_grad_enabled()
        rows = ROWS_TRAINING if training else ROWS_A_CALL.get(place.device.type, 128)
        step, span = max(1, rows // length), length if training else min(length, rows)
        found = []
        for a in range(0, len(place), step):
            for b in range(0, length, span):
                part = slice(a, a + step), slice(b, b + span)
                some = [s.flatten(0, 1)[a : a + step] for s in supports]
                found.append(self._levels(features.levels, index[part], place[part], some))
        return _assembled(found, -(-length // span)).unflatten(0, (groups, points))

    def _levels(self, levels: tuple[Tensor, ...], index: Tensor, place: Tensor, supports: list[Tensor]) -> Tensor:
        """Code the correlation on all levels at places (M, S, 2) of frames (M, S): (M, S, 1024)."""
        codes = []
        for i, (level, support) in enumerate(zip(levels, supports, strict=True)):
            given = level, index, place / 2**i, support
            if torch.is_grad_enabled() and index.numel() > ROWS_KEPT:
                codes.append(checkpoint(self.code, *given, use_reentrant=False))
            else:
                codes.append(self.code(*given))
        return torch.cat(codes, -1)

    def code(self, level: Tensor, index: Tensor, place: Tensor, support: Tensor) -> Tensor:
        """Code the correlation on one level, (M, S, 256) float32; arguments as those of `correlate`."""
        return self.contract(F.gelu(self.expand(correlate(level, index, place, support)))).float()


def _assembled(parts: list[Tensor], spans: int) -> Tensor:
    """Put parts (m, s, C) together: first those of the same points, `spans` each, along s, then all along m."""
    if len(parts) == 1:
        return parts[0]
    if spans == 1:
        return torch.cat(parts)
    return torch.cat([torch.cat(parts[i : i + spans], 1) for i in range(0, len(parts), spans)])
