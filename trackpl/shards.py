"""Sets of samples: tar shards, and the index that says where in them each sample and member lies.

The index gives every member's place, so that a reader fetches exactly what it wants, in any order, from any
number of processes; its hashes and sizes say whether a set is whole. `encode` and `decode` handle the samples
themselves.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import re
import shutil
import tarfile
import tempfile
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import webdataset
from webdataset.tariterators import group_by_keys, tar_file_expander

from trackpl.errors import DataError
from trackpl.samples import (
    EXTENSIONS,
    FIELDS,
    MAX_COUNT,
    MEMBERS,
    SCHEMA,
    check_fields,
    check_meta,
    decode,
    encode,
    read_json,
    whole,
)

__all__ = ["FIELDS", "Index", "Sample", "decode", "encode", "read_index", "read_members", "write_shards"]

_BLOCK = 512  # of a tar archive
_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,71}")
_MAX_INDEX = 2**28


@dataclass(frozen=True)
class Sample:
    """Where one sample lies."""

    shard: Path
    key: str
    frames: int
    members: dict[str, tuple[int, int]]  # extension -> offset of the data in the shard, its size


@dataclass(frozen=True)
class Index:
    """A set of shards that is all there."""

    path: Path
    name: str
    meta: dict[str, Any]  # of the data set: licence, clips, whatever its maker wrote
    samples: tuple[Sample, ...]


def write_shards(
    folder: Path,
    name: str,
    samples: Iterable[tuple[str, dict[str, bytes]]],
    *,
    samples_per_shard: int = 64,
    meta: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write samples (key, members) as ``<name>-000000.tar`` ... and their ``<name>.index.json``.

    The same samples give the same bytes. Everything is written in a hidden folder inside `folder` and moved
    into place at the end, the index last: a set without an index is not a set.

    Returns:
        The path of the index.

    Raises:
        DataError: no samples, a key twice or of other characters than letters, digits, ``_`` and ``-``; or
            `folder` already holds a set of that name with other content and `overwrite` is not set.
    """
    folder = Path(folder)
    if not _KEY.fullmatch(name):
        raise DataError(f"'{name}' is no name for a set; letters, digits, _ and -, at most 72")
    folder.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=".partial", dir=folder))
    try:
        shards = _write_tars(partial, name, samples, samples_per_shard)
        clips = sum(len(s["samples"]) for s in shards)
        content = {"schema": SCHEMA, "name": name, "clips": clips, "meta": meta or {}, "shards": shards}
        text = json.dumps(content, sort_keys=True, allow_nan=False, separators=(",", ":"))
        index = folder / f"{name}.index.json"
        if index.exists() and not overwrite:
            if index.read_text() == text:
                return index
            raise DataError(f"{index} is another set of shards; choose another folder or name, or overwrite it")
        (partial / index.name).write_text(text)
        index.unlink(missing_ok=True)
        for shard in shards:
            os.replace(partial / shard["file"], folder / shard["file"])
        os.replace(partial / index.name, index)
        for stale in set(folder.glob(f"{name}-??????.tar")) - {folder / s["file"] for s in shards}:
            stale.unlink()
        return index
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_tars(
    folder: Path, name: str, samples: Iterable[tuple[str, dict[str, bytes]]], per_shard: int
) -> list[dict[str, Any]]:
    frames: dict[str, int] = {}
    shards: list[dict[str, Any]] = []
    stream = iter(samples)
    while (first := next(stream, None)) is not None:
        path = folder / f"{name}-{len(shards):06d}.tar"
        with (
            open(path, "wb") as file,
            webdataset.TarWriter(file, user="trackpl", group="trackpl", mode=0o644, mtime=0, encoder=False) as writer,
        ):
            for key, members in itertools.chain([first], itertools.islice(stream, per_shard - 1)):
                if not _KEY.fullmatch(key) or key in frames:
                    raise DataError(f"'{key}' is no new key; letters, digits, _ and -, at most 72, each once")
                frames[key] = check_meta(members, key)["T"]
                writer.write({"__key__": key, **members})
        shards.append(_describe(path, frames))
    if not shards:
        raise DataError(f"there are no samples to write to the set '{name}'")
    return shards


def _describe(path: Path, frames: Mapping[str, int]) -> dict[str, Any]:
    """Make a shard's entry in the index, from the finished file itself."""
    samples: dict[str, dict[str, Any]] = {}
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            key, extension = member.name.split(".", 1)
            entry = samples.setdefault(key, {"key": key, "frames": frames[key], "offset": member.offset, "members": {}})
            entry["members"][extension] = [member.offset_data, member.size]
            entry["size"] = member.offset_data + _padded(member.size) - entry["offset"]
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "file": path.name,
        "bytes": path.stat().st_size,
        "sha256": digest,
        "samples": list(samples.values()),
    }


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def read_index(path: str | Path) -> Index:
    """Read and check the index of a set of shards, named itself or by the folder that holds it alone.

    Raises:
        DataError: no such file, not exactly one index in the folder, an index that is broken or that names
            shards that are missing, of another length, or outside its folder.
    """
    path = Path(path)
    if path.is_dir():
        found = sorted(path.glob("*.index.json"))
        if len(found) != 1:
            names = ", ".join(f.name for f in found) or "none"
            raise DataError(f"{path} must hold one *.index.json to be a set of shards, found: {names}")
        path = found[0]
    try:
        content = read_json(path.read_bytes(), _MAX_INDEX)
        if not isinstance(content, dict) or content.get("schema") != SCHEMA:
            raise ValueError(f"has not the schema {SCHEMA}")
        if not isinstance(content.get("name"), str) or not isinstance(content.get("meta"), dict):
            raise ValueError("has no 'name' or 'meta'")
        samples = [s for shard in _list(content, "shards") for s in _shard_samples(path.parent, shard)]
        if len({s.key for s in samples}) < len(samples) or not samples:
            raise ValueError("lists no samples, or one key twice")
    except OSError as error:
        raise DataError(f"{path} cannot be read as a set of shards: {error.strerror or error}") from None
    except ValueError as error:
        raise DataError(f"{path} is no index of shards: it {error}") from None
    return Index(path, content["name"], content["meta"], tuple(samples))


def _list(entry: Any, key: str) -> list[Any]:
    if not isinstance(entry, dict) or not isinstance(entry.get(key), list):
        raise ValueError(f"has no list '{key}' where there must be one")
    return entry[key]


def _shard_samples(folder: Path, shard: Any) -> list[Sample]:
    samples = _list(shard, "samples")
    file, size = shard.get("file"), whole(shard.get("bytes"), "bytes", 1, 2**50)
    if not isinstance(file, str) or not re.fullmatch(r"[A-Za-z0-9_-]+\.tar", file):
        raise ValueError(f"names the shard {str(file)[:80]!r}; only tar files beside the index are allowed")
    path = folder / file
    if not path.is_file() or path.stat().st_size != size:
        raise ValueError(f"names the shard {file}, which is missing or has not the {size} bytes it should have")
    out = []
    for entry in samples:
        if not isinstance(entry, dict) or not isinstance(entry.get("members"), dict):
            raise ValueError(f"lists a sample of {file} without members")
        key, members = entry.get("key"), {}
        if not isinstance(key, str) or not _KEY.fullmatch(key):
            raise ValueError(f"lists a sample of {file} with the key {str(key)[:80]!r}")
        for extension, place in entry["members"].items():
            if extension not in EXTENSIONS or not isinstance(place, list) or len(place) != 2:
                raise ValueError(f"lists a member {extension[:40]!r} of {key} that is none")
            start = whole(place[0], "offset", _BLOCK, size)
            members[extension] = (start, whole(place[1], "size", 0, size - start))
        out.append(Sample(path, key, whole(entry.get("frames"), "frames", 1, MAX_COUNT), members))
    return out


def read_members(sample: Sample, fields: Collection[str] | None = None) -> dict[str, bytes]:
    """Read the members that `fields` need (none: all) of one sample from its shard, and nothing else.

    Raises:
        DataError: the shard cannot be read, or what it holds is not what the index says.
    """
    check_fields(fields or ())
    names = EXTENSIONS if fields is None else {"meta.json"}.union(*(MEMBERS[f] for f in {*fields, "video"}))
    wanted = {e: place for e, place in sample.members.items() if e in names}
    part = io.BytesIO()  # a small tar of the wanted members
    try:
        with open(sample.shard, "rb") as file:
            for extension, (offset, size) in wanted.items():
                file.seek(offset - _BLOCK)
                block = file.read(_BLOCK + _padded(size))
                if block[:100].rstrip(b"\0") != f"{sample.key}.{extension}".encode():
                    raise ValueError(f"{extension} does not lie where the index says")
                part.write(block)
        part.seek(0)
        files = tar_file_expander([{"url": str(sample.shard), "stream": part}])
        found: dict[str, Any] = next(group_by_keys(files), {})
    except (OSError, ValueError, tarfile.TarError) as error:
        raise DataError(f"sample '{sample.key}' of {sample.shard} cannot be read: {error}") from None
    if any(len(found.get(e, b"")) != size for e, (_, size) in wanted.items()):
        raise DataError(f"sample '{sample.key}' of {sample.shard} is not what the index says; make the set again")
    return {e: found[e] for e in wanted}
