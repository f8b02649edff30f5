"""Which sample comes when: pure functions of seed and place, the same for any number of workers.

A training run is one endless sequence of draws, cut into steps and those among the ranks. Draw number d belongs to one
set of the mixture; that set's own n-th draw is entry n of its passes, each a permutation of all of its entries. Shards
are permuted as wholes and their samples within windows of some shards, so that a set that lies far away is read from a
few shards at a time; a set of fewer shards than a window is simply shuffled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trackpl.errors import DataError

CYCLE = 1000
"""Draws after which every set of a mixture has had exactly its share."""


def random(*key: int) -> np.random.Generator:
    """Return the generator that belongs to a key."""
    return np.random.default_rng(key)


def permutation(sizes: Sequence[int], seed: int, number: int, window: int) -> np.ndarray:
    """Return pass `number` through the entries of shards of these sizes, entries numbered shard by shard.

    Args:
        sizes: entries of each shard.
        seed: of the set.
        number: of the pass; each has another order.
        window: shards whose entries are mixed.
    """
    chance = random(seed, number, 0)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    shards = chance.permutation(len(sizes))
    out = []
    for first in range(0, len(shards), window):
        entries = np.concatenate([np.arange(starts[s], starts[s + 1]) for s in shards[first : first + window]])
        out.append(chance.permutation(entries))
    return np.concatenate(out)


class Mixture:
    """Divides the draws among sets: in each cycle of 1,000 every set has exactly its share, in a random order.

    Args:
        weights: of the sets, relative to one another; shares are kept to a thousandth, but none is below that.
        seed: of the order.

    Raises:
        DataError: no weights, one that is not above 0, or more than 1,000.
    """

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        if not 0 < len(weights) <= CYCLE or not all(0 < w < float("inf") for w in weights):
            raise DataError(f"the weights of 1 to {CYCLE} data sets must be numbers above 0, got {list(weights)[:8]}")
        self.seed = seed
        exact = np.asarray(weights, dtype=np.float64) / sum(weights) * CYCLE
        shares = np.maximum(np.floor(exact), 1).astype(np.int64)
        while (missing := CYCLE - shares.sum()) != 0:
            gap = (exact - shares) * np.sign(missing)
            gap[(shares <= 1) & (missing < 0)] = -np.inf
            shares[int(np.argmax(gap))] += np.sign(missing)
        self.shares = shares
        self._cycle: tuple[int, np.ndarray, np.ndarray] | None = None

    def __getitem__(self, draw: int) -> tuple[int, int]:
        """Return the set of a draw, and how many draws that set has had before it."""
        if len(self.shares) == 1:
            return 0, draw
        cycle, place = divmod(draw, CYCLE)
        if self._cycle is None or self._cycle[0] != cycle:
            order = random(self.seed, cycle, 2).permutation(np.repeat(np.arange(len(self.shares)), self.shares))
            before = np.empty(CYCLE, np.int64)
            for which, share in enumerate(self.shares):
                before[order == which] = np.arange(share)
            self._cycle = (cycle, order, before)
        which = int(self._cycle[1][place])
        return which, cycle * int(self.shares[which]) + int(self._cycle[2][place])


@dataclass(frozen=True)
class Progress:
    """Counts draws: the one with which step g of the run begins, over all ranks together."""

    steps: int  # an epoch
    per_step: int  # draws of all ranks
    origin_draw: int = 0  # from which it counts, as at step `origin_step`
    origin_step: int = 0

    def first(self, epoch: int, step: int) -> int:
        """Return the first draw of a step of an epoch."""
        return self.origin_draw + (epoch * self.steps + step - self.origin_step) * self.per_step

    def go_on(self, steps: int, per_step: int, epoch: int, step: int) -> Progress:
        """Return the count of a run that goes on here with another number of ranks, clips a step or steps an epoch."""
        if (steps, per_step) == (self.steps, self.per_step):
            return self
        return Progress(steps, per_step, self.first(epoch, step), epoch * steps + step)


def batch_of(first: int, rank: int, batch_size: int) -> range:
    """Return the draws of one rank in the step that begins with draw `first`."""
    return range(first + rank * batch_size, first + (rank + 1) * batch_size)


def share_of(count: int, rank: int, world: int) -> range:
    """Return which of `count` samples a rank scores: all ranks together each exactly once."""
    return range(rank, count, world)


def steps_of(steps: range, worker: int, workers: int) -> range:
    """Return the steps of a worker: the loader asks its workers in turn, so that the order is that of one."""
    return steps[worker::workers]
