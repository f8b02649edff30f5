"""The exact stream: order over ranks and workers, resuming, mixtures, broken samples, shards from elsewhere."""

import dataclasses
import itertools
import logging
import os
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from flaky_server import at_random, serve
from hypothesis import given, settings
from hypothesis import strategies as st

from trackpl import shards
from trackpl.augment import Augment
from trackpl.data import ShardDataModule
from trackpl.errors import DataError, UnreachableError
from trackpl.order import CYCLE, Mixture, Progress, batch_of, permutation, share_of, steps_of
from trackpl.types import Clip

T, H, W = 6, 16, 24


def make_clip(i: int, frames: int = T, size=(H, W), noise: bool = False) -> Clip:
    generator = torch.Generator().manual_seed(i)
    level = torch.arange(frames, dtype=torch.uint8)[None, :, None, None, None] * 8
    video = level.expand(1, frames, 3, *size).clone()
    if noise:
        video = torch.randint(256, video.shape, generator=generator, dtype=torch.uint8)
    tracks = torch.rand(1, frames, 5, 2, generator=generator) * torch.tensor([size[1], size[0]])
    seen = torch.ones(1, frames, 5, dtype=torch.bool)
    return Clip(video, tracks, seen, seen.clone(), name=(f"{i:03d}",))


def make_set(folder, count, first=0, per_shard=4, **options):
    samples = ((f"{i:03d}", shards.encode(make_clip(i, **options))) for i in range(first, first + count))
    return shards.write_shards(folder, "set", samples, samples_per_shard=per_shard)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return str(make_set(tmp_path_factory.mktemp("set"), 22))


class Trainer:
    """What the data module asks of a trainer, at a place in a run."""

    training = True

    def __init__(self, rank=0, world=1, epoch=0, step=0):
        self.global_rank, self.world_size, self.current_epoch = rank, world, epoch
        progress = SimpleNamespace(current=SimpleNamespace(ready=step))
        self.fit_loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress))


def module(path, trainer=None, **options) -> ShardDataModule:
    data = ShardDataModule(**({"train": path, "val": {"a": path}, "workers": 0, "batch_size": 2} | options))
    data.trainer = trainer or Trainer()
    return data


def keys(loader) -> list[tuple[str, ...]]:
    return [b.name for b in loader]


# Order ----------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 20), min_size=1, max_size=40), window=st.integers(1, 20), seed=st.integers(0, 2**40)
)
def test_a_pass_is_a_permutation_that_stays_in_its_windows(sizes, window, seed):
    order = permutation(sizes, seed, 3, window)
    assert sorted(order) == list(range(sum(sizes)))
    shard = np.repeat(np.arange(len(sizes)), sizes)[order]
    seen = list(dict.fromkeys(shard))  # shards in the order in which they are begun
    place = {s: seen.index(s) // window for s in seen}
    windows = [place[s] for s in shard]
    assert all(len(list(g)) == sum(sizes[s] for s in seen if place[s] == w) for w, g in itertools.groupby(windows))


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=30), world=st.integers(1, 1024), batch=st.integers(1, 5),
    steps=st.integers(1, 4), workers=st.integers(1, 16), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_any_number_of_ranks_and_workers_share_without_overlap(sizes, world, batch, steps, workers, seed):
    progress, count = Progress(steps, batch * world), sum(sizes)
    draws = []
    for epoch, step in itertools.product(range(2), range(steps)):
        worker = [w for w in range(workers) if step in steps_of(range(steps), w, workers)]
        assert worker == [step % workers]  # each step belongs to one worker
        parts = [batch_of(progress.first(epoch, step), rank, batch) for rank in range(world)]
        assert all(len(p) == batch for p in parts)
        draws += [d for p in parts for d in p]
    assert draws == list(range(2 * steps * batch * world))  # every draw exactly once, in the order of the steps
    passes = [permutation(sizes, seed, p, 4)[i] for p, i in (divmod(d, count) for d in draws[: 2 * count])]
    for first in range(0, len(passes) - count + 1, count):
        assert sorted(passes[first : first + count]) == list(range(count))
    shares = [share_of(count, rank, world) for rank in range(world)]
    assert sorted(i for s in shares for i in s) == list(range(count))


@settings(max_examples=60, deadline=None)
@given(weights=st.lists(st.floats(1e-4, 1e4), min_size=1, max_size=12), seed=st.integers(0, 2**31))
def test_a_mixture_keeps_its_shares_in_every_cycle(weights, seed):
    mixture = Mixture(weights, seed)
    draws = [mixture[d] for d in range(2 * CYCLE)]
    for which, weight in enumerate(weights):
        mine = [n for w, n in draws if w == which]
        assert mine == list(range(len(mine)))  # the set's own draws, one after the other
        share = len(mine) / (2 * CYCLE)
        assert share >= 1 / CYCLE
        assert abs(share - weight / sum(weights)) <= len(weights) / CYCLE
    again = Mixture(weights, seed)
    assert [again[d] for d in (1999, 3, 1000, 0)] == [draws[d] for d in (1999, 3, 1000, 0)]


@pytest.mark.parametrize("weights", [[], [0.0], [1.0, -1.0], [float("nan")], [float("inf"), 1.0]])
def test_weights_are_checked(weights):
    with pytest.raises(DataError, match="numbers above 0"):
        Mixture(weights, 0)


def test_a_mixture_trains_on_its_sets_in_their_shares(tmp_path):
    a, b = make_set(tmp_path / "a", 5), make_set(tmp_path / "b", 7, first=100)
    mixture = {str(a): 3.0, str(b): 1.0}
    names = [n for b in keys(module(mixture, steps_per_epoch=500).train_dataloader()) for n in b]
    assert len(names) == 1000 and sum(n < "100" for n in names) == 750
    ours = [n for n in names if n < "100"]
    assert all(sorted(ours[i : i + 5]) == [f"{k:03d}" for k in range(5)] for i in range(0, 750, 5))


# Ranks, workers and the way they are started ---------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("start", ["fork", "spawn", "forkserver"])
def test_two_ranks_of_two_workers_share_everything(path, start):
    whole = keys(module(path, steps_per_epoch=11, batch_size=2).train_dataloader())
    seen, scored = [], []
    for rank in range(2):
        data = module(path, Trainer(rank, 2), batch_size=1, steps_per_epoch=11, workers=2, worker_start=start)
        seen.append([n for b in keys(data.train_dataloader()) for n in b])
        scored += [n for b in keys(data.val_dataloader()[0]) for n in b]
    assert sorted(scored) == [f"{i:03d}" for i in range(22)]
    assert list(zip(*seen, strict=True)) == whole and len({n for r in seen for n in r}) == 22


AUGMENT = {"horizontal_flip": 0.5, "size": (12, 16), "noise": 0.1, "hue": 0.1}


def run(path, rank, world, workers, start=0, steps=6, epochs=2):
    """Names and augmented tensors of the steps from number `start` on."""
    out = []
    for number in range(start // steps, epochs):
        first = start % steps if number == start // steps else 0
        data = module(
            path, Trainer(rank, world, number, first), workers=workers, steps_per_epoch=steps,
            augment=Augment(**AUGMENT), points=3, frames=3,
        )  # fmt: skip
        for batch in data.train_dataloader():
            clip = data.on_after_batch_transfer(batch, 0)
            out.append((clip.name, clip.video, clip.tracks, clip.visible))
    return out


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_a_run_goes_on_anywhere_with_any_workers(path, seed):
    chance = random.Random(seed)
    world, step, workers, again = chance.choice([1, 2]), chance.randrange(12), *(chance.randint(1, 4) for _ in "ab")
    for rank in range(world):
        whole = run(path, rank, world, workers)
        rest = run(path, rank, world, again, start=step)
        assert len(whole) == 12 and len(rest) == 12 - step
        for (name, *a), (other, *b) in zip(whole[step:], rest, strict=True):
            assert name == other and all(map(torch.equal, a, b))


def test_more_ranks_go_on_where_fewer_were(path):
    one = module(path, steps_per_epoch=8)
    assert len(keys(one.train_dataloader())) == 8  # 16 clips by one process
    state = one.state_dict()
    parts = []
    for rank in range(2):
        data = module(path, Trainer(rank, 2, epoch=1), steps_per_epoch=4)
        data.load_state_dict(state)
        parts.append(keys(data.train_dataloader()))
    joint = [n for step in zip(*parts, strict=True) for b in step for n in b]
    rest = module(path, Trainer(epoch=1), steps_per_epoch=8)
    assert joint == [n for b in keys(rest.train_dataloader()) for n in b]


def test_another_set_begins_an_order_of_its_own(path, tmp_path, caplog):
    state = module(path, steps_per_epoch=3)
    keys(state.train_dataloader())
    other = module(str(make_set(tmp_path, 3)), steps_per_epoch=2)
    with caplog.at_level(logging.WARNING):
        other.load_state_dict(state.state_dict())
    assert "begins anew" in caplog.text and len(keys(other.train_dataloader())) == 2


# What is read ----------------------------------------------------------------------------------------------------


def test_several_clips_of_one_video_come_from_its_parts(tmp_path):
    path = make_set(tmp_path, 3, frames=24)
    loader = module(str(path), clips_per_video=4, frames=3, batch_size=1, steps_per_epoch=12).train_dataloader()
    starts: dict[str, list[int]] = {}
    for batch in loader:
        starts.setdefault(batch.name[0], []).append(round(float(batch.video[0, 0].float().mean()) / 8))
    assert sorted(starts) == ["000", "001", "002"]
    for found in starts.values():
        assert all(i * 22 // 4 <= s < (i + 1) * 22 // 4 for i, s in enumerate(sorted(found)))


def test_of_a_long_video_only_the_wanted_frames_are_read(tmp_path, monkeypatch):
    path = make_set(tmp_path, 2, frames=60, size=(64, 64), noise=True)
    real, read = os.pread, []
    monkeypatch.setattr(os, "pread", lambda f, n, o: read.append(n) or real(f, n, o))
    for _ in module(str(path), frames=2, stride=1, batch_size=1, steps_per_epoch=2).train_dataloader():
        pass
    assert sum(read) < path.with_name("set-000000.tar").stat().st_size / 10
    read.clear()
    for _ in module(str(path), frames=2, stride=50, batch_size=1, steps_per_epoch=2).train_dataloader():
        pass
    assert sum(read) < path.with_name("set-000000.tar").stat().st_size / 10


# Broken samples --------------------------------------------------------------------------------------------------


def spoil(path, *numbers):
    """Overwrite where the images of some samples begin."""
    index = shards.read_index(path)
    for i in numbers:
        sample = index.samples[i]
        with open(sample.shard.address, "r+b") as file:
            file.seek(sample.members["rgb.idx.npy"][0])
            file.write(bytes(64))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_sample_is_named_counted_and_left_out(tmp_path, workers, caplog):
    path = str(make_set(tmp_path, 120, per_shard=50))
    spoil(path, 17)
    data = module(path, workers=workers, batch_size=8)
    with caplog.at_level(logging.WARNING):
        loader = data.train_dataloader()
        batches = keys(loader)
    assert all(len(b) == 8 for b in batches) and len(batches) == 15
    assert "017" not in {n for b in batches for n in b}
    assert caplog.text.count("017") == 1 and "1 of 120 samples are broken" in caplog.text
    assert list(loader.broken) == [(0, "017")]
    assert batches == keys(module(path, batch_size=8).train_dataloader())  # what stands in is no accident
    scored = [n for b in keys(data.val_dataloader()[0]) for n in b]
    assert scored == [f"{i:03d}" for i in range(120) if i != 17]


@pytest.mark.parametrize("workers", [0, 2])
def test_more_than_one_percent_broken_stops_the_run(tmp_path, workers):
    path = str(make_set(tmp_path, 120, per_shard=50))
    spoil(path, 17, 90)
    for loader in (module(path, workers=workers).train_dataloader(), *module(path).val_dataloader()):
        with pytest.raises(DataError, match=r"2 of 120 samples are broken, more than 1%.*trackpl data check"):
            list(loader)


def test_everything_broken_is_not_searched_forever(tmp_path):
    path = make_set(tmp_path, 900, per_shard=900, frames=1, size=(8, 8))
    spoil(path, *range(900))
    with pytest.raises(DataError, match="8 samples one after the other are broken"):
        list(module(str(path), frames=1).train_dataloader())


def test_a_changed_shard_is_found_when_asked_for(tmp_path):
    path = make_set(tmp_path, 8)
    module(str(path), verify=True).prepare_data()
    spoil(path, 5)
    with pytest.raises(DataError, match=r"set-000001.tar is not the shard that its index describes"):
        module(str(path), verify=True).prepare_data()


# From elsewhere --------------------------------------------------------------------------------------------------


@pytest.fixture
def patient(monkeypatch, tmp_path):
    monkeypatch.setenv("TRACKPL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TRACKPL_STALL", "0.3")
    from trackpl import remote

    quick = dataclasses.replace(remote.Patience.from_environment(), first=0.01, longest=0.05)
    monkeypatch.setattr(remote.Patience, "from_environment", classmethod(lambda cls: quick))


def files_of(path):
    return {p.name: p.read_bytes() for p in path.parent.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_from_a_flaky_server_every_sample_arrives_once(tmp_path, patient, workers, capfd, caplog):
    path = make_set(tmp_path / "set", 22)
    local = module(str(path), workers=0)
    fault = at_random(0.4, 1)  # the index has no hash of its own; a broken one would say so
    with (
        serve(files_of(path), fault=lambda p: fault(p) if p.endswith(".tar") else None) as server,
        caplog.at_level(logging.WARNING),
    ):
        away = module(server.url("set.index.json"), workers=workers)
        assert keys(away.train_dataloader()) == keys(local.train_dataloader())
        assert keys(away.val_dataloader()[0]) == keys(local.val_dataloader()[0])
        failed = [f for _, _, f in server.requests if f]
    said = caplog.text + capfd.readouterr().err
    # Each retry is named, but those of a kept connection that was closed before its use (workers: on their own stderr).
    assert failed and (
        workers or len(failed) >= said.count("failed: ") >= len([f for f in failed if f != "refuse"]) > 0
    )


def test_without_ranges_whole_shards_are_fetched_once(tmp_path, patient):
    path = make_set(tmp_path / "set", 22)
    with serve(files_of(path), fault=lambda p: "whole" if p.endswith(".tar") else None) as server:
        away = module(server.url("set.index.json"))
        assert len(keys(away.train_dataloader())) == 11
        whole = [p for p, asked, _ in server.requests if p.endswith(".tar") and asked is None]
    assert sorted(whole) == sorted(set(whole)) and len(whole) == 6


def test_a_server_that_is_gone_stops_the_run(tmp_path, patient):
    path = make_set(tmp_path / "set", 22)
    with serve(files_of(path), fault=lambda p: "503" if p.endswith(".tar") else None) as server:
        loader = module(server.url("set.index.json"), workers=1).train_dataloader()
        with pytest.raises(UnreachableError, match="tried 8 times"):
            list(loader)


def test_a_sample_that_is_another_than_the_index_says_is_broken(tmp_path, patient, caplog):
    path = make_set(tmp_path / "set", 120, per_shard=120)
    files = files_of(path)
    spoil(path, 17)
    with serve(files | {"set-000000.tar": files_of(path)["set-000000.tar"]}) as server:
        away = module(server.url("set.index.json"), batch_size=8)
        with caplog.at_level(logging.WARNING):
            names = [n for b in keys(away.val_dataloader()[0]) for n in b]
    assert len(names) == 119 and "017" not in names and "SHA-256" in caplog.text
