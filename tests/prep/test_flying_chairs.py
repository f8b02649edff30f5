import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from trackpl_prep.convert import convert
from trackpl_prep.dataset import make_options
from trackpl_prep.files.flow import write_flo
from trackpl_prep.flying_chairs import DATASET

from trackpl.errors import DataError
from trackpl.shards import decode, read_index, read_members

GOLDEN = Path(__file__).parents[1] / "golden" / "data_metrics" / "formats.npz"


@pytest.fixture
def golden():
    with np.load(GOLDEN) as arrays:
        return {k.removeprefix("flying_chairs__"): arrays[k] for k in arrays.files if k.startswith("flying_chairs__")}


@pytest.fixture
def release(golden, tmp_path):
    """The published tree with its one pair, and a split file of eight lines."""
    with tarfile.open(fileobj=io.BytesIO(golden["tar"].tobytes())) as tar:
        tar.extractall(tmp_path, filter="data")
    root = tmp_path / "FlyingChairs_release"
    (root / "FlyingChairs_train_val.txt").write_text("1\n2\n1\n1\n1\n1\n1\n2\n")
    return root


def add_pair(root: Path, number: int) -> None:
    for part in ("img1.ppm", "img2.ppm", "flow.flo"):
        (root / "data" / f"{number:05d}_{part}").write_bytes((root / "data" / f"00007_{part}").read_bytes())


def make(root: Path, **options):
    index = read_index(convert(DATASET, root, root.parent / "out", make_options(DATASET, **options), quiet=True))
    return index, [decode(read_members(s)) for s in index.samples]


def test_the_published_tree_gives_the_expected_arrays(release, golden):
    index, (clip,) = make(release)
    assert index.name == "flying_chairs_train" and "research purposes only" in index.meta["licence"]
    assert [s.key for s in index.samples] == ["00007"] and clip.name == ("00007",)
    assert clip.flow.pairs == ((0, 1),) and clip.flow.visible is None and clip.flow.valid is None
    np.testing.assert_array_equal(clip.video[0].permute(0, 2, 3, 1), np.stack([golden["img1"], golden["img2"]]))
    np.testing.assert_array_equal(clip.flow.xy[0, 0].permute(1, 2, 0), golden["flow"])


@pytest.mark.parametrize(("split", "keys"), [("train", ["00003", "00007"]), ("val", ["00002", "00008"])])
def test_splits_follow_the_official_file(release, split, keys):
    for number in (2, 3, 8):
        add_pair(release, number)
    index, _ = make(release, split=split)
    assert [s.key for s in index.samples] == keys


def test_all_pairs_need_no_split_file(release):
    add_pair(release, 8)
    (release / "FlyingChairs_train_val.txt").unlink()
    assert [s.key for s in make(release, split="all")[0].samples] == ["00007", "00008"]
    with pytest.raises(DataError, match=r"FlyingChairs_train_val\.txt is missing; get it from https.*--split all"):
        make(release, split="val")


@pytest.mark.parametrize(
    ("text", "message"),
    [("1\n2\n", r"has 2 lines, but .*pair 00007"), ("1 1 1 3 1 1 1", r"line 4: b'3' is neither 1"), ("2 " * 8, "none")],
)
def test_split_files_that_do_not_fit(release, text, message):
    (release / "FlyingChairs_train_val.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        make(release)


def test_wrong_folders_say_what_was_expected(release, tmp_path):
    with pytest.raises(DataError, match=r"no folder 'data'; expected:\n(.*\n)*.*00001_flow\.flo"):
        make(release / "data")
    (tmp_path / "empty" / "data").mkdir(parents=True)
    with pytest.raises(DataError, match=r"no files like 00001_img1\.ppm"):
        make(tmp_path / "empty")
    add_pair(release, 3)
    (release / "data" / "00003_flow.flo").unlink()
    with pytest.raises(DataError, match=r"1 pairs have no flow\.flo, the first is 00003"):
        make(release)


def _image(kind: str, mode: str, size: tuple[int, int] = (18, 14)) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("part", "data", "message"),
    [
        ("img1.ppm", b"P6\n18 14\n255\n" + bytes(755), r"img1\.ppm is no whole PPM.*truncated"),
        ("img1.ppm", b"P6\n999999 999999\n255\n" + bytes(756), r"img1\.ppm is no whole PPM"),
        ("img1.ppm", b"P6\n0 14\n255\n", r"img1\.ppm is no whole PPM"),
        ("img2.ppm", b"P3\n1 1\n255\n0 0 0\n", r"img2\.ppm is no whole PPM"),
        ("img2.ppm", _image("PPM", "L"), r"img2\.ppm is no whole PPM"),
        ("img2.ppm", _image("PNG", "RGB"), r"img2\.ppm is no whole PPM"),
        ("img2.ppm", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", r"img2\.ppm is no whole PPM"),
        ("img2.ppm", _image("PPM", "RGB", (14, 18)), "differ in size"),
        ("flow.flo", b"PIEH", r"00007_flow\.flo is no \.flo"),
        ("flow.flo", write_flo(np.zeros((3, 4, 2))), r"00007: the flow of the pair \(0, 1\) is \(3, 4\)"),
    ],
)
def test_broken_files_are_named(release, part, data, message):
    (release / "data" / f"00007_{part}").write_bytes(data)
    with pytest.raises(DataError, match=message):
        make(release)


def test_broken_pairs_can_be_left_out(release):
    add_pair(release, 3)
    (release / "data" / "00003_flow.flo").write_bytes(b"PIEH")
    index = read_index(convert(DATASET, release, release.parent / "out", max_broken=1, quiet=True))
    assert [s.key for s in index.samples] == ["00007"]
    assert "00003_flow.flo" in index.meta["broken"][0]
