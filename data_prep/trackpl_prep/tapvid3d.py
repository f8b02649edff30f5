"""TAPVid-3D as published: one ``.npz`` a clip, in the folders adt/, drivetrack/ and pstudio/.

A clip has JPEG frames, points in metres in the axes of each frame's camera (x right, y down, z forward), and the focal
lengths and principal point; most of ADT has the camera's way as well. Here a point is its projection and its depth,
x = fx X / Z + cx, y = fy Y / Z + cy and Z: the way back, X = (x - cx) Z / fx, gives the published metres.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trackpl.encoding import encode
from trackpl.errors import DataError, closest
from trackpl.types import Camera, Clip
from trackpl_prep.dataset import Dataset, Item, Samples, folder_error, key_of
from trackpl_prep.files.frames import read_bytes
from trackpl_prep.files.pickles import read_npz
from trackpl_prep.tapvid import numbers, original_frames

LICENCES = {
    "adt": "TAPVid-3D ADT: by the terms of Aria Digital Twin; research only, no redistribution",
    "drivetrack": "TAPVid-3D DriveTrack: by the terms of the Waymo Open Dataset; research only, no redistribution",
    "pstudio": "TAPVid-3D PStudio: by the terms of CMU Panoptic Studio; research only, no redistribution",
}
LAYOUT = """
tapvid3d/                    (this folder; those of the three that are there)
  adt/<clip>.npz
  drivetrack/<clip>.npz
  pstudio/<clip>.npz
"""
_NEEDED = ("images_jpeg_bytes", "queries_xyt", "tracks_XYZ", "visibility", "fx_fy_cx_cy")
_POSE = "extrinsics_w2c"
_MAX_CLIP = 2**32  # bytes of the arrays of one clip; the largest has 300 frames of 1920x1280, 0.2 GB
_NEAR = 1e-6  # metres: nearer, or behind the camera, there is no projection


def options(parser: ArgumentParser) -> None:
    """Add --subset, --split and --list."""
    parser.add_argument("--subset", choices=("all", *LICENCES), default="all", help="one source (default: all)")
    parser.add_argument(
        "--split", choices=("full", "minival"), default="full", help="minival: the clips of --list (default: full)"
    )
    parser.add_argument(
        "--list", type=Path, metavar="FILE", help="text file with the names of the clips to take, one a line"
    )


def items(source: Path, options: Namespace) -> list[Item]:
    """List (subset, clip)."""
    if options.split == "minival" and options.list is None:
        raise DataError("the split 'minival' is a list of clips, published with TAPVid-3D: give it with --list FILE")
    root = source / "tapvid3d" if (source / "tapvid3d").is_dir() else source
    chosen = list(LICENCES) if options.subset == "all" else [options.subset]
    prefix = root.relative_to(source).as_posix()
    found: list[Item] = [
        (f"{prefix}/{subset}".removeprefix("./"), path.name)
        for subset in chosen
        for path in sorted((root / subset).glob("*.npz"))
    ]
    if not found:
        raise folder_error(LAYOUT, f"{source} has no .npz in {' or '.join(f'{s}/' for s in chosen)}")
    return found if options.list is None else _listed(found, options.list)


def _listed(found: list[Item], path: Path) -> list[Item]:
    """Keep the clips that a list names, as ``<clip>``, ``<clip>.npz`` or with folders before."""
    lines = read_bytes(path, 2**24).decode(errors="replace").splitlines()
    names = {line.strip().rsplit("/", 1)[-1].removesuffix(".npz") for line in lines} - {""}
    stems = {str(name).removesuffix(".npz") for _, name in found}
    if not names & stems:
        example = min(names, default="")
        raise DataError(f"{path} names no clip that is there; '{example[:60]}': {closest(example, list(stems)[:1000])}")
    return [item for item in found if str(item[1]).removesuffix(".npz") in names]


def read(source: Path, item: Item, options: Namespace) -> Samples:
    """Make the sample of one clip."""
    folder, file = map(str, item)
    path, subset, stem = source / folder / file, folder.rsplit("/", 1)[-1], file.removesuffix(".npz")
    arrays = read_npz(path, (*_NEEDED, _POSE), _MAX_CLIP)
    missing = [k for k in _NEEDED if k not in arrays]
    if missing:
        raise DataError(f"{path} has no {', '.join(missing)}; expected {', '.join(_NEEDED)}")
    images = arrays["images_jpeg_bytes"]
    if not isinstance(images, np.ndarray) or images.ndim != 1 or images.dtype.kind not in "OS":
        raise DataError(f"{path}: images_jpeg_bytes must be one JPEG a frame")
    frames = original_frames(images, f"{path}, images_jpeg_bytes")
    shapes = {"queries_xyt": (-1, 3), "tracks_XYZ": (len(images), -1, 3), "fx_fy_cx_cy": (4,)}
    shapes |= {_POSE: (len(images), 4, 4)} if _POSE in arrays else {}
    values = {k: _shaped(arrays[k], shape, f"{path}, {k}") for k, shape in shapes.items()}
    t, n = values["tracks_XYZ"].shape[:2]
    visible = arrays["visibility"]
    if not isinstance(visible, np.ndarray) or visible.shape != (t, n) or visible.dtype.kind not in "biu":
        raise DataError(f"{path}: visibility must be bool [{t}, {n}]")
    if len(values["queries_xyt"]) != n:
        raise DataError(f"{path} has {n} tracks but {len(values['queries_xyt'])} queries")
    xy, depth, known = project(values["tracks_XYZ"], values["fx_fy_cx_cy"])
    clip = Clip(
        video=frames.video,
        tracks=torch.from_numpy(xy)[None],
        visible=torch.from_numpy((visible != 0) & known)[None],
        valid=torch.from_numpy(known)[None],
        track_depth=torch.from_numpy(depth)[None],
        queries=_queries(values["queries_xyt"], t, path),
        camera=_camera(values, t, path),
        name=(f"{subset}/{stem}",),
    )
    facts = {"subset": subset, "clip": stem, "extrinsics": _POSE in arrays}
    facts |= {} if _POSE in arrays else {"pose": "not published for this clip; the identity stands in its place"}
    yield key_of(subset, stem), encode(clip, None, LICENCES[subset], images=frames.images, source=facts)


def project(xyz: np.ndarray, intrinsics: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Project (..., 3) metres in camera axes with (fx, fy, cx, cy).

    Returns:
        (..., 2) float32 pixels and (...,) float32 depths, 0 where the third, (...,) bool, is false: behind the camera,
        in its plane, or no finite numbers.
    """
    with np.errstate(all="ignore"):
        xy = xyz[..., :2] / xyz[..., 2:] * intrinsics[:2] + intrinsics[2:]
        known = (xyz[..., 2] > _NEAR) & (np.abs(xy) < 1e6).all(-1) & (np.abs(xyz) < 1e6).all(-1)
    return (
        np.where(known[..., None], xy, 0).astype(np.float32),
        np.where(known, xyz[..., 2], 0).astype(np.float32),
        known,
    )


def _shaped(value: Any, shape: tuple[int, ...], name: str) -> np.ndarray:
    array = numbers(value, name)
    if array.ndim != len(shape) or any(s not in (-1, n) for s, n in zip(shape, array.shape, strict=True)):
        wanted = ", ".join("N" if s < 0 else str(s) for s in shape)
        raise DataError(f"{name} has the shape {array.shape}, expected ({wanted})")
    return array


def _queries(xyt: np.ndarray, frames: int, path: Path) -> torch.Tensor:
    t = np.rint(xyt[:, 2])
    if not (np.abs(xyt) < 1e6).all() or not ((t >= 0) & (t < frames)).all():
        raise DataError(f"{path}: queries_xyt has a query outside of the {frames} frames")
    return torch.from_numpy(np.stack([t, xyt[:, 0], xyt[:, 1]], -1).astype(np.float32))[None]


def _camera(values: dict[str, np.ndarray], frames: int, path: Path) -> Camera:
    intrinsics = values["fx_fy_cx_cy"]
    if not (np.abs(intrinsics) < 1e6).all() or intrinsics[:2].min() <= 0:
        raise DataError(f"{path}: fx_fy_cx_cy is {intrinsics.tolist()}; focal lengths are above 0")
    pose = values.get(_POSE, np.tile(np.eye(4), (frames, 1, 1)))
    if not (np.abs(pose) < 1e9).all():
        raise DataError(f"{path}: {_POSE} holds numbers that are not finite")
    both = (np.tile(intrinsics, (frames, 1)), pose)
    return Camera(*(torch.from_numpy(x.astype(np.float32))[None] for x in both))


DATASET = Dataset(
    name="tapvid3d",
    about="TAPVid-3D: 4,419 clips with points in metres, from Aria, Waymo and Panoptic Studio; evaluation",
    licence="TAPVid-3D: by the terms of each source (Aria, Waymo Open, CMU Panoptic); research, no redistribution",
    where="https://tapvid3d.github.io (the annotations; clips are generated from the three sources by the user)",
    layout=LAYOUT,
    items=items,
    benchmark=True,
    read=read,
    options=options,
    per_shard=16,
)
