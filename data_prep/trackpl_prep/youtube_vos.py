"""YouTube-VOS 2018 and 2019 as published: videos of 720p, masks on every fifth frame.

Frames are stored untouched (spec: data_metrics.md 7.4 ii); a video of more than `--segment` frames becomes several
samples without overlap.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from statistics import mode
from typing import Any

from trackpl.encoding import encode
from trackpl.errors import DataError, closest
from trackpl.types import Clip
from trackpl_prep.dataset import Dataset, Item, Samples, folder_error, key_of
from trackpl_prep.files.frames import (
    VOID,
    list_names,
    load_frames,
    load_mask_stack,
    numbering,
    numbers_of,
    read_facts,
    segments,
)

FPS = 30.0  # of the videos, before frames were left out
SPLITS = tuple(f"{part}{frames}" for frames in ("", "_all_frames") for part in ("train", "valid", "test"))
LAYOUT = """
SOURCE/train/JPEGImages/<video>/00000.jpg 00005.jpg ...      every fifth frame
SOURCE/train/Annotations/<video>/00000.png ...               palette PNG of object ids (valid: first frames only)
SOURCE/train/meta.json                                       the objects of every video
SOURCE/train_all_frames/JPEGImages/<video>/00000.jpg ...     every frame, if you have it (--split train_all_frames)
likewise valid, test, valid_all_frames, test_all_frames
"""


def add_options(parser: ArgumentParser) -> None:
    """Add the flags of this data set."""
    parser.add_argument("--split", default="train", choices=SPLITS, help="which folder")
    add_segment(parser)
    add_short_side(parser)


def add_segment(parser: ArgumentParser) -> None:
    """Add --segment."""
    parser.add_argument("--segment", type=int, default=64, metavar="T", help="frames a sample at most; 0: whole videos")


def add_short_side(parser: ArgumentParser) -> None:
    """Add --short-side."""
    parser.add_argument(
        "--short-side", type=int, metavar="N", help="scale frames down to N pixels on the shorter side, as JPEG anew"
    )


def check_numbers(options: Namespace) -> None:
    """Refuse a segment or a size that cannot be; raises `DataError`."""
    if options.segment < 0 or options.segment == 1:
        raise DataError(f"--segment {options.segment}: allowed is 0 (whole videos) or at least 2 frames")
    if options.short_side is not None and options.short_side < 16:
        raise DataError(f"--short-side {options.short_side}: allowed is a whole number of pixels from 16 on")


def items(source: Path, options: Namespace) -> list[Item]:
    """List (video, segment, segments, first frame, one behind its last) of a split, from the names of the frames."""
    if options.split not in SPLITS:
        raise DataError(f"YouTube-VOS has no split '{options.split}'; {closest(options.split, SPLITS)}")
    check_numbers(options)
    root = source / options.split / "JPEGImages"
    if not root.is_dir():
        raise folder_error(LAYOUT, f"no folder {root}")
    out: list[Item] = []
    videos = list_names(root)
    _check_complete(source, options.split, videos)
    for video in videos:
        count = len(list_names(root / video, [".jpg", ".jpeg"]))
        if not count:
            raise folder_error(LAYOUT, f"there are no .jpg frames in {root / video}")
        cuts = segments(count, options.segment)
        out += [(video, i, len(cuts), begin, end) for i, (begin, end) in enumerate(cuts)]
    if not out:
        raise folder_error(LAYOUT, f"there are no videos in {root}")
    return out


def _check_complete(source: Path, split: str, videos: list[str]) -> None:
    """Every video that the split's own meta.json lists must be there."""
    path = source / split / "meta.json"
    if not path.is_file():
        return
    missing = sorted(set(_videos(path)) - set(videos))
    if missing:
        raise folder_error(
            LAYOUT, f"{path} lists {len(missing)} videos that JPEGImages does not have, the first is {missing[0]}"
        )


def _videos(path: Path) -> dict[str, Any]:
    return _read_videos(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=2)  # a process reads some megabytes once, not for every video
def _read_videos(path: Path, _: int) -> dict[str, Any]:
    facts = read_facts(path)
    videos = facts.get("videos") if isinstance(facts, dict) else None
    if not isinstance(videos, dict):
        raise DataError(
            f'{path} is no meta.json of YouTube-VOS: it holds no {{"videos": {{video: {{"objects": ...}}}}}}'
        )
    return videos


def read(source: Path, item: Item, options: Namespace) -> Samples:
    """Make the sample of one segment."""
    video, segment, count, begin, end = (str(item[0]), *map(int, item[1:]))
    folder = source / options.split / "JPEGImages" / video
    names = list_names(folder, [".jpg", ".jpeg"])
    numbers = numbers_of(names)
    frames = load_frames([folder / n for n in names[begin:end]], short_side=options.short_side)
    step = mode([b - a for a, b in pairwise(numbers)] or [1])
    facts = {
        "video": video,
        "split": options.split,
        "segment": segment,
        "segments": count,
        "objects": _objects(source, options.split, video),
        "original_size": list(frames.original),
        **numbering(numbers[begin:end]),
    }
    stems = [Path(n).stem for n in names]
    clip = Clip(
        video=frames.video,
        labels=_labels(source, options.split, video, stems, (begin, end), frames.original, frames.size),
        name=(video if count == 1 else f"{video}/{segment:03d}",),
        fps=FPS / step if step > 0 else None,
    )
    yield key_of(video, f"{segment:03d}"), encode(clip, licence=LICENCE, images=frames.images, source=facts)


def _beside(source: Path, split: str, name: str) -> Path:
    """Find what the `_all_frames` folders share with the folder of every fifth frame."""
    own = source / split / name
    return own if own.exists() else source / split.removesuffix("_all_frames") / name


def _objects(source: Path, split: str, video: str) -> dict[str, Any]:
    """Return the category and the first frame of every object, by its id; empty where nothing is published."""
    path = _beside(source, split, "meta.json")
    if not path.is_file():
        return {}
    entry = _videos(path).get(video)
    if entry is None:
        return {}
    out = {}
    try:
        for number, fact in entry["objects"].items():
            frames = [int(f) for f in fact.get("frames", ())]
            out[str(int(number))] = {
                "category": str(fact.get("category", ""))[:80],
                "first_frame": min(frames, default=None),
            }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: the objects of the video {video} are not as published ({error})") from None
    return out


def _labels(
    source: Path,
    split: str,
    video: str,
    stems: list[str],
    span: tuple[int, int],
    original: tuple[int, int],
    size: tuple[int, int],
) -> Any:
    """Read the masks of the frames `span`: (1, T, H, W), 255 in frames without one; or none."""
    folder = _beside(source, split, "Annotations") / video
    if not folder.is_dir():
        if split == "train":
            raise folder_error(LAYOUT, f"there are no masks in {folder}")
        return None
    there = set(list_names(folder, [".png"]))
    wanted = stems[slice(*span)]
    labels = load_mask_stack([folder / f"{s}.png" if f"{s}.png" in there else None for s in wanted], original, size)
    if labels is not None and not split.startswith("train"):
        # Here a frame is annotated for the objects that first appear in it: what is not them is not said.
        first = next(i for i, s in enumerate(stems) if f"{s}.png" in there)
        for i in range(max(0, first + 1 - span[0]), labels.shape[1]):
            labels[0, i][labels[0, i] == 0] = VOID
    return labels


LICENCE = "YouTube-VOS: for non-commercial research, by the terms of its publisher; the videos belong to their owners"
DATASET = Dataset(
    name="youtube_vos",
    about="YouTube-VOS 2018/2019: 720p web videos, masks of objects; what contrastive random walks train on",
    licence=LICENCE,
    where="https://youtube-vos.org (free account); 3,471 train videos; train_all_frames is a download of its own",
    layout=LAYOUT,
    items=items,
    read=read,
    options=add_options,
)
