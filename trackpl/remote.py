"""Samples of shards that lie on a web server or in an object store: one range request each, verified, cached.

A sample is a contiguous piece of its shard, whose SHA-256 the index states. It is looked for in the cache, then asked
for by a range request. A web server that does not know ranges answers with the whole shard, which is then fetched into
the cache once, by one process, and read from there. What fails in transit is asked for again, with growing pauses.

All functions are synchronous and safe in workers, forked or not: the connections live in the loop of fsspec's own
thread, of which each process has its own.
"""

from __future__ import annotations

import asyncio
import atexit
import hashlib
import logging
import os
import random
import re
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from errno import EINVAL, ENAMETOOLONG, ENOSYS, EPERM
from typing import TYPE_CHECKING, Any, TypeVar

from trackpl.addresses import parse, shown
from trackpl.cache import Cache, CacheError, default_cache
from trackpl.errors import DataError, UnreachableError

if TYPE_CHECKING:
    import aiohttp

__all__ = ["Patience", "read_file", "read_sample"]

log = logging.getLogger("trackpl.remote")
T = TypeVar("T")
MAX_SAMPLE = 2**31  # bytes
_jitter = random.SystemRandom()  # of its own: the seeded ones decide what a training step sees


@dataclass(frozen=True)
class Patience:
    """How long to wait for a server, and how often to ask it again."""

    tries: int = 8
    first: float = 0.2  # seconds before the second try; doubled for each further one, less up to half at random
    longest: float = 30.0  # seconds between two tries
    connect: float = 10.0  # seconds to connect
    stall: float = 30.0  # seconds without a byte
    slowest: float = 2.0**14  # bytes a second, on the whole

    @classmethod
    def from_environment(cls) -> Patience:
        """Take `tries` from $TRACKPL_TRIES and `stall` from $TRACKPL_STALL where they are set.

        Raises:
            DataError: they are no positive numbers.
        """
        found: dict[str, Any] = {}
        for name, kind in (("tries", int), ("stall", float)):
            given = os.environ.get(f"TRACKPL_{name.upper()}")
            if given:
                if not re.fullmatch(r"\d+" if kind is int else r"\d+(\.\d+)?", given) or not kind(given):
                    raise DataError(f"TRACKPL_{name.upper()} is '{given}'; it must be a positive number")
                found[name] = kind(given)
        return cls(**found)

    def pause(self, number: int) -> float:
        """Return the seconds to wait after try `number` (from 1) failed."""
        return min(self.longest, self.first * 2 ** (number - 1)) * _jitter.uniform(0.5, 1.0)

    def deadline(self, size: int) -> float:
        """Return the seconds that `size` bytes may take."""
        return self.connect + self.stall + size / self.slowest


# Reading ----------------------------------------------------------------------------------------------------


def read_file(address: str, limit: int, *, patience: Patience | None = None) -> bytes:
    """Fetch a whole remote file of at most `limit` bytes.

    Raises:
        UnreachableError: the server gave no answer, however often it was asked.
        DataError: there is no such file, it may not be read, or it is longer than `limit`.
    """
    patience = patience or Patience.from_environment()
    if parse(address)[0] in ("s3", "gs"):
        return _insist(shown(address), lambda _: _object_file(address, limit, patience), patience)

    def attempt(number: int) -> bytes:
        parts: list[bytes] = []
        _run(_http_whole, address, limit, False, parts.append, number, patience)
        return b"".join(parts)

    return _insist(shown(address), attempt, patience)


def read_sample(
    shard: str,
    shard_bytes: int,
    shard_sha256: str,
    offset: int,
    size: int,
    sha256: str,
    *,
    patience: Patience | None = None,
    cache: Cache | None = None,
) -> bytes:
    """Return the bytes `offset` to `offset` + `size` of a remote shard, from the cache or else from its server.

    Args:
        shard: the address of the shard.
        shard_bytes: its length.
        shard_sha256: the hash of all of it; for servers that give nothing less.
        offset: where the sample begins in it.
        size: number of bytes of the sample.
        sha256: the hash of the sample, which is verified.
        patience: none: `Patience.from_environment`.
        cache: none: `trackpl.cache.default_cache`.

    Raises:
        UnreachableError: the server gave no answer, however often it was asked.
        DataError: the shard is not there, may not be read, or is not what the index says.
    """
    piece = _Piece(shard, shard_bytes, shard_sha256, offset, size, sha256)
    piece.check()
    patience = patience or Patience.from_environment()
    cache = cache or default_cache()
    data = cache.read(sha256, size) or piece.cut(cache)
    if data is not None:
        return data
    try:
        data = _fetch(piece, patience)
    except _NoRangesError:
        return _from_whole(piece, patience, cache)
    cache.write(sha256, data)
    return data


@dataclass(frozen=True)
class _Piece:
    """A sample, and the shard of which it is a part."""

    shard: str
    shard_bytes: int
    shard_sha256: str
    offset: int
    size: int
    sha256: str

    def check(self) -> None:
        """Refuse what no index may say: it comes from strangers, and the hashes become names of files."""
        if not (self.offset >= 0 and 0 < self.size <= MAX_SAMPLE and self.offset + self.size <= self.shard_bytes):
            raise DataError(f"the index says that {self} are a sample, of {self.shard_bytes}; at most {MAX_SAMPLE} can")
        if not all(re.fullmatch(r"[0-9a-f]{64}", text) for text in (self.sha256, self.shard_sha256)):
            raise DataError(f"the index gives no SHA-256 for {self}; make the set again")

    def cut(self, cache: Cache) -> bytes | None:
        """Read the sample from its whole shard in the cache, if that is there."""
        return cache.read_part(self.shard_sha256, self.shard_bytes, self.offset, self.size, self.sha256)

    def __str__(self) -> str:
        return f"{shown(self.shard)} bytes {self.offset}-{self.offset + self.size - 1}"


def _fetch(piece: _Piece, patience: Patience, through: bool = False) -> bytes:
    """Fetch and verify a sample; `through`: read all that lies before it, where the server gives no ranges."""

    def attempt(number: int) -> bytes:
        if parse(piece.shard)[0] in ("s3", "gs"):
            data = _object_range(piece.shard, piece.offset, piece.size, patience)
        else:
            data = _run(_http_range, piece.shard, piece.offset, piece.size, through, number, patience)
        _verify(hashlib.sha256(data).hexdigest(), piece.sha256)
        return data

    return _insist(str(piece), attempt, patience)


def _from_whole(piece: _Piece, patience: Patience, cache: Cache) -> bytes:
    """Read a sample from the shard in the cache, fetched by whoever comes first; without a cache, read up to it."""
    if cache.keeps(piece.shard_bytes):
        try:
            with cache.fetching(piece.shard_sha256, patience.deadline(piece.shard_bytes)):
                data = piece.cut(cache)
                if data is None:
                    _fetch_whole(piece, patience, cache)
                    data = piece.cut(cache)
            if data is not None:
                return data
        except CacheError as error:
            cache.give_up(error)
    return _fetch(piece, patience, through=True)


def _fetch_whole(piece: _Piece, patience: Patience, cache: Cache) -> None:
    address, size = piece.shard, piece.shard_bytes
    log.warning("%s: its server gives no ranges; fetching all %d bytes into the cache", shown(address), size)
    with cache.new(piece.shard_sha256, size) as file:

        def attempt(number: int) -> None:
            file.seek(0)
            digest = hashlib.sha256()

            def take(chunk: bytes) -> None:
                digest.update(chunk)
                try:
                    file.write(chunk)
                except OSError as error:  # of the disk; any other is the network's
                    raise CacheError(str(error)) from error

            _run(_http_whole, address, size, True, take, number, patience)
            _verify(digest.hexdigest(), piece.shard_sha256)

        _insist(shown(address), attempt, patience)


def _verify(found: str, sha256: str) -> None:
    if found != sha256:
        raise _FailedError("its SHA-256 is not the one in the index", wrong=True)


# Trying again -----------------------------------------------------------------------------------------------


class _FailedError(Exception):
    """One try failed, and another may not."""

    def __init__(self, why: str, *, wrong: bool = False, wait: float = 0.0) -> None:
        super().__init__(why)
        self.wrong = wrong  # there was an answer, but with other content than the index says
        self.wait = wait  # seconds that the server asks for


class _NoRangesError(Exception):
    """The server answers with the whole file."""


def _insist(what: str, attempt: Callable[[int], T], patience: Patience) -> T:
    """Return what `attempt` returns in the end, with pauses between the tries."""
    number = 0
    while True:
        number += 1
        try:
            return attempt(number)
        except _FailedError as error:
            if number >= patience.tries:
                kind, do = DataError, "the file there is another one or broken"
                if not error.wrong:
                    kind, do = UnreachableError, "check the address and the network; TRACKPL_TRIES allows more tries"
                raise kind(f"{what} cannot be read, tried {number} times, at last: {error}; {do}") from None
            pause = max(patience.pause(number), min(error.wait, patience.longest))
            log.warning("%s: try %d of %d failed: %s; again in %.2f s", what, number, patience.tries, error, pause)
        time.sleep(pause)


# Web servers ------------------------------------------------------------------------------------------------

# One session for each loop, that is, for each process that fetches. A forked child keeps its parent's as it is: to
# close it there would take the parent's sockets out of the parent's loop.
_sessions: dict[asyncio.AbstractEventLoop, aiohttp.ClientSession] = {}


def _run(function: Callable[..., Any], *args: Any) -> Any:
    """Run a coroutine function in fsspec's loop."""
    from fsspec.asyn import get_loop, sync  # imported on first use, as only remote sets need it

    return sync(get_loop(), function, *args)


def _session() -> aiohttp.ClientSession:
    import aiohttp

    loop = asyncio.get_running_loop()
    if loop not in _sessions:
        # Servers compress nothing that is asked for by ranges; what comes compressed all the same is refused.
        _sessions[loop] = aiohttp.ClientSession(trust_env=True, auto_decompress=False, read_bufsize=2**20)
    return _sessions[loop]


@atexit.register
def _close() -> None:
    if not _sessions:
        return
    from fsspec.asyn import loop, sync

    if loop[0] in _sessions:
        sync(loop[0], _sessions.pop(loop[0]).close, timeout=1)


async def _http_range(address: str, start: int, size: int, through: bool, number: int, patience: Patience) -> bytes:
    parts: list[bytes] = []
    before, left = 0, size
    headers = {"Range": f"bytes={start}-{start + size - 1}"}
    async with _answer(address, headers, start + size if through else size, number, patience) as response:
        if response.status != 206:
            if not through:
                raise _NoRangesError
            before = start
        async for chunk in response.content.iter_any():
            part = chunk[before : before + left]
            before -= min(before, len(chunk))
            left -= len(part)
            if part:
                parts.append(part)
            if not left and response.status != 206:
                break  # the rest of the file was not asked for; a range is read to its end to keep the connection
    if left:
        raise _FailedError(f"the answer is {left} of {size} bytes short", wrong=True)
    return b"".join(parts)


async def _http_whole(
    address: str, size: int, exact: bool, take: Callable[[bytes], None], number: int, patience: Patience
) -> None:
    """Hand a file of at most, or exactly, `size` bytes to `take`, piece by piece."""
    got = 0
    async with _answer(address, {}, size, number, patience) as response:
        _check_length(address, response.content_length or 0, size, exact)
        async for chunk in response.content.iter_any():
            got += len(chunk)
            _check_length(address, got, size, exact)
            take(chunk)
    if exact and got != size:
        raise _FailedError(f"the answer has {got} of {size} bytes", wrong=True)


def _check_length(address: str, length: int, size: int, exact: bool) -> None:
    if length > size and exact:
        raise _FailedError(f"it has more than the {size} bytes in the index", wrong=True)
    if length > size:
        raise _too_long(address, size)


def _too_long(address: str, limit: int) -> DataError:
    return DataError(f"{shown(address)} is longer than {limit} bytes, the most allowed; is it an index of shards?")


@asynccontextmanager
async def _answer(
    address: str, headers: dict[str, str], size: int, number: int, patience: Patience
) -> AsyncIterator[aiohttp.ClientResponse]:
    """Give the answer to a request for `size` bytes; turn what fails here and while it is read into our errors."""
    import aiohttp

    timeout = aiohttp.ClientTimeout(
        total=None, connect=patience.connect, sock_connect=patience.connect, sock_read=patience.stall
    )
    headers = {"Accept-Encoding": "identity", **headers}
    if number > 1:
        headers["Cache-Control"] = "no-cache"  # a proxy between here and there may have a broken copy
    try:
        async with (
            asyncio.timeout(patience.deadline(size)),
            _session().get(address, headers=headers, timeout=timeout) as response,
        ):
            _check_status(address, response)
            yield response
    except TimeoutError as error:
        why = f"slower than {patience.slowest:g} bytes a second"
        if isinstance(error, aiohttp.ServerTimeoutError):
            why = f"no bytes for {patience.stall:g} s"
        if isinstance(error, aiohttp.ConnectionTimeoutError):
            why = f"no connection within {patience.connect:g} s"
        raise _FailedError(why) from None
    except (aiohttp.InvalidURL, aiohttp.TooManyRedirects, aiohttp.ClientConnectorCertificateError) as error:
        raise DataError(
            f"{shown(address)} cannot be read: {type(error).__name__}: {error}; check the address"
        ) from None
    except (aiohttp.ClientPayloadError, aiohttp.ServerDisconnectedError):
        raise _FailedError("the connection was dropped") from None
    except (aiohttp.ClientError, OSError) as error:
        raise _FailedError(str(error) or type(error).__name__) from None


def _check_status(address: str, response: aiohttp.ClientResponse) -> None:
    status = response.status
    what = f"{status} {response.reason or ''}".strip()
    if status in (408, 425, 429) or status >= 500:
        wait = response.headers.get("Retry-After", "")
        raise _FailedError(f"the server answers {what}", wait=float(wait) if re.fullmatch(r"\d{1,6}", wait) else 0.0)
    if status not in (200, 206):
        do = {401: "it wants a password", 403: "it may not be read", 404: "there is no such file"}
        do |= {410: do[404], 416: "it is shorter than the index says"}
        # A password that has run out is not a broken sample: it must stop a run.
        kind = UnreachableError if status in (401, 403) else DataError
        raise kind(f"{shown(address)} cannot be read: the server answers {what}: {do.get(status, 'check the address')}")
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise DataError(f"{shown(address)} cannot be read: the server compresses it, unasked; switch that off there")


# Object stores ----------------------------------------------------------------------------------------------

_kept: dict[int, Any] = {}  # file systems, for their connections are not to be closed in a forked child either


def _object_range(address: str, start: int, size: int, patience: Patience) -> bytes:
    data = _object(address, "cat_file", size, patience, start=start, end=start + size)
    if len(data) != size:
        raise _FailedError(f"the answer has {len(data)} of {size} bytes", wrong=True)
    return data


def _object_file(address: str, limit: int, patience: Patience) -> bytes:
    size = _object(address, "info", 0, patience)["size"]
    if size > limit:
        raise _too_long(address, limit)
    return _object_range(address, 0, size, patience) if size else b""


def _object(address: str, method: str, size: int, patience: Patience, **arguments: int) -> Any:
    """Call a method of the file system of an address on its ``bucket/key``."""
    from fsspec.asyn import sync

    scheme, path = parse(address)
    try:
        system = _file_system(scheme)
        if not system.async_impl:
            return getattr(system, method)(path, **arguments)
        function = getattr(system, f"_{method}")
        return sync(system.loop, function, path, timeout=patience.deadline(size), **arguments)
    except (DataError, _FailedError):
        raise
    except TimeoutError:
        raise _FailedError(f"not all bytes within {patience.deadline(size):.0f} s") from None
    except Exception as error:  # these libraries raise anything
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if _is_final(error):
            raise DataError(f"{shown(address)} cannot be read: {why}; check the address and the credentials") from None
        raise _FailedError(why) from None


def _file_system(scheme: str) -> Any:
    import fsspec

    try:
        system = fsspec.filesystem(scheme)
    except ImportError as error:
        raise DataError(f'{scheme}:// needs another package: pip install "trackpl[{scheme}]" ({error})') from None
    return _kept.setdefault(id(system), system)


def _is_final(error: Exception) -> bool:
    """Say whether an object store will give the same answer next time: no such file, not allowed, bad request."""
    if isinstance(error, (FileNotFoundError, IsADirectoryError, PermissionError, ValueError)):
        return True
    if "Credentials" in type(error).__name__ or str(error).startswith("Forbidden"):  # botocore, google.auth; gcsfs
        return True
    code = getattr(error, "code", None) or getattr(error, "errno", None)
    codes = (EINVAL, EPERM, ENAMETOOLONG, ENOSYS)
    return code in codes or (isinstance(code, int) and 400 <= code < 500 and code not in (408, 425, 429))
