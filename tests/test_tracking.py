import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from trackpl import queries, tracking
from trackpl.cli import main
from trackpl.errors import CheckpointError
from trackpl.types import Tracks
from trackpl.video import open_video
from trackpl.writing import write_video

FRAMES, H, W = 9, 48, 64


class Drifting:
    """Moves every point one pixel a frame to the right, and sees it in even frames only."""

    device = torch.device("cpu")

    def has(self, capability):
        return capability == "track"

    def track(self, clip, queries):
        times = torch.arange(clip.frames)[None, :, None]
        xy = queries[:, None, :, 1:].repeat(1, clip.frames, 1, 1)
        xy[..., 0] += times - queries[:, None, :, 0]
        visible = torch.where(times % 2 == 0, 0.8, 0.3).expand(xy.shape[:3])
        return Tracks(xy, visible)


@pytest.fixture
def asked(monkeypatch):
    """Load the stand-in for every name, and note what was asked for."""
    calls = []

    def load(name, checkpoint=None, device="cpu", **init_args):
        calls.append((name, checkpoint, device))
        return Drifting()

    monkeypatch.setattr("trackpl.checkpoints.load", load)
    return calls


@pytest.fixture
def clip(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    grey = torch.linspace(40, 200, FRAMES).to(torch.uint8)[:, None, None, None].expand(FRAMES, 3, H, W)
    return write_video(tmp_path / "clip.mp4", grey, 12)


def track(*words):
    assert main(["track", *map(str, words)]) == 0


def results(folder):
    with np.load(folder / "tracks.npz", allow_pickle=False) as file:
        return dict(file)


def grid(n, left=0, top=0, right=W, bottom=H):
    cells = (np.arange(n) + 0.5) / n
    y, x = np.meshgrid(top + cells * (bottom - top), left + cells * (right - left), indexing="ij")
    return np.stack([x, y], -1).reshape(-1, 2)


def test_with_nothing_said_a_grid_is_tracked_and_all_files_are_told(clip, asked, capsys):
    track(clip)
    out = Path("tracks") / "clip"
    assert sorted(p.name for p in out.iterdir()) == sorted(tracking.OUTPUTS)
    found = results(out)
    assert {k: (v.shape, v.dtype) for k, v in found.items()} == {
        "xy": ((FRAMES, 400, 2), np.float32),
        "visible": ((FRAMES, 400), np.bool_),
        "visibility": ((FRAMES, 400), np.float32),
        "queries": ((400, 3), np.float32),
    }
    np.testing.assert_allclose(found["queries"][:, 1:], grid(20), atol=1e-5)
    np.testing.assert_allclose(found["xy"][3, :, 0] - found["queries"][:, 1], 3, atol=1e-4)
    assert asked == [("locotrack", None, "cuda" if torch.cuda.is_available() else "cpu")]
    said = capsys.readouterr()
    assert all(str(out / name) in said.out for name in tracking.OUTPUTS)
    assert "9 frames x 400 points" in said.out and "56 % visible" in said.out and "next: " in said.out
    assert "tracking" in said.err and "drawing" in said.err and f"{FRAMES}/{FRAMES}" in said.err


def test_csv_says_what_the_npz_says(clip, asked):
    track(clip, "--grid", 3)
    found = results(Path("tracks/clip"))
    with open("tracks/clip/tracks.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["point", "frame", "x", "y", "visible"] and len(rows) == 9 * FRAMES
    assert [int(r["point"]) for r in rows] == [n for n in range(9) for _ in range(FRAMES)]
    assert [int(r["frame"]) for r in rows] == list(range(FRAMES)) * 9
    xy = np.array([[float(r["x"]), float(r["y"])] for r in rows]).reshape(9, FRAMES, 2)
    np.testing.assert_allclose(xy.swapaxes(0, 1), found["xy"], atol=1e-4)
    visible = np.array([int(r["visible"]) for r in rows]).reshape(9, FRAMES).T
    np.testing.assert_array_equal(visible, found["visible"])


def test_drawn_video_and_sheet(clip, asked):
    track(clip, "--points", "20,24", "--tail", 0)
    drawn = open_video("tracks/clip/tracks.mp4")
    assert (drawn.frames, drawn.size, drawn.fps) == (FRAMES, (H, W), 12)
    plain = open_video(clip).read(range(FRAMES)).float()
    changed = (drawn.read(range(FRAMES)).float() - plain).abs().amax(1)
    for t in range(FRAMES):
        y, x = (changed[t] > 40).nonzero().float().mean(0).tolist()
        assert x == pytest.approx(20 + t, abs=1.5) and y == pytest.approx(24, abs=1.5)
    with Image.open("tracks/clip/tracks.png") as sheet:
        assert sheet.width > 2 * W and sheet.mode == "RGB"


def test_points_of_all_kinds_add_up(clip, asked, tmp_path):
    np.save(tmp_path / "p.npy", np.array([[2, 5.5, 6.5], [0, 64, 48]]))
    track(clip, "--points", "1,2", "3.5,4@7", "--points", "0,0@8", "--points-file", "p.npy", "--grid", 2, "--start", 4)
    wanted = [[4, 1, 2], [7, 3.5, 4], [8, 0, 0], [2, 5.5, 6.5], [0, 64, 48]]
    wanted += [[4, *p] for p in grid(2)]
    np.testing.assert_allclose(results(Path("tracks/clip"))["queries"], wanted)


@pytest.mark.parametrize(
    ("name", "text", "wanted"),
    [
        ("a.csv", "t,x,y\n1,2,3\n4,5.5,6\n", [[1, 2, 3], [4, 5.5, 6]]),
        ("a.csv", "y,x\n2,3\n", [[5, 3, 2]]),
        ("a.csv", "\ufeffX;Y;T\r\n3;4;2\r\n", [[2, 3, 4]]),
        ("a.txt", "# x y\n1 2\n\n3\t4\n", [[5, 1, 2], [5, 3, 4]]),
    ],
)
def test_files_of_points(clip, asked, name, text, wanted):
    Path(name).write_text(text, encoding="utf-8")
    track(clip, "--points-file", name, "--start", 5)
    np.testing.assert_allclose(results(Path("tracks/clip"))["queries"], wanted)


@pytest.mark.parametrize("scale", [1, 2])
def test_grid_spans_the_mask_and_keeps_to_it(clip, asked, capsys, scale):
    mask = np.zeros((H * scale, W * scale), np.uint8)
    mask[10 * scale : 20 * scale, 30 * scale : 50 * scale] = 255
    mask[10 * scale : 15 * scale, 30 * scale : 40 * scale] = 0
    Image.fromarray(mask).save("mask.png")
    track(clip, "--mask", "mask.png", "--grid", 4)
    box = grid(4, 30, 10, 50, 20)
    wanted = box[~((box[:, 0] < 40) & (box[:, 1] < 15))]
    np.testing.assert_allclose(results(Path("tracks/clip"))["queries"][:, 1:], wanted)
    assert "12 of the 4 x 4 grid points lie on the mask" in capsys.readouterr().out


def test_masks_with_colours_alpha_or_palette(clip):
    marked = np.zeros((H, W), bool)
    marked[5:9, 7:20] = True
    palette = Image.fromarray(marked.astype(np.uint8))
    palette.putpalette([0, 0, 0, 0, 0, 0])
    colour = np.zeros((H, W, 4), np.uint8)
    colour[marked] = (0, 0, 9, 255)
    colour[0, 0] = (200, 200, 200, 0)
    for image in (palette, Image.fromarray(marked), Image.fromarray(colour), Image.fromarray(colour[..., 3])):
        image.save("mask.png")
        np.testing.assert_array_equal(queries.read_mask(Path("mask.png"), (H, W)), marked)


def test_folder_of_frames(asked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.frames").mkdir()
    for i in range(3):
        Image.new("RGB", (33, 21), (50 * i, 0, 0)).save(tmp_path / "my.frames" / f"{i}.png")
    track("my.frames", "--grid", 2)
    assert open_video("tracks/my.frames/tracks.mp4").size == (22, 34)  # odd sizes are padded
    assert results(Path("tracks/my.frames"))["xy"].shape == (3, 4, 2)


def test_one_frame(asked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (32, 20)).save("still.png")
    track("still.png", "--points", "3,4")
    assert results(Path("tracks/still"))["xy"].tolist() == [[[3, 4]]]


def test_options_reach_where_they_belong(clip, asked):
    Path("w.ckpt").write_text("")
    track(
        clip,
        "--model",
        "other",
        "--checkpoint",
        "w.ckpt",
        "--device",
        "cpu",
        "--out",
        "o",
        "--no-video",
        "--threshold",
        0.2,
    )
    assert asked == [("other", Path("w.ckpt"), "cpu")]
    assert sorted(p.name for p in Path("o").iterdir()) == ["tracks.csv", "tracks.npz", "tracks.png"]
    assert results(Path("o"))["visible"].all()


def test_sheet_without_video_is_that_of_the_video(clip, asked):
    track(clip, "--grid", 3, "--out", "a")
    track(clip, "--grid", 3, "--out", "b", "--no-video")
    assert Path("a/tracks.png").read_bytes() == Path("b/tracks.png").read_bytes()


def test_earlier_results_are_replaced_only_when_told(clip, asked, capsys):
    track(clip, "--grid", 2)
    before = {p: p.read_bytes() for p in Path("tracks/clip").iterdir()}
    assert main(["track", "clip.mp4", "--grid", "3"]) == 2
    assert "add --overwrite" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in Path("tracks/clip").iterdir()} == before
    track(clip, "--grid", 3, "--overwrite", "--no-video")
    assert results(Path("tracks/clip"))["xy"].shape == (FRAMES, 9, 2)
    assert not Path("tracks/clip/tracks.mp4").exists()  # it showed other tracks


def bad_inputs(folder):
    """Make files that are wrong; they lie where the test runs."""
    Image.new("L", (W, H)).save(folder / "black.png")
    Image.new("L", (W, W), 255).save(folder / "square.png")
    thin = Image.new("L", (W, H))
    thin.putpixel((0, 0), 1)
    thin.putpixel((9, 5), 1)
    thin.save(folder / "thin.png")
    (folder / "text.mp4").write_text("not a video\n" * 20)
    data = (folder / "clip.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(data[:-200])
    (folder / "empty").mkdir()
    (folder / "bad.csv").write_text("t,x,y\n0,1,2\n0,one,2\n")
    (folder / "wide.csv").write_text("1,2,3,4\n")
    (folder / "none.csv").write_text("t,x,y\n")
    (folder / "far.csv").write_text("t,x,y\n0,1,2\n\n3,1,49\n")
    (folder / "nan.csv").write_text("1,nan\n")
    np.save(folder / "flat.npy", np.zeros(5))
    np.save(folder / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)


BAD = [
    ("", "arguments are required: VIDEO"),
    ("clip.mp5", "did you mean 'clip.mp4'?"),
    ("text.mp4", "text.mp4 is a text file, not a video"),
    ("cut.mp4", "cut.mp4 is cut off: "),
    ("empty", "no frames in the folder empty: it is empty"),
    ("clip.mp4 other.mp4", "one video at a time: do not know what to do with 'other.mp4'"),
    ("clip.mp4 --gird 5", "no option '--gird'; did you mean '--grid'?"),
    ("clip.mp4 --gri 5", "no option '--gri'; did you mean '--grid'?"),
    ("clip.mp4 --grid five", "invalid int value: 'five'"),
    ("clip.mp4 --grid 0", "--grid 0: allowed is a whole number from 1 on"),
    ("clip.mp4 --tail -1", "--tail -1: allowed"),
    ("clip.mp4 --threshold 1.5", "--threshold 1.5: allowed"),
    ("clip.mp4 --device gpu", "--device gpu: allowed: auto, cpu, cuda"),
    ("clip.mp4 --checkpoint no.ckpt", "no checkpoint at no.ckpt"),
    ("clip.mp4 --out text.mp4", "--out text.mp4 is a file: give a folder"),
    ("clip.mp4 --out text.mp4/deeper", "text.mp4 is not a folder that you may write to"),
    ("clip.mp4 --start 9", "(t=9, x=1.6, y=1.2) is outside clip.mp4: t is a whole number in [0, 8]"),
    ("clip.mp4 --points 3,4 70,5@2", "'70,5@2' (t=2, x=70, y=5) is outside clip.mp4: "),
    ("clip.mp4 --points 3,4@9", "'3,4@9' (t=9, x=3, y=4) is outside clip.mp4: t is a whole number in [0, 8]"),
    ("clip.mp4 --points 3,4@1.5", "'3,4@1.5' (t=1.5, x=3, y=4) is outside"),
    ("clip.mp4 --points nan,4", "'nan,4' (t=0, x=nan, y=4) is outside"),
    ("clip.mp4 --points -3,4", "the point '-3,4' (t=0, x=-3, y=4) is outside clip.mp4"),
    ("clip.mp4 --points 3;4", "'3;4' is not a point: allowed is X,Y or X,Y@T"),
    ("clip.mp4 --points 3,4@", "'3,4@' is not a point"),
    ("--points 3,4 clip.mp4", "arguments are required: VIDEO"),
    (
        "clip.mp4 --points 3,4 text.mp4",
        "'text.mp4' is not a point: allowed is X,Y or X,Y@T such as 120.5,64@10; the video",
    ),
    ("clip.mp4 --points-file no.csv", "no file of points at no.csv"),
    ("clip.mp4 --points-file text.mp4", "allowed are .csv, .txt and .npy"),
    ("clip.mp4 --points-file bad.csv", "line 3 of bad.csv is '0,one,2': allowed are numbers t,x,y or x,y"),
    ("clip.mp4 --points-file wide.csv", "line 1 of wide.csv is '1,2,3,4'"),
    ("clip.mp4 --points-file none.csv", "none.csv holds no points"),
    ("clip.mp4 --points-file far.csv", "of line 4 (t=3, x=1, y=49) is outside clip.mp4"),
    ("clip.mp4 --points-file nan.csv", "of line 1 (t=0, x=1, y=nan) is outside"),
    ("clip.mp4 --points-file flat.npy", "flat.npy must hold numbers of shape (N, 3)"),
    ("clip.mp4 --points-file objects.npy", "objects.npy is not a readable .npy"),
    ("clip.mp4 --mask no.png", "no mask at no.png"),
    ("clip.mp4 --mask text.mp4", "the mask text.mp4 is not a readable png"),
    ("clip.mp4 --mask black.png", "the mask black.png marks nothing"),
    ("clip.mp4 --mask square.png", "square.png is 64x64 and the video 64x48"),
    ("clip.mp4 --mask thin.png --grid 3", "no point of a grid of 3 x 3 falls on what thin.png marks: try --grid 12"),
]


@pytest.mark.parametrize(("words", "message"), BAD, ids=[words or "nothing" for words, _ in BAD])
def test_bad_input_is_one_line_and_writes_nothing(clip, asked, tmp_path, capsys, words, message):
    bad_inputs(tmp_path)
    old = tmp_path / "tracks" / "text"
    old.mkdir(parents=True)
    (old / "note").write_text("mine")
    before = {p: p.is_file() and p.read_bytes() for p in tmp_path.rglob("*")}
    assert main(["track", *words.split()]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("trackpl: ") and said.err.count("\n") == 1
    assert message in said.err
    assert said.out == "" and asked == []  # no model was loaded
    assert {p: p.is_file() and p.read_bytes() for p in tmp_path.rglob("*")} == before


def test_failing_model_writes_nothing(clip, monkeypatch, capsys):
    def load(*args, **kwargs):
        raise CheckpointError("of another method")

    monkeypatch.setattr("trackpl.checkpoints.load", load)
    assert main(["track", "clip.mp4"]) == 2
    assert capsys.readouterr().err == "trackpl: of another method\n"
    assert not Path("tracks").exists()


def test_cuda_without_a_gpu_is_said_before_anything_else(clip, asked, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["track", "clip.mp4", "--device", "cuda"]) == 2
    assert "torch sees no GPU here; use --device cpu" in capsys.readouterr().err
    assert asked == []


def test_stopping_while_drawing_keeps_the_tracks_and_no_half_video(clip, asked, monkeypatch):
    track(clip, "--grid", 2)

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("trackpl.draw.draw_frame", stop)
    assert main(["track", "clip.mp4", "--grid", "3", "--overwrite"]) == 130
    assert sorted(p.name for p in Path("tracks/clip").iterdir()) == ["tracks.csv", "tracks.npz"]
    assert results(Path("tracks/clip"))["xy"].shape == (FRAMES, 9, 2)


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as left:
        main(["track", "--help"])
    assert left.value.code == 0
    said = capsys.readouterr().out
    for option in ("--grid", "--points", "--points-file", "--mask", "--start", "--out", "--no-video", "--overwrite"):
        assert option in said
