"""Strict readers for what strangers send: npy arrays of plain numbers, bounded JSON, numbers in range.

Nothing here executes, unpickles or allocates more than what is in the bytes. Every function raises `ValueError` with a
clause ("is no npy array ..."); the caller says of what.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

import numpy as np

_MAX_JSON, _MAX_NESTING = 2**24, 64
_DTYPES = {"u1", "i1", "u2", "i2", "i4", "i8", "u8", "f2", "f4", "f8", "b1"}
_NPY = re.compile(r"\{'descr': '[<|]([a-z]\d)', 'fortran_order': False, 'shape': \(([\d, ]*)\), \}\s*")


def whole(value: Any, what: str, low: int, high: int) -> int:
    """Return a whole number in low..high; raises ValueError if it is not that."""
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{what} must be a whole number in {low}..{high}, got {str(value)[:40]}")
    return value


def number(value: Any, what: str) -> float:
    """Return a number of ordinary size; raises ValueError if it is not that."""
    if type(value) not in (int, float) or not abs(value) < 1e30:
        raise ValueError(f"{what} must be a number, got {str(value)[:40]}")
    return float(value)


def read_npy(data: bytes) -> np.ndarray:
    """Read an npy array of plain numbers, never of objects.

    Raises:
        ValueError: no npy array, another number type, or not exactly the bytes that its shape needs.
    """
    if data[:8] != b"\x93NUMPY\x01\x00" or len(data) < 10:
        raise ValueError("is no npy array of version 1")
    end = 10 + int.from_bytes(data[8:10], "little")
    match = _NPY.fullmatch(data[10:end].decode("latin1"))
    if end > len(data) or match is None or match[1] not in _DTYPES:
        raise ValueError("has an npy header that is not of plain little-endian numbers in C order")
    dims = [d for d in match[2].replace(" ", "").split(",") if d]
    if len(dims) > 8 or any(len(d) > 12 for d in dims):
        raise ValueError("has an npy header with an impossible shape")
    shape, dtype = tuple(map(int, dims)), np.dtype(f"<{match[1]}")
    if math.prod(shape) * dtype.itemsize != len(data) - end:
        raise ValueError(f"holds {len(data) - end} bytes, not those of {dtype} {shape}")
    return np.frombuffer(data, dtype, offset=end).reshape(shape)


def read_json(data: bytes, limit: int = _MAX_JSON) -> Any:
    """Read JSON of bounded size and nesting, without NaN and infinities.

    Raises:
        ValueError: not that.
    """
    if len(data) > limit:
        raise ValueError(f"is larger than {limit} bytes")

    def refuse(word: str) -> NoReturn:
        raise ValueError(f"holds {word}, which is not JSON")

    try:
        value = json.loads(data, parse_constant=refuse)
    except RecursionError:
        raise ValueError(f"is nested deeper than {_MAX_NESTING}") from None
    level = [value]
    for _ in range(_MAX_NESTING):
        level = [x for v in level for x in (v.values() if isinstance(v, dict) else v if isinstance(v, list) else ())]
    if any(isinstance(v, dict | list) for v in level):
        raise ValueError(f"is nested deeper than {_MAX_NESTING}")
    return value
