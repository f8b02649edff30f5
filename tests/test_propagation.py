"""Labels through a video: maps, joints, the classic routine against its goldens, the adapters."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import Tiny

from trackpl.affinity import follow_features
from trackpl.errors import DataError, Error
from trackpl.method import Method
from trackpl.propagation import joint_maps, one_hot, pixel_places, read_joints, resample
from trackpl.types import Clip, Tracks

GOLDEN = Path(__file__).parent / "golden" / "crw"
OPTIONS = {
    "labelprop_seg": {"context": 3, "radius": 5, "tau": 0.07, "topk": 5},
    "labelprop_pose": {"context": 2, "radius": 4, "tau": 0.05, "topk": 10},
}


def _golden(name):
    return {k: torch.from_numpy(v) for k, v in np.load(GOLDEN / f"{name}.npz").items()}


@pytest.mark.parametrize("name", OPTIONS)
def test_the_classic_routine_equals_its_goldens(name):
    golden = _golden(name)
    found = list(follow_features(golden["feats"], golden["label0"].permute(2, 0, 1), **OPTIONS[name]))
    assert (torch.stack(found).permute(0, 2, 3, 1) - golden["pred"]).abs().max() < 2e-5


def test_joints_are_drawn_and_read_as_in_the_golden():
    golden = _golden("labelprop_pose")
    assert (read_joints(golden["pred"].permute(0, 3, 1, 2)[:, 1:]).mT - golden["coords"]).abs().max() < 1e-4
    start = golden["coords"][0].T.round()
    assert (joint_maps(start[None], (14, 14))[0].permute(1, 2, 0) - golden["label0"]).abs().max() < 1e-5


def test_joints_outside_are_not_there():
    maps = joint_maps(torch.tensor([[[2.4, 3.0], [-1.0, -1.0], [20.0, 1.0]]]), (6, 8))
    assert maps.shape == (1, 4, 6, 8) and maps[0, 1, 3, 2] == 1
    assert not maps[0, 2:].any() and maps[0, 0].sum() == 48 - 16
    assert read_joints(maps[:, 1:])[0, 1:].eq(-1).all()


def test_one_hot_takes_void_for_background():
    ids = torch.tensor([[[0, 2, 255], [7, 2, 0]]])
    maps, channels = one_hot(ids)
    assert channels == [0, 2, 7] and maps.shape == (1, 3, 2, 3)
    assert maps[0, 0].tolist() == [[1, 0, 1], [0, 0, 1]] and torch.equal(maps.sum(1), torch.ones(1, 2, 3))
    assert one_hot(torch.tensor([[[0, 255]]]))[1] == [0, 255]  # black and white


def test_resampling_is_linear_and_exact_on_a_ramp():
    ramp = torch.arange(12.0).view(1, 1, 1, 12) + torch.arange(6.0).view(1, 1, 6, 1)
    own = pixel_places(ramp)
    assert resample(ramp, own, own) is ramp
    y, x = torch.tensor([0.5, 1.25, 1.5, 2.25]) / 6, torch.tensor([0.5, 1.25, 2.0, 2.75]) / 12
    assert torch.allclose(resample(ramp, own, (y, x))[0, 0, 1], torch.tensor([0.75, 1.5, 2.25, 3.0]), atol=1e-5)
    half = torch.zeros(1, 1, 3, 6)
    coarse = resample(ramp, own, pixel_places(half))
    assert torch.allclose(coarse[0, 0, 1, 1:5], torch.tensor([5.0, 7.0, 9.0, 11.0]), atol=1e-5)
    assert resample(torch.ones(1, 2, 5, 7), pixel_places(torch.ones(5, 7)), own).sub(1).abs().max() < 1e-6


class OfFlow(Method):
    """Everything moves by (2, 1) pixels a frame, which only flow knows."""

    info = Tiny.info

    def flow(self, clip, pairs):
        steps = torch.tensor([float(t - s) for s, t in pairs]).view(1, -1, 1, 1, 1)
        xy = steps * torch.tensor([2.0, 1.0]).view(2, 1, 1)
        return Tiny.flow(Tiny(), clip, pairs).__class__(xy.expand(len(clip.video), -1, 2, *clip.size), tuple(pairs))


class OfTracks(Method):
    """The same, known only to tracks."""

    info = Tiny.info

    def track(self, clip, queries):
        t = torch.arange(clip.frames)[None, :, None, None]
        xy = queries[:, None, :, 1:] + (t - queries[:, None, :, :1]) * torch.tensor([2.0, 1.0])
        return Tracks(xy, torch.ones(xy.shape[:-1]))


def _square(t, size=(48, 64)):
    ids = torch.zeros(1, *size, dtype=torch.long)
    ids[:, 10 + t : 30 + t, 8 + 2 * t : 28 + 2 * t] = 4
    return ids


@pytest.mark.parametrize(("method", "least"), [(OfFlow(), 0.999), (OfTracks(), 0.8)])
def test_a_method_without_a_way_of_its_own_follows_a_square(method, least):
    assert not method.has("propagate")
    maps, ids = one_hot(_square(0))
    video = torch.zeros(1, 12, 3, 48, 64, dtype=torch.uint8)
    found = method.propagate(Clip(video=video), maps)
    assert found.shape == (1, 12, 2, 48, 64) and torch.equal(found[:, 0], maps)
    for t in range(12):
        got, truth = torch.tensor(ids)[found[:, t].argmax(1)] == 4, _square(t) == 4
        assert (got & truth).sum() / (got | truth).sum() > least, t


def test_long_videos_keep_no_more_than_a_few_frames():
    """The adapter by flow never asks for a frame that lies further back than its longest step."""
    asked = []

    class Noting(OfFlow):
        def flow(self, clip, pairs):
            asked.append(clip.frames)
            return super().flow(clip, pairs)

    frames = (torch.zeros(1, 3, 8, 8) for _ in range(40))
    assert sum(1 for _ in Noting().propagate_frames(frames, torch.ones(1, 1, 8, 8))) == 40
    assert max(asked) == 4  # the frame itself and three others


def test_wrong_labels_are_refused():
    clip, method = Clip(video=torch.zeros(1, 2, 3, 16, 16)), OfFlow()
    for labels, word in (
        (torch.zeros(1, 16, 16), "B, K, h, w"),
        (torch.zeros(1, 2, 4, 4, dtype=torch.long), "one_hot"),
        (torch.zeros(2, 2, 4, 4), "frames of these labels"),
    ):
        with pytest.raises(DataError, match=word):
            method.propagate(clip, labels)
    with pytest.raises(Error, match="neither flow nor tracks"):
        Method().propagate(clip, torch.zeros(1, 1, 4, 4))
    with pytest.raises(DataError, match="one size"):
        list(method.propagate_frames([torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 9)], torch.ones(1, 1, 8, 8)))
