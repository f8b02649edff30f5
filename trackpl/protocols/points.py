"""Point tracks as TAP-Vid scores them.

Every frame is brought to the evaluation size by Pillow's Lanczos filter, frame by frame, without keeping the aspect,
and a method is asked for tracks through the whole video:

first    a track is queried once, where it is first visible, and scored in the frames after that
strided  a track is queried in each of the frames 0, 5, 10, ... that show it, each query a row of its own, scored in
         all frames but its own, those before it included: `Method.track` goes both ways
given    the data set names the query of each track; scored as strided

A track that is never visible is not queried and not scored. Figures are those of `trackpl.metrics.tapvid`, of each
video over the sums of all its rows, then the plain mean over videos; an undefined one (0/0) is left out and counted.
Positions are compared in a 256x256 frame, whatever size the method was shown.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trackpl import protocols
from trackpl.errors import DataError, Error
from trackpl.metrics import tapvid
from trackpl.metrics.tapvid import FIGURES, SIZE
from trackpl.protocols import Benchmark, Row
from trackpl.samples import decode
from trackpl.shards import Sample, open_members
from trackpl.types import Clip, Tracks

if TYPE_CHECKING:
    from trackpl.method import Method

HEADLINE = ("AJ", "delta_avg", "OA")
_FIELDS = ("video", "tracks", "visible", "valid", "queries")
_CHUNK = 16  # frames held at their own size

Asking = Literal["first", "strided", "given"]


@dataclass(frozen=True)
class Task(protocols.Task):
    """What a benchmark asks of one video, M rows, and the truth of them at the evaluation size."""

    queries: Tensor  # (M, 3) float64 of (t, x, y), evaluation size
    tracks: Tensor  # (T, M, 2) float64, evaluation size
    visible: Tensor  # (T, M) bool
    valid: Tensor  # (T, M) bool
    count: int  # tracks N of the video, those never visible included


@dataclass(frozen=True)
class Points(Benchmark):
    """A benchmark of point tracks."""

    queried: Asking
    size: tuple[int, int] = SIZE  # height and width of the frames in which positions are compared
    stride: int = 5  # frames between queries, for "strided"
    threshold: float = 0.5  # a point is predicted visible above this probability; methods fold their own into it
    input_size: tuple[int, int] = field(default=SIZE, kw_only=True)  # unless the user says otherwise
    headline: tuple[str, ...] = field(default=HEADLINE, kw_only=True)
    metrics: tuple[str, ...] = field(default=FIGURES, kw_only=True)

    asked: ClassVar[str] = "queries"
    options: ClassVar[tuple[str, ...]] = ("threshold",)
    pace: ClassVar[tuple[str, str]] = ("queries", "points")

    @property
    def protocol(self) -> dict[str, Any]:
        """Return what two results must share to be comparable, as JSON values."""
        return {
            "queried": self.queried,
            "stride": self.stride if self.queried == "strided" else None,
            "scored": "after the query" if self.queried == "first" else "all but the query",
            "size": list(self.size),
            "resampler": "Pillow Lanczos, frame by frame, uint8",
            "metrics": list(self.metrics),
        }

    def settings(self, given: argparse.Namespace) -> dict[str, Any]:
        """Return the size of the frames shown and the threshold of visibility."""
        threshold = self.threshold if given.threshold is None else given.threshold
        return super().settings(given) | {"threshold": threshold}

    def read(self, sample: Sample, setup: Mapping[str, Any]) -> Task:
        """Read one video and sample its queries. See `read_task`."""
        h, w = setup["input_size"]
        return read_task(self, sample, (h, w))

    def predict(self, method: Method, task: protocols.Task, setup: Mapping[str, Any]) -> Tracks:
        """Track all queries through the whole video."""
        assert isinstance(task, Task)
        m, clip = len(task.queries), task.clip
        if not m:
            return Tracks(torch.zeros(1, clip.frames, 0, 2), torch.zeros(1, clip.frames, 0))
        tracks = method.track(clip.to(method.device), method_queries(self, task).to(method.device)).to("cpu")
        shapes = tuple(tracks.xy.shape), tuple(tracks.visible.shape)
        if shapes != ((1, clip.frames, m, 2), (1, clip.frames, m)):
            raise Error(f"the method gave tracks of shapes {shapes} for {m} points in {clip.frames} frames")
        return tracks

    def score(self, task: protocols.Task, prediction: Tracks, setup: Mapping[str, Any]) -> Row:
        """Score one video; predicted positions that are not finite are misses."""
        assert isinstance(task, Task)
        return {
            "tracks": task.count,
            "queries": len(task.queries),
            **score(self, task, prediction, setup["threshold"]),
            "nan_predictions": int((~prediction.xy.isfinite()).any(-1).sum()),
        }


def read_task(benchmark: Points, sample: Sample, input_size: tuple[int, int] | None = None) -> Task:
    """Read one video and sample its queries; of its frames only a few are held at their own size.

    Raises:
        DataError: the sample cannot be read, or has not the truth that the benchmark needs.
    """
    parts = []
    with open_members(sample, _FIELDS) as members:
        for start in range(0, sample.frames, _CHUNK):
            part = decode(members, range(start, min(start + _CHUNK, sample.frames)), _FIELDS, sample.key)
            parts.append(_prepared(part, start, sample.key, benchmark, input_size or benchmark.input_size))
    first = parts[0]
    tracks, visible, valid = (torch.cat([getattr(p, f)[0] for p in parts]) for f in ("tracks", "visible", "valid"))
    asked = None if first.queries is None else torch.stack([p.queries[0] for p in parts]).amax(0)  # type: ignore[index]
    queries, index = sample_queries(benchmark, tracks, visible & valid, asked)
    clip = Clip(video=torch.cat([p.video for p in parts], 1), name=first.name or (sample.key,), fps=first.fps)
    return Task(clip, queries, tracks[:, index], visible[:, index], valid[:, index], tracks.shape[1])


def sample_queries(
    benchmark: Points, tracks: Tensor, visible: Tensor, asked: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the queries (M, 3) of (t, x, y) that a benchmark asks, and the track (M,) that each is of.

    Args:
        benchmark: whose protocol it is.
        tracks: (T, N, 2).
        visible: (T, N) bool.
        asked: (N, 3), the queries that the data set names; -1 as t: none.
    """
    if benchmark.queried != "given":
        return tapvid.sample_queries(tracks, visible, benchmark.queried, benchmark.stride)
    if asked is None:
        raise DataError(f"the benchmark '{benchmark.name}' needs a set that names the query of each track")
    keep = (asked[:, 0] >= 0) & visible.any(0)
    return asked[keep], keep.nonzero()[:, 0]


def method_queries(benchmark: Points, task: Task) -> Tensor:
    """Return the queries (1, M, 3) in pixels of the task's clip; annotations a hair outside the frame are moved in."""
    h, w = task.clip.size
    xy = tapvid.rescale(task.queries[:, 1:], benchmark.size, (h, w))
    xy = torch.minimum(xy.clamp(min=0), xy.new_tensor([w, h]))
    return torch.cat([task.queries[:, :1], xy], 1)[None].float()


def score(benchmark: Points, task: Task, tracks: Tracks, threshold: float | None = None) -> dict[str, float]:
    """Score one video: the `FIGURES` times 100, NaN where one is 0/0.

    Args:
        benchmark: whose protocol it is.
        task: what was asked.
        tracks: predicted for `method_queries`, B = 1, in pixels of the task's clip.
        threshold: of visibility; none: the benchmark's.
    """
    limit = benchmark.threshold if threshold is None else threshold
    scores = tapvid.tapvid_scores(
        task.queries[None],
        task.tracks[None],
        task.visible[None],
        tapvid.rescale(tracks.xy.cpu(), task.clip.size, benchmark.size),
        tracks.visible.cpu() > limit,
        task.valid[None],
        queried="first" if benchmark.queried == "first" else "strided",
    )
    return {name: 100 * float(scores[name]) for name in benchmark.metrics}


def lanczos(video: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize uint8 frames (1, T, 3, H, W) by Pillow's Lanczos filter, each by itself; same size: untouched."""
    if video.shape[-2:] == size:
        return video
    frames = video[0].permute(0, 2, 3, 1).contiguous().numpy()
    small = [np.asarray(Image.fromarray(f).resize(size[::-1], Image.Resampling.LANCZOS)) for f in frames]
    return torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2)[None].contiguous()


def _prepared(part: Clip, start: int, key: str, benchmark: Points, input_size: tuple[int, int]) -> Clip:
    """Bring some frames to the input size, their truth to the evaluation size, frame numbers to those of the video."""
    if part.tracks is None or part.visible is None:
        raise DataError(f"sample '{key}' has no tracks to score; the benchmark '{benchmark.name}' needs them")
    queries = part.queries
    if queries is not None:  # -1: of another part
        t = torch.where(queries[..., :1] < 0, -1, queries[..., :1] + start).double()
        queries = torch.cat([t, tapvid.rescale(queries[..., 1:], part.size, benchmark.size)], -1)
    return dataclasses.replace(
        part,
        video=lanczos(part.video, input_size),
        tracks=tapvid.rescale(part.tracks, part.size, benchmark.size),
        valid=torch.ones_like(part.visible) if part.valid is None else part.valid,
        queries=queries,
    )
