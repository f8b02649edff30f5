"""Find each point again by comparing its feature with every cell of every frame.

A small network gives every cell of a frame a feature of unit length. The feature at a query, read at its own
place and time, is compared with all cells of a frame; the softmax of these similarities is a map of where the
point may be. The mean of the map around its peak is the answer; how high and how similar the peak is tells if
the point can be seen. Frames and points are independent of each other.

Frames are resized to S x S pixels on the way in and places back on the way out, so clips may have any size.

Shapes: B batch, T frames, N points, C channels, s = S / 4 cells a side.
"""

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional

from trackpl import Clip, Info, Method, Tracks
from trackpl.errors import DataError
from trackpl.types import check_queries


class MyMethod(Method):
    """Point tracker that matches features over the whole frame.

    Args:
        channels: length of a feature.
        size: side S in pixels to which frames are resized, a multiple of 4.
        optimizer: makes the optimiser.
        lr_scheduler: makes the learning-rate schedule; none keeps the rate.
    """

    info = Info(title="mymethod: matching over the whole frame", paper="unpublished", licence="Apache-2.0")
    contract = 1  # of trackpl, for which this was written

    def __init__(
        self,
        channels: int = 32,
        size: int = 128,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(optimizer, lr_scheduler)
        self.size = size
        self.encoder = nn.Sequential(
            nn.Conv2d(3, channels, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )
        self.log_scale = nn.Parameter(torch.tensor(4.0))  # of the similarities before the softmax
        self.visibility = nn.Linear(2, 1)

    def losses(self, clip: Clip) -> dict[str, Tensor]:
        """Compare with the true tracks: Huber for the place, cross-entropy for the visibility."""
        if clip.tracks is None or clip.visible is None:
            raise DataError("mymethod learns from tracks, and this clip has none; train on data with tracks")
        valid = torch.ones_like(clip.visible) if clip.valid is None else clip.valid
        seen = clip.visible & valid
        features = self._features(clip)
        templates = self._read(features, self._some_queries(clip.tracks, seen), clip)
        place, logits = self._match(features, templates)
        truth = clip.tracks / self._extent(clip)
        distance = functional.huber_loss(place * self.size, truth * self.size, reduction="none").sum(-1)
        surprise = functional.binary_cross_entropy_with_logits(logits, clip.visible.float(), reduction="none")
        return {
            "position": distance[seen].sum() / seen.sum().clamp(min=1),
            "visibility": surprise[valid].sum() / valid.sum().clamp(min=1),
        }

    @torch.no_grad()
    def track(self, clip: Clip, queries: Tensor) -> Tracks:
        """Track points; see `trackpl.Method.track`."""
        check_queries(clip, queries)
        features = self._features(clip)
        templates = self._read(features, queries, clip)
        # A few frames at a time: the maps over all cells for all points of a long video are large.
        parts = [self._match(some, templates) for some in features.split(8, dim=1)]
        place, logits = (torch.cat(part, 1) for part in zip(*parts, strict=True))
        time = torch.arange(clip.frames, device=queries.device)[:, None]
        asked = time == queries[:, None, :, 0]  # (B, T, N): here the answer was given with the question
        xy = torch.where(asked[..., None], queries[:, None, :, 1:], place * self._extent(clip))
        return Tracks(xy=xy, visible=logits.sigmoid().masked_fill(asked, 1.0))

    def _features(self, clip: Clip) -> Tensor:
        """Return a feature of unit length for every cell (B, T, C, s, s)."""
        parts = []
        for some in clip.video.split(8, dim=1):  # (B, 8, 3, H, W), so that a long video need not fit at once
            frames = some.flatten(0, 1).float() / (255 if some.dtype == torch.uint8 else 1)
            frames = functional.interpolate(frames, (self.size, self.size), mode="bilinear", antialias=True)
            parts.append(self.encoder(frames * 2 - 1).unflatten(0, some.shape[:2]))
        return functional.normalize(torch.cat(parts, 1).float(), dim=2)

    def _read(self, features: Tensor, queries: Tensor, clip: Clip) -> Tensor:
        """Return the feature at each query (B, N, C)."""
        t, xy = queries[..., :1], queries[..., 1:]
        place = torch.cat([xy / self._extent(clip), (t + 0.5) / clip.frames], -1)  # in [0, 1]; t is mid-frame
        grid = (place * 2 - 1)[:, :, None, None]  # (B, N, 1, 1, 3)
        volume = features.transpose(1, 2)  # (B, C, T, s, s)
        found = functional.grid_sample(volume, grid, padding_mode="border", align_corners=False)
        return found[..., 0, 0].transpose(1, 2)

    def _match(self, features: Tensor, templates: Tensor) -> tuple[Tensor, Tensor]:
        """Return the place of each template in each frame in [0, 1] (B, T, N, 2), and logits of seeing it."""
        cosine = torch.einsum("btchw,bnc->btnhw", features, templates).float()
        chance = (cosine * self.log_scale.exp()).flatten(-2).softmax(-1).view_as(cosine)
        side = chance.shape[-1]
        centres = torch.arange(side, device=chance.device) + 0.5
        best = chance.flatten(-2).argmax(-1)
        best = torch.stack([best % side, best // side], -1) + 0.5  # (B, T, N, 2) of x, y in cells
        near = (centres - best[..., None]).abs() < 3  # (B, T, N, 2, s)
        local = chance * near[..., 0, None, :] * near[..., 1, :, None]
        x, y = ((local.sum(dim) * centres).sum(-1) / local.sum((-2, -1)) for dim in (-2, -1))
        peak = torch.stack([cosine.amax((-2, -1)), chance.amax((-2, -1))], -1)
        return torch.stack([x, y], -1) / side, self.visibility(peak)[..., 0].float()

    @staticmethod
    def _extent(clip: Clip) -> Tensor:
        """Return width and height in pixels (2,)."""
        return torch.tensor([clip.size[1], clip.size[0]], device=clip.video.device)

    @staticmethod
    def _some_queries(tracks: Tensor, seen: Tensor) -> Tensor:
        """Ask for each track at a random frame that shows it (B, N, 3)."""
        time = (torch.rand(seen.shape, device=seen.device) * seen).argmax(1)  # (B, N)
        xy = tracks.gather(1, time[:, None, :, None].expand(-1, 1, -1, 2))[:, 0]
        return torch.cat([time[..., None], xy], -1)
