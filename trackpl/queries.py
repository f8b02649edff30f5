"""Query points of a command line: words, files, grids and masks, checked against the video that they are for."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from trackpl.errors import DataError, Error

GRID = 20


class Source(Protocol):
    """What points are checked against: a video, or a camera, which has no last frame."""

    path: Path
    size: tuple[int, int]

    @property
    def frames(self) -> int | None:
        """How many frames there are, none where they have no end."""


@dataclass(frozen=True)
class Points:
    """Query points and what the user called each, for messages."""

    queries: np.ndarray  # (N, 3) float64 of (t, x, y)
    labels: list[str]


def read_queries(given: Namespace, video: Source) -> np.ndarray:
    """Collect all points of the command line as (N, 3) of (t, x, y).

    Args:
        given: `points`, `points_file`, `grid`, `mask` and `start`; a grid where there is nothing else.
        video: what they are for.

    Raises:
        Error: a word, file or mask that cannot be read, or a point outside the video.
    """
    sets = []
    if given.points:
        sets.append(_from_words(given.points, given.start))
    if given.points_file:
        sets.append(_from_file(given.points_file, given.start))
    if given.grid or given.mask or not sets:
        sets.append(_grid(given.grid or GRID, given.start, video.size, given.mask))
    for points in sets:
        _check(points, video)
    return np.concatenate([points.queries for points in sets])


def _from_words(words: list[str], start: int) -> Points:
    rows = []
    for word in map(str.strip, words):
        place, _, frame = word.partition("@")
        try:
            x, y = (float(v) for v in place.split(","))
            rows.append((float(frame) if "@" in word else start, x, y))
        except ValueError:
            hint = "; the video comes before --points" if Path(word).exists() else ""
            raise Error(f"'{word}' is not a point: allowed is X,Y or X,Y@T such as 120.5,64@10{hint}") from None
    return Points(np.array(rows), [f"'{word.strip()}'" for word in words])


def _from_file(path: Path, start: int) -> Points:
    if not path.is_file():
        raise Error(f"no file of points at {path}")
    readers = {".npy": _read_npy, ".csv": _read_text, ".txt": _read_text}
    if path.suffix.lower() not in readers:
        raise Error(f"--points-file {path.name}: allowed are .csv, .txt and .npy")
    rows, labels = readers[path.suffix.lower()](path)
    if not len(rows):
        raise DataError(f"{path} holds no points: give a line t,x,y or x,y for each")
    if rows.shape[1] == 2:
        rows = np.concatenate([np.full((len(rows), 1), start), rows], 1)
    return Points(rows, labels)


def _read_npy(path: Path) -> tuple[np.ndarray, list[str]]:
    try:
        rows = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{path} is not a readable .npy array of numbers") from error
    if (
        not isinstance(rows, np.ndarray)
        or rows.ndim != 2
        or rows.shape[1] not in (2, 3)
        or rows.dtype.kind not in "iuf"
    ):
        raise DataError(f"{path} must hold numbers of shape (N, 3) for t,x,y or (N, 2) for x,y")
    return rows.astype(np.float64), [f"of row {i}" for i in range(len(rows))]


def _read_text(path: Path) -> tuple[np.ndarray, list[str]]:
    """Read lines of t,x,y or x,y, divided by commas, semicolons or blanks; a first line may name them."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not a text file: allowed are lines of t,x,y or x,y") from error
    cells = [(n, line.replace(",", " ").replace(";", " ").split()) for n, line in enumerate(lines, 1)]
    cells = [(n, c) for n, c in cells if c and not c[0].startswith("#")]
    order: list[int] | None = None
    if cells and sorted(name.lower() for name in cells[0][1]) in (["t", "x", "y"], ["x", "y"]):
        names = [name.lower() for name in cells.pop(0)[1]]
        order = [names.index(name) for name in "txy" if name in names]
    width = len(order or (cells[0][1] if cells else "txy"))
    rows = []
    for n, line in cells:
        try:
            row = [float(v) for v in line]
        except ValueError:
            row = []
        if len(row) != width or width not in (2, 3):
            raise DataError(f"line {n} of {path} is '{lines[n - 1].strip()[:60]}': allowed are numbers t,x,y or x,y")
        rows.append([row[i] for i in order] if order else row)
    return np.array(rows), [f"of line {n}" for n, _ in cells]


def _grid(n: int, start: int, size: tuple[int, int], mask: Path | None) -> Points:
    """Put N x N points on the centres of equal cells over the frame, or over what the mask marks."""
    marked = read_mask(mask, size) if mask else np.ones(size, dtype=bool)
    rows, columns = np.flatnonzero(marked.any(1)), np.flatnonzero(marked.any(0))
    top, left, bottom, right = rows[0], columns[0], rows[-1] + 1, columns[-1] + 1
    cells = (np.arange(n) + 0.5) / n
    y, x = np.meshgrid(top + cells * (bottom - top), left + cells * (right - left), indexing="ij")
    keep = marked[y.astype(int), x.astype(int)]
    if not keep.any():
        raise Error(f"no point of a grid of {n} x {n} falls on what {mask} marks: try --grid {4 * n}")
    if mask:
        print(f"{keep.sum()} of the {n} x {n} grid points lie on the mask")
    queries = np.stack([np.full(keep.sum(), float(start)), x[keep], y[keep]], 1)
    return Points(queries, ["of the grid"] * len(queries))


def read_mask(path: Path, size: tuple[int, int]) -> np.ndarray:
    """Read where a picture is not 0, brought to the frame's size: bool (H, W)."""
    if not path.is_file():
        raise Error(f"no mask at {path}: give a png")
    try:
        with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as image:
            bands = image.getbands()
            values: np.ndarray = np.asarray(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"the mask {path} is not a readable png") from error
    if values.ndim == 3:
        alpha = bands[-1] == "A"
        shown = values[..., -1] > 0 if alpha else np.array(True)
        values = values[..., : len(bands) - alpha].any(-1) & shown
    (h, w), (mh, mw) = size, values.shape
    if abs(mw * h - mh * w) > max(mw, mh, w, h):  # one pixel of rounding
        raise DataError(f"the mask {path} is {mw}x{mh} and the video {w}x{h}: their shapes must agree")
    marked = values[np.arange(h) * mh // h][:, np.arange(w) * mw // w] != 0
    if not marked.any():
        raise DataError(f"the mask {path} marks nothing: some of its pixels must not be 0")
    return marked


def _check(points: Points, video: Source) -> None:
    t, x, y = points.queries.T
    h, w = video.size
    last = np.inf if video.frames is None else video.frames - 1
    bad = ~((t >= 0) & (t <= last) & np.isfinite(t) & (t == np.floor(t)) & (x >= 0) & (x <= w) & (y >= 0) & (y <= h))
    if bad.any():
        n, frames = int(bad.argmax()), "from 0 on" if video.frames is None else f"in [0, {last}]"
        raise DataError(
            f"the point {points.labels[n]} (t={t[n]:g}, x={x[n]:g}, y={y[n]:g}) is outside {video.path}: "
            f"t is a whole number {frames}, x in [0, {w}], y in [0, {h}]"
        )
