"""Frames of a camera, by the systems' own interfaces through PyAV: v4l2, avfoundation and dshow."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import av.error
import torch
from torch import Tensor

from trackpl.errors import VideoError

FPS = 30
"""Frames a second that a camera is asked for on macOS, where it must be asked, and where it does not say."""


class Camera:
    """A camera that runs: iterate to get its frames, uint8 RGB (3, H, W), as they come.

    Attributes:
        path: stands for its name in messages and folders.
        size: (H, W) in pixels.
        fps: frames a second that it announces.
        frames: none, it has no last one.
    """

    frames: None = None

    def __init__(self, name: str, address: str, driver: str, options: dict[str, str] | None = None) -> None:
        self.path = Path(name)
        self._container = av.open(address, format=driver, options=options or {})
        try:
            stream = self._container.streams.video[0]
            self._coming: Iterator[Any] = self._container.decode(stream)
            self._first: Tensor | None = _rgb(next(self._coming))
        except (StopIteration, IndexError) as error:
            self.close()
            raise VideoError(f"{name} gives no picture; close other programs that use it") from error
        self.size: tuple[int, int] = (self._first.shape[1], self._first.shape[2])
        self.fps = float(stream.average_rate or stream.guessed_rate or FPS)

    def __iter__(self) -> Iterator[Tensor]:
        """Yield frames until the camera is unplugged.

        Raises:
            VideoError: it fails in another way.
        """
        try:
            if self._first is not None:
                first, self._first = self._first, None
                yield first
            for frame in self._coming:
                yield _rgb(frame)
        except av.error.FFmpegError as error:
            raise VideoError(f"{self.path} stopped: {error.strerror}") from error

    def close(self) -> None:
        """Turn the camera off."""
        self._container.close()


def _rgb(frame: Any) -> Tensor:
    return torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1).contiguous()


def open_camera(number: int) -> Camera:
    """Turn on the camera of this number, 0 being the first.

    Raises:
        VideoError: there is none, or it may not be opened; the message names those that there are.
    """
    name = f"camera{number}"
    try:
        if sys.platform == "darwin":
            return Camera(name, f"{number}:none", "avfoundation", {"framerate": str(FPS)})
        if sys.platform == "win32":
            return Camera(name, f"video={_named(number)}", "dshow")
        return Camera(name, f"/dev/video{number}", "v4l2")
    except (av.error.FFmpegError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise VideoError(f"no camera {number}: {reason}; {_instead()}") from error


def _named(number: int) -> str:
    """Return the name of a camera of Windows, where they have no numbers."""
    names = [d.name for d in _devices("dshow")]
    if number >= len(names):
        raise OSError("there is no such device")
    return names[number]


def _devices(driver: str) -> list[Any]:
    """List the cameras that a driver tells of; none where it tells of none."""
    try:
        return [d for d in av.enumerate_input_devices(driver) if "video" in d.media_types or not d.media_types]
    except (AttributeError, av.error.FFmpegError, ValueError, OSError):  # an older PyAV lists none
        return []


def _instead() -> str:
    if sys.platform == "linux":
        found = sorted(Path("/dev").glob("video*"))
        return f"there are {', '.join(map(str, found))}" if found else "none is connected (/dev/video*)"
    driver = "avfoundation" if sys.platform == "darwin" else "dshow"
    names = [f"{i} ({d.name})" for i, d in enumerate(_devices(driver))]
    return f"there are {', '.join(names)}" if names else "none is connected, or it may not be used"
