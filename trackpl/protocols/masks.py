"""Video object segmentation: the masks of the first frame followed through a video, as DAVIS-2017 scores it.

A method gets the video at its own size, frame after frame, and the masks of the objects in frame 0, one channel each
beside the background; in every later frame a pixel is of the channel with the highest value. Objects that come later
are not asked for. Methods without label propagation of their own follow masks by flow or by tracks
(`trackpl.propagation`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from trackpl import protocols
from trackpl.errors import DataError, Error
from trackpl.metrics import segmentation
from trackpl.metrics.segmentation import FIGURES, VOID
from trackpl.propagation import native_way, one_hot
from trackpl.protocols import Benchmark, Row, resized
from trackpl.samples import decode
from trackpl.shards import Sample, open_members
from trackpl.types import Clip

if TYPE_CHECKING:
    from trackpl.method import Method

_FIELDS = ("video", "labels")
_CHUNK = 16  # frames whose masks are held as they are decoded, eight bytes a pixel


@dataclass(frozen=True)
class Task(protocols.Task):
    """One sequence and its masks."""

    labels: Tensor  # (T, H, W) uint8; 0 background, 255 void


@dataclass(frozen=True)
class Masks(Benchmark):
    """A benchmark of object masks."""

    headline: tuple[str, ...] = field(default=("J&F", "J", "F"), kw_only=True)
    metrics: tuple[str, ...] = field(default=FIGURES, kw_only=True)

    asked: ClassVar[str] = "objects"
    pace: ClassVar[tuple[str, str]] = ("frames", "frames")
    lower: ClassVar[tuple[str, ...]] = ("J_decay", "F_decay")

    @property
    def protocol(self) -> dict[str, Any]:
        """Return what two results must share to be comparable, as JSON values."""
        return {
            "given": "masks of frame 0",
            "scored": "all frames but the first and the last, at their own size, without void pixels",
            "boundary": segmentation.TOLERANCE,
            "mean": "over objects",
            "metrics": list(self.metrics),
        }

    def way(self, method: Method) -> str:
        """Return "propagate" with the method's settings, or what the platform makes it of."""
        if method.has("propagate"):
            return native_way(method)
        return next((c for c in ("flow", "track") if method.has(c)), "track_dense")

    def read(self, sample: Sample, setup: Mapping[str, Any]) -> Task:
        """Read one sequence."""
        frames, labels = [], []
        with open_members(sample, _FIELDS) as members:
            for start in range(0, sample.frames, _CHUNK):
                part = decode(members, range(start, min(start + _CHUNK, sample.frames)), _FIELDS, sample.key)
                if part.labels is None:
                    raise DataError(f"sample '{sample.key}' has no masks; the benchmark '{self.name}' needs them")
                if part.labels.max() > VOID:
                    raise DataError(f"sample '{sample.key}' has the label {int(part.labels.max())}; at most {VOID}")
                frames.append(part.video)
                labels.append(part.labels[0].to(torch.uint8))
        if not segmentation.object_ids(labels[0][0]):
            raise DataError(f"sample '{sample.key}' shows no object in its first frame")
        clip = Clip(video=torch.cat(frames, 1), name=part.name or (sample.key,), fps=part.fps)
        return Task(clip, torch.cat(labels))

    def predict(self, method: Method, task: protocols.Task, setup: Mapping[str, Any]) -> Tensor:
        """Return the label map of every frame, (T, H, W) uint8."""
        assert isinstance(task, Task)
        device, size = method.device, setup["input_size"]
        maps, ids = one_hot(task.labels[:1])
        names = torch.tensor(ids, dtype=torch.uint8, device=device)
        frames = (resized(frame.to(device), size) for frame in task.clip.video.unbind(1))
        out: list[Tensor] = []
        for soft in method.propagate_frames(frames, maps.to(device)):
            if soft.shape != maps.shape:
                raise Error(f"the method gave labels of shape {tuple(soft.shape)} for maps of {tuple(maps.shape)}")
            if not soft.isfinite().all():
                raise Error(f"the labels of frame {len(out)} of '{task.clip.name[0]}' are not finite")
            out.append(names[soft[0].argmax(0)].cpu())
        if len(out) != task.clip.frames:
            raise Error(f"the method gave labels of {len(out)} frames for {task.clip.frames}")
        return torch.stack(out)

    def score(self, task: protocols.Task, prediction: Tensor, setup: Mapping[str, Any]) -> Row:
        """Score one sequence: means over its objects."""
        assert isinstance(task, Task)
        scores = segmentation.jf_scores(prediction, task.labels)
        objects = len(scores["J"])
        figures = {name: 100 * float(scores[name].nanmean()) for name in self.metrics}
        weights = {name: float((~scores[name].isnan()).sum()) for name in self.metrics}
        return {"queries": objects, **figures, "nan_predictions": 0, "weights": weights}
