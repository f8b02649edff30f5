"""Which points are tracked together and which frames they see: joint and single-point protocol, both directions.

A group is a set of points that attend to each other. It names its frames by their index into the features of the batch,
in the order in which it sees them: a reversed order is the backward pass, a late first frame is a clip that was cropped
to a query. Nothing is copied for either.

G groups of N points, L frames of the longest group, T frames of a video; places are feature pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Found = tuple[Tensor, Tensor, Tensor | None]  # place (.., T, N, 2), visible (.., T, N), confidence (.., T, N) or None


@dataclass(frozen=True)
class Groups:
    """Points that attend to each other, group by group; those asked for come first, their support after them."""

    frames: Tensor  # (G, L) long, indices into the features; beyond its length a group names its last again
    lengths: Tensor  # (G,) long
    frame: Tensor  # (G, N) long, query frames counted along `frames`
    place: Tensor  # (G, N, 2)
    when: Tensor  # (G, T) long: where along `frames` each frame of the video is, 0 for one that is not there

    def of(self, part: Tensor) -> Groups:
        """Return the groups `part` (g,) long, over no more frames than they have."""
        longest = int(self.lengths[part].max())
        return Groups(
            self.frames[part, :longest], self.lengths[part], self.frame[part], self.place[part], self.when[part]
        )


def joint(frame: Tensor, place: Tensor, total: int, support: Tensor, backward: bool) -> Groups:
    """Make one group a video: all its points, with support points in its first frame, whatever the direction.

    Args:
        frame: (B, N) long.
        place: (B, N, 2).
        total: T.
        support: (n, 2) places.
        backward: see the frames from the last to the first.
    """
    b = len(frame)
    time = torch.arange(total, device=frame.device).expand(b, -1)
    frame = torch.cat([frame, frame.new_zeros(b, len(support))], 1)
    if backward:
        frame, time = total - 1 - frame, total - 1 - time
    place = torch.cat([place, support.expand(b, -1, -1)], 1)
    first = torch.arange(b, device=frame.device)[:, None] * total
    return Groups(first + time, frame.new_full((b,), total), frame, place, time)


def single(
    video: Tensor, frame: Tensor, place: Tensor, total: int, support: Tensor, backward: bool, crop: bool
) -> Groups:
    """Make one group a point, with support points in the first frame that the pass sees.

    Args:
        video: (G,) long: which video of the batch each point is of.
        frame: (G,) long.
        place: (G, 2).
        total: T.
        support: (G, n, 2) places.
        backward: see the frames from the last to the first.
        crop: begin in the point's query frame (versions 1 and 2), not in the first of the video (3).
    """
    end = total - 1
    time = torch.arange(total, device=frame.device)
    when = time
    if backward:
        frame, when = end - frame, end - when
    begin = frame if crop else torch.zeros_like(frame)
    seen = (begin[:, None] + time).clamp(max=end)
    seen = end - seen if backward else seen
    return Groups(
        seen + video[:, None] * total,
        total - begin,
        torch.cat([(frame - begin)[:, None], frame.new_zeros(len(frame), support.shape[1])], 1),
        torch.cat([place[:, None], support], 1),
        (when - begin[:, None]).clamp(min=0),
    )


def track_in_parts(
    groups: Groups, needed: Tensor, points: int, size: int, track: Callable[[Groups], Found], confident: bool
) -> Found:
    """Track groups, as many at a time as have about `size` points together, the longest first.

    Args:
        groups: (G).
        needed: (G,) bool; the others are left out, with their points staying where they are queried, at probability 0.
        points: how many points of each group are asked for.
        size: of a part; a group is never split.
        track: gives places (g, L, N, 2), visible and confidence (g, L, N) of some groups, along their frames.
        confident: whether there is a confidence.

    Returns:
        What was found of the points asked for in each frame of the video, (G, T, points, ..).
    """
    shape = (*groups.when.shape, points)
    place = groups.place[:, None, :points].float().expand(*shape, 2).contiguous()
    visible = place.new_zeros(shape)
    found = (place, visible, torch.zeros_like(visible) if confident else None)
    rows = needed.nonzero()[:, 0]
    rows = rows[groups.lengths[rows].argsort(descending=True)]
    for some in rows.split(max(1, size // groups.frame.shape[1])) if len(rows) else ():
        part = groups.of(some)
        each = torch.arange(len(some), device=some.device)[:, None]
        for whole, new in zip(found, track(part), strict=True):
            if whole is not None and new is not None:
                whole[some] = new[each, part.when, :points]
    return found


def merge(forward: Found, backward: Found, earlier: Tensor) -> Found:
    """Take frames from the backward pass where `earlier` (.., T, N) says so, else from the forward pass."""
    place = torch.where(earlier[..., None], backward[0], forward[0])
    visible = torch.where(earlier, backward[1], forward[1])
    if forward[2] is None or backward[2] is None:
        return place, visible, None
    return place, visible, torch.where(earlier, backward[2], forward[2])


def unseen(frame: Tensor, total: int, window: int) -> Tensor:
    """Return which frames come before the first window that holds each point (B, N): (B, T, N).

    The authors' version 1 takes these alone from its backward pass. The frames of that window that come before the
    query keep what the forward pass says, which means nothing.
    """
    half = window // 2
    first = (frame - window + half).div(half, rounding_mode="floor").clamp(min=0) * half
    return torch.arange(total, device=frame.device)[:, None] < first[:, None]
