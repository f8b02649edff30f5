"""MPI Sintel: sequences of an animated film of up to 50 frames, with the flow of every frame to the next."""

from __future__ import annotations

import re
from argparse import ArgumentParser, Namespace
from pathlib import Path

import numpy as np

from trackpl.errors import DataError
from trackpl_prep.dataset import Dataset, Item, Samples, folder_error, key_of
from trackpl_prep.files.flow import Motion, flow_sample, read_file, read_flo

LICENCE = "MPI Sintel: derived from the film Sintel, (c) Blender Foundation, durian.blender.org, CC BY 3.0"
FPS = 24.0
LAYOUT = """
MPI-Sintel-complete/             (this folder)
  training/clean/alley_1/frame_0001.png ...       (and final/)
  training/flow/alley_1/frame_0001.flo ...        (frame 1 to 2; none for the last frame)
  training/occlusions/alley_1/frame_0001.png ...  (optional: white where frame 2 does not show the pixel)
  training/invalid/alley_1/frame_0001.png ...     (optional: white where the flow is not to be trusted)
  test/clean/ambush_3/frame_0001.png ...          (and final/)
"""
_FRAME = re.compile(r"frame_(\d{4})\.png")
_TRUTH = (("flow", "flo"), ("occlusions", "png"), ("invalid", "png"))


def options(parser: ArgumentParser) -> None:
    """Add --split and --pass."""
    parser.add_argument("--split", choices=("training", "test"), default="training", help="default: training")
    parser.add_argument(
        "--pass", dest="rendering", choices=("clean", "final"), default="clean", help="rendering pass (default: clean)"
    )


def items(source: Path, options: Namespace) -> list[Item]:
    """List the sequences of a split, their numbers of frames, and which truth they have."""
    root, folder = source / options.split, source / options.split / options.rendering
    if not folder.is_dir():
        raise folder_error(LAYOUT, f"there is no folder {folder}")
    truth = [kind for kind, _ in _TRUTH if (root / kind).is_dir()] if options.split == "training" else []
    if options.split == "training" and "flow" not in truth:
        raise folder_error(LAYOUT, f"there is no folder {root / 'flow'}")
    found: list[Item] = []
    for sequence in sorted(p.name for p in folder.iterdir() if p.is_dir()):
        frames = sorted(int(m[1]) for p in (folder / sequence).iterdir() if (m := _FRAME.fullmatch(p.name)))
        if not frames or frames != list(range(1, len(frames) + 1)):
            what = f"holds the frames {frames[:3]}..{frames[-1]}" if frames else "holds no frames"
            raise folder_error(LAYOUT, f"{folder / sequence} {what}, not frame_0001.png and on without a gap")
        for kind, suffix in _TRUTH:
            for n in frames[:-1] if kind in truth else ():
                if not (root / kind / sequence / f"frame_{n:04d}.{suffix}").is_file():
                    raise folder_error(LAYOUT, f"{root / kind / sequence} has no frame_{n:04d}.{suffix}")
        found.append((sequence, len(frames), *truth))
    if not found:
        raise folder_error(LAYOUT, f"{folder} holds no sequences")
    return found


def read(source: Path, item: Item, options: Namespace) -> Samples:
    """Make the sample of one sequence: its original PNG files and the flow of every frame to the next."""
    sequence, count, *truth = item
    root, rendering = source / options.split, options.rendering
    frames = [read_file(root / rendering / str(sequence) / f"frame_{n:04d}.png") for n in range(1, int(count) + 1)]
    motions = []
    for n in range(1, int(count) if truth else 1):
        occluded, invalid = (
            _read_mask(root / kind / str(sequence) / f"frame_{n:04d}.png") if kind in truth else None
            for kind in ("occlusions", "invalid")
        )
        flow = read_flo(root / "flow" / str(sequence) / f"frame_{n:04d}.flo")
        visible, valid = (None if mask is None else ~mask for mask in (occluded, invalid))
        motions.append(Motion((n - 1, n), flow, visible, valid))
    facts = {"sequence": sequence, "split": options.split, "pass": rendering, "first_frame": 1}
    name = f"{rendering}/{sequence}"
    sample = flow_sample(frames, motions, name=name, licence=LICENCE, fps=FPS, source=facts)
    yield key_of(str(sequence), rendering), sample


def _read_mask(path: Path) -> np.ndarray:
    """Read a mask of 0 and 255: (H, W) bool."""
    from trackpl.encoding import decode_image

    grey = decode_image(read_file(path), str(path))[..., 0]
    if not np.isin(grey, (0, 255)).all():
        raise DataError(f"{path} is no mask: it holds other values than 0 and 255")
    return grey > 0


DATASET = Dataset(
    name="sintel",
    about="MPI Sintel: 23 training and 12 test sequences of up to 50 frames, 436x1024, flow and occlusions",
    licence=LICENCE,
    where="http://sintel.is.tue.mpg.de (MPI-Sintel-complete.zip, 5.3 GB)",
    layout=LAYOUT,
    items=items,
    read=read,
    options=options,
    per_shard=4,
    variants=("split", "rendering"),
)
