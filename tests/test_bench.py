"""`trackpl bench`: methods take turns, each in a process of its own; files and plot; nothing half after a fault."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from plugin_site import install

from trackpl import bench, bench_child, cli
from trackpl.bench_report import OUTPUTS, Row, figures
from trackpl.errors import DataError
from trackpl.plot import COLOURS, Line, Panel, draw_plot, log_ticks, tick_text

TINY = Path(__file__).with_name("tiny.py").read_text()
SMALL = ("--frames", "2", "--size", "16", "24", "--device", "cpu")
SETTINGS = {"device": "cpu", "frames": 2, "size": [16, 24], "threads": None}

FULL = """
from trackpl_tiny import Tiny
class Full(Tiny):
    def track(self, clip, queries):
        if queries.shape[1] > 4:
            raise MemoryError("too many")
        print("a plugin may print")
        return super().track(clip, queries)
"""
DEAD = """
import os
from trackpl_tiny import Tiny
class Dead(Tiny):
    def track(self, clip, queries):
        if queries.shape[1] > 4:
            os.kill(os.getpid(), 9)
        return super().track(clip, queries)
"""
SLEEPY = """
import os, pathlib, time
from trackpl_tiny import Tiny
class Sleepy(Tiny):
    def track(self, clip, queries):
        pathlib.Path(os.environ["SLEEPY"]).write_text(str(os.getpid()))
        time.sleep(60)
"""


@pytest.fixture(scope="session")
def methods(tmp_path_factory):
    """A site with a method that works and others that fail in a way each."""
    importlib.import_module("trackpl.testing")  # torch and lightning: not the time of a test
    site = tmp_path_factory.mktemp("bench_site")
    install(site, "tiny", TINY, value="trackpl_tiny:Tiny")
    install(site, "full", FULL, value="trackpl_full:Full")
    install(site, "dead", DEAD, value="trackpl_dead:Dead")
    install(site, "sleepy", SLEEPY, value="trackpl_sleepy:Sleepy")
    install(site, "broken", "raise ValueError('always')")
    return site


@pytest.fixture
def work(methods, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(methods))
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Inside:
    """Stands for `Child`: measures in this process, and notes what it is asked."""

    asked: list = []  # noqa: RUF012 - emptied by the fixture
    left: list = []  # noqa: RUF012

    def __init__(self, name, given):
        self.name, self.given, self.began = name, given, time.perf_counter()

    def answer(self):
        self.bench = bench_child.Bench({**SETTINGS, "method": self.name})
        return self.bench.facts

    def ask(self, points, seed):
        Inside.asked.append((self.name, points, seed))
        return self.bench.measure(points, seed)

    def alive(self):
        return True

    def __enter__(self):
        return self

    def __exit__(self, *_):
        Inside.left.append(self.name)


@pytest.fixture
def inside(monkeypatch):
    monkeypatch.setattr(bench, "Child", Inside)
    Inside.asked, Inside.left = [], []
    return Inside


def command(capsys, *args):
    status = cli.main(["bench", *SMALL, *args])
    out, err = capsys.readouterr()
    return status, out, err


def test_methods_take_turns_and_all_is_written(work, inside, capsys):
    status, out, err = command(capsys, "--models", "tiny,full", "--points", "4,2", "--repeats", "2")
    assert (status, err) == (0, "")
    turns = [(name, points) for name, points, _ in inside.asked]
    rounds = [("tiny", 2), ("full", 2), ("tiny", 4), ("full", 4)]
    assert turns == [("tiny", 2), ("full", 2), *rounds, *rounds]  # first each is warmed up
    seeds = {seed for _, _, seed in inside.asked}
    assert len(seeds) == 5  # a clip of its own for each number of points of each round, and for warming up
    assert sorted(inside.left) == ["full", "tiny"]
    content = json.loads(Path("bench/bench.json").read_text())
    assert (content["frames"], content["size"], content["points"], content["device"]) == (2, [16, 24], [2, 4], "cpu")
    tiny, full = content["methods"]
    assert tiny["weights"] == "freshly initialised" and tiny["parameters"] == 2 and tiny["package"] == "trackpl-tiny"
    assert tiny["first_result_seconds"] > tiny["load_seconds"] >= 0 and full["fault"] == ""
    for row in tiny["rows"]:
        assert len(row["first"]) == len(row["second"]) == 2 and row["peak_bytes"] >= 0
        assert row["first_points_per_second"] == pytest.approx(2 * row["points"] / sum(row["first"]))
        assert row["second_ms_per_frame"] == pytest.approx(1000 * sum(row["second"]) / 2 / 2)
    lines = [line.split() for line in out.splitlines()]
    assert [line[:2] for line in lines if line[:1] == ["tiny"]] == [["tiny", "2"], ["tiny", "4"], ["tiny", "freshly"]]
    page = Path("bench/bench.md").read_text()
    assert page.count("| tiny |") == 3 and "2 frames of 24 x 16, median of 2 rounds" in page
    assert Path("bench/bench.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in Path("bench").iterdir()) == sorted(OUTPUTS)
    status, _, err = command(capsys, "--models", "tiny")
    assert status == 2 and "already holds bench.json" in err and len(err.splitlines()) == 1
    assert command(capsys, "--models", "tiny", "--points", "2", "--overwrite")[0] == 0
    assert json.loads(Path("bench/bench.json").read_text())["points"] == [2]


def test_a_number_of_points_that_fails_leaves_the_others(work, inside, capsys):
    status, out, err = command(capsys, "--models", "full", "--points", "2,8", "--repeats", "2", "--out", "x")
    assert status == 0 and "8 points: MemoryError: too many" in err and len(err.splitlines()) == 1
    assert [points for _, points, _ in inside.asked] == [2, 2, 8, 2]  # what failed is not tried again
    assert "failed" in out
    (full,) = json.loads(Path("x/bench.json").read_text())["methods"]
    assert len(full["rows"][0]["first"]) == 2 and "first_points_per_second" not in full["rows"][1]


def test_interrupted_it_ends_its_processes_and_writes_nothing(work, inside, capsys, monkeypatch):
    ask = Inside.ask

    def interrupted(self, points, seed):
        if len(Inside.asked) == 3:
            raise KeyboardInterrupt
        return ask(self, points, seed)

    monkeypatch.setattr(Inside, "ask", interrupted)
    status, _, err = command(capsys, "--models", "tiny,full", "--points", "2,4")
    assert status == 130 and "interrupted" in err
    assert not Path("bench").exists() and sorted(inside.left) == ["full", "tiny"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--models", "tinny"), "did you mean 'tiny'?"),
        (("--points", "16,many"), "--points 16,many: allowed are whole numbers"),
        (("--points", "0"), "--points 0"),
        (("--frames", "0"), "--frames 0: allowed is a whole number from 1 on"),
        (("--size", "8", "64"), "--size 8 64: allowed is a whole number from 16 on"),
        (("--repeats", "0"), "--repeats 0"),
        (("--threads", "0"), "--threads 0"),
        (("--device", "tpu"), "--device tpu: allowed: auto, cpu, cuda"),
        (("--out", "file"), "--out file is a file"),
    ],
)
def test_wrong_arguments_are_one_line_before_anything_starts(work, inside, capsys, args, message):
    (work / "file").touch()
    status, out, err = command(capsys, *args)
    assert status == 2 and message in err and len(err.splitlines()) == 1 and out == ""
    assert inside.left == []


def test_shipped_weights_are_used_where_there_are_any():
    method, weights = bench_child._load("crw_multiscale", "cpu")
    assert weights == "shipped" and not method.training


def test_figures_are_medians():
    found = figures(Row(points=10, first=[1.0, 2.0, 9.0], second=[0.5]), frames=4)
    assert found == {
        "first_points_per_second": 5.0,
        "first_ms_per_frame": 500.0,
        "second_points_per_second": 20.0,
        "second_ms_per_frame": 125.0,
    }
    assert figures(Row(points=10), frames=4) == {}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux forgets a peak")
def test_peak_memory_is_that_of_the_call_and_not_of_an_earlier_one():
    code = """
import numpy as np
from trackpl import bench_child
bench_child._forget_peak("cpu")
before = bench_child._peak("cpu")
block = np.ones(8_000_000)  # 64 MB
del block
during = bench_child._peak("cpu") - before
bench_child._forget_peak("cpu")
print(during, bench_child._peak("cpu") - before)
"""  # a process of its own, as the bench has: one that has seen other tests may hold memory enough
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    during, after = map(int, done.stdout.split())
    assert during > 50e6 and after < 20e6


# In real processes --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_each_in_its_process_and_no_fault_stops_the_others(work, capsys):
    status, out, err = command(
        capsys, "--models", "broken,dead,full,tiny", "--points", "2,8", "--repeats", "1", "--threads", "1"
    )
    assert status == 1  # not all that was asked for
    lines = err.splitlines()
    assert len(lines) == 4 and "broken" in lines[0] and "always" in lines[0]
    assert "method 'dead' of trackpl-dead 1.0: its process ended by signal 9 (out of memory?)" in lines[1]
    assert "'dead'" in lines[2] and "8 points" in lines[2]
    assert "'full'" in lines[3] and "8 points: MemoryError: too many" in lines[3]
    assert "a plugin may print" not in out
    content = {m["name"]: m for m in json.loads(Path("bench/bench.json").read_text())["methods"]}
    assert all(row["first"] for row in content["tiny"]["rows"]) and content["tiny"]["threads"] == 1
    assert content["dead"]["rows"][0]["first"] and not content["dead"]["rows"][1]["first"]
    assert content["tiny"]["load_seconds"] > 0.1 and content["tiny"]["resting_bytes"] > 50e6
    page = Path("bench/bench.md").read_text()
    assert "`broken` (trackpl-broken 1.0) could not be measured" in page


@pytest.mark.slow
def test_ctrl_c_leaves_no_process_and_no_file(work, methods):
    environment = {**os.environ, "PYTHONPATH": str(methods), "SLEEPY": str(work / "pid")}
    command = [sys.executable, "-m", "trackpl", "bench", *SMALL, "--models", "sleepy"]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    end = time.monotonic() + 60
    while not (work / "pid").exists() or not (work / "pid").read_text():
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and err.strip() == "trackpl: interrupted"
    with pytest.raises(ProcessLookupError):
        os.kill(int((work / "pid").read_text()), 0)
    assert [p.name for p in work.iterdir()] == ["pid"]


# The plot -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (3, 70, [2, 5, 10, 20, 50, 100]),
        (1, 10, [1, 2, 5, 10]),
        (7, 7, [5, 10]),
        (5, 5, [5, 10]),
        (0.03, 40_000, [0.01, 0.1, 1, 10, 100, 1000, 10_000, 100_000]),
    ],
)
def test_ticks_enclose_the_measurements(low, high, ticks):
    assert log_ticks(low, high) == pytest.approx(ticks)


def test_ticks_of_what_has_no_logarithm():
    with pytest.raises(DataError, match="positive"):
        log_ticks(0, 1)


def test_numbers_on_axes():
    assert [tick_text(v) for v in (0.05, 2, 200, 1000, 20_000, 5e6)] == ["0.05", "2", "200", "1k", "20k", "5M"]


def seen(image, colour):
    """Return the places (x, y) of the pixels of a colour."""
    y, x = (np.asarray(image) == colour).all(-1).nonzero()
    return x, y


def test_lines_rise_where_figures_do_and_dashes_leave_gaps():
    rising, falling = Line("a", [(1, 1), (100, 100)]), Line("b", [(1, 100), (100, 1)], dashed=True)
    image = draw_plot([Panel("speed", "points", [rising, falling])], "title", "second")
    (xa, ya), (xb, yb) = (seen(image.crop((80, 90, 540, 385)), colour) for colour in COLOURS[:2])
    assert np.corrcoef(xa, ya)[0, 1] < -0.99 and np.corrcoef(xb, yb)[0, 1] > 0.99  # y counts down
    assert len(xa) > 1.4 * len(xb)
    assert image.width == 560 and draw_plot([Panel("", "", [rising])] * 2, "title").width == 1120


def test_odd_plots_are_drawn_all_the_same():
    nothing = Panel("memory", "points", [Line("a", [(1, 0), (2, float("nan"))])])
    one = Panel("speed", "points", [Line(f"a method with a long name {i}", [(16, 3.0)]) for i in range(9)])
    few, many = draw_plot([nothing], "t" * 500), draw_plot([one], "title")
    assert len(seen(many.crop((80, 90, 540, 385)), COLOURS[8 % len(COLOURS)])[0]) > 10  # the last lies on top
    assert len(seen(few, COLOURS[0])[0]) > 10  # the legend alone
    assert many.height > few.height  # its legend has more rows
