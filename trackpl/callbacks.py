"""What happens around training: the run's folder, its checkpoints, progress, and the tracks that `predict` writes."""

import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from torch import Tensor
from tqdm import tqdm

from trackpl import logs, runs

HEADLINES = ("AJ", "delta_avg", "OA", "EPE_visible", "EPE", "Fl_all")
MONITORS = ("AJ", "delta_avg", "EPE_visible", "EPE")


class RunFolder(Callback):
    """Saves the merged config in the run's folder, and config and run id in every checkpoint.

    Args:
        folder: of the run.
        run: its id, the one it has in W&B; a resumed run keeps it.
        config: merged config as plain values.
    """

    def __init__(self, folder: Path, run: str, config: dict[str, Any]) -> None:
        self.folder, self.run, self.config = folder, run, config

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write ``config.yaml``; one of an earlier process that differs stays beside it, numbered."""
        logs.quiet()  # again, in a process that was spawned
        if not trainer.is_global_zero:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        runs.sweep(self.folder)
        path, text = self.folder / "config.yaml", yaml.safe_dump(self.config, sort_keys=False)
        if path.is_file() and path.read_text() != text:
            number = 1 + len(list(self.folder.glob("config.*.yaml")))
            os.replace(path, self.folder / f"config.{number}.yaml")
        runs.write_text(path, text)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put into the checkpoint what resuming and `trackpl.load` need."""
        model = self.config["model"]
        options = {**model.get("init_args", {}), **model.get("dict_kwargs", {})}
        checkpoint["hyper_parameters"] = {"_class_path": model["class_path"], **options}
        checkpoint["trackpl"] = {"run": self.run, "config": self.config}


class Checkpoints(Checkpoint):
    """Keeps ``last.ckpt`` and, where validation has a figure to go by, ``best.ckpt``.

    Args:
        every_n_steps: save the last one after this many optimiser steps, and after each validation and at the end.
        monitor: metric that says which is best; by default the first of AJ, delta_avg and EPE that validation logs.
        mode: "max" or "min" as higher or lower is better; by default known from the metric's name, else "min".
    """

    def __init__(self, every_n_steps: int = 200, monitor: str | None = None, mode: str | None = None) -> None:
        self.every_n_steps, self.monitor, self.mode = every_n_steps, monitor, mode
        self.folder: Path | None = None
        self.best: float | None = None
        self.best_step: int | None = None
        self._saved = -1
        self._best_is_due = False

    def state_dict(self) -> dict[str, Any]:
        """Keep which was best."""
        return {"best": self.best, "best_step": self.best_step, "monitor": self.monitor, "mode": self.mode}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from which was best, unless another metric is asked for now."""
        if self.monitor in (None, state_dict["monitor"]):
            self.monitor, self.mode = state_dict["monitor"], state_dict["mode"]
            self.best, self.best_step = state_dict["best"], state_dict["best_step"]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save the last one when it is due."""
        step = trainer.global_step
        if step != self._saved and step and step % self.every_n_steps == 0:
            self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save after a validation; at the end of an epoch, once the epoch is closed."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self._judge(trainer)
        if not trainer.is_last_batch:
            self._save(trainer)
        else:
            self._saved = -1

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save with the epoch closed, so that a resumed run begins the next one."""
        if self._saved != trainer.global_step:
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what is not saved yet."""
        if self._saved != trainer.global_step and trainer.global_step:
            self._save(trainer)

    def _judge(self, trainer: Trainer) -> None:
        figures = trainer.callback_metrics
        if self.monitor is None:
            self.monitor = _monitored(list(figures))
        if self.monitor is None or self.monitor not in figures:
            return
        self.mode = self.mode or logs.goal(self.monitor) or "min"
        value = float(figures[self.monitor])
        better = self.best is None or (value > self.best if self.mode == "max" else value < self.best)
        if value == value and better:  # not NaN
            self.best, self.best_step, self._best_is_due = value, trainer.global_step, True

    def _save(self, trainer: Trainer) -> None:
        if self.folder is None:
            return
        self._saved = trainer.global_step
        due, self._best_is_due = self._best_is_due, False
        trainer.save_checkpoint(self.folder / "last.ckpt")
        if due:
            trainer.save_checkpoint(self.folder / "best.ckpt")


def _monitored(keys: list[str]) -> str | None:
    for name in MONITORS:
        for key in keys:
            if key.startswith("val/") and key.rsplit("/", 1)[-1] == name:
                return key
    return None


class Progress(ProgressBar):
    """One bar for the whole fit: clips a second, time to go, loss, figures; lines where there is no terminal.

    Args:
        every: seconds between two lines where the output is not a terminal.
    """

    def __init__(self, every: float = 30.0) -> None:
        super().__init__()
        self.every = every
        self._bar: Any = None
        self._enabled = True
        self._begun = self._shown = self._clock = 0.0
        self._total: int | None = None
        self._first = 0
        self._clips = self._seconds = 0.0

    def disable(self) -> None:
        """Be silent: called by Lightning on every rank but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Speak again."""
        self._enabled = True

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start the clock."""
        super().setup(trainer, pl_module, stage)
        self._shown = time.monotonic()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count."""
        total = trainer.estimated_stepping_batches
        self._total = int(total) if total != float("inf") and total > 0 else None
        self._begun = self._shown = self._clock = time.monotonic()
        self._first = trainer.global_step
        self._clips, self._seconds = 0.0, 0.0
        if self._enabled and sys.stderr.isatty():
            form = "{desc} {percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt} steps{postfix}"
            self._bar = tqdm(total=self._total, initial=self._first, desc="fit", bar_format=form, dynamic_ncols=True)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the clips; show a few times a second, or a line now and then."""
        now = time.monotonic()
        self._clips += _clips(batch) * trainer.world_size
        self._seconds += now - self._clock
        self._clock = now
        wait = 0.3 if self._bar is not None else self.every
        first = trainer.global_step == self._first + 1
        if self._enabled and (now - self._shown >= wait or first):
            self._show(trainer, now)

    def _show(self, trainer: Trainer, now: float) -> None:
        self._shown = now
        step, rate = trainer.global_step, self._clips / max(self._seconds, 1e-9)
        self._clips, self._seconds = self._clips * 0.5, self._seconds * 0.5  # the recent counts more
        loss = trainer.callback_metrics.get("train/loss")
        parts = [f"{rate:.1f} clips/s"]
        if self._total and step > self._first:
            left = (now - self._begun) / (step - self._first) * (self._total - step)
            parts.append(f"ETA {clock(left)}")
        if loss is not None:
            parts.append(f"loss {float(loss):.4g}")
        if self._bar is not None:
            self._bar.n = step
            self._bar.set_postfix_str(", ".join(parts))
        else:
            self.print(f"step {step}{f'/{self._total}' if self._total else ''}: {', '.join(parts)}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the last state."""
        if self._enabled:
            self._show(trainer, time.monotonic())
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the terminal in order."""
        self._close()

    def on_validation_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Say how far the validation is."""
        self._evaluated(trainer, "validate", kwargs.get("batch_idx", args[3] if len(args) > 3 else 0))

    def on_test_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Say how far the test is."""
        self._evaluated(trainer, "test", kwargs.get("batch_idx", args[3] if len(args) > 3 else 0))

    def on_predict_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Say how far the prediction is."""
        self._evaluated(trainer, "predict", kwargs.get("batch_idx", args[3] if len(args) > 3 else 0))

    def _evaluated(self, trainer: Trainer, what: str, batch_idx: int) -> None:
        if self._bar is not None:
            self._bar.set_description_str(f"{what} {batch_idx + 1}")
            return
        now = time.monotonic()
        if self._enabled and now - self._shown >= self.every:
            self._shown = now
            self.print(f"{what}: batch {batch_idx + 1}")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the figures, and keep validation out of the clips a second."""
        if trainer.state.fn != "fit":
            return
        self._clock = time.monotonic()
        if self._bar is not None:
            self._bar.set_description_str("fit")
        if self._enabled and not trainer.sanity_checking and (text := headline(trainer.callback_metrics)):
            self.print(f"step {trainer.global_step}: {text}")

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print above the bar."""
        tqdm.write(" ".join(map(str, args)), file=sys.stderr)
        sys.stderr.flush()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _clips(batch: Any) -> int:
    video = getattr(batch, "video", batch)
    return int(video.shape[0]) if isinstance(video, Tensor) and video.ndim else 1


def clock(seconds: float) -> str:
    """Write a duration as ``1:02:03`` or ``2:03``."""
    minutes, rest = divmod(round(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def headline(figures: dict[str, Any]) -> str:
    """Write the figures that matter most in one line, by benchmark."""
    groups: dict[str, list[str]] = {}
    for name in HEADLINES:
        for key in figures:
            if key.startswith("val/") and key.rsplit("/", 1)[-1] == name:
                groups.setdefault(key.rsplit("/", 1)[0], []).append(f"{name} {float(figures[key]):.4g}")
    if not groups:
        rest = [key for key in figures if key.startswith("val/")][:4]
        return ", ".join(f"{key} {float(figures[key]):.4g}" for key in rest)
    return "; ".join(f"{group} {' '.join(words)}" for group, words in groups.items())


class Predictions(Callback):
    """Writes what `predict` finds, a ``.npz`` per video: xy (T, N, 2), visible (T, N), queries (N, 3).

    Args:
        folder: where to put them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write one file per video of the batch."""
        self.folder.mkdir(parents=True, exist_ok=True)
        tracks, queries = outputs["tracks"], outputs["queries"]
        names = outputs["clip"].name or [
            f"{dataloader_idx}_{batch_idx}_{trainer.global_rank}_{i}" for i in range(len(queries))
        ]
        for i, name in enumerate(names):
            path = self.folder / f"{str(name).replace('/', '_')}.npz"
            temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
            arrays = {"xy": tracks.xy[i], "visible": tracks.visible[i], "queries": queries[i]}
            with open(temporary, "wb") as file:
                np.savez_compressed(file, **{k: v.float().cpu().numpy() for k, v in arrays.items()})
            os.replace(temporary, path)
