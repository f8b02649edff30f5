"""CoTracker3: the correlation alone tells how to move, and all three estimates accumulate.

Differences from version 2: features of unit length; a query is its patch on each level, which nothing updates, and is
correlated whole; the token has neither a position table nor a track feature nor a track mask, and codes the motion to
the neighbouring frames instead of the displacement from the first; half the depth; visibility and confidence are
updated with the place, from a logit of 0; points that have not started take part in the exchange. The offline model
refines the whole clip as one window, the online model windows of 16 frames.

Karaev et al., "CoTracker3: Simpler and Better Point Tracking by Pseudo-Labelling Real Videos", 2024.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trackpl_cotracker import embeddings
from trackpl_cotracker.correlation4d import Correlation4D, patches
from trackpl_cotracker.encoder import Encoder
from trackpl_cotracker.features import Features, extract
from trackpl_cotracker.state import Points, State
from trackpl_cotracker.transformer import VirtualTransformer
from trackpl_cotracker.version2 import head

WAVES = 10
MOTION = 4 * (1 + 2 * WAVES)
UNIT = 4  # the unit of motion is a quarter of the resolution trained with


class Version3(nn.Module):
    """CoTracker3, offline or online.

    Args:
        stride: of the features.
        window: S frames; 16 online, offline the frames that the time table covers, 60.
        iterations: M in training and in evaluation.
        sliding: online.
        mask_unstarted: hide points that have not started from the others; the published weights show them.
        dim: width of the transformer.
        heads: of its attention.
        depth: number of its time blocks, each with an exchange between points.
        virtual: number of its virtual tracks.
        resolution: height and width trained with, which scale the motion whatever the size of the frames.
    """

    START: ClassVar[float] = 0.0  # logits of a point that is new
    PADS_MASK: ClassVar[bool] = False
    JOINS: ClassVar[bool] = False
    confident: ClassVar[bool] = True
    entangled = False

    def __init__(
        self,
        stride: int = 4,
        window: int = 60,
        iterations: tuple[int, int] = (4, 6),
        sliding: bool = False,
        mask_unstarted: bool = False,
        dim: int = 384,
        heads: int = 8,
        depth: int = 3,
        virtual: int = 64,
        resolution: tuple[int, int] = (384, 512),
    ) -> None:
        super().__init__()
        self.stride, self.window, self.iterations = stride, window, iterations
        self.sliding, self.mask_unstarted, self.resolution = sliding, mask_unstarted, resolution
        self.encoder = Encoder(stride)
        self.correlation = Correlation4D()
        self.token = 2 + self.correlation.size + MOTION
        self.transformer = VirtualTransformer(self.token, dim, heads, depth, virtual)
        self.move, self.judge = head(dim, 2), head(dim, 2)

    def encode(self, images: Tensor, prepare: Callable[[Tensor], Tensor] | None = None) -> Features:
        """Compute the features, of unit length, of frames as `Version1.encode` takes them."""
        return extract(self.encoder, images, prepare, unit=True)

    def describe(self, features: Features, index: Tensor, place: Tensor) -> tuple[Tensor, ...]:
        """Read the patch, (G, N, 49, C), of each level at places (G, N, 2) of frames `index` (G, N)."""
        return tuple(patches(level, index, place / 2**i) for i, level in enumerate(features.levels))

    def refine(
        self,
        features: Features,
        frames: Tensor,
        points: Points,
        begin: State,
        mask: Tensor,
        started: Tensor,
        iterations: int,
    ) -> list[State]:
        """Update the state of a window M times; arguments and result as those of `Version1.refine`, without `mask`."""
        if begin.confidence is None:
            raise ValueError("version 3 needs a confidence to begin with")
        supports = points.description
        if not bool(started.all()):
            supports = tuple(torch.where(started[..., None, None], d, 0) for d in supports)
        shown = started if self.mask_unstarted else None
        place = begin.place.transpose(1, 2)
        logits = torch.stack([begin.visible, begin.confidence], -1).transpose(1, 2)  # (G, N, S, 2)
        states = []
        for _ in range(iterations):
            place = place.detach()
            change = self.transformer(self._tokens(features, frames, place, logits, supports), shown)
            place = place + self.move(change).float()
            logits = logits + self.judge(change).float()
            v, c = logits.transpose(1, 2).unbind(-1)
            states.append(State(place.transpose(1, 2), v, c))
        return states if torch.is_grad_enabled() else states[-1:]

    def _tokens(
        self, features: Features, frames: Tensor, place: Tensor, logits: Tensor, supports: tuple[Tensor, ...]
    ) -> Tensor:
        """Return the tokens (G, N, S, 1110) of places and logits (G, N, S, 2)."""
        unit = place.new_tensor([self.resolution[1] / UNIT, self.resolution[0] / UNIT])
        found = self.correlation(features, frames, place, supports)
        tokens = torch.cat([logits, found, motion_code(place / unit)], -1)
        tokens += time_code(frames.shape[1], self.window, self.token, frames.device)  # in place: they are large
        return tokens


def motion_code(place: Tensor) -> Tensor:
    """Code how places (G, N, S, 2) differ from those of the next and of the last frame: (G, N, S, 84)."""
    step = place[:, :, 1:] - place[:, :, :-1]
    none = torch.zeros_like(place[:, :, :1])
    r = torch.cat([torch.cat([-step, none], 2), torch.cat([none, step], 2)], -1)
    angle = (r[..., None, :] * 2.0 ** torch.arange(WAVES, device=r.device)[:, None]).flatten(-2)
    return torch.cat([r, angle.sin(), (angle + math.pi / 2).sin()], -1)


def time_code(length: int, window: int, dim: int, device: torch.device) -> Tensor:
    """Return the time table (length, dim): that of `window` frames, stretched linearly to another length."""
    table = embeddings.waves(window, dim, device)
    if length == window:
        return table
    return F.interpolate(table.T[None], length, mode="linear", align_corners=False)[0].T
