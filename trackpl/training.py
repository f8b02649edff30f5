"""`trackpl fit`, `validate`, `test` and `predict`: LightningCLI with short names, run folders, one-line errors."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from jsonargparse import set_parsing_settings
from lightning import LightningDataModule
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from trackpl import arguments, complaints, logs, reports, runs
from trackpl.arguments import Request
from trackpl.callbacks import Checkpoints, Predictions, Progress, RunFolder
from trackpl.errors import Error
from trackpl.media import Media
from trackpl.method import Method

TRAINER_DEFAULTS = {
    "log_every_n_steps": 10,
    "num_sanity_val_steps": 1,
    "enable_model_summary": False,
    "use_distributed_sampler": False,  # the data module gives each rank its own share, without duplicates
}


def run(verb: str, args: list[str]) -> int:
    """Run one training verb with the arguments that follow it and return the exit status.

    Raises:
        Error: a mistake of the user, in one line.
    """
    logs.quiet()
    args = [arg for arg in args if arg != "--debug"]
    request = arguments.read_help(verb, args) if {"--help", "-h"} & {*args} else arguments.read(verb, args)
    set_parsing_settings(
        import_path_denylist=["*"],
        import_path_allowlist=arguments.allowed_packages(),
        config_read_mode_urls_enabled=False,
        config_read_mode_fsspec_enabled=False,
    )
    try:
        CLI(verb, request)
    except MisconfigurationException as error:
        raise Error(f"the trainer's options do not fit: {' '.join(str(error).split())}") from error
    except SystemExit as leaving:  # after --help
        if leaving.code in (0, None):
            return 0
        raise
    return 0


class Parser(LightningArgumentParser):
    """Raises a user's mistake as `Error` of one line instead of printing a page of usage."""

    request = Request([])

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise `message` with the key, the config it stands in and the closest match."""
        if not self.exit_on_error:
            super().error(message, ex)
        if isinstance(ex, Error):
            raise ex
        raise Error(complaints.explain(str(message), self.request)) from ex


class CLI(LightningCLI):
    """Builds the parser of one verb, and a trainer that writes into a run folder."""

    def __init__(self, verb: str, request: Request) -> None:
        self.verb, self.request = verb, request
        super().__init__(
            Method,
            LightningDataModule,
            save_config_callback=None,
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=0,
            parser_kwargs={"allow_abbrev": False},
            parser_class=type("Parser", (Parser,), {"request": request}),
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            args=request.argv,
        )

    def __getstate__(self) -> dict[str, Any]:
        """Leave parsers behind on the way to a spawned process: optimisers refer to us, but need nothing of us."""
        return {}

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Return only the verb at hand: each parser costs 0.1 s."""
        ours = {"weights_only", "verbose", "return_predictions", "ckpt_path"}
        return {self.verb: LightningCLI.subcommands()[self.verb] | ours}

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse what `trackpl.arguments` made of the command line."""
        self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        """Do nothing: Lightning would let the checkpoint's options win over the command line."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the run's folder and what happens around training."""
        self.request.parser = parser
        text = "Folder of the run (default: runs/METHOD/TIME-RANDOM; a fit that resumes goes on in its own)."
        parser.add_argument("--run_dir", type=str | None, default=None, help=text)
        checkpoint = "Checkpoint to go on from or to use: a file, or 'last' or 'best' of the newest run."
        parser.add_argument("--ckpt_path", type=str | None, default=None, help=checkpoint)
        parser.add_class_arguments(Checkpoints, "checkpoints")
        parser.add_class_arguments(Media, "media")
        parser.add_class_arguments(Progress, "progress")

    @property
    def chosen(self) -> Any:
        """What was parsed for this verb."""
        return self.config[self.verb]

    def merged(self) -> dict[str, Any]:
        """Return the merged config as plain values: what reproduces the run."""
        dump = self.parser.dump(self.config, skip_link_targets=False, skip_unset=False, format="yaml")
        config = yaml.safe_load(dump)[self.verb]
        return {k: v for k, v in config.items() if k not in ("config", "ckpt_path", "run_dir")}

    def before_instantiate_classes(self) -> None:
        """Check what would otherwise hang or fail late."""
        check_slurm(dict(os.environ), self.chosen.trainer)
        self.method = runs.short_name(self.chosen.model.class_path)
        self.folder, self.run_id = place(self.verb, self.method, self.chosen.run_dir, self.request)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add our loggers, callbacks and checkpoint files to what the user chose."""
        made = self.config_init[self.verb]
        chosen, config = made.trainer, self.merged()
        around: list[Any] = [made.progress] if chosen.enable_progress_bar is not False else []
        logger = chosen.logger
        if not chosen.fast_dev_run:
            around.append(RunFolder(self.folder, self.run_id, config))
            made.media.folder = self.folder / "media"
            made.media.at = None if self.verb == "fit" else self.request.content.get("global_step", 0)
            around.append(made.media)
            if self.verb == "predict":
                around.append(Predictions(self.folder / "predictions"))
            if chosen.enable_checkpointing is not False and self.verb == "fit":
                made.checkpoints.folder = self.folder / "checkpoints"
                around.append(made.checkpoints)
            if logger is None or logger is True:
                logger = self._loggers(config) if self.verb != "predict" else False
        given = chosen.callbacks or []
        given = given if isinstance(given, list) else [given]
        plugins = chosen.plugins or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        try:
            return super().instantiate_trainer(
                logger=logger or False,
                callbacks=[*given, *around],
                plugins=[*plugins, runs.CheckpointFiles()],
                default_root_dir=chosen.default_root_dir or str(self.folder),
                **kwargs,
            )
        except (ValueError, MisconfigurationException) as error:
            raise Error(f"the trainer's options do not fit: {' '.join(str(error).split())}") from error

    def _loggers(self, config: dict[str, Any]) -> list[Any]:
        done = self.request.content.get("global_step")
        at = None if self.verb == "fit" else done or 0
        loggers: list[Any] = [logs.CsvLogger(self.folder, done, at)]
        if (mode := logs.wandb_mode()) != "disabled":
            loggers.append(logs.WandbLogger(self.folder, self.run_id, self.method, self.verb, config, mode, at))
        return loggers

    def fit(self, **kwargs: Any) -> None:
        """Train, and say what came of it."""
        self._run(self.trainer.fit, **kwargs)

    def validate(self, **kwargs: Any) -> None:
        """Score on the validation data."""
        self._run(self.trainer.validate, verbose=False, **kwargs)

    def test(self, **kwargs: Any) -> None:
        """Score on the benchmarks."""
        self._run(self.trainer.test, verbose=False, **kwargs)

    def predict(self, **kwargs: Any) -> None:
        """Track through the clips of the data."""
        self._run(self.trainer.predict, return_predictions=False, **kwargs)

    def _run(self, action: Callable[..., Any], **kwargs: Any) -> None:
        if self.trainer.is_global_zero:
            reports.announce(self.verb, self.method, self.model, self.trainer, self.folder, self.request)
        action(ckpt_path=self.request.checkpoint, weights_only=True, **kwargs)
        if self.trainer.is_global_zero and not self.chosen.trainer.fast_dev_run:
            reports.report(self.verb, self.method, self.trainer, self.folder)


def place(verb: str, method: str, run_dir: str | None, request: Request) -> tuple[Path, str]:
    """Return the folder and the id of this run; a fit that resumes goes on in the folder of its checkpoint.

    Raises:
        Error: the folder that the user named holds another run.
    """
    resumed = request.checkpoint if verb == "fit" else None
    run_id = request.content.get("trackpl", {}).get("run") if resumed else None
    if run_dir:
        folder = Path(run_dir).expanduser()
        if resumed is None and (folder / "config.yaml").exists():
            raise Error(
                f"--run_dir {folder} holds a run already; name another folder, "
                f"or continue that run with --ckpt_path {folder}/checkpoints/last.ckpt"
            )
        return folder, run_id or runs.new_id()
    own = runs.folder_of(resumed) if resumed else None
    new = runs.new_id() if verb == "fit" else f"{runs.new_id()}-{verb}"
    return own or runs.ROOT / method / new, run_id or new


def check_slurm(environment: dict[str, str], trainer: Any) -> None:
    """Refuse to start where SLURM started another number of tasks than there are devices: it would hang.

    Raises:
        Error: the numbers differ.
    """
    tasks = environment.get("SLURM_NTASKS")
    if not tasks or environment.get("SLURM_JOB_NAME") in ("bash", "interactive"):
        return
    nodes, devices = int(trainer.num_nodes), device_count(trainer.devices, trainer.accelerator)
    if int(tasks) != nodes * devices:
        raise Error(
            f"SLURM started {tasks} task{'s' if tasks != '1' else ''}, but the trainer wants {devices} devices on "
            f"{nodes} node{'s' if nodes > 1 else ''} with one task each; give sbatch --nodes={nodes} "
            f"--ntasks-per-node={devices}, or change --trainer.devices and --trainer.num_nodes"
        )


def device_count(devices: Any, accelerator: str) -> int:
    """Return how many devices of a node the trainer's option `devices` means."""
    if isinstance(devices, list):
        return len(devices)
    if str(devices) not in ("auto", "-1"):
        return int(devices) if str(devices).isdigit() else len(str(devices).split(","))
    gpus = torch.cuda.device_count() if accelerator in ("auto", "gpu", "cuda") else 0
    return max(gpus, 1)
