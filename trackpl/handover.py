"""Hand batches from a worker to its trainer through memory that both have mapped and that is used again and again.

torch's own way makes new shared memory for every tensor: a page fault each four kilobytes and a connection a tensor
cost a third of the time that it takes to decode a clip, and all of it must fit into /dev/shm. Here each worker has a
few slots. Frames are decoded right into one (`stack`), what else is large is copied there (`pack`), and the trainer
copies it out when it takes the message. A loader that asks a worker for at most SLOTS - 1 batches ahead never meets a
slot that is still to be read; each carries the number of its batch, so that a mistake in this would be an error and
never other data.

Where the system has no files in memory, and in the trainer's own process, everything is left as it is.
"""

from __future__ import annotations

import dataclasses
import itertools
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from multiprocessing import reduction
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from trackpl.types import Batch

SLOTS = 3
"""Batches of one worker that may exist at once; a loader must ask it for at most one fewer ahead."""

_LARGE = 2**16  # bytes; smaller tensors go along in the message
_ALIGN = 64
_names = itertools.count()


class Slot:
    """Memory of a worker for one batch at a time, in a file that the trainer maps too."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.file, self.size, self.name, self.sent = -1, 0, -1, False
        self.used = self.wanted = 0
        self.memory = np.empty(0, np.uint8)

    def begin(self, batch: int) -> None:
        """Start over with another batch, with more memory if the last one wanted it."""
        if self.wanted > self.size:
            if self.file >= 0:
                os.close(self.file)
            self.size, self.name, self.sent = self.wanted, next(_names), False
            self.file = os.memfd_create("trackpl")
            os.truncate(self.file, self.size)
            self.memory = np.frombuffer(mmap.mmap(self.file, self.size), np.uint8)
        self.used = self.wanted = _ALIGN
        if self.size:
            self.memory[:8].view(np.int64)[0] = batch

    def take(self, size: int) -> np.ndarray | None:
        """Return `size` bytes of it; none where it has not enough, which the next batch will find there."""
        start, self.wanted = self.used, self.wanted + -(-size // _ALIGN) * _ALIGN
        if self.wanted > self.size:
            return None
        self.used = self.wanted
        return self.memory[start : start + size]

    def place(self, address: int, size: int) -> int | None:
        """Return where in it the bytes at an address lie; none where they do not."""
        start = address - self.memory.ctypes.data if self.size else -1
        return start if _ALIGN <= start <= self.used - size else None


class Hand:
    """A worker's slots, one after the other."""

    def __init__(self) -> None:
        self.slots = [Slot(i) for i in range(SLOTS)]
        self.batch = 0

    @property
    def slot(self) -> Slot:
        """The one of the batch that is being made."""
        return self.slots[self.batch % SLOTS]

    def next(self) -> None:
        """Go on to the next batch."""
        self.batch += 1
        self.slot.begin(self.batch)


_kept: Hand | None = None  # of this process, if it is a worker
_hand: Hand | None = None  # the same, while it makes batches


@contextmanager
def handing_over() -> Iterator[Hand | None]:
    """Give the slots of this worker, for as long as it makes batches; none where batches are not handed over."""
    global _hand, _kept
    if get_worker_info() is None or not hasattr(os, "memfd_create"):
        yield None
        return
    _hand = _kept = _kept or Hand()  # a worker that lives on keeps it
    try:
        yield _hand
    finally:
        _hand = None


def stack(count: int, shape: tuple[int, ...], fill: Callable[[int, np.ndarray], Any]) -> np.ndarray:
    """Return uint8 (count, *shape), of which `fill(i, part)` writes each part, in a worker right where it is needed."""
    taken = None if _hand is None else _hand.slot.take(count * prod(shape))
    out = np.empty((count, *shape), np.uint8) if taken is None else taken.reshape(count, *shape)
    for i, part in enumerate(out):
        fill(i, part)
    return out


# Packing in the worker -------------------------------------------------------------------------------------


def pack(value: Any, hand: Hand) -> Any:
    """Return something that pickles cheaply, from which `unpack` makes the batch in the trainer."""
    if isinstance(value, Tensor):
        return _pack_tensor(value.detach(), hand.slot, hand.batch)
    if isinstance(value, Batch):
        return type(value), {f.name: pack(getattr(value, f.name), hand) for f in dataclasses.fields(value)}  # type: ignore[arg-type]
    return value


@dataclasses.dataclass
class Placed:
    """Where in a slot a tensor lies."""

    slot: tuple[int, int]  # process, number
    name: int  # of the slot's memory
    size: int  # of the slot's memory
    file: Any  # a descriptor on its way, the first time
    batch: int
    start: int
    strides: tuple[int, ...]  # in elements
    shape: tuple[int, ...]
    dtype: torch.dtype


def _pack_tensor(x: Tensor, slot: Slot, batch: int) -> Any:
    if x.dtype == torch.bfloat16 or x.device.type != "cpu":  # numpy has none
        return x
    size = x.numel() * x.element_size()
    if size < _LARGE:
        return x.contiguous().numpy().copy()  # it is pickled later, perhaps when the slot is another batch's
    order = sorted(range(x.ndim), key=x.stride, reverse=True)  # dimensions keep their order in memory
    dense = x.permute(order)
    start = slot.place(x.data_ptr(), size) if dense.is_contiguous() else None
    if start is None:
        taken = slot.take(size)
        if taken is None:
            return x  # torch's own way, until the slot has grown
        start = slot.used - -(-size // _ALIGN) * _ALIGN
        torch.from_numpy(taken).view(x.dtype).view(dense.shape).copy_(dense)
    strides, step = [0] * x.ndim, 1
    for i in reversed(order):
        strides[i], step = step, step * x.shape[i]
    file = None if slot.sent else reduction.DupFd(slot.file)
    slot.sent = True
    key = (os.getpid(), slot.number)
    return Placed(key, slot.name, slot.size, file, batch, start, tuple(strides), tuple(x.shape), x.dtype)


# Unpacking in the trainer ----------------------------------------------------------------------------------

_mapped: dict[tuple[int, int], tuple[int, np.ndarray]] = {}  # slot -> name of its memory, that memory


def unpack(value: Any) -> Any:
    """Return what was packed, in memory of its own."""
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    if isinstance(value, Placed):
        return _copied(value)
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], dict):
        return value[0](**{name: unpack(x) for name, x in value[1].items()})
    return value


def _copied(place: Placed) -> Tensor:
    if place.file is not None:
        file = place.file.detach()
        for slot in [s for s in _mapped if not os.path.exists(f"/proc/{s[0]}")]:
            del _mapped[slot]  # of a worker that has ended
        try:
            _mapped[place.slot] = (place.name, np.frombuffer(mmap.mmap(file, place.size), np.uint8))
        finally:
            os.close(file)
    name, memory = _mapped[place.slot]
    size = prod(place.shape) * place.dtype.itemsize
    out = torch.from_numpy(memory[place.start : place.start + size].copy())
    if name != place.name or memory[:8].view(np.int64)[0] != place.batch:
        raise RuntimeError("a worker wrote over a batch that was not taken yet; please report this")
    return out.view(place.dtype).as_strided(place.shape, place.strides)
