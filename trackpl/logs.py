"""Where figures go: `metrics.csv` in the run's folder, and W&B where it is installed. What Lightning must not say."""

import csv
import importlib.util
import logging
import netrc
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

HIGHER_IS_BETTER = ("AJ", "OA", "delta", "jaccard")
LOWER_IS_BETTER = ("EPE", "Fl_all", "loss")
NOISE = (
    r".*does not have many workers.*",
    r".*GPU available but not used.*",
    r".*The number of training batches .* is smaller than the logging interval.*",
    r".*Trying to infer the `batch_size` from an ambiguous collection.*",
    r".*`IterableDataset` has `__len__` defined.*",
    r".*Checkpoint directory .* exists and is not empty.*",
    r".*You're resuming from a checkpoint that ended before the epoch ended.*",
    r".*is an instance of `nn.Module` and is already saved during checkpointing.*",
    r".*It is recommended to use `self.log\('(val|test)/.*sync_dist=True.*",  # ours are reduced by torchmetrics
    r".*callbacks used to create the checkpoint need to be provided.*",
    r".*The verbose parameter is deprecated.*",
    r".*`isinstance\(treespec, LeafSpec\)` is deprecated.*",
)


def quiet() -> None:
    """Hide what Lightning always says; warnings that tell something stay."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in NOISE:
        warnings.filterwarnings("ignore", message=message)


def goal(key: str) -> str | None:
    """Return "max" or "min" as higher or lower is better for the metric `key`; None where neither is known."""
    name = key.rsplit("/", 1)[-1]
    if name.startswith(HIGHER_IS_BETTER):
        return "max"
    return "min" if name.startswith(LOWER_IS_BETTER) else None


class CsvLogger(Logger):
    """Appends one row a log call to ``metrics.csv``; `step` counts the optimiser steps that are done.

    Lightning's own deletes the file of the run that it continues. A new column rewrites the file, whole or not at all.

    Args:
        folder: of the run; made when the first row comes.
        done: steps of the checkpoint that the run continues from; later rows are dropped, they will come again.
        at: the number of steps to log under, for a run that takes none but scores a checkpoint.
    """

    def __init__(self, folder: Path, done: int | None = None, at: int | None = None) -> None:
        super().__init__()
        self.path, self.done, self.at = folder / "metrics.csv", done, at
        self._columns: list[str] | None = None

    @property
    def name(self) -> str:
        """Name of the method."""
        return self.path.parent.parent.name

    @property
    def version(self) -> str:
        """Id of the run."""
        return self.path.parent.name

    @property
    def log_dir(self) -> str:
        """Folder of the run."""
        return str(self.path.parent)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing: `config.yaml` lies beside."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append a row."""
        row = {
            "step": (step or 0) + 1 if self.at is None else self.at,
            **{k: float(v) for k, v in metrics.items() if k != "step"},
        }
        if "epoch" in row:
            row["epoch"] = int(row["epoch"])
        columns = self._open()
        new = [key for key in sorted(row, key=_order) if key not in columns]
        if new:
            columns += new
            self._rewrite(columns, [*self._rows(), row])
        else:
            with open(self.path, "a", newline="") as file:
                csv.DictWriter(file, columns).writerow(row)

    def _open(self) -> list[str]:
        """Return the columns; the first time, take over what an earlier process of this run wrote."""
        if self._columns is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            rows = [r for r in self._rows() if self.done is None or int(r["step"]) <= self.done]
            self._columns = [*rows[0]] if rows else []
            if rows:
                self._rewrite(self._columns, rows)
        return self._columns

    def _rows(self) -> list[dict[str, Any]]:
        """Return the whole rows of the file; a last line that was cut off is none."""
        if not self.path.is_file():
            return []
        text = self.path.read_text()
        lines = text[: text.rfind("\n") + 1].splitlines()
        return list(csv.DictReader(lines))

    def _rewrite(self, columns: list[str], rows: list[dict[str, Any]]) -> None:
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        with open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
        os.replace(temporary, self.path)


def _order(key: str) -> tuple[bool, bool, str]:
    return key != "step", key != "epoch", key


def wandb_mode() -> str:
    """Return "online" when the user is logged in, else "offline"; "disabled" without wandb or by WANDB_MODE."""
    if importlib.util.find_spec("wandb") is None:
        return "disabled"
    chosen = os.environ.get("WANDB_MODE", "").lower()
    if chosen:
        return {"disabled": "disabled", "offline": "offline", "dryrun": "offline"}.get(chosen, "online")
    return "online" if os.environ.get("WANDB_API_KEY") or _in_netrc() else "offline"


def _in_netrc() -> bool:
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


class WandbLogger(Logger):
    """One W&B run for one run of ours, under the same id; only rank 0 imports wandb.

    Args:
        folder: of the run.
        run: its id, kept in the checkpoints, so that a resumed run continues.
        method: short name, the group of the run.
        verb: fit, validate, test or predict: the type of job.
        config: merged config, logged once.
        mode: "online" or "offline".
        at: the number of steps to log under, for a run that takes none but scores a checkpoint.
    """

    def __init__(
        self,
        folder: Path,
        run: str,
        method: str,
        verb: str,
        config: dict[str, Any],
        mode: str,
        at: int | None = None,
    ) -> None:
        super().__init__()
        self.folder, self.run, self.method = folder, run, method
        self.verb, self.config, self.mode, self.at = verb, config, mode, at
        self._run: Any = None
        self._defined: set[str] = set()
        self._broken = False

    @property
    def name(self) -> str:
        """Name of the method."""
        return self.method

    @property
    def version(self) -> str:
        """Id of the run."""
        return self.run

    @property
    def save_dir(self) -> str:
        """Folder of the run, in which W&B makes ``wandb/``."""
        return str(self.folder)

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """Return the W&B run, begun on first use; None where it could not begin."""
        if self._run is None and not self._broken:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                self._run = self._begin()
            except Exception as error:  # no account, no network, a full disk: training goes on without pictures
                self._broken = True
                print(
                    f"trackpl: goes on without W&B: {type(error).__name__}: {' '.join(str(error).split())}",
                    file=sys.stderr,
                )
        return self._run

    def _begin(self) -> Any:
        import wandb

        settings = wandb.Settings(silent=True, console="off", disable_git=True, save_code=False, init_timeout=60)
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "trackpl"),
            dir=str(self.folder),
            id=self.version,
            name=os.environ.get("WANDB_NAME") or f"{self.method} {self.version}",
            group=os.environ.get("WANDB_RUN_GROUP") or self.method,
            job_type=self.verb,
            resume="allow" if self.mode == "online" else None,
            mode=self.mode,  # type: ignore[arg-type]
            config=self.config,
            settings=settings,
        )
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        return run

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the merged config is logged when the run begins."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Log figures at a number of optimiser steps done, each with its best value in the summary."""
        run = self.experiment
        if run is None:
            return
        for key in metrics.keys() - self._defined:
            if best := goal(key):
                run.define_metric(key, step_metric="step", summary=best)
        self._defined |= metrics.keys()
        run.log({**metrics, "step": (step or 0) + 1 if self.at is None else self.at})

    @rank_zero_only
    def log_media(self, pictures: dict[str, Path], columns: Sequence[str], rows: list[list[Any]], step: int) -> None:
        """Log pictures by key, and a table with a row per video."""
        run = self.experiment
        if run is None:
            return
        import wandb

        media: dict[str, Any] = {key: wandb.Image(str(path)) for key, path in pictures.items()}
        if rows:
            media["videos"] = wandb.Table(columns=[*columns], data=rows)
        run.log({**media, "step": step})

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Close the run."""
        if self._run is not None:
            self._run.finish(exit_code=0 if status == "success" else 1)
            self._run, self._broken = None, True


def offline_runs(folder: Path) -> list[Path]:
    """Return the W&B runs in a run folder that wait to be uploaded, oldest first."""
    return sorted((folder / "wandb").glob("offline-run-*"))
