"""JHMDB as published: short clips of 240 x 320 with 15 joints of one person in every frame.

The file counts pixels from 1: the centre of the first pixel is (1, 1), so in raster coordinates, where it is
(0.5, 0.5), a joint lies at ``pos_img - 0.5``. The published protocols (data_metrics.md 3.7) score at ``pos_img - 1``
(videowalk: our tracks - 0.5) and at ``pos_img`` as stored (tapnet: our tracks + 0.5).
"""

from __future__ import annotations

import re
from argparse import ArgumentParser, Namespace
from pathlib import Path

import numpy as np
import torch

from trackpl.encoding import encode
from trackpl.errors import DataError, closest
from trackpl.types import Clip
from trackpl_prep.dataset import Dataset, Item, Samples, folder_error, key_of
from trackpl_prep.files.frames import list_names, load_frames, numbering, numbers_of, read_bytes
from trackpl_prep.files.mat import read_matrix

JOINTS = 15
SPLITS = {"train": "1", "test": "2"}
_MAX_MAT = 2**24  # bytes of joint_positions.mat; the real ones have a few thousand
LAYOUT = """
SOURCE/Rename_Images/<class>/<video>/00001.png ...               frames, counted from 1
SOURCE/joint_positions/<class>/<video>/joint_positions.mat       pos_img [2, 15, T]
SOURCE/splits/<class>_test_split1.txt                            lines "<video>.avi 1" (train) or "<video>.avi 2" (test)
"""


def add_options(parser: ArgumentParser) -> None:
    """Add the flags of this data set."""
    parser.add_argument("--split", default="test", choices=sorted(SPLITS), help="test has 268 clips")
    parser.add_argument("--fold", type=int, default=1, choices=(1, 2, 3), help="which lists in splits/")


def items(source: Path, options: Namespace) -> list[Item]:
    """List (class, video) of a split."""
    if options.split not in SPLITS:
        raise DataError(f"JHMDB has no split '{options.split}'; {closest(options.split, SPLITS)}")
    folder, ending = source / "splits", f"_test_split{options.fold}.txt"
    lists = [n for n in list_names(folder, [".txt"]) if n.endswith(ending)] if folder.is_dir() else []
    if not lists:
        raise folder_error(LAYOUT, f"no <class>{ending} in {folder}")
    out: list[Item] = []
    for name in lists:
        kind = name.removesuffix(ending)
        for number, line in enumerate(read_bytes(folder / name, 2**22).decode(errors="replace").splitlines(), 1):
            match = re.fullmatch(r"\s*([^/\\]+)\.avi\s+([012])\s*", line)
            if match is None and line.strip():
                raise DataError(f"{folder / name}, line {number} is '{line[:60]}'; allowed is '<video>.avi 1' or 2")
            if match is None or match[2] != SPLITS[options.split]:
                continue
            for part in ("Rename_Images", "joint_positions"):
                if not (source / part / kind / match[1]).is_dir():
                    raise folder_error(
                        LAYOUT, f"the clip {kind}/{match[1]} is missing: no folder {source / part / kind / match[1]}"
                    )
            out.append((kind, match[1]))
    if not out:
        raise folder_error(LAYOUT, f"the lists in {folder} name no clips of the split {options.split}")
    return out


def read(source: Path, item: Item, options: Namespace) -> Samples:
    """Make the sample of one clip: the frames for which there are joints, and the joints."""
    kind, video = map(str, item)
    folder = source / "Rename_Images" / kind / video
    names = list_names(folder, [".png"])
    joints = read_joints(source / "joint_positions" / kind / video / "joint_positions.mat")
    count = min(len(names), len(joints))  # some poses are shorter than their frames
    if not count:
        raise DataError(f"{folder} has {len(names)} .png frames and {len(joints)} poses; a clip needs both")
    frames = load_frames([folder / n for n in names[:count]])
    h, w = frames.size
    known = (np.abs(joints[:count]) < 1e5).all(-1)  # also what is not a number
    xy = np.where(known[..., None], joints[:count] - 0.5, 0).astype(np.float32)
    inside = known & ((xy >= 0) & (xy <= (w, h))).all(-1)
    clip = Clip(
        video=frames.video,
        tracks=torch.from_numpy(xy)[None],
        visible=torch.from_numpy(inside)[None],
        valid=torch.from_numpy(known)[None],
        queries=torch.from_numpy(np.concatenate([np.zeros((JOINTS, 1), np.float32), xy[0]], 1))[None],
        name=(f"{kind}/{video}",),
    )
    facts = {
        "video": video,
        "class": kind,
        "split": options.split,
        "coordinates": "tracks = pos_img - 0.5; inside the frame counts as visible, the file does not tell",
        **numbering(numbers_of(names[:count])),
    }
    yield key_of(kind, video), encode(clip, licence=LICENCE, images=frames.images, source=facts)


def read_joints(path: Path) -> np.ndarray:
    """Read ``pos_img`` of a MAT file of version 5: (T, 15, 2) float64 (x, y), pixels counted from 1.

    Raises:
        DataError: the file is broken or holds something else.
    """
    joints = read_matrix(read_bytes(path, _MAX_MAT), "pos_img", str(path))
    if joints is None:
        raise DataError(f"{path} has no array pos_img; expected [2, {JOINTS}, T]")
    if joints.ndim < 2 or joints.shape[:2] != (2, JOINTS):
        raise DataError(f"{path} has pos_img of shape {joints.shape}; expected (2, {JOINTS}, T)")
    return joints.reshape(2, JOINTS, -1).transpose(2, 1, 0)  # MATLAB drops the last axis of a single frame


LICENCE = "JHMDB: by the terms at http://jhmdb.is.tue.mpg.de (joints); clips of HMDB51 (CC-BY 4.0)"
DATASET = Dataset(
    name="jhmdb",
    about="JHMDB: 15 joints of a person in clips of 15 to 40 frames, for pose propagation (PCK)",
    licence=LICENCE,
    where="http://jhmdb.is.tue.mpg.de: Rename_Images, joint_positions and splits; 928 clips, 1 GB",
    layout=LAYOUT,
    items=items,
    benchmark=True,
    read=read,
    options=add_options,
)
