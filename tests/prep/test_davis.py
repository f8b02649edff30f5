"""DAVIS-2017 folders to shards, and back."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from trackpl_prep.convert import convert
from trackpl_prep.dataset import make_options
from trackpl_prep.davis import DATASET

from trackpl.errors import DataError
from trackpl.samples import decode
from trackpl.shards import read_index, read_members

GOLDEN = Path(__file__).parents[1] / "golden" / "data_metrics" / "formats.npz"


@pytest.fixture
def source(tmp_path):
    with np.load(GOLDEN) as golden, tarfile.open(fileobj=io.BytesIO(golden["davis2017__tar"].tobytes())) as tar:
        tar.extractall(tmp_path, filter="data")
    return tmp_path / "DAVIS"


def make(source, **options):
    index = convert(DATASET, source, source.parent / "out", make_options(DATASET, **options), quiet=True)
    assert index is not None
    return {s.key: read_members(s) for s in read_index(index).samples}


def test_the_val_split_equals_the_golden(source):
    made = make(source)
    golden = np.load(GOLDEN)
    assert list(made) == ["camel", "dog-x"]
    for key, members in made.items():
        clip = decode(members)
        assert clip.name == (key,) and clip.fps == 24.0
        assert np.array_equal(clip.labels[0], golden[f"davis2017__{key}_labels"])
        assert np.array_equal(clip.video[0].permute(0, 2, 3, 1), golden[f"davis2017__{key}_frames"])
        frames = sorted((source / "JPEGImages" / "480p" / key).iterdir())
        assert members["rgb.bin"] == b"".join(f.read_bytes() for f in frames)


def test_void_and_frames_without_a_mask_are_255(source):
    masks = source / "Annotations" / "480p" / "camel"
    labels = np.array(Image.open(masks / "00001.png"))
    labels[:2] = 255
    image = Image.fromarray(labels)
    image.putpalette(bytes(range(256)) * 3)
    image.save(masks / "00001.png")
    (masks / "00002.png").unlink()
    clip = decode(make(source)["camel"])
    assert np.array_equal(clip.labels[0, 1], labels) and (clip.labels[0, 2] == 255).all()


def test_another_split_and_resolution(source):
    for part in ("JPEGImages", "Annotations"):
        (source / part / "480p").rename(source / part / "Full-Resolution")
    assert list(make(source, split="train", resolution="Full-Resolution")) == ["train-only"]


def test_mistakes_are_named(source, tmp_path):
    def fails(match, where=source, **options):
        with pytest.raises(DataError, match=match):
            convert(DATASET, where, tmp_path / "o", make_options(DATASET, **options), quiet=True)

    fails(r"no folder .*ImageSets/2017; expected:\n +SOURCE/JPEGImages", source.parent)
    fails("no vla.txt in .*; did you mean 'val'", split="vla")
    fails("no resolution '1080p'", resolution="1080p")
    fails("sequence camel is missing: no folder .*Full-Resolution/camel", resolution="Full-Resolution")
    masks = source / "Annotations" / "480p" / "camel"
    (masks / "00000.png").unlink()
    fails("first frame has no mask: .*00000.png is missing")
    lists = source / "ImageSets" / "2017" / "val.txt"
    lists.write_text("../../secret\n")
    fails("names '../../secret', which is no name of a sequence")
    lists.write_text("\n")
    fails("val.txt lists no sequences")
