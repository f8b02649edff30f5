"""YouTube-VOS folders to shards, and back."""

from __future__ import annotations

import io
import json
import tarfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from trackpl_prep.convert import convert
from trackpl_prep.dataset import make_options
from trackpl_prep.files.frames import segments
from trackpl_prep.youtube_vos import DATASET

from trackpl.errors import DataError
from trackpl.samples import decode
from trackpl.shards import read_index, read_members

GOLDEN = Path(__file__).parents[1] / "golden" / "data_metrics" / "formats.npz"


@pytest.fixture
def source(tmp_path):
    with np.load(GOLDEN) as golden, tarfile.open(fileobj=io.BytesIO(golden["youtube_vos__tar"].tobytes())) as tar:
        tar.extractall(tmp_path, filter="data")
    return tmp_path / "ytvos"


def make(source, **options):
    out = source.parent / f"out-{'-'.join(map(str, options.values()))}"
    index = convert(DATASET, source, out, make_options(DATASET, **options), quiet=True)
    assert index is not None
    return {s.key: read_members(s) for s in read_index(index).samples}


def meta(members):
    return json.loads(members["meta.json"])


def images(members):
    offsets = np.frombuffer(members["rgb.idx.npy"][-8 * (meta(members)["T"] + 1) :], "<u8")
    return [members["rgb.bin"][a:b] for a, b in pairwise(offsets)]


def test_the_train_split_equals_the_golden(source):
    made = make(source, split="train")
    assert sorted(made) == ["00aa1b2c3d-000", "ff00ee11dd-000"]
    golden = np.load(GOLDEN)
    for key, members in made.items():
        video, clip = key[:-4], decode(members)
        numbers = golden[f"youtube_vos__{video}_frame_numbers"].tolist()
        assert clip.name == (video,) and clip.fps == 6.0
        assert meta(members)["source"]["frame_numbers"] == numbers
        for i, number in enumerate(numbers):
            assert np.array_equal(clip.labels[0, i], golden[f"youtube_vos__{video}_{number:05d}_labels"])
            file = source / "train" / "JPEGImages" / video / f"{number:05d}.jpg"
            assert images(members)[i] == file.read_bytes()
            assert np.array_equal(clip.video[0, i].permute(1, 2, 0), np.asarray(Image.open(file)))
        objects = meta(members)["source"]["objects"]
        assert objects["2"] == {
            "category": "hat",
            "first_frame": int(golden[f"youtube_vos__{video}_object2_first_frame"]),
        }


def test_all_frames_have_masks_on_every_fifth(source):
    golden = np.load(GOLDEN)
    for key, members in make(source, split="train_all_frames").items():
        video, clip = key[:-4], decode(members)
        assert clip.frames == int(golden[f"youtube_vos__{video}_num_all_frames"]) and clip.fps == 30.0
        for i in range(clip.frames):
            labels = clip.labels[0, i].numpy()
            if i % 5 == 0 and i <= 15:
                assert np.array_equal(labels, golden[f"youtube_vos__{video}_{i:05d}_labels"])
            else:
                assert (labels == 255).all()


def test_long_videos_become_segments_without_overlap(source):
    made = make(source, split="train_all_frames", segment=6)
    clips = [meta(made[f"00aa1b2c3d-{i:03d}"]) for i in range(3)]
    assert [c["T"] for c in clips] == [6, 6, 5]
    assert [n for c in clips for n in c["source"]["frame_numbers"]] == list(range(17))
    assert [c["source"]["first_frame"] for c in clips] == [0, 6, 12]
    assert [(c["source"]["segment"], c["source"]["segments"]) for c in clips] == [(0, 3), (1, 3), (2, 3)]
    assert len({c["name"] for c in clips}) == 3
    assert decode(made["00aa1b2c3d-001"]).labels[0, 4].max() < 255  # frame 10


@pytest.mark.parametrize("count, length, expected", [(64, 64, [64]), (65, 64, [65]), (66, 64, [64, 2]), (9, 0, [9])])
def test_no_segment_has_a_single_frame(count, length, expected):
    cuts = segments(count, length)
    assert [b - a for a, b in cuts] == expected and cuts[0][0] == 0 and cuts[-1][1] == count


def test_scaling_down_is_optional_and_recorded(source):
    members = make(source, split="train", short_side=16)["00aa1b2c3d-000"]
    clip = decode(members)
    assert clip.size == (16, 29) and meta(members)["source"]["original_size"] == [20, 36]
    assert clip.labels.shape[-2:] == (16, 29) and set(clip.labels.unique().tolist()) <= {0, 1, 2}


def test_later_masks_of_the_valid_split_say_nothing_of_other_objects(source):
    (source / "train").rename(source / "valid")
    clip = decode(make(source, split="valid")["ff00ee11dd-000"])
    golden = np.load(GOLDEN)
    first, later = (golden[f"youtube_vos__ff00ee11dd_{n:05d}_labels"] for n in (0, 10))
    assert np.array_equal(clip.labels[0, 0], first) and (first == 0).any()
    assert np.array_equal(clip.labels[0, 2], np.where(later == 0, 255, later))


def test_grey_and_cmyk_frames_decode_untouched(source):
    folder = source / "train" / "JPEGImages" / "00aa1b2c3d"
    Image.open(folder / "00000.jpg").convert("L").save(folder / "00000.jpg")
    Image.open(folder / "00005.jpg").convert("CMYK").save(folder / "00005.jpg")
    members = make(source, split="train")["00aa1b2c3d-000"]
    clip = decode(members)
    assert images(members)[:2] == [(folder / n).read_bytes() for n in ("00000.jpg", "00005.jpg")]
    assert (clip.video[0, 0].float().std(0) == 0).all()
    expected = np.asarray(Image.open(folder / "00005.jpg").convert("RGB"))
    assert np.array_equal(clip.video[0, 1].permute(1, 2, 0), expected)


def test_turned_frames_are_stored_upright(source):
    folder = source / "train" / "JPEGImages" / "00aa1b2c3d"
    exif = Image.Exif()
    exif[0x0112] = 6
    for file in folder.iterdir():
        image = Image.open(file)
        image.load()
        image.transpose(Image.Transpose.ROTATE_90).save(file, exif=exif, quality=95, subsampling=0)
    members = make(source, split="train")["00aa1b2c3d-000"]
    assert decode(members).size == (20, 36)
    assert not any(b"Exif" in image for image in images(members))


def test_a_wrong_folder_says_what_was_expected(source, tmp_path):
    with pytest.raises(DataError, match=r"no folder .*JPEGImages; expected:\n +SOURCE/train/JPEGImages"):
        convert(DATASET, source / "train", tmp_path / "o", quiet=True)
    with pytest.raises(DataError, match=r"no split 'vald'; did you mean 'valid'"):
        convert(DATASET, source, tmp_path / "o", make_options(DATASET, split="vald"), quiet=True)
    with pytest.raises(DataError, match=r"--segment 1: allowed"):
        convert(DATASET, source, tmp_path / "o", make_options(DATASET, segment=1), quiet=True)


def remove(path):
    for file in sorted(path.rglob("*"), reverse=True):
        file.unlink() if file.is_file() else file.rmdir()
    path.rmdir()


def test_missing_videos_frames_and_masks_are_named(source, tmp_path):
    masks = source / "train" / "Annotations" / "ff00ee11dd"
    remove(masks)
    with pytest.raises(DataError, match=r"no masks in .*ff00ee11dd"):
        convert(DATASET, source, tmp_path / "o", quiet=True)
    video = source / "train" / "JPEGImages" / "ff00ee11dd"
    for file in video.iterdir():
        file.unlink()
    with pytest.raises(DataError, match=r"no .jpg frames in .*ff00ee11dd"):
        convert(DATASET, source, tmp_path / "o", quiet=True)
    video.rmdir()
    with pytest.raises(DataError, match=r"meta.json lists 1 videos that JPEGImages does not have.* ff00ee11dd"):
        convert(DATASET, source, tmp_path / "o", quiet=True)


def cut(path):
    path.write_bytes(path.read_bytes()[:200])


def other_size(path):
    Image.open(path).resize((30, 20)).save(path)


def colours(path):
    Image.open(path).convert("RGB").save(path)


def postscript(path):
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")


@pytest.mark.parametrize(
    "file, damage, message",
    [
        ("JPEGImages/00aa1b2c3d/00010.jpg", cut, "00010.jpg is (no whole image|not a readable picture)"),
        ("JPEGImages/00aa1b2c3d/00010.jpg", postscript, "00010.jpg is not a readable picture"),
        ("JPEGImages/00aa1b2c3d/00010.jpg", other_size, "different sizes: .*00000.jpg is 36x20, 00010.jpg is 30x20"),
        ("Annotations/00aa1b2c3d/00010.png", cut, "mask .*00010.png is not a readable picture"),
        ("Annotations/00aa1b2c3d/00010.png", other_size, "mask .*00010.png is 30x20, its frame 36x20"),
        ("Annotations/00aa1b2c3d/00010.png", colours, "00010.png has RGB pixels; a palette"),
        ("meta.json", cut, "meta.json"),
        ("meta.json", lambda p: p.write_text("[1]"), 'meta.json is no meta.json of YouTube-VOS: it holds no {"videos"'),
        (
            "meta.json",
            lambda p: p.write_text('{"videos": {"00aa1b2c3d": {"objects": [1]}}}'),
            "objects of the video 00aa1b2c3d",
        ),
    ],
)
def test_broken_files_are_named(source, tmp_path, file, damage, message):
    damage(source / "train" / file)
    with pytest.raises(DataError, match=message):
        convert(DATASET, source, tmp_path / "o", quiet=True)


def test_the_same_folder_gives_the_same_bytes(source, tmp_path):
    a, b = (convert(DATASET, source, tmp_path / n, per_shard=1, quiet=True) for n in "ab")
    assert a is not None and b is not None and a.read_bytes() == b.read_bytes()
    assert len(list(a.parent.glob("*.tar"))) == 2
