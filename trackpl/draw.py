"""Draw tracks and flow: images are uint8 RGB tensors (3, H, W), coordinates are continuous pixels."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional

from trackpl.errors import DataError
from trackpl.writing import replacing

TAIL = 10
"""Frames that a point's tail reaches back."""

_OUTLINE = (16, 16, 20)
_PAPER = (255, 255, 255)
_INK = (32, 32, 38)


# Tracks -----------------------------------------------------------------------------------------------------


def start_colours(xy: Tensor) -> Tensor:
    """Colour points by where they start: hue along x, lightness along y, over the box around them all.

    Args:
        xy: (N, 2) pixels; points that are not finite are grey.

    Returns:
        uint8 (N, 3).
    """
    xy = xy.detach().cpu().double().reshape(-1, 2)
    known = xy.isfinite().all(-1)
    if not known.any():
        return torch.full((len(xy), 3), 128, dtype=torch.uint8)
    low, high = xy[known].amin(0), xy[known].amax(0)
    x, y = ((xy - low) / (high - low).clamp(min=1e-6)).where(high > low, torch.tensor(0.5)).unbind(-1)
    # OKLCH: equal steps look equally large, so that no hue jumps out; 300 degrees, or both ends would be red.
    rgb = _oklch(0.85 - 0.25 * y, torch.full_like(x, 0.22), torch.deg2rad(20 + 300 * x))
    rgb[~known] = 0.5
    return (rgb * 255).round().to(torch.uint8)


def disc_radius(size: tuple[int, int], xy: Tensor) -> float:
    """Return a radius in pixels that suits a frame of `size` (H, W) and leaves gaps between many points (N, 2)."""
    largest = min(size) / 110
    known = xy[xy.isfinite().all(-1)]
    if len(known) < 16:
        return max(2.0, largest)
    box = (known.amax(0) - known.amin(0)).clamp(min=1)
    spacing = math.sqrt(float(box.prod()) / len(known))
    return max(1.25, min(largest, spacing / 3.5))


def draw_frame(frame: Tensor, xy: Tensor, visible: Tensor, colours: Tensor, radius: float | None = None) -> Tensor:
    """Draw the points of one frame: discs where visible, rings where hidden, and tails that fade.

    Args:
        frame: uint8 (3, H, W), left as it is.
        xy: (K, N, 2) pixels, K >= 1 frames of which the last is this one; what is not finite is not drawn.
        visible: (K, N) bool; a tail is drawn where a point is visible at both ends of a step.
        colours: uint8 (N, 3).
        radius: of a disc, in pixels; by default `disc_radius` of the points as they lie now.

    Returns:
        uint8 (3, H, W).
    """
    _, h, w = frame.shape
    radius = disc_radius((h, w), xy[-1]) if radius is None else radius
    # Drawn larger and then averaged, against jagged edges; the discs of large frames need it less.
    scale = 3 if h * w <= 1 << 20 else 2
    image = Image.fromarray(frame.permute(1, 2, 0).cpu().numpy()).convert("RGBA")
    layer = Image.new("RGBA", (w * scale, h * scale))
    pen = ImageDraw.Draw(layer)
    # PIL counts from pixel centres. Far outside nothing is seen, and numbers without bound would overflow.
    far = torch.tensor([w, h])
    places = xy.detach().cpu().float().clamp(-far, 2 * far) * scale - 0.5
    shown = visible.cpu().bool() & xy.detach().cpu().isfinite().all(-1)
    _tails(pen, places, shown, colours, radius * scale)
    _points(pen, places[-1], visible[-1].cpu(), colours, radius * scale, (w * scale, h * scale))
    image.alpha_composite(layer.reduce(scale))
    return _tensor(image)


def draw_frames(
    frames: Iterable[Tensor], xy: Tensor, visible: Tensor, tail: int = TAIL, colours: Tensor | None = None
) -> Iterator[Tensor]:
    """Draw the tracks frame after frame, holding one frame at a time: see `draw_tracks`."""
    if tail < 0:
        raise DataError(f"tail must be 0 or more frames, got {tail}")
    xy, visible = xy.detach().cpu(), visible.detach().cpu()
    starts = _starts(xy)
    colours = start_colours(starts) if colours is None else colours
    for t, frame in enumerate(frames):
        if t >= len(xy):
            raise DataError(f"there are more frames than the {len(xy)} of the tracks")
        past = slice(max(0, t - tail), t + 1)
        radius = disc_radius((frame.shape[-2], frame.shape[-1]), starts)
        yield draw_frame(frame, xy[past], visible[past], colours, radius)


def draw_tracks(video: Tensor, xy: Tensor, visible: Tensor, tail: int = TAIL, colours: Tensor | None = None) -> Tensor:
    """Draw tracks into a video: colour by start position, fading tails, hollow where hidden.

    Args:
        video: uint8 (T, 3, H, W), left as it is.
        xy: (T, N, 2) pixels.
        visible: (T, N) bool.
        tail: frames that a tail reaches back.
        colours: uint8 (N, 3); by default those of the first frame's positions. Give those of the queries to
            compare pictures.

    Returns:
        uint8 (T, 3, H, W).

    Raises:
        DataError: shapes that do not belong together.
    """
    if video.dtype != torch.uint8 or video.ndim != 4 or video.shape[1] != 3:
        raise DataError(f"video must be uint8 (T, 3, H, W), got {video.dtype} {tuple(video.shape)}")
    if xy.shape[:-1] != visible.shape or len(xy) != len(video) or xy.shape[-1] != 2:
        shapes = f"{tuple(xy.shape)} and {tuple(visible.shape)}"
        raise DataError(f"tracks of {len(video)} frames must be xy (T, N, 2) and visible (T, N), got {shapes}")
    return torch.stack(list(draw_frames(video, xy, visible, tail, colours)))


def _starts(xy: Tensor) -> Tensor:
    """Where each track is in its first finite frame."""
    first = xy.isfinite().all(-1).int().argmax(0)
    return xy[first, torch.arange(xy.shape[1])]


def _tails(pen: ImageDraw.ImageDraw, xy: Tensor, shown: Tensor, colours: Tensor, radius: float) -> None:
    steps = len(xy) - 1
    moved = (xy[1:] - xy[:-1]).abs().amax(-1) > 0.5  # a point at rest has no tail
    drawn = shown[1:] & shown[:-1] & moved
    width = max(1, round(radius * 0.8))
    segments = torch.cat([xy[:-1], xy[1:]], -1).round().tolist()
    rgb = colours.tolist()
    for k in range(steps):  # the oldest first: younger ones lie on top
        alpha = round(40 + 190 * (k + 1) / steps)
        for n in drawn[k].nonzero()[:, 0].tolist():
            pen.line(segments[k][n], (*rgb[n], alpha), width)


def _points(
    pen: ImageDraw.ImageDraw,
    xy: Tensor,
    visible: Tensor,
    colours: Tensor,
    radius: float,
    size: tuple[int, int],
) -> None:
    low = (xy - radius).round()  # PIL would cut decimals off, and so draw up and left of the place
    high = low + round(2 * radius)
    inside = ((high > 0) & (low < torch.tensor(size))).all(-1)  # false for NaN
    boxes, rgb, full = torch.cat([low, high], -1).tolist(), colours.tolist(), visible.tolist()
    edge = max(1, round(radius * 0.2))
    # Hidden ones first: what is seen lies on top.
    for n in sorted(inside.nonzero()[:, 0].tolist(), key=full.__getitem__):
        if full[n]:
            pen.ellipse(boxes[n], (*rgb[n], 255), (*_OUTLINE, 255), edge)
        else:
            pen.ellipse(boxes[n], (0, 0, 0, 0), (*rgb[n], 255), 2 * edge)


def _oklch(lightness: Tensor, chroma: Tensor, hue: Tensor) -> Tensor:
    """OKLCH to sRGB in [0, 1], (..., 3); matrices of Ottosson 2020."""
    lab = torch.stack([lightness, chroma * hue.cos(), chroma * hue.sin()], -1)
    to_lms = lab.new_tensor([
        [1, 0.3963377774, 0.2158037573], [1, -0.1055613458, -0.0638541728], [1, -0.0894841775, -1.2914855480]
    ])  # fmt: skip
    to_rgb = lab.new_tensor([
        [4.0767416621, -3.3077115913, 0.2309699292],
        [-1.2684380046, 2.6097574011, -0.3413193965],
        [-0.0041960863, -0.7034186147, 1.7076147010],
    ])  # fmt: skip
    linear = ((lab @ to_lms.T) ** 3 @ to_rgb.T).clamp(0, 1)
    return torch.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


# Flow -------------------------------------------------------------------------------------------------------


def flow_to_rgb(flow: Tensor, max_norm: float | None = None) -> Tensor:
    """Colour displacements by the Middlebury wheel: hue is the direction, white no motion, black unknown.

    Args:
        flow: (..., 2, H, W) pixels; not finite: unknown.
        max_norm: length in pixels that has the full colour; by default the longest of each image. Give one to
            compare pictures.

    Returns:
        uint8 (..., 3, H, W).
    """
    flow = flow.detach().float()
    known = flow.isfinite().all(-3)
    u, v = torch.where(known[..., None, :, :], flow, 0).unbind(-3)
    norm = torch.hypot(u, v)
    longest = norm.amax((-2, -1), keepdim=True) if max_norm is None else torch.tensor(float(max_norm))
    norm = norm / longest.clamp(min=1e-6)
    wheel = _wheel().to(flow.device)
    place = (torch.atan2(-v, -u) / math.pi + 1) / 2 * (len(wheel) - 1)
    below = place.floor().long()
    above, part = (below + 1) % len(wheel), (place - below)[..., None]
    colour = (1 - part) * wheel[below] + part * wheel[above]
    # Towards white inside the circle, darker outside of it, as in Middlebury's own code.
    colour = torch.where(norm[..., None] <= 1, 1 - norm[..., None] * (1 - colour), colour * 0.75)
    colour = torch.where(known[..., None], colour, 0)
    return (colour * 255).floor().to(torch.uint8).movedim(-1, -3)


def _wheel() -> Tensor:
    """Middlebury's 55 colours, (55, 3) in [0, 1]: red, yellow, green, cyan, blue, magenta."""
    parts = [(15, 0, 1, 1), (6, 1, 0, -1), (4, 1, 2, 1), (11, 2, 1, -1), (13, 2, 0, 1), (6, 0, 2, -1)]
    wheel = []
    for steps, full, moving, sign in parts:
        ramp = torch.floor(255 * torch.arange(steps) / steps)
        part = torch.zeros(steps, 3)
        part[:, full], part[:, moving] = 255, ramp if sign > 0 else 255 - ramp
        wheel.append(part)
    return torch.cat(wheel) / 255


# Sheets -----------------------------------------------------------------------------------------------------


def contact_sheet(
    frames: Tensor, columns: int | None = None, titles: Sequence[str] | None = None, width: int = 1920
) -> Tensor:
    """Lay frames out in rows, read like a text, on a white sheet.

    Args:
        frames: uint8 (T, 3, H, W).
        columns: frames in a row; by default so many that the sheet is about as wide as a screen.
        titles: T words in the corners of the frames; none by default.
        width: widest sheet in pixels; larger frames are made smaller.

    Returns:
        uint8 (3, h, w).
    """
    if frames.ndim != 4 or frames.dtype != torch.uint8 or frames.shape[1] != 3 or not len(frames):
        raise DataError(f"frames must be uint8 (T, 3, H, W) with T >= 1, got {frames.dtype} {tuple(frames.shape)}")
    t, _, h, w = frames.shape
    columns = min(t, columns or max(1, math.ceil(math.sqrt(t * h / w * 1.6))))
    rows, gap = math.ceil(t / columns), 4
    if columns * (w + gap) + gap > width:
        fit = (width - gap) // columns - gap
        frames = _shrink(frames, (max(1, round(h * fit / w)), max(1, fit)))
        h, w = frames.shape[-2:]
    images = [_titled(f, title) for f, title in zip(frames, titles, strict=True)] if titles else list(frames)
    blank = torch.full((3, h, w), 255, dtype=torch.uint8)
    cells = torch.stack(images + [blank] * (rows * columns - t))
    cells = functional.pad(cells, (gap, 0, gap, 0), value=255).unflatten(0, (rows, columns))
    sheet = cells.permute(2, 0, 3, 1, 4).reshape(3, rows * (h + gap), columns * (w + gap))
    return functional.pad(sheet, (0, gap, 0, gap), value=255)


def side_by_side(images: Sequence[Tensor], titles: Sequence[str]) -> Tensor:
    """Put images beside one another under their titles.

    Args:
        images: uint8 (3, H, W); smaller ones are enlarged to the height of the highest.
        titles: one for each image.

    Returns:
        uint8 (3, h, w).
    """
    if not images or len(images) != len(titles):
        raise DataError(f"give a title for each image: {len(images)} images, {len(titles)} titles")
    high, gap = max(i.shape[-2] for i in images), 6
    images = [_shrink(i[None], (high, round(i.shape[-1] * high / i.shape[-2])))[0].cpu() for i in images]
    font = ImageFont.load_default(max(11, min(28, high // 16)))
    bar = font.getbbox("Ag")[3] + 2 * gap
    sheet = Image.new("RGB", (sum(i.shape[-1] + gap for i in images) + gap, int(bar + high + gap)), _PAPER)
    pen, left = ImageDraw.Draw(sheet), gap
    for image, title in zip(images, titles, strict=True):
        pen.text((left, gap), _fitting(title, font, image.shape[-1]), _INK, font)
        sheet.paste(Image.fromarray(image.permute(1, 2, 0).numpy()), (left, int(bar)))
        left += image.shape[-1] + gap
    return _tensor(sheet)


def save_png(image: Tensor, path: str | Path) -> Path:
    """Write a uint8 (3, H, W) image; nothing half-written ever stands at `path`."""
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
        raise DataError(f"an image must be uint8 (3, H, W), got {image.dtype} {tuple(image.shape)}")
    with replacing(path) as part:
        Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy()).save(part, format="PNG")
    return Path(path)


def _shrink(frames: Tensor, size: tuple[int, int]) -> Tensor:
    if frames.shape[-2:] == size:
        return frames
    return functional.interpolate(frames, size, mode="bilinear", antialias=True)


def _titled(frame: Tensor, title: str) -> Tensor:
    image = Image.fromarray(frame.permute(1, 2, 0).contiguous().cpu().numpy())
    font = ImageFont.load_default(max(11, min(24, image.height // 14)))
    pen = ImageDraw.Draw(image)
    *_, x1, y1 = pen.textbbox((6, 4), title, font)
    pen.rectangle((0, 0, x1 + 6, y1 + 5), _PAPER)
    pen.text((6, 4), title, _INK, font)
    return _tensor(image)


def _fitting(title: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> str:
    while len(title) > 1 and font.getlength(title) > width:
        title = title[:-2] + "…"
    return title


def _tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()
