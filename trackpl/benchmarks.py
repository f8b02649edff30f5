"""What each benchmark asks and how it is scored, decided once.

A benchmark reads a data set of shards (`trackpl data make`), brings every frame to the evaluation size by Pillow's
Lanczos filter, frame by frame, without keeping the aspect, and asks a method for tracks through the whole video:

first    a track is queried once, where it is first visible, and scored in the frames after that
strided  a track is queried in each of the frames 0, 5, 10, ... that show it, each query a row of its own, scored in
         all frames but its own, those before it included: `Method.track` goes both ways
given    the data set names the query of each track; scored as strided

A track that is never visible is not queried and not scored. Figures are those of `trackpl.metrics.tapvid`, of each
video over the sums of all its rows, then the plain mean over videos; an undefined one (0/0) is left out and counted.
Positions are compared in a 256x256 frame, whatever size the method was shown.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trackpl.errors import DataError, Error, closest
from trackpl.metrics import tapvid
from trackpl.metrics.tapvid import FIGURES, SIZE
from trackpl.samples import decode
from trackpl.shards import Sample, open_members
from trackpl.types import Clip, Tracks

HEADLINE = ("AJ", "delta_avg", "OA")
_FIELDS = ("video", "tracks", "visible", "valid", "queries")
_CHUNK = 16  # frames held at their own size

Asking = Literal["first", "strided", "given"]


@dataclass(frozen=True)
class Reference:
    """Published figures of one system."""

    system: str
    figures: tuple[float, float, float]  # AJ, delta_avg, OA, times 100
    source: str


@dataclass(frozen=True)
class Benchmark:
    """One benchmark: its data, its protocol and what others reached on it."""

    name: str
    what: str  # in one line
    data: str  # NAME of `trackpl data make NAME SOURCE OUT`
    videos: int  # that the whole set has
    queried: Asking
    references: tuple[Reference, ...] = ()
    size: tuple[int, int] = SIZE  # height and width of the frames in which positions are compared
    input_size: tuple[int, int] = SIZE  # of the frames that a method is shown, unless the user says otherwise
    stride: int = 5  # frames between queries, for "strided"
    threshold: float = 0.5  # a point is predicted visible above this probability; methods fold their own into it
    metrics: tuple[str, ...] = FIGURES

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


@dataclass(frozen=True)
class Task:
    """What a benchmark asks of one video, M rows, and the truth of them at the evaluation size."""

    clip: Clip  # the video alone, B = 1, at the input size
    queries: Tensor  # (M, 3) float64 of (t, x, y), evaluation size
    tracks: Tensor  # (T, M, 2) float64, evaluation size
    visible: Tensor  # (T, M) bool
    valid: Tensor  # (T, M) bool
    count: int  # tracks N of the video, those never visible included


def find(name: str) -> Benchmark:
    """Return the benchmark `name`; raises `Error` with the closest match where there is none."""
    if name not in BENCHMARKS:
        raise Error(f"no benchmark is called '{name}'; {closest(name, BENCHMARKS)}")
    return BENCHMARKS[name]


def read_task(benchmark: Benchmark, sample: Sample, input_size: tuple[int, int] | None = None) -> Task:
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
    benchmark: Benchmark, tracks: Tensor, visible: Tensor, asked: Tensor | None = None
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


def method_queries(benchmark: Benchmark, task: Task) -> Tensor:
    """Return the queries (1, M, 3) in pixels of the task's clip; annotations a hair outside the frame are moved in."""
    h, w = task.clip.size
    xy = tapvid.rescale(task.queries[:, 1:], benchmark.size, (h, w))
    xy = torch.minimum(xy.clamp(min=0), xy.new_tensor([w, h]))
    return torch.cat([task.queries[:, :1], xy], 1)[None].float()


def score(benchmark: Benchmark, task: Task, tracks: Tracks, threshold: float | None = None) -> dict[str, float]:
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


def aggregate(rows: Sequence[dict[str, Any]], metrics: Sequence[str] = FIGURES) -> dict[str, float | None]:
    """Average each figure over the videos that define it; None where none does."""
    out: dict[str, float | None] = {}
    for name in metrics:
        values = [row[name] for row in rows if row[name] is not None]
        out[name] = float(np.mean(values)) if values else None
    return out


def lanczos(video: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize uint8 frames (1, T, 3, H, W) by Pillow's Lanczos filter, each by itself; same size: untouched."""
    if video.shape[-2:] == size:
        return video
    frames = video[0].permute(0, 2, 3, 1).contiguous().numpy()
    small = [np.asarray(Image.fromarray(f).resize(size[::-1], Image.Resampling.LANCZOS)) for f in frames]
    return torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2)[None].contiguous()


def _prepared(part: Clip, start: int, key: str, benchmark: Benchmark, input_size: tuple[int, int]) -> Clip:
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


# The benchmarks ---------------------------------------------------------------------------------------------

_LOCOTRACK = "Cho et al., LocoTrack, 2024"
_COTRACKER = "Karaev et al., CoTracker, 2023"
_DELTA = "Ngo et al., DELTAv2, 2025"


def _references(source: str, **figures: tuple[float, float, float]) -> tuple[Reference, ...]:
    """Make references of one paper; in the names __ stands for a blank and _ for a hyphen."""
    return tuple(Reference(n.replace("__", " ").replace("_", "-"), f, source) for n, f in figures.items())


_ALL = (
    Benchmark(
        "tapvid_davis_first",
        "TAP-Vid-DAVIS, each track queried where it is first visible",
        "tapvid_davis",
        30,
        "first",
        _references(_COTRACKER, TAP_Net=(33.0, 48.6, 78.8), PIPs=(42.2, 64.8, 77.7), MFT=(47.3, 66.8, 77.8))
        + _references(_COTRACKER, OmniMotion=(46.4, 62.7, 85.3), TAPIR=(56.2, 70.0, 86.5), CoTracker=(60.6, 75.4, 89.3))
        + _references(_LOCOTRACK, LocoTrack_S__256x256=(62.0, 74.3, 86.1), LocoTrack_B__256x256=(63.0, 75.3, 87.2))
        + _references(_LOCOTRACK, LocoTrack_S__384x512=(63.2, 76.2, 84.6), LocoTrack_B__384x512=(64.8, 77.4, 86.2))
        + _references(_DELTA, DELTA=(62.7, 76.7, 88.2), DELTAv2=(62.5, 76.2, 87.9)),
    ),
    Benchmark(
        "tapvid_davis_strided",
        "TAP-Vid-DAVIS, queried every 5 frames, tracked both ways",
        "tapvid_davis",
        30,
        "strided",
        _references(_COTRACKER, TAP_Net=(38.4, 53.1, 82.3), PIPs=(52.4, 70.0, 83.6), MFT=(56.1, 70.8, 86.9))
        + _references(_COTRACKER, OmniMotion=(51.7, 67.5, 85.3), TAPIR=(61.3, 73.6, 88.8), CoTracker=(64.8, 79.1, 88.7))
        + _references(_LOCOTRACK, LocoTrack_S__256x256=(66.9, 78.8, 88.9), LocoTrack_B__256x256=(67.8, 79.6, 89.9))
        + _references(_LOCOTRACK, LocoTrack_S__384x512=(68.4, 80.4, 87.5), LocoTrack_B__384x512=(69.4, 81.3, 88.6)),
    ),
    Benchmark(
        "tapvid_kinetics_first",
        "TAP-Vid-Kinetics, each track queried where it is first visible",
        "tapvid_kinetics",
        1189,
        "first",
        _references(_COTRACKER, TAP_Net=(38.5, 54.4, 80.6), PIPs=(31.7, 53.7, 72.9), TAPIR=(49.6, 64.2, 85.0))
        + _references(_COTRACKER, CoTracker=(48.7, 64.3, 86.5))
        + _references(_LOCOTRACK, LocoTrack_S__256x256=(52.8, 66.5, 84.9), LocoTrack_B__256x256=(52.9, 66.8, 85.3))
        + _references(_LOCOTRACK, LocoTrack_S__384x512=(51.9, 66.1, 81.2), LocoTrack_B__384x512=(52.3, 66.4, 82.1))
        + _references(_DELTA, MFT=(39.6, 60.4, 72.7), DELTA=(49.5, 63.3, 82.2), DELTAv2=(47.8, 61.3, 82.0)),
    ),
    Benchmark(
        "tapvid_kinetics_strided",
        "TAP-Vid-Kinetics, queried every 5 frames, tracked both ways",
        "tapvid_kinetics",
        1189,
        "strided",
        _references(_LOCOTRACK, LocoTrack_S__256x256=(59.6, 72.7, 88.1), LocoTrack_B__256x256=(59.5, 73.0, 88.5))
        + _references(_LOCOTRACK, LocoTrack_S__384x512=(58.7, 72.2, 84.5), LocoTrack_B__384x512=(59.1, 72.5, 85.7)),
    ),
    Benchmark(
        "tapvid_rgb_stacking_first",
        "TAP-Vid-RGB-Stacking, each track queried where it is first visible",
        "tapvid_rgb_stacking",
        50,
        "first",
        _references(_COTRACKER, TAP_Net=(54.6, 68.3, 87.7), PIPs=(15.7, 28.4, 77.1), OmniMotion=(69.5, 82.5, 90.3))
        + _references(_COTRACKER, TAPIR=(54.2, 69.8, 84.4), CoTracker=(63.1, 77.0, 87.8))
        + _references(_DELTA, LocoTrack_B=(69.0, 83.2, 89.5), DELTA=(74.2, 83.5, 90.0), DELTAv2=(74.0, 82.9, 89.3)),
    ),
    Benchmark(
        "tapvid_rgb_stacking_strided",
        "TAP-Vid-RGB-Stacking, queried every 5 frames, tracked both ways",
        "tapvid_rgb_stacking",
        50,
        "strided",
        _references(_LOCOTRACK, LocoTrack_S__256x256=(77.4, 87.0, 92.9), LocoTrack_B__256x256=(77.1, 86.9, 93.2))
        + _references(_LOCOTRACK, LocoTrack_S__384x512=(71.0, 84.4, 83.3), LocoTrack_B__384x512=(70.8, 83.2, 84.1)),
    ),
    Benchmark(
        "robotap_first",
        "RoboTAP, each track queried where it is first visible",
        "robotap",
        265,
        "first",
        _references(_LOCOTRACK, TAPIR=(59.6, 73.4, 87.0))
        + _references(_LOCOTRACK, LocoTrack_S__256x256=(62.5, 76.0, 87.0), LocoTrack_B__256x256=(62.3, 76.2, 87.1)),
    ),
    Benchmark(
        "tapvid_kubric",
        "TAP-Vid-Kubric validation, 256 queries a clip as the data set names them, tracked both ways",
        "tapvid_kubric",
        250,
        "given",
    ),
    Benchmark(
        "synthetic",
        "held-out clips with exact truth that are made here on first use, queried first",
        "synthetic",
        30,
        "first",
    ),
)
BENCHMARKS = {benchmark.name: benchmark for benchmark in _ALL}
