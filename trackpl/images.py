"""Images from anybody: JPEG and PNG bytes to RGB pixels, bounded before anything is decoded."""

from __future__ import annotations

import io

import numpy as np
import simplejpeg
from PIL import Image

from trackpl.errors import DataError

MAX_SIDE, MAX_AREA = 8192, 2**26  # of an image that is decoded
_PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"


def decode_image(data: bytes | memoryview, name: str = "image", out: np.ndarray | None = None) -> np.ndarray:
    """Decode JPEG or PNG bytes to (H, W, 3) uint8 RGB, into `out` where it is given; told apart by content.

    Grey, palette and CMYK images become RGB; transparency is dropped.

    Raises:
        DataError: neither of the two, broken, too large, or not of the size of `out`; the message begins with `name`.
    """
    size = image_size(data, name)
    if out is not None and out.shape != (*size, 3):
        raise DataError(f"{name} is {size[0]}x{size[1]}, expected {out.shape[0]}x{out.shape[1]}")
    pixels = np.empty((*size, 3), np.uint8) if out is None else out
    try:
        if data[:2] == b"\xff\xd8" and simplejpeg.decode_jpeg_header(data)[2] not in ("CMYK", "YCCK"):
            simplejpeg.decode_jpeg(data, "RGB", buffer=pixels)
        else:
            with Image.open(io.BytesIO(data), formats=["PNG", "JPEG"]) as image:
                pixels[:] = np.asarray(image.convert("RGB"))
    except (ValueError, OSError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise DataError(f"{name} is no whole image ({str(error).strip()})") from None
    return pixels


def image_size(data: bytes | memoryview, name: str = "image") -> tuple[int, int]:
    """Return height and width of JPEG or PNG bytes from their header; raises as `decode_image` does."""
    if bytes(data[:16]) == _PNG and len(data) >= 24:
        w, h = (int.from_bytes(data[i : i + 4], "big") for i in (16, 20))
    elif bytes(data[:2]) == b"\xff\xd8":
        try:
            h, w = simplejpeg.decode_jpeg_header(data)[:2]
        except ValueError as error:
            raise DataError(f"{name} is no whole JPEG ({str(error).strip()})") from None
    else:
        raise DataError(f"{name} is neither a JPEG nor a PNG image; it begins with {bytes(data[:4])!r}")
    if not 0 < h <= MAX_SIDE or not 0 < w <= MAX_SIDE or h * w > MAX_AREA:
        raise DataError(f"{name} is {h}x{w}; images of 1 to {MAX_SIDE} pixels a side and {MAX_AREA} in all are read")
    return h, w


def encode_jpeg(image: np.ndarray, quality: int) -> bytes:
    """Encode (H, W, 3) uint8 RGB; from 95 on with full colour, below that with colours at half the resolution.

    Raises:
        DataError: the quality is not in 1 to 100.
    """
    if not 1 <= quality <= 100:
        raise DataError(f"the quality of a JPEG must be 1 to 100, got {quality}")
    return simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality, "RGB", "444" if quality >= 95 else "420")


def encode_png(image: np.ndarray) -> bytes:
    """Encode (H, W, 3) uint8 RGB without loss."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=4)
    return buffer.getvalue()
