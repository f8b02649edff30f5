"""Run folders ``runs/<method>/<run id>/`` and the checkpoints in them.

A checkpoint knows its run: ``checkpoint["trackpl"]`` holds ``run`` (the id) and ``config`` (the merged config), and
``checkpoint["hyper_parameters"]`` the class path of the method with the options that it was made with.
"""

import os
import secrets
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from trackpl.errors import CheckpointError
from trackpl.plugins import plugins

ROOT = Path("runs")
LATEST = ("last", "best")
"""Words that `--ckpt_path` takes for the checkpoint of that name in the newest run."""


def new_id() -> str:
    """Return an id that sorts by time and that no other run has."""
    return f"{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"


def short_name(class_path: str) -> str:
    """Return the name under which a method is registered, or its class name."""
    for plugin in plugins().values():
        if plugin.class_path == class_path:
            return plugin.name
    return class_path.rsplit(".", 1)[-1]


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def newest(word: str, method: str | None, run_dir: Path | None) -> Path:
    """Return the checkpoint `word` ("last", "best") of the newest run of `method`, or of the folder `run_dir`.

    Raises:
        CheckpointError: there is none.
    """
    place = run_dir or ROOT / (method or "*")
    pattern = f"checkpoints/{word}.ckpt"
    found = [run_dir / pattern] if run_dir else list(ROOT.glob(f"{method or '*'}/*/{pattern}"))
    found = [path for path in found if path.is_file()]
    if not found:
        raise CheckpointError(f"no checkpoint '{word}' under {place}; leave --ckpt_path out to start, or name a file")
    return max(found, key=lambda path: path.stat().st_mtime_ns)


def read(path: Path) -> dict[str, Any]:
    """Read a checkpoint that `trackpl fit` wrote, on the CPU, without running anything that it holds.

    Raises:
        CheckpointError: there is no such file, or it is broken, foreign, or of something else.
    """
    if not path.is_file():
        beside = sorted(p.name for p in path.parent.glob("*.ckpt")) if path.parent.is_dir() else []
        hint = f"in that folder: {', '.join(beside)}" if beside else "name a .ckpt file, last or best"
        raise CheckpointError(f"no checkpoint {path}; {hint}")
    content = CheckpointFiles().load_checkpoint(path)
    if "state_dict" not in content or "hyper_parameters" not in content:
        raise CheckpointError(f"{path} was not written by trackpl fit: it names no method and its options")
    return content


def folder_of(checkpoint: Path) -> Path | None:
    """Return the run folder that a checkpoint lies in, if it lies in one."""
    folder = checkpoint.resolve().parent
    return folder.parent if folder.name == "checkpoints" and (folder.parent / "config.yaml").is_file() else None


class CheckpointFiles(TorchCheckpointIO):
    """Writes a checkpoint whole or not at all, and reads it without running code.

    Lightning's own writes to the system's temporary folder and then moves, which across file systems is a copy that a
    killed process leaves half done under the final name.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write beside `path`, flush to the disk and put in its place."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            with open(temporary, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True) -> dict[str, Any]:
        """Read tensors and plain values; whatever else the file holds is refused."""
        try:
            content = torch.load(path, map_location=map_location, weights_only=True)
        except Exception as error:  # torch raises half a dozen kinds for a file that is not a checkpoint
            raise CheckpointError(
                f"{path} cannot be read as a checkpoint: truncated, foreign, or more than tensors and plain values"
            ) from error
        if not isinstance(content, dict):
            raise CheckpointError(f"{path} is not a checkpoint: it holds a {type(content).__name__}")
        return content


def sweep(folder: Path, names: Iterable[str] = ("checkpoints", ".", "media")) -> None:
    """Remove the temporary files that a killed process left in a run folder."""
    for name in names:
        for path in (folder / name).glob(".*.tmp"):
            path.unlink(missing_ok=True)
