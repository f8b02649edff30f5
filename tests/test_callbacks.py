import csv
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from tiny import clip
from tiny_site import TINY, fit, only_run, process, rows

from trackpl import callbacks, logs, media, reports, runs
from trackpl.errors import CheckpointError
from trackpl.types import Clip, Flow, Tracks

pytest_plugins = ["tiny_site"]
pytestmark = pytest.mark.usefixtures("work")

# metrics.csv ------------------------------------------------------------------------------------------------------


def test_rows_are_appended_and_a_new_column_keeps_the_old_rows(tmp_path):
    logger = logs.CsvLogger(tmp_path / "run")
    logger.log_metrics({"loss": 1.0, "epoch": 0}, 0)
    inode = (tmp_path / "run/metrics.csv").stat().st_ino
    logger.log_metrics({"loss": 2.0, "epoch": 0}, 1)
    assert (tmp_path / "run/metrics.csv").stat().st_ino == inode
    logger.log_metrics({"val/AJ": torch.tensor(3.0), "epoch": 0}, 1)
    found = rows(tmp_path / "run")
    assert [r["step"] for r in found] == ["1", "2", "2"]
    assert [r["loss"] for r in found] == ["1.0", "2.0", ""] and found[2]["val/AJ"] == "3.0"


def test_a_resumed_run_drops_rows_after_its_checkpoint_and_a_line_cut_off(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,epoch,loss\n1,0,1.0\n2,0,2.0\n3,0,3.0\n4,0,4")
    logger = logs.CsvLogger(tmp_path, done=2)
    logger.log_metrics({"loss": 9.0, "epoch": 0}, 2)
    assert [(r["step"], r["loss"]) for r in rows(tmp_path)] == [("1", "1.0"), ("2", "2.0"), ("3", "9.0")]


def test_another_rank_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(logs.rank_zero_only, "rank", 1)
    logs.CsvLogger(tmp_path / "run").log_metrics({"loss": 1.0}, 0)
    assert not (tmp_path / "run").exists()


# Checkpoint files -------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_written_beside_and_put_in_place(tmp_path, monkeypatch):
    path = tmp_path / "checkpoints/last.ckpt"
    files = runs.CheckpointFiles()
    files.save_checkpoint({"step": 1}, path)
    seen = []
    replace = os.replace

    def watch(source, target):
        seen.append((Path(source).parent, files.load_checkpoint(source), files.load_checkpoint(target)))
        replace(source, target)

    monkeypatch.setattr(os, "replace", watch)
    files.save_checkpoint({"step": 2}, path)
    assert seen == [(path.parent, {"step": 2}, {"step": 1})]
    assert files.load_checkpoint(path) == {"step": 2} and len(list(path.parent.iterdir())) == 1


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path, files = tmp_path / "last.ckpt", runs.CheckpointFiles()
    files.save_checkpoint({"step": 1}, path)
    with pytest.raises(Exception, match="pickle"):
        files.save_checkpoint({"step": lambda: None}, path)
    assert files.load_checkpoint(path) == {"step": 1} and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("length", [0, 10, 400, -1])
def test_a_part_of_a_checkpoint_is_never_taken_for_one(tmp_path, length):
    path, files = tmp_path / "last.ckpt", runs.CheckpointFiles()
    files.save_checkpoint({"step": 1, "x": torch.zeros(100)}, path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CheckpointError, match=r"last\.ckpt cannot be read"):
        files.load_checkpoint(path)


# Which checkpoint is best -----------------------------------------------------------------------------------------


class Recorder:
    """As much of a trainer as the callback asks for."""

    def __init__(self, folder):
        self.global_step, self.callback_metrics, self.saved = 0, {}, []
        self.sanity_checking, self.is_last_batch = False, False
        self.state = SimpleNamespace(fn="fit")
        self.folder = folder

    def save_checkpoint(self, path):
        self.saved.append((self.global_step, Path(path).name))


def validated(callback, trainer, **figures):
    trainer.global_step += 1
    trainer.callback_metrics = figures
    callback.on_validation_end(trainer, None)


@pytest.mark.parametrize(
    "key, values, best",
    [("val/toy/AJ", [1, 3, 2, math.nan], 2), ("val/toy/EPE", [3, 1, 2, math.nan], 2), ("val/x", [1, 2], None)],
)
def test_the_best_is_kept_by_the_figure_that_validation_has(tmp_path, key, values, best):
    callback, trainer = callbacks.Checkpoints(), Recorder(tmp_path)
    callback.folder = tmp_path
    for value in values:
        validated(callback, trainer, **{key: torch.tensor(float(value)), "train/loss": torch.tensor(1.0)})
    assert callback.best_step == best
    assert max([step for step, name in trainer.saved if name == "best.ckpt"], default=None) == best
    assert [step for step, name in trainer.saved if name == "last.ckpt"] == list(range(1, len(values) + 1))


def test_which_is_best_survives_a_resume(tmp_path):
    first, trainer = callbacks.Checkpoints(), Recorder(tmp_path)
    first.folder = tmp_path
    validated(first, trainer, **{"val/toy/AJ": torch.tensor(5.0)})
    second = callbacks.Checkpoints()
    second.folder = tmp_path
    second.load_state_dict(first.state_dict())
    validated(second, trainer, **{"val/toy/AJ": torch.tensor(4.0)})
    assert second.best == 5 and trainer.saved[-1][1] == "last.ckpt"
    other = callbacks.Checkpoints(monitor="val/toy/OA")
    other.load_state_dict(first.state_dict())
    assert other.best is None and other.monitor == "val/toy/OA"


def test_the_last_is_saved_every_n_steps_and_at_the_end(tmp_path):
    callback, trainer = callbacks.Checkpoints(every_n_steps=3), Recorder(tmp_path)
    callback.folder = tmp_path
    for _ in range(7):
        trainer.global_step += 1
        callback.on_train_batch_end(trainer, None, None, None, 0)
    callback.on_train_end(trainer, None)
    callback.on_train_end(trainer, None)
    assert trainer.saved == [(3, "last.ckpt"), (6, "last.ckpt"), (7, "last.ckpt")]


# Progress ---------------------------------------------------------------------------------------------------------


def test_lines_tell_step_speed_time_and_loss_and_the_figures_of_validation(trackpl):
    done = fit(trackpl, "--progress.every", "0", "--trainer.log_every_n_steps", "1")
    lines = done.err.splitlines()
    assert lines[0].startswith("trackpl fit: tiny, 2 parameters, 1 x cpu, runs/tiny/")
    assert any(line.startswith("step 8/16: ") and "clips/s, ETA 0:0" in line and "loss " in line for line in lines)
    assert any(line.startswith("step 16: val/toy AJ ") and "EPE_visible" in line for line in lines)


def test_few_lines_without_a_terminal(trackpl):
    done = fit(trackpl)
    assert len(done.err.splitlines()) <= 6, done.err


def test_no_progress_when_it_is_switched_off(trackpl):
    done = fit(trackpl, "--trainer.enable_progress_bar", "false")
    assert len(done.err.splitlines()) == 1


def test_a_bar_on_a_terminal(trackpl, monkeypatch, capsys):
    class Terminal:
        def __init__(self):
            self.text = ""

        def write(self, text):
            self.text += text

        def flush(self):
            pass

        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    fit(trackpl)
    assert "100%|" in terminal.text and "16/16 steps" in terminal.text and "clips/s" in terminal.text
    assert "step 8: val/toy AJ" in terminal.text


@pytest.mark.parametrize("seconds, text", [(0, "0:00"), (61.6, "1:02"), (3723, "1:02:03"), (-1, "0:00")])
def test_clock(seconds, text):
    assert callbacks.clock(seconds) == text


# The final table --------------------------------------------------------------------------------------------------


def test_the_table_compares_with_zero_motion():
    figures = {"val/toy/AJ": 12.5, "val/toy/EPE_visible": 1.0, "val/toy/EPE_zero_visible": 4.0, "train/loss": 1.0}
    text = reports.table(figures, "val")
    assert "AJ" in text and "12.5" in text and "train" not in text
    assert "error of visible pixels: 1 px, zero motion scores 4 px (25%)" in text
    assert reports.table({"train/loss": 1.0}, "val") == ""


# Pictures ---------------------------------------------------------------------------------------------------------


def outputs_of(batch, shift, rows=()):
    t = torch.arange(batch.frames)[None, :, None, None]
    queries = torch.cat([torch.zeros_like(batch.tracks[:, 0, :, :1]), batch.tracks[:, 0]], -1)
    tracks = Tracks(batch.tracks[:, :1] + t * shift, torch.ones(batch.tracks.shape[:-1]))
    flow = Flow(torch.zeros_like(batch.flow.xy), batch.flow.pairs)
    return {
        "benchmark": "toy/first",
        "clip": batch,
        "queries": queries,
        "tracks": tracks,
        "flow": flow,
        "rows": [*rows],
    }


def trainer_at(step, *loggers):
    return SimpleNamespace(sanity_checking=False, is_global_zero=True, global_step=step, loggers=[*loggers])


def test_the_worst_clips_are_drawn_first(tmp_path):
    callback, trainer = media.Media(clips=2), trainer_at(12)
    callback.folder = tmp_path
    scores = {0: 50.0, 1: 10.0, 2: 30.0, 3: math.nan}
    for pair in ((0, 1), (2, 3)):
        batch = Clip.cat([clip(i) for i in pair])
        table = [{"name": batch.name[i], "AJ": scores[index]} for i, index in enumerate(pair)]
        callback.on_validation_batch_end(trainer, None, outputs_of(batch, 1.0, table), batch, 0)
    kept = callback._seen["toy/first"].worst
    assert [v.badness for v in kept] == [-10.0, -30.0]
    assert torch.equal(kept[0].video, clip(1).video[0])
    callback.on_validation_end(trainer, None)
    names = {p.name for p in tmp_path.iterdir()}
    pictures = {f"step_0000012_toy_first_{k}_{kind}.png" for k in (0, 1) for kind in ("tracks", "flow")}
    assert names == pictures | {"step_0000012_videos.csv"}
    with open(tmp_path / "step_0000012_videos.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [r["name"] for r in table] == ["clip0", "clip1", "clip2", "clip3"] and table[1]["AJ"] == "10.0"
    assert not callback._seen


def test_without_tracks_the_error_of_the_flow_tells_the_worst(tmp_path):
    callback, trainer = media.Media(clips=1), trainer_at(1)
    callback.folder = tmp_path
    shifts = [float(clip(i).flow.xy[0, 0, :, 0, 0].norm()) for i in range(6)]
    for i in range(6):
        batch = clip(i)
        callback.on_validation_batch_end(trainer, None, {**outputs_of(batch, 0.0), "tracks": None}, batch, i)
    (worst,) = callback._seen["toy/first"].worst
    assert worst.badness == pytest.approx(max(shifts)) and worst.tracks is None
    callback.on_validation_end(trainer, None)
    assert [p.name for p in tmp_path.iterdir()] == ["step_0000001_toy_first_0_flow.png"]


def test_no_pictures_are_drawn_when_none_are_wanted(tmp_path):
    callback = media.Media(clips=0)
    callback.folder = tmp_path
    callback.on_validation_batch_end(
        trainer_at(1), None, outputs_of(clip(0), 1.0, [{"name": "a", "AJ": 1.0}]), clip(0), 0
    )
    callback.on_validation_end(trainer_at(1), None)
    assert [p.name for p in tmp_path.iterdir()] == ["step_0000001_videos.csv"]


# Predictions ------------------------------------------------------------------------------------------------------


def test_predictions_are_written_one_file_a_video(tmp_path):
    batch = Clip.cat([clip(0), clip(1)])
    out = outputs_of(batch, 1.0)
    callbacks.Predictions(tmp_path / "p").on_predict_batch_end(trainer_at(0), None, out, batch, 0)
    with np.load(tmp_path / "p/clip1.npz") as file:
        assert file["xy"].shape == (3, 8, 2) and file["visible"].shape == (3, 8) and file["queries"].shape == (8, 3)
        assert np.allclose(file["xy"], out["tracks"].xy[1])
    assert {p.name for p in (tmp_path / "p").iterdir()} == {"clip0.npz", "clip1.npz"}


# W&B --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def clean(monkeypatch, tmp_path):
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr(logs.importlib.util, "find_spec", lambda name: object())
    return tmp_path


def test_wandb_is_online_only_for_who_is_logged_in(clean, monkeypatch):
    assert logs.wandb_mode() == "offline"
    (clean / "netrc").write_text("machine api.wandb.ai login user password abc\n")
    assert logs.wandb_mode() == "online"
    (clean / "netrc").write_text("nonsense ((")
    assert logs.wandb_mode() == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert logs.wandb_mode() == "online"
    for said, meant in (("disabled", "disabled"), ("offline", "offline"), ("dryrun", "offline"), ("online", "online")):
        monkeypatch.setenv("WANDB_MODE", said)
        assert logs.wandb_mode() == meant


def test_wandb_is_disabled_where_it_is_not_installed(clean, monkeypatch):
    monkeypatch.setattr(logs.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert logs.wandb_mode() == "disabled"


class Run:
    """What `wandb.init` returns, as far as we use it."""

    def __init__(self):
        self.metrics, self.logged, self.finished = {}, [], False

    def define_metric(self, name, step_metric=None, summary=None):
        self.metrics[name] = summary

    def log(self, values):
        self.logged.append(values)

    def finish(self, exit_code=0):
        self.finished = exit_code == 0


@pytest.fixture
def wandb(monkeypatch):
    fake = SimpleNamespace(
        begun=[], runs=[], Settings=lambda **k: k, Image=str, Table=lambda columns, data: (columns, data)
    )

    def init(**kwargs):
        fake.begun.append(kwargs)
        fake.runs.append(Run())
        return fake.runs[-1]

    fake.init = init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_wandb_gets_id_config_once_and_the_best_as_summary(wandb, tmp_path):
    logger = logs.WandbLogger(tmp_path, "id7", "tiny", "fit", {"model": "tiny"}, "online")
    assert not wandb.begun
    logger.log_metrics({"train/loss": 1.0, "val/toy/AJ": 2.0, "val/toy/EPE": 3.0}, 0)
    logger.log_metrics({"train/loss": 0.5}, 1)
    logger.finalize("success")
    logger.log_metrics({"train/loss": 0.1}, 2)
    (begun,), (run,) = wandb.begun, wandb.runs
    assert (begun["id"], begun["resume"], begun["config"]) == ("id7", "allow", {"model": "tiny"})
    assert run.metrics["val/toy/AJ"] == "max" and run.metrics["val/toy/EPE"] == run.metrics["train/loss"] == "min"
    assert [r["step"] for r in run.logged] == [1, 2] and run.finished


def test_wandb_gets_pictures_and_a_table_with_a_row_per_video(wandb, tmp_path):
    logger = logs.WandbLogger(tmp_path, "id7", "tiny", "fit", {}, "offline")
    callback = media.Media(clips=1)
    callback.folder = tmp_path / "media"
    batch = clip(0)
    trainer = trainer_at(5, logger)
    callback.on_validation_batch_end(trainer, None, outputs_of(batch, 1.0, [{"name": "clip0", "AJ": 1.0}]), batch, 0)
    callback.on_validation_end(trainer, None)
    (logged,) = wandb.runs[0].logged
    assert logged["videos"] == (["benchmark", "name", "AJ"], [["toy/first", "clip0", 1.0]]) and logged["step"] == 5
    assert Path(logged["media/toy/first/0_tracks"]).is_file()


def test_training_goes_on_when_wandb_cannot_begin(wandb, tmp_path, capsys):
    def fail(**kwargs):
        raise OSError("no\nnetwork")

    wandb.init = fail
    logger = logs.WandbLogger(tmp_path, "id7", "tiny", "fit", {}, "online")
    logger.log_metrics({"loss": 1.0}, 0)
    logger.log_metrics({"loss": 1.0}, 1)
    logger.finalize("success")
    assert capsys.readouterr().err == "trackpl: goes on without W&B: OSError: no network\n"


def test_another_rank_does_not_begin_wandb(wandb, tmp_path, monkeypatch):
    monkeypatch.setattr(logs.rank_zero_only, "rank", 1)
    logger = logs.WandbLogger(tmp_path, "id7", "tiny", "fit", {}, "online")
    logger.log_metrics({"loss": 1.0}, 0)
    assert not wandb.begun


@pytest.mark.slow
def test_without_wandb_nothing_breaks(site, tmp_path):
    block = "import sys; sys.modules['wandb'] = None; from trackpl.cli import main; sys.exit(main(sys.argv[1:]))"
    done = process(site, "fit", *TINY, "--trainer.max_epochs", "1", code=block, wandb="")
    out, err = done.communicate(timeout=120)
    assert done.returncode == 0, err
    assert "trackpl track VIDEO" in out and "wandb" not in (out + err).lower()
    assert not (only_run() / "wandb").exists()


@pytest.mark.slow
def test_offline_there_is_one_wandb_run_and_the_line_to_upload_it(site, tmp_path):
    pytest.importorskip("wandb")
    args = ["fit", *TINY, "--trainer.max_epochs", "1", "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    done = process(site, *args, wandb="offline")
    out, err = done.communicate(timeout=240)
    assert done.returncode == 0, err
    (offline,) = logs.offline_runs(only_run())
    assert offline.name.endswith(only_run().name)
    assert f"wandb sync {only_run()}/wandb/offline-run-*" in out
    assert len(err.splitlines()) < 12, err
    again = process(site, "fit", "--ckpt_path", "last", "--trainer.max_epochs", "2", wandb="offline")
    out, err = again.communicate(timeout=240)
    assert again.returncode == 0, err
    assert {p.name.split("-", 3)[-1] for p in logs.offline_runs(only_run())} == {only_run().name}


def test_the_config_is_written_as_plain_yaml(tmp_path):
    trainer = SimpleNamespace(is_global_zero=True)
    callback = callbacks.RunFolder(tmp_path, "id", {"model": {"class_path": "a.B", "init_args": {"x": 1}}})
    callback.setup(trainer, None, "fit")
    callback.setup(trainer, None, "fit")
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == callback.config
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]
    checkpoint = {}
    callback.on_save_checkpoint(trainer, None, checkpoint)
    assert checkpoint["hyper_parameters"] == {"_class_path": "a.B", "x": 1}
    assert checkpoint["trackpl"] == {"run": "id", "config": callback.config}
