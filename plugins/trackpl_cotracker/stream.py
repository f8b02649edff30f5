"""Online tracking: the sliding windows of versions 1, 2 and 3 online, done as soon as their frames are there.

A window needs S frames, and the next one, half a window later, may change its second half: tracks come half a window
to a whole one after their frames. Nothing is computed that the offline call would not, and all is equal to it. The
features of one and a half windows are kept, in a table whose rows are used in turn.

A stream of the reversed video, which the platform uses for the frames before the queries of a long one, begins with the
last query frame and has its support points there; the backward pass of `track` begins with the last frame of the video,
and its support points lie in the first. So those frames are equal only where the two agree.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trackpl import Tracks
from trackpl.streams import Stream, WindowStream, join
from trackpl_cotracker.features import Features
from trackpl_cotracker.grids import global_grid
from trackpl_cotracker.state import State
from trackpl_cotracker.version3 import Version3
from trackpl_cotracker.windows import Sliding

if TYPE_CHECKING:
    from trackpl_cotracker.method import CoTracker


class SlidingStream(Stream):
    """Tracks points together, with the support grid of the method, window after window.

    A point added later whose query frame the last window holds has that window done again, so that everything not
    handed out yet is as if it had been asked for from the start. In version 3 as published that holds but for the small
    influence that points have on others before their query frame, which needs to know them; `mask_unstarted` does
    without it, and adding is exact there too.
    """

    equals_track = True

    def __init__(self, method: CoTracker) -> None:
        self.method, self.model = method, method.model
        known = isinstance(self.model, Version3) and not self.model.mask_unstarted  # points feel those still to come
        self.adds_alike = not (known or self.model.entangled)
        self.half = self.model.window // 2
        super().__init__(method.device)

    def _reset(self) -> None:
        self._table: Features | None = None  # frame t is in row t % (3 half)
        self._seen = 0  # frames in it, counted from the first ever
        self._start = 0  # first frame of the window to come
        self._sliding: Sliding | None = None
        self._support = 0  # points after those asked for
        self._state: State | None = None  # at the end of the last window

    def _step(self, frames: Tensor) -> Tracks:
        parts = [self._none()]
        while len(frames):
            some = frames[: self._start + self.model.window - self._seen]
            frames = frames[len(some) :]
            self._take(some)
            if self._seen == self._start + self.model.window:
                self._advance(self._start)
                parts.append(self._tracks(0, self.half))
                self._start += self.half
        return join(parts)

    def _finish(self) -> Tracks:
        left = self._seen - self._start
        if self._start and left == self.half:  # the video ended with the last window
            return self._tracks(self.half, self.half + left)
        self._advance(self._start)
        return self._tracks(0, left)

    def _latest(self) -> Tracks | None:
        return self._tracks(self.half, self.model.window) if self._start else None

    def _add(self, queries: Tensor) -> None:
        if self._sliding is None:
            return
        frame, place = self._points(queries)
        self._sliding.add(frame, place)
        # The support points stay the last, as offline: another order would round otherwise.
        old, new = len(self.queries) - len(queries), len(queries)
        order = torch.arange(old + self._support + new, device=self.device)
        self._sliding.remove(torch.cat([order[:old], order[old + self._support :], order[old : old + self._support]]))
        if bool((frame < self._start + self.half).any()):
            self._sliding.rewind()
            self._advance(self._start - self.half)
        self._state = self._sliding.last

    def _take(self, frames: Tensor) -> None:
        """Put the features of frames into the table."""
        new = self.method.extract(frames)
        rows = 3 * self.half
        if self._table is None:
            self._table = Features(tuple(x.new_zeros(rows, *x.shape[1:]) for x in new.levels), new.size)
        index = torch.arange(self._seen, self._seen + len(frames), device=self.device) % rows
        for level, values in zip(self._table.levels, new.levels, strict=True):
            level[index] = values
        self._seen += len(frames)

    def _advance(self, start: int) -> None:
        """Do the window from frame `start` on; after the last frame it is repeated."""
        assert self._table is not None
        if self._sliding is None:
            self._sliding = self._begin(self._table.size)
        time = torch.arange(start, start + self.model.window, device=self.device).clamp(max=self._seen - 1)
        length = torch.tensor([max(self._seen, self.half + 1)], device=self.device)
        self._sliding.advance(self._table, (time % (3 * self.half))[None], start, length)
        self._state = self._sliding.last

    def _begin(self, size: tuple[int, int]) -> Sliding:
        support = global_grid(self.method.version, self.method.support_grid, size) / self.model.stride
        self._support = len(support)
        frame, place = self._points(self.queries)
        frame = torch.cat([frame, frame.new_zeros(1, len(support))], 1)
        place = torch.cat([place, support.to(place)[None]], 1)
        return Sliding(self.model, frame, place, self.model.iterations[1])

    def _points(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        assert self.size is not None
        return queries[None, :, 0].long(), self.method.to_features(queries[None, :, 1:], self.size)

    def _tracks(self, begin: int, end: int) -> Tracks:
        """Return some frames of the last window, in pixels; the first of them is not settled yet."""
        assert self._state is not None and self.size is not None
        state, part = self._state, (slice(None), slice(begin, end), slice(len(self.queries)))
        confidence = None if state.confidence is None else state.confidence[part].sigmoid()
        found = (state.place[part], state.visible[part].sigmoid(), confidence)
        queries = self.queries - self.queries.new_tensor([self._start, 0, 0])
        return self.method.tracks(found, self.size, queries[None])


def stream_of(method: CoTracker) -> Stream:
    """Make the stream of a method.

    Version 3 offline sees all frames at once and the single protocol gives each point windows of its own: they get the
    windows of the platform, which start each point anew where it was last seen and do not equal `track`. Those of
    version 3 are as long as its table of times, that is, as the clips that it was trained on.
    """
    if method.bidirectional:
        return WindowStream(method, method.model.window)
    return WindowStream(method) if method.protocol == "single" else SlidingStream(method)
