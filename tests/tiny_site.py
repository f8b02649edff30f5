"""Fixtures of the tests that train: an installed tiny method, a folder to work in, `trackpl` as users call it."""

import csv
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from plugin_site import install

from trackpl import cli

ENTRY_POINTS = "[trackpl.methods]\ntiny = trackpl_tiny:Tiny\nother_tiny = trackpl_tiny:Other\n"
TINY = ("--model", "tiny", "--data", "trackpl_tiny.TinyData", "--trainer.accelerator", "cpu")
SGD = '{"class_path": "torch.optim.SGD", "init_args": {"lr": 0.05}}'


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    install(folder, "tiny", Path(__file__).with_name("tiny.py").read_text(), entry_points=ENTRY_POINTS)
    return folder


@pytest.fixture
def work(site, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    for name in [n for n in os.environ if n.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    return tmp_path


@pytest.fixture
def trackpl(capsys):
    def run(*args):
        status = cli.main([str(a) for a in args])
        out, err = capsys.readouterr()
        return SimpleNamespace(status=status, out=out, err=err)

    return run


@pytest.fixture
def mistake(trackpl):
    """Run what must fail; return the message, which is one line."""

    def run(*args):
        done = trackpl(*args)
        assert done.status == 2, done.err
        lines = done.err.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("trackpl: "), done.err
        assert not Path("runs").exists() or "ckpt_path" in " ".join(map(str, args))
        return lines[0].removeprefix("trackpl: ")

    return run


def fit(trackpl, *args, epochs=2):
    done = trackpl("fit", *TINY, "--trainer.max_epochs", epochs, *args)
    assert done.status == 0, done.err
    return done


def only_run(method="tiny"):
    (folder,) = Path("runs", method).iterdir()
    return folder


def rows(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def losses(folder):
    return {int(r["step"]): float(r["train/global"]) for r in rows(folder) if r["train/global"]}


def environment(site, **more):
    path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}


def process(site, *args, wandb="disabled", code=None):
    start = ["-c", code] if code else ["-m", "trackpl"]
    return subprocess.Popen(
        [sys.executable, *start, *map(str, args)],
        env=environment(site, WANDB_MODE=wandb),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
