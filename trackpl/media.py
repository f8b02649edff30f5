"""Pictures of what validation found, prediction beside truth and the worst clips first, under ``media/`` and in W&B."""

import csv
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, distributed

from trackpl import draw
from trackpl.logs import WandbLogger
from trackpl.types import Clip

FRAMES = 6  # shown of a clip
POINTS = 256  # drawn at most


@dataclass
class Video:
    """One scored video, on the CPU."""

    badness: float
    video: Tensor  # uint8 (T, 3, H, W)
    tracks: tuple[Tensor, Tensor, Tensor, Tensor] | None = None  # xy and visible, predicted and true
    colours: Tensor | None = None  # of the points, by their queries: the same in both pictures
    flow: tuple[Tensor, Tensor] | None = None  # (2, H, W), predicted and true
    pair: tuple[int, int] = (0, 1)


@dataclass
class Benchmark:
    """What is kept of one benchmark until the validation ends."""

    worst: list[Video] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)


class Media(Callback):
    """Writes pictures of the worst clips and a table with a row per video after each validation or test.

    Args:
        clips: how many clips to show of each benchmark; 0 for none.
    """

    def __init__(self, clips: int = 4) -> None:
        self.clips = clips
        self.folder: Path | None = None
        self.at: int | None = None  # the checkpoint's step, where none is taken
        self._seen: dict[str, Benchmark] = {}

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the videos of this batch that are among the worst so far."""
        if self.folder is None or trainer.sanity_checking or not isinstance(outputs, dict):
            return
        clip = outputs.get("clip")
        seen = self._seen.setdefault(str(outputs.get("benchmark", "val")), Benchmark())
        seen.rows += outputs.get("rows", [])
        if not isinstance(clip, Clip) or not trainer.is_global_zero or not self.clips:
            return
        for i, badness in enumerate(_badness(outputs, clip)):
            if len(seen.worst) < self.clips or badness > seen.worst[-1].badness:
                seen.worst.append(_video(outputs, clip, i, badness))
                seen.worst.sort(key=lambda video: -video.badness)
                del seen.worst[self.clips :]

    on_test_batch_end = on_validation_batch_end

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw, write and log."""
        if self.folder is None or trainer.sanity_checking:
            return
        seen, self._seen = self._seen, {}
        rows = _gather([{"benchmark": name, **row} for name, one in seen.items() for row in one.rows])
        if not trainer.is_global_zero or not seen:
            return
        step, pictures = trainer.global_step if self.at is None else self.at, {}
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, one in seen.items():
            for k, video in enumerate(one.worst):
                stem = f"step_{step:07d}_{name.replace('/', '_')}_{k}"
                for kind, path in _draw(video, self.folder, stem).items():
                    pictures[f"media/{name}/{k}_{kind}"] = path
        columns = list(dict.fromkeys(key for row in rows for key in row))
        if rows:
            write_table(self.folder / f"step_{step:07d}_videos.csv", columns, rows)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_media(pictures, columns, [[row.get(c) for c in columns] for row in rows], step)

    on_test_end = on_validation_end


def write_table(path: Path, columns: list[str], rows: list[dict[str, Any]]) -> None:
    """Write rows as ``.csv``, whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    os.replace(temporary, path)


def _gather(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of all ranks."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return rows
    parts: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(parts, rows)
    return [row for part in parts for row in part]


def _badness(outputs: dict[str, Any], clip: Clip) -> list[float]:
    """Score each video of a batch, more is worse: by AJ where there are tracks, else by the error of the flow."""
    rows = outputs.get("rows", [])
    if len(rows) == clip.video.shape[0]:
        scores = [-float(row["AJ"]) if "AJ" in row else float(row.get("EPE", math.nan)) for row in rows]
    elif clip.flow is not None and outputs.get("flow") is not None:
        error = (outputs["flow"].xy - clip.flow.xy).norm(dim=2)
        valid = torch.ones_like(error) if clip.flow.valid is None else clip.flow.valid.to(error)
        error = torch.where(valid > 0, error, 0)
        scores = (error.flatten(1).sum(1) / valid.flatten(1).sum(1)).tolist()
    else:
        scores = [math.nan] * clip.video.shape[0]
    return [-math.inf if math.isnan(score) else score for score in scores]


def _video(outputs: dict[str, Any], clip: Clip, i: int, badness: float) -> Video:
    video = clip.video[i]
    if video.dtype != torch.uint8:
        video = (video.clamp(0, 1) * 255).round().to(torch.uint8)
    out = Video(badness, video.cpu())
    tracks = outputs.get("tracks")
    if tracks is not None and clip.tracks is not None and clip.visible is not None:
        few = torch.linspace(0, clip.tracks.shape[2] - 1, min(POINTS, clip.tracks.shape[2])).long()
        parts = (tracks.xy[i], tracks.visible[i] > 0.5, clip.tracks[i], clip.visible[i])
        xy, visible, true_xy, true_visible = (part.cpu()[:, few] for part in parts)
        out.tracks = xy.float(), visible, true_xy.float(), true_visible
        out.colours = draw.start_colours(outputs["queries"][i, few, 1:])
    if outputs.get("flow") is not None and clip.flow is not None:
        true = clip.flow.xy[i, 0].float()
        if clip.flow.valid is not None:
            true = true.masked_fill(~clip.flow.valid[i, 0], math.nan)
        out.flow, out.pair = (outputs["flow"].xy[i, 0].float().cpu(), true.cpu()), clip.flow.pairs[0]
    return out


def _draw(one: Video, folder: Path, stem: str) -> dict[str, Path]:
    """Write the pictures of one video; return them by kind."""
    out: dict[str, Path] = {}
    if one.tracks is not None:
        xy, visible, true_xy, true_visible = one.tracks
        few = torch.linspace(0, len(one.video) - 1, min(FRAMES, len(one.video))).round().long()
        sheets = [
            draw.contact_sheet(draw.draw_tracks(one.video, *which, colours=one.colours)[few], columns=2)
            for which in ((xy, visible), (true_xy, true_visible))
        ]
        image = draw.side_by_side(sheets, ["prediction", "truth"])
        out["tracks"] = draw.save_png(image, folder / f"{stem}_tracks.png")
    if one.flow is not None:
        flow, true = one.flow
        longest = float(true.nan_to_num().norm(dim=0).max().clamp(min=1))
        images = [one.video[one.pair[0]], *(draw.flow_to_rgb(f, longest) for f in (flow, true))]
        titles = [f"frame {one.pair[0]}", f"flow to frame {one.pair[1]}", "truth"]
        out["flow"] = draw.save_png(draw.side_by_side(images, titles), folder / f"{stem}_flow.png")
    return out
