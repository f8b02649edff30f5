import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from trackpl_prep.blender import bodies, clip, dataset, mesh, physics, truth
from trackpl_prep.blender.scene import Item, Lamp, Material, Scene, look_at
from trackpl_prep.dataset import make_options

from trackpl.errors import DataError
from trackpl.samples import decode
from trackpl.shards import read_index

HAS_BULLET = importlib.util.find_spec("pybullet") is not None
HAS_BLENDER = HAS_BULLET and importlib.util.find_spec("bpy") is not None
needs_bullet = pytest.mark.skipif(not HAS_BULLET, reason='pybullet is not installed: pip install "trackpl[blender]"')
needs_blender = pytest.mark.skipif(not HAS_BLENDER, reason='Blender is not installed: pip install "trackpl[blender]"')
SIZE = (96, 128)


# Meshes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", bodies.KINDS)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_bodies_are_closed_face_outward_and_fit(kind, seed):
    body = bodies.body(np.random.default_rng(seed), kind, 0.8)
    assert np.linalg.norm(body.vertices, axis=-1).max() == pytest.approx(0.8)
    assert mesh.volume(body) > 0.8**3 / 100
    assert len(body.faces) < 4000 and 1 <= len(body.parts) <= 32
    # Closed and oriented alike: every edge is run along once in each direction, corners at one place are one.
    _, place = np.unique(np.round(body.vertices, 7), axis=0, return_inverse=True)
    edges = place.ravel()[body.faces[:, [[0, 1], [1, 2], [2, 0]]]].reshape(-1, 2)
    edges = edges[edges[:, 0] != edges[:, 1]]
    there, back = (e[np.lexsort(e.T)] for e in (edges, edges[:, ::-1]))
    assert np.array_equal(there, back)
    # What collides is what is seen.
    parts = np.concatenate(body.parts)
    assert np.linalg.norm(parts, axis=-1).max() < 0.8 + 1e-9
    assert (parts.max(0) - parts.min(0) > 0.7 * np.ptp(body.vertices, axis=0)).all()


@pytest.mark.parametrize("kind", ["torus", "knot"])
def test_mirrored_textures_meet_where_a_surface_closes(kind):
    body = bodies.body(np.random.default_rng(4), kind, 1.0)
    folded = np.abs(body.uv % 2 - np.where(body.uv % 2 > 1, 2 * (body.uv % 2), 0))  # mirrored: 0 to 1 and back
    by_vertex = np.full((len(body.vertices), 2), np.nan)
    by_vertex[body.faces.ravel()] = folded.reshape(-1, 2)
    assert np.allclose(by_vertex[body.faces], folded, atol=1e-9)


# Physics ---------------------------------------------------------------------------------------------------


def thing(static, place, **values):
    box = mesh.boxes(np.zeros((1, 3)), np.full((1, 3), 0.5))
    start = {"velocity": np.zeros(3), "spin": np.zeros(3), "mass": 1.0, "friction": 0.5, "bounce": 0.2}
    return physics.Thing(
        box.parts, np.array(place, float), np.array([1.0, 0, 0, 0]), static=static, **{**start, **values}
    )


@needs_bullet
def test_bodies_fall_as_galileo_says_and_static_ones_rest():
    times = np.arange(10) / 24
    things = [
        thing(True, [0, 0, 1.2]),
        thing(False, [0, 0, 5.0]),
        thing(False, [4, 0, 6], velocity=np.array([-1, 0, 0])),
    ]
    places, turns = physics.simulate(things, times)
    assert places[0, 0, 2] == pytest.approx(0.5, abs=0.01)  # on the floor: half its side
    assert np.array_equal(places[0, 0], places[-1, 0]) and np.array_equal(turns[0, 0], turns[-1, 0])
    assert np.allclose(places[:, 1, 2], 5.0 - 9.81 / 2 * times**2, atol=0.02)
    assert np.allclose(places[:, 2, 0], 4 - times, atol=0.01)
    again = physics.simulate(things, times)
    assert np.array_equal(again[0], places) and np.array_equal(again[1], turns)


@needs_bullet
def test_bodies_collide():
    places, _ = physics.simulate([thing(True, [0, 0, 0.5]), thing(False, [0, 0, 3.0])], np.arange(72) / 24)
    assert places[-1, 1, 2] == pytest.approx(1.5, abs=0.03)  # on top of the other


def test_quaternions_keep_their_sign_and_turn():
    angle = np.linspace(0, 12, 200)
    turns = np.stack([np.cos(angle / 2), 0 * angle, 0 * angle, np.sin(angle / 2)], -1)
    flipped = turns * np.where(np.arange(200) % 3 == 1, -1, 1)[:, None]
    assert np.allclose(physics.continuous(flipped), turns)
    rotations = physics.rotations(flipped)
    assert np.allclose(rotations[:, 0, 0], np.cos(angle)) and np.allclose(rotations[:, 1, 0], np.sin(angle))


# Truth, of a scene made by hand ----------------------------------------------------------------------------


def made_scene(frames=5):
    """Three turning bodies before a floor that passes under the camera, which moves."""
    times = np.arange(-1, frames + 1) / 12
    grey = Material(np.full((4, 4, 3), 128, np.uint8), 0.5, 0.0)
    side = np.linspace(-20, 20, 5)
    x, y = np.meshgrid(side, side, indexing="ij")
    floor = mesh.surface(np.stack([x, y, 0 * x], -1), (False, False))
    rng = np.random.default_rng(3)
    shapes = [bodies.body(rng, kind, 0.9) for kind in ("torus", "crate", "sheet")]
    sky = bodies.body(rng, "rock", 18.0)
    items = [Item(floor, grey, 0, "floor"), *(Item(s, grey, k, "body") for k, s in enumerate(shapes, 1))]
    items.append(Item(sky, grey, 0, "sky"))
    t = np.arange(len(times))[:, None]
    places = np.stack([0 * t + [[0.0, 0, 0]], [[0, 0, 1]] + t * [[0.1, 0, 0]], [[0.9, 0.8, 1]] - t * [[0.1, 0, 0]],
                       [[-1, -0.5, 0.9]] + t * [[0, 0.05, 0]], 0 * t + [[0.0, 0, 0]]], 1)  # fmt: skip
    angle = t[:, 0] * 0.2
    spin = np.stack([np.cos(angle), np.sin(angle), 0 * angle, 0 * angle], -1)
    still = 0 * spin + [1, 0, 0, 0]
    turns = np.stack([still, spin, spin, spin, still], 1)
    camera = np.array([5.0, -3, 1.5]) + t * [[0.0, 0.15, 0.02]]
    lamp = Lamp(True, np.array([0.0, 0, 1]), 2.0, 0.1, np.ones(3))
    turn = look_at(camera, np.array([[0.0, 0, 0.8]]) + 0 * camera, 0.1)
    return Scene(tuple(items), times, places, turns, camera, turn, 1.1, (lamp,), np.ones(3), 0.0)


@pytest.fixture(scope="module")
def made():
    scene = made_scene()
    geo = truth.geometry(scene, SIZE)
    return scene, geo, [truth.view(geo, t) for t in range(geo.frames)]


def first_hits(geo, frame, xy):
    """What the rays meet, by the formula of Möller and Trumbore (1997), every ray with every triangle."""
    fx, fy, cx, cy = geo.intrinsics
    ray = np.stack([(xy[:, 0] - cx) / fx, (xy[:, 1] - cy) / fy, np.ones(len(xy))], -1)[:, None]
    a, b, c = (geo.vertices[frame][geo.faces[:, k]][None] for k in range(3))
    e1, e2 = b - a, c - a
    p = np.cross(ray, e2)
    with np.errstate(divide="ignore", invalid="ignore"):
        inverse = 1 / (e1 * p).sum(-1)
        u = (-a * p).sum(-1) * inverse
        q = np.cross(-a, e1)
        v = (ray * q).sum(-1) * inverse
        z = (e2 * q).sum(-1) * inverse
        met = (u >= 0) & (v >= 0) & (u + v <= 1) & (z > 0.05)
    return np.where(met, z, np.inf).min(1)


def test_rays_meet_the_nearest_triangle(made):
    _, geo, views = made
    xy = np.random.default_rng(0).random((300, 2)) * SIZE[::-1]
    for t in (0, 4):
        hits, expected = truth.cast(views[t], xy), first_hits(geo, t, xy)
        assert np.isfinite(expected).all() and np.allclose(hits.depth, expected, rtol=1e-9)
        points = np.einsum("mk,mkc->mc", hits.weights, geo.vertices[t][geo.faces[hits.face]])
        assert np.allclose(truth.project(points, geo.intrinsics), xy, atol=1e-8)
    assert len(np.unique(geo.labels[truth.cast(views[0], truth.centres(SIZE)).face])) == 4


def test_no_ray_slips_through_a_seam(made):
    scene, *_ = made
    around = bodies.body(np.random.default_rng(1), "rock", 6.0)
    places = np.repeat(scene.camera_place[:, None], 2, 1)
    shell = replace(scene, items=(replace(scene.items[0], mesh=around),) * 2, places=places, turns=scene.turns[:, :2])
    geo = truth.geometry(shell, SIZE)
    corners = geo.vertices[2][geo.faces]
    edges = np.concatenate([corners, (corners + np.roll(corners, 1, 1)) / 2]).reshape(-1, 3)
    edges = edges[edges[:, 2] > 0.1]
    xy = truth.project(edges, geo.intrinsics)
    inside = (xy >= 0).all(-1) & (xy <= SIZE[::-1]).all(-1)
    hits = truth.cast(truth.view(geo, 2), xy[inside])  # the camera is inside: there is something all around
    assert inside.sum() > 200 and (hits.face >= 0).all()
    assert (hits.depth <= edges[inside, 2] * (1 + 1e-9)).all()


def test_points_backprojected_through_the_camera_meet_their_tracks(made):
    scene, geo, views = made
    request = clip.Request(0, 0, SIZE, frames=5, points=400)
    made_clip = clip.label(scene, np.zeros((5, *SIZE, 3), np.uint8), request)
    n = np.arange(400)
    s, x, y = made_clip.queries[0].numpy().T
    s = s.astype(int)
    tracks, depth = made_clip.tracks[0].numpy(), made_clip.track_depth[0].numpy()
    assert np.allclose(tracks[s, n], np.stack([x, y], -1), atol=1e-4)
    assert made_clip.visible[0].numpy()[s, n].all() and made_clip.valid.all()
    fx, fy, cx, cy = made_clip.camera.intrinsics[0, 0].numpy()
    pose = made_clip.camera.pose[0].double().numpy()
    d = depth[s, n]
    inside = np.stack([(x - cx) / fx * d, (y - cy) / fy * d, d, np.ones(400)], -1)
    world = np.einsum("nij,nj->ni", np.linalg.inv(pose[s]), inside)[:, :3]
    label = made_clip.labels[0].numpy()[s, y.astype(int), x.astype(int)]
    item = _items(geo, views, s, x, y)
    assert (label == np.array([0, 1, 2, 3, 0])[item]).mean() > 0.9  # a label is that of the pixel's centre
    turns = physics.rotations(scene.turns[1:-1])
    for t in range(5):
        local = np.einsum("nji,nj->ni", turns[s, item], world - scene.places[1:-1][s, item])
        moved = np.einsum("nij,nj->ni", turns[t, item], local) + scene.places[1:-1][t, item]
        seen = np.einsum("ij,nj->ni", pose[t], np.insert(moved, 3, 1, 1))
        assert np.allclose(seen[:, 2], depth[t], atol=1e-4)
        assert np.allclose(seen[:, :2] / seen[:, 2:3] * [fx, fy] + [cx, cy], tracks[t], atol=2e-3)


def _items(geo, views, s, x, y):
    """Which surface each query lies on."""
    out = np.empty(len(s), int)
    for t, seen in enumerate(views):
        mine = s == t
        out[mine] = geo.item[truth.cast(seen, np.stack([x, y], -1)[mine]).face]
    return out


def test_visible_is_nothing_nearer(made):
    _, geo, views = made
    hits = truth.cast(views[0], truth.centres(SIZE)[::7])
    tracked = truth.follow(geo, views, hits)
    assert tracked.visible[0].all() and 0.5 < tracked.visible[4].mean() < 0.99
    inside = (tracked.xy[4] >= 0).all(-1) & (tracked.xy[4] < SIZE[::-1]).all(-1)
    nearest = first_hits(geo, 4, tracked.xy[4])
    assert np.array_equal(tracked.visible[4], inside & (nearest >= tracked.depth[4] * (1 - 2e-5)))
    hidden = inside & ~tracked.visible[4]
    assert hidden.any() and (nearest[hidden] < tracked.depth[4][hidden]).all()


def test_flow_dense_tracks_and_tracks_agree(made):
    _, geo, views = made
    pixels = [truth.cast(seen, truth.centres(SIZE)) for seen in views]
    adjacent = clip.flow(geo, views, pixels, clip.pairs("none", 5), False)
    dense = clip.flow(geo, views, pixels, clip.pairs("both", 5), True)
    assert adjacent.pairs == ((0, 1), (1, 2), (2, 3), (3, 4)) and adjacent.depth is None
    assert dense.pairs[:5] == tuple((0, t) for t in range(5)) and dense.pairs[5:] == tuple((4, t) for t in range(5))
    assert torch.equal(dense.xy[0, 1], adjacent.xy[0, 0]) and torch.equal(dense.visible[0, 1], adjacent.visible[0, 0])
    assert dense.xy[0, 0].abs().max() < 1e-4 and dense.visible[0, 0].all()
    row, column = np.random.default_rng(1).integers(0, SIZE, (500, 2)).T
    where = np.stack([column, row], -1) + 0.5
    tracked = truth.follow(geo, views, truth.cast(views[0], where))
    for t in range(5):
        moved = dense.xy[0, t, :, row, column].T.numpy() + where
        assert np.abs(moved - tracked.xy[t]).max() < 1e-3
        assert np.array_equal(dense.visible[0, t, row, column].numpy(), tracked.visible[t])
        assert np.allclose(dense.depth[0, t, row, column].numpy(), tracked.depth[t], rtol=1e-6)


def test_motion_too_long_for_the_shards_is_not_valid(made):
    scene, *_ = made
    places = scene.places.copy()
    places[3, 1] = scene.camera_place[3] + scene.camera_turn[3] @ [0.9, 0.0, 0.06]  # right beside the lens
    far = replace(scene, places=places)
    flow = clip.label(far, np.zeros((5, *SIZE, 3), np.uint8), clip.Request(0, 0, SIZE, 5, 10)).flow
    assert flow.xy.isfinite().all() and flow.xy.abs().max() <= 511
    assert 0 < (~flow.valid).float().mean() < 0.5 and not flow.visible[~flow.valid].any()


# Choice of points ------------------------------------------------------------------------------------------


def test_points_are_dealt_fairly():
    labels = np.zeros((4, 50, 60), np.int64)
    labels[:, :10, :10], labels[1, 20:40, 20:50], labels[2, 45, 50:54] = 1, 2, 3
    frame, xy = truth.choose(np.random.default_rng(0), labels, 200)
    hit = labels[frame, xy[:, 1].astype(int), xy[:, 0].astype(int)]
    counts = np.bincount(hit, minlength=4)
    assert counts[3] == 2  # half of its four pixels
    assert abs(counts[1] - counts[2]) <= 1 and counts[0] == 50 and counts.sum() == 200
    assert len(set(frame.tolist())) == 4


@pytest.mark.parametrize(
    ("room", "total", "expected"),
    [([5, 5, 5], 9, [3, 3, 3]), ([1, 9, 9], 9, [1, 4, 4]), ([2, 1], 9, [2, 1]), ([3, 3, 3], 2, [1, 1, 0]), ([], 5, [])],
)
def test_fair(room, total, expected):
    assert truth.fair(np.array(room, np.int64), total).tolist() == expected


# Asking ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"size": (8, 256)}, "16x16"),
        ({"frames": 0}, "0 frames"),
        ({"motion_blur": 2.0}, "0 to 1"),
        ({"dense": "all"}, "none, first, last, both"),
        ({"seed": -1}, "negative"),
    ],
)
def test_what_cannot_be_rendered_is_refused(change, words):
    with pytest.raises(DataError, match=words):
        clip.check(replace(clip.Request(0, 0), **change))


def test_says_what_to_install(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bpy" else real(name))
    with pytest.raises(DataError, match=r"'bpy'.*trackpl\[blender\].*apt-get install libsm6"):
        dataset.DATASET.items(Path(), make_options(dataset.DATASET))


def test_a_renderer_that_fails_speaks(tmp_path, monkeypatch):
    request = json.dumps(vars(replace(clip.Request(0, 5), frames=0)))
    with pytest.raises(DataError, match=r"^cannot render 256x256 pixels, 0 frames"):
        dataset.run_child(request, tmp_path, "clip 5")
    with pytest.raises(DataError, match=r"clip 5: the process that renders ended with status 1 .*JSON"):
        dataset.run_child("{", tmp_path, "clip 5")


def test_a_renderer_ends_with_the_program_that_asked(tmp_path):
    command = [sys.executable, "-m", "trackpl_prep.blender.child", str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        process.stdin.write(json.dumps(vars(clip.Request(0, 0))).encode() + b"\n")
        process.stdin.close()
        assert process.wait(60) == 3
    assert not list(tmp_path.iterdir())


# With Blender ----------------------------------------------------------------------------------------------

RENDER = """
import json, sys
from pathlib import Path
import numpy as np, torch
torch.set_num_threads(1)
from trackpl_prep.blender import clip, render
folder, values = Path(sys.argv[1]), json.loads(sys.argv[2])
request = clip.Request(**{**values, "size": tuple(values["size"])})
drawn = clip.setting(request)
video = render.render(drawn, request.size, folder, samples=request.samples, passes=True)
frames = range(request.frames)
read = lambda name: np.stack([render.read_pass(folder / f"{name}{t:04d}.exr", request.size) for t in frames])
items = read("item").round().astype(int) - 1
labels = np.array([item.label for item in drawn.items])
made = clip.label(drawn, video, request)
torch.save({
    "video": made.video, "tracks": made.tracks, "visible": made.visible, "track_depth": made.track_depth,
    "queries": made.queries, "depth": made.depth, "labels": made.labels, "flow": made.flow.xy,
    "flow_visible": made.flow.visible, "blender_depth": torch.from_numpy(read("depth")),
    "blender_labels": torch.from_numpy(labels[items]),
}, folder / "out.pt")
"""


@pytest.fixture(scope="module", params=[0.0, 1.0], ids=["sharp", "blurred"])
def rendered(request, tmp_path_factory):
    """A clip with Blender's own depth and object passes."""
    folder = tmp_path_factory.mktemp("rendered")
    values = vars(clip.Request(3, 1, (128, 160), frames=6, points=1500, samples=16, motion_blur=request.param))
    command = [sys.executable, "-c", RENDER, str(folder), json.dumps(values)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    out = torch.load(folder / "out.pt", weights_only=True)
    out["sharp"] = request.param == 0
    return out


def grey(clip_):
    """Luminance (T, 1, H, W), without slow shading: what is left is texture."""
    video = clip_["video"][0].double().mean(1, keepdim=True)
    return video - F.avg_pool2d(F.pad(video, (5, 5, 5, 5), mode="replicate"), 11, 1)


def sample(image, xy):
    """Bilinear samples (M,) of (1, H, W) at pixels (M, 2)."""
    h, w = image.shape[-2:]
    grid = xy.double() / torch.tensor([w, h]) * 2 - 1
    return F.grid_sample(image[None], grid[None, None], align_corners=False, padding_mode="border")[0, 0, 0]


def patch_errors(clip_, shift):
    """Squared difference (M, 49) of the patch around each point and where its track leads, moved by `shift` pixels.

    Only of points that are visible in both frames, well inside one body in the first.
    """
    images, tracks = grey(clip_), clip_["tracks"][0].double()
    offsets = torch.stack(torch.meshgrid(torch.arange(-3, 4), torch.arange(-3, 4), indexing="xy"), -1).reshape(-1, 2)
    out = []
    for t in range(len(images) - 1):
        flow, seen = clip_["flow"][0, t].double(), clip_["flow_visible"][0, t]
        label = clip_["labels"][0, t].double()
        same = -F.max_pool2d(-label[None], 9, 1, 4)[0] == F.max_pool2d(label[None], 9, 1, 4)[0]
        whole = same & (F.avg_pool2d(seen[None].double(), 9, 1, 4)[0] == 1)
        here, there = tracks[t], tracks[t + 1]
        ok = clip_["visible"][0, t] & clip_["visible"][0, t + 1]
        cell = here.long().clamp(min=0)
        cell = torch.stack([cell[:, 0].clamp(max=label.shape[1] - 1), cell[:, 1].clamp(max=label.shape[0] - 1)], -1)
        ok &= whole[cell[:, 1], cell[:, 0]]
        here, there = here[ok], there[ok]
        places = (here[:, None] + offsets).reshape(-1, 2)
        # The patch turns and grows with the surface: the motion at its pixels relative to that at its middle.
        moved = torch.stack([sample(flow[k : k + 1], places) for k in (0, 1)], -1).view(len(here), -1, 2)
        centre = torch.stack([sample(flow[k : k + 1], here) for k in (0, 1)], -1)[:, None]
        target = (there[:, None] + offsets + moved - centre).reshape(-1, 2) + torch.tensor(shift)
        out.append(((sample(images[t], places) - sample(images[t + 1], target)) ** 2).view(len(here), -1))
    return torch.cat(out)


@needs_blender
@pytest.mark.slow
@pytest.mark.parametrize("rendered", [0.0], ids=["sharp"], indirect=True)  # Blender blurs its passes too
def test_depth_and_labels_are_blenders_own(rendered):
    depth, theirs = rendered["depth"][0, :, 0], rendered["blender_depth"]
    assert ((depth - theirs).abs() < 1e-3 * theirs).double().mean() > 0.98
    assert (rendered["labels"][0] == rendered["blender_labels"]).double().mean() > 0.98
    assert len(rendered["labels"].unique()) > 4


@needs_blender
@pytest.mark.slow
def test_visible_points_look_the_same_exactly_where_their_tracks_are(rendered):
    middle = patch_errors(rendered, (0.0, 0.0)).mean(-1)
    assert len(middle) > 500
    for axis in (0, 1):
        step = [float(axis == 0), float(axis == 1)]
        plus, minus = (patch_errors(rendered, [k * s for s in step]).mean(-1) for k in (1, -1))
        ratio = (plus + minus).mean() / 2 / middle.mean()
        curve = plus - 2 * middle + minus
        textured = curve > curve.quantile(0.3)
        best = ((minus - plus) / (2 * curve))[textured]  # the least of a parabola through the three
        print(f"axis {axis}: error grows {ratio:.2f} times at 1 px, best shift {best.median():+.4f} px")
        assert ratio > 1.5
        assert best.median().abs() < 0.02


@needs_blender
@pytest.mark.slow
def test_hidden_points_look_different_and_lie_behind(rendered):
    images, (h, w) = grey(rendered), rendered["labels"].shape[-2:]
    y, x = torch.meshgrid(torch.arange(h) + 0.5, torch.arange(w) + 0.5, indexing="ij")
    start = torch.stack([x, y], -1).double()
    scores, truths = [], []
    for t in range(len(images) - 1):
        end = start + rendered["flow"][0, t].permute(1, 2, 0)
        error = (images[t, 0] - sample(images[t + 1], end.reshape(-1, 2)).view(h, w)).abs()
        error = F.avg_pool2d(error[None], 3, 1, 1)[0]
        inside = (end > 2).all(-1) & (end < torch.tensor([w - 2, h - 2])).all(-1)
        scores.append(error[inside])
        truths.append(~rendered["flow_visible"][0, t][inside])
    score, hidden = torch.cat(scores), torch.cat(truths)
    assert hidden.sum() > 100
    rank = score.argsort().argsort().double()
    n, m = int(hidden.sum()), int((~hidden).sum())
    auc = float((rank[hidden].sum() - n * (n - 1) / 2) / (n * m))
    print(f"area under the curve {auc:.3f}, {n} hidden pixels")
    assert auc > 0.75
    xy, z = rendered["tracks"][0], rendered["track_depth"][0]
    inside = (xy >= 0).all(-1) & (xy < torch.tensor([w, h])).all(-1)
    t, n = (inside & ~rendered["visible"][0]).nonzero().T
    assert len(t) > 100
    theirs = rendered["blender_depth"][t, xy[t, n, 1].long(), xy[t, n, 0].long()]
    if rendered["sharp"]:
        assert (theirs < z[t, n]).double().mean() > 0.92


@needs_blender
@pytest.mark.slow
def test_a_set_is_the_same_bytes_from_any_process(tmp_path):
    from PIL import Image
    from trackpl_prep.convert import convert

    photos = tmp_path / "photos"
    photos.mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 80, 3), dtype=np.uint8)).save(photos / "a.png")
    values = {"clips": 2, "size": [48, 64], "frames": 3, "points": 64, "samples": 2, "dense": "first"}
    values |= {"textures": photos, "motion_blur": 0.5}
    options = make_options(dataset.DATASET, **values)
    one = convert(dataset.DATASET, "", tmp_path / "a", options, per_shard=1, quiet=True)
    two = convert(dataset.DATASET, "", tmp_path / "b", options, per_shard=1, workers=2, quiet=True)
    for path in sorted(one.parent.iterdir()):
        assert path.read_bytes() == (two.parent / path.name).read_bytes()
    first, second = ({k: v for k, v in m.items()} for m in _samples(one))
    assert first != second
    got = decode(first)
    assert got.video.shape == (1, 3, 3, 48, 64) and got.tracks.shape == (1, 3, 64, 2) and got.fps == 12
    assert got.flow.pairs == ((0, 0), (0, 1), (0, 2)) and got.flow.depth.shape == (1, 3, 48, 64)
    assert torch.allclose(got.flow.depth[0, 0], got.depth[0, 0, 0], atol=2e-3)
    assert json.loads(first["meta.json"])["licence"] == "that of the textures"
    assert json.loads(first["meta.json"])["source"]["bodies"]


def _samples(index):
    from trackpl.shards import read_members

    found = read_index(index)
    return [read_members(sample) for sample in found.samples]
