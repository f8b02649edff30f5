"""PointOdyssey as published: long synthetic videos of 540 x 960 with thousands of 2D and 3D tracks.

Two things can be made. Training: segments with every track that is seen in them, depths and the camera. Evaluation
(`--evaluation N`): whole sequences with the N tracks that the filters of PIPs++ leave (data_metrics.md 3.10).

Coordinates of `trajs_2d` are taken as raster pixels of `--size`; frames that were scaled down keep their tracks.
Depths: 16-bit PNG over 0..1000 m along the optical axis (their authors: y-zheng18/point_odyssey, issue 16).
"""

from __future__ import annotations

import logging
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trackpl.encoding import encode
from trackpl.errors import DataError, closest
from trackpl.samples import MAX_COUNT
from trackpl.types import Camera, Clip
from trackpl_prep.dataset import Dataset, Item, Samples, folder_error, key_of
from trackpl_prep.files.frames import (
    Frames,
    list_names,
    load_frames,
    numbering,
    numbers_of,
    opened,
    read_bytes,
    segments,
)
from trackpl_prep.files.pickles import read_npz

SPLITS = ("train", "val", "test", "sample")
FARTHEST = 1000.0  # metres, code 65535
LAYOUT = """
SOURCE/<split>/<sequence>/rgbs/rgb_00000.jpg ...         split: train, val, test or sample
SOURCE/<split>/<sequence>/anno.npz                       trajs_2d, trajs_3d, intrinsics, extrinsics, and
                                                         visibs with valids, or visibilities
SOURCE/<split>/<sequence>/depths/depth_00000.png ...     optional
"""
_FEWEST, _FASTEST, _OUTSIDE = 8, 512.0, 32.0  # of the evaluation: frames seen; pixels a frame; pixels off the frame
_WILD = 1e5  # pixels; projections of points beside or behind the camera
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Annotation:
    """The tracks of a sequence, in pixels of its frames."""

    xy: np.ndarray  # (T, N, 2) float32, finite
    visible: np.ndarray  # (T, N) bool
    valid: np.ndarray  # (T, N) bool
    depth: np.ndarray | None  # (T, N) float32 metres
    camera: np.ndarray | None  # (T, 20): fx fy cx cy, world to camera
    note: str  # why depth and camera are missing


def add_options(parser: ArgumentParser) -> None:
    """Add the flags of this data set."""
    parser.add_argument("--split", default="train", choices=SPLITS, help="which folder")
    parser.add_argument("--segment", type=int, default=64, metavar="T", help="frames a sample at most; 0: whole")
    parser.add_argument(
        "--evaluation", type=int, metavar="N", help="whole sequences with N tracks chosen as by PIPs++, no depth"
    )
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        default=[540, 960],
        metavar=("H", "W"),
        help="pixels that the coordinates in anno.npz refer to",
    )
    parser.add_argument("--no-depth", action="store_true", help="leave the depth maps out")


def items(source: Path, options: Namespace) -> list[Item]:
    """List (sequence, segment, segments, first frame, one behind its last) of a split."""
    if options.split not in SPLITS:
        raise DataError(f"PointOdyssey has no split '{options.split}'; {closest(options.split, SPLITS)}")
    if options.segment < 0 or options.segment == 1 or (options.evaluation is not None and options.evaluation < 1):
        raise DataError("--segment must be 0 or at least 2 frames, and --evaluation at least 1 track")
    if min(options.size) < 1:
        raise DataError(f"--size {options.size[0]} {options.size[1]}: allowed are pixels from 1 on")
    root = source / options.split
    sequences = list_names(root) if root.is_dir() else []
    if not sequences:
        raise folder_error(LAYOUT, f"no folder of sequences {root}")
    out: list[Item] = []
    for sequence in sequences:
        for part in ("rgbs", "anno.npz"):
            if not (root / sequence / part).exists():
                raise folder_error(LAYOUT, f"the sequence {sequence} is incomplete: no {root / sequence / part}")
        count = len(_names(root / sequence))
        cuts = segments(count, options.segment if options.evaluation is None else 0)
        out += [(sequence, i, len(cuts), begin, end) for i, (begin, end) in enumerate(cuts)]
    return out


def _names(folder: Path) -> list[str]:
    names = list_names(folder / "rgbs", [".jpg", ".jpeg", ".png"])
    if not names:
        raise folder_error(LAYOUT, f"there are no frames in {folder / 'rgbs'}")
    return names


def read(source: Path, item: Item, options: Namespace) -> Samples:
    """Make the sample of one segment."""
    sequence, segment, count, begin, end = (str(item[0]), *map(int, item[1:]))
    folder = source / options.split / sequence
    names = _names(folder)
    numbers = numbers_of(names[begin:end])
    frames = load_frames([folder / "rgbs" / n for n in names[begin:end]])
    whole, size = options.evaluation is not None, (int(options.size[0]), int(options.size[1]))
    path = folder / "anno.npz"
    tracks = _annotation(path, path.stat().st_mtime_ns, frames.size, size, not whole)
    if len(tracks.xy) != len(names):
        raise DataError(f"{folder}: anno.npz has {len(tracks.xy)} frames, rgbs has {len(names)}")
    if options.evaluation is not None:
        tracks = for_evaluation(tracks, frames.size, size, options.evaluation)
        if not tracks.xy.shape[1]:
            raise DataError(f"{folder}: no track passes the filters of the evaluation")
    depth = None if whole or options.no_depth else _depths(folder / "depths", numbers, frames.size)
    facts = {
        "video": sequence,
        "split": options.split,
        "segment": segment,
        "segments": count,
        "annotated_size": list(size),
        **numbering(numbers),
    }
    facts |= {"no_3d": tracks.note} if tracks.note else {}
    name = sequence if count == 1 else f"{sequence}/{segment:03d}"
    clip = _clip(tracks, slice(begin, end), frames, depth, name, queries=whole)
    yield key_of(sequence, f"{segment:03d}"), encode(clip, licence=LICENCE, images=frames.images, source=facts)


@lru_cache(maxsize=1)  # the segments of a sequence come one after the other, and its file is large
def _annotation(path: Path, _: int, frame: tuple[int, int], size: tuple[int, int], three_d: bool) -> Annotation:
    return read_annotation(path, frame, size, three_d=three_d)


def _clip(tracks: Annotation, span: slice, frames: Frames, depth: np.ndarray | None, name: str, queries: bool) -> Clip:
    """Take the frames `span`, and the tracks that are seen in them."""
    visible, valid = tracks.visible[span], tracks.valid[span]
    seen = slice(None) if queries else (visible & valid).any(0)
    xy = torch.from_numpy(np.ascontiguousarray(tracks.xy[span][:, seen]))[None]
    fields: dict[str, Any] = {}
    if queries:
        fields["queries"] = torch.cat([torch.zeros(1, xy.shape[2], 1), xy[:, 0]], 2)
    if tracks.depth is not None:
        fields["track_depth"] = torch.from_numpy(np.ascontiguousarray(tracks.depth[span][:, seen]))[None]
    if tracks.camera is not None:
        camera = torch.from_numpy(tracks.camera[span].astype(np.float32))[None]
        fields["camera"] = Camera(camera[..., :4], camera[..., 4:].unflatten(-1, (4, 4)))
    if depth is not None:
        fields["depth"] = torch.from_numpy(depth)[None]
    return Clip(
        video=frames.video,
        tracks=xy,
        visible=torch.from_numpy(visible[:, seen])[None],
        valid=torch.from_numpy(valid[:, seen])[None],
        name=(name,),
        **fields,
    )


# Annotations ------------------------------------------------------------------------------------------------


def read_annotation(path: Path, frame: tuple[int, int], size: tuple[int, int], *, three_d: bool = True) -> Annotation:
    """Read anno.npz, of the old or the new kind.

    Args:
        path: the file.
        frame: (H, W) of the frames, whose pixels the result counts.
        size: (H, W) that the file's coordinates refer to.
        three_d: whether to read the tracks in space.

    Returns:
        Every track of the file. Not valid is what the file says, what is not finite, and what lies behind the camera;
        not visible besides what lies off the frame.

    Raises:
        DataError: arrays that are missing, misshapen or of another kind.
    """
    spatial = ("trajs_3d", "intrinsics", "extrinsics") if three_d else ()
    arrays = read_npz(path, ("trajs_2d", "visibs", "valids", "visibilities", *spatial))
    xy = _array(arrays, "trajs_2d", path, "f", 3)
    t, n = xy.shape[:2]
    if xy.shape[2] != 2 or not 1 <= t <= MAX_COUNT or not 1 <= n <= MAX_COUNT:
        raise DataError(f"{path} has trajs_2d of shape {xy.shape}; expected (T, N, 2)")
    if "visibs" in arrays and "valids" in arrays:
        visible, valid = (_array(arrays, k, path, "bui", 2, (t, n)) != 0 for k in ("visibs", "valids"))
    elif "visibilities" in arrays:
        codes = _array(arrays, "visibilities", path, "bui", 2, (t, n))
        visible, valid = codes == 1, codes != 2
    else:
        raise DataError(f"{path} has neither visibs with valids nor visibilities; it has {', '.join(arrays)}")
    with np.errstate(invalid="ignore"):
        known = (np.abs(xy) < _WILD).all(-1)
    depth, camera, note = _in_space(arrays, path, xy, known & valid & visible) if three_d else (None, None, "")
    valid = valid & known
    scale = np.array([frame[1] / size[1], frame[0] / size[0]])
    # Wild places stay far off: a track that jumps there and back is told by its motion.
    xy = np.where(np.isfinite(xy), np.clip(xy, -_WILD, _WILD) * scale, 0).astype(np.float32)
    if depth is not None:
        valid &= depth > 0
    if camera is not None:
        camera[:, :4] *= np.tile(scale, 2)
    visible = visible & valid & ((xy >= 0) & (xy <= (frame[1], frame[0]))).all(-1)
    return Annotation(xy, visible, valid, depth, camera, note)


def for_evaluation(tracks: Annotation, frame: tuple[int, int], size: tuple[int, int], count: int) -> Annotation:
    """Filter the tracks as the full-sequence reader of PIPs++ does, in pixels of `size`, and choose `count` evenly.

    Within a pixel of the border is neither valid nor visible; kept are tracks that are seen in frame 0 and in 8 frames,
    and move less than 512 pixels a frame; positions are clamped to 32 pixels around the frame.
    """
    h, w = size
    scale = np.array([frame[1] / w, frame[0] / h], np.float32)
    xy = tracks.xy / scale
    inside = ((xy >= 1) & (xy <= (w - 2, h - 2))).all(-1)
    visible, valid = tracks.visible & inside, tracks.valid & inside
    seen = visible & valid
    motion = np.linalg.norm(np.diff(xy, axis=0), axis=-1).max(0, initial=0)
    kept = np.flatnonzero(seen[0] & (seen.sum(0) >= _FEWEST) & (motion < _FASTEST))
    kept = kept[np.linspace(0, len(kept) - 1, min(len(kept), count)).astype(int)] if len(kept) else kept
    clamped = np.clip(xy[:, kept], -_OUTSIDE, (w + _OUTSIDE, h + _OUTSIDE)) * scale
    return Annotation(clamped.astype(np.float32), visible[:, kept], valid[:, kept], None, None, "")


def _array(
    arrays: dict[str, Any], name: str, path: Path, kinds: str, ndim: int, shape: tuple[int, ...] | None = None
) -> np.ndarray:
    array = arrays.get(name)
    if not isinstance(array, np.ndarray) or array.dtype.kind not in kinds or array.ndim != ndim:
        raise DataError(f"{path} has no array {name} of the published kind; it has {', '.join(arrays) or 'nothing'}")
    if shape is not None and array.shape != shape:
        raise DataError(f"{path} has {name} of shape {array.shape}; expected {shape} as of trajs_2d")
    return array


def _in_space(
    arrays: dict[str, Any], path: Path, xy: np.ndarray, seen: np.ndarray
) -> tuple[np.ndarray | None, np.ndarray | None, str]:
    """Return depths (T, N), cameras (T, 20) and why there are none; only what projects to the tracks in 2D is kept.

    Extrinsics are world to camera, with the axes of computer vision or those of Blender (y up, looking along -z):
    whichever of the two projects to `trajs_2d`.
    """
    t, n = xy.shape[:2]
    if not {"trajs_3d", "intrinsics", "extrinsics"} <= arrays.keys():
        return None, None, "anno.npz has no camera or no trajs_3d"
    points = _array(arrays, "trajs_3d", path, "f", 3, (t, n, 3))
    lens, pose = (np.asarray(arrays[k], np.float64) for k in ("intrinsics", "extrinsics"))
    if lens.shape == (3, 3):
        lens = np.broadcast_to(lens, (t, 3, 3))
    if lens.shape != (t, 3, 3) or pose.shape != (t, 4, 4) or not np.isfinite(lens).all() or not np.isfinite(pose).all():
        raise DataError(
            f"{path} has intrinsics {lens.shape} and extrinsics {pose.shape}; expected (T, 3, 3), (T, 4, 4)"
        )
    some = np.unique(np.linspace(0, t - 1, min(t, 32)).astype(int))
    best, world_to_camera = np.inf, pose
    for flip in (np.diag([1.0, 1, 1, 1]), np.diag([1.0, -1, -1, 1])):
        error = _reprojection(lens[some], (flip @ pose)[some], points[some], xy[some], seen[some])
        if error < best:
            best, world_to_camera = error, flip @ pose
    if not best <= 2:
        note = f"trajs_3d, projected, misses trajs_2d by {best:.3g} pixels; depth of tracks and camera are left out"
        _log.warning("%s: %s", path, note)
        return None, None, note
    depth = np.einsum("tj,tnj->tn", world_to_camera[:, 2, :3], points) + world_to_camera[:, None, 2, 3]
    depth = np.where(np.isfinite(depth) & (np.abs(depth) < 1e30), depth, 0).astype(np.float32)
    lenses = np.stack([lens[:, 0, 0], lens[:, 1, 1], lens[:, 0, 2], lens[:, 1, 2]], 1)
    return depth, np.concatenate([lenses, world_to_camera.reshape(t, 16)], 1), ""


def _reprojection(lens: np.ndarray, pose: np.ndarray, points: np.ndarray, xy: np.ndarray, seen: np.ndarray) -> float:
    """Return the median distance in pixels of projected `points` from `xy`; infinite if most lie behind the camera."""
    with np.errstate(all="ignore"):
        camera = np.einsum("tij,tnj->tni", pose[:, :3, :3], points) + pose[:, None, :3, 3]
        image = np.einsum("tij,tnj->tni", lens, camera)
        miss = np.linalg.norm(image[..., :2] / image[..., 2:] - xy, axis=-1)[seen & (camera[..., 2] > 0)]
    return float(np.median(miss)) if len(miss) * 2 > seen.sum() else np.inf


def _depths(folder: Path, numbers: list[int], size: tuple[int, int]) -> np.ndarray | None:
    """Read the depth maps of the frames `numbers`: (T, 1, H, W) metres; none where there is no folder of them."""
    if not folder.is_dir():
        return None
    out = np.empty((len(numbers), 1, *size), np.float32)
    for i, number in enumerate(numbers):
        path = folder / f"depth_{number:05d}.png"
        with opened(read_bytes(path), path, ("PNG",)) as image:
            codes = np.asarray(image)
        if codes.shape != size or codes.dtype != np.uint16:
            raise DataError(f"{path} is {codes.dtype} {codes.shape}; expected 16 bits and {size} as its frame")
        out[i, 0] = np.where(codes == 65535, np.inf, codes * (FARTHEST / 65535))
    return out


LICENCE = "PointOdyssey: by the terms at https://pointodyssey.com"
DATASET = Dataset(
    name="point_odyssey",
    about="PointOdyssey: synthetic videos of about 2,000 frames with dense tracks in 2D and 3D, depth and camera",
    licence=LICENCE,
    where="https://pointodyssey.com (Hugging Face: aharley/pointodyssey); 540 x 960",
    layout=LAYOUT,
    items=items,
    read=read,
    options=add_options,
    per_shard=16,
)
