"""KITTI 2015: street scenes with sparse flow of one pair, as pairs and as the clips of the multi-view extension."""

from __future__ import annotations

import re
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable
from pathlib import Path

from trackpl_prep.dataset import Dataset, Item, Samples, folder_error, key_of
from trackpl_prep.files.flow import Motion, flow_sample, read_file, read_kitti_flow

LICENCE = "KITTI Vision Benchmark Suite: CC BY-NC-SA 3.0"
FPS = 10.0
ANNOTATED = (10, 11)  # the frames of the pair that has a flow
SKIPPED = range(9, 13)  # left out of unsupervised training, as UFlow does: what is scored, and its neighbours
PAIRS_LAYOUT = """
KITTI-2015/                      (this folder)
  training/image_2/000000_10.png 000000_11.png ...   (data_scene_flow.zip)
  training/flow_occ/000000_10.png ...
  training/flow_noc/000000_10.png ...
  testing/image_2/000000_10.png 000000_11.png ...
"""
VIEWS_LAYOUT = """
KITTI-2015/                      (this folder)
  training/image_2/000000_00.png ... 000000_20.png ...   (data_scene_flow_multiview.zip)
  training/flow_occ/000000_10.png ...                    (data_scene_flow.zip; not with --skip-annotated)
  training/flow_noc/000000_10.png ...
  testing/image_2/000000_00.png ... 000000_20.png ...
"""
_FRAME = re.compile(r"(\d{6})_(\d\d)\.png")


def pair_options(parser: ArgumentParser) -> None:
    """Add --split."""
    parser.add_argument("--split", choices=("training", "testing"), default="training", help="default: training")


def view_options(parser: ArgumentParser) -> None:
    """Add --split and --skip-annotated."""
    pair_options(parser)
    parser.add_argument(
        "--skip-annotated",
        action="store_true",
        help="leave out frames 9 to 12 of every scene, around the pair that is scored: two clips, 0-8 and 13-20, "
        "without flow, for unsupervised training",
    )


def pair_items(source: Path, options: Namespace) -> list[Item]:
    """List the scenes that have the annotated pair, as (scene, 10, 11)."""
    scenes = _scenes(source / options.split / "image_2", PAIRS_LAYOUT)
    chosen = {scene: frames for scene, frames in scenes.items() if frames & set(ANNOTATED)}
    if not chosen:
        raise folder_error(PAIRS_LAYOUT, f"{source / options.split / 'image_2'} has no frames 10 and 11")
    _check_pairs(source, options.split, chosen, PAIRS_LAYOUT)
    return [(scene, *ANNOTATED) for scene in chosen]


def view_items(source: Path, options: Namespace) -> list[Item]:
    """List runs of consecutive frames as (scene, first, last); a hole in the numbers of a scene parts it."""
    folder = source / options.split / "image_2"
    scenes = _scenes(folder, VIEWS_LAYOUT)
    if all(frames <= set(ANNOTATED) for frames in scenes.values()):
        raise folder_error(VIEWS_LAYOUT, f"{folder} has only the frames 10 and 11; the others are another download")
    if not options.skip_annotated:
        _check_pairs(source, options.split, scenes, VIEWS_LAYOUT)
    skipped = set(SKIPPED) if options.skip_annotated else set()
    return [(scene, *run) for scene, frames in scenes.items() for run in _runs(frames - skipped)]


def _scenes(folder: Path, layout: str) -> dict[str, set[int]]:
    """Return the frame numbers of every scene in a folder of images."""
    if not folder.is_dir():
        raise folder_error(layout, f"there is no folder {folder}")
    scenes: dict[str, set[int]] = {}
    for name in sorted(p.name for p in folder.iterdir()):
        if match := _FRAME.fullmatch(name):
            scenes.setdefault(match[1], set()).add(int(match[2]))
    if not scenes:
        raise folder_error(layout, f"{folder} has no images like 000000_10.png")
    return scenes


def _check_pairs(source: Path, split: str, scenes: Iterable[str], layout: str) -> None:
    """Raise `DataError` where a scene lacks a frame of the annotated pair, or its flow."""
    for scene in scenes:
        files = [f"image_2/{scene}_{n}.png" for n in ANNOTATED]
        if split == "training":
            files += [f"{kind}/{scene}_{ANNOTATED[0]}.png" for kind in ("flow_occ", "flow_noc")]
        for file in files:
            if not (source / split / file).is_file():
                raise folder_error(layout, f"{source / split / file} is missing")


def _runs(frames: set[int]) -> list[tuple[int, int]]:
    """Return first and last of each run of consecutive numbers."""
    ordered = sorted(frames)
    firsts = [n for n in ordered if n - 1 not in frames]
    lasts = [n for n in ordered if n + 1 not in frames]
    return list(zip(firsts, lasts, strict=True))


def read(source: Path, item: Item, options: Namespace) -> Samples:
    """Make the sample of one run of frames: its original PNG files, and the flow of the annotated pair if it has it."""
    scene, first, last = str(item[0]), int(item[1]), int(item[2])
    root, numbers = source / options.split, range(first, last + 1)
    frames = [read_file(root / "image_2" / f"{scene}_{n:02d}.png") for n in numbers]
    motions = []
    if options.split == "training" and set(ANNOTATED) <= set(numbers):
        flow, valid = read_kitti_flow(root / "flow_occ" / f"{scene}_{ANNOTATED[0]}.png")
        visible = read_kitti_flow(root / "flow_noc" / f"{scene}_{ANNOTATED[0]}.png")[1]
        motions.append(Motion((ANNOTATED[0] - first, ANNOTATED[1] - first), flow, visible, valid))
    facts = {"scene": scene, "split": options.split, "frames": list(numbers)}
    name = f"{scene}_{first:02d}"
    yield key_of(name), flow_sample(frames, motions, name=name, licence=LICENCE, fps=FPS, source=facts)


_WHERE = "https://www.cvlibs.net/datasets/kitti/eval_scene_flow.php"
DATASETS = (
    Dataset(
        name="kitti2015",
        about="KITTI 2015: 200 training and 200 testing pairs, about 375x1242, sparse flow",
        licence=LICENCE,
        where=f"{_WHERE} (data_scene_flow.zip, 2 GB)",
        layout=PAIRS_LAYOUT,
        items=pair_items,
        read=read,
        options=pair_options,
        per_shard=128,
    ),
    Dataset(
        name="kitti2015_multiview",
        about="KITTI 2015 multi-view: the 21 frames around each pair, flow of that pair",
        licence=LICENCE,
        where=f"{_WHERE} (data_scene_flow_multiview.zip, 14 GB, and data_scene_flow.zip, 2 GB)",
        layout=VIEWS_LAYOUT,
        items=view_items,
        read=read,
        options=view_options,
        per_shard=16,
        variants=("split", "skip_annotated"),
    ),
)
