"""`trackpl bench`: how fast every installed method tracks, and with how much memory, on this machine, in one run.

Each method has a process of its own, so that its memory is its own and a crash harms no other. They take turns, number
of points by number of points and round after round: what else the machine does then harms all of them alike. Every
measurement has a clip of its own, which no method can have seen; the second call asks for other points of that clip.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from trackpl.bench_report import OUTPUTS, Result, Row, as_text, facts_of, report, save
from trackpl.errors import Error
from trackpl.plugins import Plugin, find, plugins
from trackpl.usage import Parser, device_of


def run(args: list[str]) -> int:
    """Measure as the command line says; return 0, or 1 if nothing, or not all that was asked for, could be measured.

    Raises:
        Error: bad arguments, an unknown method, always before anything is measured.
    """
    given = _parse(args)
    chosen = [find(name) for name in given.models] if given.models else list(plugins().values())
    if not chosen:
        raise Error("no method is installed; pip install one, or start one: trackpl new NAME")
    _check_out(given.out, given.overwrite)
    given.device = device_of(given.device)
    began = time.perf_counter()
    results = measure(chosen, given)
    facts = facts_of(given, results, time.perf_counter() - began)
    for result in results:
        for fault in filter(None, [result.fault, *(f"{r.points} points: {r.fault}" for r in result.rows if r.fault)]):
            print(f"trackpl: method '{result.name}' of {result.package} {result.version}: {fault}", file=sys.stderr)
    measured = [r for r in results if any(row.first for row in r.rows)]
    if not measured:
        raise Error("no method could be measured; nothing was written")
    print(report(facts, results, as_text))
    save(given.out, facts, results)
    print("\n" + "\n".join(str(given.out / name) for name in OUTPUTS))
    return 1 if given.models and len(measured) < len(chosen) else 0


# The command line -------------------------------------------------------------------------------------------


def _parse(args: list[str]) -> argparse.Namespace:
    parser = Parser(
        "bench",
        "Measure how fast the installed methods track points, and the memory that takes. Each runs in a process of its "
        "own with the weights that it ships with, or fresh ones where it ships none: speed depends on neither.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--models", metavar="A,B", help="which methods (default: all of `trackpl plugins`)", default=argparse.SUPPRESS)
    add("--points", metavar="N,N", default="16,64,256,1024", help="with how many points")
    add("--frames", metavar="T", type=int, default=24, help="frames of a clip")
    add("--size", metavar=("H", "W"), nargs=2, type=int, default=[256, 256], help="height and width of a frame")
    add("--device", metavar="NAME", default="auto", help="cpu, cuda, or auto: a GPU where there is one")
    add("--repeats", metavar="K", type=int, default=3, help="rounds; figures are their median")
    add("--threads", metavar="N", type=int, help="CPU threads (default: torch's)", default=argparse.SUPPRESS)
    add("--out", metavar="DIR", type=Path, default=Path("bench"), help=f"where {', '.join(OUTPUTS)} go")
    add("--overwrite", action="store_true", help="replace the files of an earlier run in DIR")
    given = parser.parse_args(args)
    given.models = list(dict.fromkeys(filter(None, getattr(given, "models", "").split(","))))
    given.threads = getattr(given, "threads", None)
    words = given.points.split(",")
    if not all(re.fullmatch(r"[1-9]\d{0,5}", word.strip()) for word in words):
        raise Error(f"--points {given.points}: allowed are whole numbers from 1 to 999999 such as 16,64,256")
    given.points = sorted({int(word) for word in words})
    for name, values, least in (
        ("--frames", [given.frames], 1),
        ("--size", given.size, 16),
        ("--repeats", [given.repeats], 1),
        ("--threads", [given.threads or (1 if given.threads is None else 0)], 1),
    ):
        if min(values) < least:
            raise Error(f"{name} {' '.join(map(str, values))}: allowed is a whole number from {least} on")
    return given


def _check_out(out: Path, overwrite: bool) -> None:
    if out.exists() and not out.is_dir():
        raise Error(f"--out {out} is a file: give a folder")
    there = [name for name in OUTPUTS if (out / name).exists()]
    if there and not overwrite:
        raise Error(f"{out} already holds {there[0]}: add --overwrite to replace it, or choose another --out")
    parent = next(p for p in (out.resolve(), *out.resolve().parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise Error(f"cannot write to {out}: {parent} is not a folder that you may write to; choose another --out")


# Measuring --------------------------------------------------------------------------------------------------


def measure(chosen: Sequence[Plugin], given: argparse.Namespace) -> list[Result]:
    """Start a process for each method, take its first tracks and then the rounds; end them all whatever happens."""
    results = [Result(p.name, p.package, p.version, p.fault) for p in chosen]
    with ExitStack() as stack:
        bar = stack.enter_context(tqdm(total=len(results), disable=None, leave=False))
        children: dict[str, Child] = {}
        for result in results:
            bar.set_description(f"loading {result.name}")
            if not result.fault:
                child = stack.enter_context(Child(result.name, given))
                if _begin(result, child, given):
                    children[result.name] = child
            bar.update()
        bar.reset(total=given.repeats * len(given.points) * len(children))
        for number, index, result in _turns(results, given):
            if result.name in children:
                bar.set_description(f"round {number + 1} of {given.repeats}, {result.name}")
                _measure(result, result.rows[index], children[result.name], number)
                bar.update()
    return results


def _turns(results: list[Result], given: argparse.Namespace) -> Iterator[tuple[int, int, Result]]:
    for number in range(given.repeats):
        for index in range(len(given.points)):
            for result in results:
                yield number, index, result


def _begin(result: Result, child: Child, given: argparse.Namespace) -> bool:
    """Wait until the method is loaded and has tracked once, which also warms it up; say whether it has."""
    ready = child.answer()
    result.load_seconds = time.perf_counter() - child.began
    if "fault" in ready:
        result.fault = ready["fault"]
        return False
    for name, value in ready.items():
        setattr(result, name, value)
    result.rows = [Row(points) for points in given.points]
    # A GPU also has to choose its kernels for every number of points; a CPU has none to choose.
    for points in given.points if given.device != "cpu" else given.points[:1]:
        warm = child.ask(points, seed=0)
        if "fault" in warm and points == given.points[0]:
            result.fault, result.rows = warm["fault"], []
            return False
        if points == given.points[0]:
            result.first_result_seconds = result.load_seconds + warm["first"]
    return True


def _measure(result: Result, row: Row, child: Child, number: int) -> None:
    if row.fault or result.fault:
        return
    found = child.ask(row.points, seed=1 + number * 1_000_003 + row.points)
    if "fault" in found:
        row.fault, row.first, row.second, row.peak_bytes = found["fault"], [], [], None
        result.fault = "" if child.alive() else found["fault"]
        return
    row.first.append(found["first"])
    row.second.append(found["second"])
    if not number:  # what later rounds find was partly kept from larger numbers of points
        row.peak_bytes = found["peak_bytes"]


class Child:
    """The process that measures one method."""

    def __init__(self, name: str, given: argparse.Namespace) -> None:
        settings = {
            "method": name,
            "device": given.device,
            "frames": given.frames,
            "size": given.size,
            "threads": given.threads,
        }
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        if given.threads:
            environment["OMP_NUM_THREADS"] = str(given.threads)
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - closed on leaving
        self.began = time.perf_counter()
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "trackpl.bench_child", json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
            text=True,
            start_new_session=True,  # Ctrl-C is for us; we end it
        )

    def ask(self, points: int, seed: int) -> dict[str, Any]:
        """Let it measure, and return what it found, or a `fault`."""
        assert self._process.stdin is not None
        with suppress(OSError):  # it is gone, and its last words are to be read
            print(json.dumps({"points": points, "seed": seed}), file=self._process.stdin, flush=True)
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """Return the next answer; if it died, a `fault` that says how."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line.endswith("\n"):
            found: dict[str, Any] = json.loads(line)
            return found
        status = self._process.wait()
        self._errors.seek(0)
        words = [text.strip() for text in self._errors.read().splitlines() if text.strip()]
        how = f"by signal {-status}" + (" (out of memory?)" if status == -9 else "") if status < 0 else f"({status})"
        return {"fault": f"its process ended {how}" + (f": {words[-1][:200]}" if words else "")}

    def alive(self) -> bool:
        """Whether it can be asked again."""
        return self._process.poll() is None

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()
