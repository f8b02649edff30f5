"""Features of a video at one resolution, and the patches of them around the query points."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from trackpl_locotrack.backbone import STRIDES, Backbone

FRAMES_A_CALL = {"cpu": 2, "cuda": 32}  # without gradients; see `Backbone.raw`
OFFSETS = 7  # side of a patch, in cells


@dataclass(frozen=True)
class Features:
    """Unit vectors of every cell of every frame, levels of stride 2, 4, 8; the last row of each table is zero."""

    tables: tuple[Tensor, ...]  # (T h w + 1, C) each
    sizes: tuple[tuple[int, int], ...]  # h, w of each level
    frames: int
    resolution: tuple[int, int]  # height and width that the frames were resized to

    def cells(self, level: int, start: int, stop: int) -> Tensor:
        """Return (frames, h w, C) of the frames `start` to `stop` of one level."""
        h, w = self.sizes[level]
        return self.tables[level][start * h * w : stop * h * w].unflatten(0, (stop - start, h * w))


def extract(backbone: Backbone, video: Tensor, resolution: tuple[int, int]) -> Features:
    """Compute the features of a video (T, 3, H, W), uint8 or in [0, 1], resized bilinearly without antialiasing."""
    frames = video.shape[0]
    sizes = tuple((resolution[0] // s, resolution[1] // s) for s in STRIDES)
    if torch.is_grad_enabled():
        maps = [m.flatten(0, 2) for m in backbone(prepare(video, resolution))]
        return Features(tuple(F.pad(m, (0, 0, 0, 1)) for m in maps), sizes, frames, resolution)
    kind = video.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
    cells = [h * w for h, w in sizes]
    tables = tuple(
        torch.empty(frames * n + 1, c, device=video.device, dtype=dtype)
        for n, c in zip(cells, backbone.channels, strict=True)
    )
    step = FRAMES_A_CALL.get(kind, 2)
    with backbone.quick(video.device):
        for start in range(0, frames, step):
            images = prepare(video[start : start + step], resolution)
            for table, n, new in zip(tables, cells, backbone(images), strict=True):
                table[start * n : (start + len(images)) * n] = new.flatten(0, 2)
    for table in tables:
        table[-1] = 0
    return Features(tables, sizes, frames, resolution)


def prepare(video: Tensor, resolution: tuple[int, int]) -> Tensor:
    """Resize frames (T, 3, H, W) to `resolution` and scale them to float32 in [-1, 1]."""
    images = video.float() / 255 if video.dtype == torch.uint8 else video.float()
    images = images * 2 - 1
    if images.shape[-2:] == resolution:
        return images
    return F.interpolate(images, resolution, mode="bilinear", align_corners=False)


def support(features: Features, level: int, frame: Tensor, place: Tensor) -> Tensor:
    """Sample the 7 x 7 patch around each query point, one cell apart, coordinates clamped to the border.

    Args:
        features: of the video.
        level: index of the level.
        frame: (N,) integer frames.
        place: (N, 2) of (x, y) in [0, 1] of the frame's size.

    Returns:
        (N, 49, C) float32, row by row.
    """
    h, w = features.sizes[level]
    offsets = torch.arange(OFFSETS, device=place.device) - OFFSETS // 2
    x, x0, x1 = _taps(place[:, 0], offsets, w)
    y, y0, y1 = _taps(place[:, 1], offsets, h)

    def row(rows: Tensor) -> Tensor:
        """Interpolate along x in these rows: (N, 7, 7, C)."""
        base = (frame[:, None] * h + rows)[:, :, None] * w
        left, right = (features.tables[level][base + c[:, None]].float() for c in (x0, x1))
        return torch.lerp(left, right, x[:, None, :, None])

    return torch.lerp(row(y0), row(y1), y[:, :, None, None]).flatten(1, 2)


def _taps(place: Tensor, offsets: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the fraction and the two cells between which each of (N, 7) samples lies."""
    index = (place[:, None] * size - 0.5 + offsets).clamp(0, size - 1)
    low = index.floor()
    return index - low, low.long(), (low.long() + 1).clamp(max=size - 1)
