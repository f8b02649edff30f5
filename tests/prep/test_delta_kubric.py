"""DELTA's Kubric3D to shards, and back."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from trackpl_prep.convert import convert
from trackpl_prep.dataset import make_options
from trackpl_prep.delta_kubric import DATASET

from trackpl.errors import DataError
from trackpl.samples import decode
from trackpl.shards import read_index, read_members

GOLDEN = Path(__file__).parents[1] / "golden" / "data_metrics" / "formats.npz"


@pytest.fixture
def source(tmp_path):
    with np.load(GOLDEN) as golden, tarfile.open(fileobj=io.BytesIO(golden["delta_kubric3d__tar"].tobytes())) as tar:
        tar.extractall(tmp_path, filter="data")
    return tmp_path / "kubric3d"


def make(source, out="out", **options):
    index = convert(DATASET, source, source.parent / out, make_options(DATASET, **options), quiet=True)
    return decode(read_members(read_index(index).samples[0]))


def rays(xy, clip):
    fx, fy, cx, cy = clip.camera.intrinsics[0, 0].double().numpy()
    return np.sqrt(1 + ((xy[..., 0] - cx) / fx) ** 2 + ((xy[..., 1] - cy) / fy) ** 2)


def centres(h, w):
    return np.stack(np.meshgrid(np.arange(w) + 0.5, np.arange(h) + 0.5), -1)


def test_the_golden(source):
    golden = {
        k.split("__")[1]: v for k, v in np.load(GOLDEN).items() if k.startswith("delta_kubric3d__") and "tar" not in k
    }
    clip = make(source, lossless=True)
    xy = clip.tracks[0].numpy()
    assert clip.name == ("0003",) and clip.flow is None
    assert (xy == golden["coords"].transpose(1, 0, 2)).all() and xy.dtype == np.float32
    assert (clip.visible[0].numpy() == ~golden["occluded"].T).all() and clip.valid.all()
    assert (clip.video[0].permute(0, 2, 3, 1).numpy() == golden["frames"]).all()
    fx = 35 / 32 * 40
    assert clip.camera.intrinsics[0, 0].tolist() == [fx, fx, 20, 16]
    assert np.allclose(clip.track_depth[0].numpy() * rays(xy, clip), golden["reproj_depth"].T, rtol=1e-6)
    distance = clip.depth[0, :, 0].numpy() * rays(centres(32, 40), clip)
    assert np.abs(distance - golden["depth_metres"]).max() < 20 * 2**-16


def add_dense(source, *, seed=0, raster=True, queries="tyx", prefix="", kinds=("dense", "dense_reverse"), far=False):
    """Write tracks of all pixels as the generator does, in random order; returns what went in, pixel by pixel."""
    rng, (t, h, w) = np.random.default_rng(seed), (6, 32, 40)
    truth = {}
    for kind in kinds:
        first = 0 if kind == "dense" else t - 1
        grid = centres(h, w)
        speed = rng.normal(size=2) / 2 + (grid - (w / 2, h / 2)) / 64
        coords = (grid + speed * (np.arange(t)[:, None, None, None] - first)).astype(np.float16)
        if far:
            coords[3, 5, 7] = 6000
            coords[3, 5, 8] = 600
            coords[3, 5, 9] = np.inf
        hidden = rng.random((t, h, w)) < 0.3
        hidden[first] = False
        distance = rng.uniform(3, 9, (t, h, w)).astype(np.float16)
        truth[kind] = coords.astype(np.float32), hidden, distance.astype(np.float32)
        order = rng.permutation(h * w)
        y, x = grid.reshape(-1, 2)[order].T[::-1]
        asked = {"tyx": (np.full_like(x, first) + 0.5, y, x), "yx": (y, x), "xy": (x, y)}.get(queries)
        rows = {
            "coords": (coords.astype(np.float32) - (0 if raster else 0.5)).astype(np.float16),
            "visibility": hidden,
            "reproj_depth": distance,
        }
        record = {prefix + k: np.moveaxis(v.reshape(t, h * w, *v.shape[3:])[:, order], 0, 1) for k, v in rows.items()}
        if asked is not None:
            record[prefix + "queries"] = np.stack(asked, -1).astype(np.float16)
        np.save(source / f"0003/0003_{kind}.npy", record)
    return truth


@pytest.mark.parametrize("queries", ["tyx", "yx", "xy", "none"])
@pytest.mark.parametrize("raster", [True, False])
def test_dense_tracks_become_flow(source, raster, queries):
    truth = add_dense(source, raster=raster, queries=queries)
    clip = make(source)
    assert clip.flow.pairs == (*((0, t) for t in range(6)), *((5, t) for t in range(6)))
    grid = centres(32, 40)
    for part, kind in ((slice(0, 6), "dense"), (slice(6, 12), "dense_reverse")):
        coords, hidden, distance = truth[kind]
        xy = clip.flow.xy[0, part].permute(0, 2, 3, 1).numpy()
        assert np.abs(xy + grid - coords).max() < (1 / 64 if raster else 1 / 32)  # float16 rounds each of the two
        assert clip.flow.valid[0, part].all()
        assert (clip.flow.visible[0, part].numpy() == ~hidden).all()
        back = clip.flow.depth[0, part].numpy() * rays(coords, clip)
        assert np.abs(back - distance).max() < 0.02
    assert clip.flow.xy[0, 0].abs().max() < 1 / 64 and clip.flow.xy[0, 11].abs().max() < 1 / 64


@pytest.mark.parametrize("prefix", ["", "dense_"])
def test_the_names_of_generator_and_loader(source, prefix):
    truth = add_dense(source, prefix=prefix, kinds=("dense",))
    path = source / "0003/0003.npy"
    record = np.load(path, allow_pickle=True).item()
    np.save(path, {f"sparse_{k}": v for k, v in record.items()})
    clip = make(source, lossless=True)
    assert clip.flow.pairs == tuple((0, t) for t in range(6))
    assert (clip.flow.visible[0].numpy() == ~truth["dense"][1]).all()
    assert (clip.tracks[0].numpy() == record["coords"].transpose(1, 0, 2)).all()


def test_which_dense_tracks_are_kept(source):
    add_dense(source)
    assert make(source, "a", dense="none").flow is None
    assert make(source, "b", dense="first").flow.pairs == tuple((0, t) for t in range(6))


def test_tracks_that_leave_for_good_are_not_valid(source):
    add_dense(source, far=True, kinds=("dense",))
    flow = make(source).flow
    assert (~flow.valid[0]).nonzero().tolist() == [[3, 5, 7], [3, 5, 8], [3, 5, 9]]
    assert not flow.visible[0, 3, 5, 7:10].any() and not flow.xy[0, 3, :, 5, 7:10].any()
    assert flow.xy.abs().max() < 20


def test_sparse_tracks_far_away_are_not_valid(source):
    path = source / "0003/0003.npy"
    record = np.load(path, allow_pickle=True).item()
    record["coords"][2, 1], record["coords"][3, 4, 0] = 5500, np.nan
    np.save(path, record)
    clip = make(source)
    assert (~clip.valid[0]).nonzero().tolist() == [[1, 2], [4, 3]]
    assert not (clip.visible & ~clip.valid).any() and not clip.tracks[0, 1, 2].any()


def test_a_missing_row_leaves_its_pixel_not_valid(source):
    add_dense(source, kinds=("dense",))
    path = source / "0003/0003_dense.npy"
    record = np.load(path, allow_pickle=True).item()
    _, y, x = record["queries"][0].astype(int)
    np.save(path, {k: v[1:] for k, v in record.items()})
    valid = make(source).flow.valid[0]
    assert not valid[:, y, x].any() and (~valid).sum() == 6


class Evil:
    def __reduce__(self):
        return print, ("executed",)


def edit(source, kind, change):
    path = source / f"0003/0003{kind}.npy"
    record = np.load(path, allow_pickle=True).item()
    change(record)
    np.save(path, record)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("", lambda r: r.pop("coords"), "coords: expected an array"),
        ("", lambda r: r.pop("reproj_depth"), "reproj_depth"),
        ("", lambda r: r.update(depth_range=np.array([3.0, 1.0])), "depth_range"),
        ("", lambda r: r.update(coords=r["coords"][:, :4]), "for 6 frames"),
        ("", lambda r: r.update(visibility=Evil()), "which is code"),
        ("_dense", lambda r: r.update(queries=r["queries"][:5]), "1280 tracks but 5 queries"),
        ("_dense", lambda r: r.update(queries=r["queries"] + 8), "do not start"),
        ("_dense", lambda r: r["queries"].__setitem__(0, r["queries"][1]), "several tracks"),
        ("_dense", lambda r: r["queries"].__setitem__((0, 1), 100), "outside of the 32x40"),
    ],
)
def test_broken_annotations_say_what_is_wrong(source, kind, change, message, capsys):
    add_dense(source)
    edit(source, kind, change)
    with pytest.raises(DataError, match=message) as error:
        make(source)
    assert "0003" in str(error.value)
    assert "executed" not in capsys.readouterr().out


def test_broken_depth_and_the_wrong_folder(source, tmp_path):
    depth = source / "0003/depths/002.png"
    Image.new("RGB", (40, 32)).save(depth)
    with pytest.raises(DataError, match=r"002\.png.*expected 16-bit grey"):
        make(source)
    depth.unlink()
    with pytest.raises(DataError, match="5 depth maps for 6 frames"):
        make(source)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no folders with an annotation; expected:"):
        make(tmp_path / "empty")
