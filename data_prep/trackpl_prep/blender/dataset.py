"""`trackpl data make kubric-blender`: each clip is made in a process of its own."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from trackpl.errors import DataError
from trackpl_prep.blender import INSTALL
from trackpl_prep.dataset import Dataset, Item, Samples

if TYPE_CHECKING:  # torch: not before there is a clip to make
    from trackpl_prep.blender.clip import Request


def _options(parser: ArgumentParser) -> None:
    """Add the options of `trackpl data make kubric-blender`."""
    parser.add_argument("--clips", type=int, default=100, metavar="N", help="number of clips")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="another seed gives other clips")
    parser.add_argument("--size", type=int, nargs=2, default=[256, 256], metavar=("H", "W"), help="pixels")
    parser.add_argument("--frames", type=int, default=24, metavar="T", help="frames in each clip")
    parser.add_argument("--points", type=int, default=2048, metavar="N", help="tracks in each clip")
    parser.add_argument("--samples", type=int, default=16, metavar="K", help="light paths a pixel")
    parser.add_argument("--fps", type=float, default=12.0, metavar="F", help="frames a second")
    parser.add_argument("--textures", type=Path, metavar="DIR", help="images to use as textures")
    parser.add_argument("--motion-blur", type=float, default=0.0, metavar="P", help="part of the clips that have it")
    parser.add_argument(
        "--dense",
        choices=("none", "first", "last", "both"),
        default="none",
        help="track every pixel of these frames, with depth, in place of the flow from each frame to the next",
    )


def _items(source: Path, options: Namespace) -> list[Item]:
    """List the clips; with them goes what their bytes follow from beside the options."""
    if options.clips < 1:
        raise DataError(f"a set needs at least 1 clip, got {options.clips}")
    for module in ("bpy", "pybullet"):
        if importlib.util.find_spec(module) is None:
            raise DataError(f"kubric-blender needs the module '{module}', which is not installed; {INSTALL}")
    from trackpl_prep.blender.clip import check

    check(_request(options, 0))
    images = "" if options.textures is None else _digest(options.textures)
    return [(index, images) for index in range(options.clips)]


def _request(options: Namespace, index: int) -> Request:
    """Return what clip `index` follows from."""
    from trackpl_prep.blender.clip import Request

    return Request(
        options.seed,
        index,
        (options.size[0], options.size[1]),
        options.frames,
        options.points,
        options.samples,
        options.fps,
        options.motion_blur,
        options.dense,
        None if options.textures is None else str(Path(options.textures).resolve()),
    )


def _digest(folder: Path) -> str:
    """Hash the images of a folder, so that a set made with others is told apart."""
    from trackpl_prep.synthetic import load_textures

    state = hashlib.sha256()
    for image in load_textures(folder):
        state.update(str(tuple(image.shape)).encode() + image.numpy().tobytes())
    return state.hexdigest()


def _read(source: Path, item: Item, options: Namespace) -> Samples:
    """Have one clip made; returns what the child wrote."""
    index = int(item[0])
    with tempfile.TemporaryDirectory(prefix="kubric-blender-") as folder:
        run_child(json.dumps(vars(_request(options, index))), Path(folder), f"clip {index}")
        yield (
            f"kubric-blender-{options.seed}-{index:06d}",
            {p.name: p.read_bytes() for p in sorted(Path(folder).iterdir())},
        )


def run_child(request: str, folder: Path, name: str) -> None:
    """Run `child` on a request (JSON); raises `DataError` with its own words, or with how it ended."""
    from trackpl_prep.blender.child import MARK

    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    environment = {**os.environ, **threads, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-m", "trackpl_prep.blender.child", str(folder)]
    with tempfile.TemporaryFile() as log:
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=log, env=environment
        ) as process:
            assert process.stdin is not None
            try:
                process.stdin.write(request.encode() + b"\n")
                process.stdin.flush()  # and stays open: the child lives as long as this process
                status = process.wait()
            except BaseException:
                process.kill()
                raise
        log.seek(0)
        lines = log.read().decode(errors="replace").splitlines()
    if status == 0:
        return
    for line in lines:
        if line.startswith(MARK):
            raise DataError(line.removeprefix(MARK))
    last = "; ".join(line.strip() for line in lines[-2:])[:400]
    raise DataError(f"{name}: the process that renders ended with status {status} ({last or 'it said nothing'})")


DATASET = Dataset(
    name="kubric-blender",
    about="physically simulated, ray-traced scenes: tracks, visibility, depth, flow, segmentation, camera",
    licence="CC0-1.0 (with --textures: that of the images)",
    where='made on this machine with Blender: pip install "trackpl[blender]" (Python 3.11)',
    layout="",
    items=_items,
    read=_read,
    options=_options,
    per_shard=4,  # a few minutes of work, which is what a kill loses
    needs_source=False,
)
