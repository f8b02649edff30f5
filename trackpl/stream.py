"""The order of clips, and how a sample becomes one: what the workers of `trackpl.data` run.

What a training step sees is a pure function of (seed, epoch, step, rank): the global sequence of draws goes through one
permutation of the samples after the other, and every batch takes its slice of it. Neither the number of workers nor the
shards play a part, and the ranks together see what one process with their joint batch would.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
import webdataset
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from trackpl.augment import resize, warp
from trackpl.errors import DataError
from trackpl.shards import Sample, decode, read_members
from trackpl.types import Clip


@dataclass(frozen=True)
class SeededClip(Clip):
    """A training batch with the seeds from which its augmentation follows."""

    seeds: Tensor | None = None  # (B,) int64


@dataclass(frozen=True)
class Wanted:
    """What to cut from each sample."""

    fields: tuple[str, ...]
    frames: int | None = None  # none: all
    stride: int = 1
    size: tuple[int, int] | None = None
    points: int | None = None

    @property
    def span(self) -> int:
        """Number of frames of the sample from the first to the last one wanted."""
        return 1 if self.frames is None else (self.frames - 1) * self.stride + 1


# Order ------------------------------------------------------------------------------------------------------


class TrainDraws(IterableDataset):
    """The draws (sample, seed) of one worker of one rank in one epoch, batch by batch."""

    def __init__(
        self, samples: Sequence[Sample], seed: int, steps: int, batch_size: int, rank: int, world: int
    ) -> None:
        self.samples, self.seed, self.steps, self.batch_size = samples, seed, steps, batch_size
        self.rank, self.world = rank, world
        self._orders: dict[int, np.ndarray] = {}  # the last one used
        self.start = torch.zeros(2, dtype=torch.int64).share_memory_()  # epoch and step; also for workers that live on

    def __iter__(self) -> Iterator[tuple[Sample, int]]:
        epoch, first = self.start.tolist()
        for step in _mine(range(first, self.steps)):
            yield from self.batch(epoch, step)

    def batch(self, epoch: int, step: int) -> Iterator[tuple[Sample, int]]:
        """Yield the draws of this rank's batch of one step."""
        first = ((epoch * self.steps + step) * self.world + self.rank) * self.batch_size
        for draw in range(first, first + self.batch_size):
            number, place = divmod(draw, len(self.samples))
            yield self.samples[int(self._order(number)[place])], draw

    def _order(self, number: int) -> np.ndarray:
        """Return the permutation of pass `number` through the samples."""
        if number not in self._orders:
            self._orders = {number: _random(self.seed, number, 0).permutation(len(self.samples))}
        return self._orders[number]


class EachOnce(IterableDataset):
    """Every sample once over all ranks and workers, in batches, without repetition."""

    def __init__(self, samples: Sequence[Sample], batch_size: int, rank: int, world: int) -> None:
        self.samples, self.batch_size = samples[rank::world], batch_size
        self.steps = -(-len(self.samples) // batch_size)

    def __iter__(self) -> Iterator[tuple[Sample, None]]:
        for step in _mine(range(self.steps)):
            for sample in self.samples[step * self.batch_size : (step + 1) * self.batch_size]:
                yield sample, None


def _mine(steps: range) -> range:
    """Return the steps of this worker: the loader asks its workers in turn, so the order is that of one."""
    worker = get_worker_info()
    return steps if worker is None else steps[worker.id :: worker.num_workers]


def _random(*key: int) -> np.random.Generator:
    return np.random.default_rng(key)


# Samples to clips -------------------------------------------------------------------------------------------


class ClipStream(webdataset.DataPipeline):
    """Draws to batches: read the members, decode the wanted part, join.

    A broken sample ends the stream with the `DataError` as its last item, which `ClipLoader` raises in the
    main process as the one line that it is.
    """

    def __init__(self, draws: TrainDraws | EachOnce, wanted: Wanted, seed: int) -> None:
        cut = Cut(wanted, seed)
        join = webdataset.batched(draws.batch_size, collation_fn=_join, partial=True)
        super().__init__(draws, webdataset.map(cut), join)
        self.draws, self.cut = draws, cut

    def __len__(self) -> int:
        return self.draws.steps

    def __iter__(self) -> Iterator[Clip | DataError]:
        try:
            yield from super().__iter__()
        except DataError as error:
            yield error


class Cut:
    """Turns a draw into a clip."""

    def __init__(self, wanted: Wanted, seed: int) -> None:
        self.wanted, self.seed = wanted, seed

    def __call__(self, draw: tuple[Sample, int | None]) -> Clip:
        """Decode what is wanted of one sample; nothing is random without the number of a draw."""
        sample, number = draw
        wanted = self.wanted
        random = None if number is None else _random(self.seed, number, 1)
        start = 0 if random is None else int(random.integers(sample.frames - wanted.span + 1))
        stop = sample.frames if wanted.frames is None else min(start + wanted.span, sample.frames)
        frames = range(start, stop, wanted.stride)
        clip = decode(read_members(sample, wanted.fields), frames, wanted.fields, sample.key)
        if random is None:
            return clip if wanted.size is None else resize(clip, wanted.size)
        if wanted.size is not None:
            clip = _cover(clip, wanted.size, random)
        if wanted.points is not None:
            clip = choose_points(clip, wanted.points, random)
        seed = torch.tensor([int(random.integers(2**62))])
        return SeededClip(**{f.name: getattr(clip, f.name) for f in dataclasses.fields(clip)}, seeds=seed)


def _cover(clip: Clip, size: tuple[int, int], random: np.random.Generator) -> Clip:
    """Resize a clip until it just covers `size` and cut that out at a random place."""
    factor = max(new / old for new, old in zip(size, clip.size, strict=True))
    h, w = (max(new, round(old * factor)) for new, old in zip(size, clip.size, strict=True))
    clip = resize(clip, (h, w))
    y, x = (int(random.integers(full - new + 1)) for full, new in zip((h, w), size, strict=True))
    if (h, w) == size:
        return clip
    return warp(clip, torch.ones(1, 2), torch.tensor([[-x, -y]]).float(), size)


def choose_points(clip: Clip, points: int, random: np.random.Generator) -> Clip:
    """Keep `points` random tracks of a clip with B = 1, those seen in it first; pad with invalid ones."""
    if clip.tracks is None or clip.visible is None:
        return clip
    valid = torch.ones_like(clip.visible) if clip.valid is None else clip.valid
    seen = (clip.visible & valid).any(1)[0].numpy()
    order = random.permutation(len(seen))
    keep = torch.from_numpy(order[np.argsort(~seen[order], kind="stable")][:points])
    pad = points - len(keep)
    return dataclasses.replace(
        clip,
        tracks=F.pad(clip.tracks[:, :, keep], (0, 0, 0, pad)),
        visible=F.pad(clip.visible[:, :, keep], (0, pad)),
        valid=F.pad(valid[:, :, keep], (0, pad)),
    )


def _join(clips: Sequence[Clip]) -> Clip:
    try:
        return Clip.cat(clips)
    except RuntimeError as error:
        names = ", ".join(n for c in clips[:4] for n in c.name)
        why = str(error).splitlines()[0]
        raise DataError(
            f"clips {names} do not fit into one batch ({why}); set size and points, or a batch size of 1"
        ) from None
