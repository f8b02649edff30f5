"""TFRecord files and `tf.train.Example` messages, without TensorFlow.

A file is records in a row: u64 length, u32 masked CRC-32C of those eight bytes, the payload, u32 masked CRC-32C of it.
An Example is a protocol buffer: Example{1: Features{1: map entry{1: key, 2: Feature}}}, where a Feature is one of
{1: BytesList, 2: FloatList, 3: Int64List}, each a list as its field 1, packed or not.

The files come from anybody: whatever is in them gives values or a `DataError` that names file and record.
"""

from __future__ import annotations

import importlib
import struct
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from trackpl.errors import DataError

Feature = list[bytes] | np.ndarray
"""What an Example holds under a key: byte strings, float32 [n] or int64 [n]."""

MAX_RECORD = 2**29  # bytes
MAX_NUMBERS = 2**27  # of one list of integers
_MAX_FIELDS = 2**20  # of one message
_BLOCK = 2**20  # bytes of integers decoded at a time, for the sake of memory
_HEADER, _FOOTER = struct.Struct("<QI"), struct.Struct("<I")
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types of protocol buffers


class _Broken(ValueError):
    """The message is no Example; the public functions say which."""


# Files of records -------------------------------------------------------------------------------------------


def record_offsets(file: Path) -> list[int]:
    """Return where each record of a file begins, in bytes, reading the headers alone.

    Raises:
        DataError: no such file, no TFRecord file, or one that ends in the middle of a record.
    """
    out: list[int] = []
    try:
        size, offset = file.stat().st_size, 0
        with file.open("rb") as stream:
            while offset < size:
                length = _read_header(stream, file, offset, len(out), size)
                out.append(offset)
                offset += _HEADER.size + length + _FOOTER.size
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}") from None
    return out


def read_record(file: Path, offset: int, number: int = 0) -> bytes:
    """Return the payload of the record at `offset`, checked; `number` is its number in messages.

    Raises:
        DataError: no record there, or its checksum does not match its bytes.
    """
    try:
        with file.open("rb") as stream:
            length = _read_header(stream, file, offset, number, file.stat().st_size)
            data = stream.read(length)
            footer = stream.read(_FOOTER.size)
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}") from None
    if len(data) != length or len(footer) != _FOOTER.size:
        raise DataError(f"{file}: record {number} is cut off; copy the file again")
    if masked_crc(data) != _FOOTER.unpack(footer)[0]:
        raise DataError(f"{file}: record {number} is damaged (its checksum does not match); copy the file again")
    return data


def _read_header(stream: BinaryIO, file: Path, offset: int, number: int, size: int) -> int:
    """Return the length of the record at `offset`, whose end must lie in the file; the stream stands at its data."""
    stream.seek(offset)
    header = stream.read(_HEADER.size)
    if len(header) < _HEADER.size:
        raise DataError(f"{file}: record {number} is cut off after {len(header)} bytes; copy the file again")
    length, check = _HEADER.unpack(header)
    if masked_crc(header[:8]) != check:
        what = "is no TFRecord file" if number == 0 else f"is damaged where record {number} begins"
        raise DataError(f"{file} {what} (the checksum of the length does not match); copy the file again")
    if length > MAX_RECORD:
        raise DataError(f"{file}: record {number} says it has {length} bytes; at most {MAX_RECORD} are read")
    if offset + _HEADER.size + length + _FOOTER.size > size:
        have = size - offset - _HEADER.size
        raise DataError(f"{file}: record {number} is cut off, {have} of {length} bytes; copy the file again")
    return length


def masked_crc(data: bytes) -> int:
    """Return the CRC-32C of some bytes, masked as TFRecord files have it: rotated by 15 bits, plus a constant.

    Raises:
        DataError: the package `google-crc32c` is not installed.
    """
    try:
        crc = importlib.import_module("google_crc32c").value(data)
    except ImportError:
        raise DataError("reading TFRecords needs the package google-crc32c: pip install 'trackpl[data]'") from None
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


# Examples ---------------------------------------------------------------------------------------------------


def parse_example(data: bytes, wanted: Collection[str] | None = None, name: str = "example") -> dict[str, Feature]:
    """Return the features of an Example by key; those that are not `wanted` are skipped unread (none: all).

    Raises:
        DataError: the bytes are no Example; the message begins with `name`.
    """
    out: dict[str, Feature] = {}
    try:
        for features in _messages(memoryview(data), 1):
            for entry in _messages(features, 1):
                key = b"".join(bytes(k) for k in _messages(entry, 1)).decode()
                if wanted is None or key in wanted:
                    out[key] = _feature(b"".join(_messages(entry, 2)))
    except (_Broken, UnicodeDecodeError) as error:
        raise DataError(f"{name} is no tf.train.Example ({error})") from None
    return out


def _feature(data: bytes) -> Feature:
    """Read a Feature: the last of its three lists that is there, as protocol buffers have it."""
    out: Feature = []
    for number, kind, body in _fields(memoryview(data)):
        if kind != _BYTES or number not in (1, 2, 3):
            continue
        assert isinstance(body, memoryview)
        out = [bytes(b) for b in _messages(body, 1)] if number == 1 else _numbers(body, number == 2)
    return out


def _numbers(data: memoryview, floats: bool) -> np.ndarray:
    """Read a FloatList or an Int64List."""
    parts = []
    for number, kind, body in _fields(data):
        if number != 1:
            continue
        if kind == _BYTES:
            assert isinstance(body, memoryview)
            parts.append(_packed_floats(body) if floats else varints(body))
        elif kind == (_FIXED32 if floats else _VARINT):
            assert isinstance(body, int)
            bits = np.array([body & (2**32 - 1 if floats else 2**64 - 1)], np.uint32 if floats else np.uint64)
            parts.append(bits.view(np.float32 if floats else np.int64))
        else:
            raise _Broken(f"a list of {'floats' if floats else 'integers'} has the wire type {kind}")
    return np.concatenate(parts) if parts else np.zeros(0, np.float32 if floats else np.int64)


def _packed_floats(data: memoryview) -> np.ndarray:
    if len(data) % 4:
        raise _Broken(f"{len(data)} bytes of floats")
    return np.frombuffer(data, "<f4").astype(np.float32, copy=False)


def varints(data: memoryview | bytes) -> np.ndarray:
    """Read packed variable-length integers, all at once: int64.

    Raises:
        ValueError: the last one does not end, one is longer than ten bytes, or there are too many.
    """
    septets = np.frombuffer(data, np.uint8)
    count = int(np.count_nonzero(septets < 0x80))
    if count > MAX_NUMBERS:
        raise _Broken(f"a list of {count} integers; at most {MAX_NUMBERS} are read")
    if len(septets) and septets[-1] >= 0x80:
        raise _Broken("a list of integers does not end")
    out, begin, done = np.empty(count, np.int64), 0, 0
    while begin < len(septets):
        block = septets[begin : begin + _BLOCK]
        ends = np.flatnonzero(block < 0x80) + 1
        if not len(ends):
            raise _Broken("an integer of more than ten bytes")
        out[done : done + len(ends)] = _decode_block(block[: ends[-1]], ends)
        begin, done = begin + int(ends[-1]), done + len(ends)
    return out


def _decode_block(septets: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Decode whole integers that end before `ends`."""
    lengths = np.diff(ends, prepend=0)
    starts, longest = ends - lengths, int(lengths.max())
    if longest > 10:
        raise _Broken(f"an integer of {longest} bytes")
    values = (septets[starts] & 0x7F).astype(np.uint64)
    for k in range(1, longest):
        longer = np.flatnonzero(lengths > k)
        values[longer] |= (septets[starts[longer] + k] & 0x7F).astype(np.uint64) << np.uint64(7 * k)
    return values.view(np.int64)


def _messages(data: memoryview, wanted: int) -> Iterator[memoryview]:
    """Yield the bodies of the length-delimited fields of that number."""
    for number, kind, body in _fields(data):
        if number == wanted:
            if kind != _BYTES:
                raise _Broken(f"field {number} has the wire type {kind}")
            assert isinstance(body, memoryview)
            yield body


def _fields(data: memoryview) -> Iterator[tuple[int, int, memoryview | int]]:
    """Yield number, wire type and value of every field of a message: bytes as views, numbers as unsigned."""
    at = count = 0
    while at < len(data):
        count += 1
        if count > _MAX_FIELDS:
            raise _Broken(f"a message of more than {_MAX_FIELDS} fields")
        tag, at = _varint(data, at)
        number, kind = tag >> 3, tag & 7
        if kind == _VARINT:
            value, at = _varint(data, at)
            yield number, kind, value
            continue
        if kind == _BYTES:
            size, at = _varint(data, at)
        elif kind in (_FIXED32, _FIXED64):
            size = 4 if kind == _FIXED32 else 8
        else:
            raise _Broken(f"wire type {kind} at byte {at}")
        if size > len(data) - at:
            raise _Broken(f"a field of {size} bytes where {len(data) - at} are left")
        body = data[at : at + size]
        yield number, kind, body if kind == _BYTES else int.from_bytes(body, "little")
        at += size


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """Read one variable-length integer: its value, and where it ends."""
    value = 0
    for k in range(10):
        if at + k >= len(data):
            raise _Broken("it ends in the middle of a number")
        byte = data[at + k]
        value |= (byte & 0x7F) << 7 * k
        if byte < 0x80:
            return value, at + k + 1
    raise _Broken("a number of more than ten bytes")
