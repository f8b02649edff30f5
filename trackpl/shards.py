"""Sets of samples: tar shards, and the index that says where in them each sample and member lies.

The index gives every member's place, so that a reader fetches exactly what it wants, in any order, from any number of
processes, on a local disk or far away (`trackpl.remote`); its hashes and sizes say whether a set is whole. `encode`
and `decode` handle the samples themselves, `trackpl.archives` the tar files.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from trackpl.addresses import beside, is_remote, local_path, shown
from trackpl.archives import BLOCK, check_header, write_tar
from trackpl.encoding import encode
from trackpl.errors import DataError
from trackpl.parsing import read_json, whole
from trackpl.remote import read_file, read_sample
from trackpl.samples import EXTENSIONS, FIELDS, MAX_COUNT, MEMBERS, SCHEMA, Member, check_fields, decode

__all__ = [
    "FIELDS",
    "Index",
    "Sample",
    "decode",
    "encode",
    "open_members",
    "read_index",
    "read_members",
    "write_shards",
]

KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,71}")
_MAX_INDEX = 2**30
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Shard:
    """One tar file of a set."""

    address: str  # a path or an address
    bytes: int
    sha256: str
    remote: bool = False


@dataclass(frozen=True)
class Sample:
    """Where one sample lies."""

    shard: Shard
    key: str
    frames: int
    members: dict[str, tuple[int, int]]  # extension -> offset of the data in the shard, its size
    offset: int
    size: int
    sha256: str | None = None  # of these `size` bytes


@dataclass(frozen=True)
class Index:
    """A set of shards."""

    path: str  # or address
    name: str
    meta: dict[str, Any]  # of the data set: licence, source, whatever its maker wrote
    samples: tuple[Sample, ...]
    shards: tuple[Shard, ...]


# Writing ----------------------------------------------------------------------------------------------------


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

    The same samples give the same bytes. Everything is written in a hidden folder inside `folder` and moved into place
    at the end, the index last: a set without an index is not a set.

    Returns:
        The path of the index.

    Raises:
        DataError: no samples, a key twice or of other characters than letters, digits, ``_`` and ``-``; or `folder`
            already holds a set of that name with other content and `overwrite` is not set.
    """
    folder = Path(folder)
    check_name(name)
    folder.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=".partial", dir=folder))
    try:
        shards: list[dict[str, Any]] = []
        stream = iter(samples)
        while (first := next(stream, None)) is not None:
            path = partial / shard_name(name, len(shards))
            shards.append(write_tar(path, chain([first], islice(stream, samples_per_shard - 1))))
        return finish_set(folder, name, shards, partial, meta, overwrite)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_name(name: str) -> None:
    """Raise `DataError` if a set cannot be called that."""
    if not KEY.fullmatch(name):
        raise DataError(f"'{name}' is no name for a set; letters, digits, _ and -, at most 72")


def shard_name(name: str, number: int) -> str:
    """Return the file name of a shard."""
    return f"{name}-{number:06d}.tar"


def finish_set(
    folder: Path,
    name: str,
    shards: Sequence[Mapping[str, Any]],
    partial: Path,
    meta: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Move finished shards from `partial` into `folder` and write their index; returns its path.

    A process that is killed here leaves no index; calling it again with the same shards completes the set.

    Raises:
        DataError: no samples, a key twice, or another set of that name is there and `overwrite` is not set.
    """
    keys = [sample["key"] for shard in shards for sample in shard["samples"]]
    if not keys:
        raise DataError(f"there are no samples to write to the set '{name}'")
    if len(set(keys)) < len(keys):
        twice = next(k for k in keys if keys.count(k) > 1)
        raise DataError(f"the key '{twice}' comes twice in the set '{name}'; each sample needs its own")
    text = index_text(name, shards, meta)
    index = folder / f"{name}.index.json"
    if index.exists() and not overwrite:
        if index.read_text() == text:
            return index
        raise DataError(f"{index} is another set of shards; choose another folder or name, or overwrite it")
    beside = partial / index.name
    beside.write_text(text)
    index.unlink(missing_ok=True)
    for shard in shards:
        if (partial / shard["file"]).exists():  # else it was moved before an interruption
            os.replace(partial / shard["file"], folder / shard["file"])
    os.replace(beside, index)
    for stale in set(folder.glob(f"{name}-??????.tar")) - {folder / s["file"] for s in shards}:
        stale.unlink()
    return index


def index_text(name: str, shards: Sequence[Mapping[str, Any]], meta: Mapping[str, Any] | None) -> str:
    """Return the content of an index file."""
    clips = sum(len(s["samples"]) for s in shards)
    content = {"schema": SCHEMA, "name": name, "clips": clips, "meta": dict(meta or {}), "shards": list(shards)}
    return json.dumps(content, sort_keys=True, allow_nan=False, separators=(",", ":"))


# Reading an index -------------------------------------------------------------------------------------------


def read_index(address: str | Path) -> Index:
    """Read and check the index of a set of shards.

    Args:
        address: of the index file, or of the folder that holds it alone; a path, or an address of http(s), s3 or gs
            (of the index file itself).

    Raises:
        DataError: no such file, not exactly one index in the folder, an index that is broken or that names shards that
            are missing, of another length, or outside its folder.
    """
    address = str(address)
    if is_remote(address):
        if not address.split("?")[0].endswith(".json"):
            raise DataError(f"{shown(address)} must be the address of the index file itself, <name>.index.json")
        return _parse(address, read_file(address, _MAX_INDEX), remote=True)
    path = local_path(address)
    if path.is_dir():
        found = sorted(path.glob("*.index.json"))
        if len(found) != 1:
            names = ", ".join(f.name for f in found) or "none"
            raise DataError(f"{path} must hold one *.index.json to be a set of shards, found: {names}")
        path = found[0]
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read as a set of shards: {error.strerror or error}") from None
    return _parse(str(path), data, remote=False)


def _parse(address: str, data: bytes, remote: bool) -> Index:
    """Check an index; its shards lie beside it."""
    try:
        content = read_json(data, _MAX_INDEX)
        if not isinstance(content, dict) or content.get("schema") != SCHEMA:
            raise ValueError(f"has not the schema {SCHEMA}")
        if not isinstance(content.get("name"), str) or not isinstance(content.get("meta"), dict):
            raise ValueError("has no 'name' or 'meta'")
        shards, samples = [], []
        for entry in _list(content, "shards"):
            shards.append(_shard(entry, address, remote))
            samples += _shard_samples(shards[-1], entry)
        if len({s.key for s in samples}) < len(samples) or not samples:
            raise ValueError("lists no samples, or one key twice")
    except ValueError as error:
        raise DataError(f"{shown(address)} is no index of shards: it {error}") from None
    return Index(address, content["name"], content["meta"], tuple(samples), tuple(shards))


def _list(entry: Any, key: str) -> list[Any]:
    if not isinstance(entry, dict) or not isinstance(entry.get(key), list):
        raise ValueError(f"has no list '{key}' where there must be one")
    return entry[key]


def _shard(entry: Any, index: str, remote: bool) -> Shard:
    _list(entry, "samples")
    file, size, digest = entry.get("file"), whole(entry.get("bytes"), "bytes", 1, 2**50), entry.get("sha256")
    if not isinstance(file, str) or not re.fullmatch(r"[A-Za-z0-9_-]+\.tar", file):
        raise ValueError(f"names the shard {str(file)[:80]!r}; only tar files beside the index are allowed")
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise ValueError(f"gives the shard {file} no SHA-256")
    if remote:
        return Shard(beside(index, file), size, digest, remote=True)
    path = Path(index).parent / file
    if not path.is_file() or path.stat().st_size != size:
        raise ValueError(f"names the shard {file}, which is missing or has not the {size} bytes it should have")
    return Shard(str(path), size, digest)


def _shard_samples(shard: Shard, entry: dict[str, Any]) -> list[Sample]:
    out = []
    file = entry["file"]
    for sample in entry["samples"]:
        if not isinstance(sample, dict) or not isinstance(sample.get("members"), dict):
            raise ValueError(f"lists a sample of {file} without members")
        key, members = sample.get("key"), {}
        if not isinstance(key, str) or not KEY.fullmatch(key):
            raise ValueError(f"lists a sample of {file} with the key {str(key)[:80]!r}")
        begin = whole(sample.get("offset"), "offset", 0, shard.bytes)
        size = whole(sample.get("size"), "size", 0, shard.bytes - begin)
        for extension, place in sample["members"].items():
            if extension not in EXTENSIONS or not isinstance(place, list) or len(place) != 2:
                raise ValueError(f"lists a member {extension[:40]!r} of {key} that is none")
            start = whole(place[0], "offset", begin + BLOCK, begin + size)
            members[extension] = (start, whole(place[1], "size", 0, begin + size - start))
        frames, digest = whole(sample.get("frames"), "frames", 1, MAX_COUNT), sample.get("sha256")
        if digest is not None and not (isinstance(digest, str) and _DIGEST.fullmatch(digest)):
            raise ValueError(f"gives the sample {key} a SHA-256 that is none")
        out.append(Sample(shard, key, frames, members, begin, size, digest))
    return out


def verify_shards(index: Index) -> None:
    """Check the SHA-256 of every local shard, with a progress bar.

    Raises:
        DataError: one of them is not what the index says; the message names it.
    """
    local = [s for s in index.shards if not s.remote]
    total = sum(s.bytes for s in local)
    with tqdm(total=total, desc=f"checking {index.name}", unit="B", unit_scale=True, dynamic_ncols=True) as bar:
        for shard in local:
            state = hashlib.sha256()
            with open(shard.address, "rb") as file:
                while data := file.read(2**20):
                    state.update(data)
                    bar.update(len(data))
            if state.hexdigest() != shard.sha256:
                raise DataError(f"{shard.address} is not the shard that its index describes: its SHA-256 is another")


# Reading a sample -------------------------------------------------------------------------------------------


def read_members(sample: Sample, fields: Collection[str] | None = None) -> dict[str, bytes]:
    """Read the members that `fields` need (none: all) of one sample from its shard.

    Raises:
        DataError: the shard cannot be read, or what it holds is not what the index says.
    """
    with open_members(sample, fields) as members:
        return {e: bytes(m[:]) for e, m in members.items()}


@contextmanager
def open_members(sample: Sample, fields: Collection[str] | None = None) -> Iterator[dict[str, Member]]:
    """Give the members that `fields` need (none: all), large ones as `Stored`: who decodes a few frames reads those.

    A sample of a remote set is fetched as a whole, checked against its SHA-256 and kept in the cache.

    Raises:
        DataError: as `read_members`.
    """
    check_fields(fields or ())
    names = EXTENSIONS if fields is None else {"meta.json"}.union(*(MEMBERS[f] for f in {*fields, "video"}))
    wanted = {e: place for e, place in sample.members.items() if e in names}
    if sample.shard.remote:
        data = read_sample(
            sample.shard.address, sample.shard.bytes, sample.shard.sha256, sample.offset, sample.size, _digest(sample)
        )
        yield {e: _member(data, sample, e, offset - sample.offset, size) for e, (offset, size) in wanted.items()}
        return
    try:
        with open(sample.shard.address, "rb", buffering=0) as file:
            part = _File(file.fileno(), sample.shard.bytes, sample)
            yield {e: _member(part, sample, e, offset, size) for e, (offset, size) in wanted.items()}
    except OSError as error:
        raise _broken(sample, error.strerror or str(error)) from None


def _digest(sample: Sample) -> str:
    if sample.sha256 is None:
        raise _broken(sample, "its index has no SHA-256 of its samples; write it anew with `trackpl data index FOLDER`")
    return sample.sha256


def _member(data: bytes | _File, sample: Sample, extension: str, offset: int, size: int) -> Member:
    """Return the member at `offset` of `data` after a look at its tar header."""
    try:
        check_header(data[offset - BLOCK : offset], f"{sample.key}.{extension}", size)
    except ValueError as error:
        raise _broken(sample, f"{extension} {error}") from None
    if isinstance(data, bytes):
        return data[offset : offset + size]
    return data[offset : offset + size] if size < _SMALL else _Part(data, offset, size)


_SMALL = 2**14  # bytes: not worth asking for parts of them


class _File:
    """A shard of which parts are read where they lie."""

    def __init__(self, descriptor: int, size: int, sample: Sample) -> None:
        self.descriptor, self.size, self.sample = descriptor, size, sample

    def __getitem__(self, part: slice) -> bytes:
        start, stop, _ = part.indices(self.size)
        data = os.pread(self.descriptor, stop - start, start)
        if len(data) != stop - start:
            raise _broken(self.sample, "the shard is shorter than its index says")
        return data


class _Part:
    """One member within a shard."""

    def __init__(self, file: _File, offset: int, size: int) -> None:
        self.file, self.offset, self.size = file, offset, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, part: slice) -> bytes:
        start, stop, _ = part.indices(self.size)
        return self.file[self.offset + start : self.offset + stop]


def _broken(sample: Sample, why: str) -> DataError:
    return DataError(f"sample '{sample.key}' of {shown(sample.shard.address)} cannot be read: {why}")
