"""`trackpl test --benchmark NAME`: score a method on a benchmark, video by video.

Memory is bounded: one video is tracked while the next one is read, both at the benchmark's size. What comes of it is
written as `trackpl.results` says, a line a video, so that a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import yaml
from tqdm import tqdm

from trackpl import __version__, checkpoints
from trackpl.benchmarks import BENCHMARKS, Benchmark, Task, find, method_queries, read_task, score
from trackpl.errors import DataError, Error, UnreachableError, closest
from trackpl.method import Method
from trackpl.plugins import find as find_plugin
from trackpl.results import ROWS, SCHEMA, Lines, Row, alone, report, save, summarise
from trackpl.shards import Index, Sample, read_index
from trackpl.types import Tracks
from trackpl.usage import Parser, device_of


def run(args: list[str]) -> int:
    """Score a method as the command line says; return 0, or 1 if a video could not be read.

    Raises:
        Error: bad input, before anything is written.
    """
    given, options = _parse(args)
    benchmark, device = find(given.benchmark), device_of(given.device)
    index = read_index(_locate(benchmark, given.data))
    check_set(benchmark, index)
    method = checkpoints.load(given.model, given.checkpoint, device, **options)
    setup = describe(benchmark, index, method, given, options)
    out = given.out or Path("results") / benchmark.name / f"{given.model}-{setup['weights'][:8]}"
    wanted = index.samples[: given.limit]
    with alone(out):
        lines = Lines(out / ROWS, setup, given.overwrite)
        evaluate(benchmark, method, wanted, lines)
        result = summarise(benchmark, setup, lines.rows, [s.key for s in index.samples])
        save(result, out)
    print(report(benchmark, result, out), end="")
    return 1 if result["videos"]["skipped"] else 0


def _parse(args: list[str]) -> tuple[argparse.Namespace, dict[str, Any]]:
    width = max(map(len, BENCHMARKS))
    parser = Parser(
        "test --benchmark NAME",
        "Score a method on a benchmark, video by video; repeat the command to go on after an interruption.",
        usage="trackpl test --benchmark NAME --model NAME [--checkpoint FILE] [--data ADDRESS] [options]",
        epilog="benchmarks:\n"
        + "".join(f"  {b.name:<{width}}  {b.what}\n" for b in BENCHMARKS.values())
        + "\nan option of the method: --model.OPTION VALUE, as in `trackpl fit`",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--benchmark", metavar="NAME", nargs="?", const="", required=True, help="one of those below")
    add("--model", metavar="NAME", required=True, help="a method of `trackpl plugins`")
    add("--checkpoint", metavar="FILE", type=Path, help="its weights (default: those that ship with it)")
    add("--data", metavar="ADDRESS", help="shards of the benchmark's data set: index, folder or URL of the index")
    add("--out", metavar="DIR", type=Path, help="where results go (default: results/BENCHMARK/METHOD-WEIGHTS)")
    add("--device", metavar="NAME", default="auto", help="cpu, cuda, or auto: a GPU where there is one (default)")
    add("--limit", metavar="N", type=int, help="score the first N videos only")
    add("--input", metavar="HxW", type=_size, help="size of the frames that the method is shown (default: 256x256)")
    add("--threshold", metavar="P", type=float, help="visible above this probability (default: 0.5)")
    add("--overwrite", action="store_true", help="start anew where DIR holds a result of something else")
    known, unknown = parser.parse_known_args(args)
    options = _method_options(unknown, [f for a in parser._actions for f in a.option_strings])
    if known.limit is not None and known.limit < 1:
        raise Error(f"--limit {known.limit}: allowed is a whole number from 1 on")
    if known.threshold is not None and not 0 <= known.threshold < 1:
        raise Error(f"--threshold {known.threshold:g}: allowed is a probability of at least 0 and below 1")
    return known, options


def _size(text: str) -> tuple[int, int]:
    sides = [int(v) if v.isdigit() else 0 for v in text.split("x")]
    if len(sides) != 2 or not all(16 <= v <= 4096 for v in sides):
        raise argparse.ArgumentTypeError(f"'{text}' is no size; give height and width such as 384x512")
    return sides[0], sides[1]


def _method_options(words: list[str], flags: Sequence[str]) -> dict[str, Any]:
    """Read ``--model.KEY VALUE`` and ``--model.KEY=VALUE``; values are YAML, as in a config."""
    options: dict[str, Any] = {}
    rest = iter(words)
    for word in rest:
        flag, equals, text = word.partition("=")
        if not flag.startswith("--model."):
            raise Error(f"test --benchmark has no option '{flag}'; {closest(flag, flags)}")
        value = text if equals else next(rest, None)
        if value is None:
            raise Error(f"{flag} needs a value")
        try:
            options[flag.removeprefix("--model.")] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise Error(f"{flag} {value}: not a readable value") from None
    return options


def _locate(benchmark: Benchmark, address: str | None) -> str:
    """Return the address of the shards; the synthetic set is made where it is not there yet."""
    if address:
        return address
    if benchmark.data != "synthetic":
        make = f"trackpl data make {benchmark.data} SOURCE OUT"
        raise Error(f"--benchmark {benchmark.name} needs --data ADDRESS, the shards that `{make}` writes")
    from trackpl_prep.synthetic import default_set  # renders and writes; only who needs it loads it

    return str(default_set("val"))


def check_set(benchmark: Benchmark, index: Index) -> None:
    """Refuse shards of another data set than the benchmark's."""
    source = index.meta.get("source")
    if source != benchmark.data:
        raise DataError(
            f"{index.path} holds the data set '{source}', but --benchmark {benchmark.name} is of '{benchmark.data}': "
            f"make it with `trackpl data make {benchmark.data} SOURCE OUT`"
        )


# What is measured -------------------------------------------------------------------------------------------


def describe(
    benchmark: Benchmark, index: Index, method: Method, given: argparse.Namespace, options: dict[str, Any]
) -> dict[str, Any]:
    """Return all that the rows depend on, as JSON values."""
    plugin = find_plugin(given.model)
    made = {k: v for k, v in dict(method.hparams).items() if k not in ("optimizer", "lr_scheduler", "_class_path")}
    made = json.loads(json.dumps(made | options, default=str, sort_keys=True))
    device = method.device.type
    return {
        "schema": SCHEMA,
        "benchmark": benchmark.name,
        "protocol": benchmark.protocol,
        "input_size": list(given.input or benchmark.input_size),
        "threshold": benchmark.threshold if given.threshold is None else given.threshold,
        "method": given.model,
        "class": plugin.class_path,
        "options": made,
        "config": hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest(),
        "weights": weights_hash(method),
        "data": data_hash(index),
        "device": torch.cuda.get_device_name(method.device) if device == "cuda" else device,
        "versions": {
            "trackpl": __version__,
            plugin.package: plugin.version,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def weights_hash(method: Method) -> str:
    """Return the SHA-256 of a method's state: names, types, shapes and bytes, in the order of the names."""
    state = hashlib.sha256()
    for name, value in sorted(method.state_dict().items()):
        state.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        state.update(memoryview(data.numpy()))
    return state.hexdigest()


def data_hash(index: Index) -> str:
    """Return a SHA-256 of what a set holds, by the hashes in its index."""
    lines = [f"{s.key} {s.sha256 or f'{s.shard.sha256}@{s.offset}'}\n" for s in index.samples]
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


# The work ---------------------------------------------------------------------------------------------------


def evaluate(benchmark: Benchmark, method: Method, samples: Sequence[Sample], lines: Lines) -> None:
    """Score the videos that have no row yet, each after the other; one that cannot be read is named and left out.

    Raises:
        Error: the method or its device fails, or a server cannot be reached; the rows so far are kept.
    """
    size: tuple[int, int] = tuple(lines.setup["input_size"])
    done = {key for key, row in lines.rows.items() if "skipped" not in row}
    todo = [s for s in samples if s.key not in done]
    start = len(samples) - len(todo)
    points, seconds = 0, 0.0
    with tqdm(total=len(samples), initial=start, desc=benchmark.name, unit="video", dynamic_ncols=True) as bar:
        for sample, task in _read_ahead(benchmark, todo, size):
            if isinstance(task, DataError):
                tqdm.write(f"left out: {task}", file=sys.stderr)
                lines.add({"key": sample.key, "skipped": str(task)[:1000]})
            else:
                row = measure(benchmark, method, task, lines.setup["threshold"])
                lines.add({"key": sample.key} | row)
                points, seconds = points + row["queries"], seconds + row["seconds"]
                bar.set_postfix_str(f"{points / seconds:.4g} points/s" if seconds else "", refresh=False)
            bar.update()


def _read_ahead(
    benchmark: Benchmark, samples: Sequence[Sample], size: tuple[int, int]
) -> Iterator[tuple[Sample, Task | DataError]]:
    """Read each video while the one before it is tracked; one that is broken comes as its error."""
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(_read, benchmark, samples[0], size) if samples else None
        for i, sample in enumerate(samples):
            assert ahead is not None
            task = ahead.result()
            ahead = pool.submit(_read, benchmark, samples[i + 1], size) if i + 1 < len(samples) else None
            yield sample, task


def _read(benchmark: Benchmark, sample: Sample, size: tuple[int, int]) -> Task | DataError:
    try:
        return read_task(benchmark, sample, size)
    except UnreachableError:
        raise
    except DataError as error:
        return error


def measure(benchmark: Benchmark, method: Method, task: Task, threshold: float) -> Row:
    """Track and score one video; seconds are those of the method alone."""
    device = method.device
    queries, m = method_queries(benchmark, task).to(device), len(task.queries)
    clip = task.clip.to(device)
    torch.manual_seed(0)  # a run that goes on gives what an uninterrupted one would
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    try:
        with torch.no_grad():
            tracks = method.track(clip, queries).to("cpu") if m else _nothing(clip.frames)
    except torch.OutOfMemoryError:
        raise Error(f"video '{clip.name[0]}' ({clip.frames} frames, {m} points) does not fit into the GPU") from None
    seconds = time.perf_counter() - began  # results on the CPU: the GPU is done
    shapes = tuple(tracks.xy.shape), tuple(tracks.visible.shape)
    if shapes != ((1, clip.frames, m, 2), (1, clip.frames, m)):
        raise Error(f"the method gave tracks of shapes {shapes} for {m} points in {clip.frames} frames")
    figures = score(benchmark, task, tracks, threshold)
    return {
        "name": clip.name[0],
        "frames": clip.frames,
        "tracks": task.count,
        "queries": m,
        **{k: None if math.isnan(v) else v for k, v in figures.items()},
        "nan_predictions": int((~tracks.xy.isfinite()).any(-1).sum()),
        "seconds": round(seconds, 6),
        "threads": torch.get_num_threads(),
        "peak_memory": _peak_memory(),
        "peak_gpu_memory": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    }


def _nothing(frames: int) -> Tracks:
    return Tracks(torch.zeros(1, frames, 0, 2), torch.zeros(1, frames, 0))


def _peak_memory() -> int | None:
    """Return the most bytes that this process has held so far; Windows does not say."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
