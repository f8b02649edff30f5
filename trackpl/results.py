"""The files of a benchmark's result, its summary and its table.

A result folder holds ``videos.jsonl``, whose first line says what is measured (benchmark, weights, data, ...) and to
which each video adds a line as soon as it is scored, and ``result.json``, which follows from those lines alone. A run
that was stopped goes on after the last whole line; one of other weights or other data is refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock

from trackpl.benchmarks import BENCHMARKS
from trackpl.errors import DataError, Error
from trackpl.parsing import number as parse_number
from trackpl.parsing import read_json
from trackpl.protocols import Benchmark, Row, aggregate
from trackpl.writing import replacing

ROWS, RESULT = "videos.jsonl", "result.json"
SCHEMA = 1
_MAX_BYTES = 2**28  # of a result
_MEASURED = ("frames", "queries", "nan_predictions", "seconds", "peak_memory", "peak_gpu_memory")


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Make a result folder and hold it; raises `Error` where another process does, or where it cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder / ".lock", timeout=0):
            yield
    except filelock.Timeout:
        raise Error(f"another process is writing to {folder}; choose another --out") from None
    except (FileExistsError, PermissionError) as error:
        raise Error(f"cannot write to {folder} ({error.strerror}); choose another --out") from None


class Lines:
    """The file of rows: what is being measured in its first line, then a line a video.

    Args:
        path: of the file; one that is there already is gone on with.
        setup: the first line.
        overwrite: start anew where the file is of another setup.

    Raises:
        Error: the file is of another setup, or no such file.
    """

    def __init__(self, path: Path, setup: dict[str, Any], overwrite: bool = False) -> None:
        self.path, self.setup = path, setup
        self.rows: dict[str, Row] = {}
        """By key, the latest of each; with "skipped" where the video could not be read."""
        begun = False
        if path.exists():
            try:
                begun = self._read()
            except Error:
                if not overwrite:
                    raise
        if not begun:
            self.rows = {}
            path.unlink(missing_ok=True)
            self._append(setup)

    def add(self, row: Row) -> None:
        """Write a row to the disk."""
        self.rows[row["key"]] = row
        self._append(row)

    def _append(self, line: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")

    def _read(self) -> bool:
        """Read what is there; say whether there is anything."""
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]  # a killed process may leave half a line
        number = 0
        try:
            for number, line in enumerate(whole.splitlines(), 1):
                content = read_json(line)
                if number == 1:
                    self._check(content)
                else:
                    check_row(content, self.setup["protocol"]["metrics"])
                    self.rows[content["key"]] = content
        except ValueError as error:
            raise Error(f"{self.path}, line {number} {error}; add --overwrite to start anew") from None
        if len(whole) < len(data):
            with self.path.open("r+b") as file:
                file.truncate(len(whole))
        return number > 0

    def _check(self, found: Any) -> None:
        if not isinstance(found, dict):
            raise ValueError("does not say what was measured")
        other = [k for k in {**self.setup, **found} if found.get(k) != self.setup.get(k)]
        if other:
            was = ", ".join(f"{k} {_short(found.get(k))} instead of {_short(self.setup.get(k))}" for k in other[:3])
            raise Error(
                f"{self.path.parent} holds a result of something else ({was}): "
                "choose another --out, or add --overwrite to start anew"
            )


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return f"{text[:8]}..." if len(text) == 64 else text[:60]


def check_row(row: Any, metrics: Sequence[str]) -> None:
    """Raise `ValueError` if something is not a row: a key, and either why it was left out or what was measured."""
    if not isinstance(row, dict) or not isinstance(row.get("key"), str):
        raise ValueError("has no 'key'")
    if "skipped" in row:
        return
    if missing := {*metrics, *_MEASURED} - row.keys():
        raise ValueError(f"has no '{min(missing)}'")
    for name in metrics:
        if row[name] is not None:
            parse_number(row[name], f"'{name}' of {row['key'][:72]}")
    for more in ("parts", "weights"):
        _check_more(row, more)


def _check_more(row: Row, more: str) -> None:
    """Raise `ValueError` if the parts or weights of a row are not numbers, or lists of them, by figure."""
    values = row.get(more, {})
    if not isinstance(values, dict):
        raise ValueError(f"has '{more}' that are not by figure")
    for name, value in values.items():
        for one in value if isinstance(value, list) else [value]:
            if one is not None:
                parse_number(one, f"'{more}' of '{name[:72]}' of {row['key'][:72]}")


# The summary ------------------------------------------------------------------------------------------------


def summarise(
    benchmark: Benchmark, setup: Mapping[str, Any], rows: Mapping[str, Row], keys: Sequence[str]
) -> dict[str, Any]:
    """Make the content of ``result.json`` of the rows.

    Args:
        benchmark: what was measured.
        setup: the first line of the rows' file.
        rows: by key.
        keys: of all videos of the data set, in its order.

    Raises:
        DataError: no video could be scored.
    """
    found = [rows[key] for key in keys if key in rows]
    scored = [row for row in found if "skipped" not in row]
    skipped = [row for row in found if "skipped" in row]
    if not scored:
        why = f"; the first: {skipped[0]['skipped']}" if skipped else ""
        raise DataError(f"none of the {len(keys)} videos of '{benchmark.name}' could be scored{why}")
    seconds = sum(row["seconds"] for row in scored)
    queries = sum(row["queries"] for row in scored)
    counted, unit = benchmark.pace
    return {
        **setup,
        "summary": aggregate(scored, benchmark.metrics),
        "undefined": {name: sum(row[name] is None for row in scored) for name in benchmark.metrics},
        "nan_predictions": sum(row["nan_predictions"] for row in scored),
        "videos": {
            "expected": benchmark.videos,
            "found": len(keys),
            "scored": len(scored),
            "skipped": len(skipped),
            "complete": len(scored) == len(keys) == benchmark.videos and benchmark.asks in (None, queries),
        },
        "frames": sum(row["frames"] for row in scored),
        "queries": queries,
        "seconds": round(seconds, 6),
        f"{unit}_per_second": sum(row[counted] for row in scored) / seconds if seconds else None,
        "peak_memory": max(row["peak_memory"] or 0 for row in scored) or None,
        "peak_gpu_memory": max(row["peak_gpu_memory"] or 0 for row in scored) or None,
        "rows": scored,
        "skipped": skipped,
    }


def save(result: Mapping[str, Any], folder: Path) -> None:
    """Write ``result.json`` whole or not at all."""
    with replacing(folder / RESULT) as part:
        part.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def read_result(path: Path) -> dict[str, Any]:
    """Read a result, by its file or its folder.

    Raises:
        DataError: no such file, or not a result.
    """
    file = path / RESULT if path.is_dir() else path
    try:
        if file.stat().st_size > _MAX_BYTES:
            raise ValueError(f"is larger than {_MAX_BYTES} bytes")
        result = read_json(file.read_bytes(), _MAX_BYTES)
        if not isinstance(result, dict) or result.get("schema") != SCHEMA:
            raise ValueError(f"has not the schema {SCHEMA}")
        for key, kind in (("benchmark", str), ("protocol", dict), ("method", str), ("data", str), ("rows", list)):
            if not isinstance(result.get(key), kind):
                raise ValueError(f"has no '{key}'")
        if result["benchmark"] not in BENCHMARKS:
            raise ValueError(f"is of an unknown benchmark, '{result['benchmark'][:72]}'")
        headline, metrics = BENCHMARKS[result["benchmark"]].headline, result["protocol"].get("metrics")
        if not isinstance(metrics, list) or not set(headline) <= {str(m) for m in metrics}:
            raise ValueError(f"has not the metrics {', '.join(headline)}")
        for row in result["rows"]:
            check_row(row, metrics)
    except OSError as error:
        raise DataError(f"no result at {path}: {error.strerror}; give a {RESULT} or its folder") from None
    except ValueError as error:
        raise DataError(f"{file} is no result of `trackpl test --benchmark`: it {error}") from None
    return result


# On screen --------------------------------------------------------------------------------------------------


def report(benchmark: Benchmark, result: Mapping[str, Any], folder: Path) -> str:
    """Lay out the figures beside the published ones, then what is wrong with them, where they lie and what is next."""
    counts, summary, names = result["videos"], result["summary"], benchmark.headline
    ours = f"{result['method']} (this run)"
    width = max(len(name) for name in (ours, *(r.system for r in benchmark.references)))
    columns = [max(11, len(name) + 2) for name in names]

    def line(first: str, cells: Sequence[str], rest: str = "") -> str:
        return f"{first:<{width}}" + "".join(f"{c:>{w}}" for c, w in zip(cells, columns, strict=True)) + rest

    def cell(value: float | None, missing: str) -> str:
        return missing if value is None else f"{value:.{benchmark.digits}f}"

    shown = "x".join(map(str, result["input_size"])) if result["input_size"] else "their own size"
    of = f"{counts['scored']} of {counts['expected']} videos, {result['queries']} {benchmark.asked}, frames of {shown}"
    lines = ["", f"{benchmark.name}: {benchmark.what}", line("", names)]
    lines.append(line(ours, [cell(summary[n], "undefined") for n in names], f"   {of}{_jitter(result)}"))
    lines += [line(r.system, [cell(v, "-") for v in r.figures], f"   {r.source}") for r in benchmark.references]
    lines += ["", *_warnings(benchmark, result)]
    pace, unit = result[f"{benchmark.pace[1]}_per_second"], benchmark.pace[1]
    speed = f", {pace:.4g} {unit}/s" if pace else ""
    memory = f", peak memory {result['peak_memory'] / 1e9:.2f} GB" if result["peak_memory"] else ""
    memory += f", of the GPU {result['peak_gpu_memory'] / 1e9:.2f} GB" if result["peak_gpu_memory"] else ""
    lines.append(f"{result['frames']} frames in {result['seconds']:.4g} s on {result['device']}{speed}{memory}")
    where = _relative(folder)
    lines.append(f"result: {where}/{RESULT}; a line a video: {where}/{ROWS}")
    go_on = "the same command without --limit scores the rest" if counts["scored"] < counts["found"] else ""
    again = f"trackpl test --compare {where} OTHER" if not go_on or counts["skipped"] else go_on
    return "\n".join([*lines, f"next: {again}", ""])


def _jitter(result: Mapping[str, Any]) -> str:
    jitter = result.get("jitter", {})
    changed = ", ".join(f"{k} by up to {v:g}" for k, v in jitter.items() if v)
    return f", second frames jittered: {changed}" if changed else ""


def _warnings(benchmark: Benchmark, result: Mapping[str, Any]) -> list[str]:
    counts, undefined = result["videos"], {k: n for k, n in result["undefined"].items() if n}
    lines = []
    if not counts["complete"]:
        skipped = f", {counts['skipped']} cannot be read" if counts["skipped"] else ""
        asks = f" and {benchmark.asks} {benchmark.asked}" if benchmark.asks else ""
        asked = f" and {result['queries']} {benchmark.asked}" if benchmark.asks else ""
        lines.append(
            f"NOT COMPLETE: the benchmark has {counts['expected']} videos{asks}, this set {counts['found']}{skipped}, "
            f"scored are {counts['scored']}{asked}: not comparable with figures of the whole benchmark"
        )
    lines += [f"  left out: {row['key']}: {row['skipped']}" for row in result["skipped"][:5]]
    if undefined:
        names = ", ".join(f"{k} in {n}" for k, n in undefined.items())
        lines.append(f"undefined (0/0) and left out of the means: {names} videos")
    if result["nan_predictions"]:
        lines.append(f"{result['nan_predictions']} predicted positions are not finite and count as misses")
    return lines


def _relative(path: Path) -> str:
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative
