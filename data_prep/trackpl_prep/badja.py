"""BADJA as published: joints of animals in sequences of DAVIS at full resolution.

Of the annotated joints the 20 that are scored are kept (data_metrics.md 3.8). They are stored as the file has them,
(y, x) turned to (x, y): the protocol resizes them by multiplication, as raster coordinates.
"""

from __future__ import annotations

import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trackpl.encoding import encode
from trackpl.errors import DataError
from trackpl.types import Clip
from trackpl_prep.dataset import Dataset, Item, Samples, folder_error, key_of
from trackpl_prep.files.frames import (
    VOID,
    list_names,
    load_frames,
    numbering,
    numbers_of,
    opened,
    read_bytes,
    read_facts,
)

JOINTS = (8, 9, 10, 12, 13, 14, 15, 18, 19, 20, 22, 23, 24, 25, 28, 31, 32, 33, 35, 36)
FPS = 24.0  # of DAVIS
LAYOUT = """
SOURCE/joint_annotations/<animal>.json                                joints of some frames
SOURCE/DAVIS/JPEGImages/Full-Resolution/<sequence>/00000.jpg ...      DAVIS at full resolution
SOURCE/DAVIS/Annotations/Full-Resolution/<sequence>/00000.png ...
"""
_IMAGE = re.compile(r"DAVIS/JPEGImages/Full-Resolution/([\w-]{1,64})/(\d{5})\.jpg")


def items(source: Path, options: Namespace) -> list[Item]:
    """List (annotation, sequence): animals of DAVIS; the extra videos have no frames in the download."""
    folder = source / "joint_annotations"
    names = list_names(folder, [".json"]) if folder.is_dir() else []
    if not names:
        raise folder_error(LAYOUT, f"no annotations in {folder}")
    out: list[Item] = []
    for name in names:
        entries = _entries(folder / name)
        if "extra_videos" in str(entries[0].get("segmentation_path")):
            continue
        match = _IMAGE.fullmatch(str(entries[0].get("image_path")))
        if match is None:
            raise DataError(
                f"{folder / name} names the frame '{str(entries[0].get('image_path'))[:80]}', not one of DAVIS"
            )
        for part in ("JPEGImages", "Annotations"):
            place = source / "DAVIS" / part / "Full-Resolution" / match[1]
            if not place.is_dir():
                raise folder_error(LAYOUT, f"the sequence of {name} is missing: no folder {place}")
        out.append((name, match[1]))
    if not out:
        raise folder_error(LAYOUT, f"none of the annotations in {folder} is of a sequence of DAVIS")
    return out


def _entries(path: Path) -> list[dict[str, Any]]:
    entries = read_facts(path)
    if not isinstance(entries, list) or not entries or not all(isinstance(e, dict) for e in entries):
        raise DataError(f"{path} is no list of annotated frames")
    return entries


def read(source: Path, item: Item, options: Namespace) -> Samples:
    """Make the sample of one animal: all frames of its sequence, joints and masks where there are any."""
    name, sequence = map(str, item)
    frames_at, masks_at = (source / "DAVIS" / p / "Full-Resolution" / sequence for p in ("JPEGImages", "Annotations"))
    names = list_names(frames_at, [".jpg"])
    frames = load_frames([frames_at / n for n in names])
    t, (h, w) = len(names), frames.size
    xy = np.zeros((t, len(JOINTS), 2), np.float32)
    visible, valid = np.zeros((t, len(JOINTS)), bool), np.zeros((t, len(JOINTS)), bool)
    place = {n: i for i, n in enumerate(names)}
    path = source / "joint_annotations" / name
    for entry in _entries(path):
        match = _IMAGE.fullmatch(str(entry.get("image_path")))
        if match is None or match[1] != sequence or f"{match[2]}.jpg" not in place:
            raise DataError(
                f"{path} names the frame '{str(entry.get('image_path'))[:80]}', which is not in {frames_at}"
            )
        i = place[f"{match[2]}.jpg"]
        xy[i], visible[i] = _joints(entry, f"{path}, frame {match[2]}")
        valid[i] = True
    labels = np.full((t, h, w), VOID, np.uint8)
    for i, n in enumerate(names):
        mask = masks_at / f"{Path(n).stem}.png"
        if mask.is_file():
            labels[i] = _mask(mask, (h, w))
    clip = Clip(
        video=frames.video,
        tracks=torch.from_numpy(xy)[None],
        visible=torch.from_numpy(visible)[None],
        valid=torch.from_numpy(valid)[None],
        labels=torch.from_numpy(labels)[None],
        name=(Path(name).stem,),
        fps=FPS,
    )
    facts = {"video": sequence, "joints": list(JOINTS), **numbering(numbers_of(names))}
    yield key_of(Path(name).stem), encode(clip, licence=LICENCE, images=frames.images, source=facts)


def _joints(entry: dict[str, Any], where: str) -> tuple[np.ndarray, np.ndarray]:
    """Return (20, 2) pixels (x, y) and (20,) visible."""
    try:
        joints = np.asarray(entry["joints"], dtype=np.float64)
        visible = np.asarray(entry["visibility"], dtype=bool)
    except (KeyError, TypeError, ValueError):
        raise DataError(f"{where}: no joints [[y, x], ...] with their visibility") from None
    n = max(JOINTS) + 1
    if joints.ndim != 2 or joints.shape[1] != 2 or len(joints) < n or visible.shape != joints.shape[:1]:
        raise DataError(f"{where}: joints of shape {joints.shape}, visibility {visible.shape}; expected {n} or more")
    if not (np.abs(joints) < 1e5).all():
        raise DataError(f"{where}: a joint is not a place in the frame")
    return joints[list(JOINTS), ::-1], visible[list(JOINTS)]


def _mask(path: Path, size: tuple[int, int]) -> np.ndarray:
    """Read where a picture is not black: uint8 (H, W) of 0 and 1."""
    with opened(read_bytes(path), f"the mask {path}", ("PNG",)) as image:
        if image.size != (size[1], size[0]):
            raise DataError(f"the mask {path} is {image.width}x{image.height}, its frame {size[1]}x{size[0]}")
        pixels = np.asarray(image if image.mode in ("P", "L") else image.convert("RGB"))
    return np.asarray(pixels.reshape(*size, -1).max(-1) > 0, dtype=np.uint8)


LICENCE = "BADJA: joints by the terms at https://github.com/benjiebob/BADJA; frames and masks of DAVIS by its terms"
DATASET = Dataset(
    name="badja",
    about="BADJA: 20 joints of 7 animals of DAVIS, for point tracking (PCK-T, 3 px)",
    licence=LICENCE,
    where="https://github.com/benjiebob/BADJA (joint_annotations), with DAVIS-2017 at full resolution as DAVIS/",
    layout=LAYOUT,
    items=items,
    benchmark=True,
    read=read,
    per_shard=1,
)
