"""Hand a batch from a worker to its trainer: small tensors in the message, each large one as a file in memory.

torch's own way costs a connection a tensor and a page fault each four kilobytes, and is bounded by /dev/shm. Here a
worker that decodes a clip writes each frame, while it is still in the processor's cache, into a file in memory
(`stack`), which the trainer maps. Where the system has no such files, everything is left to torch.
"""

from __future__ import annotations

import dataclasses
import mmap
import os
import weakref
from collections.abc import Callable
from math import prod
from multiprocessing import reduction
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from trackpl.types import Batch

_LARGE = 2**18  # bytes
_files: dict[int, int] = {}  # by the address of what is mapped, the file that it is in


def stack(count: int, shape: tuple[int, ...], fill: Callable[[int, np.ndarray], Any]) -> np.ndarray:
    """Return uint8 (count, *shape), of which `fill(i, part)` writes each part; it must fill all of it."""
    if get_worker_info() is None or not hasattr(os, "memfd_create") or count * prod(shape) < 4 * _LARGE:
        out = np.empty((count, *shape), np.uint8)
        for i, part in enumerate(out):
            fill(i, part)
        return out
    part = np.empty(shape, np.uint8)
    file = os.memfd_create("trackpl")
    try:
        for i in range(count):
            fill(i, part)
            _write(file, part)
        mapped = mmap.mmap(file, 0)
    except BaseException:
        os.close(file)
        raise
    out = np.frombuffer(mapped, np.uint8).reshape(count, *shape)
    address = out.ctypes.data
    _files[address] = file
    weakref.finalize(mapped, _forget, address)
    return out


def _forget(address: int) -> None:
    os.close(_files.pop(address))


def _write(file: int, array: np.ndarray) -> None:
    data = memoryview(array.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
    while data:
        data = data[os.write(file, data) :]


def packed(value: Any) -> Any:
    """Return something that pickles cheaply, from which `unpacked` makes the batch again in another process."""
    if isinstance(value, Tensor):
        return _packed_tensor(value.detach().cpu())
    if isinstance(value, Batch):
        return type(value), {f.name: packed(getattr(value, f.name)) for f in dataclasses.fields(value)}  # type: ignore[arg-type]
    return value


def unpacked(value: Any) -> Any:
    """Return what was packed."""
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    if isinstance(value, InMemory):
        return value.tensor()
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], dict):
        return value[0](**{name: unpacked(x) for name, x in value[1].items()})
    return value


def _packed_tensor(x: Tensor) -> Any:
    if x.dtype == torch.bfloat16:  # numpy has none
        return x
    if x.numel() * x.element_size() < _LARGE:
        return x.contiguous().numpy()
    return InMemory.of(x) if hasattr(os, "memfd_create") else x


@dataclasses.dataclass
class InMemory:
    """A tensor in a file in memory; whoever unpickles it gets the file."""

    file: Any  # a descriptor on its way
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements
    dtype: torch.dtype

    @classmethod
    def of(cls, x: Tensor) -> InMemory:
        """Put a tensor into a file, if it does not fill one already; its dimensions keep their order in memory."""
        file = _files.get(x.data_ptr())
        if file is not None and x.numel() == x.untyped_storage().nbytes():
            return cls(reduction.DupFd(file), tuple(x.shape), x.stride(), x.dtype)
        order = sorted(range(x.ndim), key=x.stride, reverse=True)
        dense = x.permute(order).contiguous()
        strides = [0] * x.ndim
        for i, stride in zip(order, dense.stride(), strict=True):
            strides[i] = stride
        file = os.memfd_create("trackpl")
        try:
            _write(file, dense.numpy())
            return cls(reduction.DupFd(file), tuple(x.shape), tuple(strides), x.dtype)
        finally:
            os.close(file)

    def tensor(self) -> Tensor:
        """Map the file; the memory goes with the tensor."""
        file = self.file.detach()
        try:
            mapped = mmap.mmap(file, 0)
        finally:
            os.close(file)
        return torch.frombuffer(mapped, dtype=self.dtype).as_strided(self.shape, self.strides)
