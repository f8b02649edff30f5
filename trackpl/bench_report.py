"""What `trackpl bench` found: its figures, tables, files and plot."""

from __future__ import annotations

import argparse
import json
import platform
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from trackpl import __version__

OUTPUTS = ("bench.json", "bench.md", "bench.png")


@dataclass
class Row:
    """What was measured with one number of points."""

    points: int
    first: list[float] = field(default_factory=list)  # seconds of the first call on a clip, by round
    second: list[float] = field(default_factory=list)  # of the second call on the same clip
    peak_bytes: int | None = None  # held in the first round above what the loaded method holds
    fault: str = ""


@dataclass
class Result:
    """What is known of one method."""

    name: str
    package: str
    version: str
    fault: str = ""
    weights: str = ""  # shipped, or freshly initialised
    parameters: int = 0
    threads: int = 0
    device: str = ""
    resting_bytes: int = 0  # held once it is loaded
    load_seconds: float = 0.0  # from the start of its process
    first_result_seconds: float = 0.0  # likewise, to its first tracks
    rows: list[Row] = field(default_factory=list)


def facts_of(given: argparse.Namespace, results: list[Result], seconds: float) -> dict[str, Any]:
    """Return what the figures hold for: versions, hardware, settings, date, and the seconds that it all took."""
    import torch

    known = [r for r in results if r.device]
    gpu = known[0].device if known and given.device != "cpu" else None
    return {
        "trackpl": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": _cpu(),
        "gpu": gpu,
        "device": given.device,
        "threads": max((r.threads for r in known), default=given.threads or 0),
        "frames": given.frames,
        "size": given.size,
        "points": given.points,
        "repeats": given.repeats,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
    }


def _cpu() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _what(facts: dict[str, Any]) -> str:
    h, w = facts["size"]
    where = facts["gpu"] or f"{facts['cpu']}, {facts['threads']} thread{'s' if facts['threads'] > 1 else ''}"
    rounds = "one round" if facts["repeats"] == 1 else f"median of {facts['repeats']} rounds"
    return f"{facts['frames']} frame{'s' if facts['frames'] > 1 else ''} of {w} x {h}, {rounds}, {where}"


def figures(row: Row, frames: int) -> dict[str, float]:
    """Return points a second and milliseconds a frame of the first and the second call; nothing if it has a fault."""
    found = {}
    for name, seconds in (("first", row.first), ("second", row.second)):
        if seconds:
            middle = max(median(seconds), 1e-9)
            found[f"{name}_points_per_second"] = row.points / middle
            found[f"{name}_ms_per_frame"] = 1000 * middle / frames
    return found


def report(facts: dict[str, Any], results: list[Result], layout: Callable[[list[tuple[str, ...]]], str]) -> str:
    """Return the figures as text, in tables that `layout` makes of rows of cells, the first of which is the head."""
    speed: list[tuple[str, ...]] = [
        ("METHOD", "POINTS", "POINTS/S", "MS/FRAME", "2ND POINTS/S", "2ND MS/FRAME", "PEAK MB")
    ]
    loads: list[tuple[str, ...]] = [("METHOD", "WEIGHTS", "PARAMETERS", "LOADED s", "FIRST RESULT s", "LOADED MB")]
    for result in results:
        for row in result.rows:
            found = figures(row, facts["frames"])
            names = [f"{call}_{what}" for call in ("first", "second") for what in ("points_per_second", "ms_per_frame")]
            cells = [_number(found[name]) if name in found else "failed" for name in names]
            speed.append((result.name, str(row.points), *cells, _megabytes(row.peak_bytes)))
        if result.rows:
            timing = (_number(result.load_seconds), _number(result.first_result_seconds))
            count = f"{result.parameters:,}"
            loads.append((result.name, result.weights, count, *timing, _megabytes(result.resting_bytes)))
    notes = (
        "POINTS/S and MS/FRAME: the first call on a clip, with all its frames; 2ND: other points of the same clip.\n"
        "PEAK MB: held at most during the first call, above what the loaded method holds (LOADED MB).\n"
        "FIRST RESULT s: from the start of the process, with imports, to the first tracks."
    )
    return "\n\n".join([_what(facts), layout(speed), layout(loads), notes])


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _megabytes(count: int | None) -> str:
    return "-" if count is None else _number(count / 1e6)


def as_text(rows: list[tuple[str, ...]]) -> str:
    """Lay rows out in columns for a terminal, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(c.rjust(n) if i else c.ljust(n) for i, (c, n) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )


def _markdown(rows: list[tuple[str, ...]]) -> str:
    head, *rest = rows
    rule = "|".join(["---", *["---:"] * (len(head) - 1)])
    return "\n".join(["| " + " | ".join(head) + " |", f"|{rule}|", *("| " + " | ".join(row) + " |" for row in rest)])


def save(out: Path, facts: dict[str, Any], results: list[Result]) -> None:
    """Write all three files, or none."""
    from trackpl.writing import replacing

    content = {**facts, "methods": [asdict(r) for r in results]}
    for method, result in zip(content["methods"], results, strict=True):
        for row, measured in zip(method["rows"], result.rows, strict=True):
            row.update(figures(measured, facts["frames"]))
    faults = "".join(
        f"\n- `{r.name}` ({r.package} {r.version}) could not be measured: {r.fault}" for r in results if r.fault
    )
    about = f"trackpl {facts['trackpl']}, torch {facts['torch']}, {facts['system']}, {facts['date']}"
    text = f"# Speed of tracking\n\n{report(facts, results, _markdown)}\n\n{about}\n\n![plot](bench.png)\n"
    with replacing(out / OUTPUTS[0]) as data, replacing(out / OUTPUTS[1]) as page, replacing(out / OUTPUTS[2]) as image:
        data.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
        page.write_text(text + (f"{faults}\n" if faults else ""), "utf-8")
        _plot(image, facts, results)


def _plot(path: Path, facts: dict[str, Any], results: list[Result]) -> None:
    from trackpl.plot import Line, Panel, save_plot

    speed, memory = [], []
    for result in results:
        found = [(row.points, figures(row, facts["frames"])) for row in result.rows if row.first]
        for call in ("first", "second"):
            places = [(n, f[f"{call}_points_per_second"]) for n, f in found]
            speed.append(Line(result.name, places, dashed=call == "second"))
        memory.append(Line(result.name, [(row.points, (row.peak_bytes or 0) / 1e6) for row in result.rows]))
    panels = [
        Panel("points a second", "number of points", [line for line in speed if line.points]),
        Panel("peak memory above the loaded method, MB", "number of points", [line for line in memory if line.points]),
    ]
    save_plot(panels, _what(facts), path, dashes="second call on the same clip")
