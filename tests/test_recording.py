"""`trackpl track` on long videos and on a camera: streamed, written as it goes, ended gently."""

import csv
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from trackpl import adapters, camera, draw, recording, tracking
from trackpl.cli import main
from trackpl.errors import Error, VideoError
from trackpl.streams import WindowStream
from trackpl.types import Tracks
from trackpl.video import open_video
from trackpl.writing import write_video

H, W = 48, 64


class Drifting:
    """Moves points one pixel to the right where brightness grows by 4, sees them on even frames; streams by windows."""

    device = torch.device("cpu")
    window = 6

    def has(self, capability):
        return capability == "track"

    def track(self, clip, queries):
        t = (clip.video[:, :, 0, 24, 32].float() / 4).round()
        moved = t[..., None] - t.gather(1, queries[..., 0].long())[:, None]
        xy = queries[:, None, :, 1:].repeat(1, clip.frames, 1, 1)
        xy[..., 0] += moved
        return Tracks(xy, torch.where(t % 2 == 0, 0.8, 0.3)[..., None].expand(xy.shape[:3]))

    def stream(self, queries=None):
        stream = WindowStream(self, self.window)
        stream.add(queries)
        return stream


class FakeCamera:
    """Gives frames of growing brightness, and `last` with the last of them."""

    frames = None
    path, size, fps = Path("camera0"), (H, W), 12.0

    def __init__(self, frames, last=lambda: None):
        self.count, self.last, self.closed = frames, last, False

    def __iter__(self):
        for t in range(self.count):
            if t == self.count - 1:
                self.last()
            yield torch.full((3, H, W), 4 * t, dtype=torch.uint8)

    def close(self):
        self.closed = True


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("trackpl.checkpoints.load", lambda *args, **kwargs: Drifting())


@pytest.fixture
def live(monkeypatch):
    """Plug a fake camera in."""

    def plug(*args):
        made = FakeCamera(*args)
        monkeypatch.setattr(tracking, "open_camera", lambda number: made)
        return made

    return plug


@pytest.fixture
def clip(monkeypatch):
    """A video of 20 frames that counts as too long to be held whole."""
    monkeypatch.setattr(adapters, "VIDEO_BYTES", 0)
    grey = 4 * torch.arange(20, dtype=torch.uint8)[:, None, None, None].expand(20, 3, H, W)
    return write_video(Path("clip.mp4"), grey, 12, crf=0)


def results(folder):
    with np.load(Path(folder) / "tracks.npz", allow_pickle=False) as file:
        return dict(file)


def straight(points, frames):
    t = np.arange(frames)[:, None]
    return np.stack([points[:, 1] + t - points[:, 0], np.broadcast_to(points[:, 2], (frames, len(points)))], -1)


def test_a_long_video_gets_the_files_of_a_short_one(clip, monkeypatch, capsys):
    words = ["track", "clip.mp4", "--points", "5,7", "9,9@8", "20.5,30@19", "--out"]
    assert main([*words, "long"]) == 0
    said = capsys.readouterr()
    assert "20 frames x 3 points" in said.out and "50 % visible" in said.out and "tracking" in said.err
    monkeypatch.setattr(adapters, "VIDEO_BYTES", 1 << 30)
    assert main([*words, "short"]) == 0
    long, short = results("long"), results("short")
    assert sorted(p.name for p in Path("long").iterdir()) == sorted(tracking.OUTPUTS)
    for key in ("xy", "visible", "visibility", "queries"):
        assert long[key].shape == short[key].shape and long[key].dtype == short[key].dtype
        np.testing.assert_allclose(long[key], short[key], atol=1e-4)  # frames before the queries too
    np.testing.assert_allclose(long["xy"], straight(long["queries"], 20), atol=1e-4)
    drawn = [open_video(f"{name}/tracks.mp4") for name in ("long", "short")]
    assert drawn[0].frames == 20 and drawn[0].fps == 12
    assert torch.equal(drawn[0].read(range(20)), drawn[1].read(range(20)))


def test_rows_come_frame_by_frame(clip):
    assert main(["track", "clip.mp4", "--points", "5,7", "9,9", "--no-video"]) == 0
    with open("tracks/clip/tracks.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(int(r["frame"]), int(r["point"])) for r in rows] == [(t, n) for t in range(20) for n in range(2)]
    found = results("tracks/clip")
    xy = np.array([[float(r["x"]), float(r["y"])] for r in rows]).reshape(20, 2, 2)
    np.testing.assert_allclose(xy, found["xy"], atol=1e-4)
    np.testing.assert_array_equal([int(r["visible"]) for r in rows], found["visible"].flatten())
    assert sorted(p.name for p in Path("tracks/clip").iterdir()) == ["tracks.csv", "tracks.npz", "tracks.png"]


def test_a_camera_runs_until_ctrl_c_and_keeps_all_that_came(live, capsys):
    plugged = live(11, lambda: signal.raise_signal(signal.SIGINT))
    assert main(["track", "0", "--points", "5,7", "9,9@4"]) == 0  # Ctrl-C is how one ends it
    found = results("tracks/camera0")
    assert found["xy"].shape == (11, 2, 2) and plugged.closed
    want = straight(found["queries"], 11)
    want[:4, 1] = (9, 9)  # there is no way back: it waits at its query, hidden
    np.testing.assert_allclose(found["xy"], want, atol=1e-4)
    assert not found["visible"][:4, 1].any()
    assert open_video("tracks/camera0/tracks.mp4").frames == 11
    said = capsys.readouterr()
    assert "11 frames x 2 points" in said.out and "camera0: 64x48; Ctrl-C ends it" in said.out
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_files_grow_while_a_camera_runs(live):
    sizes = []

    def look():
        for pattern in (".tracks-*.csv", ".tracks-*/xy"):
            sizes.append(sum(p.stat().st_size for p in Path("tracks/camera0").glob(pattern)))
        sizes.append(Path("tracks/camera0/tracks.csv").exists())

    live(3000 // 50, look)
    assert main(["track", "0", "--grid", "15", "--no-video"]) == 0
    assert sizes[0] > 100_000 and sizes[1] > 50_000 and not sizes[2]  # 225 points, 54 frames settled, buffers aside
    assert results("tracks/camera0")["xy"].shape == (60, 225, 2)


def test_a_number_of_frames_ends_it(live, clip):
    live(100)
    assert main(["track", "0", "--frames", "7", "--no-video"]) == 0
    assert results("tracks/camera0")["xy"].shape == (7, 400, 2)
    assert main(["track", "clip.mp4", "--frames", "9", "--no-video"]) == 0
    assert results("tracks/clip")["xy"].shape == (9, 400, 2)


def test_ctrl_c_in_a_long_video_keeps_what_came_before(clip, monkeypatch, capsys):
    read, calls = adapters.counted, []

    def counted(images, *args):
        for t, image in enumerate(read(images, *args)):
            calls.append(t)
            if t == 12:
                signal.raise_signal(signal.SIGINT)
            yield image

    monkeypatch.setattr(adapters, "counted", counted)
    assert main(["track", "clip.mp4", "--grid", "3"]) == 130
    assert results("tracks/clip")["xy"].shape == (13, 9, 2) and calls[-1] == 12
    assert open_video("tracks/clip/tracks.mp4").frames == 13
    assert "13 frames x 9 points" in capsys.readouterr().out


def test_a_second_ctrl_c_leaves_nothing_half_written(live):
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    live(9, twice)
    assert main(["track", "0"]) == 130
    assert list(Path("tracks/camera0").iterdir()) == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_camera_that_breaks_off_keeps_what_came_before(live, capsys):
    def break_off():
        raise VideoError("camera0 stopped: No such device")

    live(9, break_off)
    assert main(["track", "0", "--grid", "2"]) == 2
    assert results("tracks/camera0")["xy"].shape == (8, 4, 2)
    assert "camera0 stopped: No such device; the 8 frames before it are in tracks/camera0" in capsys.readouterr().err
    live(1, break_off)
    assert main(["track", "0", "--grid", "2", "--out", "none"]) == 2
    assert capsys.readouterr().err.endswith("trackpl: camera0 stopped: No such device\n")
    assert list(Path("none").iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["0", "--points", "70,5"], "(t=0, x=70, y=5) is outside camera0: t is a whole number from 0 on, x in [0, 64]"),
        (["0", "--points", "5,5@inf"], "(t=inf, x=5, y=5) is outside"),
        (["0", "--frames", "0"], "--frames 0: allowed"),
    ],
)
def test_bad_input_for_a_camera(live, capsys, words, message):
    plugged = live(3)
    assert main(["track", *words]) == 2
    assert message in capsys.readouterr().err and not Path("tracks").exists()
    assert plugged.closed or "--frames" in words


def test_a_file_whose_name_is_a_number_is_not_a_camera(monkeypatch):
    grey = torch.zeros(3, 3, H, W, dtype=torch.uint8)
    write_video(Path("clip.mp4"), grey, 12).rename("7")
    assert main(["track", "7", "--grid", "2", "--no-video"]) == 0
    assert results("tracks/7")["xy"].shape == (3, 4, 2)


def test_the_recorder_keeps_the_sheet_small_and_spread(tmp_path):
    recorder = recording.Recorder(tmp_path, np.array([[0.0, 3, 4]]), (H, W), 12.0, video=False)
    image = torch.zeros(3, H, W, dtype=torch.uint8)
    shown = []
    sheet = draw.contact_sheet

    def note(frames, titles):
        shown.extend(titles)
        return sheet(frames, titles=titles)

    draw.contact_sheet, before = note, draw.contact_sheet
    try:
        recorder.write(iter([(image, torch.zeros(1, 2), torch.ones(1))] * 100))
    finally:
        draw.contact_sheet = before
    assert shown == [f"frame {t}" for t in range(0, 100, 16)]
    with pytest.raises(Error, match="no frame came"):
        recording.Recorder(tmp_path, np.array([[0.0, 3, 4]]), (H, W), 12.0).write(iter([]))


def test_a_camera_is_read_by_pyav():
    """Where no camera is, libav's test picture stands in for it: the same way through PyAV."""
    made = camera.Camera("camera3", "testsrc=size=64x48:rate=10:duration=0.5", "lavfi")
    assert (made.size, made.fps, made.frames, str(made.path)) == ((48, 64), 10, None, "camera3")
    frames = list(made)
    made.close()
    assert len(frames) == 5 and all(f.shape == (3, 48, 64) and f.dtype == torch.uint8 for f in frames)
    assert not torch.equal(frames[0], frames[4])


@pytest.mark.skipif(sys.platform != "linux", reason="names the devices of Linux")
def test_no_camera_is_one_line(capsys):
    assert main(["track", "98"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("trackpl: no camera 98: No such file or directory; ") and said.count("\n") == 1
