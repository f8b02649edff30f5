"""`trackpl sweep FILE`: the runs of a W&B sweep file one after the other, without an account, and their table.

Each run is `trackpl fit` in a process of its own, with a folder of its own, ``OUT/SWEEP/RUN``. What the run follows
from, and how it ended, stands there in ``sweep.json``; so a sweep that was stopped, however, goes on where it was.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trackpl import sweep_files
from trackpl.bench_report import as_text
from trackpl.errors import Error
from trackpl.sweep_files import Run, Sweep
from trackpl.sweep_tables import RECORD, State, as_csv, as_markdown, report, state_of
from trackpl.usage import Parser

ROOT = Path("runs/sweeps")
TABLES = ("table.md", "table.csv")
_PATIENCE = 60  # seconds that an interrupted fit gets to end by itself

Fit = Callable[[list[str], dict[str, str], tuple[int, ...]], int]
"""Runs `trackpl` with arguments, additions to the environment, and file descriptors to keep; returns the status."""


def run(args: list[str]) -> int:
    """Do what the command line says; return 0, or 1 if a run failed.

    Raises:
        Error: a mistake of the user, in one line.
    """
    own, extra = (args[: args.index("--")], args[args.index("--") + 1 :]) if "--" in args else (args, [])
    given = _parser().parse_args(own)
    part, metrics = part_of(given.part), [name for name in given.metrics.split(",") if name]
    sweeps = [sweep_files.read(sweep_files.find(name), extra) for name in given.sweeps]
    status = 0
    for sweep in sweeps:
        folder = given.out / sweep.key
        if given.list:
            _list(sweep, folder, part)
            continue
        if not given.table:
            status |= carry_out(sweep, folder, part)
        print(f"{save(sweep, folder, metrics)}\n")
    return status


def _parser() -> Parser:
    usage = "trackpl sweep FILE [FILE ...] [options] [-- options of trackpl fit for all runs]"
    text = "Run the grid of a W&B sweep file without an account, and print its table. Repeat the command to go on."
    epilog = (
        f"sweeps here: {', '.join(sweep_files.names()) or 'none'}; with an account, `wandb sweep FILE` runs them too"
    )
    parser = Parser("sweep", text, usage=usage, epilog=epilog)
    parser.add_argument("sweeps", metavar="FILE", nargs="+", help="a sweep file, or the bare name of one")
    parser.add_argument("--out", type=Path, default=ROOT, metavar="DIR", help=f"where the runs go (default: {ROOT})")
    parser.add_argument("--part", default="1/1", metavar="I/N", help="only the I-th of N parts; for N machines")
    parser.add_argument("--table", action="store_true", help="run nothing, print what is there")
    parser.add_argument("--list", action="store_true", help="run nothing, list the runs and how far they are")
    parser.add_argument("--metrics", default="", metavar="A,B", help="columns of the table, such as EPE,Fl_all")
    return parser


def part_of(text: str) -> tuple[int, int]:
    """Read I/N; raises `Error` unless 1 <= I <= N."""
    i, _, n = text.partition("/")
    if not (i.isdecimal() and n.isdecimal() and 1 <= int(i) <= int(n)):
        raise Error(f"--part must be I/N with 1 <= I <= N, such as 3/8, got '{text}'")
    return int(i), int(n)


def share(sweep: Sweep, part: tuple[int, int]) -> list[Run]:
    """Return every N-th run, beginning with the I-th."""
    return list(sweep.runs[part[0] - 1 :: part[1]])


def _list(sweep: Sweep, folder: Path, part: tuple[int, int]) -> None:
    for one in share(sweep, part):
        print(f"# {one.name}: {state_of(folder / one.name, one)}\n{shlex.join(['trackpl', 'fit', *one.arguments])}")


# Running ----------------------------------------------------------------------------------------------------


def fit_in_process(arguments: list[str], environment: dict[str, str], keep: tuple[int, ...]) -> int:
    """Run `trackpl` in a process of its own and return its status; whatever interrupts us interrupts it first."""
    process: subprocess.Popen[bytes] | None = None
    try:
        with _later():  # else an interrupt may leave a process behind that nobody knows
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "trackpl", *arguments],
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # its report; ours follows
                pass_fds=keep,
                start_new_session=True,  # Ctrl-C reaches it through us, once
            )
        return process.wait()
    except BaseException:
        if process is not None:
            _stop(process)
        raise


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a process, by force where it does not end by itself or the user is impatient."""
    process.send_signal(signal.SIGINT if os.name == "posix" else signal.SIGTERM)
    try:
        process.wait(_PATIENCE)
    except BaseException:
        process.kill()
        process.wait()


def carry_out(
    sweep: Sweep,
    folder: Path,
    part: tuple[int, int] = (1, 1),
    fit: Fit = fit_in_process,
    check: Callable[[Sequence[str]], None] | None = None,
) -> int:
    """Run what is not finished of a part of a sweep; a run that was stopped goes on from its last checkpoint.

    Args:
        sweep: what to run.
        folder: in which each run gets a folder of its own.
        part: the I-th of N parts.
        fit: runs `trackpl fit`.
        check: raises `Error` for options that `fit` would not take; by default the parser of `trackpl fit`.

    Returns:
        0, or 1 if a run failed; the others are run all the same.

    Raises:
        Error: an option is wrong, before anything is run; or a folder holds a run of other options.
    """
    states = {one.name: (one, state_of(folder / one.name, one)) for one in share(sweep, part)}
    todo = [one for one, state in states.values() if state.word != "finished"]
    for one, state in states.values():
        if state.word == "made with other options":
            where = folder / one.name
            raise Error(f"{where} was {state}; choose another --out, or remove that folder to repeat the run")
    if not todo:
        return 0
    _check(sweep, todo, check or _check_options())
    failed = 0
    with _terminable():
        for i, one in enumerate(todo, 1):
            status = _carry_out(sweep, one, folder / one.name, f"{i} of {len(todo)}", fit)
            failed += status != 0
    return 1 if failed else 0


def _check_options() -> Callable[[Sequence[str]], None]:
    from trackpl.fit_options import check  # torch and all that: only who runs needs it

    return check


def _check(sweep: Sweep, todo: Sequence[Run], check: Callable[[Sequence[str]], None]) -> None:
    for one in todo:
        try:
            check(one.arguments)
        except Error as error:
            raise type(error)(f"sweep {sweep.key}, run {one.name}: {error}") from error


def _carry_out(sweep: Sweep, one: Run, folder: Path, count: str, fit: Fit) -> int:
    """Run one of the runs, or what is left of it; return its status, 0 where another process is at it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _alone(folder.parent / f".{one.name}.lock") as keep:
        if keep is None:
            _say(f"{sweep.key}: {one.name} is being run by another process")
            return 0
        before = state_of(folder, one)
        if before.word == "finished":  # by another process, meanwhile
            return 0
        if before.word == "not begun" and _occupied(folder):
            raise Error(f"{folder} holds something else than a run of this sweep; choose another --out")
        last = folder / "checkpoints" / "last.ckpt"
        if not last.is_file():
            shutil.rmtree(folder, ignore_errors=True)  # nothing in it to go on from, and fit wants its folder new
            folder.mkdir()
            before = State("not begun")
        resume = ["--ckpt_path", str(last)] if last.is_file() else []
        spent = before.seconds + (_uncounted(folder / RECORD, last) if resume else 0)
        _say(f"{sweep.key}: run {count}, {one.name}{f', goes on from step {before.step}' if resume else ''}")
        _record(folder, one, None, spent)
        began = time.monotonic()
        names = {"WANDB_RUN_GROUP": sweep.key, "WANDB_NAME": f"{sweep.key} {one.name}"}
        more = {name: value for name, value in names.items() if name not in os.environ}
        status: int | None = None
        try:
            status = fit(["fit", *one.arguments, "--run_dir", str(folder), *resume], more, keep)
        finally:
            _record(folder, one, status, spent + time.monotonic() - began)
        if status:
            _say(f"{sweep.key}: {one.name} failed, status {status}; the others go on")
        return status


def _uncounted(record: Path, checkpoint: Path) -> float:
    """Return the seconds that a killed sweep could not write down: from its record to the checkpoint."""
    return max(0.0, checkpoint.stat().st_mtime - record.stat().st_mtime)


def _occupied(folder: Path) -> bool:
    return folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))


def _record(folder: Path, one: Run, status: int | None, seconds: float) -> None:
    content = {"recipe": sweep_files.recipe(one), "status": status, "seconds": round(seconds, 1)}
    _write(folder / RECORD, json.dumps(content, indent=1) + "\n")


def _write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


@contextmanager
def _alone(path: Path) -> Iterator[tuple[int, ...] | None]:
    """Hold a lock and give the descriptors that hold it; None where another process does.

    A fit that inherits them keeps the lock for as long as it lives, even where its sweep was killed.
    """
    if os.name != "posix":
        yield ()
        return
    import fcntl

    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        yield (file.fileno(),)


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end us as Ctrl-C does: the fit first."""

    def leave(number: int, frame: Any) -> None:
        sys.exit(128 + number)

    with _handled(("SIGTERM", "SIGHUP"), leave):
        yield


@contextmanager
def _later() -> Iterator[None]:
    """Let what would interrupt us wait until the block is done."""
    waiting: list[tuple[int, Any]] = []
    with _handled(("SIGINT", "SIGTERM", "SIGHUP"), lambda number, frame: waiting.append((number, frame))) as before:
        yield
    for number, frame in waiting[:1]:
        handler = before[number]
        if callable(handler):
            handler(number, frame)


@contextmanager
def _handled(names: Sequence[str], handler: Callable[[int, Any], Any]) -> Iterator[dict[int, Any]]:
    """Handle some signals, but those that are ignored, as by nohup; give their handlers from before."""
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    main = threading.current_thread() is threading.main_thread()  # others get no signals
    before = {n: signal.getsignal(n) for n in numbers if main and signal.getsignal(n) not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, handler)
    try:
        yield before
    finally:
        for number, was in before.items():
            signal.signal(number, was)


# The table --------------------------------------------------------------------------------------------------


def save(sweep: Sweep, folder: Path, metrics: Sequence[str] = ()) -> str:
    """Write the table of a sweep as Markdown and CSV beside its runs; return it as text."""
    states = {one.name: state_of(folder / one.name, one) for one in sweep.runs}
    text = report(sweep, states, metrics, as_text)
    if not folder.is_dir():
        return text
    page, data = (folder / name for name in TABLES)
    _write(page, f"# {report(sweep, states, metrics, as_markdown)}\n")
    _write(data, as_csv(sweep, states, metrics))
    return f"{text}\n\ntable: {page}, {data}"


def _say(text: str) -> None:
    print(f"trackpl sweep: {text}", file=sys.stderr, flush=True)
