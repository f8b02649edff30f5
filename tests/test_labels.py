"""`trackpl track --labels` and `--keypoints`: files in, files out."""

import csv

import numpy as np
import pytest
import torch
from PIL import Image
from test_propagation import OfFlow, OfTracks

from trackpl.cli import main
from trackpl.errors import DataError
from trackpl.labels import default_palette, overlay, read_keypoints, read_labels
from trackpl.video import open_video
from trackpl.writing import write_video

FRAMES, H, W = 9, 48, 64


class Native(OfTracks):
    """Its labels move by two cells of a coarse map a frame to the right."""

    def label_size(self, size):
        return size[0] // 2, size[1] // 2

    def propagate_frames(self, frames, labels):
        for t, _ in enumerate(frames):
            yield labels.roll(2 * t, -1)


@pytest.fixture
def method(monkeypatch):
    chosen = [OfFlow()]
    monkeypatch.setattr("trackpl.checkpoints.load", lambda *args, **kwargs: chosen[0])
    return chosen


@pytest.fixture
def clip(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    grey = torch.linspace(40, 200, FRAMES).to(torch.uint8)[:, None, None, None].expand(FRAMES, 3, H, W)
    return write_video(tmp_path / "clip.mp4", grey, 12)


def _ids():
    ids = np.zeros((H, W), np.uint8)
    ids[10:30, 8:28], ids[35:40, 8:12], ids[0, :3] = 4, 9, 255
    return ids


def _png(path, values, palette=None):
    image = Image.fromarray(values)
    if palette is not None:
        image.putpalette(palette.astype(np.uint8).tobytes())
    image.save(path)
    return path


def test_masks_of_every_frame_with_the_given_palette(clip, method, capsys):
    palette = np.random.default_rng(0).integers(0, 256, (256, 3))
    given = _png(clip.parent / "first.png", _ids(), palette)
    assert main(["track", "clip.mp4", "--labels", str(given), "--device", "cpu"]) == 0
    out = clip.parent / "tracks" / "clip"
    assert sorted(p.name for p in out.iterdir()) == ["masks", "masks.mp4", "masks.png"]
    names = sorted(p.name for p in (out / "masks").iterdir())
    assert names == [f"{t:05d}.png" for t in range(FRAMES)]
    for t, name in enumerate(names):
        with Image.open(out / "masks" / name) as image:
            assert image.mode == "P" and np.array_equal(np.array(image.getpalette()).reshape(-1, 3), palette)
            ids = np.asarray(image)
        if t == 0:
            assert np.array_equal(ids, _ids())  # void and all
        else:
            assert np.array_equal(ids == 4, np.roll(_ids() == 4, (t, 2 * t), (0, 1)))
            assert set(np.unique(ids)) == {0, 4, 9}
    assert len(open_video(out / "masks.mp4")) == FRAMES
    assert "9 frames x 2 labels by the flow of OfFlow" in capsys.readouterr().out  # void is none
    assert main(["track", "clip.mp4", "--labels", str(given), "--device", "cpu"]) != 0  # it is there already
    assert "--overwrite" in capsys.readouterr().err
    again = ["track", "clip.mp4", "--labels", str(given), "--device", "cpu", "--overwrite", "--no-video"]
    assert main([*again, "--frames", "3"]) == 0
    assert len(list((out / "masks").iterdir())) == 3 and not (out / "masks.mp4").exists()
    assert sorted(p.name for p in out.iterdir()) == ["masks", "masks.png"]


def test_labels_of_another_size_and_kind(tmp_path):
    small = read_labels(_png(tmp_path / "small.png", _ids()[::2, ::2]), (H, W))
    assert small.ids.shape == (H // 2, W // 2) and small.palette[1].tolist() == [128, 0, 0]
    colours = np.zeros((H, W, 3), np.uint8)
    colours[:9], colours[20:, 5:] = (200, 10, 10), (10, 200, 10)
    of_colours = read_labels(_png(tmp_path / "colours.png", colours), (H, W))
    assert np.array_equal(of_colours.palette[of_colours.ids], colours) and set(np.unique(of_colours.ids)) == {0, 1, 2}
    # The first colours of Pascal VOC.
    assert default_palette()[:4].tolist() == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0]]


@pytest.mark.parametrize(
    ("values", "word"),
    [
        (np.zeros((H, W), np.uint8), "mark nothing"),
        (np.ones((H, H), np.uint8), "shapes must agree"),
        (np.random.default_rng(0).integers(0, 256, (H, W, 3), np.uint8), "as many as a photo"),
        (np.full((H, W), 7000, np.uint16), "16 bits"),
        (np.pad(np.tile(np.arange(0, 250, 10, dtype=np.uint8), (20, 1)), ((14, 14), (19, 20))), "edges were smoothed"),
    ],
)
def test_labels_that_are_none_are_refused(tmp_path, values, word):
    with pytest.raises(DataError, match=word):
        read_labels(_png(tmp_path / "bad.png", values), (H, W))


def test_files_that_are_no_png_are_refused(tmp_path):
    with pytest.raises(DataError, match="no labels at"):
        read_labels(tmp_path / "none.png", (H, W))
    Image.fromarray(_ids()).save(tmp_path / "a.jpg")
    with pytest.raises(DataError, match="JPEG"):
        read_labels(tmp_path / "a.jpg", (H, W))
    data = _png(tmp_path / "b.png", np.random.default_rng(0).integers(0, 9, (H, W), np.uint8)).read_bytes()
    (tmp_path / "b.png").write_bytes(data[:200])
    with pytest.raises(DataError, match="not a readable png"):
        read_labels(tmp_path / "b.png", (H, W))


def test_options_that_do_not_go_with_labels(clip, method, capsys):
    given = str(_png(clip.parent / "first.png", _ids()))
    for words, answer in (
        (["--labels", given, "--grid", "4"], "leave out --grid"),
        (["--labels", given, "--keypoints", "x.csv"], "do not go together"),
        (["--keypoints", "x.csv"], "no keypoints at x.csv"),
    ):
        assert main(["track", "clip.mp4", "--device", "cpu", *words]) != 0
        assert answer in capsys.readouterr().err
    assert main(["track", "0", "--labels", given]) != 0
    assert "camera" in capsys.readouterr().err
    assert not (clip.parent / "tracks").exists()


@pytest.mark.parametrize(("kind", "step"), [(OfTracks, (2.0, 1.0)), (Native, (4.0, 0.0))])
def test_keypoints_by_tracks_and_by_maps(clip, method, kind, step):
    method[0] = kind()
    (clip.parent / "joints.csv").write_text('name,x,y\nhead,10.3,20.9\n"left hand",17.25,33\n')
    assert main(["track", "clip.mp4", "--keypoints", "joints.csv", "--device", "cpu"]) == 0
    out = clip.parent / "tracks" / "clip"
    assert sorted(p.name for p in out.iterdir()) == ["keypoints.csv", "keypoints.mp4", "keypoints.png"]
    with (out / "keypoints.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * FRAMES and {r["name"] for r in rows} == {"head", "left hand"}
    for row in rows:
        t, start = int(row["frame"]), {"head": (10.3, 20.9), "left hand": (17.25, 33)}[row["name"]]
        assert abs(float(row["x"]) - start[0] - step[0] * t) < 0.02 and row["visible"] == "1"
        assert abs(float(row["y"]) - start[1] - step[1] * t) < 0.02


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "0 keypoints"),
        ("a,1\n", "allowed is name,x,y"),
        ("a,1,2,3\n", "allowed is name,x,y"),
        ("a,1,2\na,3,4\n", "is twice"),
        (",1,2\n", "names no keypoint"),
        ("a,1,nan\n", "outside the frame"),
        ("a,1,99\n", "outside the frame"),
    ],
)
def test_keypoints_that_are_none_are_refused(tmp_path, text, word):
    (tmp_path / "k.csv").write_text(text)
    with pytest.raises(DataError, match=word):
        read_keypoints(tmp_path / "k.csv", (H, W))


def test_the_overlay_leaves_background_and_void_alone():
    image = torch.full((3, H, W), 100, dtype=torch.uint8)
    ids = torch.from_numpy(_ids())
    palette = torch.from_numpy(default_palette())
    drawn = overlay(image, ids, palette)
    changed = (drawn != image).any(0)
    assert changed[12:28, 10:26].all() and not changed[45:].any() and not changed[0, :2].any()
    assert (image == 100).all()
