"""Learning from videos that nobody labelled: teachers track points in them, a student learns from their tracks.

Any method may teach, any may learn. The teachers run once, before the training (`trackpl.labelling`): their tracks lie
beside the frames in ordinary shards, so that from there on this is a `ShardDataModule` like any other.

After Karaev et al., "CoTracker3: Simpler and Better Point Tracking by Pseudo-Labelling Real Videos" (2024). Where we
differ: a teacher's labels are drawn anew with each clip of each pass, but never computed again; a clip of which half
the points are found is kept, with fewer of them; one with fewer is left out, instead of costing a step without a loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, Literal

import torch

from trackpl.corners import Sampling
from trackpl.data import SYNTHETIC_BENCHMARK, ShardDataModule
from trackpl.errors import DataError
from trackpl.labelling import Recipe, labelled, open_videos, set_name
from trackpl.plugins import find
from trackpl.teachers import Teacher


class PseudoLabels(ShardDataModule):
    """Clips of unlabelled videos with the tracks of teachers.

    Args:
        videos: what to learn from: a folder of your own videos or frames, or the index or folder of shards, whose
            labels, if any, are not looked at.
        teachers: methods by the name of their plugin, with the weights that ship with it; or each with `name`,
            `checkpoint`, `threshold` and `options`.
        choice: `random`: each teacher labels all clips, and a training clip comes from any of them; `agreement`:
            clips have the mean of the teachers' tracks, valid where all agree.
        within: distance up to which they agree, in pixels of a frame of 256 x 256.
        queries: points are `corners` of frames of the first quarter, or `uniform` in space and time.
        label_points: points of a labelled clip.
        label_frames: frames of a labelled clip; longer videos are cut into several.
        label_size: longer side of a labelled clip in pixels; smaller ones stay as they are.
        label_clips: how many clips are labelled at most, spread over the videos; none: all.
        label_seed: from which the points follow.
        bf16: teachers compute in bfloat16.
        max_broken: videos of a folder that may be left out because they cannot be read.
        held_out: videos on which to score, as `videos`: they are labelled likewise, and validation compares the
            student's tracks with each teacher's there, in addition to `val`.
        train: labelled shards to learn from as well, with weights relative to that of all pseudo-labels, which is 1.
        val: names of validation benchmarks and their shards.
        frames: number of frames of a training clip, at most `label_frames`.
        **options: of `ShardDataModule`.
    """

    def __init__(
        self,
        videos: str | None = None,
        teachers: list[str | Teacher] | None = None,
        choice: Literal["random", "agreement"] = "random",
        within: float = 4.0,
        queries: Sampling = "corners",
        label_points: int = 256,
        label_frames: int = 24,
        label_size: int = 256,
        label_clips: int | None = None,
        label_seed: int = 0,
        bf16: bool = True,
        max_broken: int = 0,
        held_out: str | None = None,
        train: str | dict[str, float] | None = None,
        val: dict[str, str] | None = SYNTHETIC_BENCHMARK,
        frames: int = 16,
        **options: Any,
    ) -> None:
        super().__init__(train=train, val=val, frames=frames, **options)
        self.recipe = Recipe(label_frames, label_points, label_size, queries, within, label_clips, label_seed, bf16)
        self.videos, self.held_out, self.max_broken = videos, held_out, max_broken
        self.groups = _groups(teachers or [], choice)
        _check(self.recipe, self.wanted.span)
        self._train = dict(zip(self.addresses["train"], self.weights, strict=True))
        self._sets: dict[str, dict[str, str]] = {}

    # Lightning's hooks --------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Label what is not labelled yet, and make what else is missing; Lightning calls this in one process only."""
        self._take_labels()
        super().prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Take the sets of labels, in every process."""
        self._take_labels()

    # Parts --------------------------------------------------------------------------------------------------

    def _take_labels(self) -> None:
        """Name the labelled sets as what to train and validate on; those that are not there are made."""
        fits = self.trainer is None or self.trainer.state.fn == "fit"
        if fits and self.videos is None and not self._train:
            raise DataError("no videos to learn from: set data.videos to a folder of videos, or to an index of shards")
        if fits and self.videos is not None:
            own = self._labelled(self.videos)
            mixture = self._train | {address: 1 / len(own) for address in own.values()}
            self.addresses["train"] = {address: address for address in mixture}
            self.weights = list(mixture.values())
        if self.held_out is not None:
            found = self._labelled(self.held_out)
            self.addresses["val"] |= {name.replace("labels", "held_out", 1): address for name, address in found.items()}

    def _labelled(self, address: str) -> dict[str, str]:
        """Return the labelled sets of some videos by name, one of each group of teachers."""
        if not self.groups:
            raise DataError("no teachers: set data.teachers to methods, such as [locotrack]")
        if address not in self._sets:
            for teacher in chain.from_iterable(self.groups):
                teacher.weights()  # before the videos are packed, which may take long
            quiet = self.trainer is not None and self.trainer.progress_bar_callback is None
            videos, device = open_videos(address, self.recipe, self.max_broken, quiet), self._device()
            paths = [labelled(videos, group, self.recipe, device, quiet) for group in self.groups]
            names = [set_name(group) for group in self.groups]
            unique = [n if names.count(n) == 1 else f"{n}_{i}" for i, n in enumerate(names)]
            self._sets[address] = dict(zip(unique, map(str, paths), strict=True))
        return self._sets[address]

    def _device(self) -> torch.device:
        """Return where teachers compute: where the student will, or a GPU where there is one."""
        if self.trainer is not None:
            return self.trainer.strategy.root_device
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _groups(teachers: Sequence[str | Teacher], choice: str) -> list[tuple[Teacher, ...]]:
    """Return the teachers of each set of labels: one each, or all of one."""
    found = tuple(Teacher(t) if isinstance(t, str) else t for t in teachers)
    for teacher in found:
        find(teacher.name)
    if len(set(map(repr, found))) < len(found):
        raise DataError("data.teachers names a teacher twice; another checkpoint or other options make another teacher")
    if choice == "random":
        return [(teacher,) for teacher in found]
    if choice != "agreement":
        raise DataError(f"data.choice must be 'random' or 'agreement', got '{choice}'")
    if len(found) < 2:
        raise DataError(f"teachers agree where there are two at least; data.teachers has {len(found)}")
    return [found]


def _check(recipe: Recipe, span: int) -> None:
    least = {"label_points": 1, "label_frames": 2, "label_size": 16}
    given = {"label_points": recipe.points, "label_frames": recipe.frames, "label_size": recipe.size}
    if recipe.clips is not None:
        least["label_clips"], given["label_clips"] = 1, recipe.clips
    for name, value in given.items():
        if value < least[name]:
            raise DataError(f"data.{name} must be at least {least[name]}, got {value}")
    if not 0 < recipe.within < float("inf"):
        raise DataError(f"data.within must be a distance in pixels above 0, got {recipe.within}")
    if span > recipe.frames:
        raise DataError(
            f"a training clip spans {span} frames, but labelled clips have {recipe.frames}: set data.label_frames to "
            f"{span} or more, or data.frames to fewer"
        )
