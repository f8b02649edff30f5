"""Features of all frames at several scales, and what is read from them: single places, and blocks of cells.

All frames of all videos lie in one table a level; who reads names frames by their index in it, so that windows, crops
in time, reversed videos and repeated frames copy nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEVELS = 4
FRAMES_A_CALL = {"cpu": 1, "cuda": 16}  # without gradients


@dataclass(frozen=True)
class Features:
    """Features of F frames; level 0 has the encoder's stride, each next one half the resolution."""

    levels: tuple[Tensor, ...]  # (F, h, w, C) each, contiguous
    size: tuple[int, int]  # height and width of the frames, in pixels

    def __len__(self) -> int:
        return len(self.levels[0])

    def __getitem__(self, frames: slice) -> Features:
        """Return some frames, without a copy."""
        return Features(tuple(level[frames] for level in self.levels), self.size)


def joined(parts: Sequence[Features]) -> Features:
    """Put the frames of several features one after the other."""
    if len(parts) == 1:
        return parts[0]
    levels = zip(*(part.levels for part in parts), strict=True)
    return Features(tuple(torch.cat(level) for level in levels), parts[0].size)


def extract(
    encoder: nn.Module, images: Tensor, prepare: Callable[[Tensor], Tensor] | None = None, unit: bool = False
) -> Features:
    """Compute the features of frames (F, 3, H, W).

    Without gradients a few frames are in work at a time, and `prepare` sees no more of them.

    Args:
        encoder: maps (F, 3, H, W) in [-1, 1] to (F, C, h, w).
        images: in [-1, 1] of the model's size, or whatever `prepare` takes.
        prepare: resizes and scales some of the frames.
        unit: scale the vectors of level 0 to length one (version 3).
    """
    step = len(images) if torch.is_grad_enabled() else FRAMES_A_CALL.get(images.device.type, 1)
    size = (0, 0)
    levels: list[Tensor] = []
    for start in range(0, len(images), step):
        some = images[start : start + step]
        some = some if prepare is None else prepare(some)
        maps = pyramid(encoder(some), unit)
        if step == len(images):
            return Features(tuple(maps), (some.shape[-2], some.shape[-1]))
        if not levels:
            size = (some.shape[-2], some.shape[-1])
            levels = [level.new_empty(len(images), *level.shape[1:]) for level in maps]
        for level, new in zip(levels, maps, strict=True):
            level[start : start + step] = new
    return Features(tuple(levels), size)


def pyramid(maps: Tensor, unit: bool = False) -> list[Tensor]:
    """Return maps (F, C, h, w) at all levels, channels last; each level averages 2 x 2 cells of the one before.

    A side of one cell stays so.
    """
    if unit:
        length = maps.float().square().sum(1, keepdim=True).clamp(min=1e-12).sqrt()
        maps = (maps / length).to(maps.dtype)
    levels = [maps]
    for _ in range(LEVELS - 1):
        h, w = levels[-1].shape[-2:]
        levels.append(F.avg_pool2d(levels[-1], (min(h, 2), min(w, 2))))
    return [level.permute(0, 2, 3, 1).contiguous() for level in levels]


def sample(level: Tensor, index: Tensor, place: Tensor) -> Tensor:
    """Read one level (F, h, w, C) at places, bilinearly, clamped to the border.

    Args:
        level: of `Features.levels`.
        index: (...) long into F.
        place: (..., 2) of (x, y) in cells of this level, centres at integers.

    Returns:
        (..., C) float32.
    """
    _, h, w, _ = level.shape
    x, y = place[..., 0].clamp(0, w - 1), place[..., 1].clamp(0, h - 1)
    x0, y0 = x.detach().floor(), y.detach().floor()
    fx, fy = (x - x0)[..., None], (y - y0)[..., None]
    left, top = x0.long(), y0.long()
    right, bottom = (left + 1).clamp(max=w - 1), (top + 1).clamp(max=h - 1)
    upper, lower = (
        torch.lerp(level[index, row, left].float(), level[index, row, right].float(), fx) for row in (top, bottom)
    )
    return torch.lerp(upper, lower, fy)


def cells(level: Tensor, index: Tensor, place: Tensor, radius: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Name the whole cells around places, of which all samples one cell apart are mixed with the same weights.

    The samples at `place + (-radius .. radius)` lie between (2 radius + 2) cells along each axis. A cell outside is
    replaced by the nearest one inside, as clamping the samples to the border would.

    Args:
        level: (F, h, w, C) of `Features.levels`.
        index: (M,) long into F.
        place: (M, 2) of (x, y) in cells of this level, centres at integers.
        radius: of the patch.

    Returns:
        (M, K, K) rows, y then x, of the level as a table `level.flatten(0, 2)`, K = 2 radius + 2; (M, 2) fraction of
        (x, y) for `mixed`; (M, K, K) whether the cell is inside.
    """
    _, h, w, _ = level.shape
    corner = place - radius
    origin = corner.detach().floor()
    span = torch.arange(2 * radius + 2, device=place.device)
    k = len(span)
    x = origin[:, 0].clamp(-k, w).long()[:, None] + span
    y = origin[:, 1].clamp(-k, h).long()[:, None] + span
    inside = ((y >= 0) & (y < h))[:, :, None] & ((x >= 0) & (x < w))[:, None, :]
    rows = (index[:, None] * h + y.clamp(0, h - 1)) * w
    return rows[:, :, None] + x.clamp(0, w - 1)[:, None, :], corner - origin, inside


def mixed(grid: Tensor, fraction: Tensor) -> Tensor:
    """Mix values at K x K cells (M, K, K, ...), y then x, to those at the samples: (M, x, y, ...), K - 1 each."""
    fx, fy = (f.view(-1, *[1] * (grid.ndim - 1)) for f in fraction.to(grid.dtype).unbind(-1))
    grid = torch.lerp(grid[:, :-1], grid[:, 1:], fy)
    return torch.lerp(grid[:, :, :-1], grid[:, :, 1:], fx).transpose(1, 2)
