"""Label propagation by residual transitions: the golden, what must hold of it, and a real mask followed."""

from pathlib import Path

import numpy as np
import pytest
import torch
from trackpl_crw.method import MultiscaleCRW
from trackpl_crw.propagation import (
    PUBLISHED,
    Propagation,
    attend,
    embedded_size,
    hypercolumn,
    label_stride,
    node_places,
)

import trackpl
from trackpl.errors import Error
from trackpl.propagation import one_hot
from trackpl.testing import moving_clip

GOLDEN = Path(__file__).parent / "golden" / "crw"


@pytest.fixture(scope="module")
def golden():
    return {k: torch.from_numpy(v) for k, v in np.load(GOLDEN / "labelprop_flow.npz").items()}


def test_hypercolumns_equal_the_golden(golden):
    assert (hypercolumn(golden["emb4"], golden["emb3"]) - golden["hyper"]).abs().max() < 1e-5


@pytest.mark.parametrize("given", ["golden", "own"])
def test_labels_equal_the_golden(golden, given):
    """Each frame from the golden's labels of the frames before, and from those that were propagated here."""
    labels = [golden["label0"].permute(2, 0, 1)[None]]
    hyper, context = golden["hyper"][:, None], 2
    for t in range(1, 4):
        before = list(range(max(1, t - context), t))
        sources = [0, *before]
        flows = torch.stack([golden[f"flow_{t}_{s}"] for s in sources])
        copies = [2 if t <= context else 1] + [1] * len(before)
        source_labels = torch.cat([labels[s] for s in sources])
        found = attend(hyper[t], torch.cat([hyper[s] for s in sources]), flows, source_labels, 2, 0.07, 5, copies)
        truth = golden[f"label_{t}"].permute(2, 0, 1)[None]
        assert (found - truth).abs().max() < 2e-4
        labels.append(truth if given == "golden" else found)


def test_a_source_named_twice_takes_two_places(golden):
    hyper, label = golden["hyper"], golden["label0"].permute(2, 0, 1)[None]
    flow = golden["flow_1_0"][None]
    args = (flow.expand(2, -1, -1, -1), label.expand(2, -1, -1, -1), 2, 0.07, 5)
    listed = attend(hyper[1:2], hyper[:1].expand(2, -1, -1, -1), *args)
    counted = attend(hyper[1:2], hyper[:1], flow, label, 2, 0.07, 5, [2])
    once = attend(hyper[1:2], hyper[:1], flow, label, 2, 0.07, 5)
    assert torch.allclose(listed, counted, atol=1e-6)
    assert not torch.allclose(once, counted, atol=1e-3)


def test_nodes_of_three_levels_have_the_strides_of_the_paper():
    three, five, one = methods = MultiscaleCRW(levels=3), MultiscaleCRW(), MultiscaleCRW(levels=1)
    assert [label_stride(m) for m in methods] == [4, 4, 4]
    for method in methods:
        method.propagation = PUBLISHED["jhmdb"]
    assert [label_stride(m) for m in methods] == [8, 8, 4]
    assert three.label_size((480, 854)) == (60, 106)
    assert five.label_size((320, 320)) == three.label_size((320, 320)) == (40, 40)
    assert one.label_size((64, 64)) == (16, 16)
    assert embedded_size((1080, 1920), 480, 16) == (480, 848) and embedded_size((33, 150), None, 64) == (128, 128)
    assert embedded_size((256, 256), 384, 16) == (384, 384) and embedded_size((40, 400), 384, 16) == (80, 768)
    y, x = node_places((64, 128), 8)
    assert torch.allclose(y * 64, torch.arange(8) * 8 + 0.5) and torch.allclose(x * 128, torch.arange(16) * 8 + 0.5)


def test_shipped_weights_follow_a_disc_and_the_finest_flow_leaves_it_less_behind():
    method = trackpl.load("crw_multiscale")
    clip = moving_clip(8, (128, 160))
    place = torch.stack(torch.meshgrid(torch.arange(128), torch.arange(160), indexing="ij"))
    moved = [place - torch.tensor([60 + t, 70 + 2 * t]).view(2, 1, 1) for t in range(8)]
    truth = torch.stack([p.square().sum(0) < 28**2 for p in moved])
    maps, ids = one_hot(truth[:1].long() * 3)
    assert ids == [0, 3]
    worst = {}
    for flow in ("finest", "incoming"):
        method.propagation = Propagation(3, 20, 0.15, None, "paper", flow)
        found = method.propagate(clip, maps).argmax(2)[0].bool()
        assert torch.equal(found[0], truth[0])
        overlap = (found & truth).sum((1, 2)) / (found | truth).sum((1, 2))
        worst[flow] = float(overlap.min())
    # Left where it was, the disc would end at an overlap of 0.65; a node is 8 px, the disc 56.
    assert float((truth[0] & truth[7]).sum() / (truth[0] | truth[7]).sum()) < 0.66
    assert worst["finest"] > 0.88 and worst["incoming"] > 0.82 and worst["finest"] > worst["incoming"], worst


def test_the_context_is_frame_zero_and_the_last_frames():
    method = MultiscaleCRW(levels=3).eval()
    clip, labels = moving_clip(4, (64, 64)), torch.rand(1, 2, 8, 8)

    def last(order, context):
        method.propagation = Propagation(context=context, resolution=None)
        return method.propagate(trackpl.Clip(video=clip.video[:, order]), labels)

    assert torch.equal(last([0, 1], 1)[:, 0], labels)
    assert torch.allclose(last([0, 1, 3], 0)[:, -1], last([0, 3], 0)[:, -1], atol=1e-6)  # frame 0 alone
    far, near = last([0, 1, 2, 3], 1), last([0, 1, 2, 3], 2)
    assert torch.allclose(far[:, 1], near[:, 1], atol=1e-6) and not torch.allclose(far[:, 3], near[:, 3], atol=1e-4)


def test_a_small_object_is_kept_by_the_finest_nodes():
    """A disc of 16 px: two nodes of stride 8."""
    method = trackpl.load("crw_multiscale")
    clip = moving_clip(4, (96, 96))
    place = torch.stack(torch.meshgrid(torch.arange(96), torch.arange(96), indexing="ij"))
    moved = [place - torch.tensor([40 + t, 40 + 2 * t]).view(2, 1, 1) for t in range(4)]
    truth = torch.stack([p.square().sum(0) < 8**2 for p in moved])
    worst = {}
    for name, settings in (("paper", PUBLISHED["davis"]), ("default", Propagation())):
        method.propagation = settings
        found = method.propagate(clip, one_hot(truth[:1].long())[0]).argmax(2)[0].bool()
        worst[name] = float(((found & truth).sum((1, 2)) / (found | truth).sum((1, 2))).min())
    assert worst["default"] > 0.8 and worst["default"] > worst["paper"] + 0.1, worst


def test_settings_are_given_by_name_or_by_field():
    assert Propagation.of(None) == Propagation() and Propagation.of("davis") is PUBLISHED["davis"]
    assert Propagation.of({"tau": 0.05, "resolution": None}) == Propagation(tau=0.05, resolution=None)
    assert (PUBLISHED["davis"].context, PUBLISHED["jhmdb"].context) == (20, 7)


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ("davies", "did you mean 'davis'"),
        ({"top_k": 3}, "did you mean 'topk'"),
        ({"topk": 0}, "at least 1"),
        ({"context": True}, "whole number"),
        ({"tau": "hot"}, "above 0"),
        ({"tau": float("nan")}, "above 0"),
        ({"nodes": 4}, "finest, paper"),
        ({"resolution": 8}, "at least 16"),
    ],
)
def test_settings_that_are_none_are_refused(given, word):
    with pytest.raises(Error, match=word):
        Propagation.of(given)
