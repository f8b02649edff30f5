"""Benchmarks of optical flow: Sintel, KITTI and the clips made here, by `trackpl test` on tiny converted trees."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from trackpl_prep import kitti, sintel
from trackpl_prep.convert import convert
from trackpl_prep.dataset import make_options

from trackpl import comparison, evaluation
from trackpl.benchmarks import find
from trackpl.encoding import encode
from trackpl.errors import DataError, Error
from trackpl.method import Info, Method
from trackpl.protocols import aggregate
from trackpl.protocols.flow import Task, jittered, resized_flow
from trackpl.samples import decode
from trackpl.shards import read_index, read_members, write_shards
from trackpl.types import Clip, Flow, Tracks

pytest_plugins = ["tiny_site"]
pytestmark = pytest.mark.usefixtures("work")

GOLDEN = Path(__file__).parent / "golden"
PAIRS = kitti.DATASETS[0]
PLAIN = {"input_size": None, "jitter": {"brightness": 0.0, "hue": 0.0}}


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "data_metrics" / "formats.npz") as arrays:
        return {k: arrays[k] for k in arrays.files if k.startswith(("sintel__", "kitti2015__"))}


@pytest.fixture(scope="module")
def sets(golden, tmp_path_factory):
    """Make sets of both passes of a Sintel of one sequence of three frames, and of a KITTI of one pair."""
    folder = tmp_path_factory.mktemp("flow")
    for name in ("sintel", "kitti2015"):
        with tarfile.open(fileobj=io.BytesIO(golden[f"{name}__tar"].tobytes())) as tar:
            tar.extractall(folder, filter="data")

    def make(dataset, root, **options):
        return convert(dataset, folder / root, folder / "shards", make_options(dataset, **options), quiet=True)

    return {
        "sintel_clean": make(sintel.DATASET, "Sintel", rendering="clean"),
        "sintel_final": make(sintel.DATASET, "Sintel", rendering="final"),
        "kitti2015": make(PAIRS, "KITTI"),
    }


@pytest.fixture
def bench(trackpl, work, sets):
    """Run a benchmark with the tiny method, whose flow is `shift` everywhere."""

    def run(name, *args, shift=0.0, out="out", status=0, data=None):
        path = work / f"shift{shift:g}.pt"
        torch.save({"shift": torch.full((2,), float(shift))}, path)
        base = ("test", "--benchmark", name, "--model", "tiny", "--checkpoint", path, "--device", "cpu")
        where = ("--out", out) if out else ()
        done = trackpl(*base, "--data", data or sets[name], *where, *args)
        assert done.status == status, done.err
        done.result = json.loads((Path(out) / "result.json").read_text()) if out and status == 0 else None
        return done

    return run


def by_hand(flow, shift, *masks):
    """Errors of a constant flow at the pixels of the masks, (n,), and the lengths of the truth there."""
    mask = np.logical_and.reduce([np.ones(flow.shape[:2], bool), *masks])
    error = np.sqrt(((flow.astype(np.float64) - shift) ** 2).sum(-1))
    return error[mask], np.sqrt((flow.astype(np.float64) ** 2).sum(-1))[mask]


# Figures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [0.0, 2.0])
def test_sintel_is_the_mean_over_all_pixels_and_hidden_ones_apart(shift, bench, golden, sets):
    result = bench("sintel_clean", shift=shift).result
    flows = [golden["sintel__flow1"], golden["sintel__flow2"]]
    assert result["summary"]["EPE"] == pytest.approx(np.mean([by_hand(f, shift)[0].mean() for f in flows]), abs=1e-5)
    assert result["queries"] == 2 and result["way"] == "flow" and result["rows"][0]["frames"] == 3
    truth = decode(read_members(read_index(sets["sintel_clean"]).samples[0])).flow
    assert np.array_equal(truth.visible[0, 0], ~golden["sintel__occluded"])
    for name, wanted in (("EPE_visible", truth.visible), ("EPE_occluded", ~truth.visible)):
        masks = (wanted & truth.valid)[0].numpy()
        errors = np.concatenate([by_hand(f, shift, m)[0] for f, m in zip(flows, masks, strict=True)])
        assert result["summary"][name] == pytest.approx(errors.mean(), abs=1e-5)
        assert result["rows"][0]["weights"][name] == len(errors)


@pytest.mark.parametrize("shift", [0.0, 4.0])
def test_kitti_is_the_mean_of_each_pair_noc_all_and_outliers(shift, bench, golden):
    result = bench("kitti2015", shift=shift).result
    flow = golden["kitti2015__flow_occ_flow"]
    valid, noc = golden["kitti2015__flow_occ_valid"], golden["kitti2015__flow_noc_valid"]
    everywhere, length = by_hand(flow, shift, valid)
    wrong = (everywhere > 3) & (everywhere > 0.05 * length)
    wanted = {
        "EPE_noc": by_hand(flow, shift, noc)[0].mean(),
        "EPE_all": everywhere.mean(),
        "EPE_occ": by_hand(flow, shift, valid, ~noc)[0].mean() if (valid & ~noc).any() else None,
        "ER": 100 * wrong.mean(),
        "ER_pooled": 100 * wrong.mean(),
    }
    for name, value in wanted.items():
        assert result["summary"][name] == pytest.approx(value, abs=1e-5), name


def test_kitti_figures_at_another_size_are_the_goldens():
    with np.load(GOLDEN / "crw" / "flow_eval.npz") as arrays:
        truth, known = (torch.from_numpy(arrays["gt"][..., p]).movedim(-1, 1) for p in (slice(2), slice(2, 4)))
        pred = resized_flow(torch.from_numpy(arrays["pred"]).permute(0, 3, 1, 2), truth.shape[-2:])
        benchmark, rows = find("kitti2015"), []
        for i in range(2):
            flow = Flow(truth[i : i + 1, None], ((0, 1),), known[i : i + 1, 1:] > 0, known[i : i + 1, :1] > 0)
            task = Task(Clip(torch.zeros(1, 2, 3, *truth.shape[-2:], dtype=torch.uint8)), "", flow)
            rows.append(benchmark.score(task, pred[i : i + 1], {}))
            names = ("EPE_all", "EPE_noc", "EPE_occ", "ER")
            assert [rows[-1][n] for n in names] == pytest.approx(arrays["per_image"][i].tolist(), abs=1e-3)
        summary = aggregate(rows, benchmark.metrics)
        assert [summary[n] for n in names] == pytest.approx(arrays["kitti"].tolist(), abs=1e-3)
        plain = (pred - truth).square().sum(1).sqrt().mean()
        assert plain == pytest.approx(float(arrays["dense_epe"][0]), abs=1e-3)


def test_pairs_and_pixels_are_weighed_as_the_protocol_says():
    rows = [
        {"EPE": 1.0, "ER": 10.0, "weights": {"EPE": 100.0, "ER": 1.0}},
        {"EPE": 4.0, "ER": 40.0, "weights": {"EPE": 200.0, "ER": 2.0}},
        {"EPE": None, "ER": None, "weights": {"EPE": 0.0, "ER": 0.0}},
    ]
    assert aggregate(rows, ["EPE", "ER"]) == {"EPE": 3.0, "ER": 30.0}
    assert aggregate(rows[2:], ["EPE"]) == {"EPE": None}


def test_flow_at_another_size_comes_back_in_pixels_of_the_truth(bench, golden):
    h, w = golden["sintel__flow1"].shape[:2]
    plain = bench("sintel_clean", shift=1.0, out="a").result
    doubled = bench("sintel_clean", "--input", f"{2 * h}x{2 * w}", shift=2.0, out="b").result
    assert doubled["input_size"] == [2 * h, 2 * w] and plain["input_size"] is None
    assert doubled["summary"] == pytest.approx(plain["summary"], abs=1e-5)


def test_a_set_says_what_is_missing_and_published_figures_stand_beside(bench):
    said = bench("sintel_final").out
    assert "NOT COMPLETE: the benchmark has 23 videos and 1041 pairs, this set 1, scored are 1 and 2 pairs" in said
    assert "{CRW 4-cycle} 3.55 - - Bian et al., 2022" in " ".join(said.split())
    assert "frames of their own size" in said and "pairs/s" in said
    assert "{CRW 2-cycle} 2.09 3.86 - 12.45" in " ".join(bench("kitti2015", out="k").out.split())


def test_a_set_of_another_pass_or_split_is_refused(bench, sets):
    message = bench("sintel_clean", data=sets["sintel_final"], status=2).err
    assert "was not made with --pass clean" in message and "--split training --pass clean`" in message
    assert "is of 'kitti2015'" in bench("kitti2015", data=sets["sintel_final"], status=2).err


def test_the_command_that_makes_the_set_is_told(trackpl):
    said = trackpl("test", "--benchmark", "sintel_final", "--model", "tiny").err
    assert "`trackpl data make sintel SOURCE OUT --split training --pass final`" in said


# Methods ----------------------------------------------------------------------------------------------------------


class Seen(Method):
    """Keeps the clips that it was shown; its flow is what `xy` says."""

    info = Info(title="Seen", paper="", licence="")

    def __init__(self, xy=0.0):
        super().__init__()
        self.shown, self.xy = [], xy

    def flow(self, clip, pairs):
        self.shown.append(clip.video.clone())
        return Flow(torch.full((1, len(pairs), 2, *clip.size), self.xy), tuple(pairs))


class Points(Method):
    """Tracks points, all of them one pixel to the right a frame."""

    info = Info(title="Points", paper="", licence="")

    def track(self, clip, queries):
        t = torch.arange(clip.frames)[None, :, None]
        xy = queries[:, None, :, 1:].repeat(1, clip.frames, 1, 1)
        xy[..., 0] += t - queries[:, None, :, 0]
        return Tracks(xy, torch.ones(xy.shape[:-1]))


def task_of(sets, name="sintel_clean", setup=PLAIN):
    benchmark = find(name)
    return benchmark, benchmark.read(read_index(sets[name]).samples[0], setup)


def test_a_method_sees_the_two_frames_of_each_pair(sets):
    method = Seen()
    benchmark, task = task_of(sets)
    evaluation.measure(benchmark, method, task, PLAIN)
    video = task.clip.video
    assert [v.shape[1] for v in method.shown] == [2, 2]
    assert torch.equal(method.shown[0], video[:, :2]) and torch.equal(method.shown[1], video[:, 1:])


def test_a_method_without_flow_tracks_every_pixel(sets):
    benchmark, task = task_of(sets)
    row = evaluation.measure(benchmark, Points(), task, PLAIN)
    right = torch.zeros_like(task.truth.xy[0])
    right[:, 0] = 1
    assert row["EPE"] == pytest.approx(benchmark.score(task, right, PLAIN)["EPE"]) and row["EPE"] > 0
    assert benchmark.way(Points()) == "track_dense"


def test_flow_that_is_no_number_is_an_error_and_not_left_out_of_the_mean(sets):
    benchmark, task = task_of(sets)
    with pytest.raises(Error, match=r"frames 0 to 1 of 'clean/alley_x' is not finite at 252 pixels"):
        evaluation.measure(benchmark, Seen(float("nan")), task, PLAIN)


def test_a_set_without_flow_is_named(tmp_path):
    clip = Clip(torch.zeros(1, 2, 3, 16, 16, dtype=torch.uint8))
    index = write_shards(tmp_path, "set", [("clip", encode(clip, None))])
    with pytest.raises(DataError, match="has no flow to score; the benchmark 'synthetic_flow' needs it"):
        find("synthetic_flow").read(read_index(index).samples[0], PLAIN)


# Jitter -----------------------------------------------------------------------------------------------------------


def test_the_second_frame_of_each_pair_is_jittered_by_itself_and_the_same_each_time(sets):
    setup = PLAIN | {"jitter": {"brightness": 0.6, "hue": 0.3}}
    method = Seen()
    benchmark, task = task_of(sets)
    for _ in range(2):
        evaluation.measure(benchmark, method, task, setup)
    plain = task.clip.float_video()
    first, second, *again = method.shown
    assert torch.equal(first, again[0]) and torch.equal(second, again[1])
    assert torch.equal(first[:, 0], plain[:, 0]) and torch.equal(second[:, 0], plain[:, 1])
    assert not torch.allclose(first[:, 1], plain[:, 1], atol=0.02)
    assert not torch.allclose(first[:, 1], second[:, 0], atol=0.02)


def test_brightness_is_a_factor_within_its_range_and_hue_keeps_grey():
    grey = torch.full((1, 3, 4, 4), 0.5)
    factors = torch.stack([jittered(grey, 0.6, 0.3, f"{i}").mean() / 0.5 for i in range(200)])
    assert 0.4 <= factors.min() < 0.5 and 1.5 < factors.max() <= 1.6
    assert abs(factors.mean() - 1) < 0.1
    red = torch.tensor([0.8, 0.2, 0.2]).view(1, 3, 1, 1)
    turned = jittered(red, 0, 0.3, "x")
    assert turned.amax() == pytest.approx(0.8, abs=1e-5) and turned.amin() == pytest.approx(0.2, abs=1e-5)
    assert not torch.allclose(turned, red, atol=0.02)


def test_a_jittered_run_says_so_and_lies_beside_the_other(bench):
    bench("kitti2015", out=None)
    said = bench("kitti2015", "--jitter-brightness", "0.6", "--jitter-hue", "0.3", out=None).out
    plain, jittered_run = sorted(Path("results", "kitti2015").iterdir(), key=lambda p: len(p.name))
    assert jittered_run.name == f"{plain.name}-jitter0.6-0.3"
    assert "second frames jittered: brightness by up to 0.6, hue by up to 0.3" in said
    result = json.loads((jittered_run / "result.json").read_text())
    assert result["jitter"] == {"brightness": 0.6, "hue": 0.3}
    assert result["summary"] == json.loads((plain / "result.json").read_text())["summary"]  # a flow that never looks
    bench("kitti2015", out="out")
    assert "something else (jitter" in bench("kitti2015", "--jitter-hue", "0.1", status=2).err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("kitti2015", "--jitter-hue", "0.6"), "--jitter-hue 0.6: allowed is 0 to 0.5"),
        (("kitti2015", "--threshold", "0.6"), "--threshold means nothing to --benchmark kitti2015"),
        (("synthetic", "--jitter-brightness", "0.6"), "--jitter-brightness means nothing to --benchmark synthetic"),
        (("kitti2015", "--jitter-bright", "0.6"), "did you mean '--jitter-brightness'?"),
    ],
)
def test_options_that_mean_nothing_are_refused(args, message, mistake):
    assert message in mistake("test", "--model", "tiny", "--benchmark", *args)


# Side by side ---------------------------------------------------------------------------------------------------


def test_less_error_is_better_and_any_figure_can_be_compared(bench, trackpl, mistake):
    a = bench("sintel_clean", shift=0.0, out="a").result
    b = bench("sintel_clean", shift=50.0, out="b").result
    (epe, *_) = comparison.compare(a, b)
    assert epe.metric == "EPE" and epe.mean > 0 and (epe.better, epe.worse) == (0, 1)
    assert epe.mean == pytest.approx(b["summary"]["EPE"] - a["summary"]["EPE"])
    one = trackpl("test", "--compare", "a", "b", "--metric", "px3").out
    assert "px3" in one and "EPE" not in one and "B loses most in" in one
    assert "EPE_occluded" in trackpl("test", "--compare", "a", "b").out
    assert "no figure 'EPE_ocluded'; did you mean 'EPE_occluded'?" in mistake(
        *("test", "--compare", "a", "b", "--metric", "EPE_ocluded")
    )


def test_means_of_a_comparison_are_weighed_as_the_benchmarks(trackpl):
    def made(values):
        cost = {"frames": 1, "queries": 1, "nan_predictions": 0, "seconds": 1.0, "peak_memory": 1}
        names = find("sintel_clean").metrics
        rows = [
            {"key": f"v{i}", "peak_gpu_memory": None, **cost, **dict.fromkeys(names, v)}
            | {"weights": dict.fromkeys(names, float(i + 1))}
            for i, v in enumerate(values)
        ]
        base = {"schema": 1, "benchmark": "sintel_clean", "protocol": {"metrics": list(names)}, "method": "m"}
        return base | {"data": "d", "rows": rows}

    values = np.linspace(2, 4, 12)
    a, b = made(list(values)), made(list(values - 1))
    (epe, *_) = comparison.compare(a, b)
    assert epe.a == pytest.approx(np.average(values, weights=np.arange(1, 13)))
    assert (epe.mean, epe.low, epe.high) == pytest.approx((-1, -1, -1)) and epe.better == 12
    Path("a").write_text(json.dumps(a))
    Path("b").write_text(json.dumps(b))
    assert "EPE: B is better beyond chance" in trackpl("test", "--compare", "a", "b").out
    a["rows"][0]["weights"] = {"EPE": "much"}
    Path("a").write_text(json.dumps(a))
    assert "'weights' of 'EPE' of v0 must be a number" in trackpl("test", "--compare", "a", "b").err
