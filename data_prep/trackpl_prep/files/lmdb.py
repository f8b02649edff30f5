"""Read values from an LMDB file of unknown origin, with every offset checked.

The C library maps the file and trusts what it finds there: on a download that was cut short the process dies of a bus
error, where a message is wanted. Only what such data sets need is read: one plain database, 64-bit, little-endian, as
LMDB 0.9 writes it. The layout is that of `MDB_meta`, `MDB_page` and `MDB_node` in LMDB's documentation (lmdb.tech).
"""

from __future__ import annotations

import os
import struct
from bisect import bisect_right
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, NoReturn

from trackpl.errors import DataError

_MAGIC, _VERSION = 0xBEEFC0DE, 1
_HEADER = 16  # bytes before the content of a page
_BRANCH, _LEAF, _OVERFLOW = 1, 2, 4  # kinds of pages
_KINDS = 0x2F  # the flags that tell the kind of a page
_ELSEWHERE = 1  # flag of a node: the value lies in overflow pages
_NOWHERE = 2**64 - 1  # root of an empty tree
_DEEPEST = 32


def read_values(path: Path, keys: Iterable[str], limit: int = 2**30) -> dict[str, bytes | None]:
    """Read the values of some keys; of a key that is not there it is None.

    Args:
        path: the file, or the folder that holds it as `data.mdb`.
        keys: what to look up.
        limit: largest value that is read, in bytes.

    Raises:
        DataError: no LMDB file, cut short or broken, or a value above the limit; the message names the file.
    """
    file = path / "data.mdb" if path.is_dir() else path
    try:
        with open(file, "rb", buffering=0) as stream:
            tree = _Tree(stream, file, limit)
            return {key: tree.find(key.encode()) for key in keys}
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}") from None


class _Tree:
    """The main database of a file."""

    def __init__(self, stream: BinaryIO, path: Path, limit: int) -> None:
        self.stream, self.path, self.limit = stream, path, limit
        self.size = os.fstat(stream.fileno()).st_size
        self.page_size = 4096  # as long as it is not known
        self.page_size = self.meta(0)[0]
        if self.page_size not in (2**k for k in range(9, 17)):
            self.fail(f"its pages of {self.page_size} bytes are none")
        _, self.root, last, _ = max((self.meta(0), self.meta(1)), key=lambda meta: meta[3])
        if (last + 1) * self.page_size > self.size:
            self.fail(f"it should have {(last + 1) * self.page_size} bytes and has {self.size}; fetch it again")

    def fail(self, why: str) -> NoReturn:
        raise DataError(f"{self.path} is no whole LMDB database: {why}")

    def read(self, offset: int, size: int) -> bytes:
        if offset + size > self.size:
            self.fail(f"it points to {size} bytes at {offset}, but has {self.size}")
        self.stream.seek(offset)
        parts = []
        while size and (part := self.stream.read(size)):  # a raw file may give less than it is asked for
            parts.append(part)
            size -= len(part)
        if size:
            self.fail("it is cut short")
        return b"".join(parts)

    def meta(self, number: int) -> tuple[int, int, int, int]:
        """Return page size, root of the tree, last page and transaction of one of the two meta pages."""
        page = self.read(number * self.page_size, 152)
        magic, version = struct.unpack_from("<II", page, _HEADER)
        if magic != _MAGIC:
            self.fail("it does not begin as one")
        if version != _VERSION:
            self.fail(f"it is of the version {version}, not {_VERSION}")
        (page_size,) = struct.unpack_from("<I", page, 40)
        (flags,) = struct.unpack_from("<H", page, 92)
        root, last, transaction = struct.unpack_from("<QQQ", page, 128)
        if flags:
            self.fail(f"its keys are of an order that is not read (flags {flags})")
        return page_size, root, last, transaction

    def page(self, number: int) -> tuple[bytes, int]:
        """Return a page and its kind."""
        page = self.read(number * self.page_size, self.page_size)
        return page, struct.unpack_from("<H", page, 10)[0] & _KINDS

    def find(self, key: bytes) -> bytes | None:
        if self.root == _NOWHERE:
            return None
        number = self.root
        for _ in range(_DEEPEST):
            page, kind = self.page(number)
            nodes = self.nodes(page)
            keys = [node[0] for node in nodes]
            if kind == _LEAF:
                at = bisect_right(keys, key) - 1
                return self.value(page, nodes[at]) if at >= 0 and keys[at] == key else None
            if kind != _BRANCH or not nodes:
                self.fail(f"page {number} is of the kind {kind}")
            # The first key of a branch stands for everything below the second one.
            low, high, flags = nodes[bisect_right(keys, key, 1) - 1][1:4]
            number = low | high << 16 | flags << 32
        self.fail("its tree goes round in circles")

    def nodes(self, page: bytes) -> list[tuple[bytes, int, int, int, int]]:
        """Return key, low and high half of a size or page number, flags and place of the value of every node."""
        (lower,) = struct.unpack_from("<H", page, 12)
        if not _HEADER <= lower <= len(page):
            self.fail("a page is larger than it can be")
        out = []
        for at in struct.unpack_from(f"<{(lower - _HEADER) // 2}H", page, _HEADER):
            if at + 8 > len(page):
                self.fail("a node lies outside its page")
            low, high, flags, size = struct.unpack_from("<4H", page, at)
            if at + 8 + size > len(page):
                self.fail("a key lies outside its page")
            out.append((page[at + 8 : at + 8 + size], low, high, flags, at + 8 + size))
        return out

    def value(self, page: bytes, node: tuple[bytes, int, int, int, int]) -> bytes:
        key, low, high, flags, at = node
        size = low | high << 16
        if size > self.limit:
            raise DataError(f"{self.path}: the value of {key[:40]!r} has {size} bytes, at most {self.limit} are read")
        if flags == 0 and at + size <= len(page):
            return page[at : at + size]
        if flags != _ELSEWHERE or at + 8 > len(page):
            self.fail(f"the value of {key[:40]!r} does not lie in its page")
        (number,) = struct.unpack_from("<Q", page, at)
        if self.page(number)[1] != _OVERFLOW:
            self.fail(f"the value of {key[:40]!r} does not lie in overflow pages")
        return self.read(number * self.page_size + _HEADER, size)
