"""What the README and the shipped configs say works: every config trains, the Python example runs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from trackpl_prep.synthetic import render

from trackpl import configs
from trackpl.shards import encode, write_shards

ROOT = Path(__file__).parents[1]
EXPERIMENTS = [n for n in configs.names() if not n.startswith("hardware/")]
HARDWARE = [n for n in configs.names() if n.startswith("hardware/")]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    samples = [(f"clip-{i}", encode(render(3, i, size=(256, 256), frames=4, points=8))) for i in range(2)]
    return write_shards(tmp_path_factory.mktemp("shards"), "tiny", samples)


def trackpl(*args, cwd):
    command = [sys.executable, "-m", "trackpl", *map(str, args)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_trains_validates_and_its_checkpoint_tracks(name, shards, tmp_path):
    options = f"--data.train {shards} --data.steps_per_epoch 2 --data.workers 0 --trainer.max_epochs 1".split()
    options += ["--data.val", f"{{tiny: {shards}}}", "--trainer.logger", "false"]
    if name.startswith("cotracker"):  # one update is as good a test as six
        options += ["--model.resolution", "[128, 128]", "--model.iterations", "1"]
    else:
        options += ["--model.resolution", "128"]
    data = yaml.safe_load(configs.find(name).read_text())["data"]
    if data.get("init_args", data).get("frames", 0) > 4:  # what the clips here have
        options += ["--data.frames", "4", "--data.stride", "1", "--data.points", "8"]
    height, width = data["init_args"]["augment"]["init_args"]["size"]
    if height * width > 256 * 256:
        options += ["--data.augment.init_args.size", "[128, 128]"]
        options += ["--model.bound_crop", "16"] if name.startswith("crw") else []
    fit = trackpl("fit", "--config", name, "--config", "hardware/cpu", *options, cwd=tmp_path)
    assert fit.returncode == 0, fit.stderr
    (run,) = (tmp_path / "runs").glob("*/*")
    assert (run / "config.yaml").is_file() and list((run / "media").glob("*.png"))
    checkpoint = run / "checkpoints" / "last.ckpt"
    assert str(checkpoint.relative_to(tmp_path).parent) in fit.stdout and "trackpl track" in fit.stdout
    method = yaml.safe_load((run / "config.yaml").read_text())["model"]["class_path"]
    loaded = trackpl("validate", "--config", run / "config.yaml", "--ckpt_path", checkpoint, cwd=tmp_path)
    assert loaded.returncode == 0, loaded.stderr
    assert method.rpartition(".")[2] and "AJ" in loaded.stdout


@pytest.mark.parametrize("name", HARDWARE)
def test_every_hardware_config_goes_on_top(name, tmp_path):
    done = trackpl("fit", "--config", EXPERIMENTS[0], "--config", name, "--print_config", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    merged, own = yaml.safe_load(done.stdout), yaml.safe_load(configs.find(name).read_text())
    assert {k: merged["trainer"][k] for k in own["trainer"]} == own["trainer"]


@pytest.mark.parametrize("name", configs.names())
def test_configs_are_short_and_say_how_to_run_them(name):
    lines = configs.find(name).read_text().splitlines()
    assert len(lines) <= 40 and lines[0].startswith("# ")
    assert any("trackpl fit --config" in line for line in lines if line.startswith("#"))


def test_the_python_example_of_the_readme_runs():
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    names: dict = {}
    exec(code, names)
    assert names["tracks"].xy.shape == (1, 8, 2, 2)
    assert torch.equal(names["tracks"].xy[0, [0, 3], [0, 1]], names["queries"][0, :, 1:])


def test_every_command_of_the_readme_is_one():
    text = (ROOT / "README.md").read_text()
    verbs = set(re.findall(r"^trackpl (\w+)", text, re.M))
    assert verbs >= {"track", "fit", "data", "new"}
    for verb in verbs:
        pages = [["--benchmark"], ["--compare"], []] if verb == "test" else [[]]
        helps = [trackpl(verb, *page, "--help", cwd=ROOT) for page in pages]
        assert all(page.returncode == 0 for page in helps), [page.stderr for page in helps]
        shown = "".join(page.stdout for page in helps)
        used = {
            o
            for line in re.findall(rf"^trackpl {verb} (.*?)(?:  #.*)?$", text, re.M)
            for o in re.findall(r"(--\w+)[ \n]", line)
        }
        for option in used - {"--clips", "--seed", "--workers", "--model", "--data", "--trainer"}:
            assert option in shown, f"trackpl {verb} has no {option}"
    makefile = (ROOT / "Makefile").read_text()
    assert all(f"\n{target}:" in makefile for target in re.findall(r"^make (\w+)", text, re.M))
