"""JHMDB folders to shards, and back."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trackpl_prep.convert import convert
from trackpl_prep.dataset import make_options

from trackpl.errors import DataError
from trackpl.samples import decode
from trackpl.shards import read_index, read_members

scipy_io = pytest.importorskip("scipy.io", reason="reading .mat needs scipy")

from trackpl_prep.jhmdb import DATASET, read_joints  # noqa: E402

GOLDEN = Path(__file__).parents[1] / "golden" / "data_metrics" / "formats.npz"


@pytest.fixture
def source(tmp_path):
    with np.load(GOLDEN) as golden, tarfile.open(fileobj=io.BytesIO(golden["jhmdb__tar"].tobytes())) as tar:
        tar.extractall(tmp_path, filter="data")
    return tmp_path / "JHMDB"


def make(source, **options):
    index = convert(DATASET, source, source.parent / "out", make_options(DATASET, **options), quiet=True)
    assert index is not None
    return {s.key: read_members(s) for s in read_index(index).samples}


def test_the_test_split_equals_the_golden(source):
    made = make(source)
    golden = np.load(GOLDEN)
    assert list(made) == ["catch-a_v1", "catch-c_v3"]
    for key, members in made.items():
        video, clip = key.removeprefix("catch-"), decode(members)
        assert clip.name == (f"catch/{video}",)
        assert np.array_equal(clip.video[0].permute(0, 2, 3, 1), golden[f"jhmdb__{video}_frames"])
        # The golden counts pixel centres from 0; the centre of the first pixel lies at 0.5 here.
        np.testing.assert_allclose(clip.tracks[0] - 0.5, golden[f"jhmdb__{video}_joints"], atol=1e-4)
        assert clip.valid.all() and np.array_equal(clip.queries[0, :, 1:], clip.tracks[0, 0])
        h, w = clip.size
        x, y = clip.tracks[0].unbind(-1)
        assert np.array_equal(clip.visible[0], (x >= 0) & (x <= w) & (y >= 0) & (y <= h))
        frames = sorted((source / "Rename_Images" / "catch" / video).iterdir())[: clip.frames]
        assert members["rgb.bin"] == b"".join(f.read_bytes() for f in frames)
    assert decode(made["catch-c_v3"]).frames == 4  # the poses are one shorter than the frames
    assert json.loads(made["catch-c_v3"]["meta.json"])["source"]["frame_numbers"] == [1, 2, 3, 4]


def test_the_other_split_and_fold(source):
    assert list(make(source, split="train")) == ["catch-b_v2"]
    with pytest.raises(DataError, match=r"name no clips of the split test"):
        make(source, fold=2)


def mat(source):
    return source / "joint_positions" / "catch" / "a_v1" / "joint_positions.mat"


def test_unknown_joints_are_not_valid(source):
    joints = np.full((2, 15, 3), 4.0)
    joints[:, 7, 1] = np.nan
    joints[:, 8, 2] = -3
    scipy_io.savemat(mat(source), {"pos_img": joints})
    clip = decode(make(source)["catch-a_v1"])
    assert clip.frames == 3 and not clip.valid[0, 1, 7] and clip.valid.sum() == 44
    assert not clip.visible[0, 2, 8] and clip.valid[0, 2, 8] and clip.visible.sum() == 43


def test_a_single_pose_without_its_last_axis(source):
    scipy_io.savemat(mat(source), {"pos_img": np.full((2, 15), 4.0)})
    assert read_joints(mat(source)).shape == (1, 15, 2)


@pytest.mark.parametrize(
    "content, message",
    [
        ({"pos": np.zeros((2, 15, 3))}, "no array pos_img"),
        ({"pos_img": np.zeros((15, 2, 3))}, r"pos_img of shape \(15, 2, 3\); expected \(2, 15, T\)"),
        ({"pos_img": "text"}, "no array pos_img of numbers"),
        ({"pos_img": np.array([None, {"a": 1}], dtype=object)}, "no array pos_img of numbers"),
    ],
)
def test_other_mat_files_are_refused(source, content, message):
    try:
        scipy_io.savemat(mat(source), content)
    except TypeError:
        scipy_io.savemat(mat(source), {"pos_img": np.array(["a", "b"], dtype=object)})
    with pytest.raises(DataError, match=f"joint_positions.mat has {message}"):
        convert(DATASET, source, source.parent / "o", quiet=True)


def test_broken_mat_files_are_named(source):
    data = mat(source).read_bytes()
    for bad in (b"", b"MATLAB 7.3 MAT-file" + data[19:], data[:300], data[:1000], b"\x80\x04K\x01."):
        mat(source).write_bytes(bad)
        with pytest.raises(DataError, match=r"joint_positions.mat"):
            read_joints(mat(source))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.integers(19, 2855), st.integers(0, 255)), min_size=1, max_size=12))
def test_any_bytes_give_joints_or_a_clear_error(tmp_path, changes):
    file = tmp_path / "joint_positions.mat"
    with np.load(GOLDEN) as golden, tarfile.open(fileobj=io.BytesIO(golden["jhmdb__tar"].tobytes())) as tar:
        data = bytearray(tar.extractfile("JHMDB/joint_positions/catch/a_v1/joint_positions.mat").read())
    for place, value in changes:
        data[place] = value
    file.write_bytes(bytes(data))
    try:
        assert read_joints(file).shape[1:] == (15, 2)
    except DataError as error:
        assert "joint_positions.mat" in str(error)


def test_a_wrong_folder_says_what_was_expected(source, tmp_path):
    with pytest.raises(DataError, match=r"no <class>_test_split1.txt in .*; expected:\n +SOURCE/Rename_Images"):
        convert(DATASET, source.parent, tmp_path / "o", quiet=True)
    with pytest.raises(DataError, match=r"no split 'tset'; did you mean 'test'"):
        convert(DATASET, source, tmp_path / "o", make_options(DATASET, split="tset"), quiet=True)
    lists = source / "splits" / "catch_test_split1.txt"
    lists.write_text("a_v1.avi 2\n../x.avi 2\n")
    with pytest.raises(DataError, match=r"catch_test_split1.txt, line 2 is '../x.avi 2'"):
        convert(DATASET, source, tmp_path / "o", quiet=True)
    lists.write_text("gone.avi 2\n")
    with pytest.raises(DataError, match=r"catch/gone is missing: no folder .*Rename_Images/catch/gone"):
        convert(DATASET, source, tmp_path / "o", quiet=True)
