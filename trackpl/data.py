"""`ShardDataModule`: clips for training, validation and test from sets of shards (see `trackpl.stream`)."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader

from trackpl.augment import Augment
from trackpl.errors import DataError
from trackpl.handover import SLOTS
from trackpl.order import Progress
from trackpl.shards import Index, Sample, check_fields, read_index, verify_shards
from trackpl.stream import Broken, ClipStream, EachOnce, SeededClip, TrainDraws, Wanted
from trackpl.types import Clip

SYNTHETIC = "synthetic"
SYNTHETIC_BENCHMARK = {SYNTHETIC: SYNTHETIC}
TRAIN_FIELDS = ("video", "tracks", "visible", "valid")
TRUTH_FIELDS = (*TRAIN_FIELDS, "flow")

# Lightning cannot know that each worker of a `ClipStream` takes its own steps.
warnings.filterwarnings("ignore", message="Your `IterableDataset` has `__len__` defined")
# To have nothing to validate on is a choice: `data.val: null`.
warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")


MAX_BROKEN = 0.01
"""Share of the samples of a set that may be broken; above it the run stops."""

log = logging.getLogger("trackpl.data")


class ClipLoader(DataLoader):
    """A loader that says where it starts as late as it can, and reports what its workers could not read.

    Args:
        stream: what to load.
        samples: of each set, to tell what share of them is broken.
        before: called before each pass.
        options: of torch's loader.
    """

    def __init__(
        self,
        stream: ClipStream,
        samples: Sequence[Sequence[Sample]],
        before: Callable[[], None] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(stream, batch_size=None, **options)
        self.samples, self.before = samples, before
        self.broken: dict[tuple[int, str], str] = {}
        """What was broken and left out so far, by set and key."""

    def __iter__(self) -> Any:
        # A trainer that resumes asks for the iterator before it knows its epoch, but for the first batch after that.
        if self.before is not None:
            self.before()
        for item in super().__iter__():
            if isinstance(item, DataError):
                raise item
            for broken in item.broken:
                self._count(broken)
            if item.clip is not None:
                yield item.clip

    def _count(self, broken: Broken) -> None:
        """Name a broken sample once; raises `DataError` where there are too many of them."""
        if (broken.which, broken.key) in self.broken:
            return
        self.broken[broken.which, broken.key] = broken.message
        count, total = sum(which == broken.which for which, _ in self.broken), len(self.samples[broken.which])
        if count > MAX_BROKEN * total:
            raise DataError(
                f"{count} of {total} samples are broken, more than {MAX_BROKEN:.0%}; the last: {broken.message}; "
                "`trackpl data check` lists them all"
            )
        log.warning("left out, %d of %d samples are broken: %s", count, total, broken.message)

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the place in the epoch is the trainer's own, from where a resumed run takes it."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take nothing; see `state_dict`."""


class ShardDataModule(LightningDataModule):
    """Clips for training, validation and test from sets of shards.

    Args:
        train: index or folder of the shards to train on, on this machine or at an address of http(s), s3 or gs;
            ``synthetic`` is the set that is made on first use. Several with weights are a mixture.
        val: names of validation benchmarks and their shards, likewise.
        test: names of test benchmarks and their shards; none takes those of `val`.
        frames: number of frames of a training clip.
        stride: distance of its frames.
        size: height and width of training clips, which are resized to cover it and cut at random; none keeps
            them.
        points: number of tracks of a training clip, random ones that are seen in it; none keeps all.
        batch_size: training clips a step and process.
        workers: processes that load and decode, for each process that trains; 0 loads in that itself.
        worker_start: how these processes are started; none leaves it to torch.
        steps_per_epoch: training steps an epoch, the same in every process; none: one pass through the
            shards.
        clips_per_video: training clips taken from each video in a pass, each from a part of its own.
        shuffle_shards: number of shards among which the samples of a pass are shuffled.
        verify: check the SHA-256 of all local shards before the run; samples from elsewhere always are.
        augment: changes training clips on the device; none leaves them as they are.
        fields: what training needs of a clip; none: video, tracks, visible, valid.
        val_frames: number of frames of validation and test clips, from the start; none: all.
        val_size: height and width to which validation and test clips are resized; none keeps them.
        val_batch_size: validation and test clips a step and process.
        seed: from which the order of the clips, their cuts and their augmentation follow.
    """

    def __init__(
        self,
        train: str | dict[str, float] | None = SYNTHETIC,
        val: dict[str, str] | None = SYNTHETIC_BENCHMARK,
        test: dict[str, str] | None = None,
        frames: int = 2,
        stride: int = 1,
        size: tuple[int, int] | None = None,
        points: int | None = 256,
        batch_size: int = 4,
        workers: int = 1,
        worker_start: Literal["fork", "spawn", "forkserver"] | None = None,
        steps_per_epoch: int | None = None,
        clips_per_video: int = 1,
        shuffle_shards: int = 16,
        verify: bool = False,
        augment: Augment | None = None,
        fields: list[str] | None = None,
        val_frames: int | None = None,
        val_size: tuple[int, int] | None = None,
        val_batch_size: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        _check_counts(
            frames=frames,
            stride=stride,
            points=points,
            batch_size=batch_size,
            steps_per_epoch=steps_per_epoch,
            clips_per_video=clips_per_video,
            shuffle_shards=shuffle_shards,
            val_frames=val_frames,
            val_batch_size=val_batch_size,
        )
        mixture = {train: 1.0} if isinstance(train, str) else dict(train or {})
        self.weights = list(mixture.values())
        self.addresses = {"train": {address: address for address in mixture}, "val": dict(val or {})}
        self.addresses["test"] = self.addresses["val"] if test is None else dict(test)
        names = tuple(fields or TRAIN_FIELDS)
        check_fields(names)
        self.wanted = Wanted(names, frames, stride, size, points, clips_per_video)
        self.wanted_truth = Wanted(tuple({*names, *TRUTH_FIELDS}), val_frames, size=val_size)
        self.batch_size, self.val_batch_size, self.workers = batch_size, val_batch_size, workers
        self.steps_per_epoch, self.augment, self.seed = steps_per_epoch, augment, seed
        self.worker_start, self.shuffle_shards, self.verify = worker_start, shuffle_shards, verify
        self.benchmarks: tuple[str, ...] = tuple(self.addresses["val"])
        """Names of the current validation or test loaders, in their order."""
        self._indices: dict[tuple[str, str], Index] = {}
        self._counted: Progress | None = None  # of the training that runs, or of the one that goes on

    # Lightning's hooks --------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Make what is not there yet; Lightning calls this in one process only."""
        for split, addresses in self.addresses.items():
            for name, address in addresses.items():
                _locate(address, split)
                if self.verify:
                    verify_shards(self._index(split, name))

    def train_dataloader(self) -> ClipLoader:
        """Load `steps_per_epoch` batches of random clips, equally many in every process."""
        if not self.addresses["train"]:
            raise DataError(f"there is nothing to train on: set data.train to a set of shards or '{SYNTHETIC}'")
        span, sets = self.wanted.span, []
        for address in self.addresses["train"]:
            sets.append([s for s in self._index("train", address).samples if s.frames >= span])
            if not sets[-1]:
                raise DataError(f"no clip of {address} has the {span} frames asked for")
        rank, world = self._place()
        clips = self.wanted.clips * sum(map(len, sets))
        steps = self.steps_per_epoch or max(1, clips // (self.batch_size * world))
        draws = TrainDraws(
            sets,
            self.weights,
            self.seed,
            steps,
            self.batch_size,
            rank,
            world,
            self.wanted.clips,
            self.shuffle_shards,
        )

        def before() -> None:
            epoch, step = self._progress()
            old = self._counted or Progress(steps, world * self.batch_size)
            self._counted = old.go_on(steps, world * self.batch_size, epoch, step)
            draws.begin(self._counted, epoch, step)

        return self._loader(ClipStream(draws, self.wanted, self.seed), sets, before, persistent=True)

    def state_dict(self) -> dict[str, Any]:
        """Return how training clips were counted, and of what they are, for a run that goes on."""
        if self._counted is None:
            return {}
        return {"counted": dataclasses.asdict(self._counted), "seed": self.seed, "sets": self._digest()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting where the checkpoint was; another seed or other shards begin an order of their own."""
        if state and (state["seed"], state["sets"]) == (self.seed, self._digest()):
            self._counted = Progress(**state["counted"])
        elif state:
            log.warning("seed or training shards are not those of the checkpoint: the order of clips begins anew")

    def _digest(self) -> str:
        """Hash what the mixture is made of."""
        state = hashlib.sha256()
        for address, weight in zip(self.addresses["train"], self.weights, strict=True):
            shards = self._index("train", address).shards
            state.update("".join(s.sha256 for s in shards).encode() + repr(weight).encode())
        return state.hexdigest()

    def val_dataloader(self) -> list[ClipLoader]:
        """Load every clip of every benchmark once over all processes, in the same order each time."""
        return self._truth("val")

    def test_dataloader(self) -> list[ClipLoader]:
        """Load the test benchmarks as `val_dataloader` does."""
        return self._truth("test")

    def predict_dataloader(self) -> list[ClipLoader]:
        """Load the test benchmarks as `val_dataloader` does."""
        return self._truth("test")

    def transfer_batch_to_device(self, batch: Clip, device: torch.device, dataloader_idx: int) -> Clip:
        """Move a clip, without waiting where its memory is pinned."""
        return batch.to(device, non_blocking=True)

    def on_after_batch_transfer(self, batch: Clip, dataloader_idx: int) -> Clip:
        """Augment training clips on their device."""
        if not isinstance(batch, SeededClip):
            return batch
        clip = Clip(**{f.name: getattr(batch, f.name) for f in dataclasses.fields(Clip)})
        if self.augment is None or self.trainer is None or not self.trainer.training:
            return clip
        return self.augment(clip, batch.seeds)

    # Parts --------------------------------------------------------------------------------------------------

    def _truth(self, split: str) -> list[ClipLoader]:
        rank, world = self._place()
        self.benchmarks = tuple(self.addresses[split])
        loaders = []
        for name in self.benchmarks:
            index = self._index(split, name)
            if len(index.samples) < world:
                raise DataError(f"benchmark '{name}' has {len(index.samples)} clips, too few for {world} processes")
            draws = EachOnce(index.samples, self.val_batch_size, rank, world)
            loaders.append(self._loader(ClipStream(draws, self.wanted_truth, self.seed), [index.samples]))
        return loaders

    def _loader(
        self,
        stream: ClipStream,
        samples: Sequence[Sequence[Sample]],
        before: Callable[[], None] | None = None,
        persistent: bool = False,
    ) -> ClipLoader:
        workers = min(self.workers, len(stream))
        return ClipLoader(
            stream,
            samples,
            before,
            num_workers=workers,
            prefetch_factor=SLOTS - 1 if workers else None,
            multiprocessing_context=self.worker_start if workers else None,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=persistent and workers > 0,
        )

    def _index(self, split: str, name: str) -> Index:
        if (split, name) not in self._indices:
            self._indices[split, name] = read_index(_locate(self.addresses[split][name], split))
        return self._indices[split, name]

    def _progress(self) -> tuple[int, int]:
        """Return the epoch and the number of its steps that are done, which is above 0 after a resume within it."""
        if self.trainer is None:
            return 0, 0
        done = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready if self.trainer.training else 0
        return self.trainer.current_epoch, done

    def _place(self) -> tuple[int, int]:
        """Return rank and number of processes, as the trainer has them."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)


def _check_counts(**counts: int | None) -> None:
    for name, value in counts.items():
        if value is not None and value < 1:
            raise DataError(f"data: {name} must be at least 1, got {value}")


def _locate(address: str, split: str) -> str:
    """Return the path of a set of shards, making the synthetic one where it is not there yet."""
    if address != SYNTHETIC:
        return address
    from trackpl_prep.synthetic import default_set  # renders and writes; only who needs it loads it

    return str(default_set("train" if split == "train" else "val"))
