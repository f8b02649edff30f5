"""Label propagation (paper, 4.2): every frame takes its labels from frame 0 and the frames just before it.

For target t and each source s the walk runs from t to s, coarse to fine, which gives a flow f at the nodes. Nodes of
both frames are described by hypercolumns. A node p of t looks at the window of columns q around it, which stand for
the places q + f(q) of s; of all columns of all sources the k most similar are kept, and the label of p is the mean of
the labels there, weighted by a softmax over the kept ones alone. Sources are matched directly, not by products of the
transitions between them: what was lost behind an occluder is found again.

Which levels: the paper stacks its levels 3 and 4 of 5 and looks up labels at 4, our levels l=2 and l=3, strides 16 and
8. With ``nodes="paper"`` it is the level next to the finest and the one above it, so a pyramid of three levels (strides
16, 8, 4, as of the shipped weights) uses the same strides. By default it is the finest level and the one above it,
strides 4 and 8: small objects need them (figures in the README). A single level is a hypercolumn by itself.

Glossary: as in `transition`; hypercolumn (B, C, h, w), S sources, K labels, k kept columns.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from trackpl.errors import Error, closest
from trackpl.propagation import as_float, check_labels, pixel_places, resample
from trackpl_crw.transition import TILE, local_correlation, operands, unit, upsample, warp

if TYPE_CHECKING:
    from trackpl_crw.method import MultiscaleCRW


@dataclass(frozen=True)
class Propagation:
    """How labels are propagated; the paper gives no values. The README says how these were chosen.

    Args:
        context: frames before the target that are sources besides frame 0, which counts twice while it is one of them.
        topk: columns that are kept for a node.
        tau: temperature of their softmax.
        resolution: frames are embedded with their shorter side made as long, if that does not enlarge the longer one to
            more than twice as much; None keeps every size.
        nodes: which carry labels: ``finest``, those of the finest level, or ``paper``, those of the level above it.
        flow: by which labels and hypercolumns are warped; ``incoming``: that of the level above the nodes; ``finest``:
            that of the finest level, which takes longer.

    Raises:
        Error: a setting that is out of range.
    """

    context: int = 7
    topk: int = 10
    tau: float = 0.15
    resolution: int | None = 384
    nodes: Literal["finest", "paper"] = "finest"
    flow: Literal["incoming", "finest"] = "incoming"

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        for name, allowed in (("nodes", ("finest", "paper")), ("flow", ("incoming", "finest"))):
            if getattr(self, name) not in allowed:
                raise Error(f"propagation needs {name} one of {', '.join(allowed)}; got {getattr(self, name)!r}")
        whole = {"context": (self.context, 0), "topk": (self.topk, 1)}
        if self.resolution is not None:
            whole["resolution"] = (self.resolution, 16)
        for name, (value, least) in whole.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise Error(f"propagation needs {name} a whole number of at least {least}; got {value!r}")
        if isinstance(self.tau, bool) or not isinstance(self.tau, int | float) or not 0 < self.tau < math.inf:
            raise Error(f"propagation needs tau a number above 0; got {self.tau!r}")

    @classmethod
    def of(cls, given: str | Mapping[str, Any] | Propagation | None) -> Propagation:
        """Return the settings that are meant: a name of `PUBLISHED`, or some of the fields, the others by default.

        Raises:
            Error: no such name, or no such field.
        """
        if given is None or isinstance(given, Propagation):
            return given or cls()
        if isinstance(given, str):
            if given not in PUBLISHED:
                raise Error(f"no settings of propagation are called '{given}'; {closest(given, PUBLISHED)}")
            return PUBLISHED[given]
        names = [f.name for f in fields(cls)]
        for name in given:
            if name not in names:
                raise Error(f"propagation has no setting '{name}'; {closest(str(name), names)}")
        return cls(**given)


PUBLISHED = {
    "davis": Propagation(context=20, topk=10, tau=0.07, resolution=None, nodes="paper"),
    "jhmdb": Propagation(context=7, topk=10, tau=0.07, resolution=None, nodes="paper"),
}
"""Settings of the protocols of DAVIS and JHMDB in Jabri et al., whose tau is 0.05 to 0.07, on frames as they come."""


@dataclass(frozen=True)
class Source:
    """What of a frame is kept for the frames after it; B = 1."""

    levels: list[Tensor]  # raw embeddings that the flow is made of, coarse to fine
    hyper: Tensor  # (1, C, h, w)
    labels: Tensor  # (1, K, h, w)


def hypercolumn(fine: Tensor, coarse: Tensor | None) -> Tensor:
    """Stack the unit embeddings of two levels (B, d, h, w) and (B, d', h/2, w/2) at the size of the finer."""
    if coarse is None:
        return unit(fine)
    above = F.interpolate(unit(coarse), (fine.shape[-2], fine.shape[-1]), mode="bilinear", align_corners=True)
    return torch.cat([unit(fine), above], 1)


def attend(
    target: Tensor,
    sources: Tensor,
    flows: Tensor,
    labels: Tensor,
    radius: int,
    tau: float,
    topk: int,
    copies: Sequence[int] | None = None,
) -> Tensor:
    """Give frame t the labels of its most similar columns: K_{t,s} B_f L_s over all sources at once.

    Args:
        target: hypercolumns of frame t, (1, C, h, w).
        sources: those of S frames s, (S, C, h, w).
        flows: incoming flows from t to each s, (S, 2, h, w).
        labels: (S, K, h, w).
        radius: window radius r.
        tau: temperature.
        topk: columns kept for a node.
        copies: how many times each source counts; a source named twice takes two of the k places. Once by default.

    Returns:
        (1, K, h, w); rows that sum to 1 keep to it.
    """
    s, k, h, w = labels.shape
    x, y, _ = operands(target.expand(s, -1, -1, -1), sources, flows, radius, tau)
    keep = min(topk, (2 * radius + 1) ** 2)
    # Copies of a column have its logit: beyond `keep` of them none can be kept.
    times = torch.tensor([min(c, keep) for c in copies or [1] * s], device=labels.device)
    which = torch.arange(s, device=labels.device).repeat_interleave(times)
    found = []
    for top in range(0, h, TILE):  # band by band: the logits stay in the cache
        rows = slice(top, top + TILE)
        logits = local_correlation(x[:, :, rows], y[:, :, top : top + TILE + 2 * radius], radius)
        best, column = logits.topk(keep, -1)  # (S, rows, w, keep)
        node = _nodes(column, top, radius, (h, w))
        best, place = best[which].permute(1, 2, 0, 3).flatten(2).topk(keep, -1)
        node = node[which].permute(1, 2, 0, 3).flatten(2).gather(-1, place)
        found.append((best.softmax(-1).view(-1, keep), node.view(-1, keep)))
    weights, nodes = (torch.cat(parts) for parts in zip(*found, strict=True))
    table = warp(labels, flows).permute(0, 2, 3, 1).reshape(s * h * w, k)
    out = F.embedding_bag(nodes, table, per_sample_weights=weights.to(table.dtype), mode="sum")
    return out.T.reshape(1, k, h, w)


def _nodes(column: Tensor, top: int, radius: int, size: tuple[int, int]) -> Tensor:
    """Count the nodes q = p + offset (S, rows, w, keep) over all sources; those off the grid weigh nothing."""
    (h, w), side = size, 2 * radius + 1
    y = torch.arange(column.shape[1], device=column.device)[:, None, None] + top
    x = torch.arange(w, device=column.device)[:, None]
    y = (y + column.div(side, rounding_mode="floor") - radius).clamp(0, h - 1)
    x = (x + column % side - radius).clamp(0, w - 1)
    frame = torch.arange(len(column), device=column.device).view(-1, 1, 1, 1)
    return (frame * h + y) * w + x


def propagated(
    method: MultiscaleCRW, target: tuple[list[Tensor], Tensor], first: Source, before: Sequence[Source]
) -> Tensor:
    """Labels (1, K, h, w) of a frame from frame 0 and the frames before it (frame 0 not among them).

    Args:
        method: gives the matcher and the settings.
        target: the fields `levels` and `hyper` of the frame.
        first: frame 0.
        before: the last frames, at most as many as the context takes, frame 0 not among them.
    """
    settings, (levels, ours) = method.propagation, target
    sources = [first, *before]
    # While frame 0 is one of the last frames it counts twice.
    copies = [2 if len(before) < settings.context else 1] + [1] * len(before)
    hyper = torch.cat([s.hyper for s in sources])
    theirs = [torch.cat(level) for level in zip(*(s.levels for s in sources), strict=True)]
    same = [level.expand(len(sources), -1, -1, -1) for level in levels]
    labels = torch.cat([s.labels for s in sources])
    with torch.autocast(hyper.device.type, enabled=False):
        flows = _at_nodes(method.matcher.flow(same, theirs), hyper) if levels else torch.zeros_like(hyper[:, :2])
        return attend(ours, hyper, flows, labels, method.matcher.radius, settings.tau, settings.topk, copies)


def _at_nodes(flow: Tensor, nodes: Tensor) -> Tensor:
    """Bring a flow (S, 2, ., .) to the nodes (S, C, h, w): from the level above upsampled, from a finer one picked."""
    step = flow.shape[-1] // nodes.shape[-1]
    return flow[..., ::step, ::step] / step if step else upsample(flow, 2)


def label_stride(method: MultiscaleCRW) -> int:
    """Return the stride of the nodes that carry labels."""
    levels = len(method.embed_heads)
    return method.coarsest >> _label_level(levels, method.propagation)


def _label_level(levels: int, settings: Propagation) -> int:
    return max(0, levels - (2 if settings.nodes == "paper" else 1))


def embedded_size(size: tuple[int, int], resolution: int | None, coarsest: int) -> tuple[int, int]:
    """Return the size at which frames (H, W) are embedded: multiples of the coarsest stride, two at least."""
    scale = 1.0
    if resolution is not None:
        scale = min(resolution / min(size), max(1.0, 2 * resolution / max(size)))
    h, w = (max(2, round(side * scale / coarsest)) * coarsest for side in size)
    return h, w


def node_places(size: tuple[int, int], stride: int) -> tuple[Tensor, Tensor]:
    """Place the nodes of a level, y (h,) and x (w,) as shares of the frame: node i is centred on pixel stride * i."""
    y, x = ((torch.arange(side // stride) * stride + 0.5) / side for side in size)
    return y, x


@torch.no_grad()
def propagate_frames(method: MultiscaleCRW, frames: Iterable[Tensor], labels: Tensor) -> Iterator[Tensor]:
    """Propagate the labels of frame 0 frame by frame; see `Method.propagate_frames`.

    Each frame is embedded once, and as many frames are remembered as the context takes.
    """
    settings, stride = method.propagation, label_stride(method)
    given = labels.to(method.device, torch.float32)
    first: list[Source] = []
    before: list[deque[Source]] = []
    size = 0, 0
    for image in frames:
        check_labels(labels, image, size if first else None)
        if not first:
            size = image.shape[-2], image.shape[-1]
            inner = embedded_size(size, settings.resolution, method.coarsest)
            nodes, theirs = node_places(inner, stride), pixel_places(given)
            own = resample(given, theirs, nodes)
            seen = _described(method, image, inner)
            first = [Source(levels, hyper, own[i : i + 1]) for i, (levels, hyper) in enumerate(seen)]
            before = [deque(maxlen=settings.context) for _ in seen]
            yield given
            continue
        found = []
        for start, past, (levels, hyper) in zip(first, before, _described(method, image, inner), strict=True):
            frame = Source(levels, hyper, propagated(method, (levels, hyper), start, list(past)))
            past.append(frame)
            found.append(frame.labels)
        yield resample(torch.cat(found), nodes, theirs)


def _described(method: MultiscaleCRW, image: Tensor, size: tuple[int, int]) -> list[tuple[list[Tensor], Tensor]]:
    """Embed a frame (B, 3, H, W): for each video the levels that flow is made of, and hypercolumns."""
    image = as_float(image.to(method.device))
    if image.shape[-2:] != size:
        image = F.interpolate(image, size, mode="bilinear", align_corners=False, antialias=True)
    levels = [level.float() for level in method.embed(image)]
    fine = _label_level(len(levels), method.propagation)
    hyper = hypercolumn(levels[fine], levels[fine - 1] if fine else None)
    used = levels if method.propagation.flow == "finest" else levels[:fine]
    return [([e[i : i + 1] for e in used], hyper[i : i + 1]) for i in range(len(image))]
