"""`trackpl test --benchmark NAME`: score a method on a benchmark, video by video.

Memory is bounded: a method works on one video while the next one is read. What comes of it is written as
`trackpl.results` says, a line a video, so that a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import yaml
from tqdm import tqdm

from trackpl import __version__, checkpoints
from trackpl.benchmarks import BENCHMARKS, find
from trackpl.errors import DataError, Error, UnreachableError, closest
from trackpl.method import Method
from trackpl.plugins import find as find_plugin
from trackpl.protocols import Benchmark, Row, Task
from trackpl.results import ROWS, SCHEMA, Lines, alone, report, save, summarise
from trackpl.shards import Index, Sample, read_index
from trackpl.usage import Parser, device_of


def run(args: list[str]) -> int:
    """Score a method as the command line says; return 0, or 1 if a video could not be read.

    Raises:
        Error: bad input, before anything is written.
    """
    given, options = _parse(args)
    benchmark, device = find(given.benchmark), device_of(given.device)
    settings = benchmark.settings(given)
    index = read_index(_locate(benchmark, given.data))
    check_set(benchmark, index)
    method = checkpoints.load(given.model, given.checkpoint, device, **options)
    setup = describe(benchmark, index, method, given.model, settings, options)
    name = f"{given.model}-{setup['weights'][:8]}{_suffix(settings, options)}"
    out = given.out or Path("results") / benchmark.name / name
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
    size = "size of the frames that the method is shown (default: points 256x256, joints 320x320, others their own)"
    add("--input", metavar="HxW", type=_size, help=size)
    add("--threshold", metavar="P", type=float, help="of points: visible above this probability (default: 0.5)")
    jitter = "of flow: change the {} of second frames at random, by up to {} either way"
    add("--jitter-brightness", metavar="B", type=float, help=jitter.format("brightness", "this share"))
    add("--jitter-hue", metavar="H", type=float, help=jitter.format("hue", "this share of the colour circle"))
    add("--overwrite", action="store_true", help="start anew where DIR holds a result of something else")
    known, unknown = parser.parse_known_args(args)
    options = _method_options(unknown, [f for a in parser._actions for f in a.option_strings])
    if known.limit is not None and known.limit < 1:
        raise Error(f"--limit {known.limit}: allowed is a whole number from 1 on")
    if known.threshold is not None and not 0 <= known.threshold < 1:
        raise Error(f"--threshold {known.threshold:g}: allowed is a probability of at least 0 and below 1")
    for flag, most in (("brightness", 1.0), ("hue", 0.5)):
        value = getattr(known, f"jitter_{flag}")
        if value is not None and not 0 <= value <= most:
            raise Error(f"--jitter-{flag} {value:g}: allowed is 0 to {most:g}")
    return known, options


def _size(text: str) -> tuple[int, int]:
    sides = [int(v) if v.isdigit() else 0 for v in text.split("x")]
    if len(sides) != 2 or not all(16 <= v <= 4096 for v in sides):
        raise argparse.ArgumentTypeError(f"'{text}' is no size; give height and width such as 384x512")
    return sides[0], sides[1]


def _suffix(settings: Mapping[str, Any], options: Mapping[str, Any]) -> str:
    """Tell the folder of a run with jitter or with options of the method from those of others."""
    jitter = settings.get("jitter", {})
    parts = ["jitter" + "-".join(f"{v:g}" for v in jitter.values())] if any(jitter.values()) else []
    parts += [f"{name}={value}" for name, value in sorted(options.items())]
    return "".join("-" + re.sub(r"[^\w.=-]+", "_", part)[:40] for part in parts)


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
        raise Error(f"--benchmark {benchmark.name} needs --data ADDRESS, the shards that {_making(benchmark)} writes")
    from trackpl_prep.synthetic import default_set  # renders and writes; only who needs it loads it

    return str(default_set("val"))


def _making(benchmark: Benchmark) -> str:
    flags = "".join(f" {flag} {value}" for flag, value in benchmark.made.items())
    return f"`trackpl data make {benchmark.data} SOURCE OUT{flags}`"


def check_set(benchmark: Benchmark, index: Index) -> None:
    """Refuse shards of another data set than the benchmark's."""
    source = index.meta.get("source")
    if source != benchmark.data:
        raise DataError(
            f"{index.path} holds the data set '{source}', but --benchmark {benchmark.name} is of '{benchmark.data}': "
            f"make it with {_making(benchmark)}"
        )
    options = index.meta.get("options")
    chosen = {str(v) for v in options.values()} if isinstance(options, dict) else None
    missing = [f"{k} {v}" for k, v in benchmark.made.items() if chosen is not None and v not in chosen]
    if missing:
        raise DataError(
            f"{index.path} was not made with {' '.join(missing)}, but --benchmark {benchmark.name} is of those: "
            f"make it with {_making(benchmark)}"
        )


# What is measured -------------------------------------------------------------------------------------------


def describe(
    benchmark: Benchmark, index: Index, method: Method, name: str, settings: Mapping[str, Any], options: dict[str, Any]
) -> dict[str, Any]:
    """Return all that the rows depend on, as JSON values."""
    plugin = find_plugin(name)
    made = {k: v for k, v in dict(method.hparams).items() if k not in ("optimizer", "lr_scheduler", "_class_path")}
    made = json.loads(json.dumps(made | options, default=str, sort_keys=True))
    device = method.device.type
    return {
        "schema": SCHEMA,
        "benchmark": benchmark.name,
        "protocol": benchmark.protocol,
        **settings,
        **({"way": way} if (way := benchmark.way(method)) else {}),
        "method": name,
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
    done = {key for key, row in lines.rows.items() if "skipped" not in row}
    todo = [s for s in samples if s.key not in done]
    start = len(samples) - len(todo)
    (counted, unit), count, seconds = benchmark.pace, 0, 0.0
    with tqdm(total=len(samples), initial=start, desc=benchmark.name, unit="video", dynamic_ncols=True) as bar:
        for sample, task in _read_ahead(benchmark, todo, lines.setup):
            if isinstance(task, DataError):
                tqdm.write(f"left out: {task}", file=sys.stderr)
                lines.add({"key": sample.key, "skipped": str(task)[:1000]})
            else:
                row = measure(benchmark, method, task, lines.setup)
                lines.add({"key": sample.key} | row)
                count, seconds = count + row[counted], seconds + row["seconds"]
                bar.set_postfix_str(f"{count / seconds:.4g} {unit}/s" if seconds else "", refresh=False)
            bar.update()


def _read_ahead(
    benchmark: Benchmark, samples: Sequence[Sample], setup: Mapping[str, Any]
) -> Iterator[tuple[Sample, Task | DataError]]:
    """Read each video while the method works on the one before it; one that is broken comes as its error."""
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(_read, benchmark, samples[0], setup) if samples else None
        for i, sample in enumerate(samples):
            assert ahead is not None
            task = ahead.result()
            ahead = pool.submit(_read, benchmark, samples[i + 1], setup) if i + 1 < len(samples) else None
            yield sample, task


def _read(benchmark: Benchmark, sample: Sample, setup: Mapping[str, Any]) -> Task | DataError:
    try:
        return benchmark.read(sample, setup)
    except UnreachableError:
        raise
    except DataError as error:
        return error


def measure(benchmark: Benchmark, method: Method, task: Task, setup: Mapping[str, Any]) -> Row:
    """Ask a method about one video and score it; seconds are those of the method alone."""
    device, clip = method.device, task.clip
    torch.manual_seed(0)  # a run that goes on gives what an uninterrupted one would
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    try:
        with torch.no_grad():
            prediction = benchmark.predict(method, task, setup)
    except torch.OutOfMemoryError:
        h, w = clip.size
        raise Error(f"video '{clip.name[0]}' ({clip.frames} frames of {h}x{w}) does not fit into the GPU") from None
    seconds = time.perf_counter() - began  # results on the CPU: the GPU is done
    row = benchmark.score(task, prediction, setup)
    undefined = {k: None for k in benchmark.metrics if math.isnan(row[k])}
    return {
        "name": clip.name[0],
        "frames": clip.frames,
        **row,
        **undefined,
        "seconds": round(seconds, 6),
        "threads": torch.get_num_threads(),
        "peak_memory": _peak_memory(),
        "peak_gpu_memory": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    }


def _peak_memory() -> int | None:
    """Return the most bytes that this process has held so far; Windows does not say."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
