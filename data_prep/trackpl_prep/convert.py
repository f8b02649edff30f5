"""Run a converter: over processes and machines, resumably, with the same bytes each time.

The items of a data set are cut into shards in their order. Each shard is one piece of work: written beside, described
in a small JSON file next to it, and never touched again. All of it happens in ``OUT/<name>.partial``; when the last
shard is there, whoever finished it moves everything into place and writes the index. A kill at any moment loses the
shards that were being written, nothing else.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock
from tqdm import tqdm

from trackpl.archives import write_tar
from trackpl.errors import DataError, Error
from trackpl.parsing import read_json
from trackpl.shards import check_name, finish_set, read_index, shard_name
from trackpl_prep.dataset import Dataset, Item, Samples, make_options

_MAX_ENTRY = 2**28  # bytes of the description of one shard


@dataclass(frozen=True)
class Job:
    """One shard to make."""

    dataset: Dataset
    source: Path
    options: Namespace
    items: tuple[Item, ...]
    partial: Path
    name: str
    number: int
    recipe: str
    max_broken: int

    @property
    def entry(self) -> Path:
        """The file that says that the shard is finished."""
        return self.partial / f"{self.number:06d}.json"


@dataclass
class Broken:
    """Items that could not be read."""

    limit: int
    messages: list[str] = field(default_factory=list)

    def add(self, error: Error) -> None:
        """Remember one more; raises it where it is one too many."""
        self.messages.append(str(error).splitlines()[0][:500])
        if len(self.messages) > self.limit:
            allowed = f" ({len(self.messages)} broken items; --max-broken allows {self.limit})" if self.limit else ""
            hint = "" if self.limit else "; --max-broken N leaves up to N such items out and lists them in the index"
            raise DataError(f"{error}{allowed}{hint}")


def convert(
    dataset: Dataset,
    source: Path | str,
    out: Path | str,
    options: Namespace | None = None,
    *,
    workers: int = 1,
    part: tuple[int, int] = (1, 1),
    name: str | None = None,
    per_shard: int | None = None,
    overwrite: bool = False,
    max_broken: int = 0,
    ray: bool = False,
    quiet: bool = False,
) -> Path | None:
    """Make a data set into shards in the folder `out`; returns the index, or none while other parts are missing.

    The same source and options give the same bytes, whatever `workers`, `part` and interruptions. Calling it again
    after a kill goes on where it was; a set that is there and was made from the same is kept.

    Args:
        dataset: what to convert.
        source: the folder as its publisher lays it out.
        out: folder for the shards.
        options: of this data set (`make_options`); none: the defaults.
        workers: processes.
        part: (i, n): make only every n-th shard, beginning with the i-th; for n machines with a common `out`.
        name: of the set; none: that of the data set and its variant.
        per_shard: items a shard; none: what suits the data set.
        overwrite: replace another set of that name, when the new one is complete.
        max_broken: items that may be left out because they cannot be read; the index lists them.
        ray: make the shards as a Ray Data job, on the cluster that `ray.init` finds.
        quiet: show no progress.

    Raises:
        DataError: a wrong folder, a broken item, another set in the way, arguments out of range.
    """
    source, out = Path(source), Path(out)
    options = make_options(dataset) if options is None else options
    i, n = part
    if workers < 1 or not 1 <= i <= n or max_broken < 0 or (per_shard is not None and per_shard < 1):
        raise DataError(f"workers must be at least 1 and the part i/n with 1 <= i <= n, got {workers} and {i}/{n}")
    name = name or _name(dataset, options)
    check_name(name)
    if dataset.needs_source and not source.exists():
        raise DataError(f"{source} does not exist; it must be the folder (or file) of '{dataset.name}' to convert")
    items = dataset.items(source, options)
    if not items:
        raise DataError(f"{source} holds nothing of '{dataset.name}' to convert")
    recipe = _recipe(dataset, options, items, per_shard or dataset.per_shard)
    index = out / f"{name}.index.json"
    if index.exists() and not overwrite:
        if read_index(index).meta.get("recipe") == recipe:
            return index
        raise DataError(f"{index} is another set; choose another folder or name, or overwrite it")
    partial = out / f"{name}.partial"
    jobs = _jobs(dataset, source, options, items, partial, name, recipe, per_shard or dataset.per_shard, max_broken)
    try:
        _prepare(partial, recipe, len(jobs), dataset, options, name)
        ours = jobs[i - 1 :: n]
        mine = [job for job in ours if not job.entry.exists()]
        total = sum(len(job.items) for job in ours)
        done = total - sum(len(job.items) for job in mine)
        with tqdm(total=total, initial=done, desc=f"making {name}", unit="clip", disable=quiet, smoothing=0.05) as bar:
            for count in _on_ray(mine) if ray else _in_processes(mine, workers) if workers > 1 else _here(mine, bar):
                bar.update(count)
        return merge(partial, overwrite, max_broken)
    except Error:
        if n == 1 and not any(job.entry.exists() for job in jobs):  # nothing to go on from
            shutil.rmtree(partial, ignore_errors=True)
            with suppress(OSError):
                out.rmdir()  # only where it is empty
        raise
    except OSError as error:
        raise DataError(f"cannot write the set to {out}: {error.strerror or error}") from None


def _name(dataset: Dataset, options: Namespace) -> str:
    """Name a set after its data set and the options that make it a variant: their values, or the name of a flag."""
    values = [(option, getattr(options, option, None)) for option in dataset.variants]
    parts = [option if value is True else str(value) for option, value in values if value]
    return re.sub(r"[^A-Za-z0-9_]+", "_", "_".join([dataset.name, *parts]))


def _recipe(dataset: Dataset, options: Namespace, items: Sequence[Item], per_shard: int) -> str:
    """Hash everything that the bytes of a set follow from."""
    facts = {k: str(v) for k, v in sorted(vars(options).items())}
    text = json.dumps([dataset.name, dataset.version, facts, per_shard, items], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _jobs(
    dataset: Dataset,
    source: Path,
    options: Namespace,
    items: Sequence[Item],
    partial: Path,
    name: str,
    recipe: str,
    per_shard: int,
    max_broken: int,
) -> list[Job]:
    cuts = range(0, len(items), per_shard)
    parts = [tuple(items[first : first + per_shard]) for first in cuts]
    return [Job(dataset, source, options, p, partial, name, k, recipe, max_broken) for k, p in enumerate(parts)]


def _prepare(partial: Path, recipe: str, shards: int, dataset: Dataset, options: Namespace, name: str) -> None:
    """Make the folder of unfinished work, or check that what lies there is of the same recipe."""
    facts = {k: v for k, v in sorted(vars(options).items()) if not isinstance(v, Path)}
    meta: dict[str, Any] = {"source": dataset.name, "version": dataset.version, "licence": dataset.licence}
    meta |= {"options": facts, "recipe": recipe}
    plan = {"recipe": recipe, "shards": shards, "name": name, "meta": meta}
    path = partial / "plan.json"
    partial.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        _write(path, plan)
    elif _read(path) != plan:
        raise DataError(
            f"{partial} holds unfinished work of another conversion (other options, another source); "
            "finish that one, or remove the folder"
        )


def make_shard(job: Job, tick: Callable[[], Any] = lambda: None) -> int:
    """Write one shard and its description; returns the number of its items. Calls `tick` after each."""
    broken = Broken(job.max_broken)
    beside = job.partial / f".{job.number:06d}.{os.getpid()}.tmp"
    try:
        try:
            entry = write_tar(beside, _samples(job, broken, tick))
        except DataError as error:
            if not str(error).endswith("shard has no samples"):
                raise
            entry = None  # every item was left out
        if entry is not None:
            entry["file"] = shard_name(job.name, job.number)
            os.replace(beside, job.partial / entry["file"])
        _write(job.entry, {"recipe": job.recipe, "shard": entry, "broken": broken.messages})
        return len(job.items)
    finally:
        beside.unlink(missing_ok=True)


def _samples(job: Job, broken: Broken, tick: Callable[[], Any]) -> Samples:
    for item in job.items:
        try:
            # A list: of an item that breaks in its middle nothing stays.
            yield from list(job.dataset.read(job.source, item, job.options))
        except Error as error:
            broken.add(error)
        tick()


def _write(path: Path, content: Any) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    beside.write_text(json.dumps(content, sort_keys=True, allow_nan=False))
    os.replace(beside, path)


def _read(path: Path) -> Any:
    try:
        return read_json(path.read_bytes(), _MAX_ENTRY)
    except ValueError as error:
        raise DataError(f"{path} {error}; remove it to make that shard again") from None


# Running ----------------------------------------------------------------------------------------------------


def _here(jobs: Sequence[Job], bar: tqdm) -> Iterator[int]:
    """Make the shards in this process."""
    for job in jobs:
        make_shard(job, bar.update)
        yield 0


def _in_processes(jobs: Sequence[Job], workers: int) -> Iterator[int]:
    """Make the shards in processes; yields how many more items are done, every now and then."""
    # Spawned, not forked: a forked child of a process that has used torch's threads may hang.
    context = multiprocessing.get_context("spawn")
    counter, seen = context.Value("q", 0), 0
    pool = ProcessPoolExecutor(min(workers, max(1, len(jobs))), context, _start_worker, (counter,))
    try:
        waiting = {pool.submit(_make_and_count, job) for job in jobs}
        while waiting:
            done, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()
            yield counter.value - seen
            seen = counter.value
    except BrokenProcessPool:
        raise DataError("a worker was killed, perhaps for want of memory; try fewer workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


_counter: Any = None  # of the items that all workers together have done


def _start_worker(counter: Any) -> None:
    """One thread a process; Ctrl-C is the parent's to handle."""
    global _counter
    import torch

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _counter = counter


def _make_and_count(job: Job) -> int:
    def tick() -> None:
        with _counter.get_lock():
            _counter.value += 1

    return make_shard(job, tick)


def _on_ray(jobs: Sequence[Job]) -> Iterator[int]:
    """Make the shards as a Ray Data job, one task a shard; `out` must be a folder that all nodes share."""
    try:
        import ray
        import ray.data
    except ImportError:
        raise DataError('Ray is not installed; pip install "trackpl[ray]", or use --workers or --part') from None
    ray.init(ignore_reinit_error=True, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    if not jobs:
        return
    data = ray.data.from_items([{"job": k} for k in range(len(jobs))], override_num_blocks=len(jobs))
    everything = ray.put(list(jobs))

    def run(row: dict[str, int]) -> dict[str, Any]:
        try:
            return {"items": make_shard(ray.get(everything)[row["job"]]), "error": ""}
        except Error as error:
            return {"items": 0, "error": str(error)}

    for row in data.map(run).iter_rows():
        if row["error"]:
            raise DataError(row["error"])
        yield int(row["items"])


# Merging ----------------------------------------------------------------------------------------------------


def merge(partial: Path, overwrite: bool = False, max_broken: int = 0) -> Path | None:
    """Make a set of the finished shards in a ``<name>.partial`` folder; returns none while some are missing.

    Raises:
        DataError: the folder is none of unfinished work, its parts were made from different things, or no item could be
            read.
    """
    path = partial / "plan.json"
    if not path.exists():
        raise DataError(f"{partial} is no folder of unfinished work: it has no plan.json")
    with FileLock(partial.with_name(f".{partial.name}.lock")):
        if not path.exists():  # another part has just done it
            return next(iter(partial.parent.glob(f"{partial.name.removesuffix('.partial')}.index.json")), None)
        plan = _read(path)
        entries = [partial / f"{k:06d}.json" for k in range(plan["shards"])]
        if not all(e.exists() for e in entries):
            return None
        found = [_read(e) for e in entries]
        if any(e["recipe"] != plan["recipe"] for e in found):
            raise DataError(f"the parts in {partial} were made from different sources or with different options")
        shards = [e["shard"] for e in found if e["shard"] is not None]
        broken = [message for e in found for message in e["broken"]]
        if len(broken) > max_broken:
            raise DataError(f"{len(broken)} items could not be read, --max-broken allows {max_broken}: {broken[0]}")
        if not shards:
            raise DataError(f"none of the items could be read; the first: {broken[0]}")
        meta = plan["meta"] | ({"broken": broken} if broken else {})
        index = finish_set(partial.parent, plan["name"], shards, partial, meta, overwrite)
        shutil.rmtree(partial)
        return index


def missing(partial: Path) -> list[int]:
    """Return the numbers of the shards that are not finished yet."""
    plan = _read(partial / "plan.json")
    return [k for k in range(plan["shards"]) if not (partial / f"{k:06d}.json").exists()]
