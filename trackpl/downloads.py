"""Fetch one large file over https: written to disk as it comes, and gone on with where a connection broke."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, BinaryIO
from urllib.parse import urlsplit

from trackpl.addresses import shown
from trackpl.errors import DataError, Error, UnreachableError
from trackpl.remote import Patience, _answer, _FailedError, _run

if TYPE_CHECKING:
    import aiohttp

__all__ = ["Download", "is_safe"]

LARGEST = 2**34  # bytes
_LOCAL = ("localhost", "127.0.0.1", "::1")
Progress = Callable[[int, int | None, str], None]  # bytes that are there, of how many (None: unknown), what is wrong


def is_safe(address: str) -> bool:
    """Whether nobody on the way can put another file in the place of this one: https, or this machine itself."""
    parts = urlsplit(address)
    return bool(parts.hostname) and (parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in _LOCAL))


class Download:
    """One file on its way from `address` into `file`.

    Args:
        address: https://...
        file: open for writing and reading, empty.
        size: bytes that it must have; None: as many as the server says.
        sha256: the hash that it must have; None: any, see `digest`.
        patience: how long to wait, and how many times in a row to go on asking without a byte more.
        progress: called after each piece, and before each pause.
    """

    def __init__(
        self,
        address: str,
        file: BinaryIO,
        *,
        size: int | None = None,
        sha256: str | None = None,
        patience: Patience,
        progress: Progress = lambda got, total, fault: None,
    ) -> None:
        self.address, self.file, self.sha256 = address, file, sha256
        self.size, self.patience, self.progress = size, patience, progress
        self.total: int | None = size
        self.got = 0
        self._tag: str | None = None  # says whether the file there is still the same one
        self._hash = hashlib.sha256()

    @property
    def digest(self) -> str:
        """The SHA-256 of what came."""
        return self._hash.hexdigest()

    def run(self) -> None:
        """Fetch all of it and check it.

        Raises:
            UnreachableError: no answer, or no whole one, however often it was asked.
            DataError: there is no such file, or it is not the one that was stated.
        """
        failures, furthest = 0, 0
        while True:
            try:
                _run(self._go_on, failures + 1)
                break
            except _FailedError as error:
                failures = 1 if self.got > furthest else failures + 1
                furthest = max(furthest, self.got)
                if failures >= self.patience.tries:
                    raise UnreachableError(f"{error}, tried {failures} times in a row") from None
                self.progress(self.got, self.total, str(error))
                time.sleep(max(self.patience.pause(failures), min(error.wait, self.patience.longest)))
        self._check()

    def _check(self) -> None:
        where = shown(self.address)
        if self.size is not None and self.got != self.size:
            raise DataError(f"{where} has {self.got} bytes, not the {self.size} that were published; it is refused")
        if self.sha256 is not None and self.digest != self.sha256:
            raise DataError(f"{where} has the SHA-256 {self.digest}, not {self.sha256}; it is refused")

    async def _go_on(self, number: int) -> None:
        headers = {}
        if self.got and self.total and (self._tag or self.sha256):  # else two files might be sewn together
            headers["Range"] = f"bytes={self.got}-{self.total - 1}"
            if self._tag:
                headers["If-Range"] = self._tag
        expected = (self.total or LARGEST) - (self.got if headers else 0)
        async with _answer(self.address, headers, expected, number, self.patience) as response:
            self._check_safe(response)
            if response.status != 206:
                self._restart(response)
            elif not response.headers.get("Content-Range", "").startswith(f"bytes {self.got}-"):
                self.got = 0  # the next try asks for all of it
                raise _FailedError("the server gives another part than the one that was asked for")
            async for chunk in response.content.iter_any():
                self._take(chunk)
        if self.total is not None and self.got < self.total:
            raise _FailedError(f"the answer ended after {self.got} of {self.total} bytes")

    def _check_safe(self, response: aiohttp.ClientResponse) -> None:
        for step in (*response.history, response):
            if not is_safe(str(step.url)):
                raise DataError(f"{shown(self.address)} leads to {shown(str(step.url))}, which is not https: refused")

    def _restart(self, response: aiohttp.ClientResponse) -> None:
        length = response.content_length
        if length is not None and (length > LARGEST or (self.size is not None and length != self.size)):
            stated = f"the {self.size} that were published" if self.size is not None else f"at most {LARGEST}"
            raise DataError(f"{shown(self.address)} has {length} bytes, not {stated}; it is refused")
        tag = response.headers.get("ETag")
        self._tag = tag if tag and not tag.startswith("W/") else None
        self.total = self.size if length is None else length
        self.got, self._hash = 0, hashlib.sha256()
        self._on_disk(lambda: self.file.truncate(self.file.seek(0)))

    def _take(self, chunk: bytes) -> None:
        self.got += len(chunk)
        if self.got > (LARGEST if self.total is None else self.total):
            raise DataError(f"{shown(self.address)} is longer than {self.total or LARGEST} bytes; it is refused")
        self._hash.update(chunk)
        self._on_disk(lambda: self.file.write(chunk))
        self.progress(self.got, self.total, "")

    def _on_disk(self, write: Callable[[], object]) -> None:
        try:
            write()
        except OSError as error:  # of the disk; any other is the network's, and worth another try
            raise Error(f"cannot write {self.file.name}: {error.strerror}") from error
