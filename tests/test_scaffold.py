"""`trackpl new`: what it writes is a whole plugin, and what it refuses it leaves alone."""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from trackpl_prep.synthetic import make

import trackpl
from trackpl import cli, scaffold
from trackpl.errors import Error
from trackpl.method import CONTRACT


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A freshly written `fresh_one`, and an environment in which pip has installed it."""
    out = tmp_path_factory.mktemp("new")
    folder = scaffold.write("fresh_one", out)
    site = out / "site"
    offline = ["--no-deps", "--no-build-isolation", "--no-index"]
    done = run([sys.executable, "-m", "pip", "install", *offline, "--target", site, folder], os.environ)
    assert done.returncode == 0, done.stderr
    return folder, {**os.environ, "PYTHONPATH": str(site)}


def run(command, env, cwd=None):
    return subprocess.run(
        [str(word) for word in command], env=env, cwd=cwd, capture_output=True, text=True, check=False
    )


def test_writes_every_file_under_the_new_name(tmp_path, capsys):
    assert cli.main(["new", "my_tracker", "--out", str(tmp_path / "deep" / "er")]) == 0
    folder = tmp_path / "deep" / "er" / "trackpl-my_tracker"
    assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()) == [
        "README.md",
        "configs/my_tracker.yaml",
        "pyproject.toml",
        "tests/test_my_tracker.py",
        "trackpl_my_tracker/__init__.py",
        "trackpl_my_tracker/method.py",
        "trackpl_my_tracker/py.typed",
    ]
    text = "".join(path.read_text() for path in folder.rglob("*") if path.is_file())
    assert not re.search("mymethod", text, re.I)
    said = capsys.readouterr().out
    assert f"pip install -e {folder}" in said and f"pytest {folder}" in said
    assert f"trackpl fit --config {folder}/configs/my_tracker.yaml" in said
    assert os.listdir(folder.parent) == [folder.name]


def test_metadata_names_the_class_and_this_trackpl(tmp_path):
    folder = scaffold.write("my_tracker", tmp_path)
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    assert project["name"] == "trackpl-my_tracker"
    assert project["dependencies"] == [f"trackpl>={trackpl.__version__}"]
    value = project["entry-points"]["trackpl.methods"]["my_tracker"]
    assert value == "trackpl_my_tracker.method:MyTracker"
    module = ast.parse((folder / "trackpl_my_tracker" / "method.py").read_text())
    assert "MyTracker" in [node.name for node in module.body if isinstance(node, ast.ClassDef)]
    config = yaml.safe_load((folder / "configs" / "my_tracker.yaml").read_text())
    assert config["model"]["class_path"] == "my_tracker"


def test_every_template_goes_into_the_wheel():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    patterns = [*project["tool"]["setuptools"]["package-data"]["*"], "*.py"]
    files = [p for p in scaffold.TEMPLATES.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert files
    assert not [path.name for path in files if not any(path.match(pattern) for pattern in patterns)]


def test_states_the_contract_of_this_trackpl(tmp_path):
    text = (scaffold.write("my_tracker", tmp_path) / "trackpl_my_tracker" / "method.py").read_text()
    assert re.findall(r"contract = (\d+)", text) == [str(CONTRACT)]


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("My-Tracker", "my_tracker"),
        ("class", "tracker_class"),
        ("3d", "tracker_3d"),
        ("../up", "up"),
        ("", "tracker"),
        ("Überall", "berall"),
        ("x\n", "x"),
    ],
)
def test_a_bad_name_gets_a_usable_one(tmp_path, given, meant):
    with pytest.raises(Error, match=f"cannot name a method; allowed: .*; did you mean '{meant}'") as caught:
        scaffold.write(given, tmp_path)
    assert not list(tmp_path.iterdir())
    scaffold.write(re.search("mean '(.*)'", str(caught.value))[1], tmp_path)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("crw_multiscale", "is taken by trackpl "),
        ("crw", "package trackpl_crw is installed already"),
        ("prep", "package trackpl_prep is installed already"),
        ("clip", "class Clip, a word its code uses"),
        ("tensor", "class Tensor, a word its code uses"),
    ],
)
def test_a_taken_name_is_refused(tmp_path, capsys, name, why):
    assert cli.main(["new", name, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert why in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["mkdir", "touch", "link"])
def test_never_overwrites(tmp_path, capsys, kind):
    there = tmp_path / "trackpl-mine"
    there.symlink_to("nowhere") if kind == "link" else getattr(there, kind)()
    assert cli.main(["new", "mine", "--out", str(tmp_path)]) == 2
    assert f"trackpl: {there} exists already and is left as it is" in capsys.readouterr().err
    assert list(tmp_path.rglob("*")) == [there]


def test_a_place_that_cannot_be_written_is_one_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert cli.main(["new", "mine", "--out", str(tmp_path / "file")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("trackpl: cannot write ") and "--out" in error and error.count("\n") == 1


def test_nothing_is_left_of_a_copy_that_failed(tmp_path, monkeypatch):
    def full(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(Error, match="No space left on device"):
        scaffold.write("mine", tmp_path)
    assert not list(tmp_path.iterdir())


def test_is_clean_to_lint(tmp_path):
    pytest.importorskip("ruff")
    folder = scaffold.write("a_tracker_with_a_rather_long_name", tmp_path)
    ruff = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F,B,UP"]
    done = run([*ruff, folder], os.environ)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_installs_and_is_found(installed):
    _, env = installed
    done = run([sys.executable, "-m", "trackpl", "plugins", "--check"], env)
    line = next(line for line in done.stdout.splitlines() if line.startswith("fresh_one"))
    assert line.split()[1:] == ["trackpl-fresh_one", "0.1.0", "trackpl_fresh_one.method.FreshOne", "ok"]


@pytest.mark.slow
def test_passes_its_own_tests_unmodified(installed):
    folder, env = installed
    done = run([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "."], env, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout


@pytest.mark.slow
def test_trains_by_name_and_by_config(installed, tmp_path):
    folder, env = installed
    shards = make(tmp_path / "tiny", 4, size=(64, 64), frames=8, points=32)
    data = ["--data.train", shards, "--data.val", json.dumps({"tiny": str(shards)}), "--data.workers", "0"]
    short = ["--trainer.max_steps", "2", "--trainer.accelerator", "cpu"]
    for how in (["--model", "fresh_one"], ["--config", folder / "configs" / "fresh_one.yaml"]):
        done = run([sys.executable, "-m", "trackpl", "fit", *how, *data, *short], env, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
    runs = list((tmp_path / "runs" / "fresh_one").iterdir())
    assert len(runs) == 2
    assert all(list(run.glob("checkpoints/*.ckpt")) for run in runs)
