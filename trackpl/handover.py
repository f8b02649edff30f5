"""Hand a batch from a worker to its trainer: small tensors in the message, each large one in a file in memory.

torch's own way costs a connection a tensor and a page fault each four kilobytes, a third of the time that it takes to
decode a clip, and it is bounded by /dev/shm. Here a large tensor is written in one call, and mapped by the receiver.
"""

from __future__ import annotations

import dataclasses
import mmap
import os
from multiprocessing import reduction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trackpl.types import Batch

_LARGE = 2**18  # bytes


def packed(value: Any) -> Any:
    """Return something that pickles cheaply, from which `unpacked` makes the batch again in another process.

    Where the system has no files in memory, large tensors are left to torch.
    """
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
        """Write a tensor; one that is dense in another order of its dimensions keeps that order."""
        order = sorted(range(x.ndim), key=x.stride, reverse=True)
        dense = x.permute(order).contiguous()
        strides = [0] * x.ndim
        for i, stride in zip(order, dense.stride(), strict=True):
            strides[i] = stride
        file = os.memfd_create("trackpl")
        try:
            data = memoryview(dense.numpy().reshape(-1).view(np.uint8))  # type: ignore[arg-type]
            while data:
                data = data[os.write(file, data) :]
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
