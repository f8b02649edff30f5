"""`trackpl weights`: which weights there are for each method, under which licence, and fetching what others publish.

The files of others lie in ``<cache>/weights/``; see `trackpl.published`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trackpl.downloads import Download
from trackpl.errors import DataError, Error, PluginError, UnreachableError, closest
from trackpl.plugins import Plugin, plugins
from trackpl.published import Published, file_sha256, in_package, shipped_path
from trackpl.remote import Patience
from trackpl.usage import Parser

LICENCE = 36  # characters of a licence in the table
TRIES = 4  # in a row without a byte more; $TRACKPL_TRIES allows another number


@dataclass(frozen=True)
class Shipped:
    """Weights that come with a plugin."""

    name: str  # the method's for those that it takes by itself
    method: str
    licence: str
    path: Path | None  # None: it ships none
    package: str


def run(args: list[str]) -> int:
    """List, fetch or locate weights; return 0.

    Raises:
        Error: no such weights, or they cannot be had.
    """
    parser = Parser("weights", "Show the weights of all methods; fetch those that others publish.")
    actions: dict[str, Callable[[Any], int]] = {"list": _list, "get": _get, "path": _path}
    parser.add_argument(
        "action", nargs="?", default="list", metavar="list|get|path", help="list all (default), fetch, show the file"
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="which weights to fetch or to show the file of")
    given = parser.parse_args(args)
    if given.action not in actions:
        hint = closest(given.action, actions)
        raise Error(f"weights has no action '{given.action}'; {hint}; to fetch: trackpl weights get NAME")
    if (given.name is None) != (given.action == "list"):
        want = "takes no NAME" if given.action == "list" else f"needs a NAME: trackpl weights {given.action} NAME"
        raise Error(f"weights {given.action} {want}; see trackpl weights")
    return actions[given.action](given.name)


def _known() -> tuple[dict[str, Shipped], dict[str, Published], list[str]]:
    """Return what ships and what is published, by name, and what is wrong with the plugins that cannot say."""
    shipped: dict[str, Shipped] = {}
    published: dict[str, Published] = {}
    faults, inherited, others = [], [], []
    for plugin in plugins().values():
        try:
            cls: Any = plugin.load()
            own, more, records = _shipped(plugin, cls), _more(plugin, cls), _published(plugin, cls)
        except PluginError as error:
            faults.append(str(error))
            continue
        shipped[plugin.name] = own
        others += [(plugin, extra) for extra in more]
        for record in records:
            if record.method != plugin.name:
                inherited.append((plugin, record))
            elif published.setdefault(record.name, record) != record:
                faults.append(f"{plugin}: publishes other weights under the name '{record.name}', which is taken")
    for plugin, extra in others:
        if extra.name in published or shipped.setdefault(extra.name, extra) != extra:
            faults.append(f"{plugin}: ships weights under the name '{extra.name}', which is taken")
    for plugin, record in inherited:  # a subclass has those of its parent, but none may speak for another
        if published.get(record.name) != record:
            faults.append(f"{plugin}: publishes '{record.name}' for '{record.method}', which is not its own name")
    return shipped, published, faults


def _shipped(plugin: Plugin, cls: Any) -> Shipped:
    licence = getattr(getattr(cls, "info", None), "weights_licence", "") or "not stated"
    return Shipped(plugin.name, plugin.name, licence, shipped_path(cls), f"{plugin.package} {plugin.version}")


def _more(plugin: Plugin, cls: Any) -> list[Shipped]:
    own, files = _shipped(plugin, cls), vars(cls).get("more_weights", {})  # not those of a parent, which lists them
    if not isinstance(files, Mapping):
        raise PluginError(f"{plugin}: `more_weights` must map names to files of its package; upgrade {plugin.package}")
    return [replace(own, name=name, path=in_package(cls, file)) for name, file in files.items()]


def _published(plugin: Plugin, cls: Any) -> tuple[Published, ...]:
    records = cls.published
    if not isinstance(records, tuple) or not all(isinstance(r, Published) for r in records):
        raise PluginError(
            f"{plugin}: `published` must be a tuple of trackpl.weights.Published; upgrade {plugin.package}"
        )
    return records


def _list(_: None) -> int:
    shipped, published, faults = _known()
    rows = [("NAME", "METHOD", "SIZE", "LICENCE", "WHERE")]
    notes: dict[int, list[str]] = {}
    for own in sorted(shipped.values(), key=lambda own: own.method):
        where = f"ships with {own.package}" if own.path else "ships no weights"
        if own.path and not own.path.is_file():
            where = f"MISSING from {own.package}; reinstall it"
        rows.append((own.name, own.method, _size(own.path), own.licence if own.path else "-", where))
        for record in (p for p in published.values() if p.method == own.name):
            notes[len(rows)] = _notes(record)
            rows.append(_row(record))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for number, row in enumerate(rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        for line in notes.get(number, []):
            print(f"    {line}")
    if any(not p.commercial for p in published.values()):
        print("\nNON-COMMERCIAL: the licence of these weights does not allow commercial use")
    if any(not p.path.is_file() for p in published.values()):
        print("\nto fetch what is not here yet: trackpl weights get NAME")
    for fault in faults:
        print(f"trackpl: {fault}", file=sys.stderr)
    return 0


def _row(record: Published) -> tuple[str, str, str, str, str]:
    here = record.path.is_file()
    size = _size(record.path) if here else _amount(record.bytes)
    return record.name, record.method, size, _short(_licence(record)), str(record.path) if here else "not fetched"


def _notes(record: Published) -> list[str]:
    lines = [record.address]
    lines += [f"licence: {record.licence}"] if _short(_licence(record)) != _licence(record) else []
    lines += [f"{benchmark}: {figure}" for benchmark, figure in record.figures.items()]
    return lines + ([record.note] if record.note else [])


def _licence(record: Published) -> str:
    return record.licence if record.commercial else f"NON-COMMERCIAL ({record.licence})"


def _short(licence: str) -> str:
    """Return a licence in the width of its column; what is cut stands below in full."""
    return licence if len(licence) <= LICENCE else licence[: LICENCE - 1].rstrip() + "…"


def _size(path: Path | None) -> str:
    return _amount(path.stat().st_size) if path is not None and path.is_file() else "-"


def _amount(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 1e6:.3g} MB"


def _find(name: str) -> Shipped | Published:
    shipped, published, faults = _known()
    if name in published:
        return published[name]
    if by_file := [p for p in published.values() if p.file_name == name]:
        return by_file[0]
    if name in shipped and shipped[name].path is not None:
        return shipped[name]
    have = [*published, *(own.name for own in shipped.values() if own.path)]
    broken = f"; not looked at, for they are broken: {'; '.join(faults)}" if faults else ""
    raise Error(f"no weights are called '{name}'; {closest(name, have)}{broken}")


def _path(name: str) -> int:
    found = _find(name)
    assert found.path is not None
    if not found.path.is_file():
        raise Error(f"'{name}' is not on this machine; fetch it: trackpl weights get {name}")
    print(found.path)
    return 0


def _get(name: str) -> int:
    found = _find(name)
    if isinstance(found, Shipped):
        print(f"'{name}' ships with {found.package}, there is nothing to fetch: {found.path}")
        which = "" if name == found.method else f" --checkpoint {name}"
        print(f"next: trackpl track VIDEO --model {found.method}{which}")
        return 0
    print(f"{found.name} for {found.method}, from {found.address}")
    print(f"licence of these weights: {_licence(found)}")
    print(get(found))
    print(f"next: trackpl track VIDEO --model {found.method} --checkpoint {found.path}")
    return 0


def get(record: Published) -> str:
    """Fetch published weights into the cache unless they are there, and verify them; say in a line or two how it went.

    Raises:
        UnreachableError: no network, or no answer.
        DataError: there is no such file, or not the one that was published or came the first time.
        Error: the cache cannot be written.
    """
    told = ""
    if record.path.is_file():
        told = record.fault()
        if not told:
            known = record.known_sha256
            found = known or file_sha256(record.path)
            record.remember(found)
            how = "verified" if known else "put there by hand; nobody states a hash, so that it is not verified"
            return f"already here, {how}, SHA-256 {found}: {record.path}"
        told += "; fetched again\n"
    sha256 = _fetch(record)
    record.remember(sha256)
    how = "as published" if record.sha256 else "nobody states one, it is kept to notice changes"
    return f"{told}{_size(record.path)}, SHA-256 {sha256} ({how}): {record.path}"


def _fetch(record: Published) -> str:
    from trackpl.writing import replacing

    patience = Patience.from_environment()
    if not os.environ.get("TRACKPL_TRIES"):
        patience = replace(patience, tries=TRIES)
    by_hand = f"to do it by hand, put that file at {record.path}"
    try:
        with replacing(record.path) as part, open(part, "r+b") as file, _Bar(record.name) as bar:
            download = Download(
                record.address,
                file,
                size=record.bytes,
                sha256=record.known_sha256,
                patience=patience,
                progress=bar.show,
            )
            download.run()
    except UnreachableError as error:
        raise UnreachableError(f"{record.address} gives no answer ({error}); is there a network? {by_hand}") from None
    except DataError as error:
        raise DataError(f"{error}{_other_file(record)}") from None
    except OSError as error:
        raise Error(f"cannot write {record.path}: {error.strerror}; TRACKPL_CACHE names another folder") from error
    return download.digest


def _other_file(record: Published) -> str:
    if record.sha256 is None and record.known_sha256 is not None:
        return f"; if its publisher replaced it, delete {record._note_path} and try again"
    return ""


class _Bar:
    """A progress bar on a terminal, nothing elsewhere."""

    def __init__(self, name: str) -> None:
        from tqdm import tqdm

        self._bar = tqdm(desc=name, unit="B", unit_scale=True, leave=False, disable=None)

    def show(self, got: int, total: int | None, fault: str) -> None:
        """Show that `got` of `total` bytes are there, and why it goes no further just now."""
        self._bar.total, self._bar.n = total, got
        if fault:
            self._bar.set_postfix_str(f"trying again: {fault}", refresh=False)
        self._bar.update(0)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
