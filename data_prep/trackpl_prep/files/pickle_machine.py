"""The stack machine of pickles, of the instructions that build data alone; see `trackpl_prep.files.pickles`."""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np

MAX_OBJECT_ARRAYS = 2048  # NumPy frees nested ones by recursion
MAX_STEPS = 2**21  # instructions; the largest published file (120 videos as lists of 250 JPEGs) has 10^5
_MAX_LINE = 64  # characters of a number written as text
_SMALL = 4096  # byte strings up to here are copied at once
_NAMES = {
    **{(f"numpy.{core}.multiarray", f): f for core in ("core", "_core") for f in ("_reconstruct", "scalar")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): "_frombuffer" for core in ("core", "_core")},
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): "dtype",
    ("_codecs", "encode"): "encode",
    ("collections", "OrderedDict"): "OrderedDict",
}
_DTYPE = re.compile(r"[|<>=]?(b1|[iu][1248]|f[248]|S[1-9]\d{0,8}|U[1-9]\d{0,7}|O[48]?)")


class Refused(Exception):
    """The bytes are no data; the text is a clause that says why."""


class _Name:
    """A function or class of the list above, by name only."""

    def __init__(self, name: str) -> None:
        self.name = name


class _Dtype:
    """An array's number format, which its own BUILD may still turn into another byte order."""

    def __init__(self, text: str) -> None:
        self.text, self.dtype = text, number_format(text)


class _Array:
    """An array whose shape and bytes have not come yet."""

    value: np.ndarray | None = None


def number_format(text: Any) -> np.dtype:
    """Read a number format such as ``<f4``: bool, whole, real, bytes, text or object."""
    if type(text) is not str or not _DTYPE.fullmatch(text):
        raise Refused(f"arrays of {text[:40]!r} are not read" if type(text) is str else "a number format is no text")
    return np.dtype(object) if text.lstrip("|<>=").startswith("O") else np.dtype(text)


def array_from(raw: memoryview | bytes, dtype: np.dtype, shape: Any, fortran: bool) -> np.ndarray:
    """View bytes as an array, after checking that they are exactly as many as its shape takes."""
    check_shape(shape)
    if math.prod(shape) * dtype.itemsize != len(raw):
        raise Refused(f"an array of shape {shape} and {len(raw)} bytes do not fit")
    if dtype.kind == "O":
        raise Refused("objects are no bytes")
    if not len(raw):
        return np.empty(shape, dtype)
    flat = np.frombuffer(raw, dtype)
    if dtype.kind == "b":
        flat = flat.view(np.uint8) != 0  # other values than 0 and 1 would be neither true nor false
    elif dtype.kind == "U":
        codes = flat.view(np.dtype("u4").newbyteorder(dtype.byteorder))
        if (codes > 0x10FFFF).any() or (codes >> 11 == 0x1B).any():
            raise Refused("a text array holds what is no text")
    return flat.reshape(shape, order="F" if fortran else "C")


def check_shape(shape: Any) -> None:
    """Refuse what is no tuple of sizes."""
    whole = isinstance(shape, tuple) and len(shape) <= 32 and all(type(n) is int for n in shape)
    if not whole or any(not 0 <= n < 2**48 for n in shape):
        raise Refused("the shape of an array is none")


def build(data: bytes | mmap.mmap, views: bool) -> Any:
    """Build what a pickle describes; see `trackpl_prep.files.pickles.load`. Broken bytes raise anything."""
    return _Machine(data, views).run()


class _Machine:
    """The stack machine of one pickle."""

    def __init__(self, data: bytes | mmap.mmap, views: bool) -> None:
        self.data, self.view, self.at = data, memoryview(data), 0
        self.views = views
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # what lies under each mark
        self.memo: dict[int, Any] = {}
        self.steps = self.object_arrays = 0
        self.spare = 2 * len(data) + 2**16  # bytes that may still be copied: each byte of the file about twice

    def run(self) -> Any:
        while True:
            code = self.take(1)[0]
            if code == 0x2E:  # "." STOP
                break
            self.pay(1)
            step = _STEPS.get(code)
            if step is None:
                raise Refused(f"instruction {bytes([code])!r} builds no data (what Python 2 wrote: save it anew)")
            step(self)
        if self.at != len(self.data) or self.below or len(self.stack) != 1:
            raise Refused("the pickle does not end where its data end")
        return self.plain(self.stack.pop())

    def pay(self, steps: int) -> None:
        self.steps += steps
        if self.steps > MAX_STEPS:
            raise Refused(f"it takes more than {MAX_STEPS} instructions to build, which no data set does")

    def spend(self, size: int) -> None:
        self.spare -= size
        if self.spare < 0:
            raise Refused("it copies the same bytes over and over")

    # The stream

    def take(self, size: int) -> memoryview:
        start, self.at = self.at, self.at + size
        if self.at > len(self.data):
            raise Refused("it is cut short")
        return self.view[start : self.at]

    def payload(self, width: int) -> None:
        """Push a byte string that is preceded by its length."""
        raw = self.take(self.number(width))
        self.push(raw if len(raw) > _SMALL else bytes(raw))

    def number(self, size: int, signed: bool = False) -> int:
        return int.from_bytes(self.take(size), "little", signed=signed)

    def line(self, longest: int | None = _MAX_LINE) -> bytes:
        stop = self.data.find(b"\n", self.at, len(self.data) if longest is None else self.at + longest)
        if stop < 0:
            raise Refused("a line of text does not end")
        return bytes(self.take(stop + 1 - self.at)[:-1])

    def text(self, size: int) -> str:
        return str(self.take(size), "utf-8")

    # The stack

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        value = self.stack.pop()
        return value.value if isinstance(value, _Array) and value.value is not None else value

    def pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.below.pop()
        return [x.value if isinstance(x, _Array) and x.value is not None else x for x in items]

    def plain(self, value: Any) -> Any:
        """Give `value` as it may stand in a container: data, not a name or an unfinished array."""
        if isinstance(value, memoryview):
            if self.views:
                return value
            self.spend(len(value))
            return bytes(value)
        if isinstance(value, _Name | _Dtype | _Array | _Arguments):
            raise Refused("it holds a function, class or number format as if that were data")
        return value

    def tuple_of(self, items: list[Any]) -> None:
        """Push a tuple; as long as it may describe an array, its parts stay as they are."""
        raw = any(isinstance(x, _Dtype | _Name | _Array) for x in items)
        self.push(_Arguments(items) if raw else tuple(map(self.plain, items)))

    def mark(self) -> None:
        self.below.append(self.stack)
        self.stack = []

    def duplicate(self) -> None:
        self.push(self.stack[-1])

    def discard(self) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.pop_mark()

    def put(self, index: int) -> None:
        if not 0 <= index < 2**32:
            raise Refused("it numbers what it builds beyond all counting")
        self.memo[index] = self.stack[-1]

    def get(self, index: int) -> None:
        if index not in self.memo:
            raise Refused("it refers to something that it has not built")
        self.push(self.memo[index])
        self.push(self.pop())

    # Containers

    def append(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not list:
            raise Refused("it appends to something that is no list")
        target.extend(map(self.plain, items))

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) not in (dict, OrderedDict) or len(items) % 2:
            raise Refused("it sets items of something that is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not (type(key) in (str, bytes) or (type(key) is int and -(2**63) <= key < 2**63)):
                raise Refused("a key of a dict is neither text nor a number")
            target[key] = self.plain(value)

    # Names and what they make

    def name(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise Refused("it asks for a function whose name is no text")
        found = _NAMES.get((module, name))
        if found is None:
            asked = f"{module[:60]}.{name[:60]}"
            raise Refused(f"it asks for {asked!r}, which is code; only containers, numbers, text and arrays are read")
        self.push(_Name(found))

    def global_line(self) -> None:
        module, name = self.line(100), self.line(100)
        self.name(module.decode("latin1"), name.decode("latin1"))

    def reduce(self) -> None:
        args, function = self.pop(), self.pop()
        if not isinstance(function, _Name) or type(args) not in (tuple, _Arguments):
            raise Refused("it calls something that is no function")
        make = _MAKE.get(function.name)
        if make is None:
            raise Refused(f"it calls {function.name!r}")
        self.push(make(self, *args))

    def make_encoded(self, text: Any, encoding: Any) -> bytes:
        if type(text) is not str or type(encoding) is not str or encoding != "latin1":
            raise Refused("it encodes otherwise than NumPy writes bytes")
        self.spend(len(text))
        return text.encode("latin1")

    def make_ordered(self, items: Any = ()) -> OrderedDict[Any, Any]:
        if type(items) is not tuple or items:
            raise Refused("an ordered dict is built otherwise than Python 3 writes it")
        return OrderedDict()

    def make_dtype(self, text: Any, align: Any = False, copy: Any = True) -> _Dtype:
        return _Dtype(text)

    def make_unfinished(self, kind: Any, shape: Any, code: Any) -> _Array:
        empty = type(shape) is tuple and len(shape) == 1 and type(shape[0]) is int and shape[0] == 0
        if not isinstance(kind, _Name) or kind.name != "ndarray" or not empty:
            raise Refused("an array does not begin empty")
        return _Array()

    def make_scalar(self, kind: Any, raw: Any) -> Any:
        return self.finished(raw, kind, (1,), False)[0]

    def make_from_buffer(self, raw: Any, kind: Any, shape: Any, order: Any) -> np.ndarray:
        if type(order) is not str or order not in ("C", "F"):
            raise Refused("an array is neither in row nor in column order")
        return self.finished(raw, kind, shape, order == "F")

    def build(self) -> None:
        state, target = self.pop(), self.stack[-1]
        if isinstance(target, _Dtype):
            target.dtype = _ordered(target, state)
        elif isinstance(target, _Array) and target.value is None and type(state) is _Arguments and len(state) == 5:
            target.value = self.finished(state[4], state[2], state[1], state[3] is True)
            self.stack[-1] = target.value
        else:
            raise Refused("it sets the state of something that has none")

    def finished(self, raw: Any, kind: Any, shape: Any, fortran: bool) -> np.ndarray:
        """Make the array that a pickle describes; objects come as a list, numbers as their bytes."""
        if not isinstance(kind, _Dtype):
            raise Refused("an array has no number format")
        if kind.dtype.kind == "O":
            check_shape(shape)
            if type(raw) is not list or len(raw) != math.prod(shape):
                raise Refused("an array of objects has not as many as its shape says")
            self.pay(len(raw))
            self.object_arrays += 1
            if self.object_arrays > MAX_OBJECT_ARRAYS:
                raise Refused(f"it holds more than {MAX_OBJECT_ARRAYS} arrays of objects")
            return np.fromiter(raw, object, len(raw)).reshape(shape, order="F" if fortran else "C")
        if not isinstance(raw, bytes | memoryview):
            raise Refused("the numbers of an array are no bytes")
        self.spend(len(raw))
        array = array_from(raw, kind.dtype, shape, fortran)
        return array if self.views else array.copy(order="K")


class _Arguments(list):
    """A tuple that holds names or number formats: arguments, never data."""


def _ordered(kind: _Dtype, state: Any) -> np.dtype:
    """Apply the state that NumPy writes after a number format: its byte order, and no fields."""
    plain = type(state) is tuple and len(state) == 8 and all(x is None for x in state[2:5])
    if not plain or type(state[1]) is not str or state[1] not in ("<", ">", "|", "="):
        raise Refused("a number format has fields or other things that are not read")
    return number_format(kind.text) if state[1] == "|" else number_format(state[1] + kind.text.lstrip("|<>="))


_MAKE: dict[str, Callable[..., Any]] = {
    "encode": _Machine.make_encoded,
    "OrderedDict": _Machine.make_ordered,
    "dtype": _Machine.make_dtype,
    "_reconstruct": _Machine.make_unfinished,
    "scalar": _Machine.make_scalar,
    "_frombuffer": _Machine.make_from_buffer,
}


def _long(m: _Machine) -> None:
    size = m.number(1)
    if size > 16:
        raise Refused("a whole number of more than 128 bits")
    m.push(m.number(size, signed=True))


def _text_number(m: _Machine) -> None:
    line = m.line()
    m.push({b"00": False, b"01": True}.get(line) if line in (b"00", b"01") else int(line.rstrip(b"L")))


def _proto(m: _Machine) -> None:
    if m.number(1) > 5:
        raise Refused("its protocol is newer than 5")


def _frame(m: _Machine) -> None:
    if m.number(8) > len(m.data) - m.at:
        raise Refused("it is cut short")


def _raw_text(m: _Machine) -> None:
    text = m.line(None).decode("raw-unicode-escape")
    text.encode()  # raises for half characters
    m.push(text)


def _list_of(m: _Machine) -> None:
    items = m.pop_mark()
    m.push([])
    m.append(items)


def _dict_of(m: _Machine) -> None:
    items = m.pop_mark()
    m.push({})
    m.set_items(items)


def _pair(m: _Machine) -> list[Any]:
    value, key = m.pop(), m.pop()
    return [key, value]


def _popped(m: _Machine, count: int) -> list[Any]:
    return [m.pop() for _ in range(count)][::-1]


def _discard_all(m: _Machine) -> None:
    m.pop_mark()


def _stack_global(m: _Machine) -> None:
    name, module = m.pop(), m.pop()
    m.name(module, name)


_STEPS: dict[int, Callable[[_Machine], None]] = {
    ord(code): step
    for code, step in {
        "\x80": _proto,
        "\x95": _frame,
        # numbers
        "N": lambda m: m.push(None),
        "\x88": lambda m: m.push(True),
        "\x89": lambda m: m.push(False),
        "K": lambda m: m.push(m.number(1)),
        "M": lambda m: m.push(m.number(2)),
        "J": lambda m: m.push(m.number(4, signed=True)),
        "\x8a": _long,
        "I": _text_number,
        "L": _text_number,
        "F": lambda m: m.push(float(m.line())),
        "G": lambda m: m.push(struct.unpack(">d", m.take(8))[0]),
        # text and bytes
        "V": _raw_text,
        "X": lambda m: m.push(m.text(m.number(4))),
        "\x8c": lambda m: m.push(m.text(m.number(1))),
        "\x8d": lambda m: m.push(m.text(m.number(8))),
        "B": lambda m: m.payload(4),
        "C": lambda m: m.payload(1),
        "\x8e": lambda m: m.payload(8),
        "\x96": lambda m: m.payload(8),
        # stack and memo
        "(": _Machine.mark,
        "0": _Machine.discard,
        "1": _discard_all,
        "2": _Machine.duplicate,
        "p": lambda m: m.put(int(m.line())),
        "q": lambda m: m.put(m.number(1)),
        "r": lambda m: m.put(m.number(4)),
        "\x94": lambda m: m.put(len(m.memo)),
        "g": lambda m: m.get(int(m.line())),
        "h": lambda m: m.get(m.number(1)),
        "j": lambda m: m.get(m.number(4)),
        # containers
        "]": lambda m: m.push([]),
        "}": lambda m: m.push({}),
        ")": lambda m: m.push(()),
        "\x85": lambda m: m.tuple_of(_popped(m, 1)),
        "\x86": lambda m: m.tuple_of(_popped(m, 2)),
        "\x87": lambda m: m.tuple_of(_popped(m, 3)),
        "t": lambda m: m.tuple_of(m.pop_mark()),
        "l": _list_of,
        "d": _dict_of,
        "a": lambda m: m.append(_popped(m, 1)),
        "e": lambda m: m.append(m.pop_mark()),
        "s": lambda m: m.set_items(_pair(m)),
        "u": lambda m: m.set_items(m.pop_mark()),
        # names
        "c": _Machine.global_line,
        "\x93": _stack_global,
        "R": _Machine.reduce,
        "b": _Machine.build,
    }.items()
}
