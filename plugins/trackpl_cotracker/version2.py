"""CoTracker2: version 1 with virtual tracks, through which any number of points exchange.

Differences from version 1: the transformer; the position table is that of the resolution trained with, whatever the
size of the frames; correlation clamps places to the border; a point that has not started is there with a feature of
zero and hidden from the others, instead of absent.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from trackpl_cotracker import embeddings
from trackpl_cotracker.correlation import correlate
from trackpl_cotracker.encoder import CHANNELS, Encoder
from trackpl_cotracker.features import Features
from trackpl_cotracker.state import Points, State
from trackpl_cotracker.transformer import VirtualTransformer
from trackpl_cotracker.version1 import TOKEN, Version1


class Version2(Version1):
    """Version 1's tokens and updates around a transformer with virtual tracks.

    Args:
        stride: of the features.
        window: S frames; 8, of version 2.1 16.
        iterations: M in training and in evaluation.
        dim: width of the transformer.
        heads: of its attention.
        depth: number of its time blocks, each with an exchange between points.
        virtual: number of its virtual tracks.
        resolution: height and width trained with, which the position table covers.
    """

    PADS_MASK: ClassVar[bool] = False  # m is one in frames repeated after the end
    JOINS: ClassVar[bool] = False  # points take part, hidden, from the start

    def __init__(
        self,
        stride: int = 4,
        window: int = 8,
        iterations: tuple[int, int] = (4, 6),
        dim: int = 384,
        heads: int = 8,
        depth: int = 6,
        virtual: int = 64,
        resolution: tuple[int, int] = (384, 512),
    ) -> None:
        nn.Module.__init__(self)
        self.stride, self.window, self.iterations = stride, window, iterations
        self.cells = (resolution[0] // stride, resolution[1] // stride)
        self.encoder = Encoder(stride)
        self.transformer = VirtualTransformer(TOKEN, dim, heads, depth, virtual)  # type: ignore[assignment]
        self.output = head(dim, 2 + CHANNELS)
        self.update_norm = nn.GroupNorm(1, CHANNELS)
        self.update = nn.Linear(CHANNELS, CHANNELS)
        self.visible = nn.Linear(CHANNELS, 1)

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
        """Update the state of a window M times; arguments and result as those of `Version1.refine`."""
        constant = self._constant(features, begin.place[:, 0], frames.shape[1])
        place, v = begin.place, begin.visible
        track = torch.where(started[..., None], points.description[0], 0)[:, None].expand(*v.shape, -1)
        shown = None if bool(started.all()) else started
        flags = torch.stack([mask.to(v), v], -1)
        states = []
        for _ in range(iterations):
            place = place.detach()
            found = correlate(features, frames, place, track, border=True)
            tokens = self._tokens(place, found, track, flags) + constant
            change = self.output(self.transformer(tokens.transpose(1, 2), shown)).float().transpose(1, 2)
            track = track + self._updated(change[..., 2:])
            place = place + change[..., :2]
            states.append(State(place, v))
        states[-1] = State(place, self.visible(track).squeeze(-1).float())
        return states if torch.is_grad_enabled() else states[-1:]

    def _constant(self, features: Features, place: Tensor, length: int) -> Tensor:
        """Return E_pos + E_time, (G, S, N, token), of places (G, N, 2) in the window's first frame."""
        where = embeddings.position(place, self.cells, TOKEN)
        return where[:, None] + embeddings.waves(length, TOKEN, place.device)[:, None]


def head(dim: int, outputs: int) -> nn.Linear:
    """Make a linear layer whose first outputs are small."""
    layer = nn.Linear(dim, outputs)
    nn.init.trunc_normal_(layer.weight, std=0.001)
    nn.init.zeros_(layer.bias)
    return layer
