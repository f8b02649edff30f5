"""A bounded cache on disk, shared by all processes of a machine: what is in it is found by its SHA-256.

Every entry is one file, named by the hash of what it holds, written beside and moved into place, and checked each
time it is read: an entry that a crash or a bad disk broke is dropped. Its last use is its time of change, which a
reader sets. The file ``used`` holds the sum of all sizes, under a lock, so that room can be reserved before anything is
written: the cache never holds more than its limit. Only when that is reached are the files listed, and those used
longest ago deleted until a tenth is free, so that a listing serves many entries.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import os
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import filelock

from trackpl.errors import DataError

__all__ = ["Cache", "CacheError", "CacheFullError", "cache_folder", "default_cache"]

log = logging.getLogger("trackpl.cache")
_GIGABYTES = 20.0
_PARTIAL = "partial"  # the folder of what is being written
_STALE = 3600.0  # seconds without a byte after which a partial file is left over, and the sum is counted anew
_given_up: set[Path] = set()  # caches that this process no longer writes to


class CacheError(Exception):
    """The cache cannot be written; what was to go into it is to be used without it."""


class CacheFullError(CacheError):
    """There is no room now, for what others are writing fills it."""


def cache_folder() -> Path:
    """Give the folder for what can be made again: $TRACKPL_CACHE, or the platform's place for it."""
    named = os.environ.get("TRACKPL_CACHE")
    if named:
        return Path(named)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "trackpl"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "trackpl"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trackpl"


def default_cache() -> Cache:
    """Give the cache of remote shards: ``shards`` in `cache_folder`, of at most $TRACKPL_CACHE_GB (20; 0: none).

    Raises:
        DataError: $TRACKPL_CACHE_GB is no number of gigabytes.
    """
    given = os.environ.get("TRACKPL_CACHE_GB") or str(_GIGABYTES)
    try:
        gigabytes = float(given)
    except ValueError:
        gigabytes = math.nan
    if not 0 <= gigabytes < 1e9:
        raise DataError(f"TRACKPL_CACHE_GB is '{given}'; it must be a number of gigabytes, 0 for no cache")
    return Cache(cache_folder() / "shards", int(gigabytes * 1e9))


@dataclass(frozen=True)
class Cache:
    """A cache in `folder` that holds at most `limit` bytes; 0: it keeps nothing."""

    folder: Path
    limit: int

    def read(self, sha256: str, size: int) -> bytes | None:
        """Return the entry `sha256` of `size` bytes, or None where there is none (any more)."""
        return self.read_part(sha256, size, 0, size, sha256)

    def read_part(self, sha256: str, size: int, offset: int, length: int, part_sha256: str) -> bytes | None:
        """Return `length` bytes from `offset` of the entry `sha256` of `size` bytes, or None where there is none.

        An entry of another size, or whose part has not the hash `part_sha256`, is dropped.
        """
        if not self.limit:
            return None
        path = self._path(sha256)
        try:
            with open(path, "rb", buffering=0) as file:
                whole = os.fstat(file.fileno()).st_size == size
                file.seek(offset)
                data = file.read(length)
            if whole and hashlib.sha256(data).hexdigest() == part_sha256:
                with contextlib.suppress(OSError):  # gone in the meantime, or not ours to change
                    os.utime(path)
                return data
            log.warning("%s in the cache is broken; it is dropped", path)
            path.unlink(missing_ok=True)
        except OSError:
            return None
        return None

    def write(self, sha256: str, data: bytes) -> None:
        """Add an entry if there is room; a disk that fails is reported once, and then left alone."""
        if not self.keeps(len(data)) or self._path(sha256).exists():
            return
        try:
            with self.new(sha256, len(data)) as file:
                file.write(data)
        except CacheError as error:
            self.give_up(error)

    def keeps(self, size: int) -> bool:
        """Say whether an entry of `size` bytes may be added at all."""
        return size <= self.limit and self.folder not in _given_up

    def give_up(self, error: CacheError) -> None:
        """Write no more to a cache that cannot be written, in this process, and say so; wait where it is just full."""
        if not isinstance(error, CacheFullError) and self.folder not in _given_up:
            _given_up.add(self.folder)
            log.warning("going on without the cache %s: %s; TRACKPL_CACHE names another folder", self.folder, error)

    @contextlib.contextmanager
    def new(self, sha256: str, size: int) -> Iterator[BinaryIO]:
        """Give a file of `size` bytes to fill; it becomes an entry at the end of the block, or nothing if that raises.

        Raises:
            CacheError: there is no room, or the disk fails.
        """
        partial = None
        try:
            partial = self._reserve(sha256, size)
            with open(partial, "r+b") as file:
                yield file
            path = self._path(sha256)
            path.parent.mkdir(exist_ok=True)
            os.replace(partial, path)
        except BaseException as error:
            if partial is not None:
                self._cancel(partial, size)
            if isinstance(error, (OSError, filelock.Timeout)):
                raise CacheError(str(error)) from error
            raise

    @contextlib.contextmanager
    def fetching(self, sha256: str, timeout: float) -> Iterator[None]:
        """Hold the lock under which one process alone fetches the entry `sha256`; wait `timeout` seconds for it.

        Raises:
            CacheError: the lock is not to be had.
        """
        lock = self._lock(f"fetch-{sha256[:2]}")  # few names for many hashes: locks are never deleted
        try:
            lock.acquire(timeout=timeout)
        except filelock.Timeout:
            raise CacheFullError(f"another process holds {lock.lock_file}") from None
        except OSError as error:
            raise CacheError(str(error)) from error
        try:
            yield
        finally:
            lock.release()

    def _path(self, sha256: str) -> Path:
        return self.folder / sha256[:2] / sha256

    def _lock(self, name: str) -> filelock.BaseFileLock:
        folder = self.folder / "locks"
        with contextlib.suppress(OSError):  # then the lock says why
            folder.mkdir(parents=True, exist_ok=True)
        return filelock.FileLock(folder / name)

    # Room ---------------------------------------------------------------------------------------------------

    def _reserve(self, sha256: str, size: int) -> Path:
        """Make room, and a partial file that has its final size from the start: a listing counts it in full."""
        partial = self.folder / _PARTIAL / f"{sha256}-{uuid.uuid4().hex}"
        partial.parent.mkdir(parents=True, exist_ok=True)
        with self._lock("used").acquire(timeout=60, poll_interval=0.005):
            used, counted = self._used()
            if used + size > self.limit or abs(time.time() - counted) > _STALE:
                used, counted = self._evict(size), time.time()
                if used + size > self.limit:
                    self._set_used(used, counted)
                    raise CacheFullError("others are writing to it")
            with open(partial, "xb") as file:
                file.truncate(size)
            self._set_used(used + size, counted)
        return partial

    def _cancel(self, partial: Path, size: int) -> None:
        with contextlib.suppress(OSError, filelock.Timeout):  # too high a sum only leads to an earlier count
            partial.unlink()
            with self._lock("used").acquire(timeout=60, poll_interval=0.005):
                used, counted = self._used()
                self._set_used(max(0, used - size), counted)

    def _used(self) -> tuple[int, float]:
        """Return the sum of all sizes, and when it was last counted; one that a crash broke is long ago."""
        try:
            used, counted = (self.folder / "used").read_text().split()
            return int(used), float(counted)
        except (OSError, ValueError):
            return 0, 0.0

    def _set_used(self, used: int, counted: float) -> None:
        (self.folder / "used").write_text(f"{used} {counted}\n")

    def _evict(self, room: int) -> int:
        """Delete what was used longest ago if there is no `room`; return the sum of the sizes that stay."""
        entries = sorted(self._entries())
        used = sum(size for _, _, size, _ in entries)
        if used + room <= self.limit:
            return used
        goal = min(self.limit * 9 // 10, self.limit - room)
        for partial, _, size, path in entries:
            if used <= goal or partial:
                break
            with contextlib.suppress(OSError):  # open in another process, on Windows
                os.unlink(path)
                used -= size
        return used

    def _entries(self) -> Iterator[tuple[bool, float, int, str]]:
        """List for every file whether it is partial, its last use, size, path; drop what killed processes left."""
        for folder in os.scandir(self.folder):
            partial = folder.name == _PARTIAL
            if not partial and len(folder.name) != 2:  # of a hash
                continue
            for entry in os.scandir(folder):
                with contextlib.suppress(FileNotFoundError):  # moved into place, or broken and dropped, just now
                    stat = entry.stat()
                    if partial and time.time() - stat.st_mtime > _STALE:
                        os.unlink(entry)
                    else:
                        yield partial, stat.st_mtime, stat.st_size, entry.path
