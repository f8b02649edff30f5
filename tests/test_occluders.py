"""Boxes and colours by frame: their law, and what they do to pixels and points, against loops over boxes."""

import math

import pytest
import torch
from kornia.color import rgb_to_grayscale
from kornia.enhance import adjust_hue

from trackpl.occluders import covered, draw_boxes, draw_jitter, erase, jitter, replace


def boxes_of(seed, frames=6, size=(60, 80), probability=1.0, most=4, sides=(2, 40)):
    return draw_boxes(torch.Generator().manual_seed(seed), frames, size, probability, most, sides)


def images(frames=6, size=(60, 80)):
    return torch.rand(frames, 3, *size, generator=torch.Generator().manual_seed(1))


def within(share, expected, n):
    """Whether a share of n draws lies within five standard deviations of its probability."""
    return abs(share - expected) < 5 * math.sqrt(expected * (1 - expected) / n)


def test_boxes_follow_their_law():
    frames, most = 20000, 10
    boxes = boxes_of(0, frames, (512, 512), 0.5, most, (2, 99))
    side = boxes[..., 2:] - boxes[..., :2]
    there = side[..., 0] > 0
    assert torch.equal(there, (side > 0).all(-1)) and not there[0].any()
    assert (boxes >= 0).all() and (boxes <= 512).all() and int(side.max()) == 99
    count = there.sum(1)
    on = count[1:] > 0
    assert within(float(on.float().mean()), 0.5, frames)
    for k in range(1, most + 1):
        assert within(float((count[1:][on] == k).float().mean()), 1 / most, int(on.sum()))
    uncut = there & (boxes[..., :2] > 0).all(-1) & (boxes[..., 2:] < 512).all(-1)
    middle = (boxes[..., :2] + boxes[..., 2:])[uncut] / 2
    inner = (middle > 100).all(1) & (middle < 412).all(1)  # where no box is cut
    for axis in range(2):
        wide = side[uncut][inner][:, axis]
        assert int(wide.min()) == 2 and int(wide.max()) == 99
        assert within(float((wide <= 50).float().mean()), 49 / 98, len(wide))
        assert within(float((middle[inner][:, axis] < 256).float().mean()), 0.5, len(wide))
    both = (side[uncut][inner] <= 50).all(1)
    assert within(float(both.float().mean()), (49 / 98) ** 2, len(both))  # width and height by themselves


def test_without_probability_there_are_no_boxes():
    assert not boxes_of(0, probability=0.0).any()
    assert torch.equal(erase(images(), boxes_of(0, probability=0.0)), images())


@pytest.mark.parametrize("seed", range(4))
def test_erased_boxes_have_their_mean_colour_one_after_the_other(seed):
    boxes, ours, expected = boxes_of(seed), images(), images()
    for frame, four in zip(expected, boxes.tolist(), strict=True):
        for left, top, right, bottom in four:
            if right > left:
                part = frame[:, top:bottom, left:right]
                part[:] = part.mean((1, 2), keepdim=True)
    assert torch.allclose(erase(ours, boxes), expected, atol=1e-5)
    assert torch.equal(ours, images())


def test_erased_boxes_may_be_larger_than_the_frame():
    boxes = boxes_of(0, size=(20, 30), sides=(80, 99))
    out = erase(images(size=(20, 30)), boxes)
    whole = (boxes[:, 0] == torch.tensor([0, 0, 30, 20])).all(1)
    assert whole.any() and out[whole].std((2, 3)).max() < 1e-6


@pytest.mark.parametrize("seed", range(4))
def test_replaced_boxes_show_another_place(seed):
    g, boxes, same = torch.Generator().manual_seed(seed), boxes_of(seed), images()
    source, corner = torch.randint(0, 6, (6, 4), generator=g), torch.rand(6, 4, 2, generator=g)
    neutral = torch.tensor([1.0, 1.0, 1.0, 0.0]).expand(6, 4), torch.arange(4).expand(6, 4)
    expected = same.clone()
    for f in range(6):
        for k, (left, top, right, bottom) in enumerate(boxes[f].tolist()):
            w, h = right - left, bottom - top
            if w > 0:
                x, y = int(corner[f, k, 0] * (80 - w + 1)), int(corner[f, k, 1] * (60 - h + 1))
                expected[f, :, top:bottom, left:right] = same[source[f, k], :, y : y + h, x : x + w]
    assert torch.allclose(replace(same, boxes, source, corner, []), expected)
    assert torch.allclose(replace(same, boxes, source, corner, [neutral, neutral]), expected, atol=1e-5)


def test_what_fills_a_box_has_the_colours_of_its_changed_frame():
    boxes = torch.zeros(3, 1, 4, dtype=torch.long)
    boxes[1, 0] = torch.tensor([0, 0, 80, 60])  # the whole frame, so that parts have the mean of the whole
    source, corner = torch.full((3, 1), 2), torch.zeros(3, 1, 2)
    dim = images(3) * 0.5 + 0.2  # nothing is cut off at 0 or 1
    factors, order = draw_jitter(torch.Generator().manual_seed(5), 3, (0.2, 0.2, 0.2, 0.0))
    out = replace(dim, boxes, source, corner, [(factors, order)] * 2)
    expected = jitter(jitter(dim, factors, order), factors, order)[2]
    assert (out[1] - expected).abs().max() < 1e-4 and torch.equal(out[[0, 2]], dim[[0, 2]])


def test_covered_points_are_those_on_painted_pixels():
    boxes = boxes_of(3)
    black = torch.zeros(6, 3, 60, 80)
    white = torch.ones(1, 3, 60, 80)
    everything = torch.cat([black, white])
    padded = torch.cat([boxes, torch.zeros(1, 4, 4, dtype=torch.long)])
    painted = replace(everything, padded, torch.full((7, 4), 6), torch.zeros(7, 4, 2), [])[:6, 0] > 0
    y, x = torch.meshgrid(torch.arange(60), torch.arange(80), indexing="ij")
    centres = torch.stack([x, y], -1).flatten(0, 1).expand(6, -1, -1) + 0.5
    assert painted.any() and torch.equal(covered(boxes, centres), painted.flatten(1))


def test_colours_change_by_their_own_factors_in_their_own_order():
    factors, order = draw_jitter(torch.Generator().manual_seed(0), 6, (0.2, 0.3, 0.4, 0.1))
    out = jitter(images(), factors, order)
    for i, image in enumerate(images()):
        for kind in order[i].tolist():
            factor = factors[i, kind]
            if kind == 0:
                image = image * factor
            elif kind == 1:
                mean = rgb_to_grayscale(image[None]).mean()
                image = mean + factor * (image - mean)
            elif kind == 2:
                grey = rgb_to_grayscale(image[None])[0]
                image = grey + factor * (image - grey)
            else:
                image = adjust_hue(image[None], factor[None] * 2 * math.pi)[0]
            image = image.clamp(0, 1)
        assert (out[i] - image).abs().max() < 1e-5


def test_colour_factors_and_orders_follow_their_law():
    n = 20000
    factors, order = draw_jitter(torch.Generator().manual_seed(0), n, (0.2, 0.2, 0.2, 0.08))
    for kind, (middle, reach) in enumerate(((1, 0.2), (1, 0.2), (1, 0.2), (0, 0.08))):
        value = (factors[:, kind] - middle) / reach
        assert value.abs().max() <= 1.0001
        for edge, share in ((-0.5, 0.25), (0, 0.5), (0.5, 0.75)):
            assert within(float((value < edge).float().mean()), share, n)
        for place in range(4):
            assert within(float((order[:, place] == kind).float().mean()), 0.25, n)
    assert torch.equal(order.sort(1).values, torch.arange(4).expand(n, 4))
    assert len(order.unique(dim=0)) == 24
