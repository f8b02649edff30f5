"""`Method`: what every point tracker and dense correspondence method is to the platform.

A method states its losses and at least one native capability (sparse tracks, dense tracks, flow, label propagation).
Training, validation, prediction and the capabilities it lacks are the platform's (`trackpl.adapters`).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from lightning import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from trackpl import adapters, propagation
from trackpl.errors import DataError, Error
from trackpl.metrics.flow import FlowMetrics
from trackpl.metrics.tapvid import TapVid, first_queries
from trackpl.published import Published
from trackpl.streams import Stream, stream_of
from trackpl.types import Clip, DenseTracks, Flow, Tracks, check_queries

CONTRACT = 1
"""Version of the contract between methods and platform; a plugin states the one that it was written for."""


@dataclass(frozen=True)
class Info:
    """What a user should know of a method before using it."""

    title: str
    paper: str
    licence: str  # of the code
    weights_licence: str = ""
    needs_depth: bool = False
    joint_points: bool = False  # points influence each other
    causal: bool = False  # looks only at frames up to the present one


class Method(LightningModule):
    """Base of all methods.

    A subclass sets `info` and `contract`, defines `losses` and at least one of `track`, `flow` (or `encode` and
    `match`) and `track_dense`, and may define `propagate_frames`, `import_weights` and name the file of its shipped
    weights in `weights`.

    Args:
        optimizer: makes the optimiser from the parameters, as ``{class_path, init_args}`` in a config.
        lr_scheduler: makes the learning-rate schedule, stepped once a batch; none keeps the rate.
    """

    info: ClassVar[Info]
    contract: ClassVar[int] = CONTRACT
    weights: ClassVar[str | None] = None  # path of the shipped weights, relative to the plugin's folder
    more_weights: ClassVar[Mapping[str, str]] = {}  # other weights that ship: name as a checkpoint -> path, likewise
    published: ClassVar[tuple[Published, ...]] = ()  # weights that others publish, for `trackpl weights`

    def __init__(
        self,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        self._optimizer, self._lr_scheduler = optimizer, lr_scheduler
        self._points: dict[str, TapVid] = {}
        self._flows: dict[str, FlowMetrics] = {}

    # What a method writes ------------------------------------------------------------------------------------------

    def losses(self, clip: Clip) -> dict[str, Tensor]:
        """Return named scalar losses of a training clip; their sum is minimised and each is logged."""
        raise Error(f"{type(self).__name__} defines no losses and cannot be trained")

    def track(self, clip: Clip, queries: Tensor) -> Tracks:
        """Track points through a clip.

        Args:
            clip: any length T >= 1 and any size.
            queries: (B, N, 3) of (t, x, y), t a whole frame index, x and y in pixels.

        Returns:
            `Tracks`, xy (B, T, N, 2) in pixels of the clip; each point is exactly its query in its query frame.

        Raises:
            DataError: queries of the wrong shape or outside the clip.
        """
        check_queries(clip, queries)
        return adapters.track(self, clip, queries)

    def encode(self, images: Tensor) -> Any:
        """Compute once a frame what `match` needs of it, from images (B, 3, H, W) in [0, 1]."""
        raise Error(f"{type(self).__name__} does not encode frames one by one")

    def match(self, source: Any, target: Any, size: tuple[int, int]) -> Tensor:
        """Return the flow (B, 2, H, W) between two encoded frames of the given size."""
        raise Error(f"{type(self).__name__} does not match frames")

    def flow(self, clip: Clip, pairs: Sequence[tuple[int, int]]) -> Flow:
        """Return the displacement of every pixel of frame s to frame t for each pair (s, t).

        A method defines `flow` itself, or `encode` and `match`, of which the platform makes it and which let it encode
        each frame of a long video only once.

        Raises:
            DataError: a pair outside the clip.
        """
        bad = [p for p in pairs if min(p) < 0 or max(p) >= clip.frames]
        if bad:
            raise DataError(f"flow pair {bad[0]} is outside the clip of {clip.frames} frames")
        return adapters.flow(self, clip, pairs)

    def track_dense(self, clip: Clip, source: int = 0) -> DenseTracks:
        """Track every pixel of the frame `source` through a clip."""
        return adapters.track_dense(self, clip, source)

    def propagate(self, clip: Clip, labels: Tensor) -> Tensor:
        """Follow the labels of frame 0 through a clip.

        Args:
            clip: any length T >= 1 and any size.
            labels: float (B, K, h, w), K soft maps of frame 0, on any grid that spans the frame; channel 0 is the
                background. `trackpl.propagation.one_hot` makes them of a mask.

        Returns:
            (B, T, K, h, w); frame 0 is `labels`. For long videos see `propagate_frames`.
        """
        return torch.stack(list(self.propagate_frames(clip.video.unbind(1), labels)), 1)

    def propagate_frames(self, frames: Iterable[Tensor], labels: Tensor) -> Iterator[Tensor]:
        """Follow the labels of frame 0 through frames (B, 3, H, W) that come one after the other; see `propagate`.

        A method that propagates labels in a way of its own defines this (and `label_size`), in bounded memory; others
        get `trackpl.propagation`, by flow or by tracks.

        Yields:
            (B, K, h, w) of each frame, in order, frame 0 first; maybe some frames later than it came.

        Raises:
            DataError: labels or frames of a wrong shape.
        """
        return propagation.propagate_frames(self, frames, labels)

    def label_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the grid (h, w) on which labels of frames of size (H, W) are propagated.

        Labels that come on it are not resampled. Cell i of an axis stands for pixel i * W / w.
        """
        return size

    def stream(self, queries: Tensor | None = None) -> Stream:
        """Begin to track points (N, 3) of (t, x, y) through frames that come one after the other.

        A method without a stream of its own gets one of the platform: by flow, which equals `track`, or by windows.
        """
        stream = stream_of(self)
        if queries is not None:
            stream.add(queries)
        return stream

    def import_weights(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Translate the keys of the authors' published checkpoint into ours; unknown keys stay as they are."""
        return state

    @classmethod
    def options_of(cls, state: dict[str, Tensor]) -> dict[str, Any]:
        """Return the constructor's options that the authors' published checkpoint implies, such as its size."""
        return {}

    def has(self, capability: str) -> bool:
        """Whether a capability is native and not made of another one.

        Args:
            capability: "track", "flow", "match", "track_dense" or "propagate". Encoding and matching frames counts as
                giving flow, and propagating frame by frame as propagating.
        """
        own = getattr(type(self), capability) is not getattr(Method, capability)
        parts = {"flow": "match", "propagate": "propagate_frames"}
        return own or (capability in parts and self.has(parts[capability]))

    # What the platform does ----------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        """Build the optimiser and, where there is one, its schedule."""
        optimizer = self._optimizer(p for p in self.parameters() if p.requires_grad)
        if self._lr_scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self._lr_scheduler(optimizer), "interval": "step"},
        }

    def training_step(self, clip: Clip, batch_idx: int) -> Tensor:
        """Sum and log the losses of one batch."""
        losses = self.losses(clip)
        total = torch.stack(list(losses.values())).sum()
        size = clip.video.shape[0]
        self.log_dict({f"train/{k}": v.detach() for k, v in losses.items()}, batch_size=size, sync_dist=True)
        self.log("train/loss", total.detach(), prog_bar=True, batch_size=size, sync_dist=True)
        return total

    def validation_step(self, clip: Clip, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Score one batch of held-out clips against their truth."""
        return self._score("val", clip, dataloader_idx)

    def test_step(self, clip: Clip, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Score one batch of a benchmark."""
        return self._score("test", clip, dataloader_idx)

    def predict_step(self, clip: Clip, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Track the points that the clip has truth for, or a grid of its first frame."""
        queries = _queries(clip)
        return {"clip": clip, "queries": queries, "tracks": self.track(clip, queries)}

    def on_validation_epoch_start(self) -> None:
        """Make the metrics of every validation set, the same on all ranks."""
        self._make_metrics("val")

    def on_test_epoch_start(self) -> None:
        """Make the metrics of every benchmark, the same on all ranks."""
        self._make_metrics("test")

    def on_validation_epoch_end(self) -> None:
        """Log the figures over all validation videos of all ranks."""
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        """Log the figures over all test videos of all ranks."""
        self._log_metrics("test")

    def _benchmarks(self) -> list[str]:
        return list(getattr(self.trainer, "datamodule").benchmarks)  # noqa: B009 - Lightning sets it late

    def _make_metrics(self, stage: str) -> None:
        device = "cpu" if self.device.type == "mps" else self.device  # figures are float64, which MPS lacks
        self._points = {f"{stage}/{name}": TapVid().to(device) for name in self._benchmarks()}
        names = self._benchmarks() if self.has("flow") else []
        self._flows = {f"{stage}/{name}": FlowMetrics().to(device) for name in names}

    def _score(self, stage: str, clip: Clip, dataloader_idx: int) -> dict[str, Any]:
        benchmark = self._benchmarks()[dataloader_idx]
        out: dict[str, Any] = {"benchmark": benchmark, "clip": clip, "rows": []}
        if clip.tracks is not None and clip.visible is not None:
            queries = _queries(clip)
            tracks = self.track(clip, queries)
            rows = self._points[f"{stage}/{benchmark}"].update_clip(clip, queries, tracks)
            out |= {"queries": queries, "tracks": tracks, "rows": rows}
        if clip.flow is not None and self.has("flow"):
            flow = self.flow(clip, clip.flow.pairs)
            out["flow"] = flow
            self._flows[f"{stage}/{benchmark}"].update(flow.xy, clip.flow.xy, clip.flow.visible, clip.flow.valid)
        return out

    def _log_metrics(self, stage: str) -> None:
        """Log what was measured; a figure without any data is left out, on every rank alike."""
        for name, metric in [*self._points.items(), *self._flows.items()]:
            with warnings.catch_warnings():  # that there was nothing to measure; every rank must ask all the same
                warnings.filterwarnings("ignore", message="The ``compute`` method of metric")
                figures = {k: v for k, v in metric.compute().items() if not v.isnan()}
            if figures.get("videos", figures.get("images", 0)) > 0:
                self.log_dict({f"{name}/{k}": v.float() for k, v in figures.items()})
            metric.reset()


def _queries(clip: Clip) -> Tensor:
    if clip.tracks is not None and clip.visible is not None:
        return first_queries(clip.tracks, clip.visible, clip.valid)
    return adapters.grid_queries(clip, 16)
