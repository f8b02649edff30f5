"""Label propagation: soft labels of frame 0 in, soft labels of every frame out, one frame after the other.

A method may have its own (`Method.propagate_frames`). The others get one of two adapters, whose memory does not grow
with the video. A method with flow looks back: every pixel finds its place in frame 0 by the most consistent of several
steps back, in the manner of `trackpl.chaining`, and takes the label there. A tracker looks forwards: a grid of points
of frame 0 carries labels, and every pixel takes those of the visible points around it.

Maps are (B, K, h, w) on any grid that spans the frame; channel 0 is the background.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trackpl.chaining import sample
from trackpl.errors import DataError, Error
from trackpl.types import Clip, Tracks

if TYPE_CHECKING:
    from trackpl.method import Method

SPANS = (1, 3, 9)
"""Lengths in frames of the steps back that labels by flow try; maps of the frame's size are kept for as many."""

VOID = 255
"""Value of a mask where nobody says what is there."""

Places = tuple[Tensor, Tensor]
"""Where the rows (h,) and the columns (w,) of a map are, rising, as shares of the frame's height and width."""


# Maps ---------------------------------------------------------------------------------------------------------------


def one_hot(labels: Tensor) -> tuple[Tensor, list[int]]:
    """Make soft maps of segment ids.

    Args:
        labels: integers (B, H, W); 0 is background, and so is 255 (void), unless it is the only other value.

    Returns:
        float32 (B, K, H, W), and the K ids of its channels, of which the first is 0.
    """
    present = [i for i in labels.unique().tolist() if i != 0]
    ids = [0, *(i for i in present if i != VOID or len(present) == 1)]
    maps = torch.stack([labels == i for i in ids], 1).float()
    maps[:, 0] = 1 - maps[:, 1:].sum(1)
    return maps, ids


def joint_maps(points: Tensor, size: tuple[int, int]) -> Tensor:
    """Draw joints as the protocol of JHMDB does: a truncated Gaussian of sigma 0.5 around the rounded position.

    Args:
        points: (B, J, 2) of (x, y) in cells of the map, centres at whole numbers.
        size: h, w of the map.

    Returns:
        (B, 1 + J, h, w); channel 0 is 1 where all others are 0, which are all 0 for a joint outside the map.
    """
    h, w = size
    centre = torch.floor(points.float() + 0.5)
    dy = torch.arange(h, device=points.device) - centre[..., 1:]  # (B, J, h)
    dx = torch.arange(w, device=points.device) - centre[..., :1]
    # The stamp has 4 x 4 cells, from two before the centre to one after it, and its peak is 1.
    rows, columns = ((-2 * d.square()).exp() * ((d >= -2) & (d <= 1)) for d in (dy, dx))
    inside = (centre >= 0).all(-1) & (centre[..., 0] < w) & (centre[..., 1] < h)
    joints = rows[..., :, None] * columns[..., None, :] * inside[..., None, None]
    background = (joints.sum(1, keepdim=True) == 0).to(joints.dtype)
    return torch.cat([background, joints], 1)


def read_joints(maps: Tensor, top: int = 3) -> Tensor:
    """Read joints off their maps: the mean place of the `top` largest values, weighted by them (JHMDB's protocol).

    Args:
        maps: (..., J, h, w), without the background, not negative.
        top: values that count.

    Returns:
        (..., J, 2) of (x, y) in cells; (-1, -1) where a map is zero throughout.
    """
    w = maps.shape[-1]
    value, cell = maps.flatten(-2).topk(min(top, maps.shape[-2] * w), -1)
    total = value.sum(-1, keepdim=True)
    weight = value / total.clamp(min=torch.finfo(value.dtype).tiny)
    y = cell.div(w, rounding_mode="floor")
    place = torch.stack([(weight * (cell % w)).sum(-1), (weight * y).sum(-1)], -1)
    return torch.where(total > 0, place, -1.0)


def pixel_places(maps: Tensor) -> Places:
    """Where the pixels of a map (..., h, w) are whose outer borders are those of the frame."""
    y, x = ((torch.arange(n, device=maps.device) + 0.5) / n for n in maps.shape[-2:])
    return y, x


def resample(maps: Tensor, own: Places, wanted: Places) -> Tensor:
    """Bring maps (B, K, h, w) from their own places to others: linear, and averaged where they become coarser.

    Beyond the outermost places their values hold on; maps that are at the wanted places already stay as they are.
    """
    same = all(a.shape == b.shape and torch.allclose(a, b) for a, b in zip(own, wanted, strict=True))
    if same:
        return maps
    rows, columns = (_tents(a, b).to(maps) for a, b in zip(own, wanted, strict=True))
    return rows @ maps @ columns.mT


def _tents(own: Tensor, wanted: Tensor) -> Tensor:
    """Weights (wanted, own) of a linear interpolation along one axis, widened where it becomes coarser."""
    own, wanted = own.double(), wanted.double().clamp(own[0], own[-1])
    width = max(float(p[1] - p[0]) if len(p) > 1 else 1.0 for p in (own, wanted))
    weight = (1 - (wanted[:, None] - own).abs() / width).clamp(min=0)
    return weight / weight.sum(1, keepdim=True)


def as_float(image: Tensor) -> Tensor:
    """Return pixels as float32 in [0, 1]."""
    return image.float() / 255 if image.dtype == torch.uint8 else image.float()


def check_labels(labels: Tensor, image: Tensor, size: tuple[int, int] | None = None) -> None:
    """Refuse labels that are not float (B, K, h, w), or frames (B, 3, H, W) that do not go with them or `size`."""
    if labels.ndim != 4 or not labels.is_floating_point() or min(labels.shape) < 1:
        got = f"{labels.dtype} {tuple(labels.shape)}"
        raise DataError(f"labels must be float (B, K, h, w), got {got}; trackpl.propagation.one_hot makes them of ids")
    if image.ndim != 4 or image.shape[:2] != (len(labels), 3):
        raise DataError(f"frames of these labels must be ({len(labels)}, 3, H, W), got {tuple(image.shape)}")
    if size and image.shape[-2:] != size:
        raise DataError(f"the frames of a video must all be of one size: {size} before, {tuple(image.shape[-2:])} now")


def native_way(method: Method) -> str:
    """Name a method's own label propagation for a result, with its settings if it has a dataclass `propagation`."""
    settings = getattr(method, "propagation", None)
    if settings is None or not is_dataclass(settings):
        return "propagate"
    return f"propagate ({', '.join(f'{f.name}={getattr(settings, f.name)}' for f in fields(settings))})"


# Adapters -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def propagate_frames(method: Method, frames: Iterable[Tensor], labels: Tensor) -> Iterator[Tensor]:
    """Propagate labels with a method that has no way of its own; see `Method.propagate_frames`."""
    if not any(method.has(c) for c in ("flow", "track", "track_dense")):
        raise Error(f"{type(method).__name__} has neither flow nor tracks to propagate labels with")
    work = _by_flow if method.has("flow") else _by_tracks
    given = labels.to(method.device)
    given = given.float() if given.is_floating_point() else given
    yield from work(method, _checked(frames, given, method.device), given)


def _checked(frames: Iterable[Tensor], labels: Tensor, device: torch.device) -> Iterator[Tensor]:
    size = None
    for image in frames:
        check_labels(labels, image, size)
        size = image.shape[-2], image.shape[-1]
        yield image.to(device)


def _by_flow(method: Method, frames: Iterable[Tensor], labels: Tensor) -> Iterator[Tensor]:
    """Take the label of the place in frame 0 that each pixel comes from, by the most consistent steps back."""
    kept: dict[int, Any] = {}  # what flow needs of the last frames
    past: dict[int, Tensor] = {}  # (B, 3, H, W): displacement to frame 0, and its error summed along the way, in pixels
    for t, image in enumerate(frames):
        kept[t] = method.encode(as_float(image)) if method.has("match") else image
        h, w = image.shape[-2:]
        if t:
            past[t] = _origin(t, past, lambda pairs, hw=(h, w): _flows(method, kept, pairs, hw), (h, w))
            yield _looked_up(labels, past[t][:, :2])
        else:
            past[t] = torch.zeros(len(image), 3, h, w, device=image.device)
            yield labels
        for memory in (kept, past):
            memory.pop(t - max(SPANS), None)


def _flows(method: Method, kept: dict[int, Any], pairs: Sequence[tuple[int, int]], size: tuple[int, int]) -> Tensor:
    """Flow (B, P, 2, H, W) of pairs of kept frames."""
    if method.has("match"):
        return torch.stack([method.match(kept[s], kept[t], size) for s, t in pairs], 1)
    used = sorted({t for pair in pairs for t in pair})
    clip = Clip(video=torch.stack([kept[t] for t in used], 1))
    return method.flow(clip, [(used.index(s), used.index(t)) for s, t in pairs]).xy


def _origin(t: int, past: dict[int, Tensor], flow_of: Any, size: tuple[int, int]) -> Tensor:
    """Choose for each pixel of frame t the step back with the least error: displacement to frame 0 and error."""
    sources = [t - span for span in SPANS if t - span in past]
    both = flow_of([(t, s) for s in sources] + [(s, t) for s in sources]).float()
    (h, w), best = size, None
    pixels = _pixels(size, both)
    limit = pixels.new_tensor([w, h])
    for i, s in enumerate(sources):
        back, there = both[:, i].flatten(2).mT, both[:, len(sources) + i]  # (B, N, 2), (B, 2, H, W)
        place = pixels + back
        gap = (back + sample(there, place)).norm(dim=-1)
        # What the frame does not show cannot be returned from.
        gap = gap + (place - torch.minimum(place.clamp(min=0), limit)).norm(dim=-1)
        before = _nearest(past[s], place)  # not mixed, or the edges of what moves would come from nowhere
        found = torch.cat([back.mT + before[:, :2], gap[:, None] + before[:, 2:]], 1)
        best = found if best is None else torch.where(found[:, 2:] < best[:, 2:], found, best)
    assert best is not None
    return best.unflatten(2, size)


def _pixels(size: tuple[int, int], like: Tensor) -> Tensor:
    """Centres (1, H * W, 2) of all pixels."""
    y, x = (torch.arange(n, dtype=like.dtype, device=like.device) + 0.5 for n in size)
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).view(1, -1, 2)


def _nearest(field: Tensor, place: Tensor) -> Tensor:
    """Read (B, C, H, W) at the pixel nearest to each place (B, N, 2): (B, C, N)."""
    h, w = field.shape[-2:]
    x, y = place.floor().long().unbind(-1)
    cell = y.clamp(0, h - 1) * w + x.clamp(0, w - 1)
    return field.flatten(2).gather(2, cell[:, None].expand(-1, field.shape[1], -1))


def _looked_up(labels: Tensor, moved: Tensor) -> Tensor:
    """Read labels (B, K, h, w) of frame 0 where the pixels of their own grid come from."""
    (h, w), size = labels.shape[-2:], (moved.shape[-2], moved.shape[-1])
    scale = moved.new_tensor([size[1] / w, size[0] / h])
    pixels = (_pixels((h, w), moved) * scale).expand(len(labels), -1, -1)
    step = _nearest(moved, pixels).mT
    return sample(labels, (pixels + step) / scale).mT.unflatten(2, (h, w))


def _by_tracks(method: Method, frames: Iterable[Tensor], labels: Tensor) -> Iterator[Tensor]:
    """Let points of frame 0 carry its labels; a tracker may hand frames out later than they come."""
    streams: list[Any] = []
    values: list[Tensor] = []
    done, size = 0, (0, 0)
    for image in frames:
        if not streams:
            size = image.shape[-2], image.shape[-1]
            points = [_carriers(maps, size) for maps in labels]
            scale = labels.new_tensor([labels.shape[-1] / size[1], labels.shape[-2] / size[0]])
            values = [sample(m[None], (p * scale)[None])[0] for m, p in zip(labels, points, strict=True)]
            queries = [F.pad(p, (1, 0)) for p in points]  # t = 0
            streams = [method.stream(q) for q in queries]
        pieces = [stream.step(one[None]) for stream, one in zip(streams, image, strict=True)]
        yield from _carried(pieces, values, labels, size, done)
        done += pieces[0].xy.shape[1]
    yield from _carried([stream.finish() for stream in streams], values, labels, size, done)


def _carriers(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Points (N, 2) of frame 0: a grid over the frame, and a finer one over what is labelled (K, h, w), with a rim."""
    h, w = size
    y, x = (maps[1:] > 0).any(0).nonzero(as_tuple=True)
    whole = torch.tensor([0.0, 0.0, w, h])
    box = whole
    if len(x):
        scale = torch.tensor([w / maps.shape[-1], h / maps.shape[-2]]).repeat(2)
        box = torch.stack([x.min(), y.min(), x.max() + 1, y.max() + 1]).cpu() * scale
        rim = (box[2:] - box[:2]) / 8
        box = torch.minimum((box + torch.cat([-rim, rim])).clamp(min=0), whole[2:].repeat(2))
    grids = []
    for (left, top, right, bottom), most, apart in ((whole.tolist(), 24, 4), (box.tolist(), 32, 2)):
        nx, ny = (min(most, max(1, int(side // apart))) for side in (right - left, bottom - top))
        gx = left + (torch.arange(nx) + 0.5) * (right - left) / nx
        gy = top + (torch.arange(ny) + 0.5) * (bottom - top) / ny
        grids.append(torch.stack(torch.meshgrid(gx, gy, indexing="xy"), -1).view(-1, 2))
    return torch.cat(grids).to(maps.device)


def _carried(
    pieces: Sequence[Tracks], values: Sequence[Tensor], labels: Tensor, size: tuple[int, int], first: int
) -> Iterator[Tensor]:
    for i in range(pieces[0].xy.shape[1] if pieces else 0):
        if first + i == 0:
            yield labels
            continue
        maps = [_spread(p.xy[0, i], p.visible[0, i], v, size) for p, v in zip(pieces, values, strict=True)]
        coarse = torch.stack(maps)
        yield resample(coarse, pixel_places(coarse), pixel_places(labels))


def _spread(
    xy: Tensor, visible: Tensor, values: Tensor, size: tuple[int, int], near: int = 4, most: int = 96
) -> Tensor:
    """Make a map (K, h, w) of values (N, K) at points (N, 2): the mean over the nearest visible, weighted by nearness.

    `most` cells at the longer side; a hidden point is taken where nothing visible lies within the frame's diagonal.
    """
    share = min(1.0, most / max(size))
    h, w = (max(1, round(side * share)) for side in size)
    scale = xy.new_tensor([size[1] / w, size[0] / h])
    cells = _pixels((h, w), xy)[0] * scale
    away = torch.cdist(cells, xy.float()) + (visible < 0.5) * math.hypot(*size)
    distance, point = away.topk(min(near, len(xy)), 1, largest=False)
    weight = 1 / (distance.square() + 1)
    weight = weight / weight.sum(1, keepdim=True)
    return (values[point] * weight[..., None]).sum(1).T.unflatten(1, (h, w))
