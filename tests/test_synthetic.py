"""The synthetic data set: exact truth that agrees with itself and with the pixels, reproducible sets."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from trackpl_prep import cli, raster, synthetic
from trackpl_prep.scene import scene
from trackpl_prep.synthetic import render

from trackpl.errors import DataError, Error
from trackpl.shards import decode, read_index, read_members

SMALL = {"size": (72, 96), "frames": 6, "points": 64}


def small(index, seed=0, **options):
    return render(seed, index, **(SMALL | options))


def sample(maps, xy):
    """Look maps (P, C, H, W) up at (P, N, 2) pixels, bilinearly: (P, N, C)."""
    h, w = maps.shape[-2:]
    grid = 2 * xy / xy.new_tensor([w, h]) - 1
    return F.grid_sample(maps, grid[:, None], align_corners=False, padding_mode="border")[:, :, 0].mT


def fields(clip):
    flow, camera = clip.flow, clip.camera
    tensors = [clip.video, clip.tracks, clip.visible, clip.valid, clip.depth, clip.labels]
    return [*tensors, flow.xy, flow.visible, flow.valid, camera.intrinsics, camera.pose]


def test_same_arguments_same_clip():
    first, again, other, seeded = small(3), small(3), small(4), small(3, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(fields(first), fields(again), strict=True))
    assert not torch.equal(first.video, other.video)
    assert not torch.equal(first.video, seeded.video)
    assert first.name == ("synthetic-0-000003",)


def test_the_number_of_threads_does_not_matter():
    before = torch.get_num_threads()
    clips = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        clips.append([render(3, i, frames=2, points=16) for i in range(3)])
    torch.set_num_threads(before)
    for one, many in zip(*clips, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(fields(one), fields(many), strict=True))


def test_points_do_not_change_the_pictures():
    assert torch.equal(small(5, points=0).video, small(5).video)
    assert torch.equal(small(5, flow_pairs=[(0, 5)]).video, small(5).video)


@pytest.mark.parametrize(
    ("size", "frames", "points"), [((97, 130), 5, 33), ((64, 64), 1, 8), ((40, 200), 3, 0), ((8, 8), 2, 4)]
)
def test_any_size(size, frames, points):
    clip = render(0, 1, size=size, frames=frames, points=points)
    assert clip.video.shape == (1, frames, 3, *size) and clip.video.dtype == torch.uint8
    assert clip.tracks.shape == (1, frames, points, 2) and clip.tracks.dtype == torch.float32
    assert clip.visible.shape == clip.valid.shape == (1, frames, points)
    assert clip.flow.xy.shape == (1, frames - 1, 2, *size)
    assert clip.depth.shape == (1, frames, 1, *size) and clip.labels.shape == (1, frames, *size)
    assert torch.isfinite(clip.depth).all() and torch.isfinite(clip.tracks).all()


@pytest.mark.parametrize(
    "options", [{"size": (4, 64)}, {"frames": 0}, {"points": -1}, {"flow_pairs": [(0, 9)]}, {"seed": -1}]
)
def test_what_cannot_be_rendered_is_refused(options):
    with pytest.raises(DataError):
        small(0, **options)


@pytest.mark.parametrize("index", range(4))
def test_tracks_move_as_the_flow_does(index):
    """A track that starts at a pixel centre goes where that pixel's flow goes: the same surface, by another route."""
    rng = np.random.default_rng([0, index, 1])
    size, frames = (72, 96), 6
    setting = scene(rng, size, frames, None)
    placed = raster.place(setting, np.arange(frames, dtype=float), torch.device("cpu"))
    pairs = [(3, t) for t in (0, 2, 3, 4, 5)]
    clip = small(index, flow_pairs=pairs)
    y, x = torch.meshgrid(torch.arange(72).double() + 0.5, torch.arange(96).double() + 0.5, indexing="ij")
    x, y = x.flatten(), y.flatten()
    owner, ux, uy, z = raster.front(placed, x, y, torch.full_like(x, 3).long())
    torch.testing.assert_close(z.float(), clip.depth[0, 3, 0].flatten(), rtol=1e-3, atol=1e-3)
    for p, (_, t) in enumerate(pairs):
        instants = torch.full_like(owner, t)
        for part, item in enumerate(placed):
            mine = owner == part
            px, py, _ = item.project(ux[mine], uy[mine], instants[mine])
            moved = torch.stack([px - x[mine], py - y[mine]]).float()
            flow = clip.flow.xy[0, p].flatten(1)[:, mine]
            near = moved.abs().amax(0) < 200  # far outside the frame the scale is another
            assert (moved - flow)[:, near].abs().max() < 5e-3 if near.any() else True


@pytest.mark.parametrize("index", range(4))
def test_flow_there_and_back_is_nothing(index):
    clip = small(index, flow_pairs=[(1, 3), (3, 1)])
    there, back = clip.flow.xy[0]
    h, w = clip.size
    y, x = torch.meshgrid(torch.arange(h) + 0.5, torch.arange(w) + 0.5, indexing="ij")
    ends = torch.stack([x, y], -1) + there.permute(1, 2, 0)
    # Only where the whole neighbourhood of the end belongs to the same thing may its flow be interpolated.
    one = clip.labels[0, 3].float()[None, None]
    flat = F.max_pool2d(one, 5, 1, 2) == -F.max_pool2d(-one, 5, 1, 2)
    safe = clip.flow.visible[0, 0].flatten()
    safe &= sample(flat.float(), ends.view(1, -1, 2))[0, :, 0] == 1
    returned = (there.flatten(1).T + sample(back[None], ends.view(1, -1, 2))[0])[safe].norm(dim=-1)
    assert safe.float().mean() > 0.2
    assert returned.median() < 0.02 and returned.quantile(0.9) < 0.15
    assert (there.flatten(1).T[safe].norm(dim=-1)).mean() > 5 * returned.mean() or there.abs().max() < 0.5


@pytest.mark.parametrize("index", range(3))
def test_visible_pixels_keep_label_and_depth_order(index):
    clip = small(index)
    flow, labels, depth = clip.flow, clip.labels[0], clip.depth[0]
    h, w = clip.size
    y, x = torch.meshgrid(torch.arange(h) + 0.5, torch.arange(w) + 0.5, indexing="ij")
    ends = torch.stack([x, y], -1) + flow.xy[0].permute(0, 2, 3, 1)
    col, row = ends[..., 0].floor().long().clamp(0, w - 1), ends[..., 1].floor().long().clamp(0, h - 1)
    frame = torch.arange(1, len(labels))[:, None, None].expand_as(row)
    seen = flow.visible[0]
    inside = (ends >= 0).all(-1) & (ends[..., 0] < w) & (ends[..., 1] < h)
    assert not (seen & ~inside).any()
    same = labels[frame, row, col] == labels[:-1]
    assert same[seen].float().mean() > 0.98  # the nearest pixel centre may lie across an edge
    hidden = inside & ~seen
    if hidden.sum() > 50:  # whatever hides a pixel is nearer than it was, up to its own motion in depth
        assert (depth[frame, 0, row, col] < depth[:-1, 0] * 1.05)[hidden].float().mean() > 0.85
        assert same[hidden].float().mean() < 0.6


def test_visible_tracks_show_the_same_colours(monkeypatch):
    """Without changes of light the patch around a visible point stays alike, and a shift of a pixel makes it worse."""
    monkeypatch.setattr(
        "trackpl_prep.rendering._finish", lambda rng, video: (video.clamp(0, 1) * 255).to(torch.uint8)[None]
    )
    right, shifted = [], []
    for index in range(6):
        clip = render(0, index, size=(128, 128), frames=4, points=256)
        video = clip.video[0].float() / 255
        colours = [sample(video, clip.tracks[0] + torch.tensor(d)) for d in ([0.0, 0.0], [1.5, 0.0])]
        both = clip.visible[0, 0] & clip.visible[0, 1]
        right.append((colours[0][0] - colours[0][1])[both].abs().mean(-1))
        shifted.append((colours[0][0] - colours[1][1])[both].abs().mean(-1))
    right, shifted = torch.cat(right), torch.cat(shifted)
    assert right.median() < 0.02
    assert shifted.mean() > 1.8 * right.mean()


def test_points_at_their_pixels_agree_with_the_maps():
    clip = render(0, 2, size=(128, 128), frames=8, points=256)
    xy, seen, labels = clip.tracks[0], clip.visible[0], clip.labels[0]
    col, row = (xy[..., k].floor().long().clamp(0, 127) for k in (0, 1))
    frame = torch.arange(8)[:, None].expand_as(row)
    there = labels[frame, row, col]
    # Every point has been chosen where it is seen, and it has one label for all its life.
    assert seen.any(0).all()
    mode = torch.stack([there[:, n][seen[:, n]].mode().values for n in range(256)])
    assert (there == mode)[seen].float().mean() > 0.97
    assert 0.4 < (mode > 0).float().mean() < 0.8


def test_points_are_hidden_leave_and_enter():
    hidden, out = [], []
    enter = leave = 0
    for index in range(10):
        clip = render(7, index, size=(96, 96), frames=24, points=128)
        xy, seen = clip.tracks[0], clip.visible[0]
        outside = ((xy < 0) | (xy > 96)).any(-1)
        hidden.append((~seen).float().mean())
        out.append((~seen & ~outside).float().mean())
        leave += int((outside[1:] & ~outside[:-1]).sum())
        enter += int((~outside[1:] & outside[:-1]).sum())
    assert 0.05 < torch.stack(hidden).mean() < 0.6
    assert torch.stack(out).mean() > 0.03  # by something nearer, not by the frame
    assert enter > 50 and leave > 50


def test_motion_spans_what_video_has():
    speeds = [render(11, i, size=(64, 64), frames=6, points=0).flow.xy[0].norm(dim=1) * 4 for i in range(12)]
    medians = torch.stack([s.median() for s in speeds])
    assert medians.min() < 0.7 and 0.5 < medians.median() < 6 and max(s.max() for s in speeds) > 10


def test_textures_look_like_photographs():
    """Amplitude falls about as 1/f, and the colour channels go together."""
    slopes, correlations = [], []
    for index in range(10):
        video = render(5, index, size=(128, 128), frames=1, points=0).video[0, 0].double() / 255
        grey = (video.mean(0) - video.mean()) * torch.hann_window(128, dtype=torch.float64).outer(
            torch.hann_window(128, dtype=torch.float64)
        )
        power = torch.fft.fft2(grey).abs() ** 2
        k = torch.fft.fftfreq(128) * 128
        radius = (k[:, None] ** 2 + k[None] ** 2).sqrt()
        rings = torch.tensor([4, 6, 8, 12, 16, 24, 32], dtype=torch.float64)
        level = torch.stack([power[(radius > r * 0.8) & (radius < r * 1.25)].mean() for r in rings]).log()
        x = rings.log() - rings.log().mean()
        slopes.append(float((x * level).sum() / (x * x).sum()))
        correlations.append(torch.corrcoef(video.flatten(1))[0, 1])
    assert -3.6 < np.mean(slopes) < -1.4
    assert torch.stack(correlations).mean() > 0.7


def test_images_of_the_user_are_the_textures(tmp_path):
    red = np.zeros((90, 120, 3), np.uint8)
    red[..., 0] = 180
    Image.fromarray(red).save(tmp_path / "red.png")
    Image.fromarray(np.zeros((30, 20), np.uint8) + 90).save(tmp_path / "small_grey.jpg")
    images = synthetic.load_textures(tmp_path)
    assert [tuple(i.shape) for i in images] == [(3, 90, 120), (3, 30, 20)]
    clip = small(0, textures=images[:1], points=4)
    video = clip.video[0].float().mean((0, 2, 3))
    assert video[0] > 4 * video[1]
    floats = small(0, textures=[images[0].float() / 255], points=4)
    assert torch.equal(floats.video, clip.video)


@pytest.mark.parametrize("kind", ["none", "empty", "broken"])
def test_a_folder_that_is_no_folder_of_images_is_refused(tmp_path, kind):
    folder = tmp_path / kind
    if kind != "none":
        folder.mkdir()
    if kind == "broken":
        (folder / "a.png").write_text("no image")
    with pytest.raises(DataError, match=kind):
        synthetic.make(tmp_path / "out", 1, textures=folder)
    assert not (tmp_path / "out").exists()


def digests(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def test_a_set_is_the_same_whoever_makes_it(tmp_path):
    one = synthetic.make(tmp_path / "a", 3, seed=1, size=(48, 64), frames=3, points=8)
    two = synthetic.make(tmp_path / "b", 3, seed=1, size=(48, 64), frames=3, points=8)
    assert digests(one.parent) == digests(two.parent)
    index = read_index(one)
    assert [s.key for s in index.samples] == [f"synthetic-1-{i:06d}" for i in range(3)]
    assert index.meta["options"]["seed"] == 1 and index.meta["version"] == synthetic.VERSION
    clip, direct = decode(read_members(index.samples[2])), render(1, 2, size=(48, 64), frames=3, points=8)
    assert torch.equal(clip.tracks, direct.tracks) and torch.equal(clip.visible, direct.visible)
    assert torch.equal(clip.labels.long(), direct.labels.long())
    assert (clip.flow.xy - direct.flow.xy).abs().max() <= 1 / 64
    stamp = one.stat().st_mtime_ns
    assert synthetic.make(tmp_path / "a", 3, seed=1, size=(48, 64), frames=3, points=8) == one
    assert one.stat().st_mtime_ns == stamp  # kept
    with pytest.raises(DataError, match="another set"):
        synthetic.make(tmp_path / "a", 3, seed=2, size=(48, 64), frames=3, points=8)


@pytest.mark.slow
def test_workers_do_not_change_a_set(tmp_path):
    options = {"seed": 1, "size": (48, 64), "frames": 3, "points": 8}
    one = synthetic.make(tmp_path / "a", 3, **options)
    two = synthetic.make(tmp_path / "b", 3, workers=2, **options)
    assert digests(one.parent) == digests(two.parent)


def test_the_command_says_where_the_set_is_and_what_next(tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--clips", "2", "--seed", "3", "--size", "32", "48", "--frames", "2", "--points", "4"]
    assert cli.run(["make", "synthetic", str(out), *options]) == 0
    said = capsys.readouterr().out
    assert str(out / "synthetic.index.json") in said and "trackpl fit" in said
    assert cli.run(["list"]) == 0
    assert "synthetic" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["mak"], "did you mean 'make'"),
        (["make"], "say which data set"),
        (["make", "synthetik", "x"], "did you mean 'synthetic'"),
        (["make", "synthetic", "x", "--clip", "3"], "--clip"),
        (["make", "synthetic", "x", "--clips", "none"], "--clips"),
        (["make", "synthetic", "x", "--clips", "0"], "at least 1 clip"),
        (["make", "synthetic", "x", "--size", "2", "2"], "at least 8x8"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(args, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Error, match=message) as caught:
        cli.run(args)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_default_set_is_made_once(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("TRACKPL_CACHE", str(tmp_path))
    monkeypatch.setitem(synthetic.DEFAULT_SETS, "val", (202, 1))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0}, raising=False)
    index = synthetic.default_set("val")
    assert tmp_path in index.parents and len(read_index(index).samples) == 1
    assert str(index.parent) in capfd.readouterr().err
    assert synthetic.default_set("val") == index
    assert "making" not in capfd.readouterr().err
    with pytest.raises(DataError, match="did you mean 'train'"):
        synthetic.default_set("trian")


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRACKPL_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match="TRACKPL_CACHE"):
        synthetic.default_set("val")


@pytest.mark.slow
def test_two_processes_may_make_the_default_set_at_once(tmp_path):
    code = "from trackpl_prep import synthetic as s; s.DEFAULT_SETS['val'] = (202, 2); print(s.default_set('val'))"
    env = {**os.environ, "TRACKPL_CACHE": str(tmp_path), "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    results = [run.communicate(timeout=120) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], results
    assert results[0][0] == results[1][0]
    assert sum("making" in err for _, err in results) == 1
    assert len(read_index(Path(results[0][0].strip())).samples) == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_renders_the_same_scene():
    cpu, gpu = small(3), small(3, device="cuda").to("cpu")
    assert (cpu.tracks - gpu.tracks).abs().max() < 1e-2
    assert (cpu.labels == gpu.labels).float().mean() > 0.995
    assert (cpu.video.float() - gpu.video.float()).abs().mean() < 1
