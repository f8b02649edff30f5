import io
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from trackpl_prep.convert import convert
from trackpl_prep.dataset import make_options
from trackpl_prep.files.flow import read_flo, write_flo
from trackpl_prep.sintel import DATASET

from trackpl.errors import DataError
from trackpl.shards import decode, read_index, read_members

GOLDEN = Path(__file__).parents[1] / "golden" / "data_metrics" / "formats.npz"


@pytest.fixture
def golden():
    with np.load(GOLDEN) as arrays:
        return {k.removeprefix("sintel__"): arrays[k] for k in arrays.files if k.startswith("sintel__")}


@pytest.fixture
def sintel(golden, tmp_path):
    """The published tree: one sequence of three frames."""
    with tarfile.open(fileobj=io.BytesIO(golden["tar"].tobytes())) as tar:
        tar.extractall(tmp_path, filter="data")
    return tmp_path / "Sintel"


def make(root: Path, **options):
    index = read_index(convert(DATASET, root, root.parent / "out", make_options(DATASET, **options), quiet=True))
    return index, [read_members(s) for s in index.samples]


@pytest.mark.parametrize("rendering", ["clean", "final"])
def test_the_published_tree_gives_the_expected_arrays(sintel, golden, rendering):
    index, (members,) = make(sintel, rendering=rendering)
    clip = decode(members)
    assert index.name == f"sintel_training_{rendering}" and index.samples[0].key == f"alley_x-{rendering}"
    assert clip.name == (f"{rendering}/alley_x",) and clip.fps == 24
    assert clip.frames == 3 and clip.flow.pairs == ((0, 1), (1, 2))
    flows = clip.flow.xy[0].permute(0, 2, 3, 1)
    np.testing.assert_array_equal(flows, np.stack([golden["flow1"], golden["flow2"]]))
    np.testing.assert_array_equal(clip.flow.visible[0, 0], ~golden["occluded"])
    np.testing.assert_array_equal(clip.flow.valid[0, 0], ~golden["invalid"])


def test_frames_are_the_original_files(sintel):
    _, (members,) = make(sintel, rendering="final")
    files = sorted((sintel / "training" / "final" / "alley_x").iterdir())
    assert members["rgb.bin"] == b"".join(f.read_bytes() for f in files)
    pixels = np.stack([np.asarray(Image.open(f).convert("RGB")) for f in files])
    np.testing.assert_array_equal(decode(members).video[0].permute(0, 2, 3, 1), pixels)


def test_masks_belong_to_the_pair_that_begins_with_their_frame(sintel):
    """The second pair has the masks of frame 2; frame 3 has an invalid mask and no pair."""
    for kind in ("occlusions", "invalid"):
        masks = [np.zeros((14, 18), np.uint8) for _ in range(3)]
        for i, mask in enumerate(masks):
            mask[i, :] = 255
            if kind == "invalid" or i < 2:
                Image.fromarray(mask).save(sintel / "training" / kind / "alley_x" / f"frame_{i + 1:04d}.png")
    flow = decode(make(sintel)[1][0]).flow
    for mask in (flow.visible, flow.valid):
        for i in range(2):
            assert not mask[0, i, i].any() and mask[0, i].sum() == 13 * 18


def test_the_flow_of_invalid_pixels_is_kept(sintel):
    """The mean over all pixels that the benchmark reports counts them."""
    folder = sintel / "training"
    Image.fromarray(np.full((14, 18), 255, np.uint8)).save(folder / "invalid" / "alley_x" / "frame_0001.png")
    flow = decode(make(sintel)[1][0]).flow
    assert not flow.valid[0, 0].any()
    truth = read_flo(folder / "flow" / "alley_x" / "frame_0001.flo")
    np.testing.assert_array_equal(flow.xy[0, 0].permute(1, 2, 0), truth)


@pytest.mark.parametrize("kind", ["occlusions", "invalid"])
def test_masks_are_optional(sintel, kind):
    shutil.rmtree(sintel / "training" / kind)
    flow = decode(make(sintel)[1][0]).flow
    assert (flow.visible is None) == (kind == "occlusions") and (flow.valid is None) == (kind == "invalid")


def test_the_test_split_has_frames_only(sintel):
    shutil.move(sintel / "training" / "clean", sintel / "test" / "clean")
    shutil.copytree(sintel / "test" / "clean" / "alley_x", sintel / "test" / "clean" / "a_first")
    index, found = make(sintel, split="test")
    assert index.name == "sintel_test_clean"
    assert [decode(m).name[0] for m in found] == ["clean/a_first", "clean/alley_x"]
    assert all(decode(m).flow is None and decode(m).frames == 3 for m in found)


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("training/clean", r"there is no folder .*training/clean; expected:\n(.*\n)*.*frame_0001\.flo"),
        ("training/flow", "there is no folder .*training/flow"),
        ("training/clean/alley_x", "holds no sequences"),
        ("training/clean/alley_x/frame_0002.png", r"alley_x holds the frames \[1, 3\]\.\.3"),
        ("training/clean/alley_x/frame_0001.png", "without a gap"),
        ("training/flow/alley_x/frame_0002.flo", r"flow/alley_x has no frame_0002\.flo"),
        ("training/occlusions/alley_x/frame_0001.png", r"occlusions/alley_x has no frame_0001\.png"),
        ("training/invalid/alley_x", r"invalid/alley_x has no frame_0001\.png"),
    ],
)
def test_what_is_missing_is_named(sintel, gone, message):
    path = sintel / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(DataError, match=message):
        make(sintel)


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("file", "data", "message"),
    [
        ("clean/alley_x/frame_0002.png", b"no image", "clean/alley_x, frame 1 is neither"),
        ("clean/alley_x/frame_0002.png", _png(np.zeros((9, 18, 3), np.uint8)), "frames 0 and 1 differ in size, 14x18"),
        ("flow/alley_x/frame_0002.flo", b"PIEH" + b"\xff" * 9, r"frame_0002\.flo is -1x-1"),
        ("flow/alley_x/frame_0002.flo", write_flo(np.zeros((2, 2, 2))), r"flow of the pair \(1, 2\) is \(2, 2\)"),
        ("occlusions/alley_x/frame_0001.png", b"", r"occlusions/alley_x/frame_0001\.png is neither"),
        ("invalid/alley_x/frame_0001.png", _png(np.full((14, 18), 9, np.uint8)), "other values than 0 and 255"),
        ("invalid/alley_x/frame_0001.png", _png(np.zeros((1, 1), np.uint8)), r"valid mask of the pair \(0, 1\) is"),
    ],
)
def test_broken_files_are_named(sintel, file, data, message):
    (sintel / "training" / file).write_bytes(data)
    with pytest.raises(DataError, match=message):
        make(sintel)
