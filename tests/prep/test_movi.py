"""MOVi: tracks equal to the reference's and to a scene that is known exactly; published folders to samples."""

import dataclasses
import itertools
import pickle
from pathlib import Path

import numpy as np
import pytest
from movi_scene import annotations, flows, movi_record, png, product, record, truth, turn
from trackpl_prep import movi_tracks
from trackpl_prep.convert import convert
from trackpl_prep.dataset import make_options
from trackpl_prep.movi import MOVI_E, MOVI_F, PANNING, TAPVID_KUBRIC
from trackpl_prep.movi_records import scene_of
from trackpl_prep.movi_tracks import every_pixel, focal, track

from trackpl.errors import DataError
from trackpl.shards import decode, read_index, read_members

GOLDEN = Path(__file__).parents[1] / "golden" / "data_metrics"
SIZE = (48, 48)


def load(name):
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def reference():
    return load("movi_tracks")


@pytest.fixture(scope="module")
def scene():
    """The scene that the goldens were made of."""
    z = load("movi_sample")
    low, high = map(float, z["depth_range"])
    return movi_tracks.Scene(
        segments=z["segmentations"][..., 0],
        depth=z["depth"][..., 0],
        low=low,
        step=(high - low) / 65535,
        objects=z["object_coordinates"],
        normals=z["normal"],
        boxes=z["bboxes_3d"],
        rotations=z["quaternions"],
        centres=z["cam_positions"],
        cameras=z["cam_quaternions"],
        focal=focal(float(z["focal_length"]), float(z["sensor_width"]), z["depth"].shape[1:3]),
    )


@pytest.fixture(scope="module")
def world():
    return truth(24, SIZE, 5, seed=3)


@pytest.fixture(scope="module")
def features(world):
    return annotations(world)


@pytest.fixture(scope="module")
def exact(features):
    return scene_of(features, "scene")


def publish(root, records, name="movi_e", split="train", size="256x256"):
    """Write records into a folder as TFDS does, two to a file."""
    folder = root / name / size / "1.0.0"
    folder.mkdir(parents=True, exist_ok=True)
    files = [records[i : i + 2] for i in range(0, len(records), 2)]
    for i, several in enumerate(files):
        file = folder / f"{name}-{split}.tfrecord-{i:05d}-of-{len(files):05d}"
        file.write_bytes(b"".join(map(record, several)))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def make(dataset, source, out, **options):
    """Convert, and give the index and the clips."""
    path = convert(dataset, source, out, make_options(dataset, **options), quiet=True, per_shard=1)
    index = read_index(path)
    return index, [decode(read_members(s)) for s in index.samples]


# The reference ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", ["full", "window", "padded", "snap"])
def test_tracks_equal_the_reference(scene, reference, run):
    z = {k.removeprefix(f"{run}__"): v for k, v in reference.items() if k.startswith(f"{run}__")}
    n, window = int(z["n_unpadded"]), z["window"].astype(float)
    origin, scale = window[:2], (window[2:] - window[:2]) / scene.size
    queries = z["query_points"][:n].astype(float)
    queries[:, 1:] = queries[:, 1:] * scale + origin
    points = track(scene, np.floor(queries + 1e-3).astype(int), window=tuple(window), snap=run == "snap")
    xy = (points.xy.transpose(2, 0, 1) - origin[::-1]) / scale[::-1]
    np.testing.assert_allclose(xy, z["target_points"][:n], atol=1e-4, rtol=0)
    np.testing.assert_array_equal(points.hidden.T, z["occluded"][:n])
    fx, fy = np.array(scene.focal) * scene.size[::-1]
    x, y = points.xy[:, 0] - scene.size[1] / 2, points.xy[:, 1] - scene.size[0] / 2
    distance = points.z * np.sqrt(1 + (x / fx) ** 2 + (y / fy) ** 2)
    np.testing.assert_allclose(distance.T, z["camera_distance"], atol=1e-4, rtol=0)


@pytest.mark.parametrize(("name", "frame"), [("first", 0), ("last", 7)])
def test_dense_tracks_equal_the_reference(scene, name, frame):
    z = load("movi_dense_tracks")
    points = track(scene, every_pixel(scene, frame))
    np.testing.assert_allclose(points.xy.transpose(2, 0, 1), z[f"{name}__coords"], atol=1e-4, rtol=0)
    hidden = np.unpackbits(z[f"{name}__occluded"], axis=-1, count=scene.frames).astype(bool)
    np.testing.assert_array_equal(points.hidden.T, hidden)
    np.testing.assert_allclose(points.z.T[::4], -z[f"{name}__camera_xyz"][..., 2], atol=1e-4, rtol=0)


def test_some_frames_are_those_of_all(scene):
    queries, chosen = every_pixel(scene, 3)[::5], [6, 0]
    some, every = track(scene, queries, chosen), track(scene, queries)
    np.testing.assert_allclose(some.xy, every.xy[chosen], atol=1e-4, rtol=0)
    np.testing.assert_array_equal(some.hidden, every.hidden[chosen])


def test_trusted_normals_equal_the_reference(scene, reference):
    trusted = movi_tracks.trusted_normals(scene.normals, np.arange(scene.segments.size))
    np.testing.assert_array_equal(trusted, np.unpackbits(reference["trust_normals"]).astype(bool))


def test_shares_equal_the_reference(reference):
    checked = 0
    for case, (fraction, total) in itertools.product(range(6), [(0.1, 256), (0.25, 96), (1.0, 2048)]):
        counts = reference[f"alloc__counts{case}"]
        expected = reference[f"alloc__n{case}_frac{fraction}_total{total}"]
        shares = movi_tracks.allocate(counts, total, fraction)
        np.testing.assert_array_equal(np.pad(shares, (0, len(expected) - len(shares))), expected)
        checked += 1
    assert checked == 18


def test_cameras_equal_the_reference_turned_into_our_axes(scene, reference):
    intrinsics, pose = movi_tracks.pinhole(scene)
    h, w = scene.size
    matrix = reference["camera__intrinsics"]  # to (x z, y z, z) of the unit square, in Blender's axes
    np.testing.assert_allclose(intrinsics[:, :2], np.abs(matrix[:, [0, 1], [0, 1]]) * [w, h], rtol=1e-6)
    np.testing.assert_allclose(intrinsics[:, 2:], np.abs(matrix[:, :2, 2]) * [w, h], rtol=1e-6)
    expected = np.diag([1, -1, -1, 1]) @ np.linalg.inv(reference["camera__matrix_world"])
    np.testing.assert_allclose(pose, expected, atol=2e-5)


# A scene that is known exactly ------------------------------------------------------------------------------


def test_dense_tracks_are_where_the_scene_says(world, exact):
    for source in (0, 13):
        points = track(exact, every_pixel(exact, source))
        for t in (0, 7, 23):
            xy, z = world.move(source, t)
            np.testing.assert_allclose(points.xy[t].T.reshape(*SIZE, 2), xy, atol=5e-3)
            np.testing.assert_allclose(points.z[t].reshape(SIZE), z, atol=2e-3)


def test_visible_is_what_the_scene_shows(world, exact):
    points = track(exact, every_pixel(exact, 0))
    agree = []
    for t in (0, 6, 23):
        xy, z = world.move(0, t)
        column, row = np.floor(xy).astype(int).transpose(2, 0, 1)
        inside = (column >= 0) & (column < SIZE[1]) & (row >= 0) & (row < SIZE[0])
        _, shown = world.project(world.points[t], t)
        met = shown[row.clip(0, SIZE[0] - 1), column.clip(0, SIZE[1] - 1)]
        agree.append((~points.hidden[t].reshape(SIZE) == (inside & (np.abs(met - z) < 0.05 * z))).mean())
    assert agree[0] == 1 and min(agree) > 0.95


@pytest.mark.parametrize("size", [(30, 48), (48, 30)])
def test_frames_that_are_not_square(size):
    wide = truth(2, size, 3, seed=1)
    features = annotations(wide)
    with pytest.raises(DataError, match="not square: say --aspect renderer"):
        scene_of(features, "record 7")
    scene = scene_of(features, "record 7", "renderer")
    points = track(scene, every_pixel(scene, 0))
    np.testing.assert_allclose(points.xy[1].T.reshape(*size, 2), wide.move(0, 1)[0], atol=5e-3)
    assert focal(35, 32, (30, 48), "challenge") == (35 / 32, 35 / 32 * 30 / 48)


def test_depth_is_along_the_axis(world, exact):
    _, z = world.project(world.points[5], 5)
    np.testing.assert_allclose(movi_tracks.depth_map(exact)[5], z, atol=1e-3)


def test_sampling(exact):
    pixels, queries = movi_tracks.sample(exact, 256, np.random.default_rng(1))
    np.testing.assert_array_equal(pixels, queries)
    ids = exact.segments[tuple(pixels.T)]
    assert (np.diff(ids.astype(int)) >= 0).all() and len({*ids}) > 3
    background = pixels[ids == 0]
    assert (np.diff(background[:, 0]) >= 0).all()
    assert all(len({*axis}) == 1 for axis in pixels.T % 4)  # one grid
    grid = exact.segments[tuple(slice(p % 4, None, 4) for p in pixels[0])]
    counts = np.bincount(grid.ravel())
    np.testing.assert_array_equal(np.bincount(ids), movi_tracks.allocate(counts, 256, 0.1))
    again, _ = movi_tracks.sample(exact, 256, np.random.default_rng(1))
    other, _ = movi_tracks.sample(exact, 256, np.random.default_rng(2))
    np.testing.assert_array_equal(pixels, again)
    assert pixels.shape != other.shape or (pixels != other).any()


def test_few_pixels_give_few_rows_and_no_copies(exact):
    pixels, _ = movi_tracks.sample(exact, 4096, np.random.default_rng(0), fraction=0.05)
    assert 0 < len(pixels) < 4096
    assert len(np.unique(pixels, axis=0)) > 0.9 * len(pixels)
    nothing, _ = movi_tracks.sample(exact, 256, np.random.default_rng(0), fraction=1e-6)
    assert len(nothing) == 0 and track(exact, nothing).xy.shape == (24, 2, 0)


def test_sampling_in_a_window(exact):
    pixels, _ = movi_tracks.sample(exact, 256, np.random.default_rng(0), window=(10, 20, 30, 48))
    assert (pixels[:, 1] >= 10).all() and (pixels[:, 1] < 30).all() and (pixels[:, 2] >= 20).all()


def test_snapping_begins_beside_what_is_in_front(exact):
    beside = movi_tracks.beside_occluder(exact)
    distance = exact.depth * exact.step + exact.low
    for t, i, j in ((0, 20, 20), (5, 0, 0), (9, 47, 31)):
        around = distance[t, max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2]
        assert beside[t, i, j] == (around.min() < 0.95 * distance[t, i, j])
    pixels, queries = movi_tracks.sample(exact, 2000, np.random.default_rng(0), fraction=1.0, snap=True)
    assert not beside[tuple(pixels.T)].any()
    moved = (pixels != queries).any(-1)
    assert 5 < moved.sum() < len(moved) / 4
    assert np.abs(pixels - queries)[:, 1:].max() == 1 and (pixels[:, 0] == queries[:, 0]).all()
    assert (distance[tuple(queries[moved].T)] * 0.95 >= distance[tuple(pixels[moved].T)]).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"boxes": np.full((5, 24, 8, 3), np.nan, np.float32)}, "'boxes' holds numbers that are not finite"),
        ({"boxes": np.zeros((2, 24, 8, 3)), "rotations": np.zeros((2, 24, 4))}, "segment ids up to 5 do not fit 2"),
        ({"centres": np.zeros((23, 3))}, r"'centres' has the shape \(23, 3\), expected \(24, 3\)"),
        ({"step": -1.0}, "must be positive"),
        ({"low": float("inf")}, "'low' holds numbers"),
    ],
)
def test_annotations_that_cannot_be(exact, change, message):
    with pytest.raises(DataError, match=message):
        dataclasses.replace(exact, **change)


# Folders to samples -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tapvid(world, features, tmp_path_factory):
    """The scene as TAP-Vid-Kubric, with all that can be kept."""
    root = tmp_path_factory.mktemp("tapvid")
    publish(root, [movi_record(features)], split="validation")
    _, (clip,) = make(TAPVID_KUBRIC, root, root / "out", dense="both")
    return clip


def test_a_clip_agrees_with_the_scene(world, features, tapvid):
    clip, rows = tapvid, np.arange(tapvid.tracks.shape[2])
    assert clip.frames == 24 and 0 < len(rows) <= 256 and clip.name == ("scene_0",) and clip.fps == 12
    np.testing.assert_array_equal(clip.video[0].permute(0, 2, 3, 1), features["video"])  # without loss
    np.testing.assert_array_equal(clip.labels[0], world.ids)
    query = clip.queries[0].numpy()
    t, (column, row) = query[:, 0].astype(int), np.floor(query[:, 1:]).astype(int).T
    np.testing.assert_array_equal(query[:, 1:] % 1, 0.5)
    np.testing.assert_allclose(clip.tracks[0].numpy()[t, rows], query[:, 1:], atol=5e-3)
    assert clip.visible[0].numpy()[t, rows].all() and clip.valid.all()
    for n in rows[::7]:
        xy, z = zip(*(world.move(t[n], k) for k in range(24)), strict=True)
        np.testing.assert_allclose(clip.tracks[0, :, n], np.stack(xy)[:, row[n], column[n]], atol=5e-3)
        np.testing.assert_allclose(clip.track_depth[0, :, n], np.stack(z)[:, row[n], column[n]], atol=2e-3)


def test_background_tracks_are_depth_and_cameras_reprojected(world, tapvid):
    """Pixel, depth map and camera of the query's frame to the world, and into every other frame."""
    clip, checked = tapvid, 0
    pose, intrinsics = clip.camera.pose[0].double().numpy(), clip.camera.intrinsics[0].double().numpy()
    for n, (t, x, y) in enumerate(clip.queries[0].numpy()):
        t, row, column = int(t), int(y), int(x)
        if world.ids[t, row, column]:
            continue
        fx, fy, cx, cy = intrinsics[t]
        z = float(clip.depth[0, t, 0, row, column])
        point = np.linalg.inv(pose[t]) @ [(x - cx) / fx * z, (y - cy) / fy * z, z, 1]
        seen = np.einsum("tij,j->ti", pose, point)
        np.testing.assert_allclose(seen[:, 2], clip.track_depth[0, :, n], atol=3e-3)
        xy = seen[:, :2] / seen[:, 2:3] * intrinsics[:, :2] + intrinsics[:, 2:]
        np.testing.assert_allclose(xy, clip.tracks[0, :, n], atol=1e-2)
        checked += 1
    assert checked > 20


def test_visible_points_lie_on_the_depth_map(tapvid):
    """Along the axis, not from the camera's centre: those differ by up to a tenth here."""
    x, y = np.floor(tapvid.tracks[0].numpy()).astype(int).transpose(2, 0, 1)
    visible = tapvid.visible[0].numpy()
    t = np.arange(24)[:, None].repeat(visible.shape[1], 1)[visible]
    met = tapvid.depth[0, :, 0].numpy()[t, y[visible].clip(0, 47), x[visible].clip(0, 47)]
    assert np.median(np.abs(met / tapvid.track_depth[0].numpy()[visible] - 1)) < 0.01


def test_dense_tracks_are_stored_as_flow_with_depth(world, tapvid):
    flow = tapvid.flow
    assert flow.pairs == tuple((s, t) for s in (0, 23) for t in range(24))
    here = np.stack(np.meshgrid(np.arange(48) + 0.5, np.arange(48) + 0.5), -1)
    assert flow.valid.float().mean() > 0.9 and 0.3 < flow.visible.float().mean() < 1
    for i, (s, t) in enumerate(flow.pairs):
        xy, z = world.move(s, t)
        valid = flow.valid[0, i].numpy()
        np.testing.assert_allclose(flow.xy[0, i].permute(1, 2, 0)[valid], (xy - here)[valid], atol=1 / 64)
        np.testing.assert_allclose(flow.depth[0, i][valid], z[valid], atol=3e-3)


def test_what_is_behind_the_camera_is_not_supervised(features, tmp_path):
    turned = features["camera/quaternions"].copy()
    turned[5] = product(turned[5], turn([0, 1, 0], np.pi))
    publish(tmp_path, [movi_record(features | {"camera/quaternions": turned})])
    _, (clip,) = make(MOVI_E, tmp_path, tmp_path / "out", dense="first", points=128)
    others = [t for t in range(24) if t != 5]
    for visible, valid, depth in (
        (clip.visible[0], clip.valid[0], clip.track_depth[0]),
        (clip.flow.visible[0].flatten(1), clip.flow.valid[0].flatten(1), None),
    ):
        known = visible[others].sum(1)
        assert not visible[5].any() and not valid[5].all() and (known > 0).all() and valid[others].float().mean() > 0.9
        assert depth is None or (valid[5] == (depth[5] > 0)).all()
    assert clip.flow.xy.abs().max() < 512 and not clip.flow.xy[0, 5][:, ~clip.flow.valid[0, 5]].any()


@pytest.mark.parametrize("backwards", [1, -1])
def test_published_flow_points_where_the_computed_one_does(world, features, tmp_path, backwards):
    there, back = flows(world, 1), flows(world, -1)
    if backwards < 0:  # as the motion from t - 1 to t
        back = 65535 - back[0], -back[1][::-1]
    extra = {"forward_flow": there[0], "metadata/forward_flow_range": there[1]}
    extra |= {"backward_flow": back[0], "metadata/backward_flow_range": back[1]}
    publish(tmp_path, [movi_record(features | extra)])
    _, (published,) = make(MOVI_E, tmp_path, tmp_path / "a", flow="published", points=16)
    _, (computed,) = make(MOVI_E, tmp_path, tmp_path / "b", flow="computed", points=16)
    assert published.flow.pairs == computed.flow.pairs and len(published.flow.pairs) == 46
    assert (published.flow.xy - computed.flow.xy).abs().max() < 1 / 32
    assert (published.flow.visible == computed.flow.visible).all()
    assert computed.flow.xy.abs().max() > 2


def test_published_flow_that_contradicts_the_annotations(world, features, tmp_path):
    noise = np.random.default_rng(0).integers(0, 2**16, (24, *SIZE, 2))
    extra = {f"{k}_flow": noise for k in ("forward", "backward")}
    extra |= {f"metadata/{k}_flow_range": np.array([-9.0, 9.0]) for k in ("forward", "backward")}
    publish(tmp_path, [movi_record(features | extra)])
    with pytest.raises(DataError, match=r"record 0: the published forward_flow is .* px off"):
        make(MOVI_E, tmp_path, tmp_path / "out", flow="published", points=16)


def test_lossless_keeps_the_original_files(features, tmp_path):
    publish(tmp_path, [movi_record(features)])
    path = convert(MOVI_E, tmp_path, tmp_path / "a", make_options(MOVI_E, lossless=True, points=16), quiet=True)
    members = read_members(read_index(path).samples[0])
    assert members["rgb.bin"] == b"".join(map(png, features["video"]))
    _, (lossy,) = make(MOVI_E, tmp_path, tmp_path / "b", points=16, depth=False, labels=False, camera=False)
    assert lossy.depth is lossy.labels is lossy.camera is lossy.queries is None
    assert 0 < np.abs(lossy.video[0].permute(0, 2, 3, 1).numpy() - features["video"].astype(float)).mean() < 4


def test_the_published_records_are_read(tmp_path):
    folder = tmp_path / "movi_e" / "256x256" / "1.0.0"
    folder.mkdir(parents=True)
    data = load("movi_tfrecord")
    (folder / "movi_e-train.tfrecord-00000-of-00001").write_bytes(data["tfrecord"].tobytes())
    index, clips = make(MOVI_E, tmp_path, tmp_path / "out", points=256, fraction=0.5, lossless=True)
    assert index.name == "movi_e_train" and [s.key for s in index.samples] == ["train-00000-000", "train-00000-001"]
    for number, clip in enumerate(clips):
        assert clip.name == (data[f"record{number}__metadata.video_name"].item().decode(),)
        np.testing.assert_array_equal(clip.video[0].permute(0, 2, 3, 1), data[f"record{number}__video"])
        np.testing.assert_array_equal(clip.labels[0], data[f"record{number}__segmentations"][..., 0])
        assert clip.tracks.shape[2] > 0


def test_the_same_bytes_in_parts_and_at_once(features, tmp_path):
    publish(tmp_path, [movi_record(features, name=f"scene_{i}") for i in range(3)])
    index, clips = make(MOVI_E, tmp_path, tmp_path / "once", points=64)
    dataset, options = pickle.loads(pickle.dumps((MOVI_E, make_options(MOVI_E, points=64))))  # as a worker gets them
    for part in ((2, 2), (1, 2)):
        parts = convert(dataset, tmp_path, tmp_path / "parts", options, part=part, quiet=True, per_shard=2)
    once, later = ({s.key: read_members(s) for s in found.samples} for found in (index, read_index(parts)))
    assert len(once) == 3 and once == later

    def same(a, b):
        return a.tracks.shape == b.tracks.shape and bool((a.tracks == b.tracks).all())

    _, other = make(MOVI_E, tmp_path, tmp_path / "seed", points=64, seed=1)
    assert not same(clips[0], clips[1]) and not same(clips[0], other[0])  # by name of the video, and by seed


def test_folders_that_are_not_the_data_set(features, tmp_path):
    one = movi_record(features)

    def fails(message, dataset=MOVI_E, source=tmp_path, **options):
        with pytest.raises(DataError, match=message) as error:
            dataset.items(source, make_options(dataset, **options))
        assert "expected:\n" in str(error.value) and "tfrecord-00000-of-01024" in str(error.value)

    fails(r"has no files 'movi_e-train.tfrecord-\*'")
    folder = publish(tmp_path, [one] * 6)
    fails("has no files 'movi_f-train.*only those of movi_e", MOVI_F)
    fails("has no files 'movi_e-validation.*only train in 1.0.0", split="validation")
    fails("under a folder 512x512, only train", resolution=512)
    assert len(MOVI_E.items(folder, make_options(MOVI_E))) == 6  # the folder itself will do
    assert len(PANNING.items(tmp_path, make_options(PANNING, resolution=256))) == 6  # whatever its files are called
    small = publish(tmp_path, [one], size="128x128")
    fails("holds several editions.*--resolution")
    assert len(MOVI_E.items(tmp_path, make_options(MOVI_E, resolution=128))) == 1
    (small / "movi_e-train.tfrecord-00001-of-00003").write_bytes(record(one))
    fails("mixes editions of .1, 3. files", resolution=128)
    (folder / "movi_e-train.tfrecord-00001-of-00003").unlink()
    fails("lacks 1 of the 3 files of 'train', first 00001", resolution=256)
    assert len(MOVI_E.items(tmp_path, make_options(MOVI_E, resolution=256, incomplete=True))) == 4
    other = tmp_path / "other"
    other.mkdir()
    (other / "movi_e-train.array_record-00000-of-00001").write_bytes(b"")
    fails("array_record", source=other)


def test_broken_files_name_the_record(features, tmp_path):
    folder = publish(tmp_path, [movi_record(features)] * 2)
    file = folder / "movi_e-train.tfrecord-00000-of-00001"
    data = file.read_bytes()
    file.write_bytes(data[:-100])
    with pytest.raises(DataError, match="record 1 is cut off"):
        make(MOVI_E, tmp_path, tmp_path / "out")
    flipped = bytearray(data)
    flipped[len(data) * 3 // 4] ^= 16
    file.write_bytes(flipped)
    with pytest.raises(DataError, match=r"00000-of-00001: record 1 is damaged"):
        make(MOVI_E, tmp_path, tmp_path / "out")
    file.write_bytes(record(movi_record(features, **{"instances/bboxes_3d": np.zeros(7, np.float32)})))
    with pytest.raises(DataError, match=r"record 0, feature 'instances/bboxes_3d' has 7 values, expected the shape"):
        make(MOVI_E, tmp_path, tmp_path / "other")


@pytest.mark.parametrize("options", [{"points": 0}, {"fraction": 0.0}, {"fraction": 2.0}, {"seed": -1}])
def test_options_out_of_range(options, tmp_path):
    with pytest.raises(DataError, match="--points must be in"):
        MOVI_E.items(tmp_path, make_options(MOVI_E, **options))
