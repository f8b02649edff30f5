"""What a training verb says before it starts and once it is done."""

import os
import sys
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from trackpl import logs
from trackpl.arguments import Request

SHOWN = ("AJ", "delta_avg", "OA", "EPE", "EPE_visible", "EPE_occluded", "Fl_all")


def announce(verb: str, method: str, model: LightningModule, trainer: Trainer, folder: Path, request: Request) -> None:
    """Say in one line what starts where."""
    size = sum(p.numel() for p in model.parameters())
    count = f"{size / 1e6:.3g} M" if size >= 1e5 else f"{size}"
    device = f"{trainer.world_size} x {trainer.strategy.root_device.type}"
    text = f"trackpl {verb}: {method}, {count} parameters, {device}, {_relative(folder)}"
    if request.checkpoint:
        step = request.content.get("global_step")
        text += f", {'resumes' if verb == 'fit' else 'with'} {request.checkpoint} (step {step})"
    print(text, file=sys.stderr)


def report(verb: str, method: str, trainer: Trainer, folder: Path) -> None:
    """Print the last figures, where everything lies and what to run next."""
    figures = {k: float(v) for k, v in trainer.callback_metrics.items()}
    stage = "test" if verb == "test" else "val"
    print(table(figures, stage), end="")
    checkpoint = best_checkpoint(folder) if verb == "fit" else None
    places = {
        "config": folder / "config.yaml",
        "metrics": folder / "metrics.csv",
        "checkpoint": checkpoint,
        "pictures": folder / "media",
        "predictions": folder / "predictions",
    }
    for name, path in places.items():
        if path is not None and path.exists():
            print(f"{name + ':':<13}{_relative(path)}")
    if waiting := logs.offline_runs(folder):
        print(f"{'W&B:':<13}offline; upload it with: wandb sync {_relative(waiting[-1].parent)}/offline-run-*")
    if checkpoint is not None:
        print(f"{'next:':<13}trackpl track VIDEO --model {method} --checkpoint {_relative(checkpoint)}")


def best_checkpoint(folder: Path) -> Path | None:
    """Return the best checkpoint of a run, else the last, else None."""
    paths = [folder / "checkpoints" / name for name in ("best.ckpt", "last.ckpt")]
    return next((path for path in paths if path.is_file()), None)


def table(figures: dict[str, float], stage: str) -> str:
    """Lay out the figures of each benchmark, a line each, and the share of zero motion's error that is left."""
    groups: dict[str, dict[str, float]] = {}
    for key, value in figures.items():
        if key.startswith(f"{stage}/"):
            group, _, name = key.rpartition("/")
            groups.setdefault(group, {})[name] = value
    lines = []
    for group, row in groups.items():
        shown = [name for name in SHOWN if name in row] or [name for name in row][:8]
        width = max(len(group), 12)
        lines.append(f"{'':<{width}}" + "".join(f"{name:>14}" for name in shown))
        lines.append(f"{group:<{width}}" + "".join(f"{row[name]:>14.4g}" for name in shown))
        for name in ("EPE_visible", "EPE"):
            zero = row.get(name.replace("EPE", "EPE_zero", 1))
            if zero and name in row:
                what = "visible pixels" if name == "EPE_visible" else "all pixels"
                lines.append(
                    f"error of {what}: {row[name]:.3g} px, zero motion scores {zero:.3g} px ({row[name] / zero:.0%})"
                )
    return "".join(f"{line}\n" for line in lines)


def _relative(path: Path) -> Any:
    relative = os.path.relpath(path)
    return path if relative.startswith("..") else relative
