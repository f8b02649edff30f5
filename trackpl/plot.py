"""Plots with logarithmic axes, drawn with PIL: a few lines of measurements beside one another, and nothing more."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from trackpl.errors import DataError

_PAPER, _INK, _GREY, _GRID = (255, 255, 255), (32, 32, 38), (110, 110, 118), (226, 226, 230)
COLOURS = ((0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (120, 94, 240), (140, 110, 0), (60, 60, 66))
"""After Okabe and Ito: told apart by every eye, and dark enough on white."""

_SCALE = 2  # drawn larger, then averaged, against jagged edges
_WIDTH, _HEIGHT = 560, 400  # of a panel, in pixels of the result
_LEFT, _RIGHT, _TOP, _BOTTOM = 74, 22, 46, 52  # what lies around its axes
_TEXT, _TITLE = 14, 17


@dataclass(frozen=True)
class Line:
    """Measurements that belong together; lines of one label have one colour and one entry in the legend."""

    label: str
    points: Sequence[tuple[float, float]]
    dashed: bool = False


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    title: str
    x_label: str
    lines: Sequence[Line]


def log_ticks(low: float, high: float) -> list[float]:
    """Return 1, 2, 5, 10, ... from the last one up to `low` to the first one from `high` on; decades where many."""
    if not 0 < low <= high < math.inf:
        raise DataError(f"a logarithmic axis needs positive finite numbers, got {low:g} to {high:g}")
    for steps in ((1, 2, 5), (1,)):
        decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
        all_ticks = [s * 10.0**d for d in decades for s in steps]
        first = max(i for i, tick in enumerate(all_ticks) if tick <= low * 1.000001)
        last = min(i for i, tick in enumerate(all_ticks) if tick >= high * 0.999999)
        ticks = all_ticks[first : max(last, first + 1) + 1]
        if len(ticks) <= 9:
            break
    return ticks


def tick_text(value: float) -> str:
    """Return a short number: 0.05, 200, 5k, 2M."""
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit * 0.9999:
            return f"{value / unit:.4g}{letter}"
    return f"{value:.4g}"


def draw_plot(panels: Sequence[Panel], title: str, dashes: str = "") -> Image.Image:
    """Draw panels beside one another under one title, with one legend below.

    Args:
        panels: points that are not positive and finite are left out; a panel without any says so.
        title: what was measured on what.
        dashes: what a dashed line means, for the legend.
    """
    labels = list(dict.fromkeys(line.label for panel in panels for line in panel.lines))
    colours = {label: COLOURS[i % len(COLOURS)] for i, label in enumerate(labels)}
    width = _WIDTH * len(panels)
    entries = _rows([*labels, *([dashes] if dashes else [])], width - 2 * _RIGHT)
    height = 40 + _HEIGHT + 26 * len(entries) + 14
    image = Image.new("RGB", (width * _SCALE, height * _SCALE), _PAPER)
    pen = ImageDraw.Draw(image)
    _text(pen, (_RIGHT, 14), _cut(title, _TITLE, width - 2 * _RIGHT), _INK, _TITLE)
    for number, panel in enumerate(panels):
        _panel(pen, panel, colours, (_WIDTH * number, 40))
    for number, row in enumerate(entries):
        left = float(_RIGHT)
        for label in row:
            y = 40 + _HEIGHT + 26 * number + 12
            _stroke(pen, [(left, y), (left + 28, y)], colours.get(label, _GREY), label not in colours)
            _disc(pen, (left + 14, y), colours.get(label, _GREY), hollow=label not in colours)
            _text(pen, (left + 36, y), label, _INK, _TEXT, "lm")
            left += _entry_width(label)
    return image.reduce(_SCALE)


def save_plot(panels: Sequence[Panel], title: str, path: Path, dashes: str = "") -> None:
    """Write what `draw_plot` draws as a PNG."""
    draw_plot(panels, title, dashes).save(path, format="PNG")


def _panel(
    pen: ImageDraw.ImageDraw, panel: Panel, colours: dict[str, tuple[int, int, int]], at: tuple[int, int]
) -> None:
    left, top = at[0] + _LEFT, at[1] + _TOP
    right, bottom = at[0] + _WIDTH - _RIGHT, at[1] + _HEIGHT - _BOTTOM
    _text(pen, (left, top - 24), panel.title, _INK, _TEXT + 1)
    lines = [(line, [p for p in line.points if all(0 < v < math.inf for v in p)]) for line in panel.lines]
    known = [p for _, points in lines for p in points]
    if not known:
        _text(pen, ((left + right) / 2, (top + bottom) / 2), "nothing was measured", _GREY, _TEXT, "mm")
        return
    xs = sorted({x for x, _ in known})
    y_ticks = log_ticks(min(y for _, y in known), max(y for _, y in known))
    x_of = _axis(xs[0], xs[-1], left + 14, right - 14)
    y_of = _axis(y_ticks[0], y_ticks[-1], bottom, top)
    for tick in y_ticks:
        _stroke(pen, [(left, y_of(tick)), (right, y_of(tick))], _GRID, width=1)
        _text(pen, (left - 8, y_of(tick)), tick_text(tick), _GREY, _TEXT - 1, "rm")
    free = -math.inf
    for x in xs:
        _stroke(pen, [(x_of(x), top), (x_of(x), bottom)], _GRID, width=1)
        half = _font(_TEXT - 1).getlength(f"{x:g}") / _SCALE / 2
        if x_of(x) - half > free:
            _text(pen, (x_of(x), bottom + 14), f"{x:g}", _GREY, _TEXT - 1, "mm")
            free = x_of(x) + half + 6
    _stroke(pen, [(left, top), (left, bottom), (right, bottom)], _GREY, width=1.5)
    _text(pen, ((left + right) / 2, bottom + 36), panel.x_label, _INK, _TEXT, "mm")
    for line, points in lines:
        places = [(x_of(x), y_of(y)) for x, y in sorted(points)]
        _stroke(pen, places, colours[line.label], line.dashed)
        for place in places:
            _disc(pen, place, colours[line.label], hollow=line.dashed)


def _axis(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """Return what places a number between `start` and `end`, by its logarithm; in the middle if there is but one."""
    span = math.log(high / low)
    return lambda value: start + (end - start) * (math.log(value / low) / span if span else 0.5)


def _stroke(
    pen: ImageDraw.ImageDraw,
    places: Sequence[tuple[float, float]],
    colour: tuple[int, int, int],
    dashed: bool = False,
    width: float = 2.5,
) -> None:
    for (x0, y0), (x1, y1) in pairwise(places):
        length = math.hypot(x1 - x0, y1 - y0)
        starts = [i * 9.0 for i in range(math.ceil(length / 9))] if dashed else [0.0]
        for start in starts:
            a, b = (start / length, min(1.0, (start + 5) / length)) if dashed else (0.0, 1.0)
            ends = [x0 + a * (x1 - x0), y0 + a * (y1 - y0), x0 + b * (x1 - x0), y0 + b * (y1 - y0)]
            pen.line([v * _SCALE for v in ends], colour, round(width * _SCALE))


def _disc(
    pen: ImageDraw.ImageDraw, at: tuple[float, float], colour: tuple[int, int, int], hollow: bool = False
) -> None:
    box = [(v + side) * _SCALE for side in (-4, 4) for v in at]
    pen.ellipse(box, _PAPER if hollow else colour, colour, round(1.75 * _SCALE))


def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size * _SCALE)


def _text(
    pen: ImageDraw.ImageDraw,
    at: tuple[float, float],
    text: str,
    colour: tuple[int, int, int],
    size: int,
    anchor: str = "la",
) -> None:
    pen.text((at[0] * _SCALE, at[1] * _SCALE), text, colour, _font(size), anchor)


def _cut(text: str, size: int, width: float) -> str:
    while len(text) > 1 and _font(size).getlength(text) > width * _SCALE:
        text = text[:-2] + "…"
    return text


def _entry_width(label: str) -> float:
    return 36 + _font(_TEXT).getlength(label) / _SCALE + 26


def _rows(labels: Sequence[str], width: float) -> list[list[str]]:
    rows: list[list[str]] = [[]]
    for label in labels:
        if rows[-1] and sum(map(_entry_width, [*rows[-1], label])) > width:
            rows.append([])
        rows[-1].append(label)
    return rows
