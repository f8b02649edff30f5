"""What travels between the parts: the query points of groups, and their state over a window.

G groups of N points, S frames of a window. Places are in feature pixels of the model's stride with centres at integers:
the authors' rule, converted at the method's border.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Points:
    """The query points of G groups; the points of a group attend to each other."""

    frame: Tensor  # (G, N) long: query frame, counted from the group's first frame
    place: Tensor  # (G, N, 2) float32 of (x, y)
    description: tuple[Tensor, ...] = ()  # what the version's `describe` returned: (G, N, ...) each


@dataclass(frozen=True)
class State:
    """Estimates of all points in all frames of a window."""

    place: Tensor  # (G, S, N, 2) float32 of (x, y)
    visible: Tensor  # (G, S, N) logits
    confidence: Tensor | None = None  # (G, S, N) logits, version 3 alone
