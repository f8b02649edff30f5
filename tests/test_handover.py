"""Batches arrive as they were made, through memory that is used again."""

import gc
import os
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from trackpl import handover
from trackpl.handover import SLOTS, handing_over, pack, stack, unpack
from trackpl.stream import Loaded, Packed
from trackpl.types import Camera, Clip, Flow


def make_clip(seed: int, frames: int, size: int) -> Clip:
    """Small and large fields; the video stacked frame by frame, as the reader does it."""
    g = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (frames, size, size, 3), generator=g, dtype=torch.uint8).numpy()
    video = torch.from_numpy(stack(frames, (size, size, 3), lambda i, out: out.__setitem__(..., pixels[i])))
    video = video.permute(0, 3, 1, 2)[None]
    return Clip(
        video, torch.rand(1, frames, 7, 2, generator=g), torch.rand(1, frames, 7, generator=g) > 0.5,
        depth=torch.rand(1, frames, 1, size, size, generator=g),
        flow=Flow(torch.rand(1, 2, 2, size, size, generator=g).transpose(3, 4), ((0, 1), (1, 2))),
        labels=torch.randint(9, (1, frames, size, size), generator=g),
        camera=Camera(torch.rand(1, frames, 4, generator=g), torch.rand(1, frames, 4, 4, generator=g)),
        name=(str(seed),), fps=12.0,
    )  # fmt: skip


def tensors(clip) -> list:
    out = []
    clip.map(lambda x: out.append(x) or x)
    return out


class Clips(IterableDataset):
    def __init__(self, sizes):
        self.sizes = sizes

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        with handing_over() as hand:
            for seed in range(len(self.sizes))[info.id :: info.num_workers]:
                hand.next()
                yield Packed(pack(make_clip(seed, 4, self.sizes[seed]), hand), ())


SIZES = [64, 300, 8, 300, 301, 64, 200, 300, 16, 400, 300, 300, 300, 64, 300, 300]


def same(a: Clip, b: Clip) -> bool:
    return a.name == b.name and a.flow.pairs == b.flow.pairs and all(map(torch.equal, tensors(a), tensors(b)))


@pytest.mark.slow
@pytest.mark.parametrize(("start", "workers"), [("fork", 1), ("fork", 3), ("spawn", 2)])
def test_every_batch_arrives_whole_whatever_its_size(start, workers):
    loader = DataLoader(
        Clips(SIZES), batch_size=None, num_workers=workers, multiprocessing_context=start, prefetch_factor=SLOTS - 1,
        persistent_workers=True,
    )  # fmt: skip
    expected = [make_clip(i, 4, size) for i, size in enumerate(SIZES)]
    for epoch in range(3):
        kept = []  # batches outlive the slots that they came in
        for loaded in loader:
            assert type(loaded) is Loaded
            kept.append(loaded.clip)
            if epoch == 1 and len(kept) == 5:
                break  # what the workers have made ahead is dropped
        assert all(same(a, b) for a, b in zip(kept, expected, strict=False))
        assert len(kept) == (5 if epoch == 1 else len(SIZES))


def test_here_nothing_is_handed_over():
    with handing_over() as hand:
        assert hand is None
    clip = make_clip(0, 3, 200)
    assert clip.video.shape == (1, 3, 3, 200, 200) and same(clip, make_clip(0, 3, 200))


@pytest.fixture
def hand(monkeypatch):
    """A worker and its trainer in one process."""
    monkeypatch.setattr(handover, "get_worker_info", lambda: True)
    monkeypatch.setattr(handover, "_kept", None)
    with handing_over() as hand:
        yield hand


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="this system has no files in memory")
def test_a_slot_that_was_written_over_is_an_error_and_never_other_data(hand):
    messages = []
    for seed in range(2 * SLOTS + 1):  # the slots first find out how much they need
        hand.next()
        messages.append(pack(make_clip(seed, 4, 200), hand))
        for message in [messages[-1]] if seed < 2 * SLOTS else []:
            assert same(unpack(message), make_clip(seed, 4, 200))
    late = messages[-1]
    for seed in range(SLOTS):
        hand.next()
        pack(make_clip(seed, 4, 200), hand)
    with pytest.raises(RuntimeError, match="wrote over a batch"):
        unpack(late)


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="this system has no files in memory")
def test_slots_do_not_pile_up(hand):
    def files() -> int:
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    counts = []
    for seed in range(5 * SLOTS):
        hand.next()
        unpack(pack(make_clip(seed, 4, 150 + seed), hand))
        counts.append(files())
    assert counts[-1] <= counts[3 * SLOTS] + 1


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="this system has no files in memory")
def test_what_ended_workers_had_is_given_back():
    mapped = []
    for _ in range(4):
        loader = DataLoader(Clips([200] * 8), batch_size=None, num_workers=2, prefetch_factor=SLOTS - 1)
        assert sum(1 for _ in loader) == 8
        mapped.append(Path("/proc/self/maps").read_text().count("memfd:trackpl"))
    assert 0 < mapped[-1] <= mapped[0] + 2 * SLOTS
