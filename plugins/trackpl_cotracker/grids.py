"""Support points: regular grids over the frame and around a point, as each version places them.

Coordinates are (x, y) in pixels of the model's frame with centres at integers. Version 1 keeps a margin of whole pixels
and hangs its local grid half a step towards the origin; versions 2 and 3 do neither.
"""

from __future__ import annotations

import torch
from torch import Tensor

Extent = tuple[int, int]  # height and width

LOCAL: Extent = (50, 50)
"""Extent of the grid around a point."""


def global_grid(version: int, size: int, extent: Extent) -> Tensor:
    """Place size x size points over a frame, row by row: (size^2, 2); none for size 0."""
    margin = extent[1] // 64 if version == 1 else extent[1] / 64
    return _spread(_steps(size), extent, margin)


def local_grid(version: int, size: int, centres: Tensor, extent: Extent = LOCAL) -> Tensor:
    """Place size x size points around each of the centres (N, 2): (N, size^2, 2).

    As released, version 1 takes a centre of exactly (0, 0) for none, and a single point for the middle of the extent
    whatever the centre.
    """
    whole = global_grid(version, size, extent).to(centres)
    if version > 1:
        return whole + (centres - centres.new_tensor([extent[1], extent[0]]) / 2)[:, None]
    steps = _steps(size) - (size / 2 / (size - 1) if size > 1 else 0)
    around = _spread(steps, extent, extent[1] // 64).to(centres) + centres[:, None]
    plain = (centres == 0).all(-1) | (size == 1)
    return torch.where(plain[:, None, None], whole, around)


def _steps(size: int) -> Tensor:
    """Return `size` steps from 0 to 1; the middle for a single one."""
    return torch.full((1,), 0.5) if size == 1 else torch.arange(size) / max(size - 1, 1)


def _spread(steps: Tensor, extent: Extent, margin: float) -> Tensor:
    y, x = (margin + steps * (side - 2 * margin) for side in extent)
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).flatten(0, 1)
