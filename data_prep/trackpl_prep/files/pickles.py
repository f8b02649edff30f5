"""Pickles read as data: containers, text, numbers, byte strings and NumPy arrays, and nothing is ever called.

A pickle is a program for a small stack machine whose instructions may name and call any function. This module does
not hand it to `pickle`: it walks the instructions itself, knows only those that build data, and recognises the few
names by which NumPy writes its arrays, as names. What it builds is bounded before it is built: by the bytes of the
file, and by the number of instructions (`MAX_STEPS`). Any bytes give data or a `DataError`.

What the instructions mean: the Python documentation of `pickletools`; security requirements: exact list of names,
arrays only from their own bytes.
"""

from __future__ import annotations

import mmap
import re
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from trackpl.errors import DataError
from trackpl_prep.files.pickle_machine import Refused, array_from, build, number_format

_NPY = re.compile(r"\{'descr': '([^']{2,12})', 'fortran_order': (False|True), 'shape': \(([\d, ]*)\), \}\s*")


def load(data: bytes | mmap.mmap, name: str, limit: int = 2**33, *, views: bool = False) -> Any:
    """Read one pickle (protocols 0 to 5, written by Python 3).

    Args:
        data: the pickle, whole.
        name: what errors call it.
        limit: largest number of bytes that is accepted.
        views: leave long byte strings as read-only memory views of `data`, and arrays as read-only views of it, so
            that a mapped file of any size is listed without being read.

    Raises:
        DataError: it holds something else than data, is broken, or is too large.
    """
    if len(data) > limit:
        raise DataError(f"{name}: {len(data)} bytes are more than the {limit} that are read")
    try:
        return build(data, views)
    except Refused as error:
        raise DataError(f"{name}: {error}") from None
    except Exception as error:  # whatever the bytes broke, it is the bytes' fault
        raise DataError(f"{name}: not a whole pickle ({type(error).__name__}: {str(error)[:100]})") from None


def load_file(path: Path, limit: int = 2**40) -> Any:
    """Map the pickle at `path` and read it with `views`: only what is looked at comes into memory."""
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None
    return load(data, str(path), limit, views=True)


def load_npy(data: bytes, name: str, limit: int = 2**33) -> Any:
    """Read one ``.npy``: a plain array, an array of Python objects, or the one object that was saved as such.

    Raises:
        DataError: the header is none, the size does not fit it, or the objects are not data.
    """
    if len(data) > limit:
        raise DataError(f"{name}: {len(data)} bytes are more than the {limit} that are read")
    try:
        version = data[6]
        if data[:6] != b"\x93NUMPY" or version not in (1, 2, 3):
            raise Refused("it does not begin as an .npy file")
        start = 10 if version == 1 else 12
        stop = start + int.from_bytes(data[8:start], "little")
        header = _NPY.fullmatch(data[start : min(stop, start + 2**16)].decode("latin1"))
        if header is None:
            raise Refused("its header describes no plain array")
        dtype, shape = number_format(header[1]), tuple(int(n) for n in header[3].replace(" ", "").split(",") if n)
        if dtype.kind != "O":
            return array_from(memoryview(data)[stop:], dtype, shape, header[2] == "True").copy(order="K")
    except Refused as error:
        raise DataError(f"{name}: {error}") from None
    except Exception as error:
        raise DataError(f"{name}: not a whole .npy file ({type(error).__name__}: {str(error)[:100]})") from None
    found = load(data[stop:], name, limit)
    if not isinstance(found, np.ndarray) or found.dtype != object or found.shape != shape:
        raise DataError(f"{name}: its objects are not an array of the shape {shape} that its header says")
    return found.item() if shape == () else found


def read_npz(path: Path, names: Collection[str] | None = None, limit: int = 2**33) -> dict[str, Any]:
    """Read the arrays of an ``.npz`` by name, all or those of `names` that it has.

    The sizes that the archive declares are added up and held against `limit` before anything is inflated.

    Raises:
        DataError: it is no such archive, is broken, or holds more than `limit` bytes.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = [m for m in archive.infolist() if m.filename.endswith(".npy")]
            wanted = {m.filename[:-4]: m for m in members if names is None or m.filename[:-4] in names}
            total = sum(m.file_size for m in wanted.values())
            if total > limit:
                raise DataError(f"{path}: its arrays take {total} bytes, more than the {limit} that are read")
            return {key: load_npy(_inflate(archive, m), f"{path}: {key}", limit) for key, m in wanted.items()}
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{path}: not a whole .npz archive ({type(error).__name__}: {str(error)[:100]})") from None


def _inflate(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError("a member is compressed in a way that NumPy does not write")
    with archive.open(member) as file:
        data = file.read(member.file_size)
        file.read(1)  # at the end: checks the CRC
    return data
