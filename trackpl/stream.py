"""How draws become batches: what the workers of `trackpl.data` run.

What a training step sees is a pure function of (seed, epoch, step, rank), by the order that `trackpl.order` gives.
Neither the number of workers nor the way they are started plays a part, and the ranks together see what one process
with their joint batch would. A broken sample is reported and left out: in training another one, chosen by the number of
the draw, stands in for it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import webdataset
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from trackpl.augment import resize, warp
from trackpl.errors import DataError, UnreachableError
from trackpl.handover import handing_over, pack, unpack
from trackpl.order import Mixture, Progress, batch_of, permutation, random, share_of, steps_of
from trackpl.shards import Sample, decode, open_members
from trackpl.types import Clip

ATTEMPTS = 8  # samples that may be broken one after the other


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
    clips: int = 1  # of each sample in a pass

    @property
    def span(self) -> int:
        """Number of frames of the sample from the first to the last one wanted."""
        return 1 if self.frames is None else (self.frames - 1) * self.stride + 1


@dataclass(frozen=True)
class Draw:
    """One clip to make."""

    sample: Sample
    which: int = 0  # of the sets of a mixture
    number: int | None = None  # of the draw, from which everything random follows; none in validation
    clip: int = 0  # which of the clips of this sample in a pass


@dataclass(frozen=True)
class Broken:
    """A sample that could not be read."""

    which: int
    key: str
    message: str


@dataclass(frozen=True)
class Loaded:
    """A batch, if any of it could be read, and what could not."""

    clip: Clip | None
    broken: tuple[Broken, ...] = ()

    def pin_memory(self) -> Loaded:
        """Pin the batch."""
        return self if self.clip is None else dataclasses.replace(self, clip=self.clip.pin_memory())


# Order ------------------------------------------------------------------------------------------------------


class TrainDraws(IterableDataset):
    """The draws of one worker of one rank in one epoch, batch by batch.

    Args:
        sets: samples of each set, shard by shard.
        weights: of the sets.
        seed: from which all of it follows.
        steps: of an epoch.
        batch_size: clips a step of one rank.
        rank: of this process.
        world: number of processes.
        clips: clips taken from each sample in one pass.
        window: shards among which a pass is shuffled.
    """

    def __init__(
        self,
        sets: Sequence[Sequence[Sample]],
        weights: Sequence[float],
        seed: int,
        steps: int,
        batch_size: int,
        rank: int,
        world: int,
        clips: int = 1,
        window: int = 16,
    ) -> None:
        self.sets, self.seed, self.steps, self.batch_size = sets, seed, steps, batch_size
        self.rank, self.world, self.clips, self.window = rank, world, clips, window
        self.sizes = [_shard_sizes(samples, clips) for samples in sets]
        self.mixture = Mixture(weights, seed)
        self._orders: dict[int, tuple[int, np.ndarray]] = {}  # of each set the last one used
        # First step and first draw of step 0; shared with workers that live on from epoch to epoch.
        self.start = torch.zeros(2, dtype=torch.int64).share_memory_()

    def begin(self, progress: Progress, epoch: int, step: int) -> None:
        """Set where the next iteration begins."""
        self.start.copy_(torch.tensor([step, progress.first(epoch, 0)]))

    def __iter__(self) -> Iterator[Draw]:
        step, first = self.start.tolist()
        for s in _mine(range(step, self.steps)):
            yield from self.batch(first + s * self.world * self.batch_size)

    def batch(self, first: int) -> Iterator[Draw]:
        """Yield this rank's draws of the step that begins with draw `first`."""
        for number in batch_of(first, self.rank, self.batch_size):
            which, n = self.mixture[number]
            turn, place = divmod(n, sum(self.sizes[which]))
            yield self._draw(which, int(self._order(which, turn)[place]), number)

    def instead(self, draw: Draw, attempt: int) -> Draw | None:
        """Return what stands in for a draw whose sample is broken."""
        if draw.number is None:
            return None
        entry = random(self.seed, draw.number, 3, attempt).integers(sum(self.sizes[draw.which]))
        return self._draw(draw.which, int(entry), draw.number)

    def _draw(self, which: int, entry: int, number: int) -> Draw:
        sample, clip = divmod(entry, self.clips)
        return Draw(self.sets[which][sample], which, number, clip)

    def _order(self, which: int, turn: int) -> np.ndarray:
        """Return pass `turn` through the entries of a set."""
        if which not in self._orders or self._orders[which][0] != turn:
            seed = int(random(self.seed, which, 4).integers(2**62))
            self._orders[which] = (turn, permutation(self.sizes[which], seed, turn, self.window))
        return self._orders[which][1]


def _shard_sizes(samples: Sequence[Sample], clips: int) -> list[int]:
    sizes: dict[str, int] = {}
    for sample in samples:
        sizes[sample.shard.address] = sizes.get(sample.shard.address, 0) + clips
    return list(sizes.values())


class EachOnce(IterableDataset):
    """Every sample once over all ranks and workers, in batches, without repetition."""

    def __init__(self, samples: Sequence[Sample], batch_size: int, rank: int, world: int) -> None:
        self.samples = [samples[i] for i in share_of(len(samples), rank, world)]
        self.batch_size = batch_size
        self.steps = -(-len(self.samples) // batch_size)

    def __iter__(self) -> Iterator[Draw]:
        for step in _mine(range(self.steps)):
            for sample in self.samples[step * self.batch_size : (step + 1) * self.batch_size]:
                yield Draw(sample)

    def instead(self, draw: Draw, attempt: int) -> Draw | None:
        """Return nothing: a broken sample is left out."""
        return None


def _mine(steps: range) -> range:
    worker = get_worker_info()
    return steps if worker is None else steps_of(steps, worker.id, worker.num_workers)


# Samples to clips -------------------------------------------------------------------------------------------


class ClipStream(webdataset.DataPipeline):
    """Draws to batches: read the members, decode the wanted part, join.

    What stops the stream is its last item, a `DataError`, which `ClipLoader` raises in the main process as the one line
    that it is.
    """

    def __init__(self, draws: TrainDraws | EachOnce, wanted: Wanted, seed: int) -> None:
        cut = Cut(draws, wanted, seed)
        join = webdataset.batched(draws.batch_size, collation_fn=_join, partial=True)
        super().__init__(draws, webdataset.map(cut), join)
        self.draws, self.cut = draws, cut

    def __len__(self) -> int:
        return self.draws.steps

    def __iter__(self) -> Iterator[Loaded | Packed | DataError]:
        """Yield batches, packed where they are for another process."""
        try:
            with handing_over() as hand:
                if hand is not None:
                    hand.next()
                for loaded in super().__iter__():
                    if hand is None:
                        yield loaded
                        continue
                    yield Packed(pack(loaded.clip, hand), loaded.broken)
                    hand.next()
        except DataError as error:
            yield error


@dataclass(frozen=True)
class Packed:
    """A `Loaded` on its way to another process, where it is that again."""

    clip: Any
    broken: tuple[Broken, ...]

    def __reduce__(self) -> tuple[Any, ...]:
        return _arrived, (self.clip, self.broken)


def _arrived(clip: Any, broken: tuple[Broken, ...]) -> Loaded:
    return Loaded(unpack(clip), broken)


class Cut:
    """Turns a draw into a clip, or another one where its sample is broken."""

    def __init__(self, draws: TrainDraws | EachOnce, wanted: Wanted, seed: int) -> None:
        self.draws, self.wanted, self.seed = draws, wanted, seed

    def __call__(self, draw: Draw) -> Loaded:
        """Decode what is wanted of one sample; nothing is random without the number of a draw."""
        broken: list[Broken] = []
        now: Draw | None = draw
        while now is not None:
            try:
                return Loaded(self.clip(now), tuple(broken))
            except UnreachableError:
                raise
            except DataError as error:
                broken.append(Broken(now.which, now.sample.key, str(error)))
                if len(broken) >= ATTEMPTS:
                    raise DataError(f"{ATTEMPTS} samples one after the other are broken; the last: {error}") from None
            now = self.draws.instead(draw, len(broken))
        return Loaded(None, tuple(broken))

    def clip(self, draw: Draw) -> Clip:
        """Decode the wanted frames and fields of a sample."""
        wanted, sample = self.wanted, draw.sample
        chance = None if draw.number is None else random(self.seed, draw.number, 1)
        start = 0
        if chance is not None:
            room = sample.frames - wanted.span + 1  # each clip of a sample begins in a part of its own
            low, high = (i * room // wanted.clips for i in (draw.clip, draw.clip + 1))
            start = int(chance.integers(low, max(high, low + 1)))
        stop = sample.frames if wanted.frames is None else min(start + wanted.span, sample.frames)
        frames = range(start, stop, wanted.stride)
        with open_members(sample, wanted.fields) as members:
            clip = decode(members, frames, wanted.fields, sample.key)
        if chance is None:
            return clip if wanted.size is None else resize(clip, wanted.size)
        if wanted.size is not None:
            clip = _cover(clip, wanted.size, chance)
        if wanted.points is not None:
            clip = choose_points(clip, wanted.points, chance)
        seed = torch.tensor([int(chance.integers(2**62))])
        return SeededClip(**{f.name: getattr(clip, f.name) for f in dataclasses.fields(clip)}, seeds=seed)


def _cover(clip: Clip, size: tuple[int, int], chance: np.random.Generator) -> Clip:
    """Resize a clip until it just covers `size` and cut that out at a random place."""
    factor = max(new / old for new, old in zip(size, clip.size, strict=True))
    h, w = (max(new, round(old * factor)) for new, old in zip(size, clip.size, strict=True))
    clip = resize(clip, (h, w))
    y, x = (int(chance.integers(full - new + 1)) for full, new in zip((h, w), size, strict=True))
    if (h, w) == size:
        return clip
    return warp(clip, torch.ones(1, 2), torch.tensor([[-x, -y]]).float(), size)


def choose_points(clip: Clip, points: int, chance: np.random.Generator) -> Clip:
    """Keep `points` random tracks of a clip with B = 1, those seen in it first; pad with invalid ones."""
    if clip.tracks is None or clip.visible is None:
        return clip
    valid = torch.ones_like(clip.visible) if clip.valid is None else clip.valid
    seen = (clip.visible & valid).any(1)[0].numpy()
    order = chance.permutation(len(seen))
    keep = torch.from_numpy(order[np.argsort(~seen[order], kind="stable")][:points])
    pad = points - len(keep)
    changes: dict[str, Any] = {
        "tracks": F.pad(clip.tracks[:, :, keep], (0, 0, 0, pad)),
        "visible": F.pad(clip.visible[:, :, keep], (0, pad)),
        "valid": F.pad(valid[:, :, keep], (0, pad)),
    }
    if clip.track_depth is not None:
        changes["track_depth"] = F.pad(clip.track_depth[:, :, keep], (0, pad))
    if clip.queries is not None:
        changes["queries"] = F.pad(clip.queries[:, keep], (0, 0, 0, pad))
    return dataclasses.replace(clip, **changes)


def _join(parts: Sequence[Loaded]) -> Loaded:
    clips = [part.clip for part in parts if part.clip is not None]
    broken = tuple(b for part in parts for b in part.broken)
    if len(clips) < 2:
        return Loaded(clips[0] if clips else None, broken)
    try:
        return Loaded(Clip.cat(clips), broken)
    except RuntimeError as error:
        names = ", ".join(n for c in clips[:4] for n in c.name)
        why = str(error).splitlines()[0]
        raise DataError(
            f"clips {names} do not fit into one batch ({why}); set size and points, or a batch size of 1"
        ) from None
