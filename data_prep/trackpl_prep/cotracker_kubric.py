"""CoTracker's Kubric dumps as published: rendered clips with the tracks of 2,048 points, one folder a clip.

``<id>/<id>.npy`` is a pickled dict: ``coords`` [N, T, 2] raster pixels, and ``visibility`` [N, T], which holds True
where a point is **occluded**. The dump of CoTracker3 adds ``coords_depth`` [N, T], metres along the optical axis, a
``camera``, and ``depths/NNN.npy``, Kubric's distance to the camera's centre. Users and authors disagree on which of
its depths is which (co-tracker issues 152, 153, 158), so each clip decides: `agreement` compares the maps with the
tracks, `standing` whether the camera leaves a part of the world in place, and what does not fit is left out.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trackpl.encoding import encode
from trackpl.errors import DataError
from trackpl.types import Camera, Clip
from trackpl_prep.dataset import Dataset, Item, Samples, folder_error, key_of, quality_option
from trackpl_prep.files.frames import Frames, list_names, load_frames, read_bytes
from trackpl_prep.files.pickles import load_npy
from trackpl_prep.movi_tracks import matrices
from trackpl_prep.tapvid import numbers

LAYOUT = """
SOURCE/<id>/<id>.npy            {"coords", "visibility"}
SOURCE/<id>/frames/000.png ...
"""
LAYOUT_3 = """
SOURCE/<id>/<id>.npy            {"coords", "visibility", "coords_depth", "camera"}
SOURCE/<id>/frames/000.png ...
SOURCE/<id>/depths/000.npy ...  (optional)
"""
_MAX_FILE = 2**31  # bytes of an annotation
_FAR = 1e6  # pixels and metres beyond which a number means nothing
_SENSOR = 32.0  # mm, of MOVi's camera
_FITS = 0.01  # median relative difference of two depths of the same points
_STANDS = 0.1  # share of the tracks


def options(parser: ArgumentParser) -> None:
    """Add --quality and --lossless."""
    quality_option(parser)
    parser.add_argument("--lossless", action="store_true", help="keep the PNG files: larger, and slower to decode")


def options_3(parser: ArgumentParser) -> None:
    """Add --no-depth as well."""
    options(parser)
    parser.add_argument("--no-depth", action="store_true", help="leave out the depth maps")


def items(source: Path, options: Namespace) -> list[Item]:
    """List the folders of clips."""
    return clip_folders(source, LAYOUT)


def items_3(source: Path, options: Namespace) -> list[Item]:
    """List the folders of clips, and whether each has depth maps."""
    return [
        (str(folder), int((source / str(folder) / "depths").is_dir())) for (folder,) in clip_folders(source, LAYOUT_3)
    ]


def clip_folders(source: Path, layout: str, below: tuple[str, ...] = ("cotracker_kubric", "kubric3d")) -> list[Item]:
    """List folders ``<id>/<id>.npy`` in `source`, or in the one folder of it that is called as one of `below`.

    Raises:
        DataError: there are none, or one has frames but no annotation.
    """
    names = list_names(source)
    found: list[Item] = [(name,) for name in names if (source / name / f"{name}.npy").is_file()]
    if not found and len(inside := [n for n in below if n in names]) == 1:
        return [(f"{inside[0]}/{name}",) for (name,) in clip_folders(source / inside[0], layout)]
    if not found:
        raise folder_error(layout, f"{source} has no folders with an annotation")
    for name in set(names) - {str(name) for (name,) in found}:
        if (source / name / "frames").is_dir():
            raise folder_error(layout, f"{source / name} has frames but no {name}.npy")
    return found


def read(source: Path, item: Item, options: Namespace) -> Samples:
    """Make the sample of one clip."""
    folder = source / str(item[0])
    record = annotation(folder / f"{folder.name}.npy")
    frames = clip_frames(folder, options)
    where, t = f"{folder / folder.name}.npy", len(frames.images)
    xy = tracks_of(record, "coords", t, where)
    known = (np.abs(xy) < _FAR).all(-1)
    facts: dict[str, Any] = {"id": folder.name}
    extra: dict[str, Any] = {}
    visible = ~occluded_of(record, "visibility", xy.shape[:2], where) & known
    if "coords_depth" in record:
        z = depth_of(record, "coords_depth", xy.shape[:2], where)
        known &= (z > 0) & (z < _FAR)
        visible &= known
        extra["track_depth"] = _tensor(np.where(known, z, 0))
        with_depth = len(item) > 1 and bool(item[1]) and not getattr(options, "no_depth", False)
        maps = read_depths(folder / "depths", t, frames.size) if with_depth else None
        more, notes = _geometry(record.get("camera"), xy, z, visible, maps, frames.size, where)
        extra |= more
        facts |= notes
    clip = Clip(
        video=frames.video,
        tracks=_tensor(np.where(known[..., None], xy, 0)),
        visible=torch.from_numpy(visible)[None],
        valid=torch.from_numpy(known)[None],
        name=(folder.name,),
        fps=None if "coords_depth" in record else 12.0,
        **extra,
    )
    yield key_of(folder.name), encode(clip, None, LICENCE, images=frames.images, source=facts)


# The parts of a clip, also those of DELTA's dump ---------------------------------------------------------------


def annotation(path: Path) -> dict[str, Any]:
    """Read the dict in an ``.npy``; raises `DataError` if it is none."""
    record = load_npy(read_bytes(path, _MAX_FILE), str(path))
    if not isinstance(record, dict):
        raise DataError(f"{path} holds no dict but a {type(record).__name__}")
    return record


def clip_frames(folder: Path, options: Namespace) -> Frames:
    """Read the frames of a clip as JPEG of --quality, or as they are if --lossless."""
    home = folder / "frames"
    names = list_names(home, [".png", ".jpg"])
    if not names:
        raise DataError(f"{home} holds no .png frames")
    return load_frames([home / n for n in names], quality=options.quality, keep_png=options.lossless)


def tracks_of(record: dict[str, Any], key: str, frames: int, name: str) -> np.ndarray:
    """Return entry `key`, stored as [N, T, 2] pixels, as (T, N, 2) float64."""
    xy = numbers(record.get(key), f"{name}, {key}")
    if xy.ndim != 3 or xy.shape[1:] != (frames, 2):
        raise DataError(f"{name} has {key} of shape {xy.shape} for {frames} frames; expected [N, {frames}, 2]")
    return xy.transpose(1, 0, 2)


def occluded_of(record: dict[str, Any], key: str, shape: tuple[int, ...], name: str) -> np.ndarray:
    """Return entry `key`, stored as [N, T] with True for occluded, as (T, N) bool with True for occluded."""
    return _transposed(record, key, shape, name) != 0


def depth_of(record: dict[str, Any], key: str, shape: tuple[int, ...], name: str) -> np.ndarray:
    """Return entry `key`, stored as [N, T] or [N, T, 1] metres, as (T, N) float64."""
    return _transposed(record, key, shape, name).astype(np.float64)


def _transposed(record: dict[str, Any], key: str, shape: tuple[int, ...], name: str) -> np.ndarray:
    value = record.get(key)
    if isinstance(value, np.ndarray) and value.ndim == 3 and value.shape[2] == 1:
        value = value[..., 0]
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "biuf" or value.shape != shape[::-1]:
        found = value.shape if isinstance(value, np.ndarray) else type(value).__name__
        raise DataError(f"{name} has {key} of {found}; expected numbers [N, T] = {list(shape[::-1])}")
    return value.T


def ray_length(xy: np.ndarray, intrinsics: np.ndarray) -> np.ndarray:
    """Return the distance to the camera's centre over the depth, at pixels (..., 2), for (fx, fy, cx, cy)."""
    slope = (xy - intrinsics[2:]) / intrinsics[:2]
    return np.sqrt(1 + (slope**2).sum(-1))


def pixel_rays(size: tuple[int, int], intrinsics: np.ndarray) -> np.ndarray:
    """Return `ray_length` at every pixel centre: (H, W)."""
    y, x = np.mgrid[: size[0], : size[1]] + 0.5
    return ray_length(np.stack([x, y], -1), intrinsics)


def _tensor(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(x, np.float32))[None]


# Depth and camera of CoTracker3's dump -------------------------------------------------------------------------


def read_depths(folder: Path, frames: int, size: tuple[int, int]) -> np.ndarray:
    """Read ``NNN.npy``, a map a frame: (T, H, W) float32, whatever they measure."""
    names = list_names(folder, [".npy"])
    if len(names) != frames:
        raise DataError(f"{folder} has {len(names)} depth maps for {frames} frames")
    out = np.empty((frames, *size), np.float32)
    for i, name in enumerate(names):
        array = load_npy(read_bytes(folder / name), str(folder / name))
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu" or array.size != out[i].size:
            raise DataError(f"{folder / name} is no map of {size[0]}x{size[1]} numbers")
        if array.shape[:2] != size:
            raise DataError(f"{folder / name} is {array.shape}, its frame {size[0]}x{size[1]}")
        out[i] = array.reshape(size)
    if np.isnan(out).any() or (out < 0).any():
        raise DataError(f"{folder} holds depths that are negative or no numbers")
    return out


def _geometry(
    stored: Any,
    xy: np.ndarray,
    z: np.ndarray,
    visible: np.ndarray,
    maps: np.ndarray | None,
    size: tuple[int, int],
    name: str,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return fields of the clip that hold together, and facts about what was kept and left out, and why."""
    fields: dict[str, Any] = {}
    facts: dict[str, Any] = {"track_depth": "coords_depth, along the optical axis"}
    found = kubric_camera(stored, len(xy), size, name) if stored is not None else None
    if found is not None:
        share = standing(xy, z, visible, *found)
        facts["standing_tracks"] = round(share, 3)
        if share >= _STANDS:
            intrinsics = np.tile(found[0], (len(xy), 1))
            fields["camera"] = Camera(_tensor(intrinsics), _tensor(found[1]))
        else:
            facts["camera"] = "left out: with it, nothing in the world stands still"
    if maps is not None:
        kind, errors = agreement(xy, z, visible, maps, None if found is None else found[0])
        facts["depth_differences"] = errors
        facts["depth_maps"] = kind or "left out: they fit the depth of the tracks neither as distance nor as depth"
        if kind:
            rays = pixel_rays(size, found[0]) if kind == "distance" and found is not None else np.ones(size)
            fields["depth"] = _tensor(maps / rays.astype(np.float32))[:, :, None]
    return fields, facts


def kubric_camera(stored: Any, frames: int, size: tuple[int, int], name: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Read Kubric's camera: (fx, fy, cx, cy) in pixels and (T, 4, 4) from the world to axes x right, y down, z forward.

    It looks along -z with y up; ``quaternions`` (w, x, y, z) and ``positions`` carry it into the world,
    ``focal_length`` and ``sensor_width`` are millimetres. None where one of them (but the sensor) is missing.
    """
    if not isinstance(stored, dict) or not {"focal_length", "positions", "quaternions"} <= set(stored):
        return None
    focal, sensor, centres, turns = (
        np.asarray(value, np.float64) if isinstance(value, int | float | np.ndarray | np.number) else np.empty(0)
        for value in (
            stored["focal_length"],
            stored.get("sensor_width", _SENSOR),
            stored["positions"],
            stored["quaternions"],
        )
    )
    lengths = np.linalg.norm(turns, axis=-1, keepdims=True) if turns.shape == (frames, 4) else np.zeros(1)
    if not focal.size or not sensor.size or centres.shape != (frames, 3) or not (lengths > 0.5).all():
        raise DataError(f"{name} has a camera that is not Kubric's: focal_length, positions [T, 3], quaternions [T, 4]")
    scale = float(focal.flat[0]) / float(sensor.flat[0]) * size[1] if sensor.flat[0] > 0 else 0.0
    if not 0 < scale < _FAR or not (np.abs(centres) < _FAR).all():
        raise DataError(f"{name} has a camera whose numbers are out of range")
    turn = np.diag([1.0, -1.0, -1.0]) @ matrices(turns / lengths).swapaxes(-1, -2)
    pose = np.tile(np.eye(4), (frames, 1, 1))
    pose[:, :3, :3], pose[:, :3, 3] = turn, -(turn @ centres[..., None])[..., 0]
    return np.array([scale, scale, size[1] / 2, size[0] / 2]), pose


def agreement(
    xy: np.ndarray, z: np.ndarray, visible: np.ndarray, maps: np.ndarray, intrinsics: np.ndarray | None
) -> tuple[str | None, dict[str, float]]:
    """Say what depth maps (T, H, W) measure: "distance" to the centre or "depth", as the visible tracks have it.

    Returns:
        The one that fits with a median relative difference of at most 1 %, or none; and the differences.
    """
    h, w = maps.shape[1:]
    inside = visible & (xy >= 0).all(-1) & (xy[..., 0] < w) & (xy[..., 1] < h)
    t, n = np.nonzero(inside)
    if not len(t):
        return None, {}
    points, depth = xy[t, n], z[t, n]
    there = maps[t, points[:, 1].astype(int), points[:, 0].astype(int)]
    expected = {"depth": depth}
    if intrinsics is not None:
        expected["distance"] = depth * ray_length(points, intrinsics)
    errors = {k: round(float(np.median(np.abs(there - v) / v)), 5) for k, v in expected.items()}
    best = min(errors, key=lambda k: errors[k])
    return (best if errors[best] <= _FITS else None), {k: min(v, _FAR) for k, v in errors.items()}


def standing(xy: np.ndarray, z: np.ndarray, visible: np.ndarray, intrinsics: np.ndarray, pose: np.ndarray) -> float:
    """Return the share of tracks that stay within 1 % of their depth of one place in the world, while visible."""
    local = np.concatenate([(xy - intrinsics[2:]) / intrinsics[:2] * z[..., None], z[..., None]], -1)
    world = (local - pose[:, None, :3, 3]) @ pose[:, :3, :3]  # rotation transposed: from the camera to the world
    seen = visible & (visible.sum(0) > 1)
    world = np.where(seen[..., None], world, np.nan)[:, seen.any(0)]
    if not world.size:
        return 0.0
    away = np.linalg.norm(world - np.nanmedian(world, 0), axis=-1) / np.where(seen, z, 1)[:, seen.any(0)]
    return float((np.nanmax(away, 0) < _FITS).mean())


LICENCE = "CoTracker Kubric: rendered with Kubric (Apache-2.0); terms of its publisher, Meta"
DATASETS = (
    Dataset(
        name="cotracker_kubric",
        about="CoTracker's Kubric: 11,000 rendered clips of 24 frames, 512x512, with 2,048 tracks; training",
        licence=LICENCE,
        where="https://github.com/facebookresearch/co-tracker (made by its users from MOVi-F, 512x512)",
        layout=LAYOUT,
        items=items,
        read=read,
        options=options,
    ),
    Dataset(
        name="cotracker3_kubric",
        about="CoTracker3's Kubric: 6,000 rendered clips of 120 frames, 512x512, with tracks and depth; training",
        licence=LICENCE,
        where="https://huggingface.co/datasets/facebook/CoTracker3_Kubric",
        layout=LAYOUT_3,
        items=items_3,
        read=read,
        options=options_3,
        per_shard=16,
    ),
)
