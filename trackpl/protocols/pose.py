"""Pose propagation: the joints of the first frame followed through a clip, as JHMDB is scored by PCK.

Frames are resized to 320x320, both sides by themselves. A method with label propagation of its own gets a map a joint
on its own grid, a small Gaussian at the joint, and the joint is then where the mean of the three largest values is;
where a map has vanished no place is given, and that joint is in no PCK. Any other method tracks the joints as points,
which says nothing of hidden ones: all places count. A joint outside the first frame is not asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from trackpl import protocols
from trackpl.errors import DataError, Error
from trackpl.metrics.pose import SHARE, THRESHOLDS, pck_counts
from trackpl.metrics.tapvid import rescale
from trackpl.propagation import joint_maps, native_way, read_joints
from trackpl.protocols import Benchmark, Row, resized
from trackpl.samples import decode
from trackpl.shards import Sample, open_members
from trackpl.types import Clip

if TYPE_CHECKING:
    from trackpl.method import Method

FIGURES = (*(f"PCK@{a:g}" for a in THRESHOLDS), "abstained")
_FIELDS = ("video", "tracks", "visible", "valid")


@dataclass(frozen=True)
class Task(protocols.Task):
    """One clip and its joints, in pixels of the original frames."""

    joints: Tensor  # (T, J, 2)
    inside: Tensor  # (J,) bool: frame 0 shows the joint
    valid: Tensor  # (T, J) bool: the true place is known


@dataclass(frozen=True)
class Poses(Benchmark):
    """A benchmark of joints."""

    headline: tuple[str, ...] = field(default=("PCK@0.05", "PCK@0.1", "PCK@0.2", "abstained"), kw_only=True)
    metrics: tuple[str, ...] = field(default=FIGURES, kw_only=True)
    input_size: tuple[int, int] | None = field(default=(320, 320), kw_only=True)

    asked: ClassVar[str] = "joints"
    pace: ClassVar[tuple[str, str]] = ("frames", "frames")
    lower: ClassVar[tuple[str, ...]] = ("abstained",)

    @property
    def protocol(self) -> dict[str, Any]:
        """Return what two results must share to be comparable, as JSON values."""
        return {
            "given": "joints of frame 0",
            "scored": "all frames but the first, joints for which a place is given",
            "box": f"{SHARE} of the diagonal of the box around the true joints of those",
            "mean": "pooled over clips, then over joints",
            "resampler": "bilinear about pixel centres",
            "metrics": list(self.metrics),
        }

    def way(self, method: Method) -> str:
        """Return "propagate" with the method's settings where it is native, else "track"."""
        return native_way(method) if method.has("propagate") else "track"

    def read(self, sample: Sample, setup: Mapping[str, Any]) -> Task:
        """Read one clip and its joints."""
        with open_members(sample, _FIELDS) as members:
            clip = decode(members, None, _FIELDS, sample.key)
        if clip.tracks is None or clip.visible is None:
            raise DataError(f"sample '{sample.key}' has no joints; the benchmark '{self.name}' needs them")
        valid = torch.ones_like(clip.visible) if clip.valid is None else clip.valid
        video = Clip(video=clip.video, name=clip.name or (sample.key,), fps=clip.fps)
        return Task(video, clip.tracks[0], (clip.visible & valid)[0, 0], valid[0])

    def predict(self, method: Method, task: protocols.Task, setup: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Return places (T, J, 2) in pixels of the original frames, and which joints were given one, (T, J) bool."""
        assert isinstance(task, Task)
        clip = Clip(resized(task.clip.video.to(method.device), setup["input_size"]), name=task.clip.name)
        follow = _by_maps if method.has("propagate") else _by_tracks
        places, found = follow(method, clip, task)
        return places.cpu(), found.cpu()

    def score(self, task: protocols.Task, prediction: tuple[Tensor, Tensor], setup: Mapping[str, Any]) -> Row:
        """Score one clip: PCK of each joint, which is pooled over clips, and their mean."""
        assert isinstance(task, Task)
        places, found = prediction
        hits, judged, known = pck_counts(places, task.joints, found, task.valid)
        names = FIGURES[: len(THRESHOLDS)]
        per_joint = {name: (100 * h / judged) for name, h in zip(names, hits, strict=True)}
        abstained = 100 * (1 - float(judged.sum() / known.sum()))
        return {
            "queries": int(task.inside.sum()),
            **{name: float(value.nanmean()) for name, value in per_joint.items()},
            "abstained": abstained,
            "nan_predictions": int((found & ~places.isfinite().all(-1)).sum()),
            "parts": {name: [None if v != v else v for v in value.tolist()] for name, value in per_joint.items()},
            "weights": dict.fromkeys(names, judged.tolist()) | {"abstained": float(known.sum())},
        }


def _by_maps(method: Method, clip: Clip, task: Task) -> tuple[Tensor, Tensor]:
    """Follow joints as label maps; cell i of an axis of w cells stands for the pixel i W / w, counted from 0."""
    (h, w), size = method.label_size(clip.size), task.clip.size
    cells = rescale(task.joints[:1] - 0.5, size, (h, w)).float()
    maps = joint_maps(torch.where(task.inside[:, None], cells, -1.0), (h, w)).to(method.device)
    soft = [frame[0] for frame in method.propagate_frames(clip.video.unbind(1), maps)]
    if [frame.shape for frame in soft] != clip.frames * [maps.shape[1:]]:
        shapes = ", ".join(sorted({str(tuple(frame.shape)) for frame in soft})) or "nothing"
        raise Error(
            f"the method gave maps of {len(soft)} frames of {shapes} for {clip.frames} of {tuple(maps.shape[1:])}"
        )
    read = torch.stack([read_joints(frame[1:].float().cpu()) for frame in soft])
    return rescale(read, (h, w), size) + 0.5, (read >= 0).all(-1)


def _by_tracks(method: Method, clip: Clip, task: Task) -> tuple[Tensor, Tensor]:
    """Follow joints as points."""
    t, j = task.valid.shape
    places = torch.full((t, j, 2), torch.nan, dtype=torch.float64)
    found = torch.zeros(t, j, dtype=torch.bool)
    asked = task.inside.nonzero()[:, 0]
    if len(asked):
        start = rescale(task.joints[0, asked], task.clip.size, clip.size).float()
        queries = torch.cat([torch.zeros(len(asked), 1), start], 1)[None].to(method.device)
        xy = method.track(clip, queries).xy[0].cpu()
        places[:, asked], found[:, asked] = rescale(xy, clip.size, task.clip.size), True
    return places, found
