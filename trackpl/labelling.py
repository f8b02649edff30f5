"""Unlabelled videos to shards with the tracks of teachers, in the cache.

Every set is found by a hash of all that its bytes follow from: the videos, the teachers and their weights, how clips
are cut and points drawn. What is there is never made again; what was interrupted goes on at its last finished shard.
"""

from __future__ import annotations

import hashlib
import json
import logging
import zlib
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from lightning.pytorch.utilities.seed import isolate_rng

from trackpl.addresses import is_remote
from trackpl.augment import resize
from trackpl.cache import cache_folder
from trackpl.corners import Sampling, sample_queries
from trackpl.encoding import encode
from trackpl.errors import DataError, UnreachableError
from trackpl.method import Method
from trackpl.order import random
from trackpl.shards import Index, Sample, decode, open_members, read_index
from trackpl.teachers import Teacher, label
from trackpl.types import Clip

VERSION = 1
"""Another number when the same videos and teachers make other labels than before."""

MAX_BROKEN = 0.01
"""Share of the samples of a set that may be broken; above it labelling stops."""

_PACKED = 64  # frames, about, of a sample of one's own videos
_PER_SHARD = 8  # clips: what a kill loses at most

log = logging.getLogger("trackpl.labelling")


@dataclass(frozen=True)
class Recipe:
    """How clips are cut and their points drawn.

    Args:
        frames: of a clip; a shorter video is a clip of its own.
        points: of a clip.
        size: its longer side at most, in pixels.
        queries: how points are drawn.
        within: distance up to which several teachers agree, in pixels of a frame of 256 x 256.
        clips: how many to label at most, spread over the videos; none: all.
        seed: from which the points follow.
        bf16: teachers compute in bfloat16.
    """

    frames: int = 24
    points: int = 256
    size: int = 256
    queries: Sampling = "corners"
    within: float = 4.0
    clips: int | None = None
    seed: int = 0
    bf16: bool = True

    @property
    def fewest(self) -> int:
        """Number of points with which a clip is worth keeping."""
        return max(1, self.points // 2)


# Videos -----------------------------------------------------------------------------------------------------


def open_videos(address: str, recipe: Recipe, max_broken: int = 0, quiet: bool = False) -> Index:
    """Return the index of unlabelled videos; a folder of video files or frames is packed into the cache first.

    Args:
        address: of an index, of the folder of a set of shards, or of a folder of videos.
        recipe: to which clips will be cut.
        max_broken: videos of a folder that may be left out.
        quiet: show no progress.

    Raises:
        DataError: there are no videos, or one is broken.
    """
    folder = Path(address).expanduser()
    if is_remote(address) or address.endswith(".json") or (folder.is_dir() and any(folder.glob("*.index.json"))):
        return read_index(address)
    if not folder.exists():
        raise DataError(f"no videos at {folder}; data.videos is a folder of videos or frames, or an index of shards")
    return read_index(_pack(folder, recipe, max_broken, quiet))


def _pack(folder: Path, recipe: Recipe, max_broken: int, quiet: bool) -> Path:
    """Make shards of a folder of videos as `trackpl data pack` does; changed files make another set."""
    from trackpl_prep import videos  # only who has a folder of videos needs it
    from trackpl_prep.convert import convert
    from trackpl_prep.dataset import make_options

    segment = recipe.frames * max(1, _PACKED // recipe.frames)
    options = make_options(videos.DATASET, segment=segment, short_side=max(16, recipe.size))
    if folder.is_dir():
        listed = [(p, size, (folder / p).stat().st_mtime_ns) for p, size in sorted(videos.find(folder))]
    else:
        listed = []  # then it is refused below
    out = cache_folder() / "videos" / _hash([str(folder.resolve()), listed, segment, recipe.size, max_broken])
    if (out / "videos.index.json").exists():
        return out
    with _locked(out):
        try:
            convert(videos.DATASET, folder, out, options, max_broken=max_broken, quiet=quiet)
        except DataError as error:
            raise DataError(str(error).replace("--max-broken", "--data.max_broken")) from None
    for message in read_index(out).meta.get("broken", []):
        log.warning("left out: %s", message)
    return out


def cut(samples: Sequence[Sample], recipe: Recipe) -> list[tuple[int, int]]:
    """Cut videos into clips: (sample, first frame) of each.

    The clips of a video are spread over its frames; a rest of half a clip and more makes one more clip, which overlaps.
    """
    clips = []
    for i, sample in enumerate(samples):
        room = max(0, sample.frames - recipe.frames)
        count = 1 + int(room / recipe.frames + 0.5)
        clips += [(i, round(k * room / max(1, count - 1))) for k in range(count)]
    if recipe.clips is None or recipe.clips >= len(clips):
        return clips
    return [clips[k * len(clips) // recipe.clips] for k in range(recipe.clips)]


# Labels -----------------------------------------------------------------------------------------------------


def labelled(
    videos: Index, teachers: Sequence[Teacher], recipe: Recipe, device: torch.device, quiet: bool = False
) -> Path:
    """Return the index of the videos with labels on which these teachers agree, made on first use.

    Raises:
        PluginError: a teacher that is not installed.
        DataError: a teacher without weights, too many broken videos, no clip with enough points.
    """
    facts: dict[str, Any] = {"version": VERSION, "videos": [s.sha256 for s in videos.shards]}
    facts |= {"teachers": [t.facts() for t in teachers], **asdict(recipe)}
    if len(teachers) == 1:
        del facts["within"]
    out = cache_folder() / "pseudo" / _hash(facts)
    index = out / f"{set_name(teachers)}.index.json"
    if not index.exists():
        with _locked(out):
            _make(out, videos, teachers, recipe, device, quiet)
    return index


def set_name(teachers: Sequence[Teacher]) -> str:
    """Name a set of labels after its teachers."""
    return f"labels_{'-'.join(t.name for t in teachers)[:60]}"


def _make(
    out: Path, videos: Index, teachers: Sequence[Teacher], recipe: Recipe, device: torch.device, quiet: bool
) -> None:
    """Label all clips; what cannot be labelled is left out, named and counted."""
    from trackpl_prep.convert import convert
    from trackpl_prep.dataset import Dataset

    clips = cut(videos.samples, recipe)
    # Making the methods draws numbers: without this a training with labels from the cache would be another one.
    with isolate_rng(device.type == "cuda"):
        labeller = Labeller(videos, teachers, recipe, device)
        dataset = Dataset(
            name=set_name(teachers),
            about="tracks of teachers",
            licence=str(videos.meta.get("licence", "")),
            where="",
            layout="",
            items=lambda source, options: list(clips),
            read=lambda source, item, options: labeller.read(*map(int, item)),
            per_shard=_PER_SHARD,
            needs_source=False,
        )
        try:
            convert(dataset, "", out, Namespace(), name=dataset.name, max_broken=len(clips), quiet=quiet)
        except _Stop as stop:
            raise stop.error from None
    broken = read_index(out).meta.get("broken", [])
    if broken:
        log.warning("%d of %d clips are left out; the first: %s", len(broken), len(clips), broken[0])
    if device.type == "cuda":
        del labeller
        torch.cuda.empty_cache()


class _Stop(Exception):
    """Ends labelling; not an `Error`, which would only leave out one clip."""

    def __init__(self, error: DataError) -> None:
        super().__init__(str(error))
        self.error = error


class Labeller:
    """Labels clips one by one.

    Args:
        videos: to take them from.
        teachers: whose tracks to join.
        recipe: of the clips.
        device: where the teachers compute.
    """

    def __init__(self, videos: Index, teachers: Sequence[Teacher], recipe: Recipe, device: torch.device) -> None:
        self.videos, self.recipe, self.device = videos, recipe, device
        self.methods: list[Method] = [t.load(device) for t in teachers]
        self.thresholds = [t.threshold for t in teachers]
        self.broken: set[str] = set()  # keys of samples that cannot be read

    def read(self, number: int, start: int) -> Iterator[tuple[str, dict[str, bytes]]]:
        """Yield the labelled clip that begins at frame `start` of a sample, as members of a shard.

        Raises:
            DataError: the clip is broken, or has too few points.
        """
        sample, recipe = self.videos.samples[number], self.recipe
        clip = self._clip(sample, start)
        video = clip.video[0].to(self.device)
        chance = random(recipe.seed, zlib.crc32(sample.key.encode()), start)
        queries = sample_queries(video, recipe.points, recipe.queries, chance)
        if len(queries) < recipe.fewest:
            raise DataError(
                f"sample '{sample.key}' from frame {start} on has {len(queries)} corners, at least {recipe.fewest} are "
                "needed; ask for fewer points, for larger clips, or for queries: uniform"
            )
        labels = label(self.methods, self.thresholds, video, queries, within=recipe.within, bf16=recipe.bf16)
        out = Clip(
            video=clip.video,
            tracks=labels.tracks[None],
            visible=labels.visible[None],
            valid=labels.valid[None],
            queries=queries[None].cpu(),
            name=(f"{clip.name[0]}@{start}",),
            fps=clip.fps,
        )
        source = {"sample": sample.key, "first_frame": start}
        yield f"{number:07d}-{start:06d}", encode(out, licence=str(self.videos.meta.get("licence", "")), source=source)

    def _clip(self, sample: Sample, start: int) -> Clip:
        """Decode and shrink the frames of a clip."""
        frames = range(start, min(start + self.recipe.frames, sample.frames))
        try:
            with open_members(sample, ["video"]) as members:
                clip = decode(members, frames, ["video"], sample.key)
        except UnreachableError as error:
            raise _Stop(error) from None
        except DataError as error:
            self.broken.add(sample.key)
            count, total = len(self.broken), len(self.videos.samples)
            if count > MAX_BROKEN * total:
                more = f"{count} of {total} samples are broken, more than {MAX_BROKEN:.0%}; the last: {error}"
                raise _Stop(DataError(more)) from None
            raise
        h, w = clip.size
        factor = min(1.0, self.recipe.size / max(h, w))
        return resize(clip, (max(1, round(h * factor)), max(1, round(w * factor))))


def _hash(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]


def _locked(out: Path) -> FileLock:
    """Lock a folder of the cache, so that one process alone makes what goes into it."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = error.strerror or error
        why = error.strerror or error
        raise DataError(f"cannot write to {out.parent}: {why}; set TRACKPL_CACHE to a folder that you own") from None
    return FileLock(f"{out}.lock")
