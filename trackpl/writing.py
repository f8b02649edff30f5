"""Write files whole or not at all, and video as H.264 that plays everywhere."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from torch import Tensor

from trackpl.errors import VideoError


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give a temporary file beside `path` to write, and move it into place once all went well."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    try:
        yield Path(name)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_video(path: str | Path, frames: Iterable[Tensor], fps: float, crf: int = 18) -> Path:
    """Write an mp4 that plays everywhere: H.264 (MPEG-4 where libav has no x264), yuv420p, header first.

    Args:
        path: ends in .mp4; a half-written file never stands there.
        frames: uint8 RGB (3, H, W) of one size, taken one by one; odd sizes repeat the last row or column.
        fps: frames a second.
        crf: quality, 0 (lossless) to 51.

    Raises:
        VideoError: no frames, frames of several sizes or types, a frame rate that is not positive.
    """
    if not math.isfinite(fps) or fps <= 0:
        raise VideoError(f"fps must be a positive number, got {fps}")
    rest = iter(frames)
    first = next(rest, None)
    if first is None:
        raise VideoError(f"no frames to write to {path}")
    with (
        replacing(path) as part,
        av.open(str(part), "w", format="mp4", options={"movflags": "+faststart"}) as out,
    ):
        h, w = first.shape[-2:]
        stream = _encoder(out, w + w % 2, h + h % 2, fps, crf)
        for frame in _chain(first, rest):
            if frame.shape != first.shape or frame.dtype != torch.uint8:
                got = f"{frame.dtype} {tuple(frame.shape)}"
                raise VideoError(f"frames to write must all be uint8 {tuple(first.shape)}, got {got}")
            out.mux(stream.encode(_encodable(frame)))
        out.mux(stream.encode(None))
    return Path(path)


def _chain(first: Tensor, rest: Iterator[Tensor]) -> Iterator[Tensor]:
    yield first
    yield from rest


def _encoder(out: Any, width: int, height: int, fps: float, crf: int) -> Any:
    x264 = "libx264" in av.codecs_available
    options = {"crf": str(crf), "preset": "medium"} if x264 else {"q:v": "3"}
    # MPEG-4 allows 16 bits for the ticks of a second.
    rate = Fraction(fps).limit_denominator(1001)
    stream = out.add_stream("libx264" if x264 else "mpeg4", rate=rate, options=options)
    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
    # Players take unmarked video of HD size for BT.709 and smaller for BT.601: say which it is.
    context = stream.codec_context
    context.colorspace = context.color_primaries = context.color_trc = context.color_range = 1
    return stream


def _encodable(frame: Tensor) -> Any:
    image = frame.permute(1, 2, 0).cpu().numpy()
    h, w = image.shape[:2]
    if h % 2 or w % 2:
        image = np.pad(image, ((0, h % 2), (0, w % 2), (0, 0)), mode="edge")
    rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
    return rgb.reformat(format="yuv420p", dst_colorspace=1, dst_color_range=1)
