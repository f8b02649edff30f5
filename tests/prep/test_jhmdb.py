"""JHMDB folders to shards, and back."""

from __future__ import annotations

import functools
import io
import json
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trackpl_prep.convert import convert
from trackpl_prep.dataset import make_options
from trackpl_prep.jhmdb import DATASET, read_joints

from trackpl.errors import DataError
from trackpl.samples import decode
from trackpl.shards import read_index, read_members

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


def element(kind, data):
    if len(data) <= 4:
        return (len(data) << 16 | kind).to_bytes(4, "little") + data.ljust(4, b"\0")
    return kind.to_bytes(4, "little") + len(data).to_bytes(4, "little") + data + bytes(-len(data) % 8)


def matrix(name, values, kind=9, flags=6):
    """One matrix of a MAT file, by MathWorks' description."""
    parts = [(6, np.array([flags, 0], "<u4")), (5, np.array(values.shape, "<i4"))]
    body = b"".join(element(k, x.tobytes()) for k, x in parts) + element(1, name.encode())
    return element(14, body + element(kind, values.tobytes(order="F")))


def mat(*elements):
    return b"MATLAB 5.0 MAT-file, Platform: GLNXA64".ljust(124) + b"\x00\x01IM" + b"".join(elements)


def deflated(data):
    packed = zlib.compress(data)
    return (15).to_bytes(4, "little") + len(packed).to_bytes(4, "little") + packed  # never padded


@pytest.fixture
def file(source):
    return source / "joint_positions" / "catch" / "a_v1" / "joint_positions.mat"


def test_unknown_joints_are_not_valid(source, file):
    joints = np.full((2, 15, 3), 4.0)
    joints[:, 7, 1] = np.nan
    joints[:, 8, 2] = -3
    joints[0, 9, 0] = 1e300
    file.write_bytes(mat(matrix("pos_img", joints)))
    clip = decode(make(source)["catch-a_v1"])
    assert clip.frames == 3 and not clip.valid[0, 1, 7] and clip.valid.sum() == 43
    assert not clip.visible[0, 2, 8] and clip.valid[0, 2, 8] and clip.visible.sum() == 42


def test_the_ways_in_which_matlab_writes_a_matrix(file):
    joints = np.arange(2 * 15 * 4).reshape(2, 15, 4)
    other, viewpoint = matrix("scale", np.ones((1, 4))), matrix("view", np.array([[3]], "u1"), kind=2)
    plain = matrix("pos_img", joints.astype("<f8"))
    whole = matrix("pos_img", joints.astype("u1"), kind=2)  # doubles that are whole numbers are stored as such
    for elements in ((plain, other), (other, viewpoint, plain), (deflated(other), deflated(plain)), (whole,)):
        file.write_bytes(mat(*elements))
        assert np.array_equal(read_joints(file), joints.transpose(2, 1, 0))
    file.write_bytes(mat(matrix("pos_img", joints[..., 0].astype("<f4"), kind=7)))  # one frame: no last axis
    assert np.array_equal(read_joints(file), joints[..., :1].transpose(2, 1, 0))


@pytest.mark.parametrize(
    "content, message",
    [
        (mat(matrix("pos", np.zeros((2, 15, 3)))), "has no array pos_img"),
        (mat(), "has no array pos_img"),
        (mat(matrix("pos_img", np.zeros((15, 2, 3)))), r"has pos_img of shape \(15, 2, 3\); expected \(2, 15, T\)"),
        (mat(matrix("pos_img", np.zeros((2, 15, 3)), flags=4)), "is broken: pos_img is no matrix of real numbers"),
        (mat(matrix("pos_img", np.zeros((2, 15, 3)), flags=0x806)), "is broken: pos_img is no matrix of real numbers"),
        (
            mat(matrix("pos_img", np.zeros((2, 15, 3)), kind=7)),
            "is broken: pos_img has 720 bytes, not those of float32",
        ),
        (mat(matrix("pos_img", np.zeros((2, 15, 3))))[:-8], "is broken: an element of .* is cut off"),
        (mat(deflated(matrix("pos_img", np.zeros((2, 15, 3))))[:-8]), "is broken: an element of .* is cut off"),
        (mat(deflated(bytes(2**26 + 8))), "is broken: it inflates to more than"),
        (mat(b"\x0f\0\0\0\x08\0\0\0rubbish!"), "is broken: Error -3"),
        (b"", "is no little-endian MAT file of version 5"),
        (b"MATLAB 7.3 MAT-file".ljust(600), "is no little-endian MAT file of version 5"),
        (b"\x80\x04K\x01.", "is no little-endian MAT file of version 5"),
    ],
)
def test_other_files_are_refused(source, file, content, message):
    file.write_bytes(content)
    with pytest.raises(DataError, match=rf"joint_positions\.mat {message}"):
        convert(DATASET, source, source.parent / "o", quiet=True)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.lists(st.tuples(st.integers(0, 2855), st.integers(0, 255)), min_size=1, max_size=12), end=st.integers(0)
)
def test_any_bytes_give_joints_or_a_clear_error(tmp_path, changes, end):
    file = tmp_path / "joint_positions.mat"
    data = bytearray(published())
    for place, value in changes:
        data[place] = value
    file.write_bytes(bytes(data[: end or None]))
    try:
        assert read_joints(file).shape[1:] == (15, 2)
    except DataError as error:
        assert "joint_positions.mat" in str(error)


@functools.cache
def published():
    with np.load(GOLDEN) as golden, tarfile.open(fileobj=io.BytesIO(golden["jhmdb__tar"].tobytes())) as tar:
        return tar.extractfile("JHMDB/joint_positions/catch/a_v1/joint_positions.mat").read()


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
