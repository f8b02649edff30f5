"""Online tracking: frames go in as they come, tracks come out as soon as no later frame changes them.

    stream = method.stream(queries)
    for frames in source:                # (n, 3, H, W), any n
        tracks = stream.step(frames)     # of the frames that became settled, maybe none
    tracks = stream.finish()             # of the rest

`Method.stream` gives a method's own stream, or one of those here: `FlowStream` where tracks are made of flow,
`WindowStream` for all others. The memory of a stream does not grow with the frames that it has seen.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trackpl import chaining
from trackpl.errors import DataError, Error
from trackpl.types import Clip, Tracks

if TYPE_CHECKING:
    from trackpl.method import Method

WINDOW = 48
"""Frames of a window, for methods without a stream of their own; tracks come half a window after their frames."""


class Stream(ABC):
    """Tracks points through frames that come one after the other.

    A subclass defines `_step` and `_finish`, and where it needs them `_add`, `_latest` and `_reset`; counting and
    checking are done here, and the frames before a point's query, in which it rests hidden at its query.

    Attributes:
        equals_track: claims that what it hands out equals `Method.track` of the whole video, from each query frame on.
        adds_alike: claims that points added later change nothing in what comes of them or of others.
        frames: how many were taken.
        settled: how many were handed out.
        queries: (N, 3) of (t, x, y), t counted from the first frame of the stream.
    """

    equals_track: bool = False
    adds_alike: bool = True

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.reset()

    def reset(self) -> None:
        """Forget all frames and points: what comes next is another video."""
        self.frames = self.settled = 0
        self.queries = torch.zeros(0, 3, device=self.device)
        self.size: tuple[int, int] | None = None
        self.finished = False
        self._reset()

    @torch.no_grad()
    def add(self, queries: Tensor) -> None:
        """Track more points (N, 3) of (t, x, y), which come last, from frames on that are not settled yet.

        Raises:
            DataError: another shape, a frame that is settled, a place outside the frame.
        """
        queries = queries[0] if queries.ndim == 3 and len(queries) == 1 else queries
        if queries.ndim != 2 or queries.shape[1] != 3:
            raise DataError(f"queries of a stream must have shape (N, 3) of (t, x, y), got {tuple(queries.shape)}")
        if self.finished:
            raise Error("this stream is finished; reset it, or make another one")
        queries = queries.detach().to(self.device, torch.float32)
        self._check_queries(queries, len(self.queries))
        self.queries = torch.cat([self.queries, queries])
        self._add(queries)

    @torch.no_grad()
    def step(self, frames: Tensor) -> Tracks:
        """Take frames (n, 3, H, W), n >= 1, uint8 or float in [0, 1].

        Returns:
            `Tracks`, B = 1, of the frames that became settled by them, from `settled` as it was; maybe of none, T = 0.

        Raises:
            DataError: another shape, or frames of another size than those before.
        """
        if frames.ndim != 4 or frames.shape[1] != 3 or not len(frames):
            raise DataError(f"frames of a stream must have shape (n, 3, H, W), n >= 1, got {tuple(frames.shape)}")
        if self.finished:
            raise Error("this stream is finished; reset it, or make another one")
        size = (frames.shape[-2], frames.shape[-1])
        if self.size is None:
            self.size = size
            self._check_queries(self.queries, 0)
        if size != self.size:
            raise DataError(f"the frames of a stream must all be of one size: {self.size} before, {size} now")
        tracks = self._step(frames.to(self.device))
        self.frames += len(frames)
        return self._handed_out(tracks)

    @torch.no_grad()
    def finish(self) -> Tracks:
        """Return the tracks of the frames that are not settled yet; no more frames follow."""
        tracks = self._finish() if self.frames > self.settled else self._none()
        self.finished = True
        return self._handed_out(tracks)

    @torch.no_grad()
    def latest(self) -> Tracks | None:
        """Return the present estimate of frames from `settled` on, for a display; none where there is nothing new."""
        tracks = self._latest()
        return None if tracks is None else self._resting(tracks)

    # What a stream writes ------------------------------------------------------------------------------------------

    @abstractmethod
    def _step(self, frames: Tensor) -> Tracks:
        """Take frames (n, 3, H, W) on the device, the first of which has the number `self.frames`."""

    @abstractmethod
    def _finish(self) -> Tracks:
        """Return the tracks of the frames from `self.settled` to `self.frames`, of which there are some."""

    def _add(self, queries: Tensor) -> None:  # noqa: B027 - most streams need nothing here
        """Take note of points, which `self.queries` holds already."""

    def _latest(self) -> Tracks | None:
        return None

    def _reset(self) -> None:  # noqa: B027
        """Forget all."""

    # ---------------------------------------------------------------------------------------------------------------

    def _none(self) -> Tracks:
        """Make tracks of no frame."""
        empty = torch.zeros(1, 0, len(self.queries), device=self.device)
        return Tracks(empty[..., None].expand(-1, -1, -1, 2), empty)

    def _handed_out(self, tracks: Tracks) -> Tracks:
        tracks = self._resting(tracks)
        self.settled += tracks.xy.shape[1]
        return tracks

    def _resting(self, tracks: Tracks) -> Tracks:
        """Put points into their query place, hidden, in frames before their query."""
        t = self.settled + torch.arange(tracks.xy.shape[1], device=self.device)
        early = t[:, None] < self.queries[:, 0]
        xy = torch.where(early[..., None], self.queries[:, 1:], tracks.xy.float())
        visible = tracks.visible.float().masked_fill(early, 0)
        return Tracks(xy, visible, tracks.depth, tracks.confidence)

    def _check_queries(self, queries: Tensor, first: int) -> None:
        """Refuse a query that cannot be tracked; `first` is the number of the first of them."""
        t, x, y = queries.unbind(-1)
        h, w = self.size or (torch.inf, torch.inf)
        bad = ~((t >= self.settled) & (t == t.floor()) & (x >= 0) & (x <= w) & (y >= 0) & (y <= h))
        if bad.any():
            n = int(bad.int().argmax())
            place = f", x in [0, {w}], y in [0, {h}]" if self.size else ", x and y not negative"
            raise DataError(
                f"query {first + n} (t={t[n]:g}, x={x[n]:g}, y={y[n]:g}) cannot be tracked: "
                f"t is a whole number from {self.settled} on, the first frame that is not settled{place}"
            )


class WindowStream(Stream):
    """Streams any method: windows that overlap by half, in each of which a point starts where it was last seen.

    A point takes part from the first window on that has its query frame in its first half, so that what comes of it
    does not depend on when it was added. A video of at most one window gets what `track` gives.

    Args:
        method: any method that tracks.
        window: frames of a window, 2 or more.
    """

    def __init__(self, method: Method, window: int | None = None) -> None:
        self.method, self.window = method, WINDOW if window is None else window
        if self.window < 2:
            raise Error(f"a window of a stream needs 2 frames or more, got {window}")
        super().__init__(method.device)

    def _reset(self) -> None:
        self._images: list[Tensor] = []  # the frames of the window to come
        self._start = self._stop = 0  # its first frame; the end of the window before
        self._last = self.queries.clone()  # (N, 3): where and when each point was last seen
        self._joined = torch.zeros(0, dtype=torch.bool, device=self.device)  # (N,) taken part in a window
        self._xy = torch.zeros(0, 0, 2, device=self.device)  # (K, N, 2) estimates of K frames from _start on
        self._visible = torch.zeros(0, 0, device=self.device)

    def _add(self, queries: Tensor) -> None:
        k, n = len(self._xy), len(queries)
        self._last = torch.cat([self._last, queries])
        self._joined = torch.cat([self._joined, self._joined.new_zeros(n)])
        self._xy = torch.cat([self._xy, queries[None, :, 1:].expand(k, -1, -1)], 1)
        self._visible = torch.cat([self._visible, self._visible.new_zeros(k, n)], 1)

    def _step(self, frames: Tensor) -> Tracks:
        half, parts = self.window // 2, [self._none()]
        for frame in frames:
            self._images.append(frame.clone())  # a view would keep all of `frames` in memory
            if len(self._images) == self.window:
                self._track(self._joined | (self.queries[:, 0] < self._start + half))
                parts.append(self._settle(half))
        return join(parts)

    def _finish(self) -> Tracks:
        stop = self._start + len(self._images)
        here = self.queries[:, 0] < stop
        # Where the last window ended with the video, only points of its second half have not been tracked yet.
        self._track(here if stop > self._stop else here & ~self._joined)
        return self._settle(len(self._images))

    def _latest(self) -> Tracks | None:
        if not len(self._xy):
            return None
        return Tracks(self._xy[None], (self._visible * self._joined)[None])

    def _track(self, who: Tensor) -> None:
        """Track the points `who` (N,) bool through the window at hand."""
        new = len(self._images) - len(self._xy)
        self._xy = torch.cat([self._xy, self.queries[None, :, 1:].expand(new, -1, -1)])
        self._visible = torch.cat([self._visible, self._visible.new_zeros(new, len(self.queries))])
        self._joined = self._joined | who
        self._stop = self._start + len(self._images)
        index = who.nonzero()[:, 0]
        if not len(index):
            return
        local = self._last[index] - self._last.new_tensor([self._start, 0, 0])
        tracks = self.method.track(Clip(video=torch.stack(self._images)[None]), local[None])
        t = torch.arange(len(self._images), device=self.device)[:, None]
        after = t >= local[:, 0]
        xy, visible = tracks.xy[0].float(), tracks.visible[0].float()
        self._xy[:, index] = torch.where(after[..., None], xy, self._xy[:, index])
        self._visible[:, index] = torch.where(after, visible, self._visible[:, index])
        self._last[index] = self._last_seen(xy, visible * after)

    def _last_seen(self, xy: Tensor, visible: Tensor) -> Tensor:
        """Choose where the next window starts each point: its newest sure sight in the overlap, else its last place."""
        t = torch.arange(len(xy), device=xy.device)[:, None]
        sure = (visible >= 0.5) & (t >= self.window // 2)
        last = torch.where(sure.any(0), torch.where(sure, t, -1).amax(0), len(xy) - 1)
        place = xy.gather(0, last[None, :, None].expand(1, -1, 2))[0]
        assert self.size is not None
        place = torch.minimum(place.clamp(min=0), place.new_tensor([self.size[1], self.size[0]]))
        return torch.cat([(last + self._start).to(place)[:, None], place], 1)

    def _settle(self, n: int) -> Tracks:
        """Hand out the first n frames."""
        tracks = Tracks(self._xy[None, :n], self._visible[None, :n])
        self._xy, self._visible = self._xy[n:].clone(), self._visible[n:].clone()
        self._start += n
        del self._images[:n]
        return tracks


class FlowStream(Stream):
    """Streams a method that gives flow, by `chaining.reach`: every frame is settled at once, as `track` has it."""

    equals_track = True

    def __init__(self, method: Method) -> None:
        self.method = method
        super().__init__(method.device)

    def _reset(self) -> None:
        self._kept: dict[int, Any] = {}  # what flow needs of the last frames
        self._past: dict[int, chaining.State] = {}  # the points in them

    def _add(self, queries: Tensor) -> None:
        for t, state in self._past.items():
            more = chaining.begin(queries[None], t)
            self._past[t] = (
                torch.cat([state[0], more[0]], 1),
                torch.cat([state[1], more[1]], 1),
                torch.cat([state[2], more[2]], 1),
            )

    def _step(self, frames: Tensor) -> Tracks:
        states, queries, size = [], self.queries[None], (frames.shape[-2], frames.shape[-1])
        for t, frame in enumerate(frames, self.frames):
            self._kept[t] = self._encoded(frame[None])
            state = chaining.begin(queries, t)
            if bool((queries[..., 0] < t).any()):
                state = chaining.reach(t, 1, self._flow, size, queries, self._past, state)
            self._past[t] = state
            states.append(state)
            for kept in (self._kept, self._past):
                kept.pop(t - max(chaining.SPANS), None)
        xy, visible, error = (torch.stack(parts, 1) for parts in zip(*states, strict=True))
        return Tracks(xy, visible, confidence=chaining.confidence(error))

    def _finish(self) -> Tracks:
        return self._none()  # no frame is left

    def _encoded(self, frame: Tensor) -> Any:
        if not self.method.has("match"):
            return frame.clone()
        return self.method.encode(frame.float() / 255 if frame.dtype == torch.uint8 else frame.float())

    def _flow(self, pairs: Sequence[tuple[int, int]]) -> Tensor:
        assert self.size is not None
        if self.method.has("match"):
            flows = [self.method.match(self._kept[s], self._kept[t], self.size) for s, t in pairs]
            return torch.stack(flows, 1)
        used = sorted({t for pair in pairs for t in pair})
        clip = Clip(video=torch.stack([self._kept[t] for t in used], 1))
        return self.method.flow(clip, [(used.index(s), used.index(t)) for s, t in pairs]).xy


def stream_of(method: Method) -> Stream:
    """Make a stream for a method without one of its own."""
    return FlowStream(method) if method.has("flow") and not method.has("track") else WindowStream(method)


def join(parts: Sequence[Tracks]) -> Tracks:
    """Join tracks of frames that follow each other; a field that one with frames in it lacks is dropped."""
    parts = [p for p in parts if p.xy.shape[1]] or list(parts[:1])
    depth, confidence = [p.depth for p in parts], [p.confidence for p in parts]
    return Tracks(
        torch.cat([p.xy for p in parts], 1),
        torch.cat([p.visible for p in parts], 1),
        torch.cat([d for d in depth if d is not None], 1) if all(d is not None for d in depth) else None,
        torch.cat([c for c in confidence if c is not None], 1) if all(c is not None for c in confidence) else None,
    )
