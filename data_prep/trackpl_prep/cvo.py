"""CVO: rendered clips with exact flow between the first and the last frame; a test of long-range flow.

A sample is the clip as the protocol sees it (DOT, DELTA): time runs backwards, so that frame 0 is the last frame of
the original and the flow goes from it to the last frame of the sample, the first one of the original.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import numpy as np

from trackpl.errors import DataError
from trackpl_prep.dataset import Dataset, Item, Samples, folder_error, key_of
from trackpl_prep.files.flow import Motion, flow_sample
from trackpl_prep.files.lmdb import read_values
from trackpl_prep.files.pickles import load

LICENCE = "CVO (AccFlow, ICCV 2023), test sets as published with DOT: MIT"
LAYOUT = """
CVO/                             (this folder)
  cvo_test.lmdb                  (--split clean or final; the file itself, or a folder with data.mdb)
  cvo_test_extended.lmdb         (--split extended)
"""
# fmt: off
BROKEN = frozenset((
    70, 77, 93, 96, 140, 143, 162, 172, 174, 179, 187, 215, 236, 284, 285, 293, 330, 358, 368, 402, 415, 458, 483, 495,
    534,
))
# fmt: on
"""Samples of the clean and final set whose flow is wrong; the protocol leaves them out."""
_FILES = {"clean": "cvo_test.lmdb", "final": "cvo_test.lmdb", "extended": "cvo_test_extended.lmdb"}
_IMAGES = {"clean": "imgs", "final": "imgs_blur", "extended": "imgs"}
_TOLERANCE = {"clean": 0.01, "final": 0.01, "extended": 0.1}  # part of the lengths of the flows
_SLACK = 0.5  # pixels


def options(parser: ArgumentParser) -> None:
    """Add --split and --keep-broken."""
    parser.add_argument("--split", choices=tuple(_FILES), default="clean", help="default: clean")
    parser.add_argument(
        "--keep-broken",
        action="store_true",
        help="keep the 25 samples of clean and final whose flow is wrong and that the protocol leaves out",
    )


def items(source: Path, options: Namespace) -> list[Item]:
    """List the numbers of the samples of a split."""
    path = source / _FILES[options.split]
    if not path.exists() or (path.is_dir() and not (path / "data.mdb").is_file()):
        raise folder_error(LAYOUT, f"{path} is missing, or a folder without data.mdb")
    names = _values(path, ["__samples__"])[0]
    if not isinstance(names, list) or not 0 < len(names) <= 10**5:  # keys have five digits
        raise DataError(f"{path}: __samples__ is no list of samples")
    left_out = frozenset() if options.keep_broken or options.split == "extended" else BROKEN
    return [(i,) for i in range(len(names)) if i not in left_out]


def read(source: Path, item: Item, options: Namespace) -> Samples:
    """Make one sample: the clip backwards, the flow from its first to its last frame, and where that is visible."""
    number, path = int(item[0]), source / _FILES[options.split]
    key, images = f"{number:05d}", _IMAGES[options.split]
    values = _values(path, [f"{key}_{images}", f"{key}_fflows", f"{key}_bflows"])
    where = f"{path}, sample {key}"
    video = _video(values[0], where)
    there, back = (_last_flow(x, video.shape[:3], where) for x in values[1:])
    visible = consistent(back, there, _TOLERANCE[options.split])
    motion = Motion((0, len(video) - 1), back, visible)
    facts = {"sample": number, "split": options.split, "order": "backwards in time"}
    yield key_of(key), flow_sample(video[::-1], [motion], name=key, licence=LICENCE, source=facts)


def _values(path: Path, keys: list[str]) -> list[Any]:
    found = read_values(path, keys)
    for key, data in found.items():
        if data is None:
            raise DataError(f"{path} has no {key}; it is not the published set")
    return [load(data, f"{path}, {key}", views=True) for key, data in found.items() if data is not None]


def _video(images: Any, where: str) -> np.ndarray:
    """Turn the images of a sample, (H, W, 3 T), into (T, H, W, 3)."""
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.ndim != 3 or images.shape[2] % 3:
        raise DataError(f"{where}: its images are no u8 array (H, W, 3 T)")
    video = images.reshape(*images.shape[:2], -1, 3).transpose(2, 0, 1, 3)
    if len(video) < 2 or video.size == 0:
        raise DataError(f"{where}: its images are {images.shape}, which is no clip of two frames or more")
    return video


def _last_flow(flows: Any, shape: tuple[int, ...], where: str) -> np.ndarray:
    """Return the flow between first and last frame, (H, W, 2) pixels, of the flows (H, W, 2 (T - 1)) of a sample."""
    t, h, w = shape
    if not isinstance(flows, np.ndarray) or flows.shape != (h, w, 2 * (t - 1)):
        raise DataError(
            f"{where}: its flows are {getattr(flows, 'shape', type(flows).__name__)}, not {(h, w, 2 * t - 2)}"
        )
    if flows.dtype != np.uint16 and flows.dtype.kind != "f":
        raise DataError(f"{where}: its flows are {flows.dtype}, not u16 or float")
    last = flows[..., -2:].astype(np.float32)
    if not np.isfinite(last).all():
        raise DataError(f"{where}: its flow is not finite")
    return (last - 32768) / 128 if flows.dtype == np.uint16 else last


def consistent(flow: np.ndarray, back: np.ndarray, part: float) -> np.ndarray:
    """Tell which pixels the other frame shows: those that the flow `back` brings back to where `flow` took them from.

    Args:
        flow: (H, W, 2) pixels from a frame to another one.
        back: (H, W, 2) pixels from that one; bilinear, 0 outside.
        part: tolerated error as a part of the lengths of the two flows, both at the same pixel; half a pixel is added.

    Returns:
        (H, W) bool.
    """
    import torch
    from torch.nn.functional import grid_sample

    h, w = flow.shape[:2]
    x, y = np.meshgrid(np.arange(w, dtype=np.float32), np.arange(h, dtype=np.float32))
    place = (np.stack([x, y], -1) + flow) * 2 / np.maximum([w - 1, h - 1], 1).astype(np.float32) - 1
    planes = torch.from_numpy(np.ascontiguousarray(back.transpose(2, 0, 1)))[None]
    there = grid_sample(planes, torch.from_numpy(place)[None], align_corners=True)[0].permute(1, 2, 0).numpy()
    lengths = np.linalg.norm(flow, axis=-1) + np.linalg.norm(back, axis=-1)
    return np.linalg.norm(flow + there, axis=-1) < part * lengths + _SLACK


DATASET = Dataset(
    name="cvo",
    about="CVO: long-range flow, 536 rendered clips of 7 frames (clean, final) and 500 of 48 (extended), 512x512",
    licence=LICENCE,
    where="https://huggingface.co/datasets/16lemoing/cvo (cvo_test.lmdb 18.3 GB, cvo_test_extended.lmdb 21 GB)",
    layout=LAYOUT,
    items=items,
    benchmark=True,
    read=read,
    options=options,
    per_shard=32,
)
