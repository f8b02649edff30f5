"""A 3 x 3 convolution with a quarter of the products, exact but for rounding (Winograd 1980; Lavin, Gray, CVPR 2016).

F(4 x 4, 3 x 3) on channels-last images: a tile of 4 x 4 pixels of output comes from 36 products of vectors of channels
instead of 144. All of it is matrix products; bands of tiles use the same buffers again, so that they stay in the cache.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# Of one axis: six inputs to six factors, three taps to six factors, six products to four outputs.
INPUT = (
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
)
KERNEL = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
OUTPUT = (
    (1, 1, 1, 1, 1, 0),
    (0, 1, -1, 2, -2, 0),
    (0, 1, 1, 4, 4, 0),
    (0, 1, -1, 8, -8, 1),
)
BAND = 128  # tiles at once
COLUMNS = 8192  # of a product with few rows, of which more would leave the cache


def transformed(weight: Tensor) -> Tensor:
    """Transform kernels (C', C, 3, 3) to the 36 matrices (36, C, C') of `conv3x3`."""
    kernel = weight.permute(2, 3, 1, 0).reshape(9, -1)
    return (_both_axes(KERNEL, weight) @ kernel).view(36, weight.shape[1], weight.shape[0])


def conv3x3(x: Tensor, kernel: Tensor) -> Tensor:
    """Convolve (B, C, H, W) with a `transformed` kernel, stride 1 and a border of zeros, without gradients.

    Returns:
        (B, C', H, W) in channels-last memory, as x should be.
    """
    b, c, h, w = x.shape
    rows, columns, c_out = -(-h // 4), -(-w // 4), kernel.shape[-1]
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 4 * columns - w + 1, 1, 4 * rows - h + 1))
    sb, sy, sx, sc = padded.stride()
    windows = padded.as_strided((6, 6, rows, b, columns, c), (sy, sx, 4 * sy, sb, 4 * sx, sc))
    out = x.new_empty(b, rows, 4, columns, 4, c_out)
    places = out.permute(2, 4, 1, 0, 3, 5)  # (4, 4, rows, B, columns, C')
    forward, back = _both_axes(INPUT, x), _both_axes(OUTPUT, x)
    band = max(1, min(rows, BAND // (b * columns)))
    tiles = band * b * columns
    buffers = [x.new_empty(36 * tiles * max(c, c_out)) for _ in range(2)]
    for start in range(0, rows, band):
        n = min(band, rows - start)
        tiles = n * b * columns
        cells = _buffer(buffers[0], 6, 6, n, b, columns, c)
        cells.copy_(windows[:, :, start : start + n])
        factors = _buffer(buffers[1], 36, tiles * c)
        for some, result in zip(cells.view(36, -1).split(COLUMNS, 1), factors.split(COLUMNS, 1), strict=True):
            torch.mm(forward, some, out=result)
        products = torch.bmm(factors.view(36, tiles, c), kernel, out=_buffer(buffers[0], 36, tiles, c_out))
        lines = torch.mm(back, products.view(36, -1), out=_buffer(buffers[1], 16, tiles * c_out))
        places[:, :, start : start + n] = lines.view(4, 4, n, b, columns, c_out)
    return out.view(b, 4 * rows, 4 * columns, c_out)[:, :h, :w].permute(0, 3, 1, 2)


def _both_axes(matrix: tuple[tuple[float, ...], ...], like: Tensor) -> Tensor:
    axis = like.new_tensor(matrix)
    return torch.kron(axis, axis)


def _buffer(memory: Tensor, *shape: int) -> Tensor:
    return memory[: math.prod(shape)].view(shape)
