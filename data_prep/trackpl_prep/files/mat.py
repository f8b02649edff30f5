"""Matrices of numbers from MAT files of version 5, strictly: SciPy's reader ends the process on some broken files.

Layout (MathWorks, "MAT-File Format"): 128 bytes of header, then elements of tag (type, size) and data, padded to 8
bytes; data of up to 4 bytes lie in the tag itself. An element is a matrix (flags, dimensions, name, numbers), or a
matrix deflated by zlib. Whatever is not the wanted matrix is skipped by its size.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator

import numpy as np

from trackpl.errors import DataError

_NUMBERS = {1: "i1", 2: "u1", 3: "<i2", 4: "<u2", 5: "<i4", 6: "<u4", 7: "<f4", 9: "<f8", 12: "<i8", 13: "<u8"}
_INT8, _INT32, _UINT32, _MATRIX, _DEFLATED = 1, 5, 6, 14, 15
_NUMERIC, _COMPLEX = range(6, 16), 0x800  # classes of arrays of numbers; a flag
_INFLATED = 2**26  # bytes that one file may inflate to


def read_matrix(data: bytes, wanted: str, name: str) -> np.ndarray | None:
    """Return the real matrix `wanted` as float64, or none if the file does not hold it.

    Raises:
        DataError: no MAT file of version 5, broken, or `wanted` is no real matrix of numbers; the message begins with
            `name`.
    """
    if data[:19] != b"MATLAB 5.0 MAT-file" or data[124:128] != b"\x00\x01IM":
        raise DataError(f"{name} is no little-endian MAT file of version 5; it begins with {data[:19]!r}")
    try:
        for kind, content in _matrices(memoryview(data)[128:]):
            found = _matrix(kind, content, wanted)
            if found is not None:
                return found
    except (ValueError, zlib.error) as error:
        raise DataError(f"{name} is broken: {error}") from None
    return None


def _matrices(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Walk the elements of a file, inflating those that are deflated."""
    left = _INFLATED
    for kind, content in _elements(data, aligned=False):
        if kind != _DEFLATED:
            yield kind, content
            continue
        stream = zlib.decompressobj()
        plain = stream.decompress(content, left)
        left -= len(plain)
        if not stream.eof:
            raise ValueError("a deflated matrix is cut off" if left else f"it inflates to more than {_INFLATED} bytes")
        yield from _elements(memoryview(plain))


def _elements(data: memoryview, aligned: bool = True) -> Iterator[tuple[int, memoryview]]:
    """Split data into elements: type and content. Deflated ones are not padded."""
    at = 0
    while at < len(data):
        if at + 8 > len(data):
            raise ValueError("an element is cut off in its tag")
        word, size = (int.from_bytes(data[at + k : at + k + 4], "little") for k in (0, 4))
        if word >> 16:  # small: size and type share the first word
            kind, size, start, step = word & 0xFFFF, word >> 16, at + 4, 8
            if size > 4:
                raise ValueError(f"a small element of {size} bytes")
        else:
            kind, start = word, at + 8
            step = 8 + (size if kind == _DEFLATED and not aligned else -(-size // 8) * 8)
        if start + size > len(data):
            raise ValueError(f"an element of {size} bytes is cut off")
        yield kind, data[start : start + size]
        at += step


def _matrix(kind: int, content: memoryview, wanted: str) -> np.ndarray | None:
    """Read a matrix if it is the wanted one."""
    if kind != _MATRIX:
        return None
    parts = _elements(content)
    flags, shape, title = (next(parts, (0, memoryview(b""))) for _ in range(3))
    if (flags[0], shape[0], title[0]) != (_UINT32, _INT32, _INT8) or len(flags[1]) != 8 or len(shape[1]) % 4:
        raise ValueError("a matrix without flags, dimensions and a name")
    if bytes(title[1]) != wanted.encode():
        return None
    flag = int.from_bytes(flags[1][:4], "little")
    dims = np.frombuffer(shape[1], "<i4").tolist()
    number, values = next(parts, (0, memoryview(b"")))
    if flag & 0xFF not in _NUMERIC or flag & _COMPLEX or number not in _NUMBERS:
        raise ValueError(f"{wanted} is no matrix of real numbers")
    dtype = np.dtype(_NUMBERS[number])
    if min(dims, default=0) < 0 or len(dims) > 8 or math.prod(dims) * dtype.itemsize != len(values):
        raise ValueError(f"{wanted} has {len(values)} bytes, not those of {dtype} {dims}")
    return np.frombuffer(values, dtype).astype(np.float64).reshape(dims, order="F")
