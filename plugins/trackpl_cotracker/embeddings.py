"""Sines and cosines that tell the transformer of time, of place and of displacement (3.2).

Computed in float32 whatever the precision of the rest, for a displacement is multiplied by up to a thousand.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

DISPLACEMENT = 64  # sines and cosines for each axis of a displacement


def waves(length: int, dim: int, device: torch.device) -> Tensor:
    """Return the (length, dim) sines, then cosines, of the positions 0, 1, ...; computed in float64."""
    return _waves(length, dim, str(device))


@lru_cache(maxsize=64)
def _waves(length: int, dim: int, device: str) -> Tensor:
    half = dim // 2
    with torch.inference_mode(False), torch.no_grad():  # what is kept must serve training too
        rate = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
        angle = torch.arange(length, dtype=torch.float64)[:, None] * rate
        return torch.cat([angle.sin(), angle.cos()], 1).float().to(device)


def position(place: Tensor, size: tuple[int, int], dim: int) -> Tensor:
    """Embed places (..., 2) of (x, y): the bilinear sample of a table over h x w cells, clamped to the border.

    A cell's row in the table is the waves of x, then those of y; only the corners around each place are looked up.

    Returns:
        (..., dim) float32.
    """
    return torch.cat([_between(place[..., i], size[1 - i], dim // 2) for i in range(2)], -1)


def _between(x: Tensor, length: int, dim: int) -> Tensor:
    """Interpolate the waves of whole numbers below `length` at x (...)."""
    table = waves(length, dim, x.device)
    x = x.float().clamp(0, length - 1)
    low = x.detach().floor()
    cell = low.long()
    return torch.lerp(table[cell], table[(cell + 1).clamp(max=length - 1)], (x - low)[..., None])


def displacement(d: Tensor) -> Tensor:
    """Embed displacements (..., 2) of (x, y) in feature pixels: themselves, then sine and cosine in turn, x before y.

    Returns:
        (..., 2 + 2 x 64) float32.
    """
    d = d.float()
    rate = torch.arange(0, DISPLACEMENT, 2, device=d.device) * (1000 / DISPLACEMENT)
    angle = d[..., None] * rate
    both = torch.stack([angle.sin(), angle.cos()], -1)
    return torch.cat([d, both.flatten(-3)], -1)
