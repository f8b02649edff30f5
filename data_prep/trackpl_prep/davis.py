"""DAVIS-2017 as published: whole sequences, frames untouched, palette indices as labels (255 void)."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from trackpl.encoding import encode
from trackpl.errors import DataError, closest
from trackpl.types import Clip
from trackpl_prep.dataset import Dataset, Item, Samples, folder_error, key_of
from trackpl_prep.files.frames import list_names, load_frames, load_mask_stack, numbering, numbers_of, read_bytes

FPS = 24.0
RESOLUTIONS = ("480p", "Full-Resolution")
LAYOUT = """
SOURCE/JPEGImages/480p/<sequence>/00000.jpg ...      or Full-Resolution (--resolution)
SOURCE/Annotations/480p/<sequence>/00000.png ...     palette PNG: 0 background, ids 1.., 255 void
SOURCE/ImageSets/2017/train.txt val.txt              the sequences of each split, one a line
"""


def add_options(parser: ArgumentParser) -> None:
    """Add the flags of this data set."""
    parser.add_argument("--split", default="val", help="train, val or another list in ImageSets/2017")
    parser.add_argument("--resolution", default="480p", choices=RESOLUTIONS, help="480p is what is scored")


def items(source: Path, options: Namespace) -> list[Item]:
    """List the sequences of a split; each must have frames and masks."""
    if options.resolution not in RESOLUTIONS:
        raise DataError(f"DAVIS has no resolution '{options.resolution}'; {closest(options.resolution, RESOLUTIONS)}")
    lists = source / "ImageSets" / "2017"
    if not lists.is_dir():
        raise folder_error(LAYOUT, f"no folder {lists}")
    splits = [n.removesuffix(".txt") for n in list_names(lists, [".txt"])]
    if options.split not in splits:
        raise folder_error(LAYOUT, f"no {options.split}.txt in {lists}; {closest(options.split, splits)}")
    text = read_bytes(lists / f"{options.split}.txt", 2**20).decode(errors="replace")
    sequences = [line.strip() for line in text.splitlines() if line.strip()]
    if not sequences:
        raise folder_error(LAYOUT, f"{lists / options.split}.txt lists no sequences")
    for sequence in sequences:
        if Path(sequence).name != sequence or sequence.startswith("."):
            raise DataError(f"{lists / options.split}.txt names '{sequence[:60]}', which is no name of a sequence")
        for part in ("JPEGImages", "Annotations"):
            folder = source / part / options.resolution / sequence
            if not folder.is_dir():
                raise folder_error(LAYOUT, f"the {options.split} sequence {sequence} is missing: no folder {folder}")
    return [(s,) for s in sequences]


def read(source: Path, item: Item, options: Namespace) -> Samples:
    """Make the sample of one sequence."""
    sequence = str(item[0])
    folder = source / "JPEGImages" / options.resolution / sequence
    names = list_names(folder, [".jpg", ".jpeg"])
    if not names:
        raise folder_error(LAYOUT, f"there are no .jpg frames in {folder}")
    frames = load_frames([folder / n for n in names])
    masks = source / "Annotations" / options.resolution / sequence
    there = set(list_names(masks, [".png"]))
    stems = [Path(n).stem for n in names]
    if f"{stems[0]}.png" not in there:
        raise folder_error(LAYOUT, f"the first frame has no mask: {masks / stems[0]}.png is missing")
    labels = load_mask_stack(
        [masks / f"{s}.png" if f"{s}.png" in there else None for s in stems], frames.original, frames.size
    )
    clip = Clip(video=frames.video, labels=labels, name=(sequence,), fps=FPS)
    facts = {
        "video": sequence,
        "split": options.split,
        "resolution": options.resolution,
        **numbering(numbers_of(names)),
    }
    yield key_of(sequence), encode(clip, licence=LICENCE, images=frames.images, source=facts)


LICENCE = "DAVIS-2017: by the terms at https://davischallenge.org; please cite Perazzi 2016 and Pont-Tuset 2017"
DATASET = Dataset(
    name="davis2017",
    about="DAVIS-2017: sequences with masks of several objects, for label propagation (J&F)",
    licence=LICENCE,
    where="https://davischallenge.org/davis2017/code.html, 'TrainVal - Images and Annotations (480p)', 0.8 GB",
    layout=LAYOUT,
    items=items,
    benchmark=True,
    read=read,
    options=add_options,
    per_shard=16,
)
