"""Weights of a method as files: those that ship with it, and those that others publish.

A plugin states what its authors publish as `Published` records in the class attribute `published` of its method. The
files lie in ``<cache>/weights/``, each beside a ``.sha256`` with the hash that it had when it came: where its publisher
states none, a file that is another one later is noticed all the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from trackpl.cache import cache_folder
from trackpl.downloads import is_safe
from trackpl.errors import CheckpointError, Error

if TYPE_CHECKING:
    from trackpl.method import Method


@dataclass(frozen=True)
class Published:
    """Weights that somebody publishes, which this package does not ship."""

    name: str  # what users type after `trackpl weights get`
    method: str  # the method, by its short name
    address: str  # https://...
    licence: str  # of the weights, as their publisher states it
    bytes: int | None = None  # None: not known
    sha256: str | None = None  # None: nobody states it; that of the first download is kept
    figures: Mapping[str, str] = field(default_factory=dict, hash=False)  # benchmark -> figure and its source
    note: str = ""
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)  # which its content does not tell

    def __post_init__(self) -> None:
        """Refuse what could not be fetched safely: the name becomes that of a file."""
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,63}", self.name):
            raise Error(f"published weights cannot be called '{self.name}'; allowed: letters, digits, '_', '-', '.'")
        if not is_safe(self.address):
            raise Error(f"published weights '{self.name}' must have an https address, not '{self.address}'")
        if self.sha256 is not None and not re.fullmatch(r"[0-9a-f]{64}", self.sha256):
            raise Error(f"the SHA-256 of published weights '{self.name}' must be 64 digits of 0-9a-f")

    @property
    def file_name(self) -> str:
        """The name of its file in the cache: its own, with the suffix of its address."""
        suffix = re.search(r"\.[A-Za-z0-9]{1,12}$", urlsplit(self.address).path)
        return self.name if suffix is None or self.name.endswith(suffix[0]) else self.name + suffix[0]

    @property
    def path(self) -> Path:
        """Where its file lies once it is there."""
        return cache_folder() / "weights" / self.file_name

    @property
    def commercial(self) -> bool:
        """Whether the licence, by its wording, allows more than non-commercial use."""
        return is_commercial(self.licence)

    @property
    def known_sha256(self) -> str | None:
        """The hash that is published, or else the one that the file had when it first came, or None."""
        if self.sha256 is not None:
            return self.sha256
        try:
            found = re.match(r"[0-9a-f]{64}\b", self._note_path.read_text("ascii"))
        except (OSError, UnicodeDecodeError):
            return None
        return found[0] if found else None

    @property
    def _note_path(self) -> Path:
        return self.path.with_name(f"{self.file_name}.sha256")

    def remember(self, sha256: str) -> None:
        """Note the hash of the file beside it, as `sha256sum --check` reads it; a disk that fails loses only that."""
        with contextlib.suppress(OSError):
            self._note_path.write_text(f"{sha256}  {self.file_name}\n", "ascii")

    def fault(self) -> str:
        """Say what is wrong with the file in the cache, which is there; "" if nothing is."""
        size, known = self.path.stat().st_size, self.known_sha256
        if self.bytes is not None and size != self.bytes:
            return f"{self.path} has {size} bytes, not the {self.bytes} that were published"
        if known is not None and (found := file_sha256(self.path)) != known:
            return f"{self.path} has the SHA-256 {found}, not {known}"
        return ""


def is_commercial(licence: str) -> bool:
    """Whether a licence, by its wording, allows more than non-commercial use."""
    return not re.search(r"non[- ]?commercial|\bNC\b|research[- ]only", licence, re.IGNORECASE)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def resolve(checkpoint: str | Path, cls: type[Method]) -> Path:
    """Return the file that a checkpoint argument names: a path, or a name.

    Args:
        checkpoint: a path, or the name of weights that ship with the method or of published ones in the cache.
        cls: the method.

    Raises:
        CheckpointError: it names published weights that are not in the cache, or are broken there.
    """
    path = Path(checkpoint)
    if str(checkpoint) in cls.more_weights and not path.exists():
        owner = next(c for c in cls.__mro__ if "more_weights" in vars(c))
        return in_package(owner, cls.more_weights[str(checkpoint)])
    published = cls.published
    named = next((p for p in published if str(checkpoint) in (p.name, p.file_name)), None)
    if named is None or path.exists():
        return path
    if not named.path.is_file():
        raise CheckpointError(f"no checkpoint at {path}; to fetch what is published: trackpl weights get {named.name}")
    if fault := named.fault():
        raise CheckpointError(f"{fault}; fetch it again: trackpl weights get {named.name}")
    return named.path


# The verb ---------------------------------------------------------------------------------------------------


def shipped_path(cls: type[Method]) -> Path | None:
    """Return where the weights that ship with a method must be, or None if it ships none."""
    return None if cls.weights is None else in_package(cls, cls.weights)


def in_package(cls: type[Method], file: str) -> Path:
    """Return where a file that ships with a method must be."""
    return Path(str(files(cls.__module__.rpartition(".")[0]) / file))
