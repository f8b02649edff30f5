"""TAPVid-3D clips to shards, and back."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from trackpl_prep.convert import convert
from trackpl_prep.dataset import make_options
from trackpl_prep.tapvid3d import DATASET, project

from trackpl.errors import DataError
from trackpl.samples import decode
from trackpl.shards import read_index, read_members

GOLDEN = Path(__file__).parents[1] / "golden" / "data_metrics" / "formats.npz"
NAMES = {"adt": "seq_1", "drivetrack": "seq_2", "pstudio": "seq_0"}


@pytest.fixture
def source(tmp_path):
    with np.load(GOLDEN) as golden, tarfile.open(fileobj=io.BytesIO(golden["tapvid3d__tar"].tobytes())) as tar:
        tar.extractall(tmp_path, filter="data")
    return tmp_path / "tapvid3d"


def make(source, **options):
    index = convert(DATASET, source, source.parent / "out", make_options(DATASET, **options), quiet=True)
    samples = [read_members(s) for s in read_index(index).samples]
    return {c.name[0]: (c, m) for c, m in ((decode(m), m) for m in samples)}


@pytest.mark.parametrize("above", [False, True])
def test_every_clip_equals_the_golden(source, above):
    made = make(source.parent if above else source)
    assert list(made) == [f"{s}/{n}" for s, n in NAMES.items()]
    golden = np.load(GOLDEN)
    for subset, name in NAMES.items():
        clip, members = made[f"{subset}/{name}"]
        wanted = {k.removeprefix(f"tapvid3d__{subset}_"): golden[k] for k in golden.files if f"3d__{subset}_" in k}
        xyz, (fx, fy, cx, cy) = wanted["tracks_XYZ"], wanted["fx_fy_cx_cy"]
        (x, y), z = clip.tracks[0].double().numpy().transpose(2, 0, 1), clip.track_depth[0].double().numpy()
        back = np.stack([(x - cx) / fx * z, (y - cy) / fy * z, z], -1)
        known = clip.valid[0].numpy()
        assert (known == (xyz[..., 2] > 1e-6)).all() and known.any()
        size = np.linalg.norm(xyz, axis=-1)
        assert (np.linalg.norm(back - xyz, axis=-1)[known] < 1e-4 * size[known]).all()
        assert (clip.visible[0].numpy() == wanted["visibility"] & known).all()
        assert (clip.queries[0].numpy() == wanted["queries_xyt"][:, [2, 0, 1]]).all()
        assert np.allclose(clip.camera.intrinsics[0], wanted["fx_fy_cx_cy"])
        pose = wanted.get("extrinsics_w2c", np.tile(np.eye(4), (len(xyz), 1, 1)))
        assert np.allclose(clip.camera.pose[0], pose, atol=1e-6)
        video = clip.video[0].permute(0, 2, 3, 1).numpy()
        assert np.abs(video.astype(int) - wanted["frames"]).max() <= 2
        with np.load(source / subset / f"{name}.npz", allow_pickle=True) as arrays:
            assert members["rgb.bin"] == b"".join(bytes(j) for j in arrays["images_jpeg_bytes"])
        assert (b"not published" in members["meta.json"]) == ("extrinsics_w2c" not in wanted)
        assert b"no redistribution" in members["meta.json"]


def test_subset_and_list(source, tmp_path):
    assert list(make(source, subset="pstudio")) == ["pstudio/seq_0"]
    (tmp_path / "list.txt").write_text("drivetrack/seq_2.npz\n\nseq_0\nnot_there\n")
    index = convert(
        DATASET,
        source,
        tmp_path / "mini",
        make_options(DATASET, split="minival", list=tmp_path / "list.txt"),
        quiet=True,
    )
    assert index.name == "tapvid3d_minival.index.json"
    assert [decode(read_members(s)).name[0] for s in read_index(index).samples] == ["drivetrack/seq_2", "pstudio/seq_0"]


def test_minival_needs_its_list(source, tmp_path):
    with pytest.raises(DataError, match="--list FILE"):
        make(source, split="minival")
    (tmp_path / "list.txt").write_text("seq_9\n")
    with pytest.raises(DataError, match="did you mean"):
        make(source, split="minival", list=tmp_path / "list.txt")


def test_points_behind_the_camera_are_not_valid():
    xyz = np.array([[1, 2, 4], [1, 2, -4], [1, 2, 0], [np.nan, 0, 1], [1e7, 0, 1], [0, 0, 1e-7]])
    xy, depth, known = project(xyz, np.array([10, 20, 5, 6]))
    assert known.tolist() == [True, False, False, False, False, False]
    assert xy[0].tolist() == [7.5, 16] and depth[0] == 4
    assert not xy[1:].any() and not depth[1:].any()


def damage(path, **changes):
    with np.load(path, allow_pickle=True) as arrays:
        content = {k: arrays[k] for k in arrays.files} | changes
    np.savez(path, **{k: v for k, v in content.items() if v is not None})


class Evil:
    def __reduce__(self):
        return print, ("executed",)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tracks_XYZ": None}, "has no tracks_XYZ"),
        ({"tracks_XYZ": np.zeros((6, 4, 2))}, "expected \\(6, N, 3\\)"),
        ({"queries_xyt": np.zeros((3, 3))}, "4 tracks but 3 queries"),
        ({"queries_xyt": np.full((4, 3), 6.0)}, "outside of the 6 frames"),
        ({"queries_xyt": np.full((4, 3), np.nan)}, "outside of the 6 frames"),
        ({"visibility": np.zeros((4, 6), bool)}, "must be bool \\[6, 4\\]"),
        ({"fx_fy_cx_cy": np.array([0.0, 1, 1, 1])}, "above 0"),
        ({"extrinsics_w2c": np.full((6, 4, 4), np.inf)}, "not finite"),
        ({"extrinsics_w2c": np.zeros((5, 4, 4))}, "expected \\(6, 4, 4\\)"),
        ({"images_jpeg_bytes": np.zeros((6, 2, 2, 3), np.uint8)}, "one JPEG a frame"),
        ({"images_jpeg_bytes": np.array([b"GIF89a"] * 6)}, "frame 0"),
        ({"images_jpeg_bytes": np.array([Evil()] * 6, object)}, "which is code"),
    ],
)
def test_broken_clips_say_what_is_wrong(source, changes, message, capsys):
    damage(source / "adt/seq_1.npz", **changes)
    with pytest.raises(DataError, match=message) as error:
        make(source, subset="adt")
    assert "seq_1.npz" in str(error.value)
    assert "executed" not in capsys.readouterr().out


def test_a_cut_file_and_the_wrong_folder(source, tmp_path):
    path = source / "adt/seq_1.npz"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"seq_1\.npz.*npz archive"):
        make(source, subset="adt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no \.npz in adt/[^$]*expected:[^$]*drivetrack"):
        convert(DATASET, tmp_path / "empty", tmp_path / "other", quiet=True)
