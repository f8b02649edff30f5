"""BADJA folders to shards, and back."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from trackpl_prep.badja import DATASET
from trackpl_prep.convert import convert

from trackpl.errors import DataError
from trackpl.samples import decode
from trackpl.shards import read_index, read_members

GOLDEN = Path(__file__).parents[1] / "golden" / "data_metrics" / "formats.npz"


@pytest.fixture
def source(tmp_path):
    with np.load(GOLDEN) as golden, tarfile.open(fileobj=io.BytesIO(golden["badja__tar"].tobytes())) as tar:
        tar.extractall(tmp_path, filter="data")
    return tmp_path / "BADJA"


def resized(images, mode):
    extra = {} if mode == "nearest" else {"align_corners": False}
    return torch.nn.functional.interpolate(images.float(), (48, 40), mode=mode, **extra)


def test_animals_equal_the_golden(source):
    index = convert(DATASET, source, source.parent / "out", quiet=True)
    assert index is not None
    samples = {s.key: read_members(s) for s in read_index(index).samples}
    golden = np.load(GOLDEN)
    assert list(samples) == ["bear", "camel"]  # rs_dog is one of the extra videos
    for name, members in samples.items():
        clip = decode(members)
        h, w = clip.size
        tracks = clip.tracks[0].numpy() * [40 / w, 48 / h]
        visible = clip.visible[0].numpy()
        assert np.array_equal(visible, golden[f"badja__{name}_visible"])
        np.testing.assert_allclose(tracks, golden[f"badja__{name}_tracks"], atol=1e-4)
        assert not tracks[~clip.valid[0].numpy()].any() and not (visible & ~clip.valid[0].numpy()).any()
        masks = resized(clip.labels[0][:, None], "nearest")[:, 0] > 0
        assert np.array_equal(masks, golden[f"badja__{name}_mask"])
        video = resized(clip.video[0], "bilinear").permute(0, 2, 3, 1)
        np.testing.assert_allclose(video, golden[f"badja__{name}_video"], atol=0.01)
        files = sorted((source / "DAVIS" / "JPEGImages" / "Full-Resolution" / name).iterdir())
        assert members["rgb.bin"] == b"".join(f.read_bytes() for f in files)


def test_mistakes_are_named(source, tmp_path):
    def fails(match, where=source):
        with pytest.raises(DataError, match=match):
            convert(DATASET, where, tmp_path / "o", quiet=True)

    fails(r"no annotations in .*; expected:\n +SOURCE/joint_annotations", source.parent)
    path = source / "joint_annotations" / "bear.json"
    entries = json.loads(path.read_text())

    def change(i, **changes):
        path.write_text(json.dumps([{**e, **changes} if k == i else e for k, e in enumerate(entries)]))

    change(1, joints=[[1, 2]])
    fails(r"bear\.json, frame \d+: joints of shape \(1, 2\)")
    change(1, joints="none")
    fails(r"bear\.json, frame \d+: no joints")
    change(1, image_path="DAVIS/JPEGImages/Full-Resolution/bear/00099.jpg")
    fails(r"00099.jpg', which is not in")
    change(0, image_path="../../etc/passwd")
    fails(r"names the frame '../../etc/passwd', not one of DAVIS")
    change(0, image_path="DAVIS/JPEGImages/Full-Resolution/wolf/00000.jpg")
    fails(r"sequence of bear.json is missing: no folder .*wolf")
    path.write_text("{}")
    fails(r"bear.json is no list of annotated frames")
