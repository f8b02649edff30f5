"""The data set `synthetic`: clips rendered here, with exact truth for every field of `Clip`, as shards.

`render` makes one clip, `make` a set of shards, `default_set` the small sets that `trackpl fit` makes for itself. Clip
`index` of `seed` is the same wherever and with however many workers it is rendered.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from trackpl.errors import DataError, closest
from trackpl.shards import encode, read_index, write_shards
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
    if clips < 1 or workers < 1:
        raise DataError(f"a set needs at least 1 clip and 1 worker, got {clips} clips and {workers} workers")
    out = Path(out)
    recipe: dict[str, Any] = {"size": list(size), "frames": frames, "points": points}
    meta = {"source": "synthetic", "renderer": VERSION, "seed": seed, "licence": LICENCE, **recipe}
    if textures is not None:
        meta |= {"textures": _digest(load_textures(textures)), "licence": "that of the textures"}
    index = out / f"{name}.index.json"
    if index.exists() and not overwrite:
        there = read_index(index)
        if there.meta == meta and len(there.samples) == clips:
            return index
        raise DataError(f"{index} is another set; choose another folder or name, or overwrite it")
    job = partial(_sample, seed, size, frames, points, None if textures is None else Path(textures), meta["licence"])
    job(0)  # a mistake in the arguments shows here, before any process is started
    try:
        with tqdm(total=clips, desc=f"rendering {name}", unit="clip", smoothing=0.05, dynamic_ncols=True) as bar:
            samples = _counted(_map(job, clips, min(workers, clips)), bar)
            return write_shards(out, name, samples, meta=meta, overwrite=overwrite)
    except OSError as error:
        raise DataError(f"cannot write the set to {out}: {error.strerror or error}") from None


def _counted(samples: Iterator[tuple[str, dict[str, bytes]]], bar: tqdm) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Move the bar on with every sample."""
    for sample in samples:
        yield sample
        bar.update()


def _sample(
    seed: int, size: tuple[int, int], frames: int, points: int, folder: Path | None, licence: str, index: int
) -> tuple[str, dict[str, bytes]]:
    """Render and encode one clip: its key and members."""
    images = None if folder is None else load_textures(folder)
    clip = render(seed, index, size=size, frames=frames, points=points, textures=images)
    return clip.name[0], encode(clip, licence=licence)


def _map(
    job: partial[tuple[str, dict[str, bytes]]], clips: int, workers: int
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Run `job` on 0 to `clips` - 1, in order, here or in `workers` processes."""
    if workers == 1:
        yield from map(job, range(clips))
        return
    # Spawned, not forked: a forked child of a process that has used torch's threads may hang.
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(workers, context, _start_worker) as pool:
            yield from pool.map(job, range(clips))
    except BrokenProcessPool:
        raise DataError("a rendering process was killed, perhaps for want of memory; try fewer workers") from None


def _start_worker() -> None:
    """One thread a process; Ctrl-C is the parent's to handle."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


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


def cache_folder() -> Path:
    """Give the folder for what can be made again: $TRACKPL_CACHE, or the platform's place for it."""
    named = os.environ.get("TRACKPL_CACHE")
    if named:
        return Path(named)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "trackpl"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "trackpl"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trackpl"


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
                for stale in folder.glob(f".{split}.*.partial"):
                    shutil.rmtree(stale, ignore_errors=True)
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
