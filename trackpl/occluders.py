"""Rectangles that cover parts of the frames of training clips, and colours that change from frame to frame.

Boxes are a tensor (F, K, 4) of whole pixels (left, top, right, bottom), of which frame f paints its K one after the
other; an empty box (right = left) paints nothing. All of it is tensor operations over the boxes of all frames at once,
on the device of the frames, and follows from the numbers that the caller draws.
"""

from __future__ import annotations

import math

import torch
from kornia.color import rgb_to_grayscale
from kornia.enhance import adjust_hue
from torch import Tensor

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


# Boxes --------------------------------------------------------------------------------------------------------------


def draw_boxes(
    generator: torch.Generator,
    frames: int,
    size: tuple[int, int],
    probability: float,
    most: int,
    sides: tuple[int, int],
) -> Tensor:
    """Draw the boxes (T, `most`, 4) of a clip: none in its first frame, in another one with `probability` 1 to `most`.

    Args:
        generator: on the CPU.
        frames: T.
        size: height and width of the frames; boxes are cut at their edges.
        probability: that a frame has boxes.
        most: largest number of them in a frame.
        sides: smallest and largest width and height, drawn by themselves; the centre lies anywhere in the frame.
    """
    h, w = size
    on = torch.rand(frames, generator=generator) < probability
    count = torch.randint(1, most + 1, (frames,), generator=generator)
    side = torch.randint(sides[0], sides[1] + 1, (frames, most, 2), generator=generator)
    centre = torch.rand(frames, most, 2, generator=generator) * torch.tensor([w, h])
    corner = (centre - side / 2 + 0.5).floor().long()
    limit = torch.tensor([w, h])
    edges = torch.cat([corner.clamp(min=0), (corner + side).minimum(limit)], -1)
    on[0] = False
    wanted = on[:, None] & (torch.arange(most) < count[:, None])
    return torch.where(wanted[..., None], edges, 0)


def covered(boxes: Tensor, xy: Tensor) -> Tensor:
    """Return which of the points (F, N, 2) lie in a box of their frame: (F, N) bool."""
    point, box = xy[:, None], boxes[:, :, None]  # (F, 1, N, 2), (F, K, 1, 4)
    return ((point >= box[..., :2]) & (point < box[..., 2:])).all(-1).any(1)


def erase(images: Tensor, boxes: Tensor) -> Tensor:
    """Fill each box of (F, 3, H, W) with the mean colour of what it covers."""
    images = images.clone()
    reach = _reach(boxes, images)
    for k in range(boxes.shape[1]):
        frame, box = _active(boxes, k)
        rows, columns, inside = _places(box, reach, images)
        pixels = images[frame[:, None, None], :, rows[:, :, None], columns[:, None]]  # (A, P, Q, 3)
        total = torch.where(inside[..., None], pixels, 0).sum((1, 2), keepdim=True)
        mean = total / inside.sum((1, 2))[:, None, None, None].clamp(min=1)
        images[frame[:, None, None], :, rows[:, :, None], columns[:, None]] = torch.where(
            inside[..., None], mean, pixels
        )
    return images


def replace(
    images: Tensor, boxes: Tensor, source: Tensor, corner: Tensor, colours: list[tuple[Tensor, Tensor]]
) -> Tensor:
    """Fill each box of (F, 3, H, W) with what lies elsewhere, in other colours.

    Args:
        images: frames.
        boxes: of each frame (F, K, 4).
        source: (F, K) the frame of `images` from which each is filled.
        corner: (F, K, 2) in [0, 1): how far right and down in it, 1 being as far as the box still fits.
        colours: factors (F, 4) and their order (F, 4) for each frame as a source; see `jitter`, which runs once for
            each of these pairs.
    """
    frame, k = (boxes[..., 2] > boxes[..., 0]).nonzero(as_tuple=True)
    if len(frame) == 0:
        return images
    size = images.shape[-2:]
    box, source = boxes[frame, k], source[frame, k]
    rows, columns, inside = _places(box, _reach(boxes, images), images)
    room = box.new_tensor([size[1], size[0]]) - (box[:, 2:] - box[:, :2])
    shift = (corner[frame, k] * (room + 1)).long() - box[:, :2]  # (A, 2) from a box to what fills it
    there = (rows + shift[:, 1:]).clamp(0, size[0] - 1), (columns + shift[:, :1]).clamp(0, size[1] - 1)
    patches = images[source[:, None, None], :, there[0][:, :, None], there[1][:, None]].permute(0, 3, 1, 2)
    grey = rgb_to_grayscale(images).mean((1, 2, 3))[source]
    for factors, order in colours:
        patches = jitter(patches, factors[source], order[source], grey)
        grey = grey * factors[source, BRIGHTNESS]
    patches = patches.permute(0, 2, 3, 1)
    images = images.clone()
    for i in range(boxes.shape[1]):  # of one frame one after the other
        now = (k == i).nonzero()[:, 0]
        place = frame[now, None, None], slice(None), rows[now][:, :, None], columns[now][:, None]
        images[place] = torch.where(inside[now][..., None], patches[now], images[place])
    return images


def _reach(boxes: Tensor, images: Tensor) -> tuple[int, int]:
    """Return rows and columns that hold any box."""
    width, height = (boxes[..., 2:] - boxes[..., :2]).flatten(0, -2).amax(0).tolist()
    return min(height, images.shape[-2]), min(width, images.shape[-1])


def _active(boxes: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the frames (A,) that have a k-th box, and those boxes (A, 4)."""
    frame = (boxes[:, k, 2] > boxes[:, k, 0]).nonzero()[:, 0]
    return frame, boxes[frame, k]


def _places(box: Tensor, reach: tuple[int, int], images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows (A, P) and columns (A, Q) that hold each box, all in the frame, and where it is (A, P, Q)."""
    h, w = images.shape[-2:]
    rows = box[:, 1, None].clamp(max=h - reach[0]) + torch.arange(reach[0], device=box.device)
    columns = box[:, 0, None].clamp(max=w - reach[1]) + torch.arange(reach[1], device=box.device)
    high = (rows >= box[:, 1, None]) & (rows < box[:, 3, None])
    wide = (columns >= box[:, 0, None]) & (columns < box[:, 2, None])
    return rows, columns, high[:, :, None] & wide[:, None]


# Colours ------------------------------------------------------------------------------------------------------------


def draw_jitter(
    generator: torch.Generator, frames: int, strength: tuple[float, float, float, float]
) -> tuple[Tensor, Tensor]:
    """Draw for each frame factors (T, 4) of brightness, contrast and saturation and a shift of hue, and their order.

    Args:
        generator: on the CPU.
        frames: T.
        strength: largest change of each either way; the hue's in turns of the colour circle.
    """
    swing = (torch.rand(frames, 4, generator=generator) * 2 - 1) * torch.tensor(strength)
    order = torch.rand(frames, 4, generator=generator).argsort(1)
    return swing + torch.tensor([1.0, 1.0, 1.0, 0.0]), order


def jitter(images: Tensor, factors: Tensor, order: Tensor, grey: Tensor | None = None) -> Tensor:
    """Change brightness, contrast, saturation and hue of each image (F, 3, H, W) by its own factors in its own order.

    Args:
        images: in [0, 1].
        factors: (F, 4); see `draw_jitter`.
        order: (F, 4) of indices into the factors, the first one first.
        grey: (F,) mean grey value about which the contrast changes, where the images are parts of larger ones; none
            takes their own.
    """
    images, grey = images.clone(), None if grey is None else grey.clone()
    for step in range(4):
        for kind in range(4):
            which = (order[:, step] == kind).nonzero()[:, 0]
            if len(which) == 0:
                continue
            factor, now = factors[which, kind], images[which]
            amount = factor[:, None, None, None]
            if kind == HUE:
                now = adjust_hue(now, factor * (2 * math.pi))
            elif kind == BRIGHTNESS:
                now = now * amount
                if grey is not None:
                    grey[which] = grey[which] * factor
            elif kind == SATURATION:
                now = torch.lerp(rgb_to_grayscale(now), now, amount)
            elif kind == CONTRAST:
                own = rgb_to_grayscale(now).mean((1, 2, 3)) if grey is None else grey[which]
                now = torch.lerp(own[:, None, None, None], now, amount)
            images[which] = now.clamp(0, 1)
    return images
