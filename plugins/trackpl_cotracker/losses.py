"""What the windows of a clip are trained on: losses of versions 1 and 2, and those of version 3.

A clip is tracked window after window with gradients; each window gives its own losses, against the truth of the
frames that it covers. M updates a window, S its frames, G groups of points (the clips of a batch), N points a group;
places in pixels of the model's frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

GAMMA = 0.8  # weight of an update against the one after it
VISIBLE_WEIGHT = 10.0  # of the visibility loss of versions 1 and 2
HUBER = 6.0  # pixels from which the loss of version 3 grows linearly
SEEN_WEIGHT, HIDDEN_WEIGHT = 0.05, 0.01  # of version 3's places of visible and of occluded points
NEAR = 12.0  # pixels within which a place of version 3 deserves confidence


class Update(Protocol):
    """State of a window after one update: places in feature pixels (G, S, N, 2), logits (G, S, N)."""

    @property
    def place(self) -> Tensor: ...  # noqa: D102
    @property
    def visible(self) -> Tensor: ...  # noqa: D102
    @property
    def confidence(self) -> Tensor | None: ...  # noqa: D102


@dataclass(frozen=True)
class Truth:
    """What is known of the points of each group over the whole clip."""

    xy: Tensor  # (G, T, N, 2) model pixels
    visible: Tensor  # (G, T, N) bool
    valid: Tensor  # (G, T, N) bool: known, and supervised if the version supervises this frame at all
    first: Tensor  # (G, N) long: query frame


@dataclass(frozen=True)
class Window:
    """What a window predicts, beside the truth of its frames."""

    xy: Tensor  # (M, G, S, N, 2) model pixels after each update
    visible: Tensor  # (M, G, S, N) logits; versions 1 and 2 predict the last alone
    confidence: Tensor | None  # (M, G, S, N) logits; version 3 only
    true_xy: Tensor  # (G, S, N, 2)
    true_visible: Tensor  # (G, S, N) bool
    known: Tensor  # (G, S, N) bool: there is a truth
    valid: Tensor  # (G, S, N) bool: the place is supervised
    points: Tensor  # (G,) number of points that took part


def windows_of(
    unrolled: Sequence[tuple[Tensor | int, Sequence[Update]]],
    truth: Truth,
    stride: int,
    version: int,
    offline: bool = False,
) -> list[Window]:
    """Lay the truth beside each window that ran, by the frame it began with.

    Version 1 leaves out the points that had not started and supervises all frames of the others; version 2 and version
    3 online run all points and supervise from the query on; version 3 offline supervises all.

    Args:
        unrolled: of each window its first frame, an integer or (G,), and its states after each update.
        truth: of the whole clip.
        stride: model pixels a feature pixel.
        version: 1, 2 or 3.
        offline: version 3 saw the whole clip at once.
    """
    frames = torch.arange(truth.xy.shape[1], device=truth.xy.device)
    known = valid = truth.valid & torch.isfinite(truth.xy).all(-1)
    if version == 2 or (version == 3 and not offline):
        valid = known & (frames[:, None] >= truth.first[:, None])
    windows = []
    for start, states in unrolled:
        length = states[0].place.shape[1]
        begin = torch.as_tensor(start, device=frames.device).expand(len(truth.first))
        frame = begin[:, None] + torch.arange(length, device=frames.device)  # (G, S)
        running = torch.ones_like(truth.first, dtype=torch.bool)
        if version == 1:
            running = truth.first < begin[:, None] + length
        there = (frame < len(frames))[..., None] & running[:, None]
        group, frame = torch.arange(len(frame), device=frame.device)[:, None], frame.clamp(max=len(frames) - 1)
        confidence = [s.confidence.float() for s in states if s.confidence is not None]
        windows.append(
            Window(
                xy=torch.stack([s.place for s in states]).float() * stride,
                visible=torch.stack([s.visible for s in states]).float(),
                confidence=torch.stack(confidence) if confidence else None,
                true_xy=truth.xy[group, frame].float(),
                true_visible=truth.visible[group, frame],
                known=known[group, frame] & there,
                valid=valid[group, frame] & there,
                points=running.sum(-1),
            )
        )
    return windows


# Versions 1 and 2 (3.5) ---------------------------------------------------------------------------------------------


def paper_losses(
    windows: Sequence[Window], *, divide_by_points: bool = True, of_probability: bool = True
) -> dict[str, Tensor]:
    """Return the track and visibility losses of versions 1 and 2: sums over windows, means over groups.

    Args:
        windows: at least one.
        divide_by_points: divide the loss of a window by its number of points, though it is a mean over them already,
            as the released code does: the loss then falls with the number of points.
        of_probability: feed the logistic loss the probability instead of the logit, as the released code does.
    """
    track, visible = [], []
    for w in windows:
        scale = w.points.clamp(min=1) if divide_by_points else 1.0  # (G,) N_j
        error = (_true_or_own(w) - w.xy).abs().mean(-1)  # (M, G, S, N)
        track.append(_discounted(_mean_where(w.valid, error)) / scale)
        logit = w.visible[-1]
        sign = w.true_visible.float() * 2 - 1
        each = F.softplus(-sign * (logit.sigmoid() if of_probability else logit))
        seen, hidden = w.valid & w.true_visible, w.valid & ~w.true_visible
        visible.append((_mean_where(seen, each) + _mean_where(hidden, each)) / scale)
    return {
        "track": torch.stack(track).sum(0).mean(),
        "visible": VISIBLE_WEIGHT * torch.stack(visible).sum(0).mean(),
    }


# Version 3 (7.1) ----------------------------------------------------------------------------------------------------


def version3_losses(windows: Sequence[Window], *, hidden: Literal["huber", "l1"] = "huber") -> dict[str, Tensor]:
    """Return the losses of version 3: places of visible and of occluded points, visibility, confidence.

    All are means over windows, updates and groups.

    Args:
        windows: at least one.
        hidden: the loss of occluded points; ``l1`` is the released script's, ``huber`` what its authors meant.
    """
    parts = []
    for w in windows:
        if w.confidence is None:
            raise ValueError("version3_losses needs windows with confidence")
        difference = _true_or_own(w) - w.xy
        robust, plain = huber(difference).mean(-1), difference.abs().mean(-1)
        seen = w.valid & w.true_visible
        target = w.true_visible.float().expand_as(w.visible)
        near = (difference.detach().square().sum(-1) <= NEAR**2).float()
        unsure = F.binary_cross_entropy_with_logits(w.confidence, near, reduction="none")
        unsure = torch.where(w.true_visible, unsure, 0)  # but the mean is over all
        parts.append(
            (
                _discounted(_mean_where(seen, robust)),
                _discounted(_mean_where(w.valid & ~w.true_visible, robust if hidden == "huber" else plain)),
                _mean_where(w.known, F.binary_cross_entropy_with_logits(w.visible, target, reduction="none")).mean(0),
                _mean_where(w.known, unsure).mean(0),
            )
        )
    seen_loss, hidden_loss, visible, confidence = (torch.stack(p).mean() for p in zip(*parts, strict=True))
    return {
        "track": SEEN_WEIGHT * seen_loss,
        "occluded": HIDDEN_WEIGHT * hidden_loss,
        "visible": visible,
        "confidence": confidence,
    }


def huber(difference: Tensor) -> Tensor:
    """Return half the square of a difference, linear from 6 pixels on."""
    size = difference.abs()
    return torch.where(size <= HUBER, difference.square() / 2, HUBER * (size - HUBER / 2))


# Parts --------------------------------------------------------------------------------------------------------------


def _true_or_own(w: Window) -> Tensor:
    """Return the true places where they are known, else the predicted ones: truth may be anything there, NaN too."""
    return torch.where(w.known[..., None], w.true_xy, w.xy.detach())


def _mean_where(mask: Tensor, values: Tensor) -> Tensor:
    """Average (..., G, S, N) over frames and points of a mask (G, S, N): (..., G); 0 where there are none."""
    total = torch.where(mask, values, 0).sum((-2, -1))
    return total / (mask.sum((-2, -1)) + 1e-6)


def _discounted(of_updates: Tensor) -> Tensor:
    """Average (M, G) over updates, each weighing 0.8 of the one after it."""
    m = len(of_updates)
    weights = GAMMA ** torch.arange(m - 1, -1, -1, device=of_updates.device, dtype=of_updates.dtype)
    return (of_updates * weights[:, None]).sum(0) / m
