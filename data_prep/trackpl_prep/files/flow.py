"""Optical flow in files, `.flo` and KITTI's 16-bit PNG, and clips with such a flow as samples.

A flow is (H, W, 2) float32 of (dx, dy) in pixels: the pixel with centre c of the first frame lies at c + flow in the
second one. Every reader takes bytes or a path and gives numbers or a `DataError` that names the file.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trackpl.errors import DataError

MAX_SIDE, MAX_AREA = 8192, 2**24  # of a flow that is read
MAX_FILE = 2**28  # bytes of an image or a flow
_MAGIC = struct.pack("<f", 202021.25)  # "PIEH"
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG16 = b"\x10\x02\x00\x00"  # 16 bits, RGB, the only compression and filter method there is


def read_file(path: str | Path, limit: int = MAX_FILE) -> bytes:
    """Read a whole file of at most `limit` bytes; raises `DataError` that names it."""
    try:
        with open(path, "rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
    if len(data) > limit:
        raise DataError(f"{path} is larger than the {limit} bytes that are read of such a file")
    return data


def read_flo(source: str | Path | bytes, name: str = "the flow") -> np.ndarray:
    """Read a Middlebury `.flo` file, as Sintel and Flying Chairs use: (H, W, 2) float32 pixels.

    Args:
        source: path, or the bytes of a file called `name`.
        name: what messages call the bytes; a path is called by itself.

    Raises:
        DataError: no `.flo` file, not exactly as long as its header says, or numbers that are not finite.
    """
    data, name = _data(source, name)
    if data[:4] != _MAGIC or len(data) < 12:
        raise DataError(f"{name} is no .flo file; it begins with {data[:4]!r} instead of {_MAGIC!r}")
    w, h = struct.unpack_from("<ii", data, 4)
    _check_size(h, w, name)
    if len(data) != 12 + 8 * h * w:
        raise DataError(f"{name} says {h}x{w} pixels, which take {12 + 8 * h * w} bytes, but has {len(data)}")
    flow = np.frombuffer(data, "<f4", offset=12).reshape(h, w, 2)
    if not np.isfinite(flow).all():
        raise DataError(f"{name} holds numbers that are not finite")
    return flow.astype(np.float32)


def write_flo(flow: np.ndarray) -> bytes:
    """Return the `.flo` file of a flow (H, W, 2)."""
    h, w = _flow_size(flow)
    return _MAGIC + struct.pack("<ii", w, h) + np.ascontiguousarray(flow, "<f4").tobytes()


def read_kitti_flow(source: str | Path | bytes, name: str = "the flow") -> tuple[np.ndarray, np.ndarray]:
    """Read KITTI's flow map, a 16-bit RGB PNG: flow (H, W, 2) float32 pixels, 0 where unknown, and valid (H, W) bool.

    Red and green are 64 dx + 2^15 and 64 dy + 2^15, blue is not 0 where the flow is known. Pillow cuts such images to
    8 bits, so kornia's decoder reads them.

    Raises:
        DataError: no such PNG, broken, or too large.
    """
    from kornia_rs.io import decode_image_png_u16

    data, name = _data(source, name)
    if data[:8] != _PNG or data[12:16] != b"IHDR" or len(data) < 29:
        raise DataError(f"{name} is no PNG image; it begins with {data[:4]!r}")
    w, h = struct.unpack_from(">II", data, 16)
    _check_size(h, w, name)
    if data[24:28] != _PNG16:
        raise DataError(
            f"{name} has {data[24]} bits and colour type {data[25]}; flow maps of KITTI have 16 and 2 (RGB)"
        )
    try:
        codes = decode_image_png_u16(data, (h, w), "rgb")
    except Exception as error:  # the decoder raises nothing more exact
        raise DataError(f"{name} is no whole PNG image ({str(error).strip()})") from None
    valid = codes[..., 2] > 0
    flow = (codes[..., :2].astype(np.float32) - 32768) / 64
    return flow * valid[..., None], valid


def write_kitti_flow(flow: np.ndarray, valid: np.ndarray | None = None) -> bytes:
    """Return KITTI's flow map, as its server wants it: flow (H, W, 2) rounded to 1/64 px and cut to [-512, 512) px.

    Args:
        flow: finite where valid.
        valid: (H, W) bool, where the flow is known; none: everywhere. Elsewhere all three channels are 0.

    Raises:
        DataError: a flow of another shape, or not finite where it is valid.
    """
    h, w = _flow_size(flow)
    known = np.ones((h, w), bool) if valid is None else np.asarray(valid, bool)
    if known.shape != (h, w):
        raise DataError(f"valid is {known.shape}, expected {(h, w)}")
    values = np.where(known[..., None], flow, 0).astype(np.float64)
    if not np.isfinite(values).all():
        raise DataError("the flow must be finite where it is valid")
    codes = np.ones((h, w, 3))
    codes[..., :2] = np.clip(np.rint(values * 64 + 32768), 0, 65535)
    rows = (codes * known[..., None]).astype(">u2").reshape(h, -1).view(np.uint8)
    lines = np.empty((h, 1 + rows.shape[1]), np.uint8)
    lines[:, 0] = 2  # the filter "up": each row is the difference to the one above
    lines[0, 1:], lines[1:, 1:] = rows[0], rows[1:] - rows[:-1]
    chunks = ((b"IHDR", struct.pack(">II", w, h) + _PNG16 + b"\0"), (b"IDAT", zlib.compress(lines.tobytes(), 6)))
    return _PNG + b"".join(_chunk(kind, data) for kind, data in (*chunks, (b"IEND", b"")))


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _data(source: str | Path | bytes, name: str) -> tuple[bytes, str]:
    return (source, name) if isinstance(source, bytes) else (read_file(source), str(source))


def _flow_size(flow: np.ndarray) -> tuple[int, int]:
    if flow.ndim != 3 or flow.shape[2] != 2:
        raise DataError(f"a flow has the shape (H, W, 2), got {flow.shape}")
    _check_size(flow.shape[0], flow.shape[1], "the flow")
    return flow.shape[0], flow.shape[1]


def _check_size(h: int, w: int, name: str) -> None:
    if not 0 < h <= MAX_SIDE or not 0 < w <= MAX_SIDE or h * w > MAX_AREA:
        raise DataError(f"{name} is {h}x{w}; flows of 1 to {MAX_SIDE} pixels a side and {MAX_AREA} in all are read")


# Samples -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Motion:
    """The flow of one frame pair of a clip, as (H, W) arrays."""

    pair: tuple[int, int]  # frames (s, t) of the clip
    flow: np.ndarray  # (H, W, 2) float32 pixels
    visible: np.ndarray | None = None  # bool: frame t shows the pixel; of all pairs of a clip, or of none
    valid: np.ndarray | None = None  # bool: the flow is known; of all pairs of a clip, or of none


def flow_sample(
    frames: Sequence[bytes] | np.ndarray,
    motions: Sequence[Motion],
    *,
    name: str,
    licence: str,
    fps: float | None = None,
    source: Mapping[str, Any] | None = None,
) -> dict[str, bytes]:
    """Make a sample of frames and their flow, both without loss.

    Args:
        frames: JPEG or PNG bytes, which are kept as they are, or pixels (T, H, W, 3) uint8, which become PNG.
        motions: flow of frame pairs.
        name: of the clip, in results and messages.
        licence: goes along with the sample.
        fps: frames a second.
        source: facts of the original.

    Raises:
        DataError: images that cannot be read, or sizes that differ.
    """
    import torch

    from trackpl.encoding import decode_image, encode
    from trackpl.types import Clip, Flow

    if isinstance(frames, np.ndarray):
        originals, pixels = None, frames
    else:
        originals = list(frames)
        pixels = _stack([decode_image(x, f"{name}, frame {i}") for i, x in enumerate(originals)], name)
    size = pixels.shape[1:3]
    for m in motions:
        for what, array in (("flow", m.flow[..., 0]), ("visible mask", m.visible), ("valid mask", m.valid)):
            if array is not None and array.shape != size:
                raise DataError(f"{name}: the {what} of the pair {m.pair} is {array.shape}, its frames {size}")

    def masks(field: str) -> Any:
        values = [getattr(m, field) for m in motions]
        return None if values[0] is None else torch.from_numpy(np.stack(values))[None]

    flow = None
    if motions:
        xy = torch.from_numpy(np.stack([m.flow.transpose(2, 0, 1) for m in motions]))[None]
        flow = Flow(xy, tuple(m.pair for m in motions), visible=masks("visible"), valid=masks("valid"))
    video = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))[None]
    clip = Clip(video, flow=flow, name=(name,), fps=fps)
    return encode(clip, None, licence, images=originals, exact_flow=True, source=source)


def _stack(frames: Sequence[np.ndarray], name: str) -> np.ndarray:
    for i, frame in enumerate(frames):
        if frame.shape != frames[0].shape:
            sizes = " and ".join("x".join(map(str, f.shape[:2])) for f in (frames[0], frame))
            raise DataError(f"{name}: the frames 0 and {i} differ in size, {sizes}")
    return np.stack(frames)
