"""Local correlation (3.2): the feature of a track with the 7 x 7 places around its estimate, at every level.

The samples lie one cell apart and so share one fractional offset: the products with the 8 x 8 whole cells around are
mixed, instead of the features.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from trackpl_cotracker.features import LEVELS, Features, cells, mixed

RADIUS = 3
SIZE = LEVELS * (2 * RADIUS + 1) ** 2
ROWS_A_CALL = {"cpu": 32, "cuda": 65536}  # places whose cells are gathered at once, without gradients
ROWS_KEPT = 512


def correlate(features: Features, frames: Tensor, place: Tensor, track: Tensor, border: bool) -> Tensor:
    """Correlate the features of tracks with the cells around their places, divided by the root of the channels.

    Args:
        features: of all frames.
        frames: (G, S) long into them.
        place: (G, S, N, 2) of (x, y) in cells of level 0, centres at integers.
        track: (G, S, N, C) features of the tracks.
        border: outside of the frame read the nearest cell (version 2), else zero (version 1).

    Returns:
        (G, S, N, 196) float32: level, then x offset, then y offset.
    """
    index = frames[:, :, None].expand(place.shape[:3]).flatten()
    place, shape = place.flatten(0, 2), place.shape[:3]
    track = track.flatten(0, 2) * track.shape[-1] ** -0.5
    step = len(index) if torch.is_grad_enabled() else ROWS_A_CALL.get(place.device.type, 128)
    found = []
    for i, level in enumerate(features.levels):
        rows, fraction, inside = cells(level, index, place / 2**i, RADIUS)
        products = _kept_or_made_again(level, rows.flatten(1), track, step).view(rows.shape)
        if not border:
            products = products * inside
        found.append(mixed(products, fraction).flatten(1))
    return torch.cat(found, 1).unflatten(0, shape)


def _kept_or_made_again(level: Tensor, rows: Tensor, track: Tensor, step: int) -> Tensor:
    """Return `_products`; of many rows with gradients the cells are gathered again in the backward pass, not kept."""
    if torch.is_grad_enabled() and len(rows) > ROWS_KEPT:
        return checkpoint(_products, level, rows, track, step, use_reentrant=False, preserve_rng_state=False)
    return _products(level, rows, track, step)


def _products(level: Tensor, rows: Tensor, track: Tensor, step: int) -> Tensor:
    """Multiply `rows` (M, K) of a level's table with features (M, C): (M, K) float32."""
    table = level.flatten(0, 2)
    track = track.to(table.dtype)[:, None]  # a row times a matrix: the other way around takes eight times as long
    parts = []
    for start in range(0, len(rows), step):
        some = rows[start : start + step]
        block = table.index_select(0, some.flatten()).view(*some.shape, -1)
        parts.append(torch.bmm(track[start : start + step], block.transpose(1, 2)).squeeze(1).float())
    return torch.cat(parts) if len(parts) > 1 else parts[0]
