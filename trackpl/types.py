"""What flows between data, methods and benchmarks: `Clip` in, `Tracks`, `DenseTracks` or `Flow` out.

Coordinates are continuous pixels everywhere: x right, y down, (0, 0) is the outer corner of the top-left pixel, whose
centre is (0.5, 0.5); a resize is a multiplication. Queries are a float tensor (B, N, 3) of (t, x, y), t an integer
frame index. Shapes: B batch, T frames, N points, P frame pairs, H W pixels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor

from trackpl.errors import DataError


class Batch:
    """Makes a dataclass of batched tensors movable and sliceable; nested ones follow."""

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Apply `function` to every tensor field."""

        def apply(value: Any) -> Any:
            if isinstance(value, Tensor):
                return function(value)
            return value.map(function) if isinstance(value, Batch) else value

        values = {f.name: apply(getattr(self, f.name)) for f in fields(self)}  # type: ignore[arg-type]
        return dataclasses.replace(self, **values)  # type: ignore[type-var]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """Move every tensor to `device`."""
        return self.map(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """Pin every tensor for asynchronous copies to a GPU."""
        return self.map(lambda x: x.pin_memory())


@dataclass(frozen=True)
class Flow(Batch):
    """Displacement of every pixel of frame s to its place in frame t, for each pair (s, t).

    The pairs (s, 0), (s, 1), ... make dense tracks of frame s, in three dimensions where there is a depth.
    """

    xy: Tensor  # (B, P, 2, H, W) pixels; the pixel centred at c lies at c + xy
    pairs: tuple[tuple[int, int], ...]  # P frame pairs (s, t)
    visible: Tensor | None = None  # (B, P, H, W): truth bool, prediction a probability that t shows the pixel
    valid: Tensor | None = None  # (B, P, H, W) bool: truth is known here
    depth: Tensor | None = None  # (B, P, H, W) metres along the optical axis of frame t, of each pixel of frame s


@dataclass(frozen=True)
class Camera(Batch):
    """Pinhole camera of every frame; camera axes x right, y down, z forward."""

    intrinsics: Tensor  # (B, T, 4): fx, fy, cx, cy in pixels
    pose: Tensor  # (B, T, 4, 4): world to camera


@dataclass(frozen=True)
class Clip(Batch):
    """A batch of videos with whatever truth is known of them."""

    video: Tensor  # (B, T, 3, H, W) uint8, or float in [0, 1]; RGB
    tracks: Tensor | None = None  # (B, T, N, 2) pixels
    visible: Tensor | None = None  # (B, T, N) bool
    valid: Tensor | None = None  # (B, T, N) bool: supervised here
    track_depth: Tensor | None = None  # (B, T, N) metres along the optical axis
    queries: Tensor | None = None  # (B, N, 3): the (t, x, y) of each track, where the data set names one
    depth: Tensor | None = None  # (B, T, 1, H, W) metres along the optical axis
    flow: Flow | None = None
    labels: Tensor | None = None  # (B, T, H, W) integer segment ids, 0 background; 255 where a mask set says nothing
    camera: Camera | None = None
    name: tuple[str, ...] = ()  # B names, for per-video results
    fps: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.video, Tensor) or self.video.ndim != 5 or self.video.shape[2] != 3:
            shape = tuple(self.video.shape) if isinstance(self.video, Tensor) else type(self.video).__name__
            raise DataError(f"Clip.video must be a tensor of shape (B, T, 3, H, W), got {shape}")
        if self.video.dtype != torch.uint8 and not self.video.is_floating_point():
            raise DataError(f"Clip.video must be uint8, or float in [0, 1], got {self.video.dtype}")
        if min(self.video.shape) < 1:
            raise DataError(f"Clip.video is empty: shape {tuple(self.video.shape)}")

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.video.shape[-2], self.video.shape[-1]

    @property
    def frames(self) -> int:
        """Number of frames T."""
        return self.video.shape[1]

    def float_video(self) -> Tensor:
        """Return the video as float32 in [0, 1]."""
        return self.video.float() / 255 if self.video.dtype == torch.uint8 else self.video.float()

    @staticmethod
    def cat(clips: Sequence[Clip]) -> Clip:
        """Join clips of equal shape along the batch; a field missing in one of them is dropped."""

        def join(values: list[Any]) -> Any:
            first = values[0]
            if any(v is None for v in values):
                return None
            if isinstance(first, Tensor):
                return torch.cat(values)
            if isinstance(first, Batch):
                return type(first)(**{f.name: join([getattr(v, f.name) for v in values]) for f in fields(first)})  # type: ignore[arg-type]
            return first

        out = join(list(clips))
        return dataclasses.replace(out, name=tuple(n for c in clips for n in c.name))


@dataclass(frozen=True)
class Tracks(Batch):
    """Where every query point is in every frame."""

    xy: Tensor  # (B, T, N, 2) pixels of the clip that came in
    visible: Tensor  # (B, T, N) probability; thresholds belong to the benchmark or the user
    depth: Tensor | None = None  # (B, T, N)
    confidence: Tensor | None = None  # (B, T, N)


@dataclass(frozen=True)
class DenseTracks(Batch):
    """Where every pixel of the frame `source` is in every frame."""

    xy: Tensor  # (B, T, 2, H, W) pixels
    visible: Tensor  # (B, T, H, W) probability
    source: int = 0
    depth: Tensor | None = None  # (B, T, 1, H, W)


def check_queries(clip: Clip, queries: Tensor) -> None:
    """Refuse queries that are not (B, N, 3) of (t, x, y) inside `clip`, naming the first bad one."""
    b, (h, w) = clip.video.shape[0], clip.size
    if queries.ndim != 3 or queries.shape[0] != b or queries.shape[2] != 3:
        raise DataError(f"queries must have shape ({b}, N, 3) of (t, x, y), got {tuple(queries.shape)}")
    t, x, y = queries.unbind(-1)
    bad = ~((t >= 0) & (t < clip.frames) & (t == t.floor()) & (x >= 0) & (x <= w) & (y >= 0) & (y <= h))
    if bad.any():
        batch, n = bad.nonzero()[0].tolist()
        q = queries[batch, n].tolist()
        raise DataError(
            f"query {n} (t={q[0]:g}, x={q[1]:g}, y={q[2]:g}) is outside the clip: "
            f"t is a whole number in [0, {clip.frames - 1}], x in [0, {w}], y in [0, {h}]"
        )
