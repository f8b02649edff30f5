"""The initial track: global correlation, its sharpest peak, and whether the point is seen (3.1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trackpl_locotrack.features import Features

RADIUS = 5  # of the disc around the peak, in cells of stride 4, strictly less
FINE, COARSE = 1, 2  # levels of stride 4 and 8
NUMBERS_A_BLOCK = {"cpu": 2**19, "cuda": 2**27}  # of the correlation map at once


class InitialTrack(nn.Module):
    """Correlate each query feature with every cell, mix the two levels by one convolution and take the peak.

    Args:
        temperature: by which the mixed correlation is multiplied before the softmax.
    """

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.cost = nn.Conv2d(2, 1, 3, padding=1)
        self.visibility = nn.Linear(6, 2)
        self.temperature = temperature

    def forward(self, features: Features, fine: Tensor, coarse: Tensor) -> tuple[Tensor, Tensor]:
        """Find query features (N, 128) of stride 4 and (N, 256) of stride 8 in every frame.

        Returns:
            Places (N, T, 2) of (x, y) in [0, 1] of the frame's size; logits (N, T, 2): occluded, far from the truth.
        """
        h, w = features.sizes[FINE]
        step = max(1, NUMBERS_A_BLOCK.get(fine.device.type, 2**19) // (h * w * max(1, len(fine))))
        places, pools = [], []
        for start in range(0, features.frames, step):
            stop = min(start + step, features.frames)
            coarse_map, fine_map = self.correlate(features, start, stop, fine, coarse)
            places.append(self.peak(self.mix(coarse_map, fine_map)))
            pools.append(torch.stack([pool for maps in _pool(coarse_map, fine_map) for pool in maps], -1))
        logits = self.visibility(torch.cat(pools))
        return torch.cat(places).transpose(0, 1), logits.transpose(0, 1)

    def matching(self, features: Features, fine: Tensor, coarse: Tensor, place: Tensor, seen: Tensor) -> Tensor:
        """Cross-entropy of the softmax over the whole map, against the cell that holds the true place (ours).

        The peak's average only moves within its disc: a wrong peak far off learns nothing from it, from this it does.

        Args:
            features: of the video, with gradients.
            fine: (N, 128) query features of stride 4.
            coarse: (N, 256) query features of stride 8.
            place: (N, T, 2) true (x, y) in [0, 1].
            seen: (N, T) where it is known and visible; the loss is a mean over these.
        """
        h, w = features.sizes[FINE]
        mixed = self.mix(*self.correlate(features, 0, features.frames, fine, coarse)).transpose(0, 1)  # (N, T, h, w)
        x, y = ((place[..., i] * n).long().clamp(0, n - 1) for i, n in enumerate((w, h)))
        losses = F.cross_entropy(self.temperature * mixed.flatten(2)[seen], (y * w + x)[seen], reduction="sum")
        return losses / seen.sum().clamp(min=1)

    def correlate(
        self, features: Features, start: int, stop: int, fine: Tensor, coarse: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the correlation of stride 8, upsampled, and of stride 4: (t, N, h4, w4), queries last in memory."""
        maps = []
        for level, query in ((COARSE, coarse), (FINE, fine)):
            scores = features.cells(level, start, stop).float() @ query.T  # (t, h w, N)
            maps.append(scores.unflatten(1, features.sizes[level]).permute(0, 3, 1, 2))
        return F.interpolate(maps[0], features.sizes[FINE], mode="bilinear", align_corners=False), maps[1]

    def mix(self, coarse: Tensor, fine: Tensor) -> Tensor:
        """Convolve the two maps to one, (t, N, h4, w4): the same kernel for every query, so depthwise."""
        n = fine.shape[1]
        kernels = self.cost.weight.expand(n, 2, 3, 3)
        mixed = F.conv2d(coarse, kernels[:, :1], self.cost.bias.expand(n), padding=1, groups=n)  # type: ignore[union-attr]
        return mixed + F.conv2d(fine, kernels[:, 1:], padding=1, groups=n)

    def peak(self, mixed: Tensor) -> Tensor:
        """Average the cells within a disc around the highest one by their softmax: (t, N, 2) of (x, y) in [0, 1].

        The softmax's sum over the frame cancels, so that only a window of the map is needed.
        """
        h, w = mixed.shape[-2:]
        flat = mixed.reshape(*mixed.shape[:2], h * w)
        top = flat.detach().argmax(-1)
        reach = torch.arange(1 - RADIUS, RADIUS, device=mixed.device)
        dy, dx = (d.flatten() for d in torch.meshgrid(reach, reach, indexing="ij"))
        disc = dx**2 + dy**2 < RADIUS**2
        dy, dx = dy[disc], dx[disc]
        y, x = (top // w)[..., None] + dy, (top % w)[..., None] + dx
        inside = (y >= 0) & (y < h) & (x >= 0) & (x < w)
        values = flat.gather(-1, torch.where(inside, y * w + x, top[..., None]))
        highest = values.detach().amax(-1, keepdim=True)
        weight = (self.temperature * (values - highest)).exp() * inside
        weight = weight / weight.sum(-1, keepdim=True)
        return torch.stack([(weight * (x + 0.5)).sum(-1) / w, (weight * (y + 0.5)).sum(-1) / h], -1)


def _pool(coarse: Tensor, fine: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return mean, maximum and minimum of both maps, (t, N) each."""
    dims = (-2, -1)
    return [
        (coarse.mean(dims), fine.mean(dims)),
        (coarse.amax(dims), fine.amax(dims)),
        (coarse.amin(dims), fine.amin(dims)),
    ]
