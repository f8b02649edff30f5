"""Sweep files: the grid of a W&B sweep, read strictly, so that `trackpl sweep` and `wandb sweep` mean the same runs.

Of W&B's format (docs.wandb.ai, "Sweep configuration") a grid needs ``program``, ``command``, ``method: grid`` and
``parameters``, each with ``value`` or ``values``; ``name``, ``description``, ``metric``, ``project`` and ``entity`` may
stand there. The command runs ``trackpl fit``, and each parameter is one of its options.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from trackpl import configs
from trackpl.errors import Error, closest

SEEDS = ("seed_everything", "data.seed")
"""Parameters over which a table takes the mean."""
_KEYS = ("program", "command", "method", "parameters", "name", "description", "metric", "project", "entity")
_NEEDED = ("program", "command", "method", "parameters")
_MACROS = ("${env}", "${program}", "${args}")
_OURS = ("run_dir", "ckpt_path")  # what the sweep gives each run itself
_EXAMPLE = '["${env}", "${program}", fit, --config, NAME, "${args}"] with `program: trackpl`'
_MAX_BYTES, _MAX_RUNS = 2**18, 10_000


@dataclass(frozen=True)
class Run:
    """One point of the grid."""

    name: str  # of its folder
    values: dict[str, Any]  # of the parameters that vary
    arguments: tuple[str, ...]  # of `trackpl fit`


@dataclass(frozen=True)
class Sweep:
    """What a sweep file says."""

    key: str  # name of the file without its suffix
    title: str
    description: str
    parameters: dict[str, list[Any]]
    runs: tuple[Run, ...]  # the first parameter varies slowest

    @property
    def varied(self) -> list[str]:
        """Names of the parameters with several values, without the seeds."""
        return [name for name, values in self.parameters.items() if len(values) > 1 and name not in SEEDS]


def names() -> list[str]:
    """Return the bare names of the sweeps that can be found, such as ``windows``."""
    places = [path for folder in configs.folders() for path in (folder / "sweeps").glob("*")]
    return sorted({path.stem for path in places if path.suffix in configs.SUFFIXES})


def find(name: str) -> Path:
    """Return the sweep file called `name`: a file of that path, else ``sweeps/NAME.yaml`` where configs lie.

    Raises:
        Error: there is none; the message holds the closest match.
    """
    literal = Path(name).expanduser()
    if literal.is_file():
        return literal
    for folder in configs.folders():
        for suffix in configs.SUFFIXES:
            if (path := folder / "sweeps" / f"{name}{suffix}").is_file():
                return path
    raise Error(f"no sweep '{name}': no such file and no such name; {closest(Path(name).stem, names())}")


def read(path: Path, extra: Sequence[str] = ()) -> Sweep:
    """Read a sweep file; `extra` are options of `trackpl fit` for every run, which win over the file's.

    Raises:
        Error: it is no grid of `trackpl fit`, or holds anything that is not known here.
    """
    content = _content(path)
    _check_keys(path, content)
    before, after = _command(path, content)
    parameters = _parameters(path, content["parameters"])
    count = 1
    for values in parameters.values():
        count *= len(values)
    if count > _MAX_RUNS:
        raise Error(f"{path}: the grid has {count} runs, more than {_MAX_RUNS}")
    if own := [a for a in (*before, *after, *extra) if a.partition("=")[0] in {f"--{name}" for name in _OURS}]:
        raise Error(f"{own[0].partition('=')[0]} cannot be chosen: the sweep gives each run a folder of its own")
    runs = _grid(parameters, before, (*after, *extra))
    title, description = (" ".join(str(content.get(key) or "").split()) for key in ("name", "description"))
    return Sweep(path.stem, title or path.stem, description, parameters, tuple(runs))


# The file ---------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """Refuses what is legal YAML but never meant in a sweep: a key given twice, and aliases."""

    def compose_node(self, parent: Any, index: int) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "aliases are not allowed in a sweep", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        count = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if twice := [name for name, n in count.items() if n > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"'{twice[0]}' is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _content(path: Path) -> dict[Any, Any]:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise Error(f"{path}: larger than {_MAX_BYTES} bytes, this is no sweep file")
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise Error(f"{path}{where}: not valid YAML: {problem or 'unreadable characters'}") from error
    except (ValueError, RecursionError, OSError) as error:
        raise Error(f"{path}: cannot be read as YAML: {' '.join(str(error).split())[:120]}") from error
    if not isinstance(content, dict):
        raise Error(f"{path}: a sweep is a mapping with {', '.join(_NEEDED)}; this holds {_kind(content)}")
    return content


def _check_keys(path: Path, content: Mapping[Any, Any]) -> None:
    for key in content:
        if key not in _KEYS:
            raise Error(f"{path}: a sweep has no key '{key}'; {closest(str(key), _KEYS)}")
    if missing := [key for key in _NEEDED if key not in content]:
        raise Error(f"{path}: '{missing[0]}' is missing; a sweep needs {', '.join(_NEEDED)}")
    if content["method"] != "grid":
        raise Error(f"{path}: method must be grid, got '{content['method']}'; wandb sweep knows the others")


def _command(path: Path, content: Mapping[Any, Any]) -> tuple[list[str], list[str]]:
    """Return the arguments of `trackpl fit` before and after those of the grid."""
    command, program = content["command"], content["program"]
    if not isinstance(command, list) or not all(isinstance(word, str | int | float) for word in command):
        raise Error(f"{path}: command must be a list of words, such as {_EXAMPLE}")
    words = [str(word) for word in command]
    for word in words:
        if word.startswith("${") and word not in _MACROS:
            raise Error(f"{path}: command: {word} is not known here; {closest(word, _MACROS)}")
    words = [str(program) if word == "${program}" else word for word in words]
    words = words[1:] if words[:1] == ["${env}"] else words
    if words[:2] != ["trackpl", "fit"] or words.count("${args}") != 1 or "${env}" in words:
        raise Error(f"{path}: command must run trackpl fit and hold ${{args}} once: {_EXAMPLE}")
    place = words.index("${args}")
    return words[2:place], words[place + 1 :]


def _parameters(path: Path, section: Any) -> dict[str, list[Any]]:
    if not isinstance(section, dict) or not section:
        raise Error(f"{path}: parameters must map options of trackpl fit to values, this is {_kind(section)}")
    return {name: _values(path, name, spec) for name, spec in section.items()}


def _values(path: Path, name: Any, spec: Any) -> list[Any]:
    where = f"{path}: parameters: {name}"
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_][\w.]*", name):
        raise Error(f"{where}: a parameter is an option of trackpl fit without hyphens, such as model.radius")
    if name in _OURS:
        raise Error(f"{where}: cannot be varied: the sweep gives each run a folder of its own")
    if not isinstance(spec, dict) or len(spec) != 1 or not {"value", "values"} & spec.keys():
        unknown = [str(key) for key in spec if key not in ("value", "values")] if isinstance(spec, dict) else []
        hint = f"; '{unknown[0]}' is not known here, {closest(unknown[0], ('value', 'values'))}" if unknown else ""
        raise Error(f"{where}: give `value: V` or `values: [V, W]`{hint}")
    values = [spec["value"]] if "value" in spec else spec["values"]
    if not isinstance(values, list) or not values:
        raise Error(f"{where}: values must be a list that is not empty, this is {_kind(values)}")
    for value in values:
        _check_plain(value, where)
    texts = Counter(map(text_of, values))
    if twice := [text for text, n in texts.items() if n > 1]:
        raise Error(f"{where}: {twice[0]} is given twice")
    return values


def _check_plain(value: Any, where: str) -> None:
    """Raise `Error` for what does not come through a command line: dates, bytes, sets, and what W&B calls None."""
    if isinstance(value, list | dict):
        for inner in [*value.keys(), *value.values()] if isinstance(value, dict) else value:
            _check_plain(inner, where)
    elif not isinstance(value, str | int | float):
        raise Error(f"{where}: {'null' if value is None else value} must stand in quotes, to be handed on as it is")


# The runs ---------------------------------------------------------------------------------------------------


def text_of(value: Any) -> str:
    """Write a value as it stands after ``--option=``."""
    return value if isinstance(value, str) else json.dumps(value)


def label_of(parameter: str, value: Any) -> str:
    """Write a value for people: of a config its name alone."""
    return Path(text_of(value)).stem if parameter == "config" else text_of(value)


def shorter(names: Sequence[str]) -> dict[str, str]:
    """Return for each option the last part of its name, where no other one ends alike."""
    tails = {name: name.rpartition(".")[2] for name in names}
    count = Counter(tails.values())
    return {name: tail if count[tail] == 1 else name for name, tail in tails.items()}


def _grid(parameters: Mapping[str, list[Any]], before: Sequence[str], after: Sequence[str]) -> Iterator[Run]:
    varied = sorted((name for name, values in parameters.items() if len(values) > 1), key=lambda name: name in SEEDS)
    short = shorter(varied)
    points = [dict(zip(parameters, values, strict=True)) for values in itertools.product(*parameters.values())]
    folders = [",".join(f"{short[n]}={_slug(label_of(n, point[n]))}" for n in varied) or "run" for point in points]
    alike = Counter(folder.casefold() for folder in folders)  # some file systems do not tell A from a
    for point, folder in zip(points, folders, strict=True):
        values = {name: point[name] for name in varied}
        if alike[folder.casefold()] > 1 or len(folder) > 120:
            folder = f"{folder[:110]}-{hashlib.sha256(repr(values).encode()).hexdigest()[:8]}"
        grid = [f"--{name}={text_of(value)}" for name, value in point.items()]
        yield Run(folder, values, (*before, *grid, *after))


def recipe(run: Run) -> dict[str, Any]:
    """Return what the result of a run follows from: its arguments, and the SHA-256 of each config that they name."""
    found = {name: hashlib.sha256(configs.find(name).read_bytes()).hexdigest() for name in _configs(run.arguments)}
    return {"arguments": list(run.arguments), "configs": found}


def _configs(arguments: Sequence[str]) -> Iterator[str]:
    for i, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if flag in ("--config", "-c"):
            yield value if equals else next(iter(arguments[i + 1 : i + 2]), "")


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.+-]+", "_", text).strip("_.")[:40] or "_"


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"
