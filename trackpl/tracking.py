"""`trackpl track`: points of a video file or a folder of frames, from its pixels to useful files."""

from __future__ import annotations

import argparse
import csv
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from trackpl import draw
from trackpl.errors import DataError, Error, closest
from trackpl.types import Tracks
from trackpl.usage import Parser, device_of
from trackpl.video import VideoReader, open_video
from trackpl.writing import replacing, write_video

GRID = 20
OUTPUTS = ("tracks.npz", "tracks.csv", "tracks.mp4", "tracks.png")
_CHUNK = 16  # frames decoded at once while drawing
_SHEET = 12  # frames on the contact sheet


@dataclass(frozen=True)
class Points:
    """Query points and what the user called each, for messages."""

    queries: np.ndarray  # (N, 3) float64 of (t, x, y)
    labels: list[str]


def run(args: list[str]) -> int:
    """Track points as the command line says; return 0.

    Raises:
        Error: bad input, always before anything is written.
    """
    given = _parse(args)
    device = device_of(given.device)
    # A bare name may be that of published weights (`trackpl weights`), which `load` finds.
    named = given.checkpoint and given.checkpoint.parent == Path() and not given.checkpoint.suffix
    if given.checkpoint and not named and not given.checkpoint.is_file():
        raise Error(f"no checkpoint at {given.checkpoint}: give the file, or none to use the weights that ship")
    video = open_video(given.video)
    out = given.out or Path("tracks") / _stem(given.video)
    _check_out(out, given.overwrite)
    queries = _queries(given, video)
    began = time.perf_counter()
    tracks = _track(given, device, video, queries)
    seconds = time.perf_counter() - began
    xy = tracks.xy.detach().float().cpu().reshape(video.frames, len(queries), 2)
    visibility = tracks.visible.detach().float().cpu().reshape(xy.shape[:2])
    visible = visibility > given.threshold
    _save(out, xy, visible, visibility, queries, video, given)
    _tell(out, visible, seconds, given)
    return 0


def _parse(args: list[str]) -> argparse.Namespace:
    parser = Parser(
        "track",
        "Track points through a video. Coordinates are pixels: x to the right, y down, (0, 0) the outer "
        "corner of the top-left pixel, whose centre is (0.5, 0.5). Points of all kinds add up; without any, "
        f"a grid of {GRID} x {GRID} is tracked.",
    )
    add = parser.add_argument
    add("video", metavar="VIDEO", type=Path, help="a video file, or a folder of jpg, png or webp frames")
    add(
        "--model",
        metavar="NAME",
        default="crw_multiscale",
        help="a method of `trackpl plugins` (default: %(default)s)",
    )
    add(
        "--checkpoint",
        metavar="FILE",
        type=Path,
        help="its weights, or the name of published ones (default: those that ship with it)",
    )
    add("--grid", metavar="N", type=int, help=f"N x N points over the frame or the mask (default: {GRID})")
    add("--points", metavar="X,Y[@T]", nargs="+", action="extend", default=[], help="points, @T: of frame T")
    add("--points-file", metavar="FILE", type=Path, help="csv, txt or npy with columns t,x,y or x,y")
    add(
        "--mask",
        metavar="PNG",
        type=Path,
        help="keep grid points where it is not 0; the grid spans what it marks",
    )
    add(
        "--start",
        metavar="T",
        type=int,
        default=0,
        help="frame of the grid and of points without one (default: 0)",
    )
    add("--out", metavar="DIR", type=Path, help="where the files go (default: tracks/<name of the video>)")
    add("--overwrite", action="store_true", help="replace the files of an earlier run in DIR")
    add(
        "--device",
        metavar="NAME",
        default="auto",
        help="cpu, cuda, or auto: a GPU where there is one (default)",
    )
    add(
        "--threshold",
        metavar="P",
        type=float,
        default=0.5,
        help="visible above this probability (default: 0.5)",
    )
    add(
        "--tail",
        metavar="N",
        type=int,
        default=draw.TAIL,
        help="frames that a tail reaches back (default: 10)",
    )
    add("--no-video", action="store_true", help="draw no tracks.mp4")
    # argparse would take a point left of the frame for an option; words with a blank in them it lets through.
    given, unknown = parser.parse_known_args([" " + a if re.match(r"-[\d.]+,", a) else a for a in args])
    if unknown:
        _refuse(unknown, parser)
    if given.grid is not None and given.grid < 1:
        raise Error(f"--grid {given.grid}: allowed is a whole number from 1 on")
    if given.tail < 0:
        raise Error(f"--tail {given.tail}: allowed is a whole number of frames from 0 on")
    if not 0 <= given.threshold < 1:
        raise Error(f"--threshold {given.threshold:g}: allowed is a probability of at least 0 and below 1")
    return given


def _refuse(unknown: list[str], parser: argparse.ArgumentParser) -> None:
    flag = next((word for word in unknown if word.startswith("-")), None)
    if flag is None:
        raise Error(f"one video at a time: do not know what to do with '{unknown[0]}'")
    flags = {f for action in parser._actions for f in action.option_strings if f.startswith("--")}
    raise Error(f"track has no option '{flag.split('=')[0]}'; {closest(flag.split('=')[0], flags)}")


def _stem(video: Path) -> str:
    path = video.resolve()
    return path.name if path.is_dir() else path.stem


def _check_out(out: Path, overwrite: bool) -> None:
    if out.exists() and not out.is_dir():
        raise Error(f"--out {out} is a file: give a folder")
    there = [name for name in OUTPUTS if (out / name).exists()]
    if there and not overwrite:
        raise Error(f"{out} already holds {there[0]}: add --overwrite to replace it, or choose another --out")
    parent = next(p for p in (out.resolve(), *out.resolve().parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise Error(f"cannot write to {out}: {parent} is not a folder that you may write to; choose another --out")


# Queries ----------------------------------------------------------------------------------------------------


def _queries(given: argparse.Namespace, video: VideoReader) -> np.ndarray:
    """Collect all points of the command line as (N, 3) of (t, x, y), checked against the video."""
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
    marked = _read_mask(mask, size) if mask else np.ones(size, dtype=bool)
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


def _read_mask(path: Path, size: tuple[int, int]) -> np.ndarray:
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


def _check(points: Points, video: VideoReader) -> None:
    t, x, y = points.queries.T
    h, w = video.size
    bad = ~((t >= 0) & (t < video.frames) & (t == np.floor(t)) & (x >= 0) & (x <= w) & (y >= 0) & (y <= h))
    if bad.any():
        n = int(bad.argmax())
        raise DataError(
            f"the point {points.labels[n]} (t={t[n]:g}, x={x[n]:g}, y={y[n]:g}) is outside {video.path}: "
            f"t is a whole number in [0, {video.frames - 1}], x in [0, {w}], y in [0, {h}]"
        )


# Work and results -------------------------------------------------------------------------------------------


def _track(given: argparse.Namespace, device: str, video: VideoReader, queries: np.ndarray) -> Tracks:
    from trackpl import adapters, checkpoints  # heavy: a wrong option is answered without them

    method = checkpoints.load(given.model, given.checkpoint, device)
    points = torch.from_numpy(queries).float()
    with tqdm(total=video.frames, desc="tracking", unit="frame", dynamic_ncols=True) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return adapters.track_video(method, video, points, progress=progress)


def _save(
    out: Path,
    xy: Tensor,
    visible: Tensor,
    visibility: Tensor,
    queries: np.ndarray,
    video: VideoReader,
    given: argparse.Namespace,
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for name in OUTPUTS[2:]:  # pictures of other tracks must not stand beside these, should drawing be stopped
        (out / name).unlink(missing_ok=True)
    with replacing(out / "tracks.npz") as part:
        np.savez_compressed(
            part,
            xy=xy.numpy(),
            visible=visible.numpy(),
            visibility=visibility.numpy(),
            queries=queries.astype(np.float32),
        )
    _save_csv(out / "tracks.csv", xy.numpy(), visible.numpy())
    sheet = sorted({round(i * (video.frames - 1) / (_SHEET - 1)) for i in range(_SHEET)})
    wanted = sheet if given.no_video else list(range(video.frames))
    starts = torch.from_numpy(queries[:, 1:])
    kept: list[Tensor] = []
    drawn = _drawn(video, wanted, xy, visible, starts, given.tail)
    noted = _noting(drawn, {wanted.index(t) for t in sheet}, kept)
    if given.no_video:
        for _ in noted:
            pass
    else:
        write_video(out / "tracks.mp4", noted, video.fps)
    titles = [f"frame {t}" for t in sheet]
    draw.save_png(draw.contact_sheet(torch.stack(kept), titles=titles), out / "tracks.png")


def _save_csv(path: Path, xy: np.ndarray, visible: np.ndarray) -> None:
    with replacing(path) as part, part.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["point", "frame", "x", "y", "visible"])
        frames = range(len(xy))
        for n in range(xy.shape[1]):
            x, y = ([f"{v:.4f}" for v in xy[:, n, axis].tolist()] for axis in (0, 1))
            writer.writerows(zip([n] * len(xy), frames, x, y, visible[:, n].astype(int).tolist(), strict=True))


def _drawn(
    video: VideoReader, frames: list[int], xy: Tensor, visible: Tensor, starts: Tensor, tail: int
) -> Iterator[Tensor]:
    """Draw the wanted frames, reading a few at a time."""
    colours, radius = draw.start_colours(starts), draw.disc_radius(video.size, starts)
    with tqdm(total=len(frames), desc="drawing", unit="frame", dynamic_ncols=True) as bar:
        for begin in range(0, len(frames), _CHUNK):
            some = frames[begin : begin + _CHUNK]
            for t, frame in zip(some, video.read(some), strict=True):
                past = slice(max(0, t - tail), t + 1)
                yield draw.draw_frame(frame, xy[past], visible[past], colours, radius)
                bar.update()


def _noting(frames: Iterator[Tensor], places: set[int], kept: list[Tensor]) -> Iterator[Tensor]:
    """Pass frames on, and keep those at `places`."""
    for i, frame in enumerate(frames):
        if i in places:
            kept.append(frame)
        yield frame


def _tell(out: Path, visible: Tensor, seconds: float, given: argparse.Namespace) -> None:
    frames, points = visible.shape
    share = 100 * visible.float().mean()
    print(f"{frames} frames x {points} points in {seconds:.1f} s, {share:.0f} % visible; the files:")
    about = {
        "tracks.npz": f"xy {(frames, points, 2)}, visible {(frames, points)}, queries {(points, 3)}",
        "tracks.csv": "point,frame,x,y,visible",
        "tracks.mp4": "the tracks drawn: discs are visible, rings hidden",
        "tracks.png": "a contact sheet of it",
    }
    for name, what in about.items():
        if (out / name).exists():
            print(f"  {out / name}  {what}")
    print(f"next: look at {out / 'tracks.png'}; in Python: numpy.load('{out / 'tracks.npz'}')['xy']")
