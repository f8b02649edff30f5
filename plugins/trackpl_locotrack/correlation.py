"""Local 4D correlation and its encoder (3.2): all of a patch of the query with all of a patch of the target.

The 49 samples of the target's patch lie one cell apart, so they share one fractional offset. We therefore correlate the
8 x 8 whole cells around it, and interpolate the result instead of the features: the same numbers for a fraction of the
memory traffic.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trackpl_locotrack.backbone import same_padding
from trackpl_locotrack.features import OFFSETS, Features

CELLS = OFFSETS + 1
EMBEDDING = 256

STAGES = {  # channels out, kernel, stride of each convolution
    "tiny": ((64, 5, 4), (128, 2, 2)),
    "small": ((64, 5, 4), (128, 2, 2)),
    "base": ((64, 3, 2), (128, 3, 2), (128, 2, 2)),
}


def local_correlation(features: Features, level: int, place: Tensor, support: Tensor, start: int = 0) -> Tensor:
    """Correlate the patch around a place in each frame with the query's patch; zero outside of the frame.

    Args:
        features: of the video.
        level: index of the level.
        place: (N, T, 2) of (x, y) in [0, 1] of the frame's size.
        support: (N, 49, C) patches of the queries.
        start: the frame that the first place is in.

    Returns:
        (N, T, 7, 7, 49): y and x in the target's patch, then the query's.
    """
    h, w = features.sizes[level]
    n, t = place.shape[:2]
    table = features.tables[level]
    corner = place * place.new_tensor([w, h]) - 0.5 - OFFSETS // 2
    origin = corner.floor()
    fraction = (corner - origin).to(place.dtype)
    cells = torch.arange(CELLS, device=place.device)
    x, y = (o.clamp(-CELLS, size).long()[..., None] + cells for o, size in zip(origin.unbind(-1), (w, h), strict=True))
    frame = torch.arange(start, start + t, device=place.device)[:, None]
    rows = torch.where((y >= 0) & (y < h), (frame * h + y) * w, -1)  # (N, T, 8)
    columns = torch.where((x >= 0) & (x < w), x, -1)
    index = rows[..., :, None] + columns[..., None, :]
    index = torch.where((rows[..., :, None] >= 0) & (columns[..., None, :] >= 0), index, len(table) - 1)
    block = table.index_select(0, index.flatten()).view(n, t * CELLS * CELLS, -1)
    grid = torch.bmm(block, support.transpose(1, 2).to(block.dtype)).float().view(n * t, CELLS, CELLS, -1)
    dx, dy = fraction.view(-1, 2, 1, 1, 1).unbind(1)
    grid = torch.lerp(grid[:, :-1], grid[:, 1:], dy)
    return torch.lerp(grid[:, :, :-1], grid[:, :, 1:], dx).view(n, t, OFFSETS, OFFSETS, -1)


class CorrelationEncoder(nn.Module):
    """Reduce a 4D correlation to 256 numbers: convolutions over the target's patch, and over the query's patch.

    Both branches share their weights; the other patch's 49 offsets are their channels.
    """

    def __init__(self, size: str) -> None:
        super().__init__()
        channels = OFFSETS**2
        self.stages = nn.ModuleList()
        for out, kernel, stride in STAGES[size]:
            self.stages.append(
                nn.ModuleDict({"conv": nn.Conv2d(channels, out, kernel, stride), "norm": nn.GroupNorm(out // 16, out)})
            )
            channels = out

    def forward(self, correlation: Tensor) -> Tensor:
        """Encode (M, 7, 7, 49), target then query, to (M, 256)."""
        swapped = correlation.flatten(1, 2).transpose(1, 2).unflatten(1, (OFFSETS, OFFSETS))
        x = torch.cat([correlation, swapped])  # (2 M, y, x, channels)
        for stage in self.stages:
            conv, norm = stage["conv"], stage["norm"]  # type: ignore[index]
            x = conv_by_products(x, conv.weight, conv.bias, conv.stride[0])
            x = _group_norm_relu(x, norm)
        return torch.cat(x.mean((1, 2)).chunk(2), -1)


def conv_by_products(x: Tensor, weight: Tensor, bias: Tensor, stride: int) -> Tensor:
    """Convolve small images (M, H, W, C) with SAME padding, one matrix product for each place of the output.

    Taps in the padding are left out, which saves a third of the work of these convolutions.
    """
    h, w, kernel = x.shape[1], x.shape[2], weight.shape[-1]
    spans = [_spans(size, kernel, stride) for size in (h, w)]
    weight = weight.permute(2, 3, 1, 0)  # (ky, kx, C, C')
    out = []
    for y, ky in spans[0]:
        for cx, kx in spans[1]:
            out.append(torch.addmm(bias, x[:, y, cx].flatten(1), weight[ky, kx].flatten(0, 2)))
    return torch.stack(out, 1).unflatten(1, (len(spans[0]), len(spans[1])))


def _spans(size: int, kernel: int, stride: int) -> list[tuple[slice, slice]]:
    """Return for each place of the output along one axis which inputs it sees, and by which taps."""
    before, _ = same_padding(size, kernel, stride)
    spans = []
    for first in range(-before, size - before, stride):
        low, high = max(first, 0), min(first + kernel, size)
        spans.append((slice(low, high), slice(low - first, high - first)))
    return spans


def _group_norm_relu(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """Normalise (M, h, w, C) by groups of channels in float32, then ReLU."""
    x = F.group_norm(x.float().permute(0, 3, 1, 2), norm.num_groups, norm.weight, norm.bias, norm.eps)
    return F.relu(x).permute(0, 2, 3, 1)
