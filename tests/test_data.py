import dataclasses
import subprocess
import sys

import lightning
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint

from trackpl import shards
from trackpl.augment import Augment
from trackpl.data import ShardDataModule
from trackpl.errors import DataError
from trackpl.order import Progress
from trackpl.shards import Sample, Shard
from trackpl.stream import EachOnce, TrainDraws
from trackpl.types import Clip, Flow

T, H, W = 6, 16, 24


def make_clip(i: int, frames: int = T, size=(H, W), points: int = 5) -> Clip:
    """Clip i; frame t of it is grey of 8 t, its tracks stand still."""
    video = (torch.arange(frames, dtype=torch.uint8) * 8)[None, :, None, None, None].expand(1, frames, 3, *size)
    tracks = torch.full((1, frames, points, 2), 4.0) + torch.arange(points)[:, None]
    seen = torch.ones(1, frames, points, dtype=torch.bool)
    seen[..., 0] = False
    flow = Flow(torch.zeros(1, 1, 2, *size), ((0, frames - 1),))
    return Clip(video.clone(), tracks, seen, torch.ones_like(seen), flow=flow, name=(f"clip-{i}",), fps=24.0)


def make_set(folder, clips):
    return shards.write_shards(
        folder, "set", ((f"{i:03d}", shards.encode(c)) for i, c in enumerate(clips)), samples_per_shard=4
    )


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return str(make_set(tmp_path_factory.mktemp("set"), map(make_clip, range(10))))


def module(path, **options) -> ShardDataModule:
    return ShardDataModule(**({"train": path, "val": {"a": path}, "workers": 0, "batch_size": 2} | options))


def fingerprint(batches) -> list:
    return [(b.name, b.seeds.tolist(), b.video.float().mean((2, 3, 4)).tolist()) for b in batches]


# Order -----------------------------------------------------------------------------------------------------------


def fake(count: int, per_shard: int = 4) -> list[Sample]:
    return [Sample(Shard(f"{i // per_shard}.tar", 1, ""), f"{i}", 6, {}, 0, 0) for i in range(count)]


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 40), steps=st.integers(1, 12), batch=st.integers(1, 4), world=st.integers(1, 9),
    seed=st.integers(0, 2**31), per_shard=st.integers(1, 9), window=st.integers(1, 5), clips=st.integers(1, 3),
)  # fmt: skip
def test_all_ranks_together_go_through_the_samples_in_whole_passes(
    count, steps, batch, world, seed, per_shard, window, clips
):
    sets, progress = [fake(count, per_shard)], Progress(steps, batch * world)

    def drawn(batch, world):
        ranks = [TrainDraws(sets, [1.0], seed, steps, batch, r, world, clips, window) for r in range(world)]
        return [d for e in range(3) for s in range(steps) for r in ranks for d in r.batch(progress.first(e, s))]

    draws = drawn(batch, world)
    assert [d.number for d in draws] == list(range(3 * steps * batch * world))
    every = sorted((s.key, c) for s in sets[0] for c in range(clips))
    for first in range(0, len(draws) - len(every) + 1, len(every)):
        assert sorted((d.sample.key, d.clip) for d in draws[first : first + len(every)]) == every
    assert draws == drawn(batch * world, 1)  # one process with the joint batch


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 60), batch=st.integers(1, 5), world=st.integers(1, 70))
def test_validation_covers_each_sample_once(count, batch, world):
    ranks = [list(EachOnce(fake(count), batch, r, world)) for r in range(world)]
    assert sorted(int(d.sample.key) for rank in ranks for d in rank) == list(range(count))
    assert max(map(len, ranks)) - min(map(len, ranks)) <= 1


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_workers_change_nothing(path, workers):
    here = list(module(path).train_dataloader())
    there = list(module(path, workers=workers).train_dataloader())
    assert len(here) == len(module(path).train_dataloader()) == 5
    assert fingerprint(here) == fingerprint(there)
    val, val_there = (list(module(path, workers=w).val_dataloader()[0]) for w in (0, workers))
    assert [b.name for b in val] == [b.name for b in val_there] == [(f"clip-{i}",) for i in range(10)]


def test_epochs_and_seeds_differ_and_repeat(path):
    loader = module(path, steps_per_epoch=5).train_dataloader()
    epochs = []
    for epoch in (0, 1, 0):
        loader.before = lambda epoch=epoch: loader.dataset.draws.begin(Progress(5, 2), epoch, 0)
        epochs.append(fingerprint(loader))
    assert epochs[0] == epochs[2] != epochs[1]
    assert fingerprint(module(path, seed=1).train_dataloader()) != epochs[0]


SPAWN = """
import sys, torch
from trackpl.data import ShardDataModule
if __name__ == "__main__":
    torch.multiprocessing.set_start_method("spawn")
    loader = ShardDataModule(train=sys.argv[1], val={}, workers=2, batch_size=2).train_dataloader()
    print([(b.name, b.seeds.tolist()) for _ in range(2) for b in loader])
"""


@pytest.mark.slow
def test_spawned_workers_change_nothing(path, tmp_path):
    script = tmp_path / "spawn.py"
    script.write_text(SPAWN)
    there = subprocess.run([sys.executable, script, path], capture_output=True, text=True, check=True).stdout
    here = [(b.name, b.seeds.tolist()) for b in module(path).train_dataloader()]
    assert there.strip() == str(here * 2)


# Clips -----------------------------------------------------------------------------------------------------------


def test_training_clips_have_length_stride_and_random_starts(path):
    loader = module(path, frames=3, stride=2, steps_per_epoch=20).train_dataloader()
    levels = torch.cat([b.video[:, :, 0, 8, 8] for b in loader]).int()  # frame t is grey of 8 t
    starts = (levels[:, 0] / 8).round()
    assert set(starts.tolist()) == {0, 1}
    assert ((levels[:, 1:] - levels[:, :-1] - 16).abs() <= 2).all()


def test_validation_has_whole_clips_and_their_flow(path):
    batch = next(iter(module(path).val_dataloader()[0]))
    assert type(batch) is Clip and batch.video.shape == (1, T, 3, H, W)
    assert batch.flow is not None and batch.flow.pairs == ((0, T - 1),)
    short = next(iter(module(path, val_frames=3, val_size=(8, 6)).val_dataloader()[0]))
    assert short.video.shape == (1, 3, 3, 8, 6) and short.video.dtype == torch.uint8
    assert torch.allclose(short.tracks[0, 0, 1], torch.tensor([5 * 6 / 24, 5 * 8 / 16]))


@pytest.mark.parametrize("points", [2, 4, 9])
def test_points_are_those_seen_then_others_then_none(path, points):
    batch = next(iter(module(path, points=points).train_dataloader()))
    assert batch.tracks.shape == (2, 2, points, 2)
    real = batch.valid.all(1)
    assert (real.sum(1) == min(points, 5)).all()
    assert (batch.visible.all(1).sum(1) == min(points, 4)).all()
    assert not batch.visible[~batch.valid].any() and not batch.tracks[~batch.valid].any()


def test_clips_of_several_sizes_are_cut_to_one(tmp_path):
    sizes = [(16, 24), (40, 20), (9, 50), (12, 12)]
    path = make_set(tmp_path, [make_clip(i, size=s) for i, s in enumerate(sizes)])
    for batch in module(str(path), size=(12, 14), batch_size=4, steps_per_epoch=3).train_dataloader():
        assert batch.video.shape == (4, 2, 3, 12, 14) and batch.video.dtype == torch.uint8
    with pytest.raises(DataError, match="do not fit into one batch"):
        next(iter(module(str(path), batch_size=4).train_dataloader()))


def test_short_samples_are_left_out(tmp_path):
    path = make_set(tmp_path, [make_clip(i, frames=2 + i) for i in range(6)])
    loader = module(str(path), frames=4, steps_per_epoch=9).train_dataloader()
    assert {n for b in loader for n in b.name} == {"clip-2", "clip-3", "clip-4", "clip-5"}
    with pytest.raises(DataError, match="has the 9 frames"):
        module(str(path), frames=9).train_dataloader()


def test_only_wanted_fields_come(path):
    batch = next(iter(module(path, fields=["video"]).train_dataloader()))
    assert batch.tracks is None and batch.flow is None


# Mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_sample_is_named_in_one_line(tmp_path, workers):
    path = make_set(tmp_path, map(make_clip, range(6)))
    shard = tmp_path / "set-000001.tar"
    sample = shards.read_index(path).samples[4]
    content = bytearray(shard.read_bytes())
    offset, size = sample.members["rgb.bin"]
    content[offset : offset + size] = bytes(size)
    shard.write_bytes(content)
    with pytest.raises(DataError) as error:
        list(module(str(path), workers=workers).val_dataloader()[0])
    assert "004" in str(error.value) and "rgb.bin" in str(error.value) and "\n" not in str(error.value)


def test_mistakes_are_told(path, tmp_path):
    with pytest.raises(DataError, match="nothing to train on"):
        module(None).train_dataloader()
    with pytest.raises(DataError, match="cannot be read"):
        module(str(tmp_path / "gone")).train_dataloader()
    with pytest.raises(DataError, match=r"must hold one \*\.index\.json"):
        module(str(tmp_path)).train_dataloader()
    with pytest.raises(DataError, match="batch_size must be at least 1"):
        module(path, batch_size=0)
    with pytest.raises(DataError, match="did you mean 'tracks'"):
        module(path, fields=["track"])


# With a trainer --------------------------------------------------------------------------------------------------


class Recorder(lightning.LightningModule):
    """Notes the clips that its steps see."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list = []
        self.validated: list = []

    def training_step(self, clip, batch_idx):
        assert type(clip) is Clip
        self.seen.append((self.current_epoch, clip.name, clip.video.float().sum().item(), clip.tracks.sum().item()))
        return self.weight * 1

    def validation_step(self, clip, batch_idx, dataloader_idx=0):
        names = self.trainer.datamodule.benchmarks
        self.validated.append((names[dataloader_idx], clip.name[0], clip.video.dtype))

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def trainer(folder, epochs: int = 1, **options) -> lightning.Trainer:
    saver = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1)
    return lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[saver], num_sanity_val_steps=0, **options,
    )  # fmt: skip


AUGMENT = {"horizontal_flip": 0.5, "size": (12, 16), "noise": 0.1}


@pytest.mark.filterwarnings("error:You're resuming from a checkpoint")
@pytest.mark.parametrize(("step", "workers", "again"), [(3, 0, 1), (4, 1, 0), (2, 2, 1)])
def test_a_resumed_run_sees_what_the_whole_run_would_have(path, tmp_path, step, workers, again):
    def fit(workers, checkpoint=None):
        data = module(path, val={}, steps_per_epoch=3, workers=workers, augment=Augment(**AUGMENT))
        model = Recorder()
        trainer(tmp_path, 3).fit(model, data, ckpt_path=checkpoint)
        return model.seen

    whole = fit(workers)
    assert [epoch for epoch, *_ in whole] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert fit(again, tmp_path / f"step={step}.ckpt") == whole[step:]


def test_augmentation_is_for_training_only(path, tmp_path):
    data = module(path, val={"a": path, "b": path}, test={"c": path}, augment=Augment(**AUGMENT), steps_per_epoch=2)
    model, run = Recorder(), trainer(tmp_path)
    run.fit(model, data)
    assert len(model.seen) == 2
    clips = [f"clip-{i}" for i in range(10)]
    assert model.validated == [(b, c, torch.uint8) for b in "ab" for c in clips]
    model.validated.clear()
    run.test(model, data, verbose=False)
    assert model.validated == [("c", c, torch.uint8) for c in clips]
    model.validated.clear()
    run.validate(model, data, verbose=False)
    assert [b for b, *_ in model.validated] == ["a"] * 10 + ["b"] * 10


@dataclasses.dataclass
class Place:
    """What the data module asks of a trainer."""

    global_rank: int
    world_size: int
    training: bool = False
    current_epoch: int = 0


def test_ranks_come_from_the_trainer(path):
    names, val = [], []
    for rank in range(3):
        data = module(path, batch_size=1, workers=2)
        data.trainer = Place(rank, 3)
        loader = data.train_dataloader()
        names.append([b.name[0] for b in loader])
        val += [b.name[0] for b in data.val_dataloader()[0]]
        assert len(loader) == len(names[-1]) == 3
    assert len({n for rank in names for n in rank}) == 9
    assert sorted(val) == [f"clip-{i}" for i in range(10)]
    data.trainer = Place(0, 11)
    with pytest.raises(DataError, match="too few for 11 processes"):
        data.val_dataloader()


def test_a_bare_path_of_the_synthetic_set_is_made_on_demand(path, monkeypatch):
    import types

    asked = []
    fake = types.SimpleNamespace(default_set=lambda split: asked.append(split) or path)
    monkeypatch.setitem(sys.modules, "trackpl_prep.synthetic", fake)
    data = ShardDataModule(workers=0)
    data.prepare_data()
    assert asked == ["train", "val", "val"]
    assert next(iter(data.train_dataloader())).video.shape == (4, 2, 3, H, W)
    assert data.benchmarks == ("synthetic",)
