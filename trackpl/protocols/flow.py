"""Optical flow of frame pairs, as Sintel and KITTI score it.

A method sees two frames and no others, at their own size, and gives the motion of every pixel of the first. Where the
user chooses another size, frames are resized to it and the flow back to the size of the truth, both bilinearly about
pixel centres. A method without flow of its own tracks every pixel of the first frame.

The second frame of each pair may be jittered (Bian et al., 2022, Table 4b): brightness times a factor in [1 - b, 1 +
b], hue turned by up to h of the colour circle either way, drawn anew for each pair and the same each time.
"""

from __future__ import annotations

import argparse
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from trackpl import protocols
from trackpl.errors import DataError, Error
from trackpl.metrics.flow import FIGURES, flow_sums
from trackpl.protocols import Benchmark, Row, resized
from trackpl.samples import decode
from trackpl.shards import Sample, open_members
from trackpl.types import Clip, Flow

if TYPE_CHECKING:
    from trackpl.method import Method

Counted = Literal["pairs", "pixels"]
_FIELDS = ("video", "flow")


@dataclass(frozen=True)
class Task(protocols.Task):
    """The frame pairs of one video, and their flow."""

    key: str
    truth: Flow


@dataclass(frozen=True)
class FlowPairs(Benchmark):
    """A benchmark of optical flow.

    Its figures are those of `trackpl.metrics.flow` under the names that the benchmark gives them. "pairs": the mean
    over frame pairs of the mean over their pixels; "pixels": the mean over the pixels of all pairs at once.
    """

    figures: Mapping[str, tuple[str, Counted]]
    whole: bool = False  # EPE is of all pixels, those included whose flow is not to be trusted

    asked: ClassVar[str] = "pairs"
    options: ClassVar[tuple[str, ...]] = ("jitter_brightness", "jitter_hue")
    pace: ClassVar[tuple[str, str]] = ("queries", "pairs")
    lower: ClassVar[tuple[str, ...]] = ("EPE", "ER", "Fl")
    digits: ClassVar[int] = 2

    @property
    def protocol(self) -> dict[str, Any]:
        """Return what two results must share to be comparable, as JSON values."""
        return {
            "shown": "the two frames of a pair",
            "resampler": "bilinear about pixel centres, of frames and of flow back to the size of the truth",
            "EPE": "all pixels" if self.whole else "pixels with known flow",
            "means": {name: list(of) for name, of in self.figures.items()},
            "metrics": list(self.metrics),
        }

    def settings(self, given: argparse.Namespace) -> dict[str, Any]:
        """Return the size of the frames shown and by how much second frames are jittered."""
        jitter = {"brightness": given.jitter_brightness or 0.0, "hue": given.jitter_hue or 0.0}
        return super().settings(given) | {"jitter": jitter}

    def way(self, method: Method) -> str:
        """Return "flow", or "track_dense" for a method without it."""
        return "flow" if method.has("flow") else "track_dense"

    def read(self, sample: Sample, setup: Mapping[str, Any]) -> Task:
        """Read the frames and the flow of one video."""
        with open_members(sample, _FIELDS) as members:
            clip = decode(members, None, _FIELDS, sample.key)
        if clip.flow is None:
            raise DataError(f"sample '{sample.key}' has no flow to score; the benchmark '{self.name}' needs it")
        return Task(Clip(video=clip.video, name=clip.name or (sample.key,), fps=clip.fps), sample.key, clip.flow)

    def predict(self, method: Method, task: protocols.Task, setup: Mapping[str, Any]) -> Tensor:
        """Return the flow (P, 2, H, W) of every pair."""
        assert isinstance(task, Task)
        flows = []
        for s, t in task.truth.pairs:
            frames = resized(task.clip.video[:, [s, t]].to(method.device), setup["input_size"])
            if any(setup["jitter"].values()):
                frames = frames.float() / 255 if frames.dtype == torch.uint8 else frames
                second = jittered(frames[:, 1], **setup["jitter"], seed=f"{task.key} {s} {t}")
                frames = torch.stack([frames[:, 0], second], 1)
            pair = Clip(video=frames, name=task.clip.name, fps=task.clip.fps)
            flows.append(resized_flow(_flow(method, pair), task.clip.size)[0].float().cpu())
            if not flows[-1].isfinite().all():
                bad = int((~flows[-1].isfinite()).any(0).sum())
                raise Error(f"the flow of frames {s} to {t} of '{task.clip.name[0]}' is not finite at {bad} pixels")
        return torch.stack(flows)

    def score(self, task: protocols.Task, prediction: Tensor, setup: Mapping[str, Any]) -> Row:
        """Score one video, pair by pair, so that memory is bounded."""
        assert isinstance(task, Task)
        truth = task.truth
        sums, counts = [], []
        for i in range(len(truth.pairs)):
            visible, valid = (None if m is None else m[:, i] for m in (truth.visible, truth.valid))
            total, count = flow_sums(prediction[i : i + 1], truth.xy[:, i], visible, valid)
            if self.whole and valid is not None:
                all_total, all_count = flow_sums(prediction[i : i + 1], truth.xy[:, i])
                of_all = torch.tensor([not name.endswith(("_visible", "_occluded")) for name in FIGURES])
                total, count = torch.where(of_all, all_total, total), torch.where(of_all, all_count, count)
            sums.append(total[0])
            counts.append(count[0])
        figures, weights = _means(torch.stack(sums), torch.stack(counts), self.figures)
        return {"queries": len(truth.pairs), **figures, "nan_predictions": 0, "weights": weights}


def _means(
    sums: Tensor, counts: Tensor, figures: Mapping[str, tuple[str, Counted]]
) -> tuple[dict[str, float], dict[str, float]]:
    """Average sums over pixels (P, figures) over the pairs of a video; return figures and their weights."""
    values, weights = {}, {}
    for name, (kind, counted) in figures.items():
        i = FIGURES.index(kind)
        total, count = sums[:, i], counts[:, i]
        pooled = counted == "pixels"
        weight = count.sum() if pooled else (count > 0).sum()
        mean = total.sum() / count.sum() if pooled else (total / count).nanmean()
        values[name], weights[name] = float(mean), float(weight)
    return values, weights


def _flow(method: Method, pair: Clip) -> Tensor:
    """Return the flow (1, 2, H, W) from the first frame of a clip to the second."""
    if method.has("flow"):
        xy = method.flow(pair, [(0, 1)]).xy[:, 0]
    else:
        (h, w), device = pair.size, pair.video.device
        y, x = torch.meshgrid(torch.arange(h, device=device), torch.arange(w, device=device), indexing="ij")
        xy = method.track_dense(pair, 0).xy[:, 1].to(device) - (torch.stack([x, y]) + 0.5)
    if xy.shape != (1, 2, *pair.size):
        raise Error(f"the method gave flow of shape {tuple(xy.shape)} for frames of {pair.size[0]}x{pair.size[1]}")
    return xy


def resized_flow(flow: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize flow (B, 2, h, w) to (B, 2, H, W), bilinearly about pixel centres, and its vectors by as much."""
    h, w = flow.shape[-2:]
    if (h, w) == tuple(size):
        return flow
    scale = flow.new_tensor([size[1] / w, size[0] / h])
    return F.interpolate(flow, size=tuple(size), mode="bilinear") * scale[:, None, None]


def jittered(image: Tensor, brightness: float, hue: float, seed: str) -> Tensor:
    """Change brightness and hue of an image (1, 3, H, W) at random, the same for the same seed.

    Args:
        image: float in [0, 1].
        brightness: largest change of the factor of brightness either way.
        hue: largest turn of the hue either way, of the colour circle.
        seed: any text.
    """
    from kornia.enhance import adjust_brightness_accumulative, adjust_hue  # slow to import; few runs need it

    number = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:7], "big")
    draw = 2 * torch.rand(2, generator=torch.Generator().manual_seed(number), dtype=torch.float64) - 1
    image = adjust_brightness_accumulative(image, max(0.0, 1 + brightness * float(draw[0])))
    return adjust_hue(image, hue * float(draw[1]) * 2 * math.pi) if hue else image
