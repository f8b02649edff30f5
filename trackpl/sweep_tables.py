"""What the runs of a sweep came to: their state, their last figures, and tables over the seeds."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from trackpl.errors import DataError, Error, closest
from trackpl.parsing import read_json
from trackpl.sweep_files import Run, Sweep, label_of, recipe, shorter

RECORD = "sweep.json"
FLOW = ("EPE_visible", "EPE", "EPE_occluded", "Fl_all")
POINTS = ("AJ", "delta_avg", "OA")
MEANINGS = {"EPE_visible": "noc", "EPE": "all", "Fl_all": "ER%"}
"""What papers on optical flow call them."""
_MAX_BYTES = 2**28  # of a metrics.csv
_NAMED = 12  # missing runs

Layout = Callable[[list[tuple[str, ...]]], str]


@dataclass(frozen=True)
class State:
    """How far a run is: "finished", "failed", "interrupted", "not begun", or "made with other options"."""

    word: str
    step: int = 0
    status: int | None = None
    seconds: float = 0.0
    figures: Mapping[str, float] = field(default_factory=dict)  # the last ones of each, by benchmark/metric

    def __str__(self) -> str:
        if self.word == "failed":
            return f"failed at step {self.step}, status {self.status}"
        return f"interrupted at step {self.step}" if self.word == "interrupted" else self.word


@dataclass(frozen=True)
class Row:
    """The runs that differ in nothing but their seed."""

    labels: tuple[str, ...]
    planned: int
    finished: int
    figures: dict[str, list[float]]  # one of each finished run that has it
    seconds: list[float]


def state_of(folder: Path, run: Run) -> State:
    """Return how far the run in `folder` is.

    Raises:
        DataError: its record or its metrics are broken.
    """
    record = read_record(folder)
    if record is None:
        return State("not begun")
    if record["recipe"] != recipe(run):
        return State("made with other options")
    step, figures = _last(folder / "metrics.csv")
    status, seconds = record["status"], float(record["seconds"])
    word = "finished" if status == 0 else "interrupted" if status is None else "failed"
    return State(word, step, status, seconds, figures)


def read_record(folder: Path) -> dict[str, Any] | None:
    """Return what a sweep wrote into a run's folder: recipe, status of `trackpl fit`, seconds; None if it wrote none.

    Raises:
        DataError: the file is broken.
    """
    path = folder / RECORD
    try:
        record = read_json(path.read_bytes())
        kinds = {"recipe": dict, "status": int | None, "seconds": int | float}
        if not isinstance(record, dict) or not all(isinstance(record.get(k), kind) for k, kind in kinds.items()):
            raise ValueError("not what a sweep writes")
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as error:
        raise DataError(f"{path} is broken ({error}); remove the folder of that run to repeat it") from None
    return record


def _last(path: Path) -> tuple[int, dict[str, float]]:
    """Return the last step in a metrics.csv, and the last figure of each validation metric."""
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise DataError(f"{path} is larger than {_MAX_BYTES} bytes")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return 0, {}
    step, figures = 0, dict[str, float]()
    try:
        for row in csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1], newline="")):
            step = max(step, int(row["step"]))
            found = {k: v for k, v in row.items() if k and k.startswith("val/") and v}
            figures |= {k.removeprefix("val/"): float(v) for k, v in found.items()}
    except (ValueError, TypeError, KeyError, csv.Error) as error:
        raise DataError(f"{path} is not what trackpl fit writes: {error}") from None
    return step, figures


# Tables -----------------------------------------------------------------------------------------------------


def rows_of(sweep: Sweep, states: Mapping[str, State]) -> list[Row]:
    """Put runs together that differ in their seed only, in the order of the file."""
    groups: dict[tuple[str, ...], list[State]] = {}
    for run in sweep.runs:
        labels = tuple(label_of(name, run.values[name]) for name in sweep.varied)
        groups.setdefault(labels, []).append(states[run.name])
    return [_row(labels, group) for labels, group in groups.items()]


def _row(labels: tuple[str, ...], group: Sequence[State]) -> Row:
    done = [state for state in group if state.word == "finished"]
    figures: dict[str, list[float]] = {}
    for state in done:
        for name, value in state.figures.items():
            figures.setdefault(name, []).append(value)
    return Row(labels, len(group), len(done), figures, [state.seconds for state in done])


def choose(rows: Sequence[Row], asked: Sequence[str] = ()) -> list[str]:
    """Return which figures make columns: those asked for, else those of flow, else those of points.

    Raises:
        Error: no finished run has a figure that was asked for.
    """
    found = list(dict.fromkeys(name for row in rows for name in row.figures))
    last = {name: name.rpartition("/")[2] for name in found}
    if found and (unknown := [name for name in asked if name not in {*found, *last.values()}]):
        raise Error(f"no run has a figure '{unknown[0]}'; {closest(unknown[0], {*last.values()})}")
    for wanted in (asked,) if asked else (FLOW, POINTS):
        if chosen := [name for metric in wanted for name in found if metric in (name, last[name])]:
            return sorted(chosen, key=lambda name: name.rpartition("/")[0])
    return found[:6]


def cells(sweep: Sweep, rows: Sequence[Row], metrics: Sequence[str]) -> list[tuple[str, ...]]:
    """Lay out the table: head, then a row each; mean, and standard deviation over the seeds where several."""
    short = shorter(sweep.varied)
    several = len({name.rpartition("/")[0] for name in metrics}) > 1
    heads = [name if several else name.rpartition("/")[2] for name in metrics]
    heads = [f"{head} ({known})" if (known := MEANINGS.get(head.rpartition("/")[2])) else head for head in heads]
    table = [(*(short[name] for name in sweep.varied), *heads, "runs")]
    for row in rows:
        shown = [_shown(row.figures.get(name, [])) for name in metrics]
        table.append((*row.labels, *shown, f"{row.finished} of {row.planned}"))
    return table


def _shown(values: Sequence[float]) -> str:
    if not values:
        return "-"
    middle, spread = _numbers(values)
    text = f"{middle:.2f}" if abs(float(middle)) >= 10 else f"{middle:.3f}"
    return f"{text} ± {spread:.2g}" if spread != "" else text


def report(sweep: Sweep, states: Mapping[str, State], asked: Sequence[str], layout: Layout) -> str:
    """Return title, table, what the file says of it, and what is missing, as text."""
    rows = rows_of(sweep, states)
    metrics = choose(rows, asked)
    parts = [sweep.title, layout(cells(sweep, rows, metrics))]
    benchmarks = sorted({name.rpartition("/")[0] for name in metrics})
    if benchmarks:
        spread = ", mean ± standard deviation over seeds" if any(row.finished > 1 for row in rows) else ""
        parts.append(f"last validation on {', '.join(benchmarks)}{spread}")
    parts += [sweep.description] if sweep.description else []
    return "\n\n".join([*parts, *missing(sweep, states)])


def missing(sweep: Sweep, states: Mapping[str, State]) -> Iterator[str]:
    """Say which runs the table lacks, and why."""
    lacking: dict[str, list[str]] = {}
    for run in sweep.runs:
        if states[run.name].word != "finished":
            lacking.setdefault(str(states[run.name]), []).append(run.name)
    if lacking:
        reasons = [f"{why}: {' '.join(names[:_NAMED])}{_rest(len(names))}" for why, names in lacking.items()]
        total = sum(map(len, lacking.values()))
        yield f"missing {total} of {len(sweep.runs)} runs: {'; '.join(reasons)}"
    silent = [run.name for run in sweep.runs if states[run.name].word == "finished" and not states[run.name].figures]
    if silent:
        yield f"without figures of validation in their metrics.csv: {', '.join(silent)}"


def _rest(count: int) -> str:
    return f" and {count - _NAMED} more" if count > _NAMED else ""


def as_csv(sweep: Sweep, states: Mapping[str, State], asked: Sequence[str]) -> str:
    """Return the table with all digits: a column a parameter, then mean and standard deviation of each figure."""
    rows = rows_of(sweep, states)
    metrics = choose(rows, asked)
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    spread = [f"{name} {what}" for name in metrics for what in ("mean", "sd")]
    writer.writerow([*sweep.varied, "planned", "finished", "seconds mean", *spread])
    for row in rows:
        numbers = [number for name in metrics for number in _numbers(row.figures.get(name, []))]
        writer.writerow([*row.labels, row.planned, row.finished, _numbers(row.seconds)[0], *numbers])
    return file.getvalue()


def _numbers(values: Sequence[float]) -> tuple[float | str, float | str]:
    """Return mean and standard deviation; nothing where there is none."""
    finite = all(map(math.isfinite, values))
    return mean(values) if values else "", stdev(values) if finite and len(values) > 1 else ""


def as_markdown(rows: list[tuple[str, ...]]) -> str:
    """Lay rows out as a table of Markdown."""
    head, *rest = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = [head, ["---:"] * len(head), *rest]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
