import csv
import math
import os
import random
import re
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from tiny_site import SGD, TINY, fit, losses, only_run, process, rows

from trackpl import arguments, complaints, configs, runs, training
from trackpl.errors import CheckpointError, Error

pytest_plugins = ["tiny_site"]
pytestmark = pytest.mark.usefixtures("work")


# Names and help -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags", [["--model", "tiny"], ["--model=tiny"], ["--model.class_path", "tiny"], ["--model", "trackpl_tiny.Tiny"]]
)
def test_a_short_name_stands_for_the_class_on_the_command_line(flags):
    request = arguments.read("fit", flags)
    assert '"model": {"class_path": "trackpl_tiny.Tiny"}' in request.argv[1]


@pytest.mark.parametrize(
    "model",
    [
        "tiny",
        {"class_path": "tiny"},
        {"class_path": "tiny", "init_args": {"start": 3}},
        {"class_path": "trackpl_tiny.Tiny"},
    ],
)
def test_a_short_name_stands_for_the_class_in_a_file(model, trackpl):
    Path("one.yaml").write_text(yaml.safe_dump({"model": model}))
    fit(trackpl, "--config", "one.yaml", "--trainer.fast_dev_run", "true")
    (request,) = [arguments.read("fit", ["--config", "one.yaml"])]
    assert request.sources[0].content["model"]["class_path"] == "trackpl_tiny.Tiny"


def test_help_of_a_model_shows_its_own_options(trackpl):
    done = trackpl("fit", "--model", "tiny", "--help")
    assert done.status == 0
    assert "--model.start" in done.out and "the shift to start from" in done.out


def test_help_of_a_verb_shows_the_trainers_options(trackpl):
    done = trackpl("validate", "--help")
    assert done.status == 0
    assert "--trainer.max_steps" in done.out and "--run_dir" in done.out and "--ckpt_path" in done.out


def test_several_configs_merge_and_the_later_wins(trackpl):
    Path("configs").mkdir()
    Path("configs/one.yaml").write_text("model: {class_path: tiny, init_args: {start: 1, wait: 0.001}}\n")
    Path("configs/two.yaml").write_text("model: {start: 2}\ntrainer: {max_epochs: 1}\n")
    fit(trackpl, "--config", "one", "--config", "two")
    saved = yaml.safe_load((only_run() / "config.yaml").read_text())
    assert saved["model"]["init_args"]["start"] == 2 and saved["model"]["init_args"]["wait"] == 0.001


def test_the_command_line_wins_over_configs_wherever_it_stands(trackpl):
    Path("one.yaml").write_text("model: {class_path: tiny, init_args: {start: 1}}\n")
    fit(trackpl, "--model.start", "5", "--config", "one.yaml", epochs=1)
    assert yaml.safe_load((only_run() / "config.yaml").read_text())["model"]["init_args"]["start"] == 5


def test_options_of_another_method_in_a_config_do_not_stand_in_the_way(trackpl):
    Path("one.yaml").write_text("model: {class_path: tiny, init_args: {wait: 0.001}}\n")
    fit(trackpl, "--config", "one.yaml", "--model", "other_tiny", epochs=1)
    assert only_run("other_tiny").is_dir()


# Configs by name --------------------------------------------------------------------------------------------------


def test_configs_are_found_as_files_in_configs_and_in_the_source_tree(tmp_path):
    Path("configs").mkdir()
    Path("configs/mine.yaml").write_text("{}")
    Path("here.yaml").write_text("{}")
    assert configs.find("here.yaml") == Path("here.yaml")
    assert configs.find("mine") == Path("configs/mine.yaml") == configs.find("mine.yaml")
    assert configs.find("hardware/cpu").name == "cpu.yaml"
    assert "hardware/cpu" in configs.names() and "mine" in configs.names()


def test_the_installed_data_files_are_looked_through(tmp_path, monkeypatch):
    place = tmp_path / "data/share/trackpl/configs"
    place.mkdir(parents=True)
    (place / "shipped.yaml").write_text("{}")
    monkeypatch.setattr(configs.sysconfig, "get_path", lambda name, *scheme: str(tmp_path / "data"))
    assert configs.find("shipped") == place / "shipped.yaml"


def test_hardware_configs_are_valid_options_of_the_trainer(trackpl):
    for path in sorted(Path(configs.__file__).parent.parent.glob("configs/hardware/*.yaml")):
        assert path.read_text().startswith("#")
        for key in yaml.safe_load(path.read_text())["trainer"]:
            assert hasattr(training.Trainer, key) or key in training.Trainer.__init__.__wrapped__.__code__.co_varnames
    fit(trackpl, "--config", "hardware/cpu", "--trainer.fast_dev_run", "true")


# Mistakes ---------------------------------------------------------------------------------------------------------

IN_FILES = {
    "trainer: {max_step: 3}": r"bad\.yaml: .*'trainer\.max_step'.*did you mean 'trainer\.max_steps'",
    "modell: tiny": r"bad\.yaml: .*'modell'.*did you mean 'model'",
    "model: {strat: 3}": r"bad\.yaml: Tiny has no option 'strat'; did you mean 'start'",
    "model: {class_path: tiny, init_args: {strat: 3}}": r"bad\.yaml: Tiny has no option 'strat'; did you mean 'start'",
    "model: {start: abc}": r"bad\.yaml: model\.start must be float, got 'abc'",
    "trainer: {max_steps: many}": r"bad\.yaml: trainer\.max_steps must be int, got 'many'",
    "trainer: {precision: 17}": r"bad\.yaml: trainer\.precision must be one of .*'bf16-mixed'",
    "data: {stepss: 3}": r"bad\.yaml: TinyData has no option 'stepss'; did you mean 'steps'",
    "model: {optimizer: {class_path: torch.optim.SGD, init_args: {lrr: 1}}}": r"bad\.yaml: SGD has no .*'lrr'.*'lr'",
    "model: {optimizer: {class_path: torch.optim.SGDD}}": r"bad\.yaml: there is no 'SGDD'.*did you mean 'SGD'",
    "model: tinny": r"bad\.yaml: no installed method is called 'tinny'; did you mean 'tiny'",
    "model: os.system": r"bad\.yaml: .*'os\.system' may not be named; allowed",
    "model: {class_path: subprocess.Popen, init_args: {args: ls}}": r"bad\.yaml: .*'subprocess\.Popen' may not",
    "model: {optimizer: os.system}": r"bad\.yaml: 'os\.system' may not be named",
    "model: {optimizer: {class_path: os.system}}": r"bad\.yaml: .*'os\.system' may not be named",
    "trainer: {logger: {class_path: pdb.Pdb}}": r"bad\.yaml: trainer\.logger\.class_path: 'pdb\.Pdb' may not",
    "trainer: {callbacks: [{class_path: evil.Class}]}": r"bad\.yaml: trainer\.callbacks\[0\].*'evil\.Class' may not",
    "model: [unclosed": r"bad\.yaml, line \d+, column \d+: not valid YAML",
    "- a list": r"bad\.yaml: a config is a mapping .* this holds a list",
    "": r"bad\.yaml: a config is a mapping .* this holds nothing",
}


@pytest.mark.parametrize("content", IN_FILES)
def test_a_mistake_in_a_file_is_one_line_with_file_key_and_match(content, mistake):
    Path("bad.yaml").write_text(content)
    assert re.search(
        IN_FILES[content], mistake("fit", *TINY[2:], *([] if "tinny" in content else TINY[:2]), "--config", "bad.yaml")
    )


ON_THE_LINE = {
    ("--trainer.max_step", "3"): r"'--trainer\.max_step'; did you mean '--trainer\.max_steps'",
    ("--model.strat", "3"): r"Tiny has no option 'strat'; did you mean 'start'",
    ("--model.start", "abc"): r"model\.start must be float, got 'abc'",
    ("--nonsense",): r"no option is called '--nonsense'; allowed: .*trainer",
    ("stray",): r"'stray' is not an option",
    ("--trainer.max_steps",): r"--trainer\.max_steps: expected one argument",
    ("--model", "os.system"): r"'os\.system' may not be named; allowed are classes of .*torch\.optim",
    ("--model", "tinny"): r"no installed method is called 'tinny'; did you mean 'tiny'",
    ("--model.optimizer", "os.system"): r"'os\.system' may not be named",
    ("--data", "trackpl_tiny.TinyDat"): r"no 'TinyDat' in trackpl_tiny; did you mean 'TinyData'",
    ("--config", "hardware/cpuu"): r"no config 'hardware/cpuu'.*did you mean 'hardware/cpu'",
    ("--config",): r"--config needs",
    ("--trainer.accelerator", "nonsense"): r"nonsense",
}


@pytest.mark.parametrize("args", ON_THE_LINE)
def test_a_mistake_on_the_command_line_is_one_line(args, mistake):
    assert re.search(ON_THE_LINE[args], mistake("fit", *TINY, *args))


def test_no_method_named_says_which_there_are(mistake):
    assert re.search(r"no method is named; give --model NAME.*tiny", mistake("fit"))


def test_a_foreign_class_is_refused_before_anything_of_it_is_imported(mistake, site):
    (site / "evil_module.py").write_text("from pathlib import Path\nPath('touched').touch()\nclass Class: pass\n")
    for content in (
        "model: evil_module.Class",
        "trainer: {callbacks: [{class_path: evil_module.Class}]}",
        "model: {optimizer: evil_module.Class}",
        "model: {optimizer: {class_path: evil_module.Class}}",
        "data: evil_module.Class",
    ):
        Path("bad.yaml").write_text(content)
        assert "evil_module.Class" in mistake("fit", *TINY, "--config", "bad.yaml")
        assert not Path("touched").exists() and "evil_module" not in sys.modules


def test_a_foreign_class_behind_an_allowed_module_is_refused(mistake):
    Path("bad.yaml").write_text("model: {optimizer: trackpl.training.os.system}")
    assert "may not be named" in mistake("fit", *TINY, "--config", "bad.yaml")


def test_debug_shows_the_trace(trackpl):
    with pytest.raises(Error, match="max_step"):
        trackpl("fit", *TINY, "--trainer.max_step", "3", "--debug")


def test_a_message_of_a_kind_not_known_is_cut_to_one_line():
    line = complaints.explain("something\n  " + "odd " * 200, arguments.Request([]))
    assert "\n" not in line and line.startswith("something odd") and len(line) < 310


def test_slurm_tasks_that_do_not_match_the_devices_are_refused(mistake, monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "1")
    message = mistake("fit", *TINY, "--trainer.devices", "2")
    assert re.search(r"SLURM started 1 task, but .* 2 devices on 1 node .*--ntasks-per-node=2", message)


@pytest.mark.parametrize(
    "tasks, devices, nodes, name, fits",
    [
        ("4", 2, 2, "job", True),
        ("4", "2", 2, "job", True),
        ("4", [0, 1], 1, "job", False),
        ("3", "auto", 1, "bash", True),
    ],
)
def test_slurm_tasks(tasks, devices, nodes, name, fits):
    trainer = SimpleNamespace(num_nodes=nodes, devices=devices, accelerator="cpu")
    environment = {"SLURM_NTASKS": tasks, "SLURM_JOB_NAME": name}
    if fits:
        training.check_slurm(environment, trainer)
    else:
        with pytest.raises(Error, match="SLURM started 4 tasks"):
            training.check_slurm(environment, trainer)


# Run folders and checkpoints --------------------------------------------------------------------------------------


def test_a_fit_leaves_config_metrics_checkpoints_and_media_and_says_where(trackpl):
    done = fit(trackpl)
    folder = only_run()
    assert {"config.yaml", "metrics.csv", "checkpoints", "media"} <= {p.name for p in folder.iterdir()}
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {"last.ckpt", "best.ckpt"}
    for name in ("config.yaml", "metrics.csv", "checkpoints/best.ckpt", "media"):
        assert str(folder / name) in done.out
    assert f"trackpl track VIDEO --model tiny --checkpoint {folder}/checkpoints/best.ckpt" in done.out
    assert "zero motion" in done.out and re.search(r"val/toy +[\d.]+", done.out)


def test_two_runs_lie_side_by_side(trackpl):
    fit(trackpl, epochs=1)
    fit(trackpl, epochs=1)
    assert len(list(Path("runs/tiny").iterdir())) == 2


def test_a_run_is_not_written_over_another(trackpl, mistake):
    fit(trackpl, "--run_dir", "mine", epochs=1)
    before = (Path("mine") / "metrics.csv").read_text()
    message = mistake("fit", *TINY, "--run_dir", "mine")
    assert "holds a run already" in message and "--ckpt_path mine/checkpoints/last.ckpt" in message
    assert (Path("mine") / "metrics.csv").read_text() == before


def test_the_saved_config_reproduces_the_run(trackpl):
    fit(trackpl, "--model.optimizer", SGD, "--model.start", "0.3", "--trainer.log_every_n_steps", "1")
    first = only_run()
    shutil.move(first, "first")
    assert trackpl("fit", "--config", "first/config.yaml").status == 0
    assert losses(only_run()) == losses(Path("first"))
    assert (only_run() / "config.yaml").read_text() == Path("first/config.yaml").read_text()


def saved(folder, **changes):
    """Return the path of a copy of the last checkpoint with other options."""
    path = folder / "checkpoints/last.ckpt"
    content = torch.load(path, weights_only=True)
    content["hyper_parameters"] |= changes
    torch.save(content, "copy.ckpt")
    return "copy.ckpt"


def model_of(trackpl, *args):
    done = trackpl("validate", "--data", "trackpl_tiny.TinyData", "--trainer.accelerator", "cpu", *args)
    assert done.status == 0, done.err
    (folder,) = Path("runs/tiny").glob("*-validate")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    shutil.rmtree(folder)
    return config["model"]["init_args"]


def test_options_come_from_command_line_then_checkpoint_then_config_then_default(trackpl):
    fit(trackpl, "--model.wait", "0.001", "--model.start", "2", epochs=1)
    path = only_run() / "checkpoints/last.ckpt"
    Path("one.yaml").write_text("model: {class_path: tiny, init_args: {start: 7}}\n")
    Path("two.yaml").write_text("model: tiny\n")
    assert model_of(trackpl, "--config", "one.yaml")["start"] == 7
    assert model_of(trackpl, "--config", "two.yaml")["start"] == 0
    assert model_of(trackpl, "--config", "one.yaml", "--ckpt_path", path)["start"] == 2
    chosen = model_of(trackpl, "--config", "one.yaml", "--model.start", "9", "--ckpt_path", path)
    assert chosen["start"] == 9 and chosen["wait"] == 0.001


def test_a_checkpoint_of_another_method_is_refused(trackpl, mistake):
    fit(trackpl, epochs=1)
    path = only_run() / "checkpoints/last.ckpt"
    message = mistake("fit", "--model", "other_tiny", "--ckpt_path", path)
    assert "of method tiny (trackpl_tiny.Tiny), not of other_tiny" in message


def test_a_checkpoint_names_its_method_and_the_data_of_its_run(trackpl):
    fit(trackpl, "--data.videos", "2", epochs=1)
    done = trackpl("validate", "--ckpt_path", "best")
    assert done.status == 0, done.err
    (folder,) = Path("runs/tiny").glob("*-validate")
    assert rows(folder)[0]["val/toy/videos"] == "2.0" and rows(folder)[0]["step"] == "8"
    assert (folder / "media/step_0000008_videos.csv").is_file()


class Foreign:
    """What a checkpoint must not bring to life."""

    def __reduce__(self):
        return os.system, ("touch touched",)


@pytest.mark.parametrize("kind", ["text", "truncated", "foreign", "list", "weights", "class"])
def test_a_file_that_is_no_checkpoint_of_ours_is_refused_in_one_line(kind, trackpl, mistake):
    fit(trackpl, epochs=1)
    good = (only_run() / "checkpoints/last.ckpt").read_bytes()
    path = Path("bad.ckpt")
    if kind == "text":
        path.write_text("hello")
    elif kind == "truncated":
        path.write_bytes(good[: len(good) // 2])
    elif kind == "foreign":
        torch.save({"state_dict": {}, "hyper_parameters": Foreign()}, path)
    elif kind == "list":
        torch.save([1, 2], path)
    elif kind == "weights":
        torch.save({"shift": torch.zeros(2)}, path)
    else:
        saved(only_run(), _class_path="os.system")
        path = Path("copy.ckpt")
    message = mistake("fit", *(TINY if kind != "class" else TINY[2:]), "--ckpt_path", path)
    assert str(path) in message and not Path("touched").exists()


def test_a_checkpoint_that_is_not_there(mistake, trackpl):
    assert "no checkpoint gone.ckpt" in mistake("fit", *TINY, "--ckpt_path", "gone.ckpt")
    assert re.search("no checkpoint 'last' under runs/tiny", mistake("fit", *TINY, "--ckpt_path", "last"))
    fit(trackpl, epochs=1)
    gone = only_run() / "checkpoints/gone.ckpt"
    assert "in that folder: best.ckpt, last.ckpt" in mistake("fit", *TINY, "--ckpt_path", gone)


def test_last_means_the_newest_run_of_the_method(trackpl):
    for method, when in (("tiny", 1), ("tiny", 3), ("other_tiny", 5)):
        path = Path("runs", method, str(when), "checkpoints", "last.ckpt")
        path.parent.mkdir(parents=True)
        path.touch()
        os.utime(path, (when, when))
    assert runs.newest("last", "tiny", None).parent.parent.name == "3"
    assert runs.newest("last", None, None).parent.parent.name == "5"
    with pytest.raises(CheckpointError, match="no checkpoint 'best' under runs/tiny"):
        runs.newest("best", "tiny", None)


def test_a_resumed_fit_goes_on_in_its_folder_with_its_config(trackpl):
    args = ("--trainer.log_every_n_steps", "1", "--model.optimizer", SGD)
    fit(trackpl, *args, "--run_dir", "whole", epochs=4)
    fit(trackpl, *args, epochs=2)
    folder = only_run()
    done = trackpl("fit", "--ckpt_path", "last", "--trainer.max_epochs", "4")
    assert done.status == 0 and only_run() == folder
    assert "resumes" in done.err and "(step 16)" in done.err
    assert [int(r["step"]) for r in rows(folder)] == sorted(int(r["step"]) for r in rows(folder))
    assert losses(folder) == losses(Path("whole")) and len(losses(folder)) == 32
    assert yaml.safe_load((folder / "config.yaml").read_text())["trainer"]["max_epochs"] == 4
    assert yaml.safe_load((folder / "config.1.yaml").read_text())["trainer"]["max_epochs"] == 2
    last = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    assert last["global_step"] == 32 and last["trackpl"]["run"] == folder.name


def test_other_verbs_leave_the_checkpoints_run_alone(trackpl):
    fit(trackpl, epochs=1)
    folder = only_run()
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    for verb in ("validate", "test", "predict"):
        done = trackpl(verb, *TINY, "--ckpt_path", folder / "checkpoints/last.ckpt")
        assert done.status == 0, done.err
    assert before == {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    (predicted,) = Path("runs/tiny").glob("*-predict")
    assert {p.name for p in (predicted / "predictions").iterdir()} == {f"clip{i}.npz" for i in (1000, 1001, 1002)}


# Several processes ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_killed_at_any_moment_it_resumes_from_a_whole_checkpoint(site, trackpl, seed):
    args = [*TINY, "--trainer.max_epochs", "12", "--trainer.log_every_n_steps", "1", "--model.optimizer", SGD]
    assert trackpl("fit", *args, "--run_dir", "whole").status == 0
    killed = process(site, "fit", *args, "--model.wait", "0.02", "--checkpoints.every_n_steps", "1")
    deadline = time.monotonic() + 120
    while not list(Path("runs").glob("tiny/*/checkpoints/last.ckpt")) and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(random.Random(seed).uniform(0, 1))
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    folder = only_run()
    content = runs.read(folder / "checkpoints/last.ckpt")
    assert 0 < content["global_step"] < 96
    (folder / "checkpoints" / ".last.ckpt.1.tmp").write_bytes(b"half")
    done = trackpl("fit", "--ckpt_path", "last", "--model.wait", "0")
    assert done.status == 0, done.err
    resumed, whole = losses(folder), losses(Path("whole"))
    # Resuming in the middle of an epoch begins that epoch's data anew, until the streams can do better.
    before = {k: v for k, v in resumed.items() if k < content["global_step"]}
    assert before == {k: whole[k] for k in before}
    assert len(resumed) >= 95 and max(resumed) == max(whole)
    steps = [int(r["step"]) for r in rows(folder) if r["train/global"]]
    assert len(steps) == len(set(steps)) and steps == sorted(steps)
    assert not list((folder / "checkpoints").glob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "ddp_spawn"])
def test_two_processes_give_the_loss_curve_of_one(site, trackpl, strategy):
    args = [*TINY, "--trainer.max_epochs", "3", "--trainer.log_every_n_steps", "1", "--model.optimizer", SGD]
    assert trackpl("fit", *args, "--run_dir", "one").status == 0
    two = process(site, "fit", *args, "--run_dir", "two", "--trainer.devices", "2", "--trainer.strategy", strategy)
    out, err = two.communicate(timeout=240)
    assert two.returncode == 0, err
    one, both = losses(Path("one")), losses(Path("two"))
    assert one.keys() == both.keys() and len(one) == 24
    assert all(math.isclose(one[k], both[k], rel_tol=1e-5) for k in one)
    weights = [torch.load(Path(n, "checkpoints/last.ckpt"), weights_only=True)["state_dict"] for n in ("one", "two")]
    assert torch.allclose(weights[0]["shift"], weights[1]["shift"], atol=1e-6)
    scored = [[(r["step"], r["val/toy/videos"]) for r in rows(Path(n)) if r["val/toy/videos"]] for n in ("one", "two")]
    assert scored[0] == scored[1] and scored[0][0][1] == "3.0"
    assert out.count("trackpl track VIDEO") == 1
    table = list(csv.DictReader(Path("two/media/step_0000024_videos.csv").read_text().splitlines()))
    assert sorted(r["name"] for r in table) == ["clip1000", "clip1001", "clip1002"]
