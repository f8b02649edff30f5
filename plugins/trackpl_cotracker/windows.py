"""Sliding windows (3.4): groups of points are carried from window to window, each half over the one before.

The same code serves whole clips, unrolled training and streams. All groups share the windows: frames are counted from
each group's own first one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from trackpl_cotracker.features import Features
from trackpl_cotracker.state import Points, State


class Version(Protocol):
    """What a version of the model offers to the windows."""

    START: ClassVar[float]  # logit of a point that is new
    PADS_MASK: ClassVar[bool]  # the track mask is zero in frames repeated after the end
    JOINS: ClassVar[bool]  # points take part, and have estimates, from their first window on; else from the start
    confident: ClassVar[bool]  # there is a confidence
    sliding: bool  # else one window holds all frames
    entangled: bool  # it must be told of all points, also of those that join later
    window: int  # S

    def describe(self, features: Features, index: Tensor, place: Tensor) -> tuple[Tensor, ...]:
        """Read what describes the points of (G, N)."""

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
        """Update a window's state; with gradients every state, else the last."""


@dataclass(frozen=True)
class Window:
    """What was found in one window."""

    start: int  # its first frame, counted from each group's first
    groups: Tensor  # (g,) long: the groups that it holds
    states: list[State]  # after each update with gradients, else after the last; S frames, also beyond a group's end
    started: Tensor  # (g, N) bool: the points whose query lies before the window's end
    mask: Tensor  # (g, S, N) bool: frames still to be predicted when the window began


class Sliding:
    """Groups of points on their way through a video.

    Args:
        version: of the model.
        frame: (G, N) long query frames, counted from each group's first.
        place: (G, N, 2) of (x, y) in feature pixels.
        iterations: updates a window.
    """

    def __init__(self, version: Version, frame: Tensor, place: Tensor, iterations: int) -> None:
        self.version, self.iterations = version, iterations
        self.points = Points(frame, place.float())
        self.described = torch.zeros_like(frame, dtype=torch.bool)
        self.last: State | None = None  # of the window before
        self.before: State | None = None  # of the one before that

    def advance(self, features: Features, frames: Tensor, start: int, length: Tensor | None = None) -> Window | None:
        """Track through one window.

        Args:
            features: that hold all frames of the window.
            frames: (G, S) long into them; the last one is repeated after the end.
            start: the window's first frame; 0, then half a window on each time (version 3 offline: all frames at once).
            length: (G,) frames of each group, once they are known.

        Returns:
            The window, or nothing where points join later and none has started.
        """
        time = start + torch.arange(frames.shape[1], device=frames.device)
        query = self.points.frame
        started = query <= time[-1]
        begin = self._begin(frames.shape[1], start)
        self.before = self.last
        if self.version.JOINS and not bool(started.any()):
            self.last = begin
            return None
        self._describe(features, frames, start)
        mask = time[:, None] >= query[:, None]
        if start > 0:
            mask = mask & (time >= start + self.version.window // 2)[:, None]
        if self.version.PADS_MASK and length is not None:
            mask = mask & (time < length[:, None])[:, :, None]
        states = self._refine(features, frames, begin, mask, started)
        self.last = states[-1]
        groups = torch.arange(len(frames), device=frames.device)
        return Window(start, groups, states, started, mask)

    def add(self, frame: Tensor, place: Tensor) -> None:
        """Append points (G, n) with places (G, n, 2); their frames must not lie in the first half of a window done.

        Where one lies in the second half of the last window, `rewind` and do that one again: then all is as if they had
        been there from the start.
        """
        points = self.points
        empty = tuple(d.new_zeros(*frame.shape, *d.shape[2:]) for d in points.description)
        described = tuple(torch.cat(pair, 1) for pair in zip(points.description, empty, strict=True))
        self.points = Points(
            torch.cat([points.frame, frame], 1), torch.cat([points.place, place.float()], 1), described
        )
        self.described = torch.cat([self.described, torch.zeros_like(frame, dtype=torch.bool)], 1)
        for name in ("last", "before"):
            state: State | None = getattr(self, name)
            if state is not None:
                new = self._new(place, state.place.shape[1])
                setattr(self, name, _each(lambda a, b: torch.cat([a, b], 2), state, new))

    def remove(self, keep: Tensor) -> None:
        """Drop the points that are not in `keep` (N,) bool."""
        points = self.points
        described = tuple(d[:, keep] for d in points.description)
        self.points = Points(points.frame[:, keep], points.place[:, keep], described)
        self.described = self.described[:, keep]
        self._each_state(lambda a: a[:, :, keep])

    def keep_groups(self, index: Tensor) -> None:
        """Keep the groups `index` (g,) alone."""
        points = self.points
        described = tuple(d[index] for d in points.description)
        self.points = Points(points.frame[index], points.place[index], described)
        self.described = self.described[index]
        self._each_state(lambda a: a[index])

    def rewind(self) -> None:
        """Forget the last window, so that it can be done again; once."""
        self.last = self.before

    def _each_state(self, function: Callable[[Tensor], Tensor]) -> None:
        self.last = None if self.last is None else _each(function, self.last)
        self.before = None if self.before is None else _each(function, self.before)

    def _new(self, place: Tensor, length: int) -> State:
        """Return the state of points at (G, n, 2) that begin: at their query, everywhere."""
        place = place.float()[:, None].expand(-1, length, -1, -1)
        logit = place.new_full(place.shape[:3], self.version.START)
        return State(place, logit, logit if self.version.confident else None)

    def _begin(self, length: int, start: int) -> State:
        """Return the state (G, S, N) that a window begins with: carried over for points of windows before, else new."""
        new = self._new(self.points.place, length)
        half = length // 2
        if self.last is None or start == 0:
            return new
        old = (self.points.frame < start + half)[:, None]

        def carried(last: Tensor, fresh: Tensor) -> Tensor:
            held = last[:, -1:].expand(-1, length - half, *last.shape[2:])
            return torch.where(old[..., None] if last.ndim == 4 else old, torch.cat([last[:, half:], held], 1), fresh)

        return _each(carried, self.last, new)

    def _describe(self, features: Features, frames: Tensor, start: int) -> None:
        """Describe the points whose query frame is in the window and was in none before."""
        points = self.points
        offset = points.frame - start
        fresh = (offset >= 0) & (offset < frames.shape[1]) & ~self.described
        self.described = self.described | fresh
        some = fresh.any(0)
        if points.description and not bool(some.any()):
            return
        index = frames.gather(1, offset.clamp(0, frames.shape[1] - 1))
        if not points.description or bool(some.all()):  # those still to come get theirs when it is their turn
            found = self.version.describe(features, index, points.place)
            if points.description:
                found = tuple(_where(fresh, new, old) for new, old in zip(found, points.description, strict=True))
        else:
            some = some.nonzero()[:, 0]
            found = self.version.describe(features, index[:, some], points.place[:, some])
            found = tuple(
                _put(old, some, _where(fresh[:, some], new.to(old), old[:, some]))
                for new, old in zip(found, points.description, strict=True)
            )
        self.points = replace(points, description=found)

    def _refine(self, features: Features, frames: Tensor, begin: State, mask: Tensor, started: Tensor) -> list[State]:
        """Update the window; where points join, only those that have in some group."""
        some = started.any(0)
        if not self.version.JOINS or self.version.entangled or bool(some.all()):
            return self.version.refine(features, frames, self.points, begin, mask, started, self.iterations)
        some = some.nonzero()[:, 0]
        points = Points(
            self.points.frame[:, some],
            self.points.place[:, some],
            tuple(d[:, some] for d in self.points.description),
        )
        part = _each(lambda a: a[:, :, some], begin)
        states = self.version.refine(
            features, frames, points, part, mask[:, :, some], started[:, some], self.iterations
        )
        return [_each(lambda whole, s: whole.index_copy(2, some, s), begin, state) for state in states]


def unroll(
    version: Version,
    features: Features,
    frames: Tensor,
    lengths: Tensor,
    frame: Tensor,
    place: Tensor,
    iterations: int,
) -> Iterator[Window]:
    """Track groups of points through all their windows; a group drops out after its last one.

    Args:
        version: of the model.
        features: of all frames.
        frames: (G, T) long: where each frame of each group is in the features.
        lengths: (G,) frames of each group, T at most; what `frames` names beyond is not looked at.
        frame: (G, N) long query frames, counted from each group's first.
        place: (G, N, 2) of (x, y) in feature pixels.
        iterations: updates a window.
    """
    if not version.sliding:
        yield from _whole(version, features, frames, lengths, frame, place, iterations)
        return
    size, half = version.window, version.window // 2
    sliding = Sliding(version, frame, place, iterations)
    groups = torch.arange(len(frames), device=frames.device)
    last = lengths - 1
    lengths = lengths.clamp(min=half + 1)  # of a shorter one the last frame is repeated
    ends = lengths.tolist()
    for start in range(0, max(ends) - half, half):
        if min(ends) <= start + half:
            alive = lengths > start + half
            groups, last, lengths = groups[alive], last[alive], lengths[alive]
            sliding.keep_groups(alive)
            ends = lengths.tolist()
        time = start + torch.arange(size, device=frames.device)
        index = frames[groups].gather(1, time.minimum(last[:, None]))
        window = sliding.advance(features, index, start, lengths)
        if window is not None:
            yield replace(window, groups=groups)


def _whole(
    version: Version,
    features: Features,
    frames: Tensor,
    lengths: Tensor,
    frame: Tensor,
    place: Tensor,
    iterations: int,
) -> Iterator[Window]:
    """Track each group in one window over all of its frames; groups of one length together."""
    for length in sorted(set(lengths.tolist())):
        groups = (lengths == length).nonzero()[:, 0]
        sliding = Sliding(version, frame[groups], place[groups], iterations)
        window = sliding.advance(features, frames[groups, :length], 0, lengths[groups])
        if window is not None:
            yield replace(window, groups=groups)


def track_groups(
    version: Version,
    features: Features,
    frames: Tensor,
    lengths: Tensor,
    frame: Tensor,
    place: Tensor,
    iterations: int,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Track groups of points through all their frames; arguments as those of `unroll`.

    Returns:
        Places (G, T, N, 2) in feature pixels, probabilities of being visible and, in version 3, of being right
        (G, T, N). In frames that no window holds for a point, and beyond a group's end, places are 0 and
        probabilities 0.5.
    """
    shape = (*frames.shape, frame.shape[1])
    xy = place.new_zeros(*shape, 2, dtype=torch.float32)
    visible = torch.full(shape, 0.5, device=place.device)
    confidence = torch.full_like(visible, 0.5) if version.confident else None
    for window in unroll(version, features, frames, lengths, frame, place, iterations):
        last = window.states[-1]
        time = window.start + torch.arange(last.place.shape[1], device=frames.device)
        written = (time < lengths[window.groups, None])[:, :, None]
        if version.JOINS:
            written = written & window.started[:, None]
        stop = min(int(time[-1]) + 1, frames.shape[1])
        where = (window.groups, slice(window.start, stop))
        written = written[:, : stop - window.start]
        found = [(xy, last.place), (visible, last.visible.sigmoid())]
        if confidence is not None and last.confidence is not None:
            found.append((confidence, last.confidence.sigmoid()))
        for whole, new in found:
            new = new[:, : stop - window.start]
            whole[where] = torch.where(written[..., None] if new.ndim == 4 else written, new, whole[where])
    return xy, visible, confidence


def _each(function: Callable[..., Tensor], *states: State) -> State:
    """Apply a function to each part of states."""
    place = function(*(s.place for s in states))
    visible = function(*(s.visible for s in states))
    known = [s.confidence for s in states if s.confidence is not None]
    return State(place, visible, function(*known) if known else None)


def _where(condition: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """Choose rows (G, N) of (G, N, ...)."""
    return torch.where(condition.view(*condition.shape, *[1] * (new.ndim - 2)), new, old)


def _put(whole: Tensor, points: Tensor, new: Tensor) -> Tensor:
    """Replace some points of (G, N, ...); in place if there are no gradients."""
    return whole.index_copy(1, points, new) if torch.is_grad_enabled() else whole.index_copy_(1, points, new)
