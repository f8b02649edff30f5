"""The data set `synthetic`: clips rendered here, with exact truth for every field of `Clip`, as shards.

`render` makes one clip, `make` a set of shards, `default_set` the small sets that `trackpl fit` makes for itself. Clip
`index` of `seed` is the same wherever and with however many workers it is rendered.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from trackpl.cache import cache_folder
from trackpl.encoding import encode
from trackpl.errors import DataError, closest
from trackpl_prep.convert import convert
from trackpl_prep.dataset import Dataset, Item, Samples, quality_option
from trackpl_prep.rendering import VERSION, render

__all__ = ["DEFAULT_SETS", "VERSION", "cache_folder", "default_set", "load_textures", "make", "render"]

LICENCE = "CC0-1.0"
# What `fit` trains and validates on when nothing else is named: seed, number of clips.
DEFAULT_SETS = {"train": (101, 96), "val": (202, 30)}
_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}


def make(
    out: Path | str,
    clips: int,
    *,
    seed: int = 0,
    size: tuple[int, int] = (256, 256),
    frames: int = 24,
    points: int = 256,
    textures: Path | str | None = None,
    workers: int = 1,
    name: str = "synthetic",
    overwrite: bool = False,
) -> Path:
    """Render clips 0 to `clips` - 1 of `seed` into shards in the folder `out`; return the path of the index.

    The same arguments give the same bytes, whatever `workers` (processes). A set that is there already and was made
    with the same arguments is kept. `textures` is a folder of images to use instead of our own textures.

    Raises:
        DataError: arguments out of range, no images in `textures`, or another set of that name is there (and not
            `overwrite`).
    """
    folder = None if textures is None else Path(textures)
    options = Namespace(
        clips=clips, seed=seed, size=list(size), frames=frames, points=points, quality=95, textures=folder
    )
    index = convert(DATASET, "", out, options, workers=workers, name=name, overwrite=overwrite)
    if index is None:
        raise DataError(f"another process is making the set '{name}' in {out}")
    return index


def _options(parser: ArgumentParser) -> None:
    """Add the options of `trackpl data make synthetic`."""
    parser.add_argument("--clips", type=int, default=96, metavar="N", help="number of clips")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="another seed gives other clips")
    parser.add_argument("--size", type=int, nargs=2, default=[256, 256], metavar=("H", "W"), help="pixels")
    parser.add_argument("--frames", type=int, default=24, metavar="T", help="frames in each clip")
    parser.add_argument("--points", type=int, default=256, metavar="N", help="tracks in each clip")
    quality_option(parser)
    parser.add_argument("--textures", type=Path, metavar="DIR", help="images to use as textures")


def _items(source: Path, options: Namespace) -> list[Item]:
    """List the clips; with them goes what their bytes follow from beside the options."""
    if options.clips < 1:
        raise DataError(f"a set needs at least 1 clip, got {options.clips}")
    images = "" if options.textures is None else _digest(load_textures(options.textures))
    return [(index, images) for index in range(options.clips)]


def _read(source: Path, item: Item, options: Namespace) -> Samples:
    """Render and encode one clip."""
    images = None if options.textures is None else load_textures(options.textures)
    size = (options.size[0], options.size[1])
    clip = render(options.seed, int(item[0]), size=size, frames=options.frames, points=options.points, textures=images)
    yield clip.name[0], encode(clip, options.quality, LICENCE if images is None else "that of the textures")


DATASET = Dataset(
    name="synthetic",
    about="clips rendered here, with exact tracks, visibility, flow, depth and segmentation",
    licence=f"{LICENCE} (with --textures: that of the images)",
    where="made on this machine; nothing to download",
    layout="",
    items=_items,
    read=_read,
    options=_options,
    per_shard=16,
    version=VERSION,
    needs_source=False,
)


@lru_cache(maxsize=1)
def load_textures(folder: Path | str) -> tuple[Tensor, ...]:
    """Read the images of a folder, by name, at most 1024 pixels on the longer side: tensors (3, h, w) uint8.

    Raises:
        DataError: no such folder, no images in it, or one that cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"--textures: {folder} is no folder")
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in _SUFFIXES)
    if not files:
        raise DataError(f"--textures: {folder} holds no images ({' '.join(sorted(_SUFFIXES))})")
    out = []
    for file in files:
        try:
            with Image.open(file) as opened:
                image = opened.convert("RGB")
            image.thumbnail((1024, 1024))
        except (OSError, UnidentifiedImageError, Image.DecompressionBombError):
            raise DataError(f"--textures: {file} cannot be read as an image; remove or repair it") from None
        out.append(torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous())
    return tuple(out)


def _digest(images: tuple[Tensor, ...]) -> str:
    """Hash images, so that a set made with others is told apart."""
    state = hashlib.sha256()
    for image in images:
        state.update(str(tuple(image.shape)).encode() + image.numpy().tobytes())
    return state.hexdigest()


def default_set(split: str) -> Path:
    """Give the index of the embedded set "train" or "val", made on first use in the user's cache folder.

    Two processes may ask at once, one may be killed at any time: a set that is there is whole. A new version of the
    renderer makes new sets.

    Raises:
        DataError: another split, or the cache folder cannot be written.
    """
    if split not in DEFAULT_SETS:
        raise DataError(f"the data set 'synthetic' has no split '{split}'; {closest(split, DEFAULT_SETS)}")
    folder = cache_folder() / f"synthetic-v{VERSION}"
    index = folder / f"{split}.index.json"
    if index.exists():
        return index
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{split}.lock"):  # goes with its process, even a killed one
            if not index.exists():
                _make_default(split, folder)
    except OSError as error:
        raise DataError(
            f"cannot write the default data set to {folder}: {error.strerror or error}; "
            "set TRACKPL_CACHE to a folder that can be written"
        ) from None
    return index


def _make_default(split: str, folder: Path) -> None:
    """Run `trackpl data make synthetic` in a process of its own: the caller's may not be fit to start workers."""
    seed, clips = DEFAULT_SETS[split]
    workers = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 8)
    print(f"trackpl: making the default {split} set once: {clips} clips in {folder}", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "trackpl_prep.cli", "make", "synthetic", str(folder), "--name", split, "--quiet"]
    command += ["--clips", str(clips), "--seed", str(seed), "--workers", str(workers)]
    path = os.pathsep.join(p for p in sys.path if p)  # the child finds what this process finds
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=False)
    if done.returncode:
        raise DataError(
            f"making the default {split} set failed (exit status {done.returncode}); "
            "see above, or try: trackpl data make synthetic OUT"
        )
