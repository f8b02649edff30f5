import builtins
import io
import pickle
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trackpl_prep.files.pickles import load, load_file, load_npy, read_npz

from trackpl.errors import DataError

GOLDEN = np.load(Path(__file__).parents[1] / "golden/data_metrics/hostile_shards.npz")
BAD = [k for k in GOLDEN.files if k.startswith("pickle_bad__")]
GOOD = [k for k in GOLDEN.files if k.startswith("pickle_good__")]
PROTOCOLS = range(6)


def data_set():
    return {
        "video": np.arange(2 * 3 * 4 * 3, dtype=np.uint8).reshape(2, 3, 4, 3),
        "points": np.asfortranarray(np.linspace(0, 1, 12).reshape(3, 2, 2)),
        "big endian": np.arange(5, dtype=">f4"),
        "occluded": np.array([[True, False], [False, True]]),
        "jpegs": np.array([b"\xff\xd8 a", b"\xff\xd8 bc"]),
        "objects": np.array([b"one", {"k": [1, 2]}, None], object),
        "words": np.array(["a", "ü€"]),
        "scalar": np.float32(2.5),
        "half": np.float16([1.5, 2.5]),
        "frames": [b"\0\xff" * 5000, b"", b"short", "text ü", 3.25, -(10**15), 2**70, True, None, (1, ("a", ()))][2:],
        "long": b"\0\xff" * 5000,
        "ordered": OrderedDict([("z", 1), ("a", [{}])]),
        7: 8,
    }


def same(a, b):
    if isinstance(a, np.ndarray):
        if not isinstance(b, np.ndarray) or a.dtype != b.dtype or a.shape != b.shape:
            return False
        return all(map(same, a.flat, b.flat)) if a.dtype == object else a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return type(a) is type(b) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or a != a)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_reads_what_pickle_and_numpy_write(protocol):
    assert same(load(pickle.dumps(data_set(), protocol), "x"), data_set())


@pytest.mark.parametrize("key", GOOD)
def test_golden_streams_are_read(key):
    data = GOLDEN[key].tobytes()
    assert same(load(data, key), pickle.loads(data))


@pytest.mark.parametrize("key", BAD)
def test_golden_attacks_are_refused_and_nothing_runs(key):
    with pytest.raises(DataError, match=key):
        load(GOLDEN[key].tobytes(), key)
    assert not hasattr(builtins, "TRACKPL_PWNED")


class Touch:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_no_protocol_can_call_anything(protocol, tmp_path):
    witness = tmp_path / "touched"
    for call in ((open, (str(witness), "w")), (eval, (f"open({str(witness)!r}, 'w')",)), (np.fromfile, ("/dev/zero",))):
        with pytest.raises(DataError, match="which is code"):
            load(pickle.dumps([Touch(*call)], protocol), "x")
    assert not witness.exists()


NDARRAY = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntVb\ntR"
FLOAT = b"cnumpy\ndtype\n(Vf8\nI00\nI01\ntR"


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        (b"cnumpy\nndarray\n(I999999999\ntR.", "calls 'ndarray'"),
        (b"\x80\x02cnumpy\nndarray\n(I999999999\nt\x81.", "builds no data"),
        (b"(I1\ninumpy\nndarray\n.", "builds no data"),
        (b"(cnumpy\nndarray\nI1\no.", "builds no data"),
        (b"Psome\n.", "builds no data"),
        (b"\x82\x01.", "builds no data"),
        (b"\x8f.", "builds no data"),
        (b"cnumpy\ndtype\n.", "function, class or number format"),
        (NDARRAY + b".", "function, class or number format"),
        (FLOAT + b".", "function, class or number format"),
        (NDARRAY + b"(I1\n(I1000000000000\nt" + FLOAT + b"I00\nC\x08" + bytes(8) + b"tb.", "do not fit"),
        (NDARRAY + b"(I1\n(I-1\nt" + FLOAT + b"I00\nC\x08" + bytes(8) + b"tb.", "shape"),
        (NDARRAY + b"(I1\n(I4\ntcnumpy\ndtype\n(VO8\nI00\nI01\ntRI00\n(NNltb.", "not as many"),
        (NDARRAY + b"(I1\n(I1\ntcnumpy\ndtype\n(VO8\nI00\nI01\ntRI00\nC\x08" + bytes(8) + b"tb.", "not as many"),
        (b"cnumpy\ndtype\n(Vf8,f8\nI00\nI01\ntR.", "are not read"),
        (b"cnumpy\ndtype\n(VV8\nI00\nI01\ntR.", "are not read"),
        (FLOAT + b"(I3\nV<\nN(Va\nt(dI-1\nI-1\nI0\ntb.", "fields"),
        (b"}(I1\ntI2\ns.", "key of a dict"),
        (b"\x80\x06N.", "newer"),
        (b"c_codecs\nencode\n(Vx\nVrot13\ntR.", "encodes"),
        (b"ccollections\nOrderedDict\n((I1\nltR.", "ordered dict"),
        (b"]p99999999999999999999\n.", "counting"),
        (b"B\xff\xff\xff\xffabc.", "cut short"),
        (b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7fabc.", "cut short"),
        (b"\x95\xff\xff\xff\xff\xff\xff\xff\x7fN.", "cut short"),
        (b"N.N", "does not end"),
        (b"NN.", "does not end"),
        (b"", "cut short"),
        (b"X\x02\0\0\0\xff\xff.", "not a whole pickle"),
        (b"I" + b"9" * 5000 + b"\n.", "line"),
        (b"h\x05.", "not built"),
    ],
)
def test_crafted_streams(stream, message):
    with pytest.raises(DataError, match=message):
        load(stream, "x")


def test_a_memo_index_costs_no_memory():
    assert load(b"]r\xff\xff\xff\xff.", "x") == []


def test_bytes_cannot_be_multiplied():
    array = pickle.dumps(np.zeros(100_000), 4)
    assert load(array, "x").nbytes == 800_000
    kind = b"cnumpy\ndtype\n(Vf8\ntR\x94"
    raw = b"B" + struct.pack("<I", 80_000) + bytes(80_000) + b"\x94"
    again = b"cnumpy.core.numeric\n_frombuffer\n(h\1h\0(M\x10\x27tVC\ntR0" * 100
    with pytest.raises(DataError, match="over and over"):
        load(kind + raw + again + b".", "x")
    text = b"V" + b"a" * 80_000 + b"\n\x94Vlatin1\n\x94"
    with pytest.raises(DataError, match="over and over"):
        load(text + b"c_codecs\nencode\n(h\0h\1tR0" * 100 + b".", "x")


def test_too_many_instructions_and_too_many_bytes(monkeypatch):
    monkeypatch.setattr("trackpl_prep.files.pickle_machine.MAX_STEPS", 1000)
    assert load(b"(" + b"]" * 990 + b"l.", "x") == [[]] * 990
    with pytest.raises(DataError, match="more than 1000 instructions"):
        load(b"(" + b"]" * 1000 + b"l.", "x")
    with pytest.raises(DataError, match="more than the 10"):
        load(bytes(11), "x", limit=10)


def test_attacks_stay_within_memory():
    """Streams that make `pickle` or NumPy allocate gigabytes, under a limit of 1 GiB for everything."""
    program = """
import resource, struct
import numpy as np
from trackpl.errors import DataError
from trackpl_prep.files.pickles import load, load_npy
size = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 2**29, size + 2**29))
ndarray = b"cnumpy.core.multiarray\\n_reconstruct\\n(cnumpy\\nndarray\\n(I%d\\ntVb\\ntR"
objects = b"cnumpy\\ndtype\\n(VO8\\nI00\\nI01\\ntR"
header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (999999999,), }"
streams = [
    b"\\x80\\x02]r\\xff\\xff\\xff\\xef.", b"\\x80\\x04\\x8e" + struct.pack("<Q", 2**40) + b"x.",
    ndarray % 2**40 + b".", ndarray % 0 + b"(I1\\n(I%d\\nt" % 2**40 + objects + b"I00\\n(ltb.", b"}\\x94" * 200000,
    b"\\x8c\\x01" * 100000, b"(" * 200000, b")" + b"\\x85\\x94" * 200000 + b"}h\\x00Ns.",
]
for stream in streams:
    try:
        load(stream, "x")
    except DataError as error:
        assert "Memory" not in str(error), error
try:
    load_npy(b"\\x93NUMPY\\x01\\x00" + struct.pack("<H", len(header)) + header, "x")
except DataError as error:
    assert "do not fit" in str(error)
print("survived")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout == "survived\n", done.stderr


def objects(values):
    return np.fromiter(values, object, len(values))


ATOMS = st.none() | st.booleans() | st.integers(-(2**100), 2**100) | st.floats(allow_nan=False)
ATOMS |= st.text(st.characters(exclude_categories=["Cs"])) | st.binary(min_size=1)
TREES = st.recursive(
    ATOMS,
    lambda x: st.lists(x) | st.lists(x).map(tuple) | st.dictionaries(st.text("abc"), x) | st.lists(x).map(objects),
    max_leaves=20,
)


@settings(deadline=None, max_examples=100)
@given(TREES, st.sampled_from(PROTOCOLS))
def test_whatever_is_data_comes_back(tree, protocol):
    assert same(load(pickle.dumps(tree, protocol), "x"), tree)


def outcome(data, **options):
    try:
        return load(data, "x", **options)
    except DataError:
        return None


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=200))
def test_any_bytes_give_data_or_an_error(data):
    outcome(data)


PIECES = [bytes([i]) for i in range(256)]
PIECES += [
    NDARRAY,
    FLOAT,
    b"K\0",
    b"C\x08" + bytes(8),
    b"cnumpy.core.multiarray\nscalar\n",
    b"Vlatin1\n",
    b"q\0",
    b"h\0",
]


@settings(deadline=None, max_examples=300)
@given(st.lists(st.sampled_from(PIECES), max_size=40))
def test_any_instructions_give_data_or_an_error(pieces):
    outcome(b"".join(pieces) + b".")


@settings(deadline=None, max_examples=300)
@given(
    st.sampled_from(PROTOCOLS),
    st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=3), st.integers(0, 3)), max_size=4),
)
def test_damaged_pickles_give_data_or_an_error(protocol, changes):
    data = pickle.dumps(data_set(), protocol)
    for place, insert, removed in changes:
        at = int(place * len(data))
        data = data[:at] + insert + data[at + removed :]
    outcome(data)
    outcome(data, views=True)


def test_a_mapped_file_is_listed_without_copies(tmp_path):
    path = tmp_path / "set.pkl"
    path.write_bytes(pickle.dumps({"video": np.arange(10_000), "jpeg": [b"x" * 10_000]}))
    found = load_file(path)
    assert (found["video"] == np.arange(10_000)).all()
    assert not found["video"].flags.owndata and not found["video"].flags.writeable
    assert isinstance(found["jpeg"][0], memoryview) and bytes(found["jpeg"][0]) == b"x" * 10_000
    for name in ("missing.pkl", "empty.pkl"):
        (tmp_path / "empty.pkl").touch()
        with pytest.raises(DataError, match=name):
            load_file(tmp_path / name)


def npy(value):
    file = io.BytesIO()
    np.save(file, value)
    return file.getvalue()


@pytest.mark.parametrize("key", ["video", "points", "big endian", "occluded", "jpegs", "objects", "words", "half"])
def test_npy(key):
    assert same(load_npy(npy(data_set()[key]), "x"), data_set()[key])


def test_npy_of_one_object():
    assert same(load_npy(npy(data_set()), "x"), data_set())


def test_broken_npy():
    good = npy(np.arange(4.0))
    structured = npy(np.zeros(2, [("a", "f4")]))
    for bad in (b"", b"text", good[:-1], good + b"x", good[:30], good.replace(b"(4,)", b"(5,)"), structured):
        with pytest.raises(DataError, match="file 3"):
            load_npy(bad, "file 3")
    with pytest.raises(DataError, match="which is code"):
        load_npy(npy(np.array([Touch(print, ("x",))], object)), "x")
    with pytest.raises(DataError, match="header says"):
        load_npy(npy(np.array([1, None], object)).replace(b"(2,)", b"(3,)"), "x")


def test_npz(tmp_path):
    arrays = {k: v for k, v in data_set().items() if isinstance(v, np.ndarray)}
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", **{k.replace(" ", "_"): v for k, v in arrays.items()})
        found = read_npz(tmp_path / "a.npz")
        assert all(same(found[k.replace(" ", "_")], v) for k, v in arrays.items())
    assert set(read_npz(tmp_path / "a.npz", ["video", "other"])) == {"video"}
    data = (tmp_path / "a.npz").read_bytes()
    for bad in (b"", data[: len(data) // 2], data[:80] + b"\0\1\2\3\4\5\6\7" + data[88:]):
        (tmp_path / "bad.npz").write_bytes(bad)
        with pytest.raises(DataError, match=r"bad\.npz"):
            read_npz(tmp_path / "bad.npz")


def test_npz_bomb(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", npy(np.zeros(10_000_000, np.uint8)))
    assert (tmp_path / "bomb.npz").stat().st_size < 20_000
    with pytest.raises(DataError, match=r"bomb\.npz.*more than the 1000000"):
        read_npz(tmp_path / "bomb.npz", limit=10**6)
