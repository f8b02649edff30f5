"""`trackpl track --labels` and `--keypoints`: what is marked in the first frame, followed through a video."""

from __future__ import annotations

import argparse
import csv
import io
import math
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from trackpl import adapters, draw
from trackpl.errors import DataError, Error
from trackpl.images import image_size
from trackpl.propagation import VOID, joint_maps, one_hot, read_joints
from trackpl.recording import SHEET
from trackpl.video import VideoReader
from trackpl.writing import replacing, write_video

if TYPE_CHECKING:
    from trackpl.method import Method

OUTPUTS = {
    "labels": ("masks", "masks.mp4", "masks.png"),
    "keypoints": ("keypoints.csv", "keypoints.mp4", "keypoints.png"),
}
COLUMNS = ["name", "frame", "x", "y", "visible"]
_BYTES = 1 << 26  # of a file that is read
_JOINTS = 1000


@dataclass(frozen=True)
class Marked:
    """A label image: what each pixel of frame 0 belongs to."""

    ids: np.ndarray  # (h, w) uint8; 0 background, 255 void unless it is the only other value
    palette: np.ndarray  # (256, 3) uint8, the colours of the ids


def check_options(given: argparse.Namespace) -> None:
    """Refuse options that do not go with labels or keypoints, before anything is opened.

    Raises:
        Error: what and why.
    """
    kind = "--labels" if given.labels else "--keypoints"
    if given.labels and given.keypoints:
        raise Error("--labels and --keypoints do not go together: follow one after the other, each with its own --out")
    points = {"--grid": given.grid, "--points": given.points, "--points-file": given.points_file, "--mask": given.mask}
    other = next((flag for flag, value in points.items() if value), "--start" if given.start else None)
    if other:
        raise Error(f"{kind} begins in frame 0 and takes no points: leave out {other}")
    if given.video.name.isdecimal() and not given.video.exists():
        raise Error(f"a camera has no first frame to mark: {kind} needs a video file or a folder of frames")


def follow(given: argparse.Namespace, device: str, video: VideoReader, out: Path) -> None:
    """Follow what `given.labels` or `given.keypoints` marks in frame 0, and write the files into `out`.

    Raises:
        Error: marks that cannot be read, before anything is written.
    """
    from trackpl import checkpoints  # heavy: a wrong file is answered without it

    if given.labels:
        marked = read_labels(given.labels, video.size)
        _follow_masks(checkpoints.load(given.model, given.checkpoint, device), video, marked, out, not given.no_video)
    else:
        names, points = read_keypoints(given.keypoints, video.size)
        method = checkpoints.load(given.model, given.checkpoint, device)
        _follow_keypoints(method, video, names, points, out, not given.no_video)


# Masks --------------------------------------------------------------------------------------------------------------


def read_labels(path: Path, size: tuple[int, int]) -> Marked:
    """Read a PNG whose values are ids: of a palette, of grey, or one for each of its exact colours (black is 0).

    Args:
        path: the file; it may be smaller or larger than the video, but not of another shape.
        size: H, W of the video.

    Raises:
        DataError: no such PNG, another shape, nothing marked, colours by the hundred, or edges that were smoothed.
    """
    image = _open_png(path)
    (h, w), (mh, mw) = size, (image.height, image.width)
    if abs(mw * h - mh * w) > max(mw, mh, w, h):  # one pixel of rounding
        raise DataError(f"the labels {path} are {mw}x{mh} and the video {w}x{h}: their shapes must agree")
    if image.mode in ("P", "L", "1", "LA"):
        values = np.asarray(image)
        ids = (values[..., 0] if values.ndim == 3 else values).astype(np.uint8)
        palette = _palette(image) if image.mode == "P" else default_palette()
        if image.mode != "P" and set(np.unique(ids)) == {0, 255}:
            palette[255] = palette[1]  # black and white; the default of 255 is that of void, hardly seen
    elif image.mode in ("RGB", "RGBA"):
        ids, palette = _by_colour(np.asarray(image.convert("RGB")), path)
    else:
        raise DataError(f"the labels {path} have 16 bits or another kind of pixel ({image.mode}): save ids of 8 bits")
    if not ids.any() or (ids == ids.flat[0]).all():
        raise DataError(f"the labels {path} mark nothing: 0 is background, other values are what is followed")
    _check_edges(ids, path)
    return Marked(ids, palette)


def _check_edges(ids: np.ndarray, path: Path) -> None:
    """Refuse ids of which most are in lines one pixel wide: what a resize or a brush makes of the edges of a mask."""
    inner = ids[1:-1, 1:-1]
    around = (ids[:-2, 1:-1], ids[2:, 1:-1], ids[1:-1, :-2], ids[1:-1, 2:])
    solid = np.unique(inner[np.logical_and.reduce([inner == other for other in around])])
    every = np.unique(ids)
    thin = len(every) - len(solid)
    if thin > max(len(solid), 4):
        raise DataError(
            f"the labels {path} have {len(every)} values, of which {thin} are nowhere wider than a line, as if edges "
            "were smoothed: each value is an object of its own; save ids without smoothing, and resize them by nearest"
        )


def _open_png(path: Path) -> Image.Image:
    if not path.is_file():
        raise DataError(f"no labels at {path}: give a png of the first frame")
    if path.stat().st_size > _BYTES:
        raise DataError(f"the labels {path} have {path.stat().st_size} bytes: at most {_BYTES} are read")
    data = path.read_bytes()
    if data[:2] == b"\xff\xd8":
        raise DataError(f"the labels {path} are a JPEG, which blurs ids: give a png")
    image_size(data, f"the labels {path}")
    try:
        image = Image.open(io.BytesIO(data), formats=["PNG"])
        image.load()
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise DataError(f"the labels {path} are not a readable png") from error
    return image


def _palette(image: Image.Image) -> np.ndarray:
    given = np.array(image.getpalette("RGB") or [], np.uint8).reshape(-1, 3)[:256]
    palette = default_palette()
    palette[: len(given)] = given
    return palette


def _by_colour(pixels: np.ndarray, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Give every exact colour a number, black first and then by their value."""
    code = pixels.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)
    colours, ids = np.unique(code, return_inverse=True)
    first = 0 if colours[0] == 0 else 1  # without black, all of it is followed
    if len(colours) > 100:
        raise DataError(
            f"the labels {path} have {len(colours)} colours, as many as a photo: each colour is an id and black the "
            "background; save ids as a grey or indexed png, without smoothed edges"
        )
    palette = default_palette()
    palette[0] = 0
    palette[first : first + len(colours)] = np.stack([colours >> 16, colours >> 8 & 255, colours & 255], -1)
    return (ids.reshape(code.shape) + first).astype(np.uint8), palette


def default_palette() -> np.ndarray:
    """Colours of ids where the labels name none, (256, 3): those that Pascal VOC and DAVIS use."""
    ids = np.arange(256)[:, None, None]
    bit = np.arange(8)[:, None]
    # Bit 3 b + c of the id is bit 7 - b of channel c.
    return (((ids >> (3 * bit + np.arange(3))) & 1) << (7 - bit)).sum(1).astype(np.uint8)


def _follow_masks(method: Method, video: VideoReader, marked: Marked, out: Path, with_video: bool) -> None:
    began = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".masks-", dir=out) as folder:
        frames = _masks(method, video, marked)
        drawn = _saved(frames, Path(folder), marked.palette, len(str(video.frames - 1)))
        _write_pictures(drawn, out / "masks.png", out / "masks.mp4" if with_video else None, video)
        shutil.rmtree(out / "masks", ignore_errors=True)
        Path(folder).rename(out / "masks")
        (out / "masks").chmod(0o755)
        Path(folder).mkdir()  # what the context wants to remove
    seconds = time.perf_counter() - began
    count = len(set(np.unique(marked.ids).tolist()) - {0, VOID}) or 1  # void is none, unless it is the only one
    _tell_work(method, video, f"{count} label{'s' * (count != 1)}", seconds)
    _tell(out, {"masks": "an indexed png a frame", "masks.mp4": "overlay", "masks.png": "a contact sheet of it"})


def _masks(method: Method, video: VideoReader, marked: Marked) -> Iterator[tuple[Tensor, Tensor]]:
    """Give each frame (3, H, W) and its ids (h, w), frame 0 as it was given."""
    waiting: deque[Tensor] = deque()
    given = torch.from_numpy(marked.ids.astype(np.int64))
    maps, ids = one_hot(given[None])
    table = torch.tensor(ids, dtype=torch.uint8)
    found = method.propagate_frames(_waiting(video, waiting), maps)
    for t, soft in enumerate(found):
        own = table[soft[0].argmax(0).cpu()]
        yield waiting.popleft(), torch.from_numpy(marked.ids) if t == 0 else own


def _waiting(video: VideoReader, waiting: deque[Tensor]) -> Iterator[Tensor]:
    """Read frame after frame, and note each for the time when its result comes."""
    for t in range(video.frames):
        image = video.read([t])
        waiting.append(image[0])
        yield image


def _saved(frames: Iterator[tuple[Tensor, Tensor]], folder: Path, palette: np.ndarray, digits: int) -> Iterator[Tensor]:
    """Save every mask, and pass its picture on."""
    colours = torch.from_numpy(palette)
    for t, (image, ids) in enumerate(frames):
        png = Image.fromarray(ids.numpy())
        png.putpalette(palette.tobytes())
        png.save(folder / f"{t:0{max(5, digits)}d}.png")
        yield overlay(image, ids, colours)


def overlay(image: Tensor, ids: Tensor, palette: Tensor) -> Tensor:
    """Draw ids (h, w) over a frame uint8 (3, H, W): each in its colour, half transparent, with its outline.

    Args:
        image: left as it is.
        ids: uint8, of the frame's shape; 0 and 255, where it is not the only one, are not drawn.
        palette: uint8 (256, 3).
    """
    size = (image.shape[-2], image.shape[-1])
    near = F.interpolate(ids[None, None].float(), size, mode="nearest-exact")
    width = 2 * max(1, round(math.sqrt(size[0] * size[1]) / 600)) + 1
    grown = F.max_pool2d(near, width, 1, width // 2)
    shrunk = -F.max_pool2d(-near, width, 1, width // 2)
    near, edge = near[0, 0].long(), (grown != shrunk)[0, 0]
    near = torch.where((near == 255) & ((ids != 255) & (ids != 0)).any(), 0, near)
    bright = palette.float() * 255 / palette.amax(1, keepdim=True).clamp(min=1)  # dark colours hardly show
    colour = bright[near].permute(2, 0, 1)
    share = torch.where(edge, 0.9, 0.45) * (near != 0)
    return (image + share * (colour - image)).round().to(torch.uint8)


# Keypoints ----------------------------------------------------------------------------------------------------------


def read_keypoints(path: Path, size: tuple[int, int]) -> tuple[list[str], Tensor]:
    """Read lines name,x,y (a first line may say so): names, and places (J, 2) in pixels of frame 0.

    Raises:
        DataError: no such file, a line that is none, a name twice or none, a place outside the frame.
    """
    if not path.is_file():
        raise DataError(f"no keypoints at {path}: give a csv with lines name,x,y")
    if path.stat().st_size > _BYTES:
        raise DataError(f"{path} has {path.stat().st_size} bytes: at most {_BYTES} are read")
    try:
        lines = list(csv.reader(path.read_text(encoding="utf-8-sig").splitlines()))
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is not a csv of keypoints: allowed are lines name,x,y") from error
    rows = [(n, [cell.strip() for cell in line]) for n, line in enumerate(lines, 1) if any(map(str.strip, line))]
    if rows and [cell.lower() for cell in rows[0][1]] == ["name", "x", "y"]:
        rows = rows[1:]
    if not 0 < len(rows) <= _JOINTS:
        raise DataError(f"{path} holds {len(rows)} keypoints: allowed are 1 to {_JOINTS} lines name,x,y")
    names, places, (h, w) = [], [], size
    for n, row in rows:
        try:
            name, x, y = row[0], *map(float, row[1:])
        except (ValueError, IndexError):
            raise DataError(f"line {n} of {path} is '{','.join(row)[:60]}': allowed is name,x,y") from None
        if not name:
            raise DataError(f"line {n} of {path} names no keypoint: '{','.join(row)[:60]}'; allowed is name,x,y")
        if not (0 <= x <= w and 0 <= y <= h) or name in names:
            why = f"is twice in {path}" if name in names else f"lies outside the frame: x in [0, {w}], y in [0, {h}]"
            raise DataError(f"the keypoint '{name}' of line {n} (x={x:g}, y={y:g}) {why}")
        names.append(name)
        places.append((x, y))
    return names, torch.tensor(places)


def _follow_keypoints(
    method: Method, video: VideoReader, names: list[str], points: Tensor, out: Path, with_video: bool
) -> None:
    began = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    with replacing(out / "keypoints.csv") as part, part.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(COLUMNS)
        frames = _joints(method, video, points) if method.has("propagate") else _tracked(method, video, points)
        drawn = _noted(frames, rows.writerows, names, points)
        _write_pictures(drawn, out / "keypoints.png", out / "keypoints.mp4" if with_video else None, video)
    seconds = time.perf_counter() - began
    _tell_work(method, video, f"{len(names)} keypoint{'s' * (len(names) != 1)}", seconds, ("propagate", "track"))
    about = {"keypoints.csv": ",".join(COLUMNS), "keypoints.mp4": "drawn", "keypoints.png": "a contact sheet of it"}
    _tell(out, about)


def _joints(method: Method, video: VideoReader, points: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Follow soft maps of the joints: each frame, places (J, 2) and which are there (J,).

    Drawn and read as the protocol of JHMDB does; by how much that misses the given places in frame 0 is added in all
    frames, so that nothing is lost to the coarse map at the start.
    """
    (h, w), size = method.label_size(video.size), video.size
    scale = torch.tensor([size[1] / w, size[0] / h])
    maps = joint_maps((points - 0.5)[None] / scale, (h, w))
    inside = maps[0, 1:].flatten(1).any(1)
    if not inside.all():  # rounded off the map at its right or lower border
        cells = torch.minimum((points - 0.5) / scale, torch.tensor([w - 1, h - 1])).clamp(min=0)
        maps = joint_maps(cells[None], (h, w))
    waiting: deque[Tensor] = deque()
    last, missed = points, torch.zeros_like(points)
    for t, soft in enumerate(method.propagate_frames(_waiting(video, waiting), maps)):
        cell = read_joints(soft[0, 1:].cpu())
        there = cell[:, 0] >= 0
        place = cell * scale + 0.5
        missed = points - place if t == 0 else missed
        last = torch.where(there[:, None], place + missed, last)
        yield waiting.popleft(), last, there


def _tracked(method: Method, video: VideoReader, points: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Follow the joints as points, with a method that does not propagate labels."""
    tracks = adapters.track_video(method, video, F.pad(points, (1, 0)))
    for t in range(video.frames):
        yield video.read([t])[0], tracks.xy[0, t].float(), tracks.visible[0, t] > 0.5


def _noted(
    frames: Iterator[tuple[Tensor, Tensor, Tensor]],
    write_rows: Callable[[Iterable[list[Any]]], None],
    names: list[str],
    points: Tensor,
) -> Iterator[Tensor]:
    """Write the rows of every frame, and pass its picture on."""
    colours = draw.start_colours(points)
    for t, (image, xy, visible) in enumerate(frames):
        radius = draw.disc_radius((image.shape[-2], image.shape[-1]), points)
        places = zip(names, xy.tolist(), visible.int().tolist(), strict=True)
        write_rows([name, t, f"{x:.2f}", f"{y:.2f}", seen] for name, (x, y), seen in places)
        yield draw.draw_frame(image, xy[None], visible[None], colours, radius)


# --------------------------------------------------------------------------------------------------------------------


def _write_pictures(pictures: Iterator[Tensor], sheet: Path, film: Path | None, video: VideoReader) -> None:
    """Write the drawn video, if it is wanted, and the contact sheet."""
    wanted = {round(i * (video.frames - 1) / (SHEET - 1)) for i in range(SHEET)}
    kept: dict[int, Tensor] = {}

    def passing() -> Iterator[Tensor]:
        for t, picture in enumerate(tqdm(pictures, "following", video.frames, unit="frame", dynamic_ncols=True)):
            if t in wanted:
                kept[t] = picture
            yield picture

    if film:
        write_video(film, passing(), video.fps)
    else:
        deque(passing(), maxlen=0)
        sheet.with_suffix(".mp4").unlink(missing_ok=True)  # of an earlier run, it shows other labels
    draw.save_png(draw.contact_sheet(torch.stack(list(kept.values())), titles=[f"frame {t}" for t in kept]), sheet)


def _tell_work(
    method: Method,
    video: VideoReader,
    what: str,
    seconds: float,
    ways: tuple[str, ...] = ("propagate", "flow", "track"),
) -> None:
    """Say what was followed, by which of a method's capabilities, and how fast."""
    way = next((w for w in ways if method.has(w)), "track_dense")
    by = {"propagate": "label propagation", "flow": "flow"}.get(way, "tracks")
    pace = f"{seconds:.1f} s ({seconds / video.frames:.2f} s a frame)"
    print(f"{video.frames} frames x {what} by the {by} of {type(method).__name__} in {pace}; files:")


def _tell(out: Path, about: dict[str, str]) -> None:
    for name, what in about.items():
        if (out / name).exists():
            print(f"  {out / name}  {what}")
    print(f"next: look at {out / next(n for n in about if n.endswith('.png'))}")
