"""CoTracker's Kubric dumps to shards, and back."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from trackpl_prep.convert import convert
from trackpl_prep.cotracker_kubric import DATASETS
from trackpl_prep.dataset import make_options

from trackpl.errors import DataError
from trackpl.samples import decode
from trackpl.shards import read_index, read_members

GOLDEN = Path(__file__).parents[1] / "golden" / "data_metrics" / "formats.npz"
V1, V3 = DATASETS


@pytest.fixture
def source(tmp_path):
    with np.load(GOLDEN) as golden, tarfile.open(fileobj=io.BytesIO(golden["cotracker_kubric__tar"].tobytes())) as tar:
        tar.extractall(tmp_path, filter="data")
    return tmp_path / "cotracker_kubric"


def make(dataset, source, out="out", **options):
    index = convert(dataset, source, source.parent / out, make_options(dataset, **options), quiet=True)
    members = [read_members(s) for s in read_index(index).samples]
    return [(decode(m), m, json.loads(m["meta.json"])["source"]) for m in members]


@pytest.mark.parametrize("above", [False, True])
def test_the_first_version_equals_the_golden(source, above):
    golden = np.load(GOLDEN)
    made = make(V1, source.parent if above else source, lossless=True)
    assert [c.name[0] for c, _, _ in made] == ["0000", "0001"]
    for i, (clip, members, _) in enumerate(made):
        coords, occluded, frames = (golden[f"cotracker_kubric__{i}_{k}"] for k in ("coords", "occluded", "frames"))
        assert (clip.tracks[0].numpy() == coords.transpose(1, 0, 2)).all()
        assert (clip.visible[0].numpy() == ~occluded.T).all() and clip.valid.all()
        assert (clip.video[0].permute(0, 2, 3, 1).numpy() == frames).all()
        files = sorted((source / f"{i:04d}" / "frames").iterdir())
        assert members["rgb.bin"] == b"".join(f.read_bytes() for f in files)
        assert clip.track_depth is None and clip.camera is None


def test_frames_are_jpeg_unless_said_otherwise(source):
    small, large = make(V1, source)[0], make(V1, source, "best", quality=100)[0]
    golden = np.load(GOLDEN)["cotracker_kubric__0_frames"].transpose(0, 3, 1, 2).astype(int)
    assert small[1]["rgb.bin"][:2] == b"\xff\xd8" and len(small[1]["rgb.bin"]) < len(large[1]["rgb.bin"])
    assert np.abs(large[0].video[0].numpy() - golden).mean() < 1 < np.abs(small[0].video[0].numpy() - golden).mean() < 8
    with pytest.raises(DataError, match="1 to 100"):
        make(V1, source, "bad", quality=0)


# The dump of CoTracker3: points that stand still or move in the world, seen by a camera that turns and moves.

T, N, SIZE, FOCAL = 5, 40, (24, 32), 35.0


def rotation(axis, angle):
    """Rodrigues' formula, and the quaternion (w, x, y, z) of the same rotation."""
    axis = np.asarray(axis) / np.linalg.norm(axis)
    k = np.array([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]])
    turn = np.eye(3) + np.sin(angle) * k + (1 - np.cos(angle)) * k @ k
    return turn, [np.cos(angle / 2), *(np.sin(angle / 2) * axis)]


@pytest.fixture
def scene():
    rng = np.random.default_rng(0)
    turns, quaternions = zip(*[rotation((1, 2, 3), 0.4 + 0.1 * t) for t in range(T)], strict=True)
    centres = rng.normal(size=(T, 3)) * 0.2 + [1, 2, 3]
    (h, w), scale = SIZE, FOCAL / 32 * SIZE[1]
    start = np.concatenate([rng.uniform(-0.3, 0.3, (N, 2)), -np.ones((N, 1))], 1) * rng.uniform(4, 8, (N, 1))
    world = np.tile(start @ turns[0].T + centres[0], (T, 1, 1))
    world[:, N // 2 :] += rng.normal(size=(T, N - N // 2, 3))  # half of them move
    local = np.stack([(world[t] - centres[t]) @ turns[t] for t in range(T)])  # Kubric's axes: -z forward, y up
    z = -local[..., 2]
    xy = np.stack([w / 2 + scale * local[..., 0] / z, h / 2 - scale * local[..., 1] / z], -1).astype(np.float32)
    inside = ((xy >= 0) & (xy < (w, h))).all(-1) & (z > 0)
    distance = np.full((T, h, w), 20, np.float32)
    depth = distance.copy()
    for t, n in zip(*np.nonzero(inside), strict=True):
        distance[t, int(xy[t, n, 1]), int(xy[t, n, 0])] = np.linalg.norm(local[t, n])
        depth[t, int(xy[t, n, 1]), int(xy[t, n, 0])] = z[t, n]
    camera = {"focal_length": FOCAL, "sensor_width": 32.0, "positions": centres, "quaternions": np.array(quaternions)}
    return {"xy": xy, "z": z, "inside": inside, "camera": camera, "distance": distance, "depth": depth, "world": world}


def write(folder, scene, maps="distance", **changes):
    clip = folder / "0007"
    for name in ("frames", "depths"):
        (clip / name).mkdir(parents=True, exist_ok=True)
    for t in range(T):
        Image.fromarray(np.full((*SIZE, 3), 40 * t, np.uint8)).save(clip / "frames" / f"{t:03d}.png")
        np.save(clip / "depths" / f"{t:03d}.npy", scene[maps][t] if isinstance(maps, str) else maps[t])
    record = {
        "coords": scene["xy"].transpose(1, 0, 2),
        "visibility": ~scene["inside"].T,
        "coords_depth": scene["z"].T.astype(np.float32),
        "camera": scene["camera"],
    }
    np.save(clip / "0007.npy", {k: v for k, v in (record | changes).items() if v is not None})
    return folder


def test_the_third_version_has_depth_and_camera_that_hold_together(tmp_path, scene):
    ((clip, _, facts),) = make(V3, write(tmp_path / "set", scene), lossless=True)
    known = scene["z"] > 0
    assert (clip.valid[0].numpy() == known).all()
    assert np.allclose(clip.tracks[0].numpy(), np.where(known[..., None], scene["xy"], 0))
    assert np.allclose(clip.track_depth[0].numpy(), np.where(known, scene["z"], 0))
    assert (clip.visible[0].numpy() == scene["inside"]).all()
    assert facts["depth_maps"] == "distance" and facts["depth_differences"]["distance"] < 1e-3
    t, n = np.nonzero(scene["inside"])
    x, y = scene["xy"][t, n].astype(int).T
    (fx, fy, cx, cy), pose = clip.camera.intrinsics[0, 0].double().numpy(), clip.camera.pose[0].double().numpy()
    assert (fx, fy, cx, cy) == (35, 35, 16, 12)
    there = clip.depth[0, :, 0].numpy()[t, y, x]
    assert np.median(np.abs(there / scene["z"][t, n] - 1)) < 0.01
    xy, z = clip.tracks[0].double().numpy(), clip.track_depth[0].double().numpy()[..., None]
    local = np.concatenate([(xy - (cx, cy)) / (fx, fy) * z, z, np.ones_like(z)], -1)
    back = np.einsum("tij,tnj->tni", np.linalg.inv(pose), local)[..., :3]
    assert np.abs(back - scene["world"])[known].max() < 1e-3


def test_maps_that_are_depth_are_taken_as_such(tmp_path, scene):
    ((clip, _, facts),) = make(V3, write(tmp_path / "set", scene, "depth"))
    assert facts["depth_maps"] == "depth"
    assert np.allclose(clip.depth[0, :, 0], scene["depth"], atol=1e-3)


def test_what_does_not_fit_is_left_out_and_said(tmp_path, scene):
    wrong = scene["camera"] | {"quaternions": scene["camera"]["quaternions"][:, [1, 2, 3, 0]]}
    write(tmp_path / "set", scene, scene["distance"] * 1.5, camera=wrong)
    ((clip, _, facts),) = make(V3, tmp_path / "set")
    assert clip.depth is None and clip.camera is None and clip.track_depth is not None
    assert "left out" in facts["depth_maps"] and "left out" in facts["camera"]


def test_depth_maps_can_be_left_alone_or_missing(tmp_path, scene):
    source = write(tmp_path / "set", scene)
    assert make(V3, source, "a", no_depth=True)[0][0].depth is None
    shutil.rmtree(source / "0007/depths")
    ((clip, _, _),) = make(V3, source, "b")
    assert clip.depth is None and clip.camera is not None
    write(tmp_path / "set", scene, camera=None, coords_depth=None)
    ((clip, _, _),) = make(V3, source, "c")
    assert clip.camera is None and clip.track_depth is None and clip.tracks is not None


class Evil:
    def __reduce__(self):
        return print, ("executed",)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"coords": None}, "coords: expected an array of numbers"),
        ({"coords": np.zeros((N, T + 1, 2))}, "for 5 frames"),
        ({"visibility": np.zeros((T, N), bool)}, "expected numbers"),
        ({"coords_depth": np.zeros((N, 2))}, "expected numbers"),
        ({"camera": {"focal_length": "35", "positions": 0, "quaternions": 0}}, "not Kubric's"),
        ({"camera": Evil()}, "which is code"),
    ],
)
def test_broken_annotations_say_what_is_wrong(tmp_path, scene, changes, message, capsys):
    with pytest.raises(DataError, match=message) as error:
        make(V3, write(tmp_path / "set", scene, **changes))
    assert "0007.npy" in str(error.value)
    assert "executed" not in capsys.readouterr().out


def test_broken_folders_say_what_is_wrong(tmp_path, scene):
    source = write(tmp_path / "set", scene)
    (source / "0007/depths/002.npy").write_bytes(b"x")
    with pytest.raises(DataError, match=r"002\.npy"):
        make(V3, source)
    (source / "0007/depths/002.npy").unlink()
    with pytest.raises(DataError, match="4 depth maps for 5 frames"):
        make(V3, source, "b")
    np.save(source / "0007/0007.npy", np.zeros(3))
    with pytest.raises(DataError, match="holds no dict"):
        make(V3, source, "c")
    (source / "0008/frames").mkdir(parents=True)
    with pytest.raises(DataError, match=r"0008 has frames but no 0008\.npy; expected:"):
        make(V3, source, "d")
    shutil.rmtree(source / "0007")
    with pytest.raises(DataError, match="no folders with an annotation; expected:"):
        make(V1, source, "e")
