"""`load`: a method by name with its own, our or its authors' weights, recognised by content."""

from __future__ import annotations

import inspect
import json
import pickle
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from trackpl.errors import CheckpointError, closest
from trackpl.method import Method
from trackpl.plugins import find, plugins
from trackpl.published import is_commercial, resolve, shipped_path


def load(name: str, checkpoint: str | Path | None = None, device: str = "cpu", **init_args: Any) -> Method:
    """Return a method in eval mode.

    Args:
        name: a plugin's short name, see `trackpl plugins`.
        checkpoint: a checkpoint of `trackpl fit`, a `.safetensors` file, or the authors' published file, told apart by
            their content; or the name of weights in `trackpl weights`, published ones once they are fetched. None takes
            those that ship under the plugin's own name.
        device: where the method computes.
        **init_args: options of the method; they go before those stored in the checkpoint.

    Raises:
        PluginError: no such method, or it cannot be imported.
        CheckpointError: no such file, not a checkpoint, of another method, or with keys or shapes that do not fit.
    """
    plugin = find(name)
    cls: type[Method] = plugin.load()
    known = [p for p in inspect.signature(cls).parameters]
    for option in init_args:
        if option not in known:
            raise CheckpointError(f"method '{name}' has no option '{option}'; {closest(option, known)}")
    path = resolve(checkpoint, cls) if checkpoint is not None else _shipped(cls, name)
    state, stored, class_path = read_checkpoint(path)
    if class_path is not None and class_path != plugin.class_path:
        owner = next((p.name for p in plugins().values() if p.class_path == class_path), None)
        hint = f"name '{owner}' instead" if owner else "its plugin is not installed"
        raise CheckpointError(f"{path} is a checkpoint of method '{owner or class_path}', not of '{name}'; {hint}")
    if not stored or (class_path is None and not stored.keys() <= set(known)):  # somebody else's
        named = next((p.options for p in cls.published if p.file_name == path.name), {})
        stored = dict(named) | cls.options_of(state)
    options = {k: v for k, v in stored.items() if k in known and k not in ("optimizer", "lr_scheduler")}
    method: Method = cls(**(options | init_args))
    weights = method.import_weights(state)
    fit_state(method, weights, path)
    if weights.keys() != state.keys() and not is_commercial(cls.info.weights_licence):
        print(f"trackpl: {path.name}: non-commercial weights, {cls.info.weights_licence}", file=sys.stderr)
    return method.to(device).eval()


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], str | None]:
    """Read weights, constructor options and, in a file of ours, the class path; nothing in the file is run."""
    if not path.is_file():
        siblings = [p.name for p in path.parent.glob("*")] if path.parent.is_dir() else []
        raise CheckpointError(f"no checkpoint at {path}" + (f"; {closest(path.name, siblings)}" if siblings else ""))
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, zipfile.BadZipFile, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path} is not a readable checkpoint ({_reason(error)}); allowed: a file of `trackpl fit`, "
            "a .safetensors file, or a published checkpoint of tensors only"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a checkpoint")
    hyper = dict(content.get("hyper_parameters") or {})
    class_path = hyper.pop("_class_path", None) or content.get("trackpl_class")
    for inner in ("state_dict", "model", "model_state_dict"):
        if isinstance(content.get(inner), dict):
            content = content[inner]
            break
    state = {k: v for k, v in content.items() if isinstance(v, Tensor)}
    if not state:
        raise CheckpointError(f"{path} holds no tensors; is it a checkpoint?")
    return state, hyper, class_path


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], str | None]:
    try:
        with safe_open(path, "pt") as file:
            meta = file.metadata() or {}
        state = load_file(path)
        options = json.loads(meta.get("init_args", "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not a readable .safetensors file ({_reason(error)})") from error
    if not isinstance(options, dict):
        raise CheckpointError(f"{path}: 'init_args' in its metadata must be a JSON object")
    return state, options, meta.get("class_path")


def fit_state(method: Method, state: dict[str, Tensor], path: Path) -> None:
    """Load a state, all of it or nothing; the error tables what is missing, unexpected or misshapen."""
    own = method.state_dict()
    missing = [k for k in own if k not in state]
    unexpected = [k for k in state if k not in own]
    misshapen = [k for k in own if k in state and own[k].shape != state[k].shape]
    if missing or unexpected or misshapen:
        rows = [f"  missing     {k} {tuple(own[k].shape)}" for k in missing]
        rows += [f"  unexpected  {k} {tuple(state[k].shape)}" for k in unexpected]
        rows += [f"  misshapen   {k} {tuple(state[k].shape)}, needed {tuple(own[k].shape)}" for k in misshapen]
        more = [f"  ... and {len(rows) - 12} more"] if len(rows) > 12 else []
        raise CheckpointError(
            f"{path} does not fit {type(method).__name__}: {len(missing)} missing, {len(unexpected)} unexpected, "
            f"{len(misshapen)} misshapen of {len(own)} keys; nothing was loaded, is it another method's?\n"
            + "\n".join(rows[:12] + more)
        )
    method.load_state_dict({k: state[k].to(own[k].dtype) for k in own})


def _shipped(cls: type[Method], name: str) -> Path:
    path = shipped_path(cls)
    if path is None:
        raise CheckpointError(
            f"method '{name}' ships no weights; name a checkpoint, or train one: trackpl fit --model {name}"
        )
    if not path.is_file():
        raise CheckpointError(f"the weights that ship with '{name}' are missing ({path}); reinstall its package")
    return path


def _reason(error: Exception) -> str:
    """Return the first line of an error, without the advice of libraries to load files unsafely."""
    if not isinstance(error, RuntimeError | pickle.UnpicklingError | SafetensorError):
        return "it is not in a format of torch's"
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return "it holds more than tensors" if "weights_only" in text.lower() or "Unsupported" in text else text[:120]
