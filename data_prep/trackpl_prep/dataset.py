"""What a converter is: a `Dataset` says what it reads, lists its items and turns one item into samples.

One module a data set; `trackpl_prep.convert` runs any of them over processes, machines and interruptions.
"""

from __future__ import annotations

import hashlib
import re
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trackpl.errors import DataError

Item = tuple[str | int, ...]
"""One piece of work: relative paths (POSIX) and numbers, so that the list of them can be hashed."""

Samples = Iterator[tuple[str, dict[str, bytes]]]
"""Samples as `trackpl.shards` writes them: key and members."""


def no_options(parser: ArgumentParser) -> None:
    """Add no options."""


def quality(text: str) -> int:
    """Read the argument of a --quality option."""
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 100:
        raise ArgumentTypeError(f"must be 1 to 100, got '{text}'")
    return int(text)


def quality_option(parser: ArgumentParser) -> None:
    """Add --quality, of the JPEG frames that a data set encodes."""
    text = "of the JPEG frames; below 95 colours have half the resolution: smaller, and faster to read"
    parser.add_argument("--quality", type=quality, default=95, metavar="Q", help=text)


@dataclass(frozen=True)
class Dataset:
    """One data set that can be made into shards.

    Attributes:
        name: what `trackpl data make` calls it.
        about: one line on what it holds.
        licence: as its publisher states it; it goes along with every sample.
        where: where to get it, and how large it is.
        layout: the folder that is expected, in a few lines.
        items: lists the pieces of work in a folder, cheaply and always in the same order; raises `DataError` where
            the folder is wrong or incomplete.
        read: makes the samples of one item, the same bytes each time; runs in other processes.
        options: adds the flags of this data set alone.
        per_shard: number of items a shard.
        variants: options that tell sets made from one folder apart, and so go into their names.
        benchmark: whether it is there to score on, whatever the split.
        version: another number when the same folder makes other bytes than before.
        needs_source: whether there is a folder to read at all.
    """

    name: str
    about: str
    licence: str
    where: str
    layout: str
    items: Callable[[Path, Namespace], list[Item]]
    read: Callable[[Path, Item, Namespace], Samples]
    options: Callable[[ArgumentParser], None] = no_options
    per_shard: int = 64
    variants: tuple[str, ...] = ("split",)
    version: int = 1
    benchmark: bool = False

    def scores(self, options: Namespace) -> bool:
        """Say whether what these options make is to score on, rather than to train on."""
        return self.benchmark or getattr(options, "split", None) in ("val", "valid", "validation", "test", "testing")

    needs_source: bool = True


def make_options(dataset: Dataset, **values: Any) -> Namespace:
    """Return the options of a data set: its defaults, changed by `values`."""
    parser = ArgumentParser(prog=dataset.name)
    dataset.options(parser)
    options = parser.parse_args([])
    for name, value in values.items():
        if not hasattr(options, name):
            raise DataError(f"the data set '{dataset.name}' has no option '{name}'")
        setattr(options, name, value)
    return options


def folder_error(layout: str, what: str) -> DataError:
    """Return the error for a folder that is not the data set, with the layout that was expected."""
    lines = "\n".join(f"  {line}" for line in layout.strip("\n").splitlines())
    return DataError(f"{what}; expected:\n{lines}")


def key_of(*parts: str | int) -> str:
    """Make a key of a shard from names: letters, digits, ``_`` and ``-``, at most 72.

    Other characters become ``_`` and long names are cut; a hash keeps names apart that this would make equal.
    """
    text = "-".join(map(str, parts))
    key = re.sub(r"[^A-Za-z0-9_-]", "_", text)
    if not key[:1].isalnum():
        key = f"x{key}"
    if key == text and len(key) <= 72:
        return key
    return f"{key[:63]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
