"""How benchmarks ask and score: one module for each kind of truth, points, flow, masks and poses.

A benchmark is a record of one of these classes (`trackpl.benchmarks`). All give a row of figures a video; figures of
the whole are means over the videos' rows, which carry weights where a protocol counts something else: pixels, frame
pairs, objects, the joints of a kind.
"""

from __future__ import annotations

import argparse
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trackpl.errors import Error
from trackpl.shards import Sample
from trackpl.types import Clip

if TYPE_CHECKING:
    from trackpl.method import Method

Row = dict[str, Any]


@dataclass(frozen=True)
class Reference:
    """Published figures of one system."""

    system: str
    figures: tuple[float | None, ...]  # in the order of the benchmark's headline; none: not published
    source: str


@dataclass(frozen=True)
class Task:
    """What a benchmark asks of one video."""

    clip: Clip  # B = 1, as the method is to see it


@dataclass(frozen=True)
class Benchmark(ABC):
    """One benchmark: its data, its protocol and what others reached on it."""

    name: str
    what: str  # in one line
    data: str  # NAME of `trackpl data make NAME SOURCE OUT`
    videos: int  # that the whole set has
    references: tuple[Reference, ...] = field(default=(), kw_only=True)
    made: Mapping[str, str] = field(default_factory=dict, kw_only=True)  # options the set must be made with, by flag
    headline: tuple[str, ...] = field(default=(), kw_only=True)  # figures of the table
    metrics: tuple[str, ...] = field(default=(), kw_only=True)  # all figures
    input_size: tuple[int, int] | None = field(default=None, kw_only=True)  # of the frames shown; none: their own
    asks: int | None = field(default=None, kw_only=True)  # things asked about in the whole set

    asked: ClassVar[str]  # what a row's "queries" count
    options: ClassVar[tuple[str, ...]] = ()  # of the command line that mean something here
    pace: ClassVar[tuple[str, str]]  # count of a row that speed is measured in, and its name
    lower: ClassVar[tuple[str, ...]] = ()  # how figures begin of which less is better
    digits: ClassVar[int] = 1

    @property
    @abstractmethod
    def protocol(self) -> dict[str, Any]:
        """Return what two results must share to be comparable, as JSON values."""

    def settings(self, given: argparse.Namespace) -> dict[str, Any]:
        """Return what a user may choose, as JSON values; raises `Error` for an option that means nothing here."""
        for option in ("threshold", "jitter_brightness", "jitter_hue"):
            if getattr(given, option) is not None and option not in self.options:
                flag = f"--{option.replace('_', '-')}"
                raise Error(f"{flag} means nothing to --benchmark {self.name}, which asks about {self.asked}")
        size = given.input or self.input_size
        return {"input_size": None if size is None else list(size)}

    def less_is_better(self, metric: str) -> bool:
        """Say whether a smaller value of a figure is the better one."""
        return metric.startswith(self.lower)

    def way(self, method: Method) -> str:
        """Say which capability of a method is asked; nothing where there is only one."""
        return ""

    @abstractmethod
    def read(self, sample: Sample, setup: Mapping[str, Any]) -> Task:
        """Read one video with its truth; raises `DataError` where it cannot be read or has not the truth needed."""

    @abstractmethod
    def predict(self, method: Method, task: Task, setup: Mapping[str, Any]) -> Any:
        """Ask the method; timed. What comes back lies on the CPU."""

    @abstractmethod
    def score(self, task: Task, prediction: Any, setup: Mapping[str, Any]) -> Row:
        """Score one video: its `metrics`, NaN where one is 0/0, with "queries", "nan_predictions" and weights."""


def numbers(rows: Sequence[Mapping[str, Any]], metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Return one figure of each row, in the parts that are averaged apart, and their weights.

    A row may have ``parts``, a list of values of a figure where it is the mean of several averages (as over joints),
    and ``weights``, a number or a list for each figure; 1 where it says nothing.

    Returns:
        Values and weights, (rows, parts) float64 each; weight 0 where the figure is undefined.
    """
    none = np.nan
    listed = [r.get("parts", {}).get(metric, [r[metric]]) for r in rows]
    values = np.array([[none if v is None else v for v in part] for part in listed], np.float64)
    weights = [np.broadcast_to(r.get("weights", {}).get(metric, 1.0), values.shape[1:]) for r in rows]
    heavy = np.where(np.isnan(values), 0.0, np.array(weights, np.float64).reshape(values.shape))
    return np.nan_to_num(values), heavy


def mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Average (..., rows, parts) over rows by weight, then over the parts that have any: (...); NaN where none has."""
    total, weight = (values * weights).sum(-2), weights.sum(-2)
    known = weight > 0
    parts = np.where(known, total / np.where(known, weight, 1), 0.0)
    count = known.sum(-1)
    return np.where(count > 0, parts.sum(-1) / np.maximum(count, 1), np.nan)


def aggregate(rows: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> dict[str, float | None]:
    """Average each figure over the videos that define it, by their weights; None where none does."""
    out: dict[str, float | None] = {}
    for name in metrics:
        value = float(mean(*numbers(rows, name))) if rows else float("nan")
        out[name] = None if np.isnan(value) else value
    return out


def resized(frames: Tensor, size: tuple[int, int] | None) -> Tensor:
    """Resize frames (..., 3, H, W), uint8 or float in [0, 1], bilinearly about pixel centres; same size: untouched."""
    if size is None or frames.shape[-2:] == tuple(size):
        return frames
    flat = frames.flatten(0, -4).float() / (255 if frames.dtype == torch.uint8 else 1)
    return F.interpolate(flat, size=tuple(size), mode="bilinear").unflatten(0, frames.shape[:-3])
