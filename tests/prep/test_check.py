"""`trackpl data`: what people type, what they read, and what is drawn."""

import json
import shutil

import pytest
import torch
from flaky_server import serve
from PIL import Image
from trackpl_prep import cli
from trackpl_prep.check import check

from trackpl.encoding import encode
from trackpl.errors import DataError, Error
from trackpl.shards import read_index, write_shards
from trackpl.types import Clip, Flow
from trackpl.writing import write_video

H, W = 24, 32


def make_clip(i: int, kind: str = "tracks") -> Clip:
    g = torch.Generator().manual_seed(i)
    video = torch.randint(256, (1, 5, 3, H, W), generator=g, dtype=torch.uint8)
    if kind == "labels":
        return Clip(video, labels=torch.randint(4, (1, 5, H, W), generator=g))
    if kind == "flow":
        return Clip(video, flow=Flow(torch.full((1, 1, 2, H, W), 3.0), ((1, 4),)))
    if kind == "video":
        return Clip(video)
    tracks = torch.rand(1, 5, 7, 2, generator=g) * torch.tensor([W, H])
    return Clip(video, tracks, torch.rand(1, 5, 7, generator=g) > 0.3, depth=torch.full((1, 5, 1, H, W), 2.5))


def make_set(folder, kinds, licence="CC0"):
    samples = ((f"{i:02d}-{k}", encode(make_clip(i, k))) for i, k in enumerate(kinds))
    return write_shards(folder, "set", samples, samples_per_shard=3, meta={"licence": licence, "source": "test"})


def test_a_report_says_what_is_in_a_set(tmp_path):
    path = make_set(tmp_path / "set", ["tracks"] * 5)
    report = check(str(path), tmp_path / "out", sheet=4)
    assert report.checked == 5 and not report.broken
    for said in (
        "5 clips in 2 shards",
        "licence CC0",
        "frames 5, sizes 24x32",
        "points 7",
        "depth 2.5 to 2.5 m",
        "all whole",
    ):
        assert said in report.text
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert written["fields"] == {"video": 5, "tracks": 5, "visible": 5, "depth": 5} and written["broken"] == []
    tracks = torch.cat([make_clip(i).tracks for i in range(5)])
    assert written["ranges"]["x max"] == pytest.approx(float(tracks[..., 0].max()))
    with Image.open(tmp_path / "out" / "sheet.png") as sheet:
        assert sheet.width >= 2 * W and sheet.height >= 2 * H and len(sheet.getcolors(1 << 16)) > 100


@pytest.mark.parametrize("kind", ["labels", "flow", "video"])
def test_sets_without_tracks_are_drawn_too(tmp_path, kind):
    check(str(make_set(tmp_path / "set", [kind])), tmp_path / "out")
    assert (tmp_path / "out" / "sheet.png").stat().st_size > 500


def test_points_called_visible_outside_are_pointed_out(tmp_path):
    clip = make_clip(0)
    clip.tracks[0, 2, 3, 0], clip.visible[0, 2, 3] = W + 2.0, True
    write_shards(tmp_path / "set", "set", [("a", encode(clip))])
    assert "! 1 points are called visible outside of their frame" in check(str(tmp_path / "set"), tmp_path / "out").text


def spoil(path, number):
    sample = read_index(path).samples[number]
    with open(sample.shard.address, "r+b") as file:
        file.seek(sample.members["tracks.npy"][0] + 300)
        file.write(b"\xff" * 8)


def test_a_changed_shard_and_broken_samples_are_named(tmp_path, capsys):
    path = make_set(tmp_path / "set", ["tracks"] * 5)
    spoil(path, 1)
    with pytest.raises(DataError, match=r"set-000000.tar is not the shard that its index describes"):
        cli.run(["check", str(path), "--out", str(tmp_path / "out")])
    with pytest.raises(DataError, match=r"1 of 5 samples are broken: .*'01-tracks'.*not finite"):
        cli.run(["check", str(path), "--out", str(tmp_path / "out"), "--samples", "5"])
    assert "1 broken" in capsys.readouterr().out


@pytest.mark.slow
def test_workers_find_the_same(tmp_path):
    path = make_set(tmp_path / "set", ["tracks"] * 7)
    spoil(path, 4)
    one, two = (check(str(path), tmp_path / f"{w}", samples=7, workers=w) for w in (1, 2))
    assert sorted(one.broken) == sorted(two.broken) and len(one.broken) == 1
    assert (tmp_path / "1" / "sheet.png").read_bytes() == (tmp_path / "2" / "sheet.png").read_bytes()


def test_a_set_on_a_server_is_checked(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKPL_CACHE", str(tmp_path / "cache"))
    path = make_set(tmp_path / "set", ["tracks"] * 4)
    with serve({p.name: p.read_bytes() for p in path.parent.iterdir()}) as server:
        report = check(server.url("set.index.json"), tmp_path / "out")
    assert report.checked == 4 and not report.broken


@pytest.mark.parametrize("args", [["--samples", "0"], ["--workers", "0"], ["--sheet", "-1"]])
def test_numbers_out_of_range(tmp_path, args):
    path = make_set(tmp_path / "set", ["video"])
    with pytest.raises(DataError, match="at least 1"):
        cli.run(["check", str(path), *args])


# The other verbs -------------------------------------------------------------------------------------------------


def test_shards_without_an_index_get_one(tmp_path, capsys):
    path = make_set(tmp_path / "set", ["tracks"] * 5)
    whole = read_index(path)
    path.unlink()
    assert cli.run(["index", str(path.parent), "--licence", "mine"]) == 0
    again = read_index(path)
    assert again.samples == whole.samples and again.meta["licence"] == "mine"
    assert "5 clips in 2 shards" in capsys.readouterr().out
    with pytest.raises(DataError, match="is there already; --overwrite replaces it"):
        cli.run(["index", str(path.parent)])
    shutil.copy(path.parent / "set-000000.tar", path.parent / "set-000007.tar")
    with pytest.raises(DataError, match="comes twice in the shards"):
        cli.run(["index", str(path.parent), "--overwrite"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="must hold the shards of one set"):
        cli.run(["index", str(tmp_path / "empty")])


SIZE = ["--size", "32", "48", "--frames", "2", "--points", "4"]


def test_parts_are_merged_by_hand(tmp_path, capsys):
    for i in (1, 2):
        out = str(tmp_path / f"m{i}")
        assert cli.run(["make", "synthetic", out, "--clips", "3", "--per-shard", "1", "--part", f"{i}/2", *SIZE]) == 0
    assert "part 2/2 is done; the index follows" in capsys.readouterr().out
    with pytest.raises(DataError, match=r"still lacks 1 shards \(number 1\); run the parts that make them"):
        cli.run(["merge", str(tmp_path / "m1")])
    for path in (tmp_path / "m2" / "synthetic.partial").glob("*000001*"):
        shutil.copy(path, tmp_path / "m1" / "synthetic.partial")
    assert cli.run(["merge", str(tmp_path / "m1")]) == 0
    assert "3 clips in 3 shards" in capsys.readouterr().out
    with pytest.raises(DataError, match=r"holds no NAME\.partial folder"):
        cli.run(["merge", str(tmp_path / "m1")])


@pytest.mark.parametrize("part", ["0/2", "3/2", "2", "a/b", "1/0", "-1/2"])
def test_parts_are_checked(tmp_path, part):
    with pytest.raises(Error, match="--part must be I/N"):
        cli.run(["make", "synthetic", str(tmp_path / "x"), f"--part={part}"])


def test_own_videos_are_packed_beside_their_folder(tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    frames = [torch.full((3, 48, 64), 20 * i, dtype=torch.uint8) for i in range(6)]
    write_video(tmp_path / "mine" / "a.mp4", frames, 10)
    assert cli.run(["pack", str(tmp_path / "mine")]) == 0
    out = capsys.readouterr().out
    assert "trackpl data check" in out and "trackpl fit" in out
    assert read_index(tmp_path / "mine-shards").samples[0].frames == 6


@pytest.mark.parametrize("name", sorted(cli.MODULES))
def test_every_data_set_says_what_it_is(name, capsys):
    dataset = cli.find(name)
    assert dataset.name == name and dataset.about and dataset.licence and dataset.where
    with pytest.raises(SystemExit) as done:
        cli.run(["make", name, "--help"])
    said = capsys.readouterr().out
    assert done.value.code == 0 and dataset.licence in said and dataset.about in said and "--workers" in said


@pytest.mark.parametrize("name", sorted(n for n in cli.MODULES if n not in ("synthetic", "kubric-blender")))
def test_a_wrong_folder_gets_what_was_expected(name, tmp_path):
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "notes.txt").write_text("nothing of it")
    with pytest.raises(DataError) as error:
        cli.run(["make", name, str(tmp_path / "src"), str(tmp_path / "out")])
    assert "expected" in str(error.value) and len(str(error.value)) > 60
    assert not (tmp_path / "out").exists()
    with pytest.raises(DataError, match="does not exist"):
        cli.run(["make", name, str(tmp_path / "nowhere"), str(tmp_path / "out")])


def test_the_readme_has_a_section_on_every_data_set():
    readme = (cli.Path(cli.__file__).parents[1] / "README.md").read_text()
    headings = [line for line in readme.splitlines() if line.startswith("#")]
    missing = [name for name in cli.MODULES if not any(name in heading for heading in headings)]
    assert not missing
