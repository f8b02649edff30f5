import cv2
import numpy as np
import pytest
import torch
from kornia.filters import gaussian_blur2d

from trackpl.corners import corners, sample_queries


def texture(seed, size=(96, 128), sigma=2.0):
    noise = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(seed))
    smooth = gaussian_blur2d(noise, (17, 17), (sigma, sigma))
    return (0.5 + 0.2 * smooth / smooth.std()).clamp(0, 1)


def blob(x, y, size=(64, 80), sigma=3.0):
    """Draw a bright disc with soft edges whose middle is at raster pixel (x, y)."""
    rows, columns = torch.arange(size[0]) + 0.5, torch.arange(size[1]) + 0.5
    image = torch.exp(-((columns - x) ** 2 + (rows[:, None] - y) ** 2) / (2 * sigma**2))
    return image.expand(1, 3, -1, -1)


@pytest.mark.parametrize("place", [(40.0, 32.0), (30.3, 25.7), (51.5, 40.1)])
@pytest.mark.parametrize("sigma", [1.5, 3.0, 5.0])
def test_a_blob_is_where_it_is(place, sigma):
    for image in (blob(*place, sigma=sigma), 1 - blob(*place, sigma=sigma)):
        _, xy, contrast = corners(image)
        assert (xy[0] - torch.tensor(place)).norm() < 0.15 and contrast[0] > 0.05


def test_they_are_those_of_opencv():
    images = torch.cat([texture(i) for i in range(3)])
    which, xy, _ = corners(images)
    grey = (images * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1)
    for i in range(3):
        found = cv2.SIFT_create().detect((grey[i] * 255).round().byte().numpy())
        best = sorted(found, key=lambda k: -k.response)[:40]
        theirs = torch.tensor([k.pt for k in best]) + 0.25  # centres at whole numbers; 0.25 px off in OpenCV itself
        nearest = torch.cdist(theirs, xy[which == i]).amin(1)
        assert (nearest < 1).float().mean() > 0.85 and nearest.median() < 0.3


def test_neither_edges_nor_flat_nor_tiny_images_have_corners():
    edge = torch.zeros(1, 3, 64, 64)
    edge[..., 30:] = 1
    for image in (edge, edge.mT, torch.full((1, 3, 64, 64), 0.5), texture(0, (11, 40)), torch.rand(1, 3, 1, 1)):
        which, xy, contrast = corners(image)
        assert which.shape == contrast.shape == (0,) and xy.shape == (0, 2)


def test_each_image_has_its_own_and_the_strongest_come_first():
    a, b = texture(1), texture(2)
    which, xy, contrast = corners(torch.cat([a, b]))
    assert contrast.tolist() == sorted(contrast.tolist(), reverse=True) and len(contrast) > 20
    for i, image in enumerate((a, b)):
        assert torch.allclose(xy[which == i], corners(image)[1], atol=1e-4)
    bytes_of = (a * 255).round().byte()
    assert torch.allclose(corners(bytes_of)[1], corners(bytes_of.float() / 255)[1])


def test_queries_are_the_strongest_corners_of_the_first_quarter():
    video = torch.cat([texture(i, (64, 80)) for i in range(16)])
    best = [corners(video[t : t + 1])[1] for t in range(5)]
    frames = set()
    for seed in range(6):
        queries = sample_queries(video, 40, "corners", np.random.default_rng(seed))
        assert queries.shape == (40, 3) and queries.dtype == torch.float32
        times = queries[:, 0].long()
        frames |= set(times.tolist())
        for t in times.unique().tolist():
            count = int((times == t).sum())
            assert count % 5 == 0  # an eighth of the points each time that the frame is drawn
            assert torch.allclose(queries[times == t, 1:], best[t][:count], atol=1e-3)
        assert torch.equal(queries, sample_queries(video, 40, "corners", np.random.default_rng(seed)))
    assert frames == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("count", [1, 7, 13])
def test_any_number_of_queries(count):
    assert len(sample_queries(texture(1), count, "corners", np.random.default_rng(0))) == count
    flat = torch.full((4, 3, 32, 32), 0.5)
    assert sample_queries(flat, count, "corners", np.random.default_rng(0)).shape == (0, 3)


def test_uniform_queries_are_anywhere_and_any_time():
    t, x, y = sample_queries(torch.zeros(5, 3, 20, 30), 4000, "uniform", np.random.default_rng(0)).T
    assert (t.long().bincount() - 800).abs().max() < 120
    for values, limit in ((x, 30), (y, 20)):
        assert values.min() >= 0 and values.max() <= limit
        assert (torch.histc(values, 10, 0, limit) - 400).abs().max() < 100
