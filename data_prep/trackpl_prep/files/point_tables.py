"""Tracks of one's own videos from csv, of two kinds, told apart by their first line.

Long: a line a point and frame, with a header; what `trackpl track` writes. Columns point, frame, x, y, and if wanted
visible (1 or 0) and video (which one, in a csv for several); pixels of the video, raster coordinates::

    point,frame,x,y,visible
    0,0,120.5,64.0,1

Rows: a line a track, as in TAP-Vid's csv files: the video, then x, y, occluded for every frame, normalised to 0..1::

    bear,0.251,0.133,0,0.252,0.131,0

A csv is untrusted: bounded, and every mistake is named by file, line and column.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NoReturn

import numpy as np

from trackpl.errors import DataError, closest
from trackpl.samples import MAX_COUNT
from trackpl_prep.files.frames import read_bytes

MAX_CSV = 2**27  # bytes
_LONGEST = 40  # characters of a number: an array of text is as wide as its longest
_COLUMNS = ("video", "point", "frame", "x", "y", "visible")
_NEEDED = ("point", "frame", "x", "y")
_TRUTH = {"0": False, "1": True, "false": False, "true": True}
_FAR = 1e6  # pixels


@dataclass(frozen=True)
class Table:
    """What a csv says of one video: M observations of N points."""

    path: Path
    names: tuple[str, ...]  # N, as in the file
    point: np.ndarray  # (M,) index into names
    frame: np.ndarray  # (M,) of the original video
    xy: np.ndarray  # (M, 2) float64, pixels or parts of the frame
    visible: np.ndarray  # (M,) bool
    line: np.ndarray  # (M,) of the file, for messages
    normalised: bool

    def check(self, frames: int, video: str) -> None:
        """Raise `DataError` if an observation is of a frame that the video does not have."""
        late = self.frame >= frames
        if late.any():
            i = int(late.argmax())
            what = "tracks of" if self.normalised else "column frame:"
            raise DataError(
                f"{self.path}, line {self.line[i]}, {what} frame {self.frame[i]}: {video} has 0 to {frames - 1}"
            )

    def dense(
        self, frames: Sequence[int], original: tuple[int, int], size: tuple[int, int]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
        """Return tracks (T, N', 2) in pixels of `size`, visible, valid (T, N') and the names of the N' points.

        Only points that these frames of the original video have an observation of; where there is none a track is not
        valid, and lies at 0.
        """
        order = np.asarray(frames)
        place = np.searchsorted(order, self.frame)
        here = place < len(order)
        here[here] = order[place[here]] == self.frame[here]
        ids, column = np.unique(self.point[here], return_inverse=True)
        t, n = len(order), len(ids)
        xy = np.zeros((t, n, 2), np.float32)
        visible, valid = np.zeros((t, n), bool), np.zeros((t, n), bool)
        full = (1, 1) if self.normalised else original
        scale = np.array([size[1] / full[1], size[0] / full[0]])
        xy[place[here], column] = self.xy[here] * scale
        visible[place[here], column] = self.visible[here]
        valid[place[here], column] = True
        return xy, visible, valid, [self.names[i] for i in ids]


def read_tables(path: Path) -> dict[str, Table]:
    """Read a csv: the table of each video that it names, "" where it names none.

    Raises:
        DataError: missing, too large, no text, of neither kind, or a bad line; names file, line and column.
    """
    return _read_tables(path, _stamp(path))


def _stamp(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None


@lru_cache(maxsize=2)  # one csv may serve all of the videos that a process works on
def _read_tables(path: Path, _: int) -> dict[str, Table]:
    try:
        text = read_bytes(path, MAX_CSV).decode("utf-8-sig")
        reader = csv.reader(io.StringIO(text, newline=""))
        rows = [(reader.line_num, [c.strip() for c in row]) for row in reader if any(c.strip() for c in row)]
    except UnicodeDecodeError:
        raise DataError(f"{path} is no text in UTF-8, so no csv of tracks") from None
    except csv.Error as error:
        raise DataError(f"{path} is no csv ({error})") from None
    if not rows:
        raise DataError(
            f"{path} is empty; allowed: a header point,frame,x,y,visible and lines, or a line for each track"
        )
    names = [c.lower() for c in rows[0][1]]
    if {"point", "frame"} & set(names) or {"x", "y"} <= set(names):
        return _long(path, names, rows[1:])
    return _wide(path, rows)


def _fail(path: Path, line: int, column: str, value: str, allowed: str) -> NoReturn:
    raise DataError(f"{path}, line {line}, column {column}: '{value[:40]}'; allowed: {allowed}")


# A line a point and frame -----------------------------------------------------------------------------------


def _long(path: Path, names: list[str], rows: list[tuple[int, list[str]]]) -> dict[str, Table]:
    for name in names:
        if name not in _COLUMNS or names.count(name) > 1:
            why = "is there twice" if name in _COLUMNS else f"is unknown; {closest(name, _COLUMNS)}"
            raise DataError(f"{path}, line 1: the column '{name[:40]}' {why}")
    missing = [c for c in _NEEDED if c not in names]
    if missing:
        raise DataError(f"{path}, line 1: the column {missing[0]} is missing; a header needs {', '.join(_NEEDED)}")
    if not rows:
        raise DataError(f"{path} has a header and no tracks")
    for line, row in rows:
        if len(row) != len(names):
            raise DataError(f"{path}, line {line} has {len(row)} values; allowed: {len(names)}, {','.join(names)}")
    lines = np.array([line for line, _ in rows])
    cells = dict(zip(names, zip(*(row for _, row in rows), strict=True), strict=True))
    frame = _whole(path, lines, "frame", cells["frame"])
    xy = np.stack([_numbers(path, lines, c, cells[c], _FAR, "pixels, a number") for c in "xy"], 1)
    visible = _truth(path, lines, "visible", cells["visible"]) if "visible" in cells else np.ones(len(rows), bool)
    videos = cells.get("video", ("",) * len(rows))
    out = {}
    known = {v: i for i, v in enumerate(dict.fromkeys(videos))}
    which = np.array([known[v] for v in videos])
    every = {p: i for i, p in enumerate(dict.fromkeys(cells["point"]))}
    points, ids = np.array([every[p] for p in cells["point"]]), list(every)
    for video, i in known.items():
        mine = which == i
        own = _sorted([ids[k] for k in np.unique(points[mine])])
        rank = {p: k for k, p in enumerate(own)}
        number = np.array([rank.get(p, 0) for p in ids])[points[mine]]
        table = Table(path, tuple(own), number, frame[mine], xy[mine], visible[mine], lines[mine], normalised=False)
        _check_twice(table)
        out[video] = table
    return out


def _sorted(ids: list[str]) -> list[str]:
    """Sort numbers as such; leave other names as they come."""
    return sorted(ids, key=int) if all(i.isdecimal() and len(i) < 19 for i in ids) else ids


def _check_twice(table: Table) -> None:
    order = np.lexsort((table.line, table.frame, table.point))
    same = (np.diff(table.point[order]) == 0) & (np.diff(table.frame[order]) == 0)
    if same.any():
        i = int(order[1:][same.argmax()])
        where = f"{table.path}, line {table.line[i]}"
        what = f"point {table.names[table.point[i]][:40]} in frame {table.frame[i]}"
        raise DataError(f"{where}: {what} is there twice; allowed: once")


def _numbers(path: Path, lines: np.ndarray, column: str, cells: Sequence[str], far: float, allowed: str) -> np.ndarray:
    long = next((i for i, c in enumerate(cells) if len(c) > _LONGEST), None)
    if long is not None:
        _fail(path, lines[long], column, cells[long], allowed)
    try:
        values = np.array(cells, dtype=np.str_).astype(np.float64)
    except ValueError:
        values = np.array([_number(c) for c in cells])
    bad = ~(np.abs(values) <= far)  # also what is not a number
    if bad.any():
        i = int(bad.argmax())
        _fail(path, lines[i], column, cells[i], allowed)
    return values


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return float("nan")


def _whole(path: Path, lines: np.ndarray, column: str, cells: Sequence[str]) -> np.ndarray:
    allowed = "a whole number from 0 on"
    values = _numbers(path, lines, column, cells, float(MAX_COUNT), allowed)
    bad = (values < 0) | (values != np.floor(values))
    if bad.any():
        i = int(bad.argmax())
        _fail(path, lines[i], column, cells[i], allowed)
    return values.astype(np.int64)


def _truth(path: Path, lines: np.ndarray, column: str, cells: Sequence[str]) -> np.ndarray:
    values = [_TRUTH.get(c.lower()) for c in cells]
    if None in values:
        i = values.index(None)
        _fail(path, lines[i], column, cells[i], "0 or 1")
    return np.array(values, dtype=bool)


# A line a track ---------------------------------------------------------------------------------------------


def _wide(path: Path, rows: list[tuple[int, list[str]]]) -> dict[str, Table]:
    groups: dict[str, list[tuple[int, list[str]]]] = {}
    for line, row in rows:
        if len(row) < 4 or (len(row) - 1) % 3:
            raise DataError(
                f"{path}, line {line} has {len(row)} values; "
                "allowed: a header with point,frame,x,y, or the video and then x,y,occluded for every frame"
            )
        group = groups.setdefault(row[0], [])
        if group and len(group[0][1]) != len(row):
            here, before = ((len(r) - 1) // 3 for r in (row, group[0][1]))
            raise DataError(f"{path}, line {line} has {here} frames, the lines of '{row[0][:40]}' before it {before}")
        group.append((line, row))
    return {video: _tracks(path, group) for video, group in groups.items()}


def _tracks(path: Path, rows: list[tuple[int, list[str]]]) -> Table:
    n, t = len(rows), (len(rows[0][1]) - 1) // 3
    lines = np.repeat([line for line, _ in rows], t)
    flat = [[c for _, row in rows for c in row[k + 1 :: 3]] for k in range(3)]
    hidden = _truth(path, lines, "occluded", flat[2])
    xy = np.stack([_numbers(path, lines, c, flat[k], _FAR, "a number in 0..1") for k, c in enumerate("xy")], 1)
    pixels = (np.abs(xy - 0.5) > 1).any(1) & ~hidden
    if pixels.any():
        i = int(pixels.argmax())
        k = int((np.abs(xy[i] - 0.5) > 1).argmax())
        _fail(path, lines[i], "xy"[k], flat[k][i], "parts of the frame, 0..1, where a point is visible (not pixels)")
    point, frame = np.repeat(np.arange(n), t), np.tile(np.arange(t), n)
    return Table(path, tuple(map(str, range(n))), point, frame, xy, ~hidden, lines, normalised=True)
