"""DELTA's Kubric3D as published: MOVi-F clips with sparse tracks, depth, and tracks of every pixel.

Numbers are float16: a coordinate beyond 256 px is off by up to 1/8 px, and stays so. Stored as ``visibility`` is where
a point is **occluded**. All depths are distances to the camera's centre, which the authors' code takes for depths;
here they are divided by the length of the ray, for the one lens that MOVi-F has: 35 mm on 32 mm, so fx = fy =
35/32 W, about the centre of the frame (560 px at 512x512). ``<id>_dense.npy`` holds the track of each pixel of the
first frame, ``<id>_dense_reverse.npy`` of the last one, in random order and raster coordinates: they become the flow
of the pairs (0, t) and (T - 1, t).
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trackpl.encoding import encode
from trackpl.errors import DataError
from trackpl.types import Camera, Clip, Flow
from trackpl_prep import cotracker_kubric as kubric
from trackpl_prep.dataset import Dataset, Item, Samples, key_of
from trackpl_prep.files.frames import list_names, opened, read_bytes
from trackpl_prep.tapvid import numbers

LAYOUT = """
SOURCE/<id>/<id>.npy                {"coords", "visibility", "reproj_depth", "depth_range"}
SOURCE/<id>/<id>_dense.npy          (optional: every pixel of the first frame)
SOURCE/<id>/<id>_dense_reverse.npy  (optional: every pixel of the last frame)
SOURCE/<id>/frames/000.png ...
SOURCE/<id>/depths/000.png ...      16 bits, over depth_range
"""
_FOCAL = 35 / 32  # in widths of the frame
_FAR = 5000  # pixels: the authors' loader skips a clip with a coordinate beyond; here that point is not valid
_REACH = 511  # pixels: a longer flow would cost all others their precision of 1/64 px
_PREFIXES = {"sparse": ("", "sparse_"), "dense": ("", "dense_"), "dense_reverse": ("", "reverse_", "dense_reverse_")}


def options(parser: ArgumentParser) -> None:
    """Add --dense, --quality and --lossless."""
    parser.add_argument(
        "--dense",
        choices=("both", "first", "none"),
        default="both",
        help="tracks of all pixels (default: both)",
    )
    kubric.options(parser)


def items(source: Path, options: Namespace) -> list[Item]:
    """List the folders of clips and which dense annotations each has."""
    wanted = {"both": ("dense", "dense_reverse"), "first": ("dense",), "none": ()}[options.dense]
    found: list[Item] = []
    for (folder,) in kubric.clip_folders(source, LAYOUT):
        path = source / str(folder)
        found.append((str(folder), *(kind for kind in wanted if (path / f"{path.name}_{kind}.npy").is_file())))
    return found


def read(source: Path, item: Item, options: Namespace) -> Samples:
    """Make the sample of one clip."""
    folder, kinds = source / str(item[0]), list(map(str, item[1:]))
    path = folder / f"{folder.name}.npy"
    record, frames = kubric.annotation(path), kubric.clip_frames(folder, options)
    (h, w), t = frames.size, len(frames.images)
    lens = np.array([_FOCAL * w, _FOCAL * w, w / 2, h / 2])
    xy, hidden, distance = _points(record, "sparse", t, str(path))
    known = _known(xy, distance)
    depth = _read_depths(folder / "depths", record, t, frames.size, str(path)) / kubric.pixel_rays((h, w), lens)
    motions = [
        dense_motion(kubric.annotation(folder / f"{folder.name}_{kind}.npy"), kind, t, (h, w), lens, str(folder))
        for kind in kinds
    ]
    clip = Clip(
        video=frames.video,
        tracks=_tensor(np.where(known[..., None], xy, 0)),
        visible=torch.from_numpy(~hidden & known)[None],
        valid=torch.from_numpy(known)[None],
        track_depth=_tensor(_depth(xy, distance, known, lens)),
        depth=_tensor(depth)[:, :, None],
        flow=_join(motions) if motions else None,
        camera=Camera(_tensor(np.tile(lens, (t, 1))), torch.eye(4).expand(1, t, 4, 4).clone()),
        name=(folder.name,),
        fps=12.0,
    )
    facts = {
        "id": folder.name,
        "depth": "distances of the original over the length of the ray; intrinsics are those of MOVi-F, centred",
        "pose": "not published; the identity stands in its place",
        "precision": "tracks, their depths and the depth range are float16 in the original",
        "dense": kinds,
    }
    yield key_of(folder.name), encode(clip, None, LICENCE, images=frames.images, source=facts)


def dense_motion(
    record: dict[str, Any], kind: str, frames: int, size: tuple[int, int], lens: np.ndarray, name: str
) -> Flow:
    """Sort the tracks of all pixels of the first frame (`kind` "dense") or the last one ("dense_reverse").

    Returns:
        The flow of every pixel to each frame, with visibility and depth; pixels without a track, and motions of more
        than 511 px, are not valid.

    Raises:
        DataError: not the tracks of the pixels of one frame.
    """
    (h, w), name = size, f"{name}, {kind}"
    xy, hidden, distance = _points(record, kind, frames, name)
    source = 0 if kind == "dense" else frames - 1
    row, shift = _pixels(xy[source], _entry(record, kind, "queries"), size, name)
    xy = xy + shift
    known, depth = _known(xy, distance), np.zeros((frames, h * w), np.float32)
    start = np.stack([row % w, row // w], -1) + 0.5
    motion = xy - start
    known &= (np.abs(motion) <= _REACH).all(-1)
    out = np.zeros((frames, 2, h * w), np.float32)
    visible, valid = np.zeros((2, frames, h * w), bool)
    out[:, :, row] = np.where(known[..., None], motion, 0).transpose(0, 2, 1)
    depth[:, row] = _depth(xy, distance, known, lens)
    visible[:, row], valid[:, row] = ~hidden & known, known
    shape = (1, frames, h, w)
    return Flow(
        torch.from_numpy(out.reshape(1, frames, 2, h, w)),
        tuple((source, t) for t in range(frames)),
        torch.from_numpy(visible.reshape(shape)),
        torch.from_numpy(valid.reshape(shape)),
        torch.from_numpy(depth.reshape(shape)),
    )


def _pixels(start: np.ndarray, queries: Any, size: tuple[int, int], name: str) -> tuple[np.ndarray, float]:
    """Return the pixel of each track, row by row, and what makes its coordinates raster ones: 0, or 0.5.

    `queries` says which pixels they are, as (t, y, x), (y, x) or (x, y): that order is taken with which the tracks
    start at their queries. Without queries, the place where a track starts is its pixel.
    """
    h, w = size
    candidates = []
    if isinstance(queries, np.ndarray) and queries.ndim == 2 and queries.shape[1] in (2, 3) and len(queries):
        if len(queries) != len(start):
            raise DataError(f"{name} has {len(start)} tracks but {len(queries)} queries")
        plane = numbers(queries, f"{name}, queries")[:, -2:]
        candidates = [np.floor(plane[:, ::-1]), np.floor(plane)]
    else:
        part = start - np.floor(start)
        candidates = [np.floor(start) if abs(float(np.median(part)) - 0.5) < 0.25 else np.rint(start)]
    apart = [float(np.median(np.abs(start - c))) for c in candidates]
    best = int(np.argmin(apart))
    if not apart[best] < 1:
        raise DataError(f"{name}: its tracks do not start at the pixels of one frame")
    pixel = candidates[best]
    if not ((pixel >= 0) & (pixel < (w, h))).all():
        raise DataError(f"{name} has a track that starts outside of the {h}x{w} pixels of the frame")
    row = (pixel[:, 1] * w + pixel[:, 0]).astype(np.int64)
    if len(np.unique(row)) != len(row):
        raise DataError(f"{name} has several tracks of the same pixel")
    return row, 0.5 if float(np.median(start - pixel)) < 0.25 else 0.0


def _points(record: dict[str, Any], kind: str, frames: int, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (T, N, 2) pixels, (T, N) occluded, (T, N) metres to the camera's centre."""
    values = {key: _entry(record, kind, key) for key in ("coords", "visibility", "reproj_depth")}
    xy = kubric.tracks_of(values, "coords", frames, name)
    hidden = kubric.occluded_of(values, "visibility", xy.shape[:2], name)
    return xy, hidden, kubric.depth_of(values, "reproj_depth", xy.shape[:2], name)


def _entry(record: dict[str, Any], kind: str, key: str) -> Any:
    """Find an entry under the name that the authors' generator writes, or one that their loader reads."""
    return next((record[p + key] for p in _PREFIXES[kind] if p + key in record), None)


def _known(xy: np.ndarray, distance: np.ndarray) -> np.ndarray:
    return (np.abs(xy) <= _FAR).all(-1) & (distance > 0) & np.isfinite(distance)


def _depth(xy: np.ndarray, distance: np.ndarray, known: np.ndarray, lens: np.ndarray) -> np.ndarray:
    """Turn distances into depths; 0 where nothing is known."""
    rays = kubric.ray_length(np.where(known[..., None], xy, 0), lens)
    return np.where(known, distance, 0) / rays


def _read_depths(folder: Path, record: dict[str, Any], frames: int, size: tuple[int, int], name: str) -> np.ndarray:
    """Read ``NNN.png`` of 16 bits: (T, H, W) float32 metres to the camera's centre."""
    span = numbers(_entry(record, "sparse", "depth_range"), f"{name}, depth_range")
    if span.shape != (2,) or not (0 <= span[0] <= span[1] < np.inf):
        raise DataError(f"{name} has the depth_range {span.tolist()}; expected [nearest, farthest] in metres")
    names = list_names(folder, [".png"])
    if len(names) != frames:
        raise DataError(f"{folder} has {len(names)} depth maps for {frames} frames")
    out = np.empty((frames, *size), np.float32)
    for i, file in enumerate(names):
        with opened(read_bytes(folder / file), folder / file, ("PNG",)) as image:
            if not image.mode.startswith("I") or image.size != size[::-1]:
                found = f"{image.height}x{image.width} in mode {image.mode}"
                raise DataError(f"{folder / file} is {found}; expected 16-bit grey of {size[0]}x{size[1]}")
            out[i] = span[0] + np.asarray(image, np.float64) / 65535 * (span[1] - span[0])
    return out


def _join(flows: list[Flow]) -> Flow:
    parts = ("xy", "visible", "valid", "depth")
    pairs = tuple(p for f in flows for p in f.pairs)
    return Flow(pairs=pairs, **{k: torch.cat([getattr(f, k) for f in flows], 1) for k in parts})


def _tensor(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(x, np.float32))[None]


LICENCE = "DELTA Kubric3D: rendered from MOVi-F (Kubric, Apache-2.0); terms of its publisher, Snap"
DATASET = Dataset(
    name="delta_kubric3d",
    about="DELTA's Kubric3D: 5,630 MOVi-F clips of 24 frames, 512x512, with depth and tracks of all pixels; training",
    licence=LICENCE,
    where="https://github.com/snap-research/DenseTrack3Dv2 (made by its users from MOVi-F, 512x512)",
    layout=LAYOUT,
    items=items,
    read=read,
    options=options,
    per_shard=16,
)
