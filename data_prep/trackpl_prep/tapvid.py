"""TAP-Vid and RoboTAP as published: videos with points that people followed, in pickles.

Each file is a list of videos, or a dict of them by name; a video is ``video`` (uint8 frames, or one JPEG a frame),
``points`` [N, T, 2], raster coordinates over the width and height, and ``occluded`` [N, T]. A file is mapped into
memory and its videos are read from there one at a time, so its size does not matter.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trackpl.encoding import encode
from trackpl.errors import DataError
from trackpl.images import MAX_AREA, MAX_SIDE, decode_image
from trackpl.types import Clip
from trackpl_prep.dataset import Dataset, Item, Samples, folder_error, key_of
from trackpl_prep.files.frames import Frames
from trackpl_prep.files.pickles import load_file

_KEYS = ("video", "points", "occluded")


def items(source: Path, options: Namespace, *, folder: str, pattern: str, layout: str) -> list[Item]:
    """List (file, number of the video); `source` is the file, its folder, or the folder above."""
    places = [source / folder, source]
    files = [source] if source.is_file() else next((f for p in places if (f := sorted(p.glob(pattern)))), [])
    if not files:
        raise folder_error(layout, f"{source} has no {pattern}")
    home = source.parent if source.is_file() else source
    return [(f.relative_to(home).as_posix(), i) for f in files for i in range(len(videos(f)))]


def videos(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Return the names and contents of the videos of a file, as views of the mapped file.

    Raises:
        DataError: no pickle of data, or not of videos.
    """
    try:
        stat = path.stat()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
    return _videos(path, (stat.st_mtime_ns, stat.st_size))


@lru_cache(maxsize=1)
def _videos(path: Path, state: tuple[int, int]) -> list[tuple[str, dict[str, Any]]]:
    content = load_file(path)
    if not isinstance(content, dict | list) or not content:
        raise DataError(f"{path} holds a {type(content).__name__}; expected a dict or a list of videos")
    pairs = content.items() if isinstance(content, dict) else ((f"{i:04d}", v) for i, v in enumerate(content))
    found = [(str(name), video) for name, video in pairs]
    for name, video in found:
        if not isinstance(video, dict) or not set(_KEYS) <= set(video):
            raise DataError(f"{path}, video '{name[:60]}' has not the entries {', '.join(_KEYS)}")
    return found


def read(source: Path, item: Item, options: Namespace, *, whole: bool, licence: str, fps: float | None) -> Samples:
    """Make the sample of one video; `whole`: the file is the whole set, so its name says nothing."""
    file, number = str(item[0]), int(item[1])
    path = source if source.is_file() else source / file
    name, record = videos(path)[number]
    label = name if whole else f"{path.stem}/{name}"
    where = f"{path}, video '{name[:60]}'"
    frames, pixels = _frames(record["video"], where)
    (h, w), t = frames.size, len(frames.images) or len(pixels)
    points, occluded = numbers(record["points"], f"{where}, points"), record["occluded"]
    n = len(points)
    if points.shape != (n, t, 2) or not isinstance(occluded, np.ndarray) or occluded.shape != (n, t):
        shapes = f"points {points.shape} and occluded {getattr(occluded, 'shape', type(occluded).__name__)}"
        raise DataError(f"{where} has {t} frames but {shapes}; expected [N, {t}, 2] and [N, {t}]")
    if occluded.dtype.kind not in "biu":
        raise DataError(f"{where} has occluded of {occluded.dtype}; expected bool")
    tracks = points.transpose(1, 0, 2) * (w, h)
    known = np.asarray((np.abs(tracks) < 1e6).all(-1))
    clip = Clip(
        video=frames.video if frames.images else torch.from_numpy(pixels)[None].permute(0, 1, 4, 2, 3),
        tracks=torch.from_numpy(np.where(known[..., None], tracks, 0).astype(np.float32))[None],
        visible=torch.from_numpy((occluded.T == 0) & known)[None],
        valid=torch.from_numpy(known)[None],
        name=(label,),
        fps=fps,
    )
    facts = {"file": path.name, "video": name, "frames": "JPEG as published" if frames.images else "PNG of the array"}
    yield key_of(*label.split("/")), encode(clip, None, licence, images=frames.images or None, source=facts)


def numbers(value: Any, name: str) -> np.ndarray:
    """Return an array of numbers as float64; raises `DataError` for anything else."""
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "fiu":
        raise DataError(f"{name}: expected an array of numbers, got {getattr(value, 'dtype', type(value).__name__)}")
    return value.astype(np.float64)


def original_frames(images: Iterable[Any], name: str) -> Frames:
    """Check encoded frames by decoding each of them, and keep their bytes.

    Raises:
        DataError: a frame that is no whole image, frames of different sizes, or none at all.
    """
    kept: list[bytes] = []
    shape: tuple[int, ...] = ()
    for i, image in enumerate(images):
        if not isinstance(image, bytes | memoryview):
            raise DataError(f"{name}, frame {i} is a {type(image).__name__}; expected the bytes of a JPEG")
        kept.append(bytes(image))
        found = decode_image(kept[-1], f"{name}, frame {i}").shape
        if i and found != shape:
            raise DataError(f"{name}, frame {i} is {found[0]}x{found[1]}, frame 0 is {shape[0]}x{shape[1]}")
        shape = found
    if not kept:
        raise DataError(f"{name} has no frames")
    return Frames(kept, (shape[0], shape[1]), (shape[0], shape[1]), 0)


def _frames(video: Any, name: str) -> tuple[Frames, np.ndarray]:
    """Return the frames of a video: encoded as they are in the file, or without images and as (T, H, W, 3) uint8."""
    if isinstance(video, list) or (isinstance(video, np.ndarray) and video.dtype.kind in "OS" and video.ndim == 1):
        return original_frames(video, name), np.empty(0)
    if not isinstance(video, np.ndarray) or video.dtype != np.uint8 or video.ndim != 4 or video.shape[3] != 3:
        what = f"{video.dtype} {video.shape}" if isinstance(video, np.ndarray) else type(video).__name__
        raise DataError(f"{name} has frames of {what}; expected uint8 [T, H, W, 3] or a list of JPEGs")
    t, h, w = video.shape[:3]
    if not t or not 0 < h <= MAX_SIDE or not 0 < w <= MAX_SIDE or h * w > MAX_AREA:
        raise DataError(f"{name} has {t} frames of {h}x{w}; at most {MAX_SIDE} pixels a side are read")
    return Frames([], (h, w), (h, w), 0), np.array(video)


def _dataset(
    name: str, folder: str, pattern: str, files: str, about: str, licence: str, where: str, fps: float | None = None
) -> Dataset:
    layout = f"{folder}/{files}   (the folder, the one above it, or a single file)"
    return Dataset(
        name=name,
        about=about,
        licence=licence,
        where=where,
        layout=layout,
        items=partial(items, folder=folder, pattern=pattern, layout=layout),
        benchmark=True,
        read=partial(read, whole="*" not in pattern, licence=licence, fps=fps),
        per_shard=8,
    )


_PAGE = "https://github.com/google-deepmind/tapnet"
DATASETS = (
    _dataset(
        "tapvid_davis",
        "tapvid_davis",
        "tapvid_davis.pkl",
        "tapvid_davis.pkl",
        "TAP-Vid-DAVIS: 30 videos of 34 to 104 frames with points that people followed; evaluation",
        "TAP-Vid-DAVIS: annotations CC-BY 4.0; videos of DAVIS 2017 under its own terms",
        f"{_PAGE} (tapvid_davis.zip)",
    ),
    _dataset(
        "tapvid_kinetics",
        "tapvid_kinetics",
        "*_of_*.pkl",
        "0000_of_0010.pkl ... 0009_of_0010.pkl",
        "TAP-Vid-Kinetics: up to 1,189 videos of 250 frames with points that people followed; evaluation",
        "TAP-Vid-Kinetics: points CC-BY 4.0; videos of Kinetics-700 under the terms of their uploaders",
        f"{_PAGE} (points; the videos are downloaded, cut and packed into the pickles by the user)",
        fps=25.0,
    ),
    _dataset(
        "tapvid_rgb_stacking",
        "tapvid_rgb_stacking",
        "tapvid_rgb_stacking.pkl",
        "tapvid_rgb_stacking.pkl",
        "TAP-Vid-RGB-Stacking: 50 simulated videos of 250 frames, 256x256, with exact points; evaluation",
        "TAP-Vid-RGB-Stacking: CC-BY 4.0",
        f"{_PAGE} (tapvid_rgb_stacking.zip; 2.5 GB of pixels)",
    ),
    _dataset(
        "robotap",
        "robotap",
        "robotap_split*.pkl",
        "robotap_split0.pkl ... robotap_split4.pkl",
        "RoboTAP: 265 videos of robots with points that people followed; evaluation",
        "RoboTAP: CC-BY 4.0",
        f"{_PAGE} (robotap.zip)",
    ),
)
