"""Write tracks as they come: csv, arrays and a drawn video grow frame by frame and are moved into place at the end.

Nothing here grows in memory with the number of frames.
"""

from __future__ import annotations

import csv
import tempfile
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trackpl import draw
from trackpl.errors import Error
from trackpl.writing import replacing, write_video

COLUMNS = ["point", "frame", "x", "y", "visible"]
SHEET = 12
"""Frames on the contact sheet."""

Frame = tuple[Tensor, Tensor, Tensor]
"""A picture uint8 (3, H, W), and in it the points: xy (N, 2) and visible (N,) probability."""


class Recorder:
    """Writes ``tracks.npz``, ``.csv``, ``.mp4`` and ``.png`` into a folder.

    Args:
        out: the folder.
        queries: (N, 3) of (t, x, y); colours of points follow from where they start.
        size: (H, W) of the frames.
        fps: frames a second of the video.
        threshold: visible above this probability.
        tail: frames that a tail reaches back.
        video: whether to draw the video.
    """

    def __init__(
        self,
        out: Path,
        queries: np.ndarray,
        size: tuple[int, int],
        fps: float,
        *,
        threshold: float = 0.5,
        tail: int = draw.TAIL,
        video: bool = True,
    ) -> None:
        self.out, self.queries, self.fps, self.threshold, self.video = out, queries, fps, threshold, video
        self.frames = self.seen = 0
        starts = torch.from_numpy(queries[:, 1:])
        self._colours, self._radius = draw.start_colours(starts), draw.disc_radius(size, starts)
        self._past: deque[tuple[Tensor, Tensor]] = deque(maxlen=tail + 1)
        self._kept: dict[int, Tensor] = {}  # drawn frames for the sheet, evenly spread over those so far
        self._every = 1

    def write(self, frames: Iterator[Frame]) -> None:
        """Write all frames that come; once they end, the files stand in the folder, whole.

        Raises:
            Error: no frame came; nothing is written.
        """
        with ExitStack() as stack:
            part = stack.enter_context(replacing(self.out / "tracks.csv"))
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=".tracks-", dir=self.out)))
            table = stack.enter_context(part.open("w", newline=""))
            arrays = [stack.enter_context((folder / name).open("wb")) for name in ("xy", "visibility")]
            rows = csv.writer(table)
            rows.writerow(COLUMNS)
            drawn = self._drawn(frames, rows, arrays)
            if self.video:
                first = next(drawn, None)
                if first is not None:
                    write_video(self.out / "tracks.mp4", _chain(first, drawn), self.fps)
            else:
                for _ in drawn:
                    pass
            if not self.frames:
                raise Error("no frame came: there is nothing to write")
            for file in arrays:
                file.close()
            self._save_arrays(folder)
        if not self.video:
            (self.out / "tracks.mp4").unlink(missing_ok=True)  # of an earlier run, it shows other tracks
        titles = [f"frame {t}" for t in self._kept]
        draw.save_png(
            draw.contact_sheet(torch.stack(list(self._kept.values())), titles=titles), self.out / "tracks.png"
        )

    def _drawn(self, frames: Iterator[Frame], rows: Any, arrays: list[Any]) -> Iterator[Tensor]:
        """Note each frame's points, and draw it where it is to be seen."""
        numbers = range(len(self.queries))
        for t, (image, xy, visibility) in enumerate(frames):
            visible = visibility > self.threshold
            for file, values in zip(arrays, (xy, visibility), strict=True):
                file.write(np.ascontiguousarray(values.numpy(), dtype=np.float32).tobytes())
            x, y = ([f"{v:.4f}" for v in axis] for axis in xy.T.tolist())
            rows.writerows(zip(numbers, [t] * len(xy), x, y, visible.int().tolist(), strict=True))
            self.frames, self.seen = t + 1, self.seen + int(visible.sum())
            self._past.append((xy, visible))
            if self.video or t % self._every == 0:
                past = [torch.stack(parts) for parts in zip(*self._past, strict=True)]
                picture = draw.draw_frame(image, past[0], past[1], self._colours, self._radius)
                self._keep(t, picture)
                if self.video:
                    yield picture

    def _keep(self, t: int, picture: Tensor) -> None:
        """Keep every so-manyth frame for the sheet, and from time to time drop every other of them."""
        if t % self._every:
            return
        if len(self._kept) == SHEET:
            self._every *= 2
            self._kept = {k: v for k, v in self._kept.items() if k % self._every == 0}
        if t % self._every == 0:
            self._kept[t] = picture

    def _save_arrays(self, folder: Path) -> None:
        """Make ``tracks.npz`` of what the files in `folder` hold, without reading it whole."""
        n = len(self.queries)
        xy = np.memmap(folder / "xy", np.float32, "r", shape=(self.frames, n, 2))
        visibility = np.memmap(folder / "visibility", np.float32, "r", shape=(self.frames, n))
        visible = np.memmap(folder / "visible", np.bool_, "w+", shape=(self.frames, n))
        for begin in range(0, self.frames, 1024):
            visible[begin : begin + 1024] = visibility[begin : begin + 1024] > self.threshold
        with replacing(self.out / "tracks.npz") as part:
            np.savez_compressed(
                part, xy=xy, visible=visible, visibility=visibility, queries=self.queries.astype(np.float32)
            )


def _chain(first: Tensor, rest: Iterator[Tensor]) -> Iterator[Tensor]:
    yield first
    yield from rest
