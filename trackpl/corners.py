"""Where to put query points in a video that nobody labelled: on corners of its first quarter, or anywhere.

Corners are those of SIFT (Lowe, IJCV 2004): extrema of the differences of Gaussians over place and scale, without weak
ones and without edges, along which a point could slide. Places are found to a fraction of a pixel.
"""

from __future__ import annotations

from itertools import product
from typing import Literal

import numpy as np
import torch
from kornia.geometry.transform import ScalePyramid
from torch import Tensor

Sampling = Literal["corners", "uniform"]

FRAMES = 8  # from which corners are taken
LEVELS = 3  # scales an octave
CONTRAST = 0.04 / LEVELS  # of a corner at least, of images in [0, 1]
EDGE = 10.0  # curvatures of a corner differ by this factor at most
BORDER = 5  # pixels of each octave
_GREY = (0.299, 0.587, 0.114)


def corners(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Find the corners of all images, strongest first.

    Args:
        images: (F, 3, H, W), uint8 or float in [0, 1]; at least 12 pixels a side, or there are none.

    Returns:
        The image of each corner (K,) long, its place (K, 2) in raster pixels, and its contrast (K,), above 0.
    """
    if min(images.shape[-2:]) < 2 * BORDER + 2:
        return images.new_zeros(0, dtype=torch.long), images.new_zeros(0, 2).float(), images.new_zeros(0).float()
    video = images.float() / 255 if images.dtype == torch.uint8 else images.float()
    grey = (video * video.new_tensor(_GREY)[:, None, None]).sum(1, keepdim=True)
    pyramid = ScalePyramid(LEVELS, 1.6, 2 * BORDER + 2, double_image=True).to(grey.device)
    found = [_octave(octave[:, 0], images.shape[-2:]) for octave in pyramid(grey)[0]]
    which, xy, contrast = (torch.cat(parts) for parts in zip(*found, strict=True))
    order = contrast.argsort(descending=True, stable=True)
    return which[order], xy[order], contrast[order]


def _octave(levels: Tensor, size: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
    """Find the corners of one octave (F, L, h, w) of images of the given size."""
    dog = levels[:, 1:] - levels[:, :-1]
    strong = torch.zeros_like(dog, dtype=torch.bool)
    inner = (slice(None), slice(1, -1), slice(BORDER, -BORDER), slice(BORDER, -BORDER))
    strong[inner] = dog[inner].abs() > CONTRAST
    place = strong.nonzero()  # (K, 4) of image, level, y, x

    def at(dx: int, dy: int, dl: int = 0) -> Tensor:
        n, level, y, x = place.unbind(-1)
        return dog[n, level + dl, y + dy, x + dx]

    for dl, dy, dx in product((0, -1, 1), repeat=3):  # few are left after the first of the 26 neighbours
        here, there = at(0, 0), at(dx, dy, dl)
        place = place[torch.where(here > 0, here >= there, here <= there)]  # minima are as good as maxima
    gx, gy = (at(1, 0) - at(-1, 0)) / 2, (at(0, 1) - at(0, -1)) / 2
    xx, yy = at(1, 0) + at(-1, 0) - 2 * at(0, 0), at(0, 1) + at(0, -1) - 2 * at(0, 0)
    xy = (at(1, 1) + at(-1, -1) - at(1, -1) - at(-1, 1)) / 4
    trace, det = xx + yy, xx * yy - xy * xy
    keep = (det > 0) & (trace.square() * EDGE < (EDGE + 1) ** 2 * det)
    shift = torch.stack([xy * gy - yy * gx, xy * gx - xx * gy], -1) / det[:, None]  # to the top of the parabola
    centre = place[:, [3, 2]] + shift.clamp(-0.5, 0.5)
    h, w = dog.shape[-2:]
    scale = centre.new_tensor([(size[1] - 1) / (w - 1), (size[0] - 1) / (h - 1)])  # octaves share their outer centres
    return place[keep, 0], (centre * scale + 0.5)[keep], at(0, 0).abs()[keep]


def sample_queries(video: Tensor, count: int, how: Sampling, chance: np.random.Generator) -> Tensor:
    """Draw query points of a clip.

    With "corners" eight frames are drawn from the first quarter, and each gives the strongest eighth of the points; one
    that is drawn twice gives twice as many. With "uniform" frames and places are uniform.

    Args:
        video: (T, 3, H, W), uint8 or float in [0, 1].
        count: of points.
        how: to draw them.
        chance: from which they follow.

    Returns:
        Queries (n, 3) of (t, x, y), float32; n <= count, as many corners as there are.
    """
    t, _, h, w = video.shape
    if how == "uniform":
        places = np.column_stack([chance.integers(0, t, count), chance.random((count, 2)) * (w, h)])
        return torch.from_numpy(places).float().to(video.device)
    drawn = chance.integers(0, t // 4 + 1, FRAMES)
    quotas: dict[int, int] = {}
    for i, frame in enumerate(drawn.tolist()):
        quotas[frame] = quotas.get(frame, 0) + (count + i) // FRAMES
    frames = sorted(quotas)
    which, xy, _ = corners(video[frames])
    parts = []
    for i, frame in enumerate(frames):
        mine = xy[which == i][: quotas[frame]]
        parts.append(torch.cat([torch.full_like(mine[:, :1], frame), mine], 1))
    return torch.cat(parts)
