"""The conversion engine on a toy data set: the same bytes with any workers, parts and interruptions."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from trackpl_prep.convert import convert, merge, missing
from trackpl_prep.dataset import Dataset, folder_error, key_of, make_options

from trackpl.encoding import encode
from trackpl.errors import DataError
from trackpl.shards import decode, read_index, read_members
from trackpl.types import Clip

HERE = Path(__file__).resolve().parent


def toy_items(source, options):
    files = sorted(source.glob("*.txt"))
    if not files:
        raise folder_error("NUMBER.txt with a grey level", f"{source} holds no .txt files")
    return [(f.name,) for f in files]


def toy_read(source, item, options):
    time.sleep(options.pause)
    text = (source / item[0]).read_text()
    if not text.isdigit():
        raise DataError(f"{source / item[0]} holds no number")
    for part in range(options.parts):
        video = torch.full((1, 2, 3, 8, 8), int(text), dtype=torch.uint8)
        yield key_of(Path(item[0]).stem, part), encode(Clip(video, name=(f"{item[0]}/{part}",)))


def toy_options(parser):
    parser.add_argument("--fast", action="store_true")
    parser.add_argument("--parts", type=int, default=2)
    parser.add_argument("--pause", type=float, default=0.0)


TOY = Dataset("toy", "grey", "CC0", "here", "NUMBER.txt", toy_items, toy_read, toy_options, per_shard=3)
NAMED = Dataset("toy-b", "grey", "CC0", "here", "", toy_items, toy_read, toy_options, variants=("parts", "fast"))


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    for i in range(11):
        (folder / f"{i:02d}.txt").write_text(str(i * 20))
    return folder


def digests(folder):
    return {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.is_file() and p.name[0] != "."
    }


@pytest.fixture
def expected(source, tmp_path):
    convert(TOY, source, tmp_path / "expected", quiet=True)
    return digests(tmp_path / "expected")


def test_every_item_becomes_its_samples_in_order(source, tmp_path):
    index = read_index(convert(TOY, source, tmp_path / "out", quiet=True))
    assert [s.key for s in index.samples] == [f"{i:02d}-{p}" for i in range(11) for p in range(2)]
    assert [len([s for s in index.samples if s.shard == shard]) for shard in index.shards] == [6, 6, 6, 4]
    assert index.meta["source"] == "toy" and index.meta["licence"] == "CC0"
    assert index.meta["options"] == {"fast": False, "parts": 2, "pause": 0.0}
    clip = decode(read_members(index.samples[7]))
    assert clip.name == ("03.txt/1",) and (clip.video.int() - 60).abs().max() <= 1


def test_a_set_is_called_after_its_variant(source, tmp_path):
    assert convert(NAMED, source, tmp_path, quiet=True).name == "toy_b_2.index.json"
    options = make_options(NAMED, parts=1, fast=True)
    assert convert(NAMED, source, tmp_path, options, quiet=True).name == "toy_b_1_fast.index.json"
    assert convert(NAMED, source, tmp_path, options, name="mine", quiet=True).name == "mine.index.json"


def test_workers_parts_and_machines_change_no_byte(source, tmp_path, expected):
    convert(TOY, source, tmp_path / "w", workers=2, quiet=True)
    assert digests(tmp_path / "w") == expected
    parts = [convert(TOY, source, tmp_path / "p", part=(i, 3), quiet=True) for i in (2, 3, 1)]
    assert parts[:2] == [None, None] and parts[2] == tmp_path / "p" / "toy.index.json"
    assert digests(tmp_path / "p") == expected


def test_parts_of_machines_without_a_common_disk_are_copied_together(source, tmp_path, expected):
    for i in (1, 2):
        assert convert(TOY, source, tmp_path / f"machine{i}", part=(i, 2), quiet=True) is None
    joint = tmp_path / "machine1" / "toy.partial"
    assert missing(joint) == [1, 3] and merge(joint) is None
    for path in (tmp_path / "machine2" / "toy.partial").iterdir():
        if path.name != "plan.json":
            path.rename(joint / path.name)
    assert merge(joint) == tmp_path / "machine1" / "toy.index.json"
    assert digests(tmp_path / "machine1") == expected and not joint.exists()


def test_what_is_there_is_kept_or_replaced_only_when_asked(source, tmp_path, expected):
    out = tmp_path / "expected"
    stamps = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    assert convert(TOY, source, out, quiet=True) == out / "toy.index.json"
    assert {p.name: p.stat().st_mtime_ns for p in out.iterdir()} == stamps
    with pytest.raises(DataError, match="another set; choose another folder or name, or overwrite"):
        convert(TOY, source, out, make_options(TOY, parts=1), quiet=True)
    assert digests(out) == expected
    convert(TOY, source, out, make_options(TOY, parts=1), overwrite=True, quiet=True, per_shard=11)
    assert len(read_index(out).samples) == 11 and len(list(out.glob("*.tar"))) == 1


def test_an_old_set_stays_until_the_new_one_is_whole(source, tmp_path, expected):
    (source / "09.txt").write_text("none")
    with pytest.raises(DataError, match=r"09\.txt"):
        convert(TOY, source, tmp_path / "expected", make_options(TOY, parts=1), overwrite=True, quiet=True)
    assert digests(tmp_path / "expected") == expected


def test_unfinished_work_of_another_recipe_is_not_mixed_in(source, tmp_path):
    convert(TOY, source, tmp_path / "out", part=(1, 2), quiet=True)
    with pytest.raises(DataError, match="unfinished work of another conversion"):
        convert(TOY, source, tmp_path / "out", make_options(TOY, parts=1), part=(2, 2), quiet=True)


def test_broken_items_stop_it_or_are_counted(source, tmp_path):
    (source / "04.txt").write_text("four")
    with pytest.raises(DataError, match=r"04.txt holds no number; --max-broken N leaves up to N"):
        convert(TOY, source, tmp_path / "out", quiet=True)
    (source / "09.txt").write_text("nine")
    with pytest.raises(DataError, match="2 items could not be read, --max-broken allows 1"):
        convert(TOY, source, tmp_path / "out", max_broken=1, quiet=True)
    index = read_index(convert(TOY, source, tmp_path / "out", max_broken=2, quiet=True))
    assert len(index.samples) == 18
    assert [m.split("/")[-1] for m in index.meta["broken"]] == ["04.txt holds no number", "09.txt holds no number"]


def test_a_mistake_leaves_nothing_behind(source, tmp_path):
    with pytest.raises(DataError, match=r"does not exist; it must be the folder"):
        convert(TOY, tmp_path / "none", tmp_path / "out", quiet=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no .txt files; expected:\n  NUMBER.txt"):
        convert(TOY, tmp_path / "empty", tmp_path / "out", quiet=True)
    for wrong in ({"workers": 0}, {"part": (0, 2)}, {"part": (3, 2)}, {"per_shard": 0}, {"name": "../x"}):
        with pytest.raises(DataError):
            convert(TOY, source, tmp_path / "out", quiet=True, **wrong)
    (source / "00.txt").write_text("none")
    with pytest.raises(DataError):
        convert(TOY, source, tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()


def test_a_broken_description_names_itself(source, tmp_path):
    convert(TOY, source, tmp_path / "out", part=(1, 2), quiet=True)
    (tmp_path / "out" / "toy.partial" / "000000.json").write_text("{")
    with pytest.raises(DataError, match=r"000000.json .*remove it to make that shard again"):
        convert(TOY, source, tmp_path / "out", part=(2, 2), quiet=True)


SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
from test_convert import TOY, convert, make_options
if __name__ == "__main__":
    convert(TOY, sys.argv[2], sys.argv[3], make_options(TOY, pause=0.02), workers=int(sys.argv[4]), quiet=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_killed_at_any_moment_it_goes_on(source, tmp_path, workers):
    script = tmp_path / "go.py"
    script.write_text(SCRIPT)
    convert(TOY, source, tmp_path / "whole", make_options(TOY, pause=0.02), quiet=True)
    arguments = [sys.executable, script, HERE, source, tmp_path / "out", str(workers)]
    plan, chance = tmp_path / "out" / "toy.partial" / "plan.json", random.Random(workers)
    for _ in range(4):
        process = subprocess.Popen(arguments, start_new_session=True)
        while not plan.exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.4))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    finished = [p.stat().st_mtime_ns for p in plan.parent.glob("??????.json")]
    subprocess.run(arguments, check=True)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    assert all(stamp < time.time_ns() for stamp in finished) and not plan.exists()


@pytest.mark.slow
def test_killed_while_it_moves_the_shards_it_goes_on(source, tmp_path, expected, monkeypatch):
    out = tmp_path / "out"
    real, moved = os.replace, []

    def failing(a, b):
        if str(b).endswith(".tar") and "partial" not in str(b):
            moved.append(b)
            if len(moved) == 3:
                raise KeyboardInterrupt
        real(a, b)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(KeyboardInterrupt):
        convert(TOY, source, out, quiet=True)
    monkeypatch.undo()
    assert not (out / "toy.index.json").exists()
    convert(TOY, source, out, quiet=True)
    assert digests(out) == expected


@pytest.mark.slow
def test_the_same_on_ray(source, tmp_path, expected, monkeypatch):
    ray = pytest.importorskip("ray", reason='Ray is an extra: pip install "trackpl[ray]"')
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), *filter(None, sys.path)]))
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        convert(TOY, source, tmp_path / "out", ray=True, quiet=True)
        assert digests(tmp_path / "out") == expected
        (source / "04.txt").write_text("four")
        with pytest.raises(DataError, match=r"04\.txt"):
            convert(TOY, source, tmp_path / "out2", ray=True, quiet=True)
    finally:
        ray.shutdown()


@pytest.mark.parametrize("names", [("a b", "a_b"), ("x" * 90, "x" * 91), ("ä", "ö"), ("-a", "x-a"), ("a/b", "a", "b")])
def test_keys_are_allowed_and_stay_apart(names):
    keys = [key_of(n) for n in names]
    assert len(set(keys)) == len(keys)
    assert all(k[0].isalnum() and len(k) <= 72 and k.isascii() for k in keys)


def test_the_plan_is_plain_json(source, tmp_path):
    convert(TOY, source, tmp_path / "out", part=(1, 2), quiet=True)
    plan = json.loads((tmp_path / "out" / "toy.partial" / "plan.json").read_text())
    assert plan["shards"] == 4 and plan["meta"]["source"] == "toy"
