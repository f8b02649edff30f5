"""Capabilities that the platform makes for a method out of those it has.

`track` from flow, `track_dense` from sparse tracks, and tracks through a video of any length from either.

Tracks from flow follow Neoral, Serych, Matas, "MFT: Long-Term Tracking of Every Pixel" (WACV 2024) in its idea, without
its learned uncertainty: a point of frame t is reached from several earlier frames, by steps of one frame and by longer
ones, each is judged by its forward-backward error, and the most consistent is kept. Long steps do not drift and jump
over occlusions; short ones survive large changes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from trackpl.errors import Error
from trackpl.types import Clip, DenseTracks, Flow, Tracks

if TYPE_CHECKING:
    from trackpl.method import Method

SPANS = (1, 3, 9, 27)
"""Lengths in frames of the steps that tracks from flow try: powers, so that few steps reach any frame."""

VIDEO_BYTES = 1 << 30
"""A video that decodes to more than this is tracked without ever being held whole."""

Progress = Callable[[int, int], None]
FlowOf = Callable[[list[tuple[int, int]]], Tensor]


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
    """Give the flow of any pairs of a clip, remembering as many encoded frames as the longest step spans."""
    if not method.has("match"):
        return lambda pairs: method.flow(clip, pairs).xy
    encode = _encoder(method, lambda t: clip.video[:, t])
    return lambda pairs: torch.stack([method.match(encode(s), encode(t), clip.size) for s, t in pairs], 1)


def _encoder(method: Method, frame: Callable[[int], Tensor]) -> Callable[[int], Any]:
    @lru_cache(maxsize=max(SPANS) + 1)
    def encode(t: int) -> Any:
        image = frame(t)
        return method.encode(image.float() / 255 if image.dtype == torch.uint8 else image.float())

    return encode


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
def track_video(
    method: Method, video: Frames, queries: Tensor, *, window: int = 48, progress: Progress | None = None
) -> Tracks:
    """Track points (N, 3) through a video of any length with bounded memory.

    A video that fits `VIDEO_BYTES` goes to the method whole, except that flow is always streamed. A longer one is cut
    into windows that overlap by half, in each of which a point starts from the last place where it was seen.

    Args:
        method: any method.
        video: frames on demand.
        queries: (N, 3) of (t, x, y).
        window: frames of a window.
        progress: called with (frames done, frames in all).

    Returns:
        `Tracks` with B = 1, on the CPU.
    """
    device, (h, w) = method.device, video.size
    queries = queries.unsqueeze(0).to(device)
    if method.has("flow") and not method.has("track"):
        return follow(_stream_flow(method, video), video.frames, video.size, queries, progress).to("cpu")
    if video.frames * h * w * 3 <= VIDEO_BYTES:
        clip = Clip(video=video.read(range(video.frames)).unsqueeze(0).to(device))
        tracks = method.track(clip, queries)
        if progress:
            progress(video.frames, video.frames)
        return tracks.to("cpu")
    return _track_windows(method, video, queries, window, progress)


def _stream_flow(method: Method, video: Frames) -> FlowOf:
    """Give the flow of any pairs of a video whose frames are decoded when they are needed."""
    if method.has("match"):
        encode = _encoder(method, lambda t: video.read([t]).to(method.device))
        return lambda pairs: torch.stack([method.match(encode(s), encode(t), video.size) for s, t in pairs], 1)

    def flow_of(pairs: list[tuple[int, int]]) -> Tensor:
        used = sorted({t for pair in pairs for t in pair})
        clip = Clip(video=video.read(used).unsqueeze(0).to(method.device))
        return method.flow(clip, [(used.index(s), used.index(t)) for s, t in pairs]).xy

    return flow_of


def _track_windows(method: Method, video: Frames, queries: Tensor, window: int, progress: Progress | None) -> Tracks:
    """Carry points from window to window, forwards, then backwards for the frames before their queries."""
    total, n, device = video.frames, queries.shape[1], queries.device
    xy = torch.zeros(1, total, n, 2)
    visible = torch.zeros(1, total, n)
    born = queries[0, :, 0].long()
    done = 0
    for forward in (True, False):
        starts = list(range(0, max(1, total - window // 2), window // 2))
        state = queries.clone()  # where each point was last seen, in frames of the video
        for start in starts if forward else starts[::-1]:
            stop = min(start + window, total)
            here = (state[0, :, 0] >= start) & (state[0, :, 0] < stop)
            done += 1
            if progress:
                progress(min(total, done * total // (2 * len(starts))), total)
            index = here.nonzero()[:, 0]
            if not len(index):
                continue
            clip = Clip(video=video.read(range(start, stop)).unsqueeze(0).to(device))
            local = state[:, index] - state.new_tensor([start, 0, 0])
            tracks = method.track(clip, local)
            times = torch.arange(start, stop, device=device)[:, None]
            new = (times >= state[0, index, 0]) if forward else (times <= state[0, index, 0])
            new &= (times >= born[index]) if forward else (times < born[index])
            rows, cols = new.nonzero(as_tuple=True)
            xy[0, (rows + start).cpu(), index[cols].cpu()] = tracks.xy[0, rows, cols].cpu().float()
            visible[0, (rows + start).cpu(), index[cols].cpu()] = tracks.visible[0, rows, cols].cpu().float()
            state[:, index] = _last_seen(tracks, start, new, state[:, index], forward, video.size)
    return Tracks(xy, visible)


def _last_seen(tracks: Tracks, start: int, new: Tensor, state: Tensor, forward: bool, size: tuple[int, int]) -> Tensor:
    """Choose where the next window starts each point: its newest sure sight in the overlap, else its last place."""
    score = tracks.visible[0].float() * new
    t = torch.arange(score.shape[0], device=score.device)[:, None].expand_as(score)
    order = t if forward else -t
    floor = torch.finfo(torch.float32).min
    seen = order.float().masked_fill(score < 0.5, floor)
    # A point not seen in this window's second half must still reach the next one.
    half = score.shape[0] // 2
    reach = (t >= half) if forward else (t < score.shape[0] - half)
    seen = seen.masked_fill(~reach, floor)
    last = torch.where(seen.amax(0) > floor, seen.argmax(0), (order.masked_fill(~new, -(1 << 30))).argmax(0))
    place = tracks.xy[0].float().gather(0, last[None, :, None].expand(1, -1, 2))[0]
    limit = place.new_tensor([size[1], size[0]])
    place = torch.minimum(place.clamp(min=0), limit)
    moved = torch.cat([(last + start).unsqueeze(-1).to(state.dtype), place], -1).unsqueeze(0)
    return torch.where(new.any(0)[None, :, None], moved, state)


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
    b, n, _ = queries.shape
    born = queries[..., 0].long()
    xy = queries[:, None, :, 1:].float().repeat(1, frames, 1, 1)
    visible = torch.zeros(b, frames, n, device=queries.device)
    visible.scatter_(1, born[:, None], 1.0)
    error = torch.zeros_like(visible)
    state = (xy, visible, error)
    first, last = (int(born.min()), int(born.max())) if n else (frames, 0)
    todo = [(t, 1) for t in range(first + 1, frames)] + [(t, -1) for t in range(last - 1, -1, -1)]
    for done, (t, direction) in enumerate(todo):
        _reach(t, direction, flow_of, size, born, state, spans)
        if progress:
            progress((done + 1) * frames // len(todo), frames)
    return Tracks(xy, visible, confidence=(-error / 8).exp())


def _reach(
    t: int,
    direction: int,
    flow_of: FlowOf,
    size: tuple[int, int],
    born: Tensor,
    state: tuple[Tensor, Tensor, Tensor],
    spans: Sequence[int],
) -> None:
    """Fill frame t of every point born before it, in the given direction of time, by its most consistent step."""
    xy, visible, error = state
    frames = xy.shape[1]
    alive = (born - t) * direction < 0
    origin = born[alive]
    sources = {t - direction * s for s in spans if 0 <= t - direction * s < frames}
    sources = {s for s in sources if bool(((origin - s) * direction <= 0).any())}
    flows = {}
    order = sorted(sources, key=lambda s: abs(t - s))
    both = flow_of([(s, t) for s in order] + [(t, s) for s in order])
    for i, s in enumerate(order):
        flows[s] = (both[:, i], both[:, len(order) + i])

    best = torch.full_like(error[:, t], float("inf"))
    nearest, trusted = xy[:, t], torch.zeros_like(alive)
    for s, (there, back) in flows.items():  # the shortest step first
        step = sample(there, xy[:, s])
        place = xy[:, s] + step
        returned = sample(back, place)
        gap = (step + returned).norm(dim=-1)
        # Where the frame shows nothing to return from, or the step started unseen, little can be believed.
        cost = error[:, s] + gap + OCCLUDED * (1 - visible[:, s])
        # A long step corrects drift; one that leaves a good short step far behind has met a lookalike.
        stray = trusted & ((place - nearest).norm(dim=-1) > STRAY * math.hypot(*size))
        better = (cost < best) & alive & ((born - s) * direction <= 0) & ~stray
        best = torch.where(better, cost, best)
        xy[:, t] = torch.where(better[..., None], place, xy[:, t])
        seen = _consistent(gap, step, returned) * _in_frame(place, size)
        if s == order[0]:
            nearest, trusted = place, (seen > 0.5) & (visible[:, s] > 0.5)
        visible[:, t] = torch.where(better, seen, visible[:, t])
        error[:, t] = torch.where(better, error[:, s] + gap, error[:, t])


STRAY = 0.02
"""Share of the frame's diagonal by which a long step may differ from a consistent step of one frame."""

OCCLUDED = 4.0
"""Pixels by which a step from a hidden point must be more consistent than one from a visible point."""


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
