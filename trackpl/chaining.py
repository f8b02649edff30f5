"""Tracks made of flow.

They follow Neoral, Serych, Matas, "MFT: Long-Term Tracking of Every Pixel" (WACV 2024) in its idea, without its learned
uncertainty: a point of frame t is reached from several earlier frames, by steps of one frame and by longer ones, each
is judged by its forward-backward error, and the most consistent is kept. Long steps do not drift and jump over
occlusions; short ones survive large changes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from trackpl.types import Tracks

SPANS = (1, 3, 9, 27)
"""Lengths in frames of the steps that tracks from flow try: powers, so that few steps reach any frame."""

STRAY = 0.02
"""Share of the frame's diagonal by which a long step may differ from a consistent step of one frame."""

OCCLUDED = 4.0
"""Pixels by which a step from a hidden point must be more consistent than one from a visible point."""

Progress = Callable[[int, int], None]
FlowOf = Callable[[list[tuple[int, int]]], Tensor]
State = tuple[Tensor, Tensor, Tensor]
"""The points in one frame: xy (B, N, 2), visible (B, N), error summed along the way (B, N) in pixels."""


def follow(
    flow_of: FlowOf,
    frames: int,
    size: tuple[int, int],
    queries: Tensor,
    progress: Progress | None = None,
    spans: Sequence[int] = SPANS,
) -> Tracks:
    """Track points by flow, forwards and backwards from their query frames.

    Args:
        flow_of: gives the flow (B, P, 2, H, W) of P frame pairs.
        frames: T.
        size: H, W.
        queries: (B, N, 3).
        progress: called with (frames done, frames in all).
        spans: lengths of the steps to try.

    Returns:
        `Tracks`; `visible` falls smoothly with the forward-backward error of the step that was kept, and is 0 outside
        the frame; `confidence` falls with the error summed along the way.
    """
    n, born = queries.shape[1], queries[..., 0].long()
    states = {t: begin(queries, t) for t in range(frames)}
    first, last = (int(born.min()), int(born.max())) if n else (frames, 0)
    todo = [(t, 1) for t in range(first + 1, frames)] + [(t, -1) for t in range(last - 1, -1, -1)]
    for done, (t, direction) in enumerate(todo):
        states[t] = reach(t, direction, flow_of, size, queries, states, states[t], spans)
        if progress:
            progress((done + 1) * frames // len(todo), frames)
    xy, visible, error = (torch.stack(parts, 1) for parts in zip(*states.values(), strict=True))
    return Tracks(xy, visible, confidence=confidence(error))


def begin(queries: Tensor, t: int) -> State:
    """Place every point of queries (B, N, 3) at its query in frame t, visible if that is its frame."""
    visible = (queries[..., 0] == t).float()
    return queries[..., 1:].float(), visible, torch.zeros_like(visible)


def confidence(error: Tensor) -> Tensor:
    """Turn the error in pixels, summed along the way of a point, into a confidence in (0, 1]."""
    return (-error / 8).exp()


def reach(
    t: int,
    direction: int,
    flow_of: FlowOf,
    size: tuple[int, int],
    queries: Tensor,
    past: Mapping[int, State],
    now: State,
    spans: Sequence[int] = SPANS,
) -> State:
    """Bring every point born before frame t, in the given direction of time, there by its most consistent step.

    Args:
        t: the frame to reach.
        direction: 1 forwards, -1 backwards.
        flow_of: gives the flow of frame pairs.
        size: H, W.
        queries: (B, N, 3).
        past: the points in the frames that steps can start from.
        now: the points in frame t as they are so far; those not born before it stay.
        spans: lengths of the steps to try.

    Returns:
        The points in frame t: xy (B, N, 2), visible (B, N), error (B, N).
    """
    xy, visible, error = now
    born = queries[..., 0].long()
    alive = (born - t) * direction < 0
    origin = born[alive]
    sources = {t - direction * s for s in spans} & set(past)
    sources = {s for s in sources if bool(((origin - s) * direction <= 0).any())}
    order = sorted(sources, key=lambda s: abs(t - s))
    both = flow_of([(s, t) for s in order] + [(t, s) for s in order])

    best = torch.full_like(error, float("inf"))
    nearest, trusted = xy, torch.zeros_like(alive)
    for i, s in enumerate(order):  # the shortest step first
        there, back = both[:, i], both[:, len(order) + i]
        from_xy, from_visible, from_error = past[s]
        step = sample(there, from_xy)
        place = from_xy + step
        returned = sample(back, place)
        gap = (step + returned).norm(dim=-1)
        # Where the frame shows nothing to return from, or the step started unseen, little can be believed.
        cost = from_error + gap + OCCLUDED * (1 - from_visible)
        # A long step corrects drift; one that leaves a good short step far behind has met a lookalike.
        stray = trusted & ((place - nearest).norm(dim=-1) > STRAY * math.hypot(*size))
        better = (cost < best) & alive & ((born - s) * direction <= 0) & ~stray
        best = torch.where(better, cost, best)
        xy = torch.where(better[..., None], place, xy)
        seen = _consistent(gap, step, returned) * _in_frame(place, size)
        if s == order[0]:
            nearest, trusted = place, (seen > 0.5) & (from_visible > 0.5)
        visible = torch.where(better, seen, visible)
        error = torch.where(better, from_error + gap, error)
    return xy, visible, error


def _consistent(gap: Tensor, step: Tensor, returned: Tensor) -> Tensor:
    """Probability that a step lands on the same surface: 1/2 at |f + f'|^2 = 0.01 (|f|^2 + |f'|^2) + 1.5^2 px."""
    limit = 0.01 * (step.square().sum(-1) + returned.square().sum(-1)) + 1.5**2
    return torch.sigmoid(2 * (1 - gap.square() / limit))


def _in_frame(place: Tensor, size: tuple[int, int]) -> Tensor:
    x, y = place.unbind(-1)
    return ((x >= 0) & (x <= size[1]) & (y >= 0) & (y <= size[0])).to(place.dtype)


def sample(field: Tensor, xy: Tensor) -> Tensor:
    """Read a field (B, C, H, W) at pixels xy (B, N, 2), bilinear, border beyond: (B, N, C)."""
    h, w = field.shape[-2:]
    grid = xy.unsqueeze(1) / xy.new_tensor([w, h]) * 2 - 1
    out = F.grid_sample(field.float(), grid, padding_mode="border", align_corners=False)
    return out[:, :, 0].mT
