import csv
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import yaml
from tiny_site import TINY, environment

from trackpl import cli, configs, sweep, sweep_files
from trackpl.errors import DataError, Error

pytest_plugins = ["tiny_site"]

GRID = {
    "program": "trackpl",
    "command": ["${env}", "${program}", "fit", *TINY, "${args}"],
    "method": "grid",
    "name": "Starts",
    "description": "Where it begins.",
    "parameters": {
        "seed_everything": {"values": [0, 1]},
        "model.start": {"values": [1.0, 5.0]},
        "trainer.max_epochs": {"value": 1},
    },
}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")


def write(name="starts.yaml", **changes):
    content = {key: value for key, value in {**GRID, **changes}.items() if value is not None}
    Path(name).write_text(yaml.safe_dump(content, sort_keys=False))
    return Path(name)


def option(arguments, name):
    found = [a.partition("=")[2] for a in arguments if a.startswith(f"--{name}=")]
    return found[-1] if found else arguments[arguments.index(f"--{name}") + 1]


class Toy:
    """Stands for `trackpl fit`: two steps, then figures that follow from the options; keeps how it was called."""

    def __init__(self, stop=None, status=0):
        self.calls, self.stop, self.status = [], stop, status

    def __call__(self, arguments, environment, keep):
        self.calls.append(arguments)
        folder = Path(option(arguments, "run_dir"))
        begun = folder / "checkpoints" / "last.ckpt"
        begun.parent.mkdir(parents=True, exist_ok=True)
        begun.write_text("a checkpoint")
        start, seed = float(option(arguments, "model.start")), int(option(arguments, "seed_everything"))
        lines = ["step,epoch,train/loss,val/toy/EPE,val/toy/EPE_visible,val/toy/Fl_all", "1,0,3.5,,,"]
        if self.stop != len(self.calls):
            lines.append(f"2,0,,{start + seed},{start},{10 * start}")
        (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
        if self.stop == len(self.calls) and not self.status:
            raise KeyboardInterrupt
        return self.status if self.stop == len(self.calls) else 0


def carry_out(path, fit, part=(1, 1), extra=(), check=lambda options: None):
    made = sweep_files.read(path, extra)
    return sweep.carry_out(made, Path("out", made.key), part, fit, check)


def table(path, *options):
    assert cli.main(["sweep", str(path), "--out", "out", "--table", *options]) == 0


# Files ------------------------------------------------------------------------------------------------------


def test_a_grid_is_the_product_of_its_values_with_the_first_parameter_slowest():
    made = sweep_files.read(write())
    assert [run.name for run in made.runs] == [
        f"start={start},seed_everything={seed}" for seed in (0, 1) for start in ("1.0", "5.0")
    ]
    expected = (*TINY, "--seed_everything=1", "--model.start=5.0", "--trainer.max_epochs=1", "--model.wait", "0")
    assert sweep_files.read(write(), ["--model.wait", "0"]).runs[-1].arguments == expected


def test_values_come_to_fit_as_wandb_hands_them_on():
    utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    values = {"model.a": 3, "b": 0.5, "c": "{0: 2, 200: 3}", "d": "1e-4", "e": [64, 64], "f": "null"}
    made = sweep_files.read(write(parameters={name: {"value": value} for name, value in values.items()}))
    theirs = utils.create_sweep_command_args({"args": {name: {"value": value} for name, value in values.items()}})
    assert [*made.runs[0].arguments[len(TINY) :]] == theirs["args"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parameter": {}}, "no key 'parameter'; did you mean 'parameters'"),
        ({"early_terminate": {"type": "hyperband"}}, "no key 'early_terminate'"),
        ({"command": None}, "'command' is missing"),
        ({"method": "bayes"}, "method must be grid, got 'bayes'"),
        ({"command": ["python", "${program}", "${args}"]}, "command must run trackpl fit"),
        ({"command": ["trackpl", "fit", "--model", "tiny"]}, "hold ${args} once"),
        ({"command": ["trackpl", "fit", "${arg}"]}, "${arg} is not known here; did you mean '${args}'"),
        ({"command": "trackpl fit ${args}"}, "command must be a list"),
        ({"parameters": {}}, "parameters must map"),
        ({"parameters": {"model.start": {"vals": [1]}}}, "'vals' is not known here, did you mean 'values'"),
        ({"parameters": {"model.start": {"min": 1, "max": 2}}}, "'min' is not known here"),
        ({"parameters": {"model.start": {"values": []}}}, "values must be a list that is not empty"),
        ({"parameters": {"model.start": {"values": [1, 1]}}}, "1 is given twice"),
        ({"parameters": {"model.start": {"values": [None]}}}, "null must stand in quotes"),
        ({"parameters": {"--model.start": {"values": [1]}}}, "without hyphens"),
        ({"parameters": {"run_dir": {"values": ["a"]}}}, "cannot be varied"),
        ({"command": ["trackpl", "fit", "--run_dir=x", "${args}"]}, "--run_dir cannot be chosen"),
        ({"parameters": {f"p{i}": {"values": list(range(10))} for i in range(5)}}, "the grid has 100000 runs"),
    ],
)
def test_what_a_sweep_file_must_not_hold_is_named(changes, message):
    with pytest.raises(Error) as caught:
        sweep_files.read(write(**changes))
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("method: grid\nmethod: grid\n", "'method' is given twice"),
        ("a: &x [1]\nb: *x\n", "line 2, column 4: not valid YAML: aliases are not allowed"),
        ("a: !!python/object/apply:os.system ['touch owned']\n", "not valid YAML"),
        ("method: [\n", "not valid YAML"),
        ("a: 2001-99-99\n", "cannot be read as YAML"),
        ("[" * 1200, "cannot be read as YAML"),
        ("- 1\n", "this holds a list"),
        ("", "this holds nothing"),
        ("#" * 300_000, "larger than"),
    ],
)
def test_only_plain_yaml_is_read(text, message):
    Path("bad.yaml").write_text(text)
    with pytest.raises(Error, match=message):
        sweep_files.read(Path("bad.yaml"))
    assert not Path("owned").exists()


def test_a_sweep_is_found_by_bare_name_and_a_wrong_one_gets_the_closest():
    assert sweep_files.find("windows").name == "windows.yaml"
    with pytest.raises(Error, match="did you mean 'windows'"):
        sweep_files.find("window")


def test_runs_whose_folders_would_be_named_alike_are_told_apart():
    made = sweep_files.read(write(parameters={"a": {"values": ["x/y", "x_y", "X_y", "v" * 300]}}))
    names = [run.name.casefold() for run in made.runs]
    assert len({*names}) == 4 and max(map(len, names)) <= 120


@pytest.mark.parametrize("name", sweep_files.names())
def test_shipped_sweeps_are_short_say_how_to_run_them_and_are_no_configs(name):
    path = sweep_files.find(name)
    made, lines = sweep_files.read(path), path.read_text().splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 120
    assert any(f"trackpl sweep {name}" in line for line in lines if line.startswith("#"))
    assert "Table" in made.title and "seed_everything" in made.parameters and made.varied
    assert all(sweep_files.recipe(run)["configs"] for run in made.runs)
    assert not [config for config in configs.names() if config.startswith("sweeps/")]


@pytest.mark.slow
@pytest.mark.parametrize("name", sweep_files.names())
def test_the_runs_of_the_shipped_sweeps_are_such_as_fit_takes(name):
    from trackpl.fit_options import check

    for run in sweep_files.read(sweep_files.find(name)).runs:
        if run.values.get("seed_everything", 0) == 0:
            check(run.arguments)


# Running ----------------------------------------------------------------------------------------------------


def test_finished_runs_are_not_repeated_and_the_table_takes_the_mean_over_seeds(capsys):
    path, toy = write(), Toy()
    assert carry_out(path, toy) == 0 and len(toy.calls) == 4
    assert carry_out(path, toy) == 0 and len(toy.calls) == 4
    table(path)
    out = capsys.readouterr().out
    assert out.startswith("Starts\n\nstart  EPE_visible (noc)     EPE (all)  Fl_all (ER%)    runs\n")
    assert "1.0            1.000 ± 0  1.500 ± 0.71" in out and "2 of 2" in out and "missing" not in out
    assert "Where it begins." in out and "last validation on toy" in out
    page = Path("out/starts/table.md").read_text()
    assert page.startswith("# Starts") and "| 5.0 | 5.000 ± 0 | 5.500 ± 0.71 | 50.00 ± 0 | 2 of 2 |" in page
    with open("out/starts/table.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["toy/EPE mean"]) for row in rows] == [1.5, 5.5]
    assert float(rows[0]["toy/EPE sd"]) == pytest.approx(0.5**0.5)


def test_an_interrupted_sweep_resumes_its_run_and_says_what_is_missing(capsys):
    path, toy = write(), Toy(stop=2)
    with pytest.raises(KeyboardInterrupt):
        carry_out(path, toy)
    table(path)
    out = capsys.readouterr().out
    assert "missing 3 of 4 runs: interrupted at step 1: start=5.0,seed_everything=0; not begun: " in out
    assert "1.0                1.000      1.000         10.00  1 of 2" in out
    again = Toy()
    assert carry_out(path, again) == 0
    assert len(again.calls) == 3
    last = "out/starts/start=5.0,seed_everything=0/checkpoints/last.ckpt"
    assert [("--ckpt_path" in call) for call in again.calls] == [True, False, False]
    assert option(again.calls[0], "ckpt_path") == str(Path(last))


def test_a_run_that_has_no_checkpoint_yet_begins_anew():
    path, toy = write(), Toy(stop=1)
    with pytest.raises(KeyboardInterrupt):
        carry_out(path, toy)
    folder = Path(option(toy.calls[0], "run_dir"))
    (folder / "checkpoints" / "last.ckpt").unlink()
    (folder / "config.yaml").write_text("what would make fit refuse the folder")
    again = Toy()
    carry_out(path, again)
    assert "--ckpt_path" not in again.calls[0] and not (folder / "config.yaml").exists()


def test_a_failed_run_lets_the_others_go_on_and_is_tried_again(capsys):
    path, toy = write(), Toy(stop=2, status=3)
    assert carry_out(path, toy) == 1 and len(toy.calls) == 4
    table(path)
    assert "missing 1 of 4 runs: failed at step 1, status 3: start=5.0,seed_everything=0" in capsys.readouterr().out
    again = Toy()
    assert carry_out(path, again) == 0 and len(again.calls) == 1


def test_parts_share_the_runs_without_doing_one_twice():
    path, one, two = write(), Toy(), Toy()
    carry_out(path, one, (1, 2))
    carry_out(path, two, (2, 2))
    folders = [option(call, "run_dir") for call in (*one.calls, *two.calls)]
    assert len(one.calls) == len(two.calls) == 2 and len({*folders}) == 4
    with pytest.raises(Error, match="--part must be I/N"):
        sweep.part_of("3/2")


def test_a_folder_with_a_run_of_other_options_is_refused(capsys):
    path = write()
    carry_out(path, Toy())
    with pytest.raises(Error, match="was made with other options; choose another --out"):
        carry_out(path, Toy(), extra=["--model.wait", "1"])
    table(path, "--", "--model.wait", "1")
    assert "missing 4 of 4 runs: made with other options" in capsys.readouterr().out


def test_a_config_that_changed_is_another_option():
    Path("base.yaml").write_text("model: tiny\n")
    path = write(command=["trackpl", "fit", "--config", "base.yaml", "${args}"])
    carry_out(path, Toy())
    Path("base.yaml").write_text("model: other_tiny\n")
    with pytest.raises(Error, match="other options"):
        carry_out(path, Toy())


@pytest.mark.parametrize("name", ["mine.txt", "checkpoints/last.ckpt"])
def test_a_folder_of_something_else_is_left_alone(name):
    path = write()
    mine = Path("out/starts/start=1.0,seed_everything=0", name)
    mine.parent.mkdir(parents=True)
    mine.write_text("keep")
    with pytest.raises(Error, match="holds something else"):
        carry_out(path, Toy())
    assert mine.read_text() == "keep"


def test_options_are_checked_before_anything_runs():
    def check(options):
        if "--model.start=5.0" in options:
            raise Error("model.start must be int")

    toy = Toy()
    with pytest.raises(Error, match=r"sweep starts, run start=5.0,seed_everything=0: model.start must be int"):
        carry_out(write(), toy, check=check)
    assert not toy.calls


def test_a_run_that_another_process_has_in_hand_is_left_to_it():
    path, calls = write(parameters={"model.start": {"value": 1.0}, "seed_everything": {"value": 0}}), []

    def fit(arguments, environment, keep):
        inner = Toy()
        assert carry_out(path, inner) == 0
        calls.append(inner.calls)
        return 0

    assert carry_out(path, fit) == 0
    assert calls == [[]]


@pytest.mark.parametrize(
    ("name", "text"),
    [("sweep.json", "{"), ("sweep.json", "[]"), ("sweep.json", '{"recipe": {}}'), ("metrics.csv", "a,b\n1,2\n")],
)
def test_broken_records_are_named(name, text):
    path = write()
    carry_out(path, Toy())
    broken = Path("out/starts/start=1.0,seed_everything=1", name)
    broken.write_text(text)
    with pytest.raises(DataError, match=name):
        sweep.save(sweep_files.read(path), Path("out/starts"))


def test_chosen_figures_make_the_columns_and_an_unknown_one_gets_the_closest(capsys):
    path = write()
    carry_out(path, Toy())
    table(path, "--metrics", "Fl_all")
    assert "EPE" not in capsys.readouterr().out
    assert cli.main(["sweep", str(path), "--out", "out", "--table", "--metrics", "Fl_al"]) == 2
    assert "did you mean 'Fl_all'" in capsys.readouterr().err


def test_the_runs_can_be_listed_as_commands(capsys):
    assert cli.main(["sweep", str(write()), "--list", "--part", "2/4"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "# start=5.0,seed_everything=0: not begun" and out[1].startswith("trackpl fit --model tiny")
    assert len(out) == 2 and not Path("runs").exists()


STUB = """
import os, sys, time
from pathlib import Path
folder = Path(sys.argv[sys.argv.index("--run_dir") + 1])
(folder / "pid").write_text(str(os.getpid()))
try:
    time.sleep(60)
except KeyboardInterrupt:
    (folder / "clean").write_text("yes")
    sys.exit(130)
"""

PARENT = """
import sys
from pathlib import Path
from trackpl import cli, sweep, sweep_files
Popen = sweep.subprocess.Popen
def stub(command, **options):
    return Popen([sys.executable, "stub.py", *command[4:]], **options)
sweep.subprocess.Popen = stub
carry_out = sweep.carry_out
sweep.carry_out = lambda *args: carry_out(*args, check=lambda options: None)
sys.exit(cli.main(["sweep", "starts.yaml", "--out", "out"]))
"""


def begun(tmp_path):
    """Start a sweep whose fits sleep; return it, and the process of its fit."""
    Path("stub.py").write_text(STUB)
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(PARENT)], stderr=subprocess.PIPE, text=True)
    path = tmp_path / "out/starts/start=1.0,seed_everything=0/pid"
    end = time.monotonic() + 60
    while not (path.exists() and path.read_text()):
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.02)
    return process, int(path.read_text())


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 128 + signal.SIGTERM)])
def test_ctrl_c_and_kill_end_the_fit_first_and_leave_nothing_running(number, status, tmp_path):
    write()
    process, child = begun(tmp_path)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    folder = tmp_path / "out/starts/start=1.0,seed_everything=0"
    assert process.returncode == status and "Traceback" not in err
    assert (folder / "clean").exists() and not alive(child)
    assert json.loads((folder / "sweep.json").read_text())["status"] is None
    if number == signal.SIGINT:
        assert err.rstrip().endswith("interrupted; to go on, repeat the command")


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_fit_that_outlives_its_killed_sweep_is_not_started_twice(tmp_path):
    path = write()
    process, child = begun(tmp_path)
    process.kill()
    process.wait()
    try:
        toy = Toy()
        carry_out(path, toy, part=(1, 4))
        assert not toy.calls and alive(child)
    finally:
        os.kill(child, signal.SIGKILL)
        process.stderr.close()


@pytest.mark.slow
def test_a_real_sweep_trains_resumes_and_fills_its_table(site, tmp_path):
    write(parameters={"model.start": {"values": [1.0, 5.0]}, "trainer.max_epochs": {"value": 1}})

    def run(*options):
        command = [sys.executable, "-m", "trackpl", "sweep", "starts.yaml", "--out", "out", *options]
        return subprocess.run(command, env=environment(site, WANDB_MODE="disabled"), capture_output=True, text=True)

    first = run()
    assert first.returncode == 0, first.stderr
    assert "EPE" in first.stdout and "1 of 1" in first.stdout and "missing" not in first.stdout
    folder = tmp_path / "out/starts/start=5.0"
    assert (folder / "config.yaml").is_file() and (folder / "checkpoints/last.ckpt").is_file()
    record = json.loads((folder / "sweep.json").read_text())
    (folder / "sweep.json").write_text(json.dumps({**record, "status": None}))  # killed before it could say so
    second = run()
    assert second.returncode == 0 and "run 1 of 1, start=5.0, goes on from step 8" in second.stderr, second.stderr
    assert second.stdout.splitlines()[:5] == first.stdout.splitlines()[:5]
    wrong = run("--out", "other", "--", "--model.strat", "3")
    assert wrong.returncode == 2 and "run start=1.0: Tiny has no option 'strat'; did you mean 'start'?" in wrong.stderr
    assert not Path("other").exists()
