import io
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from trackpl_prep.convert import convert
from trackpl_prep.dataset import make_options
from trackpl_prep.files.flow import write_kitti_flow
from trackpl_prep.kitti import DATASETS

from trackpl.errors import DataError
from trackpl.parsing import read_json
from trackpl.shards import decode, read_index, read_members

GOLDEN = Path(__file__).parents[1] / "golden" / "data_metrics" / "formats.npz"
PAIRS, VIEWS = DATASETS


@pytest.fixture
def golden():
    with np.load(GOLDEN) as arrays:
        return {k.removeprefix("kitti2015__"): arrays[k] for k in arrays.files if k.startswith("kitti2015__")}


@pytest.fixture
def kitti(golden, tmp_path):
    """The published tree of the multi-view extension: scene 4, frames 0 to 20."""
    with tarfile.open(fileobj=io.BytesIO(golden["tar"].tobytes())) as tar:
        tar.extractall(tmp_path, filter="data")
    return tmp_path / "KITTI"


def make(dataset, root: Path, **options):
    index = read_index(convert(dataset, root, root.parent / "out", make_options(dataset, **options), quiet=True))
    return index, [read_members(s) for s in index.samples]


def image(root: Path, n: int, split: str = "training") -> Path:
    return root / split / "image_2" / f"000004_{n:02d}.png"


def frames_of(members) -> list[int]:
    return read_json(members["meta.json"])["source"]["frames"]


def check_flow(flow, golden) -> None:
    np.testing.assert_array_equal(flow.xy[0, 0].permute(1, 2, 0), golden["flow_occ_flow"])
    np.testing.assert_array_equal(flow.valid[0, 0], golden["flow_occ_valid"])
    np.testing.assert_array_equal(flow.visible[0, 0], golden["flow_noc_valid"])
    visible = flow.xy[0, 0].permute(1, 2, 0) * flow.visible[0, 0, ..., None]
    np.testing.assert_array_equal(visible, golden["flow_noc_flow"])


def test_a_pair_gives_the_expected_arrays(kitti, golden):
    index, (members,) = make(PAIRS, kitti)
    clip = decode(members)
    assert index.name == "kitti2015_training" and "CC BY-NC-SA 3.0" in index.meta["licence"]
    assert clip.frames == 2 and clip.flow.pairs == ((0, 1),) and clip.name == ("000004_10",) and clip.fps == 10
    check_flow(clip.flow, golden)
    assert members["rgb.bin"] == image(kitti, 10).read_bytes() + image(kitti, 11).read_bytes()
    pixels = [np.asarray(Image.open(image(kitti, n)).convert("RGB")) for n in (10, 11)]
    np.testing.assert_array_equal(clip.video[0].permute(0, 2, 3, 1), np.stack(pixels))


def test_the_multi_view_extension_has_all_frames(kitti, golden):
    index, (members,) = make(VIEWS, kitti)
    clip = decode(members)
    assert index.name == "kitti2015_multiview_training" and clip.frames == 21
    assert clip.flow.pairs == ((10, 11),) and frames_of(members) == list(range(21))
    check_flow(clip.flow, golden)
    assert members["rgb.bin"] == b"".join(image(kitti, n).read_bytes() for n in range(21))


@pytest.mark.parametrize("split", ["training", "testing"])
def test_frames_around_the_annotated_pair_can_be_left_out(kitti, golden, split):
    (kitti / "training").rename(kitti / split)
    for kind in ("flow_occ", "flow_noc"):  # the extension alone is enough
        shutil.rmtree(kitti / split / kind)
    index, found = make(VIEWS, kitti, split=split, skip_annotated=True)
    assert [s.key for s in index.samples] == ["000004_00", "000004_13"]
    assert [n for m in found for n in frames_of(m)] == golden["frames_used_uflow_training"].tolist()
    assert all(decode(m).flow is None for m in found)
    assert found[1]["rgb.bin"] == b"".join(image(kitti, n, split).read_bytes() for n in range(13, 21))


def test_testing_scenes_have_frames_only(kitti):
    (kitti / "training").rename(kitti / "testing")
    assert [decode(m).flow for m in make(PAIRS, kitti, split="testing")[1]] == [None]
    (members,) = make(VIEWS, kitti, split="testing")[1]
    assert decode(members).flow is None and decode(members).frames == 21


def test_a_hole_parts_a_scene(kitti):
    image(kitti, 5).unlink()
    found = make(VIEWS, kitti)[1]
    assert [frames_of(m) for m in found] == [list(range(5)), list(range(6, 21))]
    assert decode(found[0]).flow is None and decode(found[1]).flow.pairs == ((4, 5),)


@pytest.mark.parametrize("dataset", DATASETS, ids=lambda d: d.name)
@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("training", r"there is no folder .*training/image_2; expected:\n(.*\n)*.*flow_noc"),
        ("training/image_2/000004_11.png", r"training/image_2/000004_11\.png is missing"),
        ("training/flow_occ", r"training/flow_occ/000004_10\.png is missing"),
        ("training/flow_noc/000004_10.png", r"training/flow_noc/000004_10\.png is missing"),
    ],
)
def test_what_is_missing_is_named(kitti, dataset, gone, message):
    path = kitti / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(DataError, match=message):
        make(dataset, kitti)


def test_the_pairs_alone_are_no_multi_view_extension(kitti):
    for n in range(21):
        if n not in (10, 11):
            image(kitti, n).unlink()
    assert len(make(PAIRS, kitti)[1]) == 1
    with pytest.raises(DataError, match="only the frames 10 and 11; the others are another download"):
        make(VIEWS, kitti)


def test_scenes_without_the_pair_are_no_pairs(kitti):
    image(kitti, 10).unlink()
    image(kitti, 11).unlink()
    with pytest.raises(DataError, match="has no frames 10 and 11"):
        make(PAIRS, kitti)
    for n in range(21):
        image(kitti, n).unlink(missing_ok=True)
    with pytest.raises(DataError, match=r"no images like 000000_10\.png"):
        make(PAIRS, kitti)


@pytest.mark.parametrize(
    ("file", "data", "message"),
    [
        ("image_2/000004_11.png", b"\x89PNG", "000004_10, frame 1 is neither a JPEG nor a PNG"),
        ("flow_occ/000004_10.png", b"", r"flow_occ/000004_10\.png is no PNG image"),
        (
            "flow_noc/000004_10.png",
            write_kitti_flow(np.zeros((3, 3, 2))),
            r"visible mask of the pair \(0, 1\) is \(3, 3\)",
        ),
        ("flow_occ/000004_10.png", write_kitti_flow(np.zeros((3, 3, 2))), r"flow of the pair \(0, 1\) is \(3, 3\)"),
    ],
)
def test_broken_files_are_named(kitti, file, data, message):
    (kitti / "training" / file).write_bytes(data)
    with pytest.raises(DataError, match=message):
        make(PAIRS, kitti)


def test_an_8_bit_map_is_refused(kitti):
    """As image viewers write when they save a flow map."""
    buffer = io.BytesIO()
    Image.new("RGB", (18, 14)).save(buffer, "PNG")
    (kitti / "training" / "flow_occ" / "000004_10.png").write_bytes(buffer.getvalue())
    with pytest.raises(DataError, match="has 8 bits"):
        make(PAIRS, kitti)
