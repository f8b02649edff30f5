"""What the user says to `fit`, `validate`, `test` and `predict`: short names, configs, checkpoints and their order.

Precedence for the options of a method: command line > checkpoint > configs (later ones win) > defaults. It is had by
handing LightningCLI the configs first, then the checkpoint's options as one more config, then the command line.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from trackpl import configs, runs
from trackpl.errors import CheckpointError, Error, closest
from trackpl.plugins import find, find_class, plugins

MODEL_FLAGS = ("--model", "--model.class_path", "--model.help")
CLASS_KEYS = {"class_path", "init_args", "dict_kwargs"}
DEFAULT_DATA = "trackpl.data.ShardDataModule"
LIBRARIES = ("trackpl", "trackpl_prep", "lightning", "torch.optim", "torch.nn")


@dataclass
class Source:
    """One config: where it came from and what it says, with class paths for short names."""

    name: str
    content: dict[str, Any]


@dataclass
class Request:
    """All that the user asked for, ready for the parser."""

    argv: list[str]
    sources: list[Source] = field(default_factory=list)
    checkpoint: Path | None = None
    content: dict[str, Any] = field(default_factory=dict)  # of the checkpoint
    parser: Any = None  # of the verb, once there is one


def allowed_packages() -> list[str]:
    """Return the packages whose classes a config may name: LIBRARIES and those of the registered methods."""
    return [*LIBRARIES, *sorted({p.class_path.split(".")[0] for p in plugins().values() if not p.fault})]


def read(verb: str, args: list[str]) -> Request:
    """Resolve configs, names and the checkpoint of a command line; class paths are checked before any import.

    Raises:
        Error: a config is missing or malformed, a name is unknown, or the checkpoint does not fit.
    """
    names, rest = _split(args)
    sources = [_load(name) for name in names]
    rest = _expand_flags(rest)
    request = Request([], sources)
    model = named_model(rest) or _given_class(sources, "model")
    asked = _option(rest, "--ckpt_path") or _last(sources, "ckpt_path")
    if asked:
        run_dir = _option(rest, "--run_dir") or _last(sources, "run_dir")
        request.checkpoint = _checkpoint_path(asked, model, run_dir)
        request.content = runs.read(request.checkpoint)
        request.sources = _with_checkpoint(verb, request, model, bool(names))
        model = request.content["hyper_parameters"]["_class_path"]
    if not model:
        raise Error(
            f"no method is named; give --model NAME or --config NAME; methods: {', '.join(plugins()) or 'none'}"
        )
    if model in {plugin.class_path for plugin in plugins().values()}:
        find_class(model)  # so that its failure is reported as its own, and no other plugin is imported
    data = _option(rest, "--data") or _option(rest, "--data.class_path")
    classes = {"model": model, "data": data or _given_class(request.sources, "data") or DEFAULT_DATA}
    for flag in ("--model", "--model.class_path", "--data", "--data.class_path"):
        rest = _without(rest, flag)
    parts = [{key: {"class_path": path} for key, path in classes.items()}]
    parts += [_of_class(source.content, classes) for source in request.sources]
    request.argv = [verb, *(f"--config={json.dumps(part)}" for part in parts), *rest]
    return request


def read_help(verb: str, args: list[str]) -> Request:
    """Return the request that shows the options of the verb, or of the method that is named."""
    model = named_model(_expand_flags(args))
    if model in {plugin.class_path for plugin in plugins().values()}:
        find_class(model)
    return Request([verb, f"--model.help={model}" if model else "--help"])


def named_model(args: list[str]) -> str | None:
    """Return what stands after `--model` on the command line."""
    return _option(args, "--model") or _option(args, "--model.class_path")


def _split(args: list[str]) -> tuple[list[str], list[str]]:
    """Separate the names of configs from the other arguments."""
    names, rest, todo = [], [], iter(args)
    for arg in todo:
        flag, equals, value = arg.partition("=")
        if flag not in ("--config", "-c"):
            rest.append(arg)
        elif equals:
            names.append(value)
        else:
            value = next(todo, "")
            if not value or value.startswith("-"):
                raise Error(f"{flag} needs the name or path of a config; {closest('', configs.names())}")
            names.append(value)
    return names, rest


def _load(name: str) -> Source:
    path = configs.find(name)
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise Error(f"{path}{where}: not valid YAML: {problem or 'unreadable characters'}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise Error(f"{path}: cannot be read as a text file: {error}") from error
    if not isinstance(content, dict):
        kind = "nothing" if content is None else f"a {type(content).__name__}"
        raise Error(f"{path}: a config is a mapping such as `model: NAME`, this holds {kind}")
    return _normal(str(path), content)


def _normal(name: str, content: dict[str, Any]) -> Source:
    """Give classes their full form and refuse foreign ones, naming the config."""
    content = dict(content)
    for key in ("model", "data"):
        section = content.get(key)
        if isinstance(section, str):
            content[key] = {"class_path": section}
        elif isinstance(section, dict) and not CLASS_KEYS & section.keys():
            content[key] = {"init_args": section}
    model = content.get("model")
    if isinstance(model, dict) and isinstance(model.get("class_path"), str):
        content["model"] = {**model, "class_path": expand(model["class_path"], f"{name}: ")}
    allowed = allowed_packages()
    for key, path in _class_paths(content):
        _check_class(path, allowed, f"{name}: {key}: ")
    return Source(name, content)


def expand(model: str, where: str = "") -> str:
    """Return the class path of a method's short name; anything with a dot is taken for a class path already."""
    if "." in model or "/" in model:
        _check_class(model, allowed_packages(), where)
        return model
    try:
        return find(model).class_path
    except Error as error:
        raise type(error)(f"{where}{error}") from error


def _class_paths(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield the key and the value of every class path in a config."""
    if isinstance(value, dict):
        for name, item in value.items():
            if name == "class_path" and isinstance(item, str):
                yield f"{key}.class_path".lstrip("."), item
            else:
                yield from _class_paths(item, f"{key}.{name}".lstrip("."))
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from _class_paths(item, f"{key}[{i}]")


def _check_class(path: str, allowed: list[str], where: str) -> None:
    if "." in path and not any(path.startswith(f"{package}.") for package in allowed):
        raise Error(f"{where}'{path}' may not be named; allowed are classes of {', '.join(allowed)}")


def _expand_flags(args: list[str]) -> list[str]:
    out = list(args)
    for i, arg in enumerate(out):
        flag, equals, value = arg.partition("=")
        if flag in MODEL_FLAGS and equals:
            out[i] = f"{flag}={expand(value)}"
        elif flag in MODEL_FLAGS and i + 1 < len(out) and not out[i + 1].startswith("-"):
            out[i + 1] = expand(out[i + 1])
    return out


def _option(args: list[str], flag: str) -> str | None:
    found = None
    for i, arg in enumerate(args):
        name, equals, value = arg.partition("=")
        if name == flag:
            found = value if equals else next(iter(args[i + 1 : i + 2]), None)
    return found


def _without(args: list[str], flag: str) -> list[str]:
    out, todo = [], iter(args)
    for arg in todo:
        name, equals, _ = arg.partition("=")
        if name != flag:
            out.append(arg)
        elif not equals:
            next(todo, None)
    return out


def _last(sources: list[Source], key: str) -> Any:
    return next((s.content[key] for s in reversed(sources) if s.content.get(key)), None)


def _given_class(sources: list[Source], key: str) -> str | None:
    """Return the class that the last config which names one gives to the section `key`."""
    sections = [s.content.get(key) for s in reversed(sources)]
    return next((s["class_path"] for s in sections if isinstance(s, dict) and s.get("class_path")), None)


def _of_class(content: dict[str, Any], classes: dict[str, str]) -> dict[str, Any]:
    """Leave out the sections that are for another class than the one that was chosen in the end."""
    out = dict(content)
    for key, path in classes.items():
        section = out.get(key)
        if isinstance(section, dict):
            if section.get("class_path", path) != path:
                del out[key]
            else:
                out[key] = {**section, "class_path": path}
    return out


def _checkpoint_path(asked: Any, model: str | None, run_dir: str | None) -> Path:
    if asked not in runs.LATEST:
        return Path(str(asked)).expanduser()
    return runs.newest(asked, model and runs.short_name(model), Path(run_dir) if run_dir else None)


def _with_checkpoint(verb: str, request: Request, model: str | None, configured: bool) -> list[Source]:
    """Put the checkpoint's options after the configs; without configs, the rest of its config too."""
    options = dict(request.content["hyper_parameters"])
    own = options.pop("_class_path", None)
    options.pop("_instantiator", None)
    if not own:
        raise CheckpointError(f"{request.checkpoint} does not say of which method it is")
    if model and model != own:
        raise CheckpointError(
            f"{request.checkpoint} is of method {runs.short_name(own)} ({own}), "
            f"not of {runs.short_name(model)} ({model}); give --model {runs.short_name(own)} or another checkpoint"
        )
    stored = {} if configured else request.content.get("trackpl", {}).get("config", {})
    keys = [key for key in stored if key != "model"] if verb == "fit" else ["data"]
    content = {key: stored[key] for key in keys if key in stored}
    content["model"] = {"class_path": own, "init_args": options}
    return [*request.sources, _normal(f"checkpoint {request.checkpoint}", content)]
