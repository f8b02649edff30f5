"""CoTracker as in the paper: joint attention of all points of a group (3.1-3.3).

Symbols: P place, Q feature of a track, v logit of visibility, m track mask, C correlation; G groups of N points over a
window of S frames.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trackpl_cotracker import correlation, embeddings
from trackpl_cotracker.correlation import correlate
from trackpl_cotracker.encoder import CHANNELS, Encoder
from trackpl_cotracker.features import Features, extract, sample
from trackpl_cotracker.state import Points, State
from trackpl_cotracker.transformer import FactorisedTransformer

TOKEN = 2 + 2 * embeddings.DISPLACEMENT + correlation.SIZE + CHANNELS + 2


class Version1(nn.Module):
    """Tokens, a factorised transformer, and M updates of a window.

    Args:
        stride: of the features, 4 or 8.
        window: S frames.
        iterations: M in training and in evaluation.
        dim: width of the transformer.
        heads: of its attention.
        time: number of its time blocks.
        space: number of its group blocks.
        entangled: cut m and v into tokens as the released weights were trained, see `_entangle`; else each token holds
            its own, as the paper has it.
    """

    START: ClassVar[float] = 10.0  # v of a point that is new
    PADS_MASK: ClassVar[bool] = True  # m is zero in frames repeated after the end
    JOINS: ClassVar[bool] = True  # points take part from their first window on
    confident: ClassVar[bool] = False
    sliding = True
    entangled: bool = False

    def __init__(
        self,
        stride: int = 4,
        window: int = 8,
        iterations: tuple[int, int] = (4, 6),
        dim: int = 384,
        heads: int = 8,
        time: int = 6,
        space: int = 6,
        entangled: bool = False,
    ) -> None:
        super().__init__()
        self.stride, self.window, self.iterations = stride, window, iterations
        self.entangled = entangled
        self.encoder = Encoder(stride)
        self.transformer = FactorisedTransformer(TOKEN, 2 + CHANNELS, dim, heads, time, space)
        self.update_norm = nn.GroupNorm(1, CHANNELS)
        self.update = nn.Linear(CHANNELS, CHANNELS)
        self.visible = nn.Linear(CHANNELS, 1)

    def encode(self, images: Tensor, prepare: Callable[[Tensor], Tensor] | None = None) -> Features:
        """Compute the features of frames (F, 3, H, W) in [-1, 1], or of what `prepare` makes of them."""
        return extract(self.encoder, images, prepare)

    def describe(self, features: Features, index: Tensor, place: Tensor) -> tuple[Tensor, ...]:
        """Read Q, (G, N, 128), at places (G, N, 2) of frames `index` (G, N)."""
        return (sample(features.levels[0], index, place),)

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
        """Update the state of a window M times.

        Args:
            features: of all frames.
            frames: (G, S) long into them.
            points: with their descriptions.
            begin: state that the window begins with.
            mask: (G, S, N) bool, where m is one.
            started: (G, N) bool; the others are not looked at.
            iterations: M.

        Returns:
            The state after each update with gradients, else after the last; v is predicted after the last alone.
        """
        constant = self._constant(features, begin.place[:, 0], len(frames[0]))
        place, v = begin.place, begin.visible
        track = points.description[0][:, None].expand(*begin.visible.shape, -1)
        joined = None if bool(started.all()) else started
        flags = torch.stack([mask.to(v), v], -1)
        if self.entangled:
            flags = _entangle(flags, points.frame, started)
        states = []
        for _ in range(iterations):
            place = place.detach()
            found = correlate(features, frames, place, track, border=False)
            tokens = self._tokens(place, found, track, flags) + constant
            change = self.transformer(tokens.transpose(1, 2), joined).float().transpose(1, 2)
            track = track + self._updated(change[..., 2:])
            place = place + change[..., :2]
            states.append(State(place, v))
        states[-1] = State(place, self.visible(track).squeeze(-1).float())
        return states if torch.is_grad_enabled() else states[-1:]

    def _constant(self, features: Features, place: Tensor, length: int) -> Tensor:
        """Return E_pos + E_time, (G, S, N, token), of places (G, N, 2) in the window's first frame."""
        h, w = features.levels[0].shape[1:3]
        where = embeddings.position(place, (h, w), TOKEN)
        return where[:, None] + embeddings.waves(length, TOKEN, place.device)[:, None]

    def _tokens(self, place: Tensor, found: Tensor, track: Tensor, flags: Tensor) -> Tensor:
        """Return the tokens (G, S, N, token) of a state, without what is constant."""
        moved = embeddings.displacement(place - place[:, :1])
        return torch.cat([moved, found, track, flags], -1)

    def _updated(self, change: Tensor) -> Tensor:
        """Return the change of Q from the transformer's (..., 128)."""
        norm = self.update_norm
        change = F.layer_norm(change, change.shape[-1:], norm.weight, norm.bias, norm.eps)
        return F.gelu(self.update(change)).float()


def _entangle(flags: Tensor, frame: Tensor, started: Tensor) -> Tensor:
    """Mix up m and v (G, S, N, 2) of different points as the released code does, and its weights expect.

    All m of a group's n started points, (n, S) in the order of their query frames, and then all v make one list of
    2 n S numbers; the first two are cut off for the first frame of the first point, and so on. Points of one frame are
    in the order in which torch happens to sort all of them, as in the released code; `frame` must hold them all.
    """
    groups, length, points, _ = flags.shape
    order = frame.sort(dim=1)[1]  # those that started come first
    rank = order.argsort(1)
    count = started.sum(1).view(-1, 1, 1, 1)
    first = (rank[:, None] * length + torch.arange(length, device=frame.device)[:, None]) * 2
    k = first[..., None] + torch.arange(2, device=frame.device)  # (G, S, N, 2) places in the list
    is_v = k >= count * length
    k = k - is_v * count * length
    point = order.gather(1, (k // length).clamp(max=points - 1).flatten(1)).view(k.shape)
    group = torch.arange(groups, device=frame.device).view(-1, 1, 1, 1)
    return flags[group, k % length, point, is_v.long()]
