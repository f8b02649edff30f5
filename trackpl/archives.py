"""Tar archives of samples: written deterministically, scanned strictly.

Nothing is ever extracted: a scan reads headers and gives places. Regular files only, names ``<key>.<extension>`` with
the extensions of the format, the members of a sample together, the end-of-archive marker in its place.
"""

from __future__ import annotations

import hashlib
import re
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import webdataset

from trackpl.errors import DataError
from trackpl.samples import EXTENSIONS, check_meta

BLOCK = 512
_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,71}")
_MAX_META = 2**24
_MAX_MEMBERS = 2**20  # of one shard


def write_tar(path: Path, samples: Iterable[tuple[str, dict[str, bytes]]]) -> dict[str, Any]:
    """Write samples to a tar file and return its entry in an index; the same samples give the same bytes.

    Raises:
        DataError: a key of other characters than letters, digits, ``_`` and ``-``, or one that comes twice; members
            that are not of the format.
    """
    keys: set[str] = set()
    with (
        open(path, "wb") as file,
        webdataset.TarWriter(file, user="trackpl", group="trackpl", mode=0o644, mtime=0, encoder=False) as writer,
    ):
        for key, members in samples:
            if not _KEY.fullmatch(key) or key in keys:
                raise DataError(f"'{key}' is no new key; letters, digits, _ and -, at most 72, each once")
            keys.add(key)
            check_meta(members, key)
            writer.write({"__key__": key, **members})
    return describe(path)


def describe(path: Path) -> dict[str, Any]:
    """Scan a shard and return its entry in an index: file, size, hash, and where each sample and member lies.

    Raises:
        DataError: the file is no tar archive of whole samples of the format; the message names file and member.
    """
    try:
        with open(path, "rb") as file:
            samples = _scan(file, path.stat().st_size)
            for sample in samples:
                file.seek(sample["offset"])
                sample["sha256"] = hashlib.sha256(file.read(sample["size"])).hexdigest()
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            if not samples:
                raise ValueError("shard has no samples")
            return {"file": path.name, "bytes": path.stat().st_size, "sha256": digest, "samples": samples}
    except (ValueError, OSError, tarfile.TarError, DataError) as error:
        raise DataError(f"{path} is no shard: {error}") from None


def _scan(file: Any, total: int) -> list[dict[str, Any]]:
    """Walk the headers of an archive; raises ValueError."""
    samples: dict[str, dict[str, Any]] = {}
    offset = members = 0
    while True:
        file.seek(offset)
        block = file.read(BLOCK)
        if len(block) < BLOCK:
            raise ValueError(f"it is cut at byte {offset}, before the end-of-archive marker")
        if not any(block):
            if file.read(BLOCK) != bytes(BLOCK):
                raise ValueError("its end-of-archive marker is incomplete")
            break
        name, size = _header(block)
        key, extension = _split(name)
        members += 1
        if members > _MAX_MEMBERS or offset + BLOCK + padded(size) > total:
            raise ValueError(f"{name} is cut, or there are more than {_MAX_MEMBERS} members")
        if key in samples and next(reversed(samples)) != key:
            raise ValueError(f"the members of '{key}' do not lie together")
        entry = samples.setdefault(key, {"key": key, "offset": offset, "members": {}})
        if extension in entry["members"]:
            raise ValueError(f"{name} comes twice")
        entry["members"][extension] = [offset + BLOCK, size]
        offset += BLOCK + padded(size)
        entry["size"] = offset - entry["offset"]
    for key, entry in samples.items():
        entry["frames"] = _frames(file, key, entry["members"])
    return list(samples.values())


def _header(block: bytes) -> tuple[str, int]:
    """Return name and size of a member; only regular files pass."""
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
    except (tarfile.HeaderError, UnicodeDecodeError) as error:
        raise ValueError(f"it has a broken header ({error})") from None
    if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or info.size < 0:
        raise ValueError(f"{info.name!r} is no regular file; links, devices and extended headers are not allowed")
    return info.name, info.size


def _split(name: str) -> tuple[str, str]:
    key, _, extension = name.partition(".")
    if not _KEY.fullmatch(key) or extension not in EXTENSIONS:
        raise ValueError(
            f"it holds {name[:100]!r}; members are called KEY.EXTENSION with the extensions of this format "
            f"({', '.join(sorted(EXTENSIONS))})"
        )
    return key, extension


def _frames(file: Any, key: str, members: dict[str, list[int]]) -> int:
    """Return the number of frames that a sample says it has, and check that all of its members are there."""
    offset, size = members.get("meta.json", (0, 0))
    if size > _MAX_META:
        raise ValueError(f"{key}.meta.json is larger than {_MAX_META} bytes")
    file.seek(offset)
    present: dict[str, bytes] = {extension: b"" for extension in members}
    if "meta.json" in members:
        present["meta.json"] = file.read(size)
    meta = check_meta(present, key)
    return int(meta["T"])


def check_header(block: bytes, name: str, size: int) -> None:
    """Raise ValueError unless `block` is the tar header of a regular file of that name and size."""
    try:
        found = _header(block)
    except ValueError as error:
        raise ValueError(f"does not lie where the index says: {error}") from None
    if found != (name, size):
        raise ValueError(f"does not lie where the index says; there is {found[0][:100]!r} of {found[1]} bytes")


def padded(size: int) -> int:
    """Return the bytes that `size` bytes take in an archive."""
    return -(-size // BLOCK) * BLOCK
