"""Flying Chairs: 22,872 pairs of chairs that fly over photographs, with exact flow."""

from __future__ import annotations

import io
import re
from argparse import ArgumentParser, Namespace
from pathlib import Path

import numpy as np

from trackpl.errors import DataError
from trackpl_prep.dataset import Dataset, Item, Samples, folder_error, key_of
from trackpl_prep.files.flow import MAX_AREA, Motion, flow_sample, read_file, read_flo

LICENCE = "Flying Chairs: for research purposes only, commercial use is prohibited"
PAGE = "https://lmb.informatik.uni-freiburg.de/resources/datasets/FlyingChairs.en.html"
SPLIT_FILE = "FlyingChairs_train_val.txt"
SPLITS = {"train": b"1", "val": b"2"}
LAYOUT = f"""
FlyingChairs_release/            (this folder)
  data/00001_img1.ppm 00001_img2.ppm 00001_flow.flo 00002_img1.ppm ...
  {SPLIT_FILE}      (line n is 1 where the pair n is for training, 2 for validation; not needed for --split all)
"""
_FILE = re.compile(r"(\d{5})_(img1\.ppm|img2\.ppm|flow\.flo)")
_SUFFIXES = ("img1.ppm", "img2.ppm", "flow.flo")


def options(parser: ArgumentParser) -> None:
    """Add --split."""
    parser.add_argument("--split", choices=(*SPLITS, "all"), default="train", help="pairs to take (default: train)")


def items(source: Path, options: Namespace) -> list[Item]:
    """List the numbers of the pairs of a split."""
    folder = source / "data"
    if not folder.is_dir():
        raise folder_error(LAYOUT, f"{source} has no folder 'data'")
    found = {suffix: set[int]() for suffix in _SUFFIXES}
    for path in folder.iterdir():
        if match := _FILE.fullmatch(path.name):
            found[match[2]].add(int(match[1]))
    pairs = set.union(*found.values())
    if not pairs:
        raise folder_error(LAYOUT, f"{folder} has no files like 00001_img1.ppm")
    for suffix in _SUFFIXES:
        if missing := pairs - found[suffix]:
            raise folder_error(LAYOUT, f"{len(missing)} pairs have no {suffix}, the first is {min(missing):05d}")
    if options.split != "all":
        split = _read_split(source / SPLIT_FILE)
        if max(pairs) > len(split) or min(pairs) < 1:
            raise DataError(f"{source / SPLIT_FILE} has {len(split)} lines, but {folder} has the pair {max(pairs):05d}")
        pairs = {n for n in pairs if split[n - 1] == SPLITS[options.split]}
        if not pairs:
            raise DataError(f"{source / SPLIT_FILE} puts none of the pairs in {folder} into '{options.split}'")
    return [(n,) for n in sorted(pairs)]


def _read_split(path: Path) -> list[bytes]:
    if not path.is_file():
        raise folder_error(LAYOUT, f"{path} is missing; get it from {PAGE}, or take all pairs with --split all")
    lines = read_file(path, 2**20).split()
    for i, line in enumerate(lines):
        if line not in SPLITS.values():
            raise DataError(f"{path}, line {i + 1}: {line[:20]!r} is neither 1 (train) nor 2 (val)")
    return lines


def read(source: Path, item: Item, options: Namespace) -> Samples:
    """Make the sample of one pair: two frames, PNG, and the flow from the first to the second."""
    (number,) = item
    stem = source / "data" / f"{number:05d}"
    frames = [_read_ppm(Path(f"{stem}_img{i}.ppm")) for i in (1, 2)]
    if frames[0].shape != frames[1].shape:
        raise DataError(f"{stem}_img1.ppm and _img2.ppm differ in size, {frames[0].shape} and {frames[1].shape}")
    motion = Motion((0, 1), read_flo(f"{stem}_flow.flo"))
    name = f"{number:05d}"
    yield key_of(name), flow_sample(np.stack(frames), [motion], name=name, licence=LICENCE, source={"pair": number})


def _read_ppm(path: Path) -> np.ndarray:
    """Read a binary PPM of 8 bits: (H, W, 3) uint8."""
    from PIL import Image

    data = read_file(path)
    try:
        with Image.open(io.BytesIO(data), formats=["PPM"]) as image:
            if data[:2] != b"P6" or image.mode != "RGB" or image.width * image.height > MAX_AREA:
                raise ValueError(f"is {image.mode} {image.height}x{image.width}")
            return np.array(image)
    except (ValueError, OSError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} is no whole PPM image of 8-bit colours ({error})") from None


DATASET = Dataset(
    name="flying_chairs",
    about="Flying Chairs: 22,872 synthetic image pairs, 384x512, exact flow",
    licence=LICENCE,
    where=f"{PAGE} (FlyingChairs.zip, 31 GB)",
    layout=LAYOUT,
    items=items,
    read=read,
    options=options,
    per_shard=256,
)
