"""Read videos and folders of frames, a few frames at a time.

decord reads where it is installed and right, PyAV reads everything else: decord's batches break on rotated
phone videos, it counts the frames that an edit list (a trim in a phone's gallery) has cut away, and it rounds
10-bit video otherwise. So `read` gives the same frames with both. Rotation marked in a file or in a picture's
EXIF is applied; pixels are not stretched where they are not square.
"""

from __future__ import annotations

import bisect
import difflib
import importlib.metadata
import os
import re
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import av.error
import av.logging
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from trackpl.errors import VideoError

IMAGES = (".jpg", ".jpeg", ".png", ".webp")
BACKENDS = ("auto", "decord", "pyav")
FOLDER_FPS = 24.0
"""Frames a second of a folder of frames, which does not say."""


FEW = 16
"""Reads of more frames than this are not kept."""
RECENT_BYTES = 512 << 20
"""Memory for frames decoded lately."""


class VideoReader:
    """A video of `frames` frames of `size` (H, W) pixels, `fps` a second; `read` decodes some of them."""

    def __init__(self, path: Path, frames: int, fps: float, size: tuple[int, int]) -> None:
        self.path, self.frames, self.fps, self.size = path, frames, fps, size
        self._recent: OrderedDict[int, Tensor] = OrderedDict()  # least recently used first
        self._last = -1  # the latest frame decoded

    def __len__(self) -> int:
        return self.frames

    def read(self, indices: Sequence[int]) -> Tensor:
        """Decode frames in the order asked for, repeats allowed.

        Returns:
            uint8 RGB (n, 3, H, W).

        Raises:
            VideoError: an index outside the video, or a frame that is broken.
        """
        wanted = [int(i) for i in indices]
        bad = [i for i in wanted if not 0 <= i < self.frames]
        if bad:
            raise VideoError(f"frame {bad[0]} is outside {self.path}: allowed 0 to {self.frames - 1}")
        if not wanted:
            return torch.empty((0, 3, *self.size), dtype=torch.uint8)
        if len(set(wanted)) <= FEW:
            return self._read_few(wanted)
        out = torch.empty((len(wanted), 3, *self.size), dtype=torch.uint8)
        for begin in range(0, len(wanted), FEW):  # in parts: the pixels are never held twice
            out[begin : begin + FEW] = self._planes(wanted[begin : begin + FEW])
        return out

    def _planes(self, wanted: list[int]) -> Tensor:
        return torch.from_numpy(self._read(wanted)).permute(0, 3, 1, 2)

    def _read_few(self, wanted: list[int]) -> Tensor:
        """Keep what was decoded: a tracker that looks at t, t-1, t-2, t-4, ... asks again and again."""
        missing = {i for i in wanted if i not in self._recent}
        if missing and max(missing) < self._last:
            # Going back costs the decoding of all from the key frame on: once for several frames.
            missing |= {i for i in range(max(0, min(missing) - FEW), min(missing)) if i not in self._recent}
        if missing:
            order = sorted(missing)
            # Copies, or one frame would keep all of its batch in memory.
            copies = [image.clone(memory_format=torch.contiguous_format) for image in self._planes(order)]
            self._recent.update(zip(order, copies, strict=True))
            self._last = order[-1]
        images = torch.stack([self._recent[i] for i in wanted])
        for i in wanted:
            self._recent.move_to_end(i)
        while len(self._recent) * images[0].nbytes > RECENT_BYTES:
            self._recent.popitem(last=False)
        return images

    def _read(self, wanted: list[int]) -> np.ndarray:
        """Return uint8 (n, H, W, 3) of valid indices."""
        raise TypeError(f"{type(self).__name__} must define _read")


def open_video(path: str | Path, backend: str = "auto") -> VideoReader:
    """Open a video file, or a folder of jpg, png and webp frames in natural order.

    Args:
        path: a file that libav reads, or a folder of pictures of one size.
        backend: "auto" (decord where installed and right, else PyAV), "decord" or "pyav"; not for folders.

    Raises:
        VideoError: nothing there, no video in it, cut off, broken, or pictures of several sizes.
    """
    if backend not in BACKENDS:
        raise VideoError(f"unknown video back end '{backend}': allowed: {', '.join(BACKENDS)}")
    path = Path(path)
    if not path.exists():
        raise VideoError(f"no video at {path}: {_instead(path)}")
    if not os.access(path, os.R_OK):
        raise VideoError(f"{path} may not be read: change its permissions")
    if path.is_dir():
        return _Folder(path)
    index = _index(path)
    if backend == "pyav":
        return _PyAV(path, index)
    decord = _decord()
    if decord is None and backend == "decord":
        raise VideoError("decord is not installed: pip install decord2, or use the back end 'pyav'")
    reader = _Decord(path, index, decord) if decord is not None and index.plain else None
    if reader is not None and reader.reads_it():
        return reader
    if backend == "decord":
        raise VideoError(
            f"decord does not read {path} faithfully (rotated, trimmed, not 8-bit or of an odd width): use 'pyav'"
        )
    return _PyAV(path, index)


def _instead(path: Path) -> str:
    if "://" in str(path) or re.match(r"\w{2,}:/", str(path)):
        return "addresses are not read; download it and give the file"
    if not path.parent.is_dir():
        return f"there is no folder {path.parent}"
    found = difflib.get_close_matches(path.name, os.listdir(path.parent), n=1)
    return f"did you mean '{path.parent / found[0]}'?" if found else "give a video file or a folder of frames"


# Folders of frames ------------------------------------------------------------------------------------------


class _Folder(VideoReader):
    def __init__(self, path: Path) -> None:
        entries = [p for p in path.iterdir() if not p.name.startswith(".")]
        self.files = sorted((p for p in entries if p.suffix.lower() in IMAGES), key=_natural)
        if not self.files:
            what = f"none of its {len(entries)} entries is a picture" if entries else "it is empty"
            raise VideoError(f"no frames in the folder {path}: {what}; allowed: {', '.join(IMAGES)}")
        size = _image_size(self.files[0])
        for file in self.files[1:]:
            if (other := _image_size(file)) != size:
                raise VideoError(
                    f"frames of different sizes in {path}: {self.files[0].name} is {size[1]}x{size[0]}, "
                    f"{file.name} is {other[1]}x{other[0]}; all must be the same"
                )
        super().__init__(path, len(self.files), FOLDER_FPS, size)

    def _read(self, wanted: list[int]) -> np.ndarray:
        return np.stack([_read_image(self.files[i]) for i in wanted])


def _natural(path: Path) -> tuple[list[tuple[int, int, str]], str]:
    """Sort key by which 9.jpg comes before 10.jpg."""
    parts = re.findall(r"\d+|\D+", path.stem.lower())
    return [(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in parts], path.name


@contextmanager
def _image(path: Path) -> Iterator[Image.Image]:
    try:
        # Named formats only: PIL would otherwise look into the file and may start Ghostscript.
        with Image.open(path, formats=("JPEG", "PNG", "WEBP")) as image:
            yield image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise VideoError(f"{path} is not a readable picture: {_line(error)}") from error


def _image_size(path: Path) -> tuple[int, int]:
    with _image(path) as image:
        sideways = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
        return (image.width, image.height) if sideways else (image.height, image.width)


def _read_image(path: Path) -> np.ndarray:
    with _image(path) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


# Files ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Index:
    """What a pass over a file's packets tells, without decoding them."""

    frames: int
    fps: float
    size: tuple[int, int]  # after rotation
    turns: int  # quarter turns anticlockwise to show it upright
    pts: tuple[int, ...] | None  # time stamps in order of display; none where they do not tell frames apart
    keys: tuple[int, ...]  # frames from which decoding can start, in order, the first always
    plain: bool  # nothing in it that decord is known to get wrong


def _open(path: Path) -> Any:
    # An absolute path cannot be taken for an address, and a play list cannot lead elsewhere.
    return av.open(str(path.resolve()), options={"protocol_whitelist": "file"})


def _index(path: Path) -> _Index:
    try:
        with _open(path) as container:
            stream = container.streams.best("video")
            if stream is None or stream.disposition & stream.disposition.__class__.attached_pic:
                raise VideoError(f"{path} has no video in it, only {_kinds(container)}")
            packets = [(p.pts, p.is_keyframe) for p in container.demux(stream) if p.size and not p.is_discard]
            fps = stream.average_rate or stream.guessed_rate
            picture = container.format.name == "image2" or container.format.name.endswith("_pipe")
        if _cut_off(path):
            raise VideoError(
                f"{path} is cut off: {_readable(path, packets)} frames can be read and the rest is missing; "
                f"get the whole file, or keep what is left with: ffmpeg -i {path.name} whole.mp4"
            )
        first = _first_frame(path)
    except (av.error.FFmpegError, OSError) as error:
        raise VideoError(_unreadable(path, error)) from error
    if first is None:
        raise VideoError(f"{path} has no frames in it: it may be cut off; get the whole file")
    pts = tuple(sorted(p for p, _ in packets if p is not None))
    if len(set(pts)) == len(packets):
        keys = {p for p, key in packets if key}
        starts = tuple(i for i, p in enumerate(pts) if p in keys and i) if pts else ()
        frames, stamps, keyed = len(pts), pts, (0, *starts)
    else:
        frames, stamps, keyed = _count(path), None, (0,)
    turns = round(first.rotation / 90) % 4
    size = (first.width, first.height) if turns % 2 else (first.height, first.width)
    eight = all(c.bits == 8 for c in first.format.components)
    plain = stamps is not None and turns == 0 and eight and not picture
    return _Index(frames, float(fps or FOLDER_FPS), size, turns, stamps, keyed, plain)


def _first_frame(path: Path) -> Any:
    with _open(path) as container:
        return next(container.decode(container.streams.best("video")), None)


def _count(path: Path) -> int:
    with _open(path) as container:
        return sum(1 for _ in container.decode(container.streams.best("video")))


def _readable(path: Path, packets: list[tuple[int | None, bool]]) -> int:
    """Count the frames that a cut-off file still gives, decoding only what follows its last key frame."""
    keys = [p for p, key in packets if key and p is not None]
    start = keys[-1] if keys else 0
    seen = 0
    with _open(path) as container:
        stream = container.streams.best("video")
        container.seek(start, stream=stream)
        try:
            for frame in container.decode(stream):
                seen += frame.pts is not None and frame.pts >= start
        except av.error.FFmpegError:
            seen += sum(1 for _ in stream.codec_context.decode(None))
    return sum(1 for p, _ in packets if p is not None and p < start) + seen


def _kinds(container: Any) -> str:
    return ", ".join(sorted({s.type for s in container.streams})) or "nothing"


def _line(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())[:160]


def _unreadable(path: Path, error: BaseException) -> str:
    with path.open("rb") as file:
        head = file.read(4096)
    if not head:
        return f"{path} is empty (0 bytes): get the file again"
    if head[4:8] == b"ftyp":
        return f"{path} is cut off: its header (moov) is missing and nothing can be read; get the whole file"
    if not re.search(rb"[\x00-\x08\x0e-\x1f]", head):
        return f"{path} is a text file, not a video: give a video file or a folder of frames"
    return f"{path} cannot be read as a video: {_line(error)}"


def _cut_off(path: Path) -> bool:
    """Whether the container (mp4, mov, mkv, webm, avi) says that it is longer than the file."""
    total = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(64)
        if head[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"wide", b"skip"):
            return _end_of_boxes(file, total) > total
    if head[:4] == b"RIFF":
        return 8 + int.from_bytes(head[4:8], "little") > total
    if head[:4] == b"\x1a\x45\xdf\xa3":
        start, size = _ebml_size(head, 4)
        start, size = _ebml_size(head, start + (size or 0) + 4)
        return size is not None and start + size > total
    return False


def _end_of_boxes(file: Any, total: int) -> int:
    end = 0
    while end + 8 <= total:
        file.seek(end)
        head = file.read(16)
        size = int.from_bytes(head[:4], "big")
        size = int.from_bytes(head[8:16], "big") if size == 1 else size
        if size < 8:  # 0: the last box, up to the end of the file; other: rubbish after it
            return total
        end += size
    return end


def _ebml_size(head: bytes, at: int) -> tuple[int, int | None]:
    """Read the length field of a Matroska element: where its content starts, and its size if known."""
    if at >= len(head) or not head[at]:
        return at, None
    width = 9 - head[at].bit_length()
    mask = (1 << 7 * width) - 1
    value = int.from_bytes(head[at : at + width], "big") & mask
    return at + width, None if value == mask else value


class _PyAV(VideoReader):
    """Decodes onwards from where it stands, and from the nearest key frame where that is closer."""

    def __init__(self, path: Path, index: _Index) -> None:
        super().__init__(path, index.frames, index.fps, index.size)
        self.index = index
        self.number = {p: i for i, p in enumerate(index.pts)} if index.pts else None
        self.container: Any = None
        self.coming: Iterator[tuple[int, Any]] = iter(())
        self.at = index.frames  # the frame that comes next; past the end: nothing is open

    def _read(self, wanted: list[int]) -> np.ndarray:
        images: dict[int, np.ndarray] = {}
        try:
            for i in sorted(set(wanted)):
                image = np.rot90(self._frame(i).to_ndarray(format="rgb24"), self.index.turns)
                if image.shape[:2] != self.size:
                    h, w = image.shape[:2]
                    raise VideoError(f"frame {i} of {self.path} is {w}x{h}, the first {self.size[1]}x{self.size[0]}")
                images[i] = image
        except av.error.FFmpegError as error:
            raise VideoError(f"frame {i} of {self.path} is broken: {_line(error)}; get the file again") from error
        return np.stack([images[i] for i in wanted])

    def _frame(self, i: int) -> Any:
        start = self.index.keys[bisect.bisect_right(self.index.keys, i) - 1]
        if not self.at <= i or start > self.at:
            self._seek(start)
        for number, frame in self.coming:
            self.at = number + 1
            if number == i:
                return frame
            if number > i:
                break
        self.at = self.frames
        raise VideoError(f"frame {i} of {self.path} is missing: the file is broken; get it again")

    def _seek(self, start: int) -> None:
        if self.container is not None:
            self.container.close()
        self.container = _open(self.path)
        stream = self.container.streams.best("video")
        stream.codec_context.thread_count = 1
        if start and self.index.pts:
            self.container.seek(self.index.pts[start], stream=stream)
        self.coming, self.at = self._decode(stream), start

    def _decode(self, stream: Any) -> Iterator[tuple[int, Any]]:
        for count, frame in enumerate(self.container.decode(stream)):
            if self.number is None:
                yield count, frame
            elif frame.pts in self.number:
                yield self.number[frame.pts], frame


class _Decord(VideoReader):
    def __init__(self, path: Path, index: _Index, decord: Any) -> None:
        super().__init__(path, index.frames, index.fps, index.size)
        try:
            self.file = decord.VideoReader(str(path.resolve()), ctx=decord.cpu(0), num_threads=1)
        except (RuntimeError, decord.DECORDError) as error:
            raise VideoError(f"decord cannot open {path}: use the back end 'pyav'") from error
        self.error = decord.DECORDError

    def reads_it(self) -> bool:
        """Say whether it finds every frame, and can give one: of some widths (16, 32, 96, 144 ...) it cannot."""
        try:
            return len(self.file) == self.frames and self.file.get_batch([0]).shape[0] == 1
        except self.error:
            return False

    def _read(self, wanted: list[int]) -> np.ndarray:
        try:
            batch = self.file.get_batch(wanted)
        except self.error as error:
            span = f"{min(wanted)} to {max(wanted)}"
            raise VideoError(f"a frame of {self.path} among {span} is broken: get the file again") from error
        return batch.asnumpy() if hasattr(batch, "asnumpy") else np.asarray(batch)  # the user may have set a bridge


def _decord() -> Any:
    """Import decord; none where it is not installed or does not start."""
    try:
        import decord
    except (ImportError, OSError, RuntimeError):
        return None
    names = {d.name.lower() for d in importlib.metadata.distributions(name="decord")} | {
        d.name.lower() for d in importlib.metadata.distributions(name="decord2")
    }
    if len(names) > 1:
        raise VideoError(
            "decord and decord2 are both installed and overwrite each other: "
            "pip uninstall decord decord2, then pip install decord2"
        )
    decord.logging.set_level(decord.logging.QUIET)
    return decord
