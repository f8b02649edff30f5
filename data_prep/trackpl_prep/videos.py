"""Any folder of videos or frames, with or without a csv of tracks: `trackpl data pack FOLDER OUT`.

Every video file, and every folder that directly holds pictures, becomes one sample for each `--segment` frames. JPEG
frames are stored untouched; videos are decoded a segment at a time and stored as JPEG. Tracks come from csv files
(`trackpl_prep.files.point_tables`).
"""

from __future__ import annotations

import math
import os
import zlib
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import av
import av.error
import numpy as np
import torch

from trackpl.encoding import encode
from trackpl.errors import DataError, VideoError, closest
from trackpl.types import Clip
from trackpl.video import FEW, IMAGES, VideoReader, open_video
from trackpl_prep.dataset import Dataset, Item, Samples, folder_error, key_of, quality_option
from trackpl_prep.files.frames import (
    Frames,
    encode_pixels,
    list_names,
    load_frames,
    natural,
    numbering,
    read_bytes,
    resize_pixels,
    scaled,
    segments,
)
from trackpl_prep.files.point_tables import MAX_CSV, Table, read_tables

VIDEOS = (
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".mts", ".m2ts", ".wmv", ".flv"),
    *(".3gp", ".ogv", ".gif"),
)
LAYOUT = """
SOURCE/a.mp4  SOURCE/more/b.mkv         videos, at any depth; or
SOURCE/c/00000.jpg 00001.jpg ...        folders of frames (jpg, png, webp), in natural order
SOURCE/a.csv  SOURCE/c.csv              if you have them: tracks of each (point,frame,x,y,visible), or
SOURCE/tracks.csv                       of all (with a column video, or TAP-Vid's rows: video,x,y,occluded,...)
"""
PIECE = 512  # frames, about, that one item makes: what a process holds at a time
_SMALL = 2**21  # bytes of a video file that is not looked into before its turn


def add_options(parser: ArgumentParser) -> None:
    """Add the flags of this data set."""
    add = parser.add_argument
    add("--segment", type=int, default=64, metavar="T", help="frames a sample at most; 0: whole")
    add("--short-side", type=int, metavar="N", help="scale frames down to N pixels on the shorter side")
    quality_option(parser)
    add("--lossless", action="store_true", help="store PNG instead of JPEG; PNG frames are then kept untouched")
    add("--every", type=int, default=1, metavar="K", help="keep every K-th frame")
    add("--fps", type=float, metavar="F", help="keep at most F frames a second of video files")
    add(
        "--tracks",
        metavar="PATH",
        help="csv of all tracks, or a folder of <video>.csv or <video>/tracks.csv, such as `trackpl track` writes",
    )
    add("--licence", default="", metavar="TEXT", help="of your videos; it goes along with every sample")


def _check(options: Namespace) -> None:
    if options.segment < 0 or options.segment == 1:
        raise DataError(f"--segment {options.segment}: allowed is 0 (whole videos) or at least 2 frames")
    if options.short_side is not None and options.short_side < 16:
        raise DataError(f"--short-side {options.short_side}: allowed is a whole number of pixels from 16 on")
    if options.every < 1:
        raise DataError(f"--every {options.every}: allowed is a whole number from 1 on")
    if options.fps is not None and not (math.isfinite(options.fps) and options.fps > 0):
        raise DataError(f"--fps {options.fps}: allowed is a positive number")
    if options.fps is not None and options.every != 1:
        raise DataError("--fps and --every both thin out the frames: give one of them")


# What there is ----------------------------------------------------------------------------------------------


def items(source: Path, options: Namespace) -> list[Item]:
    """List (path, name, piece, pieces, bytes or frames, sum of its tracks) of all videos, long ones in pieces."""
    _check(options)
    if source.is_file():
        raise DataError(f"{source} is a file: give the folder that holds it, {source.parent}")
    found = sorted(find(source), key=lambda f: [natural(p) for p in PurePosixPath(f[0]).parts])
    if not found:
        raise folder_error(LAYOUT, f"no videos and no folders of frames in {source}")
    names = _names([path for path, _ in found], source)
    _check_tables(source, names, options)
    out: list[Item] = []
    for (path, size), name in zip(found, names, strict=True):
        frames = size if (source / path).is_dir() else _guess_frames(source / path, size)
        pieces = max(1, math.ceil(frames / options.every / PIECE)) if options.segment else 1
        table = _table_path(source, path, name, options)
        tracks = 0 if table is None else zlib.crc32(read_bytes(table, MAX_CSV))
        out += [(path, name, piece, pieces, size, tracks) for piece in range(pieces)]
    return out


def find(source: Path) -> Iterator[tuple[str, int]]:
    """Find videos: relative POSIX path with bytes of a file, or number of pictures of a folder ("." is the source).

    Pictures beside video files are no frames of a video (posters, thumbnails); hidden files and folders are left out.
    """
    seen = set()

    def fail(error: OSError) -> None:
        raise DataError(f"the folder {error.filename} cannot be read: {error.strerror}")

    for here, folders, files in os.walk(source, onerror=fail, followlinks=True):
        place = os.path.realpath(here)
        folders[:] = [] if place in seen else sorted(f for f in folders if not f.startswith("."))
        if place in seen:  # a link to a folder around it
            continue
        seen.add(place)
        folder = Path(here)
        shown = [f for f in files if not f.startswith(".")]
        videos = [f for f in shown if f.lower().endswith(VIDEOS)]
        yield from ((_relative(folder / f, source), _size(folder / f)) for f in videos)
        pictures = sum(f.lower().endswith(IMAGES) for f in shown)
        if pictures and not videos:
            yield _relative(folder, source), pictures


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None


def _relative(path: Path, source: Path) -> str:
    return path.relative_to(source).as_posix()


def _names(paths: list[str], source: Path) -> list[str]:
    """Name videos by their path without its ending, where that tells them apart."""
    short = [_without_ending(p) if p != "." else source.resolve().name for p in paths]
    times = Counter(short)
    return [s if times[s] == 1 else p for s, p in zip(short, paths, strict=True)]


def _without_ending(path: str) -> str:
    given = PurePosixPath(path)
    return str(given.with_suffix("") if given.suffix.lower() in VIDEOS else given)


def _guess_frames(path: Path, size: int) -> int:
    """Guess the frames of a video file from its header; no more than a hint, and broken files show in their turn."""
    if size <= _SMALL:
        return 1
    try:
        with av.open(str(path.resolve()), options={"protocol_whitelist": "file"}) as container:
            stream = container.streams.best("video")
            rate = float(stream.average_rate or 0) if stream else 0
            return int((stream.frames if stream else 0) or rate * (container.duration or 0) / 1e6)
    except (av.error.FFmpegError, OSError, ValueError):
        return 1


# Tracks -----------------------------------------------------------------------------------------------------


def _table_path(source: Path, path: str, name: str, options: Namespace) -> Path | None:
    """Find the csv of a video: its own, else the one of all."""
    stem = PurePosixPath(name).name
    if options.tracks is not None:
        given = Path(options.tracks)
        if given.is_file():
            return given
        own = [given / f"{name}.csv", given / name / "tracks.csv", given / f"{stem}.csv", given / stem / "tracks.csv"]
    else:
        beside = source / path
        own = [] if path == "." else [beside.with_name(f"{stem}.csv"), beside.with_name(f"{beside.name}.csv")]
        own.append(source / "tracks.csv")
    return next((p for p in own if p.is_file()), None)


def _check_tables(source: Path, names: list[str], options: Namespace) -> None:
    """Every video that the csv of all names must be there; raises `DataError` with the closest one."""
    shared = Path(options.tracks) if options.tracks is not None else source / "tracks.csv"
    if options.tracks is not None and not shared.exists():
        raise DataError(f"--tracks {shared} does not exist; give a csv, or a folder of <video>.csv")
    if not shared.is_file():
        return
    tables = read_tables(shared)
    if "" in tables and len(names) > 1:
        raise DataError(
            f"{shared} does not say of which of the {len(names)} videos its tracks are: add a column 'video'"
        )
    for video in tables:
        meant = [n for n in names if _same(video, n)]
        if video and not meant:
            raise DataError(f"{shared} has tracks of '{video[:60]}', which is not there; {closest(video, names)}")
        if len(meant) > 1:
            raise DataError(f"{shared} has tracks of '{video[:60]}', which may be {' or '.join(meant[:4])}")


def _same(video: str, name: str) -> bool:
    """Whether a csv's name of a video means the one called `name`: its path, or the last part of it, ending or not."""
    return video == name or _without_ending(video) in (name, PurePosixPath(name).name)


def _table(source: Path, path: str, name: str, options: Namespace) -> Table | None:
    """Read the tracks of a video; none where there are none."""
    place = _table_path(source, path, name, options)
    if place is None:
        return None
    tables = read_tables(place)
    shared = place in (source / "tracks.csv", Path(options.tracks or "."))
    found = [t for video, t in tables.items() if _same(video, name) or not video]
    if len(found) > 1:
        raise DataError(f"{place} names {name} in more than one way: {', '.join(v for v in tables if _same(v, name))}")
    if not found and not shared:
        raise DataError(f"{place} has tracks of '{next(iter(tables))[:60]}', not of {name}")
    return found[0] if found else None


# Frames -----------------------------------------------------------------------------------------------------


def read(source: Path, item: Item, options: Namespace) -> Samples:
    """Make the samples of one piece of a video, decoding one segment at a time."""
    path, name, piece, pieces = str(item[0]), str(item[1]), int(item[2]), int(item[3])
    place = source / path
    video = _reader(place, place.stat().st_mtime_ns)
    kept, fps = _thin(video, place.is_dir(), options)
    if len(kept) < 2:
        raise DataError(f"{place} has {video.frames} frames, of which {len(kept)} are kept; a clip needs 2")
    table = _table(source, path, name, options)
    if table is not None:
        table.check(video.frames, place.name)
    cuts = segments(len(kept), options.segment)
    for i in range(len(cuts) * piece // pieces, len(cuts) * (piece + 1) // pieces):
        numbers = kept[slice(*cuts[i])]
        frames = _load(video, numbers, options)
        fields, facts = _tracks(table, numbers, frames)
        clip = Clip(video=frames.video, name=(name if len(cuts) == 1 else f"{name}/{i:05d}",), fps=fps, **fields)
        facts |= {"video": path if path != "." else name, "segment": i, "segments": len(cuts)}
        facts |= {"original_size": list(frames.original), "untouched": not frames.changed, **numbering(numbers)}
        yield key_of(name, f"{i:05d}"), encode(clip, licence=options.licence, images=frames.images, source=facts)


@lru_cache(maxsize=1)  # the pieces of a video come one after the other
def _reader(path: Path, _: int) -> VideoReader:
    try:
        return open_video(path)
    except VideoError as error:
        raise DataError(str(error)) from None


def _thin(video: VideoReader, folder: bool, options: Namespace) -> tuple[list[int], float | None]:
    """Return the numbers of the frames to keep, and how many a second they are; a folder of frames does not say."""
    if folder:
        return list(range(0, video.frames, options.every)), None
    ratio = max(1.0, video.fps / options.fps) if options.fps else float(options.every)
    kept = np.floor(np.arange(math.ceil(video.frames / ratio)) * ratio + 1e-6).astype(int)
    return kept[kept < video.frames].tolist(), video.fps / ratio


def _load(video: VideoReader, numbers: Sequence[int], options: Namespace) -> Frames:
    """Read frames of a folder as they are, or decode and encode those of a file."""
    quality = None if options.lossless else options.quality
    if video.path.is_dir():
        names = list_names(video.path, IMAGES)
        files = [video.path / names[i] for i in numbers]
        return load_frames(files, short_side=options.short_side, quality=quality, keep_png=options.lossless)
    size = scaled(video.size, options.short_side)
    images: list[bytes] = []
    try:
        for part in np.array_split(np.asarray(numbers), max(1, len(numbers) // (FEW + 1))):
            for frame in video.read(part.tolist()):  # a reader would keep the frames of shorter reads
                pixels = frame.permute(1, 2, 0).numpy()
                images.append(encode_pixels(resize_pixels(np.ascontiguousarray(pixels), size), quality))
    except VideoError as error:
        raise DataError(str(error)) from None
    return Frames(images, size, video.size, len(images))


def _tracks(table: Table | None, numbers: Sequence[int], frames: Frames) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the fields of a clip and the facts that a table gives of these frames."""
    if table is None:
        return {}, {}
    xy, visible, valid, names = table.dense(numbers, frames.original, frames.size)
    fields = {"tracks": xy, "visible": visible, "valid": valid}
    facts = {"points": names} if names != list(map(str, range(len(names)))) and len("".join(names)) < 2**14 else {}
    return {k: torch.from_numpy(v)[None] for k, v in fields.items()}, facts


DATASET = Dataset(
    name="videos",
    about="any folder of videos or of frames, with or without a csv of tracks",
    licence="that of the videos",
    where="your own; `trackpl data pack FOLDER OUT` is the same",
    layout=LAYOUT,
    items=items,
    read=read,
    options=add_options,
    per_shard=8,
)
