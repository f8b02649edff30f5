"""PointOdyssey folders to shards, and back."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from trackpl_prep.convert import convert
from trackpl_prep.dataset import make_options
from trackpl_prep.point_odyssey import DATASET

from trackpl.errors import DataError
from trackpl.samples import decode
from trackpl.shards import read_index, read_members

GOLDEN = Path(__file__).parents[1] / "golden" / "data_metrics" / "formats.npz"
RAW = np.array([8 / 960, 4 / 540])  # from pixels of the annotation to those of the stand-in frames of 4 x 8


@pytest.fixture(params=["point_odyssey", "point_odyssey_new"])
def source(tmp_path, request):
    with np.load(GOLDEN) as golden, tarfile.open(fileobj=io.BytesIO(golden["point_odyssey__tar"].tobytes())) as tar:
        tar.extractall(tmp_path, filter="data")
    return tmp_path / request.param


@pytest.fixture
def scene(tmp_path):
    """A sequence of 10 frames of 36 x 64 with a camera that projects: published layout, true size unlike it."""
    return write_scene(tmp_path / "scene")


def write_scene(root, blender_axes=False):
    t, n, h, w = 10, 6, 36, 64
    rng = np.random.default_rng(3)
    points = rng.uniform([-2, -1, 4], [2, 1, 8], (n, 3)) + np.linspace(0, 1, t)[:, None, None] * [0.5, 0, 0]
    turn = np.linspace(0, 0.1, t)
    pose = np.tile(np.eye(4), (t, 1, 1))
    pose[:, 0, 0], pose[:, 0, 2], pose[:, 2, 0], pose[:, 2, 2] = np.cos(turn), np.sin(turn), -np.sin(turn), np.cos(turn)
    pose[:, :3, 3] = [0.1, 0.2, 0.3]
    lens = np.tile(np.array([[40.0, 0, 32], [0, 40, 18], [0, 0, 1]]), (t, 1, 1))
    camera = np.einsum("tij,tnj->tni", pose[:, :3, :3], points) + pose[:, None, :3, 3]
    image = np.einsum("tij,tnj->tni", lens, camera)
    if blender_axes:
        pose = np.diag([1.0, -1, -1, 1]) @ pose
    folder = root / "train" / "seq"
    for part in ("rgbs", "depths"):
        (folder / part).mkdir(parents=True)
    for i in range(t):
        picture = rng.integers(0, 255, (h, w, 3), dtype=np.uint8)
        Image.fromarray(picture).save(folder / "rgbs" / f"rgb_{i:05d}.jpg")
        depth = np.full((h, w), 100 * i, np.uint16)
        depth[0] = 65535
        Image.fromarray(depth).save(folder / "depths" / f"depth_{i:05d}.png")
    truth = {
        "trajs_2d": (image[..., :2] / image[..., 2:]).astype(np.float32),
        "trajs_3d": points.astype(np.float32),
        "visibs": np.ones((t, n), bool),
        "valids": np.ones((t, n), bool),
        "intrinsics": lens,
        "extrinsics": pose,
    }
    np.savez(folder / "anno.npz", **truth)
    return root, truth, camera[..., 2]


def make(source, **options):
    out = source.parent / f"out-{len(list(source.parent.iterdir()))}"
    index = convert(DATASET, source, out, make_options(DATASET, **options), quiet=True)
    assert index is not None
    return {s.key: read_members(s) for s in read_index(index).samples}


def test_the_evaluation_equals_the_golden(source):
    (members,) = make(source, split="test", evaluation=5).values()
    clip, golden = decode(members), np.load(GOLDEN)
    assert clip.name == ("ani_x",) and clip.size == (4, 8) and clip.depth is None
    np.testing.assert_allclose(clip.tracks[0].numpy() / RAW, golden["point_odyssey__tracks"], atol=1e-3)
    assert np.array_equal(clip.visible[0], golden["point_odyssey__visible"])
    assert np.array_equal(clip.valid[0], golden["point_odyssey__valid"])
    assert np.array_equal(clip.queries[0, :, 1:], clip.tracks[0, 0]) and not clip.queries[0, :, 0].any()
    files = sorted((source / "test" / "ani_x" / "rgbs").iterdir())
    assert members["rgb.bin"] == b"".join(f.read_bytes() for f in files)


def test_both_kinds_of_annotation_give_the_same_training_set(source):
    (members,) = make(source, split="test").values()
    clip = decode(members)
    raw = np.load(source / "test" / "ani_x" / "anno.npz")["trajs_2d"]
    other = np.load(source.parent / "point_odyssey_new" / "test" / "ani_x" / "anno.npz")
    seen = (clip.visible & clip.valid)[0].numpy()
    inside = np.isfinite(raw).all(-1) & (raw >= 0).all(-1) & (raw <= (960, 540)).all(-1)
    expected = other["visibs"] & other["valids"] & inside
    kept = expected.any(0)
    assert np.array_equal(seen, expected[:, kept])
    np.testing.assert_allclose(clip.tracks[0].numpy()[seen] / RAW, raw[:, kept][seen], atol=1e-3)
    assert clip.tracks.isfinite().all() and not clip.valid[0, ~np.isfinite(raw[:, kept]).all(-1)].any()


def test_a_camera_that_does_not_project_is_left_out_and_said(source, caplog):
    (members,) = make(source, split="test").values()
    clip, facts = decode(members), json.loads(members["meta.json"])["source"]
    assert clip.camera is None and clip.track_depth is None
    if source.name == "point_odyssey":
        assert "misses trajs_2d" in facts["no_3d"] and "anno.npz: trajs_3d" in caplog.text
    else:
        assert facts["no_3d"] == "anno.npz has no camera or no trajs_3d"


@pytest.mark.parametrize("blender_axes", [False, True])
def test_tracks_in_space_project_to_the_tracks(tmp_path, blender_axes):
    root, truth, z = write_scene(tmp_path / "scene", blender_axes)
    clip = decode(make(root, size=[36, 64])["seq-000"])
    seen = (clip.visible & clip.valid)[0].numpy()
    assert seen.sum() > 20
    np.testing.assert_allclose(clip.track_depth[0], z, rtol=1e-5)
    fx, fy, cx, cy = clip.camera.intrinsics[0].T
    points = np.concatenate([truth["trajs_3d"], np.ones((10, 6, 1))], -1)
    camera = np.einsum("tij,tnj->tni", clip.camera.pose[0].numpy(), points)
    x = camera[..., 0] / camera[..., 2] * fx[:, None].numpy() + cx[:, None].numpy()
    y = camera[..., 1] / camera[..., 2] * fy[:, None].numpy() + cy[:, None].numpy()
    np.testing.assert_allclose(np.stack([x, y], -1)[seen], clip.tracks[0].numpy()[seen], atol=1e-2)


def test_smaller_frames_scale_tracks_and_camera(scene):
    root, *_ = scene
    full, half = (decode(make(root, size=s)["seq-000"]) for s in ([36, 64], [72, 128]))
    assert np.allclose(half.tracks * 2, full.tracks[:, :, :6], atol=1e-3)
    assert np.allclose(half.camera.intrinsics * 2, full.camera.intrinsics)
    assert np.allclose(half.track_depth, full.track_depth)


def test_depth_maps_are_metres(scene):
    depth = decode(make(scene[0], size=[36, 64])["seq-000"]).depth[0, :, 0]
    assert depth[:, 0].isinf().all()
    steps = np.arange(10) * 100 / 65535 * 1000
    np.testing.assert_allclose(depth[:, 5, 5], steps, atol=2e-4)
    assert decode(make(scene[0], size=[36, 64], no_depth=True)["seq-000"]).depth is None


def test_segments_hold_what_is_seen_in_them(scene):
    root, truth, _ = scene
    truth["visibs"][:4, 2] = False
    np.savez(root / "train" / "seq" / "anno.npz", **truth)
    made = make(root, size=[36, 64], segment=4)
    clips = [decode(m) for m in made.values()]
    assert list(made) == ["seq-000", "seq-001", "seq-002"] and [c.frames for c in clips] == [4, 4, 2]
    whole = decode(make(root, size=[36, 64], segment=0)["seq-000"])
    assert whole.frames == 10
    for i, clip in enumerate(clips):
        part = slice(4 * i, 4 * i + 4)
        seen = (whole.visible & whole.valid)[0, part].any(0)
        assert np.array_equal(clip.tracks[0], whole.tracks[0, part][:, seen])
        assert np.allclose(clip.depth[0, :, 0, 9], whole.depth[0, part, 0, 9], atol=0.01)
        assert json.loads(made[f"seq-{i:03d}"]["meta.json"])["source"]["first_frame"] == 4 * i


def test_missing_parts_are_named(scene, tmp_path):
    root = scene[0]
    folder = root / "train" / "seq"

    def fails(match, where=root, **options):
        with pytest.raises(DataError, match=match):
            convert(DATASET, where, tmp_path / "o", make_options(DATASET, size=[36, 64], **options), quiet=True)

    fails(r"no folder of sequences .*train/train; expected:\n +SOURCE/<split>", root / "train")
    fails("no split 'trian'; did you mean 'train'", split="trian")
    fails("--segment must be 0 or at least 2", segment=1)
    (folder / "depths" / "depth_00004.png").rename(tmp_path / "gone.png")
    fails("depth_00004.png cannot be read: No such file")
    Image.fromarray(np.zeros((36, 64), np.uint8)).save(folder / "depths" / "depth_00004.png")
    fails("depth_00004.png is uint8 .*expected 16 bits")
    (folder / "rgbs" / "rgb_00009.jpg").unlink()
    fails("anno.npz has 10 frames, rgbs has 9")
    (folder / "anno.npz").rename(tmp_path / "anno.npz")
    fails("the sequence seq is incomplete: no .*anno.npz")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"trajs_2d": None}, "no array trajs_2d of the published kind"),
        ({"trajs_2d": np.zeros((10, 6, 3), np.float32)}, r"trajs_2d of shape \(10, 6, 3\)"),
        ({"trajs_2d": np.zeros((10, 6, 2), int)}, "no array trajs_2d of the published kind"),
        ({"visibs": np.ones((10, 5), bool)}, r"visibs of shape \(10, 5\); expected \(10, 6\)"),
        ({"valids": None}, "neither visibs with valids nor visibilities"),
        ({"extrinsics": np.zeros((10, 3, 4))}, r"extrinsics \(10, 3, 4\); expected"),
        ({"trajs_3d": np.array([{"a": 1}], dtype=object)}, "no array trajs_3d of the published kind"),
    ],
)
def test_other_annotations_are_refused(scene, tmp_path, change, message):
    root, truth, _ = scene
    arrays = {k: v for k, v in {**truth, **change}.items() if v is not None}
    np.savez(root / "train" / "seq" / "anno.npz", **arrays)
    with pytest.raises(DataError, match=f"anno.npz.*{message}"):
        convert(DATASET, root, tmp_path / "o", make_options(DATASET, size=[36, 64]), quiet=True)


def test_bombs_and_rubbish_are_refused(scene, tmp_path):
    root = scene[0]
    path = root / "train" / "seq" / "anno.npz"

    def fails():
        with pytest.raises(DataError, match=r"anno.npz"):
            convert(DATASET, root, tmp_path / "o", make_options(DATASET, size=[36, 64]), quiet=True)

    whole = path.read_bytes()
    for bad in (b"", b"PK\x03\x04 not a zip", whole[: len(whole) // 2]):
        path.write_bytes(bad)
        fails()
    header = b"\x93NUMPY\x01\x00v\x00" + (
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (90000, 90000, 2), }".ljust(117) + b"\n"
    )
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("trajs_2d.npy", header + bytes(10**7))
    fails()
