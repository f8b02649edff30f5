"""Which points of a training clip are tracked, and from where: the laws of versions 1, 2 and 3 (3.5, 6, 7.1).

A track may be chosen if it is seen in the first or in the middle frame; one that is seen in both has two tickets and
may come twice. A quarter of the points chosen start in a random one of the frames that show them, the others in the
first one; all points of version 3 offline start in a random one.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from trackpl.errors import DataError
from trackpl.types import Clip

FAR = 1000.0  # pixels from the middle of the frame; version 3 takes no track that ever is farther off


def usable(clip: Clip) -> Tensor:
    """Return where a track can be queried (B, T, N): it is visible, supervised and inside the frame.

    Raises:
        DataError: a clip without tracks.
    """
    if clip.tracks is None or clip.visible is None:
        raise DataError("cotracker learns from tracks; data.fields must hold tracks and visible")
    h, w = clip.size
    x, y = clip.tracks.unbind(-1)
    inside = (x >= 0) & (x <= w) & (y >= 0) & (y <= h)
    return clip.visible & inside & (True if clip.valid is None else clip.valid)


def choose_points(clip: Clip, points: int, *, last: bool = False, far: float | None = None) -> Clip:
    """Draw `points` tracks of each clip from those seen in its first or middle frame.

    Where all tickets of a clip are fewer, the clip has so many points, those of other clips of its batch being filled
    up with ones that are not supervised. A clip without any ticket draws from the tracks seen at all.

    Args:
        clip: batch with tracks.
        points: number to draw.
        last: a track seen in the last frame has a ticket too (version 3 offline).
        far: leave out tracks that ever are farther than this from the middle of the frame, in pixels.

    Returns:
        The clip with `tracks`, `visible` and `valid` (and `queries`, `track_depth`) of the points drawn.
    """
    seen = usable(clip)
    assert clip.tracks is not None and clip.visible is not None
    frames, device = clip.frames, seen.device
    if far is not None:
        middle = clip.tracks.new_tensor([clip.size[1] / 2, clip.size[0] / 2])
        seen = seen & ((clip.tracks - middle).norm(dim=-1) <= far).all(1, keepdim=True)
    tickets = seen[:, [0, frames // 2, *([frames - 1] if last else [])]]
    tickets[:, 0] |= ~tickets.flatten(1).any(1, keepdim=True) & seen.any(1)
    b, k, n = tickets.shape
    rank = torch.rand(b, k * n, device=device).masked_fill(~tickets.flatten(1), 2)
    count = tickets.flatten(1).sum(1)
    size = min(points, max(int(count.max()), 1))
    track = rank.argsort(1)[:, :size] % n  # (B, size)
    drawn = torch.arange(size, device=device) < count[:, None]

    def take(x: Tensor) -> Tensor:
        shape = (b, frames, size, *x.shape[3:])
        index = track.view(b, 1, size, *([1] * (x.ndim - 3))).expand(shape)
        return x.gather(2, index)

    valid = torch.ones_like(clip.visible) if clip.valid is None else clip.valid
    return dataclasses.replace(
        clip,
        tracks=take(clip.tracks),
        visible=take(clip.visible),
        valid=take(valid) & drawn[:, None],
        track_depth=None if clip.track_depth is None else take(clip.track_depth),
        queries=None if clip.queries is None else clip.queries.gather(1, track[..., None].expand(-1, -1, 3)),
    )


def choose_queries(clip: Clip, *, random: float = 0.25) -> tuple[Tensor, Tensor]:
    """Choose the frame in which each track of a clip is queried.

    Args:
        clip: batch with tracks.
        random: share of the points, the first ones, that start in a random frame that shows them; the others start in
            the first that does. 1 for version 3 offline.

    Returns:
        Queries (B, N, 3), and (B, N) bool whether the track can be queried at all; one that cannot gets the middle of
        frame 0.
    """
    seen = usable(clip)
    assert clip.tracks is not None
    n = seen.shape[2]
    chance = torch.rand(seen.shape, device=seen.device)
    chance[:, :, int(random * n) :] = 1  # alike: the first of the largest wins
    frame = torch.where(seen, chance, -1).argmax(1)  # (B, N)
    xy = clip.tracks.gather(1, frame[:, None, :, None].expand(-1, 1, -1, 2))[:, 0]
    possible = seen.any(1)
    xy = torch.where(possible[..., None], xy, xy.new_tensor([clip.size[1] / 2, clip.size[0] / 2]))
    return torch.cat([frame[..., None].to(xy.dtype), xy], -1), possible
