"""TAP-Vid and RoboTAP pickles to shards, and back."""

from __future__ import annotations

import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from trackpl_prep.convert import convert
from trackpl_prep.tapvid import DATASETS

from trackpl.errors import DataError
from trackpl.metrics.tapvid import sample_queries
from trackpl.samples import decode
from trackpl.shards import read_index, read_members

GOLDEN = Path(__file__).parents[1] / "golden" / "data_metrics" / "formats.npz"
SETS = {d.name: d for d in DATASETS}
KEYS = {
    "tapvid_davis": ["vid-0.x", "vid-1.x"],
    "tapvid_rgb_stacking": ["0000", "0001"],
    "tapvid_kinetics": ["0000_of_0010/0000", "0001_of_0010/0000"],
    "robotap": ["robotap_split0/vid-0.x", "robotap_split1/vid-1.x"],
}


def tree(name, folder):
    golden = "tapvid_robotap" if name == "robotap" else name
    with np.load(GOLDEN) as arrays, tarfile.open(fileobj=io.BytesIO(arrays[f"{golden}__tar"].tobytes())) as tar:
        tar.extractall(folder, filter="data")
        return {k.removeprefix(f"{golden}__"): arrays[k] for k in arrays.files if k.startswith(f"{golden}__video")}


def make(name, source, out):
    index = convert(SETS[name], source, out, quiet=True)
    return [decode(read_members(s)) for s in read_index(index).samples]


@pytest.mark.parametrize("name", SETS)
def test_every_set_equals_the_golden(name, tmp_path):
    golden = tree(name, tmp_path / "source")
    clips = make(name, tmp_path / "source", tmp_path / "out")
    assert [c.name[0] for c in clips] == KEYS[name]
    for i, clip in enumerate(clips):
        frames, points, occluded = (golden[f"video{i}_{k}"] for k in ("frames", "points", "occluded"))
        video = clip.video[0].permute(0, 2, 3, 1).numpy()
        assert (video == frames).all()
        assert clip.tracks.shape[2] == len(points) and clip.valid.all()
        size = frames.shape[2], frames.shape[1]
        assert np.abs(clip.tracks[0].numpy() - points.transpose(1, 0, 2) * size).max() < 1e-4
        assert (clip.visible[0].numpy() == ~occluded.T).all()


@pytest.mark.parametrize("queried", ["first", "strided"])
@pytest.mark.parametrize("name", [n for n in SETS if n.startswith("tapvid")])
def test_the_benchmark_samples_the_same_queries(name, queried, tmp_path):
    golden = tree(name, tmp_path / "source")
    for i, clip in enumerate(make(name, tmp_path / "source", tmp_path / "out")):
        queries, index = sample_queries(clip.tracks[0], clip.visible[0], queried)
        wanted = golden[f"video{i}_{queried}_query_points"][0][:, [0, 2, 1]]
        assert np.abs(queries.numpy() - wanted).max() < 1e-4
        truth = clip.tracks[0][:, index].permute(1, 0, 2).numpy()
        assert np.abs(truth - golden[f"video{i}_{queried}_target_points"][0]).max() < 1e-4
        assert (~clip.visible[0][:, index].T.numpy() == golden[f"video{i}_{queried}_occluded"][0]).all()


def test_a_track_that_is_never_visible_stays(tmp_path):
    golden = tree("tapvid_davis", tmp_path / "source")
    hidden = golden["video0_occluded"].all(1)
    assert hidden.any()
    clip = make("tapvid_davis", tmp_path / "source", tmp_path / "out")[0]
    assert (~clip.visible[0].any(0)).numpy().tolist() == hidden.tolist()


def test_kinetics_keeps_the_jpeg_bytes(tmp_path):
    tree("tapvid_kinetics", tmp_path)
    file = tmp_path / "tapvid_kinetics/0000_of_0010.pkl"
    index = convert(SETS["tapvid_kinetics"], file, tmp_path / "out", quiet=True)
    (sample,) = read_index(index).samples
    jpegs = pickle.loads(file.read_bytes())[0]["video"]
    assert read_members(sample)["rgb.bin"] == b"".join(jpegs)
    assert decode(read_members(sample)).fps == 25


@pytest.mark.parametrize("place", ["", "tapvid_davis", "tapvid_davis/tapvid_davis.pkl"])
def test_the_file_its_folder_or_the_folder_above(place, tmp_path):
    tree("tapvid_davis", tmp_path / "source")
    clips = make("tapvid_davis", tmp_path / "source" / place, tmp_path / "out")
    assert [c.name[0] for c in clips] == KEYS["tapvid_davis"]


def video(**changes):
    return {
        "video": np.zeros((3, 4, 5, 3), np.uint8),
        "points": np.full((2, 3, 2), 0.5, np.float32),
        "occluded": np.zeros((2, 3), bool),
    } | changes


def write(tmp_path, content, name="tapvid_davis.pkl"):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else pickle.dumps(content))
    return tmp_path / name


def test_lists_and_dicts_jpegs_and_arrays_in_any_set(tmp_path):
    jpegs = pickle.loads(tree_file(tmp_path))[0]["video"][:3]
    for i, frames in enumerate((jpegs, np.array(jpegs), np.array(jpegs, object))):
        clips = make("tapvid_davis", write(tmp_path, [video(video=frames)]), tmp_path / f"out{i}")
        assert clips[0].name == ("0000",) and clips[0].frames == 3
        assert torch.equal(clips[0].video, decoded(jpegs))


def tree_file(folder):
    tree("tapvid_kinetics", folder)
    return (folder / "tapvid_kinetics/0000_of_0010.pkl").read_bytes()


def decoded(jpegs):
    from trackpl.encoding import decode_image

    return torch.from_numpy(np.stack([decode_image(j) for j in jpegs])).permute(0, 3, 1, 2)[None]


def test_points_that_are_no_numbers_are_not_valid(tmp_path):
    points = video()["points"].copy()
    points[1, 2] = np.nan
    clip = make("tapvid_davis", write(tmp_path, {"a": video(points=points)}), tmp_path / "out")[0]
    assert clip.valid[0].tolist() == [[True, True], [True, True], [True, False]]
    assert not clip.visible[0, 2, 1] and clip.tracks[0, 2, 1].tolist() == [0, 0]


class Evil:
    def __reduce__(self):
        return print, ("executed",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read"),
        (b"not a pickle", "builds no data"),
        (pickle.dumps({"a": video()})[:-50], "cut short"),
        ([Evil()], "which is code"),
        ("text", "dict or a list"),
        ([], "dict or a list"),
        ([{"video": 1}], "has not the entries"),
        ([video(points=np.zeros((2, 4, 2)))], "points \\(2, 4, 2\\)"),
        ([video(occluded=np.zeros((3, 3), bool))], "occluded \\(3, 3\\)"),
        ([video(occluded=[True])], "list"),
        ([video(video=np.zeros((3, 4, 5), np.uint8))], "expected uint8"),
        ([video(video=np.zeros((3, 4, 5, 3), np.float32))], "expected uint8"),
        ([video(video=[])], "no frames"),
        ([video(video=["text"] * 3)], "frame 0 is a str"),
        ([video(video=[b"\xff\xd8 no JPEG"] * 3)], "frame 0"),
        ([video(points="text")], "numbers"),
    ],
)
def test_broken_files_say_what_is_wrong(content, message, tmp_path, capsys):
    file = write(tmp_path, content)
    with pytest.raises(DataError, match=message) as error:
        convert(SETS["tapvid_davis"], file, tmp_path / "out", quiet=True)
    assert "tapvid_davis.pkl" in str(error.value)
    assert "executed" not in capsys.readouterr().out


def test_the_wrong_folder_says_what_is_expected(tmp_path):
    with pytest.raises(DataError, match=r"no \*_of_\*\.pkl; expected:\n.*0000_of_0010\.pkl"):
        convert(SETS["tapvid_kinetics"], tmp_path, tmp_path / "out", quiet=True)
