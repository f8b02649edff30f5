"""TFRecords without TensorFlow: the published bytes, and any other bytes."""

import builtins
import importlib
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from movi_scene import example, field, masked, record, varint
from trackpl_prep.files.tfrecord import parse_example, read_record, record_offsets, varints
from trackpl_prep.movi_records import ARRAYS, IMAGES, read_features

from trackpl.errors import DataError

GOLDEN = Path(__file__).parents[1] / "golden" / "data_metrics" / "movi_tfrecord.npz"
FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def payload(golden, tmp_path_factory):
    file = tmp_path_factory.mktemp("golden") / "file"
    file.write_bytes(golden["tfrecord"].tobytes())
    return read_record(file, 0)


def write(folder, data):
    file = folder / "movi_e-train.tfrecord-00000-of-00001"
    file.write_bytes(data)
    return file


def stored(name):
    """Give the name that a feature of the golden has in the file."""
    name = name.replace(".flat_values", "/ragged_flat_values").replace(".row_lengths", "/ragged_row_lengths_0")
    return name.replace(".", "/")


def test_every_feature_of_the_published_records_is_decoded_exactly(golden, tmp_path):
    file = write(tmp_path, golden["tfrecord"].tobytes())
    offsets = record_offsets(file)
    assert len(offsets) == 2
    for number, offset in enumerate(offsets):
        expected = {stored(k[9:]): v for k, v in golden.items() if k.startswith(f"record{number}__")}
        assert {*expected} == {*ARRAYS, *IMAGES} - {"metadata/motion_blur"}
        found = read_features(read_record(file, offset, number), expected, "record")
        for name, values in expected.items():
            assert found[name].dtype == values.dtype, name
            np.testing.assert_array_equal(found[name], values, err_msg=name)


def test_unwanted_features_are_not_even_decoded(payload):
    broken = payload.replace(b"IDAT", b"XXXX")  # no image is whole any more
    assert read_features(broken, ["camera/focal_length"], "record")["camera/focal_length"] == 35
    with pytest.raises(DataError, match=r"record, feature 'video', frame 0 is no whole PNG"):
        read_features(broken, ["video"], "record")


@given(st.lists(st.integers(-(2**63), 2**63 - 1)))
@FUZZ
def test_integers_survive(values):
    found = varints(b"".join(map(varint, values)))
    assert found.dtype == np.int64 and found.tolist() == values


def test_integers_survive_the_borders_of_blocks():
    values = np.random.default_rng(0).integers(0, 2**20, 800_000)
    np.testing.assert_array_equal(varints(b"".join(map(varint, values.tolist()))), values)


def test_lists_may_be_unpacked_or_in_pieces():
    pieces = field(2, field(1, struct.pack("<f", 1)) + b"\x0d" + struct.pack("<f", 2) + field(1, struct.pack("<f", 3)))
    numbers = field(3, b"\x08" + varint(-5) + field(1, varint(6) + varint(700)))
    entries = [field(1, field(1, key) + field(2, body)) for key, body in ((b"f", pieces), (b"i", numbers))]
    found = parse_example(field(1, b"".join(entries)))
    assert found["f"].tolist() == [1, 2, 3] and found["i"].tolist() == [-5, 6, 700]
    assert parse_example(example({"a": [b"x", b""], "b": np.zeros(0, int)}))["a"] == [b"x", b""]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: d[:-1], r"record 1 is cut off"),
        (lambda d: d[:7], r"record 0 is cut off after 7 bytes"),
        (lambda d: b"\x89PNG" + d[4:], r"is no TFRecord file"),
        (lambda d: d + b"\0", r"record 2 is cut off"),
        (lambda d: d + b"\0" * 12, r"is damaged where record 2 begins"),
        (lambda d: record(b"a") + struct.pack("<Q", 2**40) + record(b"a" * 2**4)[8:], r"damaged where record 1 begins"),
    ],
)
def test_broken_files_are_named_with_the_record(golden, tmp_path, spoil, message):
    file = write(tmp_path, spoil(golden["tfrecord"].tobytes()))
    with pytest.raises(DataError, match=message) as error:
        record_offsets(file)
    assert str(file) in str(error.value)


def test_a_length_that_lies_is_refused_before_anything_is_read(tmp_path):
    for length, message in ((2**62, "at most"), (1000, "cut off, 8 of 1000 bytes")):
        header = struct.pack("<Q", length)
        file = write(tmp_path, header + masked(header) + b"abcdefgh")
        with pytest.raises(DataError, match=message):
            record_offsets(file)
        with pytest.raises(DataError, match=message):
            read_record(file, 0)


def test_a_flipped_byte_is_found(golden, tmp_path):
    data = bytearray(golden["tfrecord"].tobytes())
    data[5000] ^= 1
    file = write(tmp_path, data)
    assert len(record_offsets(file)) == 2  # the headers are whole
    with pytest.raises(DataError, match="record 0 is damaged"):
        read_record(file, 0, 0)


def test_no_file_and_an_empty_one(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        record_offsets(tmp_path / "none")
    assert record_offsets(write(tmp_path, b"")) == []


def test_the_missing_package_is_named(golden, tmp_path, monkeypatch):
    file = write(tmp_path, golden["tfrecord"].tobytes())

    def refuse(name, *rest):
        if name == "google_crc32c":
            raise ImportError(name)
        return builtins.__import__(name, *rest)

    monkeypatch.setattr(importlib, "import_module", refuse)
    with pytest.raises(DataError, match=r"google-crc32c.*pip install"):
        record_offsets(file)


@given(data=st.binary(max_size=300))
@FUZZ
def test_any_bytes_are_a_file_or_an_error(data, tmp_path):
    file = write(tmp_path, data)
    try:
        for number, offset in enumerate(record_offsets(file)):
            read_record(file, offset, number)
    except DataError as error:
        assert str(file) in str(error)


def read_all(data):
    """Read everything from the payload of a record, as hostile as it may be."""
    try:
        for value in parse_example(data, None, "NAME").values():
            assert isinstance(value, list) or value.dtype in (np.float32, np.int64)
        for name in [*ARRAYS, *IMAGES]:
            read_features(data, [name], "NAME", optional=[name])
    except DataError as error:
        assert str(error).startswith("NAME")


@given(st.binary(max_size=300))
@FUZZ
def test_any_bytes_are_an_example_or_an_error(data):
    read_all(data)
    read_all(field(1, data))
    read_all(field(1, field(1, field(1, b"video") + field(2, data))))


@given(st.data())
@settings(FUZZ, max_examples=60)
def test_a_spoilt_record_is_data_or_an_error(payload, data):
    spoilt = bytearray(payload)
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(spoilt) - 1))
        spoilt[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
        if not spoilt:
            return
    read_all(bytes(spoilt[: data.draw(st.sampled_from([len(spoilt), len(spoilt) // 2]))]))


def test_sizes_that_lie_are_refused_before_anything_is_decoded(payload):
    sizes = {"metadata/height": 8192, "metadata/width": 8192, "metadata/num_frames": 2**20, "metadata/num_instances": 1}
    lying = example({k: np.array(v) for k, v in sizes.items()} | {"depth": [b""]})
    with pytest.raises(DataError, match="which cannot be"):
        read_features(lying, ["depth"], "record")
    with pytest.raises(DataError, match="did you mean 'normal'"):
        read_features(payload, ["normals"], "record")
