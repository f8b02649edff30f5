"""Teachers: methods with weights that label videos, alone or in agreement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trackpl.checkpoints import load
from trackpl.errors import DataError, Error
from trackpl.method import Method
from trackpl.plugins import find
from trackpl.published import file_sha256, resolve, shipped_path
from trackpl.types import Clip


@dataclass(frozen=True)
class Teacher:
    """A method that labels videos.

    Args:
        name: of its plugin.
        checkpoint: its weights, as of `trackpl track --checkpoint`; none: those that ship with it.
        threshold: probability above which it calls a point visible.
        options: of the method, before those stored in its checkpoint.
    """

    name: str
    checkpoint: str | None = None
    threshold: float = 0.5
    options: Mapping[str, Any] = field(default_factory=dict)

    def weights(self) -> Path:
        """Return the file of its weights.

        Raises:
            PluginError: there is no such method, or it cannot be used.
            DataError: there is no such file.
        """
        cls: type[Method] = find(self.name).load()
        hint = f"give its weights: {{name: {self.name}, checkpoint: FILE}}; `trackpl weights` lists what there is"
        try:
            path = shipped_path(cls) if self.checkpoint is None else resolve(self.checkpoint, cls)
        except Error as error:
            raise DataError(f"teacher '{self.name}': {error}") from None
        if path is None:
            raise DataError(f"teacher '{self.name}' ships no weights; {hint}")
        if not path.is_file():
            raise DataError(f"teacher '{self.name}' has no weights at {path}; {hint}")
        return path

    def facts(self) -> dict[str, Any]:
        """Return all that its labels follow from."""
        own = {"name": self.name, "threshold": self.threshold, "options": dict(self.options)}
        return own | {"weights": file_sha256(self.weights())}

    def load(self, device: torch.device) -> Method:
        """Return the method with its weights, in eval mode."""
        return load(self.name, self.checkpoint, str(device), **self.options)


@dataclass(frozen=True)
class Labels:
    """What teachers say of a clip."""

    tracks: Tensor  # (T, N, 2) pixels
    visible: Tensor  # (T, N) bool
    valid: Tensor  # (T, N) bool


@torch.no_grad()
def label(
    methods: Sequence[Method],
    thresholds: Sequence[float],
    video: Tensor,
    queries: Tensor,
    *,
    within: float = 4.0,
    bf16: bool = True,
) -> Labels:
    """Track the queries of a clip with every method, and keep what they agree on.

    Args:
        methods: the teachers, on the device of the video.
        thresholds: of each, on the probability that a point is visible.
        video: (T, 3, H, W).
        queries: (N, 3) of (t, x, y).
        within: distance of their tracks up to which they agree, in pixels of a frame of 256 x 256.
        bf16: compute in bfloat16 where autocast does.
    """
    clip, size = Clip(video=video[None]), (video.shape[-2], video.shape[-1])
    xy, visible = [], []
    for method, threshold in zip(methods, thresholds, strict=True):
        with torch.autocast(video.device.type, torch.bfloat16, enabled=bf16):
            tracks = method.track(clip, queries[None])
        xy.append(tracks.xy[0].float())
        visible.append(tracks.visible[0].float() > threshold)
    return agree(torch.stack(xy), torch.stack(visible), size, within)


def agree(xy: Tensor, visible: Tensor, size: tuple[int, int], within: float) -> Labels:
    """Join the tracks of K teachers: their mean; valid where all are near each other and see the same.

    Args:
        xy: (K, T, N, 2) pixels; what is not finite is not valid.
        visible: (K, T, N) bool; a point outside the frame is not visible.
        size: H, W of the frames.
        within: distance of any two of them at most, in pixels of a frame of 256 x 256.
    """
    known = xy.isfinite().all(-1)
    xy = torch.where(known[..., None], xy, 0.0)
    limit = xy.new_tensor([size[1], size[0]])
    visible = visible & ((xy >= 0) & (xy <= limit)).all(-1)
    scaled = xy * 256 / limit
    apart = (scaled[:, None] - scaled[None]).norm(dim=-1).amax((0, 1))
    valid = known.all(0) & (apart <= within) & (visible == visible[:1]).all(0)
    return Labels(xy.mean(0), visible.all(0), valid)
