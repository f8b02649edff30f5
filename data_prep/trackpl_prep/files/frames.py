"""Pictures on disk to the frames of a sample: their own bytes wherever a reader of shards can decode them.

Shared by the converters of data sets that are folders of frames. Pictures are untrusted: bounded before they are
decoded, and what a parser says about broken ones becomes a `DataError` that names the file.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from trackpl.errors import DataError
from trackpl.images import MAX_AREA, MAX_SIDE, decode_image, encode_jpeg, encode_png
from trackpl.parsing import read_json

MAX_PICTURE = 2**28  # bytes of one file
VOID = 255
_FORMATS = ("JPEG", "PNG", "WEBP")


@dataclass(frozen=True)
class Frames:
    """Encoded frames of one size."""

    images: list[bytes]
    size: tuple[int, int]  # H, W as stored
    original: tuple[int, int]  # H, W before down-scaling
    changed: int  # how many are not the bytes of the file

    @property
    def video(self) -> Tensor:
        """Stand in for the pixels (1, T, 3, H, W) where `encode` stores `images` instead; takes no memory."""
        return torch.zeros(1, dtype=torch.uint8).expand(1, len(self.images), 3, *self.size)


def read_bytes(path: Path, limit: int = MAX_PICTURE) -> bytes:
    """Read a file of at most `limit` bytes; raises `DataError` if it is missing or larger."""
    try:
        size = path.stat().st_size
        if size > limit:
            raise DataError(f"{path} has {size} bytes, at most {limit} are read")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None


def read_facts(path: Path, limit: int = 2**28) -> Any:
    """Read a JSON file; raises `DataError` if it is missing, broken or too large."""
    try:
        return read_json(read_bytes(path, limit), limit)
    except ValueError as error:
        raise DataError(f"{path} {str(error)[:160]}") from None


def list_names(folder: Path, suffixes: Iterable[str] = ()) -> list[str]:
    """List the names in a folder in natural order (9 before 10): folders, or files with one of the suffixes."""
    kinds = tuple(suffixes)
    try:
        with os.scandir(folder) as entries:
            names = [
                e.name
                for e in entries
                if not e.name.startswith(".") and (e.name.lower().endswith(kinds) if kinds else e.is_dir())
            ]
    except OSError as error:
        raise DataError(f"the folder {folder} cannot be read: {error.strerror or error}") from None
    return sorted(names, key=natural)


def natural(name: str) -> tuple[list[tuple[int, int, str]], str]:
    """Sort key by which 9.jpg comes before 10.jpg."""
    parts = re.findall(r"\d+|\D+", name.lower())
    return [(0, int(p), "") if p.isdecimal() and len(p) < 20 else (1, 0, p) for p in parts], name


def numbers_of(files: Sequence[str]) -> list[int]:
    """Return the frame number at the end of every file's stem; raises `DataError` where there is none."""
    out = []
    for file in files:
        match = re.search(r"(\d{1,15})\.\w+$", file)
        if match is None:
            raise DataError(f"the frame {file} has no number at the end of its name")
        out.append(int(match[1]))
    return out


def numbering(numbers: Sequence[int]) -> dict[str, Any]:
    """Say which frames of the original a sample holds, small enough for its meta data however many they are."""
    steps = {b - a for a, b in pairwise(numbers)}
    facts: dict[str, Any] = {"first_frame": numbers[0], "frame_step": steps.pop() if len(steps) == 1 else None}
    if len(numbers) <= 4096:
        facts["frame_numbers"] = list(numbers)
    return facts


def segments(count: int, length: int) -> list[tuple[int, int]]:
    """Cut `count` frames into consecutive [begin, end) of `length`; 0: one piece.

    What is left over makes a shorter segment of its own, unless it is a single frame: that joins the one before it,
    because one frame has no motion.
    """
    if length <= 0 or count <= length:
        return [(0, count)]
    cuts = [*range(0, count, length), count]
    if cuts[-1] - cuts[-2] == 1:
        del cuts[-2]
    return list(pairwise(cuts))


def scaled(size: tuple[int, int], short_side: int | None) -> tuple[int, int]:
    """Return (H, W) with the shorter side at most `short_side`, never larger than before."""
    short = min(size)
    if not short_side or short <= short_side:
        return size
    h, w = (max(1, round(s * short_side / short)) for s in size)
    return h, w


def load_frames(
    files: Sequence[Path], *, short_side: int | None = None, quality: int | None = 95, keep_png: bool = True
) -> Frames:
    """Read the frames of a clip, keeping their bytes untouched where a shard may hold them.

    Encoded anew, as JPEG of `quality` (none: PNG), are frames that are to be scaled down, WebP, pictures that EXIF
    turns, and PNG where not `keep_png`. Every frame is decoded once, so that a broken file shows here.

    Raises:
        DataError: a file that is missing, broken or too large, or frames of different sizes; names the file.
    """
    images, changed, first = [], 0, (0, 0)
    for i, path in enumerate(files):
        data = read_bytes(path)
        kind, size, turned = _inspect(data, path)
        if i == 0:
            first = size
        elif size != first:
            raise DataError(
                f"frames of different sizes: {files[0]} is {first[1]}x{first[0]}, {path.name} is {size[1]}x{size[0]}; "
                "all of a video must be the same"
            )
        target = scaled(size, short_side)
        if target == size and not turned and (kind == "JPEG" or (kind == "PNG" and keep_png)):
            decode_image(data, str(path))
            images.append(data)
        else:
            images.append(encode_pixels(_pixels(data, path, target), quality))
            changed += 1
    if not images:
        raise DataError("a clip needs frames, got none")
    return Frames(images, scaled(first, short_side), first, changed)


def encode_pixels(pixels: np.ndarray, quality: int | None) -> bytes:
    """Encode (H, W, 3) uint8 RGB as JPEG, or as PNG where `quality` is none."""
    if quality is None:
        return encode_png(pixels)
    return encode_jpeg(pixels, quality)


def resize_pixels(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Scale (H, W, 3) uint8 to (H, W) `size` with antialiasing; raster coordinates are multiplied."""
    if pixels.shape[:2] == size:
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((size[1], size[0]), Image.Resampling.LANCZOS))


@contextmanager
def opened(data: bytes, name: Path | str, formats: tuple[str, ...] = _FORMATS) -> Iterator[Image.Image]:
    """Open a picture of one of the formats; whatever goes wrong with it becomes a `DataError` that names it."""
    try:
        with Image.open(io.BytesIO(data), formats=formats) as image:
            if max(image.size) > MAX_SIDE or image.width * image.height > MAX_AREA:
                raise DataError(
                    f"{name} is {image.width}x{image.height}; at most {MAX_SIDE} pixels a side and {MAX_AREA} are read"
                )
            yield image
    except DataError:
        raise
    except Exception as error:  # PIL lets through whatever its parsers stumble over
        raise DataError(f"{name} is not a readable picture ({', '.join(formats)}): {_line(error)}") from None


def _inspect(data: bytes, path: Path) -> tuple[str, tuple[int, int], bool]:
    """Return the format, the size (H, W) shown and whether EXIF turns or mirrors it, from the header."""
    with opened(data, path) as image:
        if image.mode[0] in "IF":
            raise DataError(f"{path} has {image.mode} pixels; frames must have 8 bits a channel")
        told = image.format != "PNG" or "exif" in image.info  # PIL would decode a whole PNG to look for it
        h, w, turn = image.height, image.width, image.getexif().get(0x0112, 1) if told else 1
        return str(image.format), (w, h) if turn in (5, 6, 7, 8) else (h, w), turn in range(2, 9)


def _pixels(data: bytes, path: Path, size: tuple[int, int]) -> np.ndarray:
    """Decode upright and scaled to `size`: (H, W, 3) uint8."""
    with opened(data, path) as image:
        return resize_pixels(np.asarray(ImageOps.exif_transpose(image).convert("RGB")), size)


def load_labels(path: Path, original: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """Read a mask of indices (palette or grey PNG) as uint8 (H, W) of `size`, scaled by nearest neighbours.

    Raises:
        DataError: no readable PNG, colours instead of indices, or not of the size of its frame, `original`.
    """
    with opened(read_bytes(path), f"the mask {path}", ("PNG",)) as image:
        h, w = original
        if image.size != (w, h):
            raise DataError(f"the mask {path} is {image.width}x{image.height}, its frame {w}x{h}")
        if image.mode not in ("P", "L"):
            raise DataError(f"the mask {path} has {image.mode} pixels; a palette or grey PNG of object ids is needed")
        if size != original:
            image = image.resize((size[1], size[0]), Image.Resampling.NEAREST)
        return np.array(image, dtype=np.uint8)


def load_mask_stack(files: Sequence[Path | None], original: tuple[int, int], size: tuple[int, int]) -> Tensor | None:
    """Read the masks of a clip as (1, T, H, W) uint8, 255 in frames without one; none if there are none at all."""
    if not any(files):
        return None
    out = np.full((len(files), *size), VOID, np.uint8)
    for i, file in enumerate(files):
        if file is not None:
            out[i] = load_labels(file, original, size)
    return torch.from_numpy(out)[None]


def _line(error: BaseException) -> str:
    return " ".join((getattr(error, "strerror", None) or str(error) or type(error).__name__).split())[:160]
