"""Capabilities that the platform makes for a method out of those it has.

`track` from flow (`trackpl.chaining`), `track_dense` from sparse tracks, and tracks through a video of any length from
either (`trackpl.streams`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from trackpl.chaining import SPANS, FlowOf, Progress, follow, sample
from trackpl.errors import Error
from trackpl.streams import Stream, join
from trackpl.types import Clip, DenseTracks, Flow, Tracks

if TYPE_CHECKING:
    from trackpl.method import Method

VIDEO_BYTES = 1 << 30
"""A video that decodes to more than this is tracked without ever being held whole."""

FLOW_BYTES = 1 << 28
"""Flow of a clip that is kept: points born in the middle go back over the pairs that others came by."""


class Frames(Protocol):
    """A video whose frames are decoded on demand, such as `trackpl.video.VideoReader`."""

    frames: int
    size: tuple[int, int]

    def read(self, indices: Sequence[int]) -> Tensor:
        """Decode frames: (n, 3, H, W) uint8."""


def grid_queries(clip: Clip, n: int, frame: int = 0) -> Tensor:
    """Make queries (B, n * n, 3) at the centres of n x n cells of `frame`."""
    h, w = clip.size
    step = (torch.arange(n, device=clip.video.device) + 0.5) / n
    y, x = torch.meshgrid(step * h, step * w, indexing="ij")
    grid = torch.stack([torch.full_like(x, frame), x, y], -1).view(1, -1, 3)
    return grid.expand(clip.video.shape[0], -1, -1)


@torch.no_grad()
def flow(method: Method, clip: Clip, pairs: Sequence[tuple[int, int]]) -> Flow:
    """Make flow of a method that encodes frames and matches them; each frame is encoded once."""
    if not method.has("match"):
        raise Error(f"{type(method).__name__} gives no flow")
    (h, w), b = clip.size, clip.video.shape[0]
    pairs = tuple((int(s), int(t)) for s, t in pairs)
    xy = _flow_of(method, clip)(list(pairs)) if pairs else torch.zeros(b, 0, 2, h, w, device=clip.video.device)
    return Flow(xy, pairs)


def _flow_of(method: Method, clip: Clip) -> FlowOf:
    """Give the flow of any pairs of a clip, remembering as many encoded frames as the longest step spans, and flow."""
    if not method.has("match"):
        return lambda pairs: method.flow(clip, pairs).xy

    @lru_cache(maxsize=max(SPANS) + 1)
    def encode(t: int) -> Any:
        image = clip.video[:, t]
        return method.encode(image.float() / 255 if image.dtype == torch.uint8 else image.float())

    (h, w), b = clip.size, clip.video.shape[0]

    @lru_cache(maxsize=FLOW_BYTES // (8 * b * h * w))
    def match(s: int, t: int) -> Tensor:
        return method.match(encode(s), encode(t), clip.size)

    return lambda pairs: torch.stack([match(s, t) for s, t in pairs], 1)


@torch.no_grad()
def track(method: Method, clip: Clip, queries: Tensor) -> Tracks:
    """Track points with a method that gives flow (or dense tracks)."""
    if method.has("flow"):
        return follow(_flow_of(method, clip), clip.frames, clip.size, queries)
    if method.has("track_dense"):
        return _read_dense(method, clip, queries)
    raise Error(f"{type(method).__name__} has neither `track` nor `flow` nor `track_dense`; a method needs one of them")


def track_dense(method: Method, clip: Clip, source: int, chunk: int = 4096) -> DenseTracks:
    """Track every pixel of frame `source` with a method that tracks points, `chunk` points at a time."""
    h, w = clip.size
    y, x = torch.meshgrid(torch.arange(h) + 0.5, torch.arange(w) + 0.5, indexing="ij")
    pixels = torch.stack([torch.full_like(x, source), x, y], -1).view(1, -1, 3)
    pixels = pixels.expand(clip.video.shape[0], -1, -1).to(clip.video.device)
    # Flow costs the same for one point as for all of them; points of a tracker cost memory each.
    size = pixels.shape[1] if method.has("flow") and not method.has("track") else chunk
    parts = [method.track(clip, part) for part in pixels.split(size, 1)]
    xy = torch.cat([p.xy for p in parts], 2).unflatten(2, (h, w)).permute(0, 1, 4, 2, 3)
    visible = torch.cat([p.visible for p in parts], 2).unflatten(2, (h, w))
    depths = [p.depth for p in parts if p.depth is not None]
    depth = torch.cat(depths, 2).unflatten(2, (h, w)).unsqueeze(2) if depths else None
    return DenseTracks(xy, visible, source, depth)


@torch.no_grad()
def track_video(method: Method, video: Frames, queries: Tensor, *, progress: Progress | None = None) -> Tracks:
    """Track points (N, 3) through a video of any length with bounded memory.

    A video that fits `VIDEO_BYTES` goes to the method whole. A longer one, and any where tracks are made of flow, is
    streamed: backwards for the frames before the queries, then forwards.

    Args:
        method: any method.
        video: frames on demand.
        queries: (N, 3) of (t, x, y).
        progress: called with (frames done, frames in all).

    Returns:
        `Tracks` with B = 1, on the CPU.
    """
    queries = queries.to(method.device)
    if fits(video) and not (method.has("flow") and not method.has("track")):
        clip = Clip(video=video.read(range(video.frames)).unsqueeze(0).to(method.device))
        tracks = method.track(clip, queries[None])
        if progress:
            progress(video.frames, video.frames)
        return tracks.to("cpu")
    before = track_back(method, video, queries, progress)
    images = (video.read([t])[0] for t in range(video.frames))
    parts = [
        tracks for _, tracks in track_on(method.stream(queries), counted(images, video, queries, progress), before)
    ]
    return join(parts)


def fits(video: Frames) -> bool:
    """Whether a video is small enough to be held whole."""
    return video.frames * video.size[0] * video.size[1] * 3 <= VIDEO_BYTES


def counted(
    images: Iterable[Tensor], video: Frames, queries: Tensor, progress: Progress | None = None
) -> Iterator[Tensor]:
    """Pass the frames of the way forwards on and tell of the progress, of which the way back had its share."""
    back = _frames_back(queries)
    for t, image in enumerate(images, 1):
        yield image
        if progress:
            progress((back + t) * video.frames // (back + video.frames), video.frames)


def _frames_back(queries: Tensor) -> int:
    """How many frames a reversed stream has to see."""
    last = int(queries[:, 0].max()) if len(queries) else 0
    return last + 1 if last else 0


@torch.no_grad()
def track_back(method: Method, video: Frames, queries: Tensor, progress: Progress | None = None) -> Tracks | None:
    """Track points (N, 3) backwards from their query frames, by a stream of the reversed video.

    Returns:
        `Tracks` with B = 1, on the CPU, of the frames from 0 to the last query frame; none where all queries are in
        frame 0. Only the frames before a point's query mean anything.
    """
    back = _frames_back(queries)
    if not back:
        return None
    stream = method.stream(queries * queries.new_tensor([-1, 1, 1]) + queries.new_tensor([back - 1, 0, 0]))
    parts = []
    for done, t in enumerate(range(back - 1, -1, -1), 1):
        parts.append(stream.step(video.read([t])).to("cpu"))
        if progress:
            progress(done * video.frames // (back + video.frames), video.frames)
    tracks = join([*parts, stream.finish().to("cpu")])
    return tracks.map(lambda x: x.flip(1))


@torch.no_grad()
def track_on(
    stream: Stream, images: Iterable[Tensor], before: Tracks | None = None
) -> Iterator[tuple[list[Tensor], Tracks]]:
    """Feed frames (3, H, W) to a stream of the points that it holds, and finish it.

    Args:
        stream: as it was made.
        images: as they come; uint8, or float in [0, 1].
        before: what `track_back` found.

    Yields:
        The frames that became settled, and their `Tracks` with B = 1 on the CPU.
    """
    waiting: deque[Tensor] = deque()

    def settled(tracks: Tracks) -> tuple[list[Tensor], Tracks]:
        first = stream.settled - tracks.xy.shape[1]
        return [waiting.popleft() for _ in range(tracks.xy.shape[1])], _merge(before, tracks.to("cpu"), stream, first)

    for image in images:
        waiting.append(image)
        tracks = stream.step(image[None])
        if tracks.xy.shape[1]:
            yield settled(tracks)
    yield settled(stream.finish())


def _merge(before: Tracks | None, tracks: Tracks, stream: Stream, first: int) -> Tracks:
    """Take frames before a point's query from `before`; `first` is the first frame of `tracks`."""
    if before is None:
        return tracks
    k = max(0, min(tracks.xy.shape[1], before.xy.shape[1] - first))
    t = torch.arange(first, first + k)[:, None]
    n = before.xy.shape[2]  # points added on the way have no way back
    early = t < stream.queries[:n, 0].cpu()

    def take(old: Tensor | None, new: Tensor | None) -> Tensor | None:
        if old is None or new is None:
            return None
        out, part = new.clone(), old[:, first : first + k]
        mask = early if new.ndim == 3 else early[..., None]
        out[:, :k, :n] = torch.where(mask, part, new[:, :k, :n])
        return out

    xy, visible = take(before.xy, tracks.xy), take(before.visible, tracks.visible)
    assert xy is not None and visible is not None
    return Tracks(xy, visible, take(before.depth, tracks.depth), take(before.confidence, tracks.confidence))


def _read_dense(method: Method, clip: Clip, queries: Tensor) -> Tracks:
    """Read points off the dense tracks of every frame that holds a query."""
    b, n, _ = queries.shape
    xy = queries.new_zeros(b, clip.frames, n, 2)
    visible = queries.new_zeros(b, clip.frames, n)
    for t in queries[..., 0].unique().long().tolist():
        dense = method.track_dense(clip, t)
        place = queries[..., 1:]
        here = (queries[..., 0] == t)[:, None]
        moved = torch.stack([sample(dense.xy[:, i], place) for i in range(clip.frames)], 1)
        seen = torch.stack([sample(dense.visible[:, i, None], place)[..., 0] for i in range(clip.frames)], 1)
        xy = torch.where(here[..., None], moved, xy)
        visible = torch.where(here, seen, visible)
    rows = queries[..., 0].long()[:, None]
    xy = xy.scatter(1, rows[..., None].expand(-1, -1, -1, 2), queries[:, None, :, 1:])
    return Tracks(xy, visible)
