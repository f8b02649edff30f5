import io
import pickle
import random
import shutil
import struct
import tarfile
from pathlib import Path

import lmdb
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trackpl_prep.convert import convert
from trackpl_prep.cvo import BROKEN, DATASET, consistent
from trackpl_prep.dataset import make_options
from trackpl_prep.files.lmdb import read_values

from trackpl.errors import DataError
from trackpl.parsing import read_json
from trackpl.shards import decode, read_index, read_members

GOLDEN = Path(__file__).parents[1] / "golden" / "data_metrics"


@pytest.fixture
def golden():
    with np.load(GOLDEN / "formats.npz") as arrays:
        return {k: arrays[k] for k in arrays.files if k.startswith("cvo_")}


@pytest.fixture
def cvo(golden, tmp_path):
    """The published databases with two samples each."""
    for name in ("cvo_clean", "cvo_extended"):
        with tarfile.open(fileobj=io.BytesIO(golden[f"{name}__tar"].tobytes())) as tar:
            tar.extractall(tmp_path, filter="data")
    return tmp_path / "CVO"


def make(root: Path, **options):
    index = read_index(convert(DATASET, root, root.parent / "out", make_options(DATASET, **options), quiet=True))
    return index, [read_members(s) for s in index.samples]


def write_lmdb(path: Path, values: dict[str, object], raw: bool = False) -> None:
    path.mkdir(parents=True, exist_ok=True)
    with lmdb.open(str(path), map_size=2**26, lock=False) as env, env.begin(write=True) as transaction:
        for key, value in values.items():
            transaction.put(key.encode(), value if raw else pickle.dumps(value, 3))


def sample(number: int, images="imgs", t: int = 3, h: int = 2, w: int = 2) -> dict[str, np.ndarray]:
    flows = np.full((h, w, 2 * (t - 1)), 32768, np.uint16)
    video = np.full((h, w, 3 * t), number % 256, np.uint8)
    return {f"{number:05d}_{images}": video, f"{number:05d}_fflows": flows, f"{number:05d}_bflows": flows}


@pytest.mark.parametrize("split", ["clean", "extended"])
def test_the_published_databases_give_the_expected_arrays(cvo, golden, split):
    index, found = make(cvo, split=split)
    assert index.name == f"cvo_{split}" and [s.key for s in index.samples] == ["00000", "00001"]
    for i, members in enumerate(found):
        clip = decode(members)
        video, flow, visible = (golden[f"cvo_{split}__{i}_{k}"] for k in ("video", "flow", "visible"))
        np.testing.assert_array_equal(clip.video[0].permute(0, 2, 3, 1), video)
        assert clip.flow.pairs == ((0, len(video) - 1),) and clip.flow.valid is None
        np.testing.assert_allclose(clip.flow.xy[0, 0].permute(1, 2, 0), flow, atol=1e-4, rtol=0)
        np.testing.assert_array_equal(clip.flow.visible[0, 0], visible > 0)
        assert 0 < visible.mean() < 1  # both kinds
        assert read_json(members["meta.json"])["source"]["sample"] == i


def test_final_is_the_blurred_video_with_the_same_truth(cvo):
    clean, final = make(cvo, split="clean")[1], make(cvo, split="final")[1]
    for i, (a, b) in enumerate(zip(clean, final, strict=True)):
        values = read_values(cvo / "cvo_test.lmdb", [f"{i:05d}_imgs_blur"])
        blurred = pickle.loads(values[f"{i:05d}_imgs_blur"])  # our own fixture
        frames = np.split(blurred, 7, axis=-1)[::-1]  # the last one first
        np.testing.assert_array_equal(decode(b).video[0].permute(0, 2, 3, 1), np.stack(frames))
        assert a["flow.bin"] == b["flow.bin"] and a["flow_visible.bin"] == b["flow_visible.bin"]
        assert a["rgb.bin"] != b["rgb.bin"]


@pytest.mark.parametrize("part", [0.01, 0.1])
def test_visibility_is_that_of_the_protocol(part):
    with np.load(GOLDEN / "cvo.npz") as arrays:
        expected = arrays[f"alpha__thresh1_{part:g}"]
        for back, there, alpha in zip(arrays["bflow"], arrays["fflow"], expected, strict=True):
            np.testing.assert_array_equal(consistent(back, there, part), alpha > 0)


def test_visibility_of_flows_with_a_known_answer():
    flow = np.zeros((4, 6, 2), np.float32)
    flow[..., 0] = 3
    back = -flow
    visible = consistent(flow, back, 0.01)  # what comes back by -3 px; the right half leaves the image, 0 comes back
    assert visible[:, :3].all() and not visible[:, 3:].any()
    back[..., 0] += 0.55
    assert consistent(flow, back, 0.01)[:, :3].all()  # 0.55 < 0.01 (3 + 2.45) + 0.5
    back[..., 0] += 0.01
    assert not consistent(flow, back, 0.01).any()  # 0.56 is not
    assert consistent(flow, back, 0.1)[:, :3].all()
    assert consistent(flow[:1, :1] * 0, flow[:1, :1] * 0, 0.01).all()  # a single pixel


@pytest.mark.parametrize("split", ["clean", "final"])
def test_broken_samples_are_left_out_unless_asked_for(tmp_path, split):
    """536 samples, as published; a database of several levels."""
    values: dict[str, object] = {"__samples__": [f"s{i}" for i in range(536)]}
    for i in range(536):
        values |= sample(i) | sample(i, "imgs_blur")
    write_lmdb(tmp_path / "CVO" / "cvo_test.lmdb", values)
    root = tmp_path / "CVO"
    kept = DATASET.items(root, make_options(DATASET, split=split))
    assert len(kept) == 511 and {i for (i,) in kept} == set(range(536)) - BROKEN
    everything = DATASET.items(root, make_options(DATASET, split=split, keep_broken=True))
    assert [i for (i,) in everything] == list(range(536))
    for i in (0, 299, 535):
        ((key, members),) = DATASET.read(root, (i,), make_options(DATASET, split=split))
        assert key == f"{i:05d}" and (decode(members).video == i % 256).all()
    shutil.move(root / "cvo_test.lmdb", root / "cvo_test_extended.lmdb")
    assert len(DATASET.items(root, make_options(DATASET, split="extended"))) == 536


def test_the_published_file_may_lie_there_as_it_is(cvo, golden):
    """What is published is the file that is called data.mdb in a folder."""
    path = cvo / "cvo_test.lmdb"
    shutil.move(path / "data.mdb", cvo / "data.mdb")
    shutil.rmtree(path)
    shutil.move(cvo / "data.mdb", path)
    clip = decode(make(cvo)[1][1])
    np.testing.assert_array_equal(clip.video[0].permute(0, 2, 3, 1), golden["cvo_clean__1_video"])


def test_what_is_missing_is_named(cvo):
    (cvo / "cvo_test.lmdb" / "data.mdb").unlink()
    with pytest.raises(DataError, match=r"cvo_test\.lmdb is missing, or a folder without data\.mdb; expected:\n"):
        make(cvo)
    shutil.rmtree(cvo / "cvo_test.lmdb")
    write_lmdb(cvo / "cvo_test.lmdb", {"other": 1})
    with pytest.raises(DataError, match="has no __samples__; it is not the published set"):
        make(cvo)
    write_lmdb(cvo / "cvo_test.lmdb", {"__samples__": ["a"]} | {k: v for k, v in sample(0).items() if "bfl" not in k})
    with pytest.raises(DataError, match="has no 00000_bflows"):
        make(cvo)


class Payload:
    def __reduce__(self):
        return (exec, ("import builtins; builtins.TRACKPL_PWNED = True",))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("__samples__", Payload(), "exec"),
        ("00000_imgs", Payload(), "exec"),
        ("__samples__", {"a": 1}, "no list of samples"),
        ("__samples__", [], "no list of samples"),
        ("00000_imgs", np.zeros((2, 2, 8), np.uint8), r"sample 00000: its images are no u8 array"),
        ("00000_imgs", np.zeros((2, 2, 9), np.float32), r"no u8 array \(H, W, 3 T\)"),
        ("00000_imgs", np.zeros((2, 2, 3), np.uint8), "no clip of two frames"),
        ("00000_imgs", "text", "no u8 array"),
        ("00000_fflows", np.zeros((2, 2, 6), np.uint16), r"its flows are \(2, 2, 6\), not \(2, 2, 4\)"),
        ("00000_fflows", [1], "its flows are list"),
        ("00000_bflows", np.zeros((2, 2, 4), np.int64), "int64, not u16 or float"),
        ("00000_bflows", np.full((2, 2, 4), np.nan, np.float32), "not finite"),
    ],
)
def test_values_of_strangers(tmp_path, key, value, message):
    import builtins

    write_lmdb(tmp_path / "CVO" / "cvo_test.lmdb", {"__samples__": ["a"]} | sample(0) | {key: value})
    with pytest.raises(DataError, match=message):
        make(tmp_path / "CVO")
    assert not hasattr(builtins, "TRACKPL_PWNED")


# The database ----------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(st.binary(min_size=1, max_size=40), st.binary(max_size=9000), max_size=300))
def test_lmdb_files_read_as_lmdb_reads_them(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("lmdb")
    texts = {key.hex(): value for key, value in values.items()}
    write_lmdb(path, texts, raw=True)
    found = read_values(path, [*texts, "none", ""])
    assert found == {**texts, "none": None, "": None}


def test_lmdb_of_three_levels_and_many_transactions(tmp_path):
    values = {f"{i:05d}_{'x' * (i % 90)}": struct.pack("<I", i) * (1 + i % 7) for i in range(6000)}
    for first in range(3):
        write_lmdb(tmp_path, dict(list(values.items())[first::3]), raw=True)
    with lmdb.open(str(tmp_path), readonly=True, lock=False) as env:
        assert env.stat()["depth"] >= 3
    assert read_values(tmp_path, values) == values


def test_downloads_that_were_cut_short_are_named(cvo):
    """LMDB itself maps them, and the process dies of a bus error."""
    path = cvo / "cvo_test.lmdb" / "data.mdb"
    whole = path.read_bytes()
    for size in (0, 100, 4096, 5000, 8192, len(whole) // 2, len(whole) - 4096):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"data\.mdb is no whole LMDB database: "):
            make(cvo)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n" * 400)
    with pytest.raises(DataError, match="does not begin as one"):
        make(cvo)


def test_any_file_gives_values_or_a_message(cvo, tmp_path):
    rng = random.Random(0)
    whole = (cvo / "cvo_test.lmdb" / "data.mdb").read_bytes()
    path, refused = tmp_path / "data.mdb", 0
    keys = ["__samples__", "00000_imgs", "00001_bflows", "none"]
    for _ in range(500):
        data = bytearray(whole)
        for _ in range(rng.randrange(1, 12)):  # the pages that say where things are
            place = rng.choice((rng.randrange(16, 160), rng.randrange(4112, 4256), rng.randrange(8192, 12288)))
            data[place] = rng.randrange(256)
        path.write_bytes(data)
        try:
            read_values(path, keys)
        except DataError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 50


def test_lmdb_pages_that_go_in_circles(tmp_path):
    write_lmdb(tmp_path, {f"{i:04d}": b"x" * 50 for i in range(500)}, raw=True)
    data = bytearray((tmp_path / "data.mdb").read_bytes())
    metas = [struct.unpack_from("<QQQ", data, at + 128) for at in (0, 4096)]
    root = max(metas, key=lambda m: m[2])[0]
    for pointer in struct.unpack_from("<H", data, root * 4096 + 12):
        for at in struct.unpack_from(f"<{(pointer - 16) // 2}H", data, root * 4096 + 16):
            struct.pack_into("<HHH", data, root * 4096 + at, root, 0, 0)
    (tmp_path / "data.mdb").write_bytes(data)
    with pytest.raises(DataError, match="goes round in circles"):
        read_values(tmp_path, ["0100"])


def test_values_above_the_limit_are_not_read(tmp_path):
    write_lmdb(tmp_path, {"big": bytes(5000), "small": bytes(10)}, raw=True)
    assert read_values(tmp_path, ["small"], limit=100) == {"small": bytes(10)}
    with pytest.raises(DataError, match="5000 bytes, at most 100"):
        read_values(tmp_path, ["big"], limit=100)


def test_other_lmdb_files_are_refused(tmp_path):
    with pytest.raises(DataError, match="cannot be read: No such file"):
        read_values(tmp_path / "none.lmdb", ["a"])
    with lmdb.open(str(tmp_path), max_dbs=2, lock=False) as env:
        named = env.open_db(b"named")
        with env.begin(write=True, db=named) as transaction:
            transaction.put(b"a", b"b")
    with pytest.raises(DataError, match="does not lie in its page"):  # a database within the database
        read_values(tmp_path, ["named"])
    write_lmdb(tmp_path, {"a": b"b"}, raw=True)
    data = bytearray((tmp_path / "data.mdb").read_bytes())
    struct.pack_into("<I", data, 20, 2)
    (tmp_path / "data.mdb").write_bytes(data)
    with pytest.raises(DataError, match="version 2, not 1"):
        read_values(tmp_path, ["a"])
