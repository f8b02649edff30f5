import pytest
import torch
from PIL import Image

from trackpl.draw import (
    contact_sheet,
    disc_radius,
    draw_frame,
    draw_frames,
    draw_tracks,
    flow_to_rgb,
    save_png,
    side_by_side,
    start_colours,
)
from trackpl.errors import DataError

GREY = 100
RED = torch.tensor([[255, 0, 0]], dtype=torch.uint8)


def blank(t=1, h=60, w=80):
    return torch.full((t, 3, h, w), GREY, dtype=torch.uint8)


def touched(before, after):
    return (before != after).any(-3)


def test_visible_is_a_disc_and_hidden_a_ring():
    frame, xy = blank()[0], torch.tensor([[[40.5, 30.5]]])
    disc = draw_frame(frame, xy, torch.tensor([[True]]), RED, radius=6)
    ring = draw_frame(frame, xy, torch.tensor([[False]]), RED, radius=6)
    assert disc[:, 30, 40].tolist() == [255, 0, 0]
    assert ring[:, 30, 40].tolist() == [GREY] * 3
    assert ring[0, 30, 45] > 200 and ring[1, 30, 45] < 60
    for image in (disc, ring):
        y, x = touched(frame, image).nonzero().float().add(0.5).unbind(-1)
        distance = torch.hypot(y - 30.5, x - 40.5)
        assert 5 < distance.max() < 7.5
        assert y.mean() == pytest.approx(30.5, abs=0.1) and x.mean() == pytest.approx(40.5, abs=0.1)


@pytest.mark.parametrize("x", [10.0, 10.25, 10.5, 10.9])
def test_places_are_continuous_pixels(x):
    frame = blank()[0]
    image = draw_frame(frame, torch.tensor([[[x, 2 * x]]]), torch.tensor([[True]]), RED, radius=4)
    weight = (image.float() - GREY).abs().sum(0)
    rows, columns = torch.arange(60) + 0.5, torch.arange(80) + 0.5
    assert (weight.sum(0) * columns).sum() / weight.sum() == pytest.approx(x, abs=0.18)  # half of a third of a pixel
    assert (weight.sum(1) * rows).sum() / weight.sum() == pytest.approx(2 * x, abs=0.18)  # half of a third of a pixel


def test_edges_are_smooth():
    image = draw_frame(blank()[0], torch.tensor([[[40.0, 30.0]]]), torch.tensor([[False]]), RED, radius=6)
    assert len(image[1].unique()) > 5


def test_input_is_left_as_it_is():
    video, xy = blank(4), torch.rand(4, 7, 2) * 60
    visible = torch.rand(4, 7) > 0.5
    copies = video.clone(), xy.clone(), visible.clone()
    drawn = draw_tracks(video, xy, visible)
    assert all(torch.equal(a, b) for a, b in zip((video, xy, visible), copies, strict=True))
    assert drawn.shape == video.shape and drawn.dtype == torch.uint8


def test_points_outside_and_unknown_draw_nothing():
    nan = float("nan")
    xy = torch.tensor([[-30.0, 10.0], [500.0, 20.0], [1e30, 1e30], [nan, 5.0], [float("inf"), 3.0], [20.0, -1e9]])
    video = blank(3)
    for visible in (torch.ones(3, 6, dtype=torch.bool), torch.zeros(3, 6, dtype=torch.bool)):
        assert torch.equal(draw_tracks(video, xy.expand(3, 6, 2), visible), video)


def test_tail_follows_the_path_and_ends():
    xy = torch.stack([torch.linspace(10, 70, 13), torch.full((13,), 30.0)], -1)[:, None]
    visible = torch.ones(13, 1, dtype=torch.bool)
    long = touched(blank(13), draw_tracks(blank(13), xy, visible, tail=4))[-1]
    none = touched(blank(13), draw_tracks(blank(13), xy, visible, tail=0))[-1]
    columns = long.any(0).nonzero()[:, 0]
    assert 47 <= columns.min() <= 50  # four steps of five pixels behind 70
    assert none.any(0).nonzero().min() > 65
    assert (long.any(1).nonzero()[:, 0] - 29.5).abs().max() <= 3


def test_tail_fades():
    xy = torch.stack([torch.linspace(10, 70, 13), torch.full((13,), 30.0)], -1)[:, None]
    image = draw_frame(blank()[0], xy, torch.ones(13, 1, dtype=torch.bool), RED, radius=3)
    strength = image[0, 30].float() - GREY
    assert 0 < strength[15] < strength[35] < strength[55]


def test_no_tail_where_hidden():
    xy = torch.stack([torch.linspace(10, 70, 13), torch.full((13,), 30.0)], -1)[:, None]
    visible = torch.zeros(13, 1, dtype=torch.bool)
    visible[-1] = True
    image = draw_frame(blank()[0], xy, visible, RED, radius=3)
    assert touched(blank()[0], image).any(0).nonzero().min() > 65


def test_seen_points_lie_on_hidden_ones():
    colours = torch.tensor([[0, 255, 0], [255, 0, 0]], dtype=torch.uint8)
    for order in ([0, 1], [1, 0]):
        visible = torch.tensor([[True, False]])[:, order]
        image = draw_frame(blank()[0], torch.full((1, 2, 2), 30.5), visible, colours[order], radius=5)
        assert image[:, 30, 30].tolist() == [0, 255, 0]


def test_frame_by_frame_equals_at_once_and_reads_lazily():
    video, xy, visible = blank(6), torch.rand(6, 5, 2) * 60, torch.rand(6, 5) > 0.3
    pulled = []
    frames = (pulled.append(t) or video[t] for t in range(6))
    drawn = draw_frames(frames, xy, visible)
    first = next(drawn)
    assert pulled == [0]
    assert torch.equal(torch.stack([first, *drawn]), draw_tracks(video, xy, visible))


def test_colours_differ_by_start_and_can_be_given():
    y, x = torch.meshgrid(torch.linspace(0, 90, 8), torch.linspace(0, 160, 8), indexing="ij")
    colours = start_colours(torch.stack([x, y], -1).reshape(-1, 2))
    assert colours.dtype == torch.uint8 and len(colours.unique(dim=0)) == 64
    spread = colours.int().amax(-1) - colours.int().amin(-1)
    assert spread.min() > 60  # none is grey
    nan = float("nan")
    assert start_colours(torch.tensor([[nan, nan]])).tolist() == [[128] * 3]
    assert start_colours(torch.zeros(0, 2)).shape == (0, 3)
    xy, seen = torch.full((1, 1, 2), 30.5), torch.ones(1, 1, dtype=torch.bool)
    assert draw_tracks(blank(), xy, seen, colours=RED)[0, :, 30, 30].tolist() == [255, 0, 0]


def test_discs_suit_the_frame_and_leave_gaps():
    y, x = torch.meshgrid(torch.arange(20.0), torch.arange(20.0), indexing="ij")
    unit = torch.stack([x, y], -1).reshape(-1, 2)
    assert disc_radius((480, 854), 40 * unit) == pytest.approx(480 / 110)
    assert disc_radius((1080, 1920), 40 * unit) == pytest.approx(1080 / 110)
    assert 2 * disc_radius((480, 854), 9 * unit + 300) < 0.7 * 9
    assert disc_radius((480, 854), torch.full((1, 2), 5.0)) == pytest.approx(480 / 110)
    assert disc_radius((48, 64), torch.full((30, 2), float("nan"))) >= 1


def test_no_points_draw_nothing():
    assert torch.equal(draw_tracks(blank(2), torch.zeros(2, 0, 2), torch.zeros(2, 0, dtype=torch.bool)), blank(2))


def test_shapes_that_do_not_belong_together():
    with pytest.raises(DataError, match="tracks of 3 frames"):
        draw_tracks(blank(3), torch.zeros(2, 5, 2), torch.zeros(2, 5, dtype=torch.bool))
    with pytest.raises(DataError, match="uint8"):
        draw_tracks(blank(3).float(), torch.zeros(3, 5, 2), torch.zeros(3, 5, dtype=torch.bool))
    with pytest.raises(DataError, match="tail"):
        draw_tracks(blank(3), torch.zeros(3, 5, 2), torch.zeros(3, 5, dtype=torch.bool), tail=-1)


def test_flow_colours():
    flow = torch.zeros(2, 4, 5)
    flow[0, 0, 0], flow[1, 0, 1], flow[0, 0, 2], flow[:, 0, 3] = 10, 10, 5, float("nan")
    image = flow_to_rgb(flow)
    assert image.shape == (3, 4, 5) and image.dtype == torch.uint8
    assert image[:, 3, 3].tolist() == [255] * 3  # no motion: white
    assert image[:, 0, 3].tolist() == [0] * 3  # unknown: black
    assert image[0, 0, 0] == 255 and image[2, 0, 0] < 60  # right: red
    assert image[0, 0, 1] > 200 and image[1, 0, 1] > 200 and image[2, 0, 1] < 30  # down: yellow
    assert image[2, 0, 2] == pytest.approx(128, abs=30)  # half as fast: paler


def test_flow_colours_compare_at_a_given_length():
    flow = torch.randn(3, 2, 6, 7)
    batch = flow_to_rgb(flow, 4.0)
    assert batch.shape == (3, 3, 6, 7)
    assert torch.equal(batch[1], flow_to_rgb(flow[1], 4.0))
    assert torch.equal(flow_to_rgb(2 * flow, 8.0), batch)
    assert torch.equal(flow_to_rgb(flow)[2], flow_to_rgb(flow[2]))
    assert flow_to_rgb(torch.zeros(2, 3, 3)).min() == 255


def test_contact_sheet_reads_like_a_text():
    frames = torch.stack([torch.full((3, 20, 30), 10 * (i + 1), dtype=torch.uint8) for i in range(5)])
    sheet = contact_sheet(frames, columns=2)
    assert sheet.shape == (3, 3 * 24 + 4, 2 * 34 + 4)
    centres = [[int(sheet[0, 14 + 24 * r, 19 + 34 * c]) for c in range(2)] for r in range(3)]
    assert centres == [[10, 20], [30, 40], [50, 255]]
    assert sheet[:, 0].min() == 255 and sheet[:, :, 0].min() == 255


def test_contact_sheet_is_no_wider_than_asked():
    frames = torch.zeros(12, 3, 480, 854, dtype=torch.uint8)
    sheet = contact_sheet(frames, titles=[f"frame {t}" for t in range(12)])
    assert 1700 < sheet.shape[-1] <= 1920
    assert contact_sheet(frames[:1], width=300).shape[-1] <= 300
    with pytest.raises(DataError, match="T >= 1"):
        contact_sheet(frames[:0])


def test_side_by_side():
    wide, high = blank(1, 30, 60)[0], blank(1, 60, 40)[0]
    sheet = side_by_side([wide, high], ["a title too long for this picture", "b"])
    assert sheet.shape[-1] == 120 + 40 + 18 and sheet.shape[-2] > 60
    assert sheet[:, -40, 60].tolist() == [GREY] * 3
    assert sheet[:, :12].min() < 128  # words stand above
    with pytest.raises(DataError, match="2 images, 1 titles"):
        side_by_side([wide, high], ["one"])


def test_png_round_trip_and_failure(tmp_path):
    image = torch.randint(0, 256, (3, 7, 9), dtype=torch.uint8)
    path = save_png(image, tmp_path / "new" / "a.png")
    with Image.open(path) as back:
        assert list(back.get_flattened_data()) == [tuple(p) for p in image.permute(1, 2, 0).reshape(-1, 3).tolist()]
    with pytest.raises(DataError, match="uint8"):
        save_png(image.float(), path)
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]
