import re
import struct
import wave
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from trackpl import video
from trackpl.errors import VideoError
from trackpl.video import open_video
from trackpl.writing import write_video

SHARED = Path(__file__).parents[2] / "shared" / "videos"


def pictures(n, h, w):
    """Moving ramps, no two frames alike."""
    y, x = np.mgrid[:h, :w]
    return [
        np.stack([(2 * x + 5 * i) % 256, (2 * y + 7 * i) % 256, (x + y + 11 * i) % 256], -1).astype(np.uint8)
        for i in range(n)
    ]


def encode(path, frames, pix_fmt="yuv420p", faststart=True, **options):
    with av.open(str(path), "w", options={"movflags": "+faststart"} if faststart else {}) as out:
        stream = out.add_stream("libx264", rate=Fraction(25), options=options)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pix_fmt
        for frame in frames:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(stream.encode(None))
    return path


def patched(source, target, box, offset, content):
    data = bytearray(source.read_bytes())
    at = data.find(box) + offset
    data[at : at + len(content)] = content
    target.write_bytes(data)
    return target


def rotated(source, target, cos, sin):
    """Write the display matrix of a phone held upright into the track header."""
    one = 1 << 16
    matrix = struct.pack(">9i", cos * one, sin * one, 0, -sin * one, cos * one, 0, 0, 0, 1 << 30)
    return patched(source, target, b"tkhd", 44, matrix)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    frames = pictures(40, 48, 64)
    b_frames = encode(folder / "b_frames.mp4", frames, g="15", bf="3")
    made = {
        "b_frames": b_frames,
        "intra": encode(folder / "intra.mp4", frames, g="1", bf="0"),
        "mkv": encode(folder / "b_frames.mkv", frames, g="15", bf="3"),
        "ten_bit": encode(folder / "ten_bit.mp4", frames, "yuv420p10le", g="15"),
        "odd": encode(folder / "odd.mp4", pictures(5, 47, 63), "yuv444p"),
        "header_last": encode(folder / "header_last.mp4", frames, faststart=False),
        "upright": rotated(b_frames, folder / "upright.mp4", 0, 1),
        "upside_down": rotated(b_frames, folder / "upside_down.mp4", -1, 0),
    }
    # A trim as a phone's gallery does it: the edit list starts five frames later, the frames stay in the file.
    data = b_frames.read_bytes()
    at = data.find(b"elst") + 4
    _, _, length, start, _ = struct.unpack(">IIIii", data[at : at + 20])
    trim = struct.pack(">Ii", length - length * 5 // 40, start + 5 * 512)
    made["trimmed"] = patched(b_frames, folder / "trimmed.mp4", b"elst", 12, trim)
    return made


def plain_decode(path):
    with av.open(str(path)) as container:
        frames = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)


NAMES = ["b_frames", "intra", "mkv", "ten_bit", "odd", "upright", "upside_down", "trimmed"]


@pytest.mark.parametrize("name", NAMES)
def test_back_ends_give_identical_frames_in_any_order(clips, name):
    default, pyav = open_video(clips[name]), open_video(clips[name], "pyav")
    assert len(default) == default.frames == pyav.frames
    assert default.size == pyav.size and default.fps == pyav.fps == 25
    everything = default.read(range(default.frames))
    assert everything.dtype == torch.uint8 and everything.shape == (default.frames, 3, *default.size)
    assert torch.equal(everything, pyav.read(range(pyav.frames)))
    order = [4, 0, 3, 3, default.frames - 1, default.frames // 2, 1]
    for reader in (default, pyav, open_video(clips[name]), open_video(clips[name], "pyav")):
        assert torch.equal(reader.read(order), everything[order])
        assert torch.equal(reader.read([2]), everything[[2]])


@pytest.mark.parametrize("name", ["b_frames", "intra", "mkv", "odd"])
def test_decord_reads_ordinary_files_where_it_is_installed(clips, name):
    pytest.importorskip("decord", reason="decord has no wheel here")
    reader = open_video(clips[name], "decord")
    assert type(reader) is type(open_video(clips[name])) is not type(open_video(clips[name], "pyav"))
    assert torch.equal(reader.read(range(len(reader))), plain_decode(clips[name]))


@pytest.mark.parametrize("name", ["trimmed", "upright", "upside_down", "ten_bit"])
def test_decord_by_name_refuses_what_it_gets_wrong(clips, name):
    pytest.importorskip("decord", reason="decord has no wheel here")
    with pytest.raises(VideoError, match=r"does not read .* faithfully"):
        open_video(clips[name], "decord")


def test_a_width_that_decord_cannot_give_is_read_all_the_same(tmp_path):
    path = write_video(tmp_path / "a.mp4", [torch.full((3, 32, 48), 40 * i, dtype=torch.uint8) for i in range(4)], 10)
    levels = open_video(path).read([0, 3]).float().mean((1, 2, 3))
    assert (levels - torch.tensor([0.0, 120.0])).abs().max() < 3


def test_without_decord_pyav_reads(clips, monkeypatch):
    monkeypatch.setattr(video, "_decord", lambda: None)
    reader = open_video(clips["intra"])
    assert torch.equal(reader.read(range(40)), plain_decode(clips["intra"]))
    with pytest.raises(VideoError, match="pip install decord2"):
        open_video(clips["intra"], "decord")


def test_both_decords_at_once_are_refused(clips, monkeypatch):
    pytest.importorskip("decord", reason="decord has no wheel here")

    class Found:
        def __init__(self, name):
            self.name = name

    monkeypatch.setattr(video.importlib.metadata, "distributions", lambda name: [Found(name)])
    with pytest.raises(VideoError, match="decord and decord2 are both installed"):
        open_video(clips["intra"])


def test_rotation_is_applied(clips):
    lying = plain_decode(clips["b_frames"])
    upright = open_video(clips["upright"])
    assert upright.size == (64, 48)
    assert torch.equal(upright.read(range(40)), lying.rot90(-1, (2, 3)))
    assert torch.equal(open_video(clips["upside_down"]).read(range(40)), lying.rot90(2, (2, 3)))


def test_trimmed_frames_are_not_counted(clips):
    reader = open_video(clips["trimmed"])
    whole = plain_decode(clips["b_frames"]).float()
    assert reader.frames == 35
    assert (reader.read([0])[0].float() - whole[5]).abs().mean() < 1


@pytest.mark.parametrize("path", sorted(SHARED.glob("*.mp4")) or [None], ids=lambda p: p.stem if p else "none")
def test_back_ends_agree_on_real_videos(path):
    if path is None:
        pytest.skip("no real videos beside the repository")
    a, b = open_video(path), open_video(path, "pyav")
    some = [0, 1, a.frames // 2, a.frames - 1]
    assert a.frames == b.frames and torch.equal(a.read(some), b.read(some))


@pytest.mark.parametrize("backend", ["auto", "pyav"])
@pytest.mark.parametrize("direction", [1, -1])
def test_stepping_through_a_video_decodes_each_frame_about_once(clips, backend, direction):
    reader = open_video(clips["b_frames"], backend)
    everything = reader.read(range(40))
    decoded = []
    inner = reader._read
    reader._read = lambda wanted: decoded.extend(wanted) or inner(wanted)
    for t in range(40)[::direction]:
        used = sorted({t - direction * k for k in (0, 1, 2, 4, 8)} & set(range(40)))
        assert torch.equal(reader.read(used), everything[used])
    assert len(decoded) == 40


@pytest.mark.parametrize("backend", ["auto", "pyav"])
def test_long_reads_in_any_order(clips, backend):
    everything = plain_decode(clips["b_frames"])
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0)).remainder(40)
    images = open_video(clips["b_frames"], backend).read(order.tolist())
    assert images.is_contiguous() and torch.equal(images, everything[order])


def test_memory_of_decoded_frames_is_bounded(clips, monkeypatch):
    monkeypatch.setattr(video, "RECENT_BYTES", 3 * 48 * 64 * 3)
    reader = open_video(clips["b_frames"])
    for t in range(40):
        reader.read([t])
    assert len(reader._recent) == 3


def test_reads_of_nothing_and_outside(clips):
    reader = open_video(clips["b_frames"])
    assert reader.read([]).shape == (0, 3, 48, 64)
    for index in (-1, 40):
        with pytest.raises(VideoError, match=f"frame {index} is outside .* allowed 0 to 39"):
            reader.read([index])


# Bad files


def refusal(path, **options):
    with pytest.raises(VideoError) as caught:
        open_video(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_text_named_mp4(tmp_path):
    (tmp_path / "a.mp4").write_text("I am not a video\n" * 40)
    assert "is a text file, not a video" in refusal(tmp_path / "a.mp4")


def test_rubbish_and_nothing_named_mp4(tmp_path):
    (tmp_path / "a.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    assert "cannot be read as a video" in refusal(tmp_path / "a.mp4")
    (tmp_path / "b.mp4").write_bytes(b"")
    assert "is empty (0 bytes)" in refusal(tmp_path / "b.mp4")


@pytest.mark.parametrize("name", ["b_frames", "mkv"])
@pytest.mark.parametrize("kept", [0.5, 0.8, 0.999])
def test_cut_off_says_how_many_frames_are_left(clips, tmp_path, name, kept, capfd):
    data = clips[name].read_bytes()
    path = tmp_path / clips[name].name
    path.write_bytes(data[: int(len(data) * kept)])
    message = refusal(path)
    left = int(re.search(r"is cut off: (\d+) frames can be read", message)[1])
    assert 40 * (kept - 0.35) < left <= 40 and left < 40 * kept + 8
    assert "get the whole file" in message
    assert capfd.readouterr().err == ""


def test_cut_off_before_its_header(clips, tmp_path):
    data = clips["header_last"].read_bytes()
    (tmp_path / "a.mp4").write_bytes(data[: len(data) // 2])
    assert "is cut off: its header (moov) is missing" in refusal(tmp_path / "a.mp4")


def test_broken_in_the_middle_names_the_frame(clips, tmp_path):
    data = bytearray(clips["intra"].read_bytes())
    middle = len(data) * 2 // 3
    data[middle : middle + 400] = b"\xff" * 400
    (tmp_path / "a.mp4").write_bytes(data)
    for backend in ("auto", "pyav"):
        with pytest.raises(VideoError, match=r"fram.* broken"):
            open_video(tmp_path / "a.mp4", backend).read(range(40))


def test_sound_without_picture(tmp_path):
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(bytes(8000))
    assert "has no video in it, only audio" in refusal(tmp_path / "a.wav")


def test_missing_paths_name_the_closest(clips, tmp_path):
    path = clips["intra"]
    assert f"did you mean '{path}'?" in refusal(path.with_name("intr.mp4"))
    assert "there is no folder" in refusal(tmp_path / "no" / "a.mp4")
    assert "give a video file" in refusal(tmp_path / "a.mp4")
    assert "addresses are not read" in refusal("https://example.org/a.mp4")


def test_unknown_back_end(clips):
    assert "allowed: auto, decord, pyav" in refusal(clips["intra"], backend="opencv")


# Folders


def test_folder_is_read_in_natural_order(tmp_path):
    frames = pictures(12, 20, 30)
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / f"frame{i}.png")
    (tmp_path / "notes.txt").write_text("not a frame")
    (tmp_path / ".hidden.png").write_text("not a frame")
    reader = open_video(tmp_path)
    assert reader.frames == 12 and reader.size == (20, 30) and reader.fps == video.FOLDER_FPS
    expected = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)
    assert torch.equal(reader.read([11, 2, 0]), expected[[11, 2, 0]])


def test_folder_turns_photos_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pictures(1, 20, 30)[0]).save(tmp_path / "a.jpg", exif=exif)
    reader = open_video(tmp_path)
    assert reader.size == (30, 20) and reader.read([0]).shape == (1, 3, 30, 20)


def test_bad_folders(tmp_path):
    assert "it is empty" in refusal(tmp_path)
    (tmp_path / "a.txt").write_text("")
    assert "none of its 1 entries is a picture; allowed: .jpg" in refusal(tmp_path)
    Image.new("RGB", (30, 20)).save(tmp_path / "1.png")
    Image.new("RGB", (31, 20)).save(tmp_path / "2.png")
    assert "1.png is 30x20, 2.png is 31x20" in refusal(tmp_path)
    (tmp_path / "2.png").write_text("not a picture")
    assert "2.png is not a readable picture" in refusal(tmp_path)


# Writing


def test_written_video_has_its_frames_size_rate_and_colours(tmp_path):
    colours = torch.tensor([[200, 40, 60], [30, 180, 90], [20, 60, 220]], dtype=torch.uint8)
    frames = colours[:, :, None, None].expand(3, 3, 48, 64)
    path = write_video(tmp_path / "new" / "a.mp4", iter(frames), 30000 / 1001)
    reader = open_video(path)
    assert reader.frames == 3 and reader.size == (48, 64) and reader.fps == pytest.approx(30000 / 1001)
    assert (reader.read(range(3)).float() - frames.float()).abs().max() <= 4
    with av.open(str(path)) as container:
        assert container.streams.video[0].pix_fmt == "yuv420p"
    data = path.read_bytes()
    assert data.find(b"moov") < data.find(b"mdat")
    assert [p.name for p in path.parent.iterdir()] == ["a.mp4"]


def test_odd_sizes_are_padded_with_their_border(tmp_path):
    frame = torch.full((3, 47, 63), 90, dtype=torch.uint8)
    reader = open_video(write_video(tmp_path / "a.mp4", [frame], 10))
    assert reader.size == (48, 64)
    assert (reader.read([0]).float() - 90).abs().max() <= 3


def test_mpeg4_where_x264_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(video.av, "codecs_available", {"mpeg4"})
    frames = torch.full((4, 3, 48, 64), 120, dtype=torch.uint8)
    path = write_video(tmp_path / "a.mp4", frames, 29.97)
    with av.open(str(path)) as container:
        assert container.streams.video[0].codec_context.name == "mpeg4"
    assert (open_video(path).read(range(4)).float() - 120).abs().max() <= 4


def test_a_failed_write_leaves_the_old_file(tmp_path):
    (tmp_path / "a.mp4").write_text("old")

    def broken():
        yield torch.zeros(3, 16, 16, dtype=torch.uint8)
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        write_video(tmp_path / "a.mp4", broken(), 10)
    uneven = [torch.zeros(3, 16, 16, dtype=torch.uint8), torch.zeros(3, 16, 18, dtype=torch.uint8)]
    with pytest.raises(VideoError, match=r"must all be uint8 \(3, 16, 16\)"):
        write_video(tmp_path / "a.mp4", uneven, 10)
    with pytest.raises(VideoError, match="no frames"):
        write_video(tmp_path / "a.mp4", [], 10)
    with pytest.raises(VideoError, match="positive"):
        write_video(tmp_path / "a.mp4", uneven, float("nan"))
    assert (tmp_path / "a.mp4").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1
