"""Folders of one's own videos, frames and csv files to shards, and back."""

from __future__ import annotations

import json
import os
import resource
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from trackpl_prep.convert import convert
from trackpl_prep.dataset import make_options
from trackpl_prep.files.point_tables import read_tables
from trackpl_prep.videos import DATASET, items

from trackpl.errors import DataError
from trackpl.samples import decode
from trackpl.shards import read_index, read_members
from trackpl.tracking import _save_csv
from trackpl.video import open_video
from trackpl.writing import write_video

H, W = 32, 64


def picture(i, size=(H, W)):
    y, x = np.mgrid[: size[0], : size[1]]
    return np.stack([(x * 5 + i * 3) % 256, (y * 7) % 256, np.full(size, (i * 11) % 256)], -1).astype(np.uint8)


def write_frames(folder, count, suffix="jpg", size=(H, W)):
    folder.mkdir(parents=True)
    for i in range(count):
        Image.fromarray(picture(i, size)).save(folder / f"{i}.{suffix}", **({"quality": 90} if suffix == "jpg" else {}))
    return folder


def write_clip(path, count, fps=20.0):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, (torch.from_numpy(picture(i)).permute(2, 0, 1) for i in range(count)), fps)
    return path


@pytest.fixture
def source(tmp_path):
    root = tmp_path / "mine"
    write_clip(root / "walk.mp4", 10)
    write_frames(root / "more" / "dog", 12)
    return root


def make(source, **options):
    out = source.parent / f"out-{len(list(source.parent.iterdir()))}"
    index = convert(DATASET, source, out, make_options(DATASET, **options), quiet=True)
    assert index is not None
    return {read["name"]: (m, read) for m, read in ((m, json.loads(m["meta.json"])) for m in members(index))}


def members(index):
    return [read_members(s) for s in read_index(index).samples]


def images(sample):
    offsets = np.frombuffer(sample["rgb.idx.npy"][-8 * (json.loads(sample["meta.json"])["T"] + 1) :], "<u8")
    return [sample["rgb.bin"][a:b] for a, b in pairwise(offsets)]


# Frames ------------------------------------------------------------------------------------------------------


def test_videos_and_folders_of_frames_at_any_depth(source):
    made = make(source, licence="mine")
    assert list(made) == ["more/dog", "walk"]
    dog, meta = made["more/dog"]
    assert images(dog) == [(source / "more" / "dog" / f"{i}.jpg").read_bytes() for i in range(12)]  # natural order
    assert meta["fps"] is None and meta["source"]["untouched"] and meta["licence"] == "mine"
    walk, meta = made["walk"]
    clip = decode(walk)
    assert clip.fps == 20.0 and clip.frames == 10 and clip.tracks is None
    truth = open_video(source / "walk.mp4").read(range(10))
    assert (clip.video[0].int() - truth.int()).abs().float().mean() < 2
    assert meta["source"]["video"] == "walk.mp4" and not meta["source"]["untouched"]


def test_lossless_keeps_the_decoded_pixels(source):
    walk, _ = make(source, lossless=True)["walk"]
    assert torch.equal(decode(walk).video[0], open_video(source / "walk.mp4").read(range(10)))


def test_png_frames_become_jpeg_unless_lossless(tmp_path):
    folder = write_frames(tmp_path / "src" / "a", 3, "png")
    jpeg, png = (make(tmp_path / "src", lossless=x)["a"][0] for x in (False, True))
    assert all(i[:2] == b"\xff\xd8" for i in images(jpeg))
    assert images(png) == [(folder / f"{i}.png").read_bytes() for i in range(3)]


def test_the_folder_itself_may_hold_the_frames(tmp_path):
    write_frames(tmp_path / "cat", 5)
    assert list(make(tmp_path / "cat")) == ["cat"]


def test_pictures_beside_videos_and_hidden_files_are_no_frames(source):
    Image.fromarray(picture(0)).save(source / "poster.jpg")
    (source / ".cache").mkdir()
    write_clip(source / ".cache" / "x.mp4", 4)
    os.symlink(source, source / "more" / "loop")
    assert list(make(source)) == ["more/dog", "walk"]


def test_segments_hold_every_frame_once(source):
    made = make(source, segment=5)
    assert [n for n in made if n.startswith("walk")] == ["walk/00000", "walk/00001"]
    dog = [m for n, (_, m) in made.items() if n.startswith("more/dog")]
    assert [m["T"] for m in dog] == [5, 5, 2]
    assert [n for m in dog for n in m["source"]["frame_numbers"]] == list(range(12))
    assert made["walk/00001"][1]["source"]["first_frame"] == 5
    last = decode(made["walk/00001"][0]).video[0, -1]
    truth = open_video(source / "walk.mp4").read([9])[0]
    assert (last.int() - truth.int()).abs().float().mean() < 2


@pytest.mark.parametrize(
    "options, numbers, fps",
    [
        ({"every": 3}, [0, 3, 6, 9], 20 / 3),
        ({"fps": 8.0}, [0, 2, 5, 7], 8.0),
        ({"fps": 99.0}, list(range(10)), 20.0),
    ],
)
def test_thinning_out(source, options, numbers, fps):
    _, meta = make(source, **options)["walk"]
    assert meta["source"]["frame_numbers"] == numbers and meta["fps"] == pytest.approx(fps)


def test_scaling_down_moves_tracks_along(source):
    (source / "walk.csv").write_text("point,frame,x,y,visible\n0,0,24,16,1\n")
    walk, meta = make(source, short_side=16)["walk"]
    clip = decode(walk)
    assert clip.size == (16, 32) and meta["source"]["original_size"] == [H, W]
    assert clip.tracks[0, 0, 0].tolist() == [12, 8]


def test_a_long_video_is_made_in_pieces(source, monkeypatch):
    from trackpl_prep import videos

    whole = make(source, segment=2)
    monkeypatch.setattr(videos, "PIECE", 4)
    monkeypatch.setattr(videos, "_SMALL", 0)
    assert len([i for i in items(source, make_options(DATASET, segment=2)) if i[1] == "walk"]) == 3
    assert make(source, segment=2) == whole


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the memory of a process from Linux's /proc")
def test_memory_does_not_grow_with_the_video(tmp_path):
    size, count = (240, 320), 320  # 74 MB of pixels
    frames = (torch.from_numpy(picture(i, size)).permute(2, 0, 1) for i in range(count))
    (tmp_path / "src").mkdir()
    write_video(tmp_path / "src" / "long.mp4", frames, 30.0)
    from trackpl_prep.videos import read

    options = make_options(DATASET, segment=32)
    stream = (s for item in items(tmp_path / "src", options) for s in read(tmp_path / "src", item, options))
    for _ in range(3):
        next(stream)
    before, later = resident(), [resident() for _ in stream]
    assert len(later) == 7 and max(later) - before < 25e6


# Tracks ------------------------------------------------------------------------------------------------------


def random_tracks(count, points=3):
    rng = np.random.default_rng(0)
    xy = rng.uniform(0, [W, H], (count, points, 2)).astype(np.float32)
    return xy, rng.random((count, points)) < 0.7


def test_what_track_writes_comes_back(source):
    xy, visible = random_tracks(10)
    _save_csv(source / "walk.csv", xy, visible)
    clip = decode(make(source)["walk"][0])
    np.testing.assert_allclose(clip.tracks[0], xy, atol=1e-4)
    assert np.array_equal(clip.visible[0], visible) and clip.valid.all()


def test_tracks_from_the_folder_that_track_writes_to(source):
    for video, count in (("walk", 10), ("dog", 12)):
        _save_csv(source.parent / "tracks" / video / "tracks.csv", *random_tracks(count))
    made = make(source, tracks=str(source.parent / "tracks"), segment=6)
    clips = [decode(made[f"more/dog/{i:05d}"][0]) for i in range(2)]
    xy, visible = random_tracks(12)
    np.testing.assert_allclose(torch.cat([c.tracks[0] for c in clips]), xy, atol=1e-4)
    assert np.array_equal(torch.cat([c.visible[0] for c in clips]), visible)
    assert decode(made["walk/00000"][0]).tracks.shape[2] == 3


def test_tapvid_rows_are_parts_of_the_frame(source):
    xy, visible = random_tracks(10)
    part = xy / [W, H]
    lines = [
        ",".join(["walk", *(f"{v:.6f}" if k < 2 else str(int(v)) for row in track for k, v in enumerate(row))])
        for track in np.concatenate([part, ~visible[..., None]], -1).transpose(1, 0, 2)
    ]
    (source / "tracks.csv").write_text("\n".join(lines))
    made = make(source)
    clip = decode(made["walk"][0])
    np.testing.assert_allclose(clip.tracks[0], xy, atol=1e-3)
    assert np.array_equal(clip.visible[0], visible) and clip.valid.all()
    assert decode(made["more/dog"][0]).tracks is None


def test_one_csv_for_all_with_gaps_and_names(source):
    (source / "tracks.csv").write_text(
        "x,y,frame,point,video\n10,11,7,nose,walk.mp4\n12,13,2,tail,more/dog\n14,15,1,ear,dog\n"
    )
    with pytest.raises(DataError, match=r"names more/dog in more than one way: more/dog, dog"):
        make(source)
    (source / "tracks.csv").write_text(
        "x,y,frame,point,video\n10,11,7,nose,walk.mp4\n12,13,2,tail,more/dog\n14,15,1,ear,more/dog\n"
    )
    made = make(source, every=1)
    walk, dog = (decode(made[n][0]) for n in ("walk", "more/dog"))
    assert made["more/dog"][1]["source"]["points"] == ["tail", "ear"]
    assert walk.valid.sum() == 1 and walk.tracks[0, 7, 0].tolist() == [10, 11] and walk.visible[0, 7, 0]
    assert dog.valid[0].nonzero().tolist() == [[1, 1], [2, 0]]


def test_a_segment_without_observations_has_no_points(source):
    (source / "walk.csv").write_text("point,frame,x,y\n5,8,1,2\n3,9,1,2\n")
    made = make(source, segment=5)
    first, second = (decode(made[f"walk/0000{i}"][0]) for i in range(2))
    assert first.tracks.shape == (1, 5, 0, 2) and second.valid[0].nonzero().tolist() == [[3, 1], [4, 0]]


def test_tracks_that_are_thinned_out_go_with_their_frames(source):
    (source / "walk.csv").write_text("point,frame,x,y\n" + "".join(f"0,{t},{t},{t}\n" for t in range(10)))
    clip = decode(make(source, every=4)["walk"][0])
    assert clip.tracks[0, :, 0, 0].tolist() == [0, 4, 8]


def test_other_tracks_make_another_set(source):
    out = source.parent / "out"
    (source / "walk.csv").write_text("point,frame,x,y\n0,0,1,2\n")
    index = convert(DATASET, source, out, workers=2, quiet=True)
    assert convert(DATASET, source, out, quiet=True) == index
    (source / "walk.csv").write_text("point,frame,x,y\n0,0,1,3\n")
    with pytest.raises(DataError, match="is another set"):
        convert(DATASET, source, out, quiet=True)


BAD = [
    ("point,frame,x,y\n0,0,1,2\n0,1,abc,2\n", r"line 3, column x: 'abc'; allowed: pixels"),
    ("point,frame,x,y\n0,0,1,nan\n", r"line 2, column y: 'nan'; allowed: pixels"),
    ("point,frame,x,y\n0,0,1,1e9\n", r"line 2, column y: '1e9'"),
    ("point,frame,x,y\n0,0,1," + "9" * 60 + "\n", r"line 2, column y: '9999"),
    ("point,frame,x,y\n0,1.5,1,1\n", r"line 2, column frame: '1.5'; allowed: a whole number"),
    ("point,frame,x,y\n0,-1,1,1\n", r"line 2, column frame: '-1'"),
    ("point,frame,x,y\n0,0,1,1\n\n0,10,1,1\n", r"line 4, column frame: frame 10: walk.mp4 has 0 to 9"),
    ("point,frame,x,y,visible\n0,0,1,1,maybe\n", r"line 2, column visible: 'maybe'; allowed: 0 or 1"),
    ("point,frame,x,y\n0,0,1\n", r"line 2 has 3 values; allowed: 4, point,frame,x,y"),
    ("point,frame,x,y\n0,0,1,1\n0,0,1,2\n", r"line 3: point 0 in frame 0 is there twice"),
    ("point,frame,x,y,visble\n0,0,1,1,1\n", r"line 1: the column 'visble' is unknown; did you mean 'visible'"),
    ("point,frame,x,x\n0,0,1,1\n", r"line 1: the column 'x' is there twice"),
    ("point,frame,x\n0,0,1\n", r"line 1: the column y is missing"),
    ("point,frame,x,y\n", r"has a header and no tracks"),
    ("", r"is empty"),
    ("walk,0.1,0.2\n", r"line 1 has 3 values; allowed: a header with point,frame,x,y, or the video"),
    ("walk,0.1,0.2,0\nwalk,0.1,0.2,0,0.1,0.2,0\n", r"line 2 has 2 frames, the lines of 'walk' before it 1"),
    ("walk,120,60,0\n", r"line 1, column x: '120'; allowed: parts of the frame, 0..1"),
    ("walk,0.1,0.2,hidden\n", r"line 1, column occluded: 'hidden'; allowed: 0 or 1"),
    ("walk" + ",0.1,0.2,0" * 11 + "\n", r"line 1, tracks of frame 10: walk.mp4 has 0 to 9"),
    ("fox,0.1,0.2,0\n", r"has tracks of 'fox', not of walk"),
]


@pytest.mark.parametrize("text, message", BAD)
def test_bad_lines_are_named(source, text, message):
    (source / "walk.csv").write_text(text)
    with pytest.raises(DataError, match=rf"walk.csv,? {message}"):
        make(source)


def test_a_csv_that_is_none_is_named(source):
    for data in (b"\xff\xfe\x00p", b"point,frame,x,y\n" + b'"' + b"a" * 200_000, b"\x00,\x00"):
        (source / "walk.csv").write_bytes(data)
        with pytest.raises(DataError, match=r"walk\.csv"):
            make(source)


def test_videos_of_a_csv_that_are_not_there_are_named(source):
    shared = source / "tracks.csv"
    shared.write_text("video,point,frame,x,y\nwalc,0,0,1,1\n")
    with pytest.raises(DataError, match=r"tracks.csv has tracks of 'walc', which is not there; did you mean 'walk'"):
        make(source)
    shared.write_text("point,frame,x,y\n0,0,1,1\n")
    with pytest.raises(DataError, match=r"does not say of which of the 2 videos .* add a column 'video'"):
        make(source)
    write_frames(source / "less" / "dog", 2)
    shared.write_text("video,point,frame,x,y\ndog,0,0,1,1\n")
    with pytest.raises(DataError, match="'dog', which may be less/dog or more/dog"):
        make(source)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.one_of(
        st.text(max_size=200),
        st.lists(st.text('0123456789.,-einfa\n" \0', max_size=12), max_size=20).map(
            lambda x: "point,frame,x,y\n" + "".join(x)
        ),
    )
)
def test_any_text_gives_tables_or_a_clear_error(tmp_path, text):
    path = tmp_path / f"{abs(hash(text))}.csv"
    path.write_text(text, encoding="utf-8", errors="replace", newline="")
    try:
        for table in read_tables(path).values():
            assert np.isfinite(table.xy).all() and (table.frame >= 0).all() and len(table.point) == len(table.line)
    except DataError as error:
        assert path.name in str(error)


# Mistakes ----------------------------------------------------------------------------------------------------


def test_broken_videos_name_themselves_and_may_be_left_out(source):
    path = source / "walk.mp4"
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(DataError, match=r"walk\.mp4 is cut off"):
        make(source)
    index = convert(DATASET, source, source.parent / "o", max_broken=1, quiet=True)
    assert index is not None and "walk.mp4 is cut off" in read_index(index).meta["broken"][0]
    path.write_text("not a video")
    with pytest.raises(DataError, match=r"walk\.mp4 is a text file"):
        make(source)


def test_bad_frames_are_named(source):
    Image.fromarray(picture(0, (16, 16))).save(source / "more" / "dog" / "5.jpg")
    with pytest.raises(DataError, match=r"different sizes in .*dog: 0.jpg is 64x32, 5.jpg is 16x16"):
        make(source)
    frame = source / "more" / "dog" / "5.jpg"
    frame.write_bytes((source / "more" / "dog" / "4.jpg").read_bytes()[:-300])
    with pytest.raises(DataError, match=r"5\.jpg is no whole image"):
        make(source)


def test_too_few_frames(tmp_path):
    write_frames(tmp_path / "src" / "one", 1)
    with pytest.raises(DataError, match="one has 1 frames, of which 1 are kept; a clip needs 2"):
        make(tmp_path / "src")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"segment": 1}, "--segment 1: allowed"),
        ({"short_side": 4}, "--short-side 4: allowed"),
        ({"quality": 0}, "must be 1 to 100, got 0"),
        ({"every": 0}, "--every 0: allowed"),
        ({"fps": 0.0}, "--fps 0.0: allowed"),
        ({"fps": 5.0, "every": 2}, "give one of them"),
        ({"tracks": "nowhere.csv"}, "--tracks nowhere.csv does not exist"),
    ],
)
def test_options_out_of_range(source, options, message):
    with pytest.raises(DataError, match=message):
        make(source, **options)


def test_a_folder_without_videos(tmp_path):
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "notes.txt").write_text("hello")
    with pytest.raises(DataError, match=r"no videos and no folders of frames in .*; expected:\n +SOURCE/a.mp4"):
        make(tmp_path / "src")
    with pytest.raises(DataError, match=r"notes.txt is a file: give the folder that holds it"):
        make(tmp_path / "src" / "notes.txt")
