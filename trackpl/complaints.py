"""Turn a parser's page of complaints into one line: where it stands, what is wrong, the closest match."""

import importlib
import inspect
import re
from collections.abc import Iterator
from typing import Any

from jsonargparse import ArgumentParser

from trackpl.arguments import Request, Source, allowed_packages
from trackpl.errors import closest

LONGEST = 300  # characters of a complaint of a kind that is not known here


def explain(message: str, request: Request) -> str:
    """Return one line for a message of jsonargparse."""
    parser, sources = request.parser, request.sources
    for attempt in (_import, _option_of_class, _no_attribute, _unrecognised, _group, _type):
        if line := attempt(message, parser, sources):
            return line
    line = " ".join(message.split())
    return line if len(line) <= LONGEST else f"{line[:LONGEST]} ..."


def options_of(cls: Any) -> list[str]:
    """Return the names of what a class can be made with, those of its bases too where it hands on the rest."""
    names: list[str] = []
    for base in inspect.getmro(cls) if inspect.isclass(cls) else [cls]:
        function = base.__dict__.get("__init__") if inspect.isclass(base) else base
        if function is None:
            continue
        parameters = list(inspect.signature(function).parameters.values())
        names += [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        if not any(p.kind == p.VAR_KEYWORD for p in parameters):
            break
    return [name for name in dict.fromkeys(names) if name not in ("self", "params")]


def _import(message: str, parser: ArgumentParser, sources: list[Source]) -> str | None:
    found = re.search(r"Importing '([^']+)' is not allowed", message)
    if not found:
        return None
    allowed = ", ".join(allowed_packages())
    return f"{_where(sources, _key(message))}'{found[1]}' may not be named; allowed are classes of {allowed}"


def _option_of_class(message: str, parser: ArgumentParser, sources: list[Source]) -> str | None:
    found = re.search(r"Option '([^']+)' is not accepted", message)
    paths = re.findall(r"class_path[= ]'([^']+)'", message[: found.start() + 400] if found else "")
    if not found or not paths:
        return None
    name = found[1]
    inner = re.search(r"Got value: Namespace\(class_path='([^']+)'", message[found.end() :])
    path = inner[1] if inner else paths[0]
    key = f"{_key(message)}.{name}"
    known = options_of(_named(path))
    return (
        f"{_where(sources, key)}{path.rsplit('.', 1)[-1]} has no option '{name}'; {closest(name.split('.')[0], known)}"
    )


def _no_attribute(message: str, parser: ArgumentParser, sources: list[Source]) -> str | None:
    found = re.search(r"module '([^']+)' has no attribute '([^']+)'|No module named '([^']+)'", message)
    if not found:
        return None
    if found[3]:
        return f"{_where(sources, _key(message))}no module is called '{found[3]}'"
    module = importlib.import_module(found[1])
    classes = [name for name, value in vars(module).items() if inspect.isclass(value) and name[0] != "_"]
    hint = closest(found[2], classes)
    hint = f"; {hint}" if hint.startswith("did") else ""
    return f"{_where(sources, _key(message))}there is no '{found[2]}' in {found[1]}{hint}"


def _unrecognised(message: str, parser: ArgumentParser, sources: list[Source]) -> str | None:
    found = re.search(r"unrecognized arguments: (\S+)", message)
    if not found:
        return None
    name = found[1].partition("=")[0]
    if not name.startswith("-"):
        return f"'{name}' is not an option; options begin with --"
    return f"no option is called '{name}'; {_close(name.lstrip('-'), parser, '--')}"


def _group(message: str, parser: ArgumentParser, sources: list[Source]) -> str | None:
    found = re.search(
        r"(?:Group '(?P<group>[^']+)'|Subcommand '[^']+') does not accept option '(?P<option>[^']+)'", message
    ) or re.search(r"Option '(?P<option>[^']+)' is not accepted(?P<group>)", message)
    if not found:
        return None
    key = ".".join(part for part in (found["group"], found["option"]) if part)
    key = key.split(".", 1)[1] if key.split(".")[0] in ("fit", "validate", "test", "predict") else key
    return f"{_where(sources, key)}no option is called '{key}'; {_close(key, parser, '')}"


def _type(message: str, parser: ArgumentParser, sources: list[Source]) -> str | None:
    key = _key(message)
    values = re.findall(r"(?:Got value|Given value): (.+)", message)
    kinds = re.findall(r"Subtypes: \[(.+)\]", message) or re.findall(r"Expected an? (.+?)\. Got value", message)
    if "Problem with given class_path" in message:
        kinds = re.findall(r"Subtypes: \[(.+)\]", message)[1:] or re.findall(r"Expected an? (.+?)\. Got value", message)
    if not key or not values or not kinds:
        return None
    nested = re.search(r"val='?([^')]*)'?\)", values[-1]) if values[-1].startswith("NestedArg") else None
    value = re.sub(r"^(.*?)\.?$", r"\1", nested[1] if nested else values[0 if len(kinds) == 1 else -1])
    kind = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", kinds[-1]).replace("NoneType", "null")
    kind = kind.replace("typing.", "").replace("collections.abc.", "")
    if literals := re.findall(r"Literal\[([^]]*)\]", kind):
        kind = f"one of {', '.join(literals)}"
    elif "[" not in kind:
        kind = " or ".join(kind.split(", "))
    return f"{_where(sources, key)}{key} must be {kind}, got {value!r}"


def _key(message: str) -> str:
    """Join the nested keys of a message: model, then optimizer."""
    return ".".join(dict.fromkeys(re.findall(r'Parser key "([^"]+)"', message)))


def _close(name: str, parser: ArgumentParser, dashes: str) -> str:
    """Return the closest match among the options of the parser, or those of the same group."""
    known = list(parser.get_defaults(skip_validation=True).keys())
    known = sorted({*known, *(key.split(".")[0] for key in known)} | {"model", "data"})
    hint = closest(name, [f"{dashes}{key}" for key in known] if dashes else known)
    if hint.startswith("did"):
        return hint
    group = [key for key in known if "." in name and key.startswith(name.split(".")[0] + ".")]
    some = group or [key for key in known if "." not in key]
    return f"allowed: {', '.join(some)}"


def _where(sources: list[Source], key: str) -> str:
    """Name the config that sets `key`, the last one; the command line needs no name."""
    for source in reversed(sources):
        if any(path == key or path.startswith(f"{key}.") for path in _paths(source.content)):
            return f"{source.name}: "
    return ""


def _paths(value: Any, key: str = "") -> Iterator[str]:
    """Yield the dotted keys of a config as they are typed, without `init_args` and the places in lists."""
    if isinstance(value, dict):
        for name, item in value.items():
            inner = key if name in ("init_args", "dict_kwargs") else f"{key}.{name}".lstrip(".")
            yield inner
            yield from _paths(item, inner)
    elif isinstance(value, list):
        for item in value:
            yield from _paths(item, key)


def _named(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)
