"""Benchmarks: what is asked and how it is scored, runs that are stopped and go on, results side by side."""

import dataclasses
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from trackpl_prep import cli as data_cli
from trackpl_prep.convert import convert
from trackpl_prep.tapvid import DATASETS

from trackpl import comparison, evaluation
from trackpl.benchmarks import BENCHMARKS, find
from trackpl.encoding import encode
from trackpl.errors import DataError, Error
from trackpl.protocols import aggregate, points
from trackpl.protocols.points import HEADLINE, Points, read_task, sample_queries
from trackpl.shards import read_index, write_shards
from trackpl.types import Clip, Tracks

pytest_plugins = ["tiny_site"]
pytestmark = pytest.mark.usefixtures("work")

GOLDEN = Path(__file__).parent / "golden" / "data_metrics"
DAVIS = next(d for d in DATASETS if d.name == "tapvid_davis")
FIRST, STRIDED = "tapvid_davis_first", "tapvid_davis_strided"


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "formats.npz") as arrays:
        names = [k for k in arrays.files if k.startswith("tapvid_davis__")]
        return {k.removeprefix("tapvid_davis__"): arrays[k] for k in names}


@pytest.fixture(scope="module")
def davis(golden, tmp_path_factory):
    """The index of a TAP-Vid-DAVIS of two videos, of 7 frames of 20x28 and 6 of 24x28."""
    folder = tmp_path_factory.mktemp("davis")
    with tarfile.open(fileobj=io.BytesIO(golden["tar"].tobytes())) as tar:
        tar.extractall(folder / "source", filter="data")
    return convert(DAVIS, folder / "source", folder / "shards", quiet=True)


@pytest.fixture
def weights(work):
    """Make checkpoints of the tiny method, which moves every point by `shift` a frame and sees it always."""

    def make(shift=0.0):
        path = work / f"shift{shift:g}.pt"
        torch.save({"shift": torch.full((2,), shift)}, path)
        return path

    return make


@pytest.fixture
def bench(trackpl, weights, davis):
    """Run the benchmark with the tiny method; return what was said, with the result."""

    def run(*args, benchmark=FIRST, shift=0.0, out="out", data=davis, status=1):
        base = ("test", "--benchmark", benchmark, "--model", "tiny", "--checkpoint", weights(shift), "--device", "cpu")
        done = trackpl(*base, "--data", data, "--out", out, *args)
        assert done.status == status, done.err
        done.result = json.loads((Path(out) / "result.json").read_text()) if status == 0 else None
        return done

    return lambda *args, status=0, **options: run(*args, status=status, **options)


def lines(out="out"):
    return [json.loads(line) for line in (Path(out) / "videos.jsonl").read_text().splitlines()]


def untimed(rows):
    return [{k: v for k, v in row.items() if k not in ("seconds", "peak_memory")} for row in rows]


# Protocol -------------------------------------------------------------------------------------------------------


def test_every_benchmark_reads_a_data_set_that_can_be_made_and_has_figures_in_order():
    for name, benchmark in BENCHMARKS.items():
        assert benchmark.name == name and benchmark.data in data_cli.MODULES
        assert len({r.system for r in benchmark.references}) == len(benchmark.references)
        assert set(benchmark.headline) <= set(benchmark.metrics)
        for reference in benchmark.references:
            assert len(reference.figures) == len(benchmark.headline) and reference.source
            assert any(reference.figures) and all(f is None or 0 < f < 100 for f in reference.figures)
            if isinstance(benchmark, Points):
                aj, delta, oa = reference.figures
                assert aj < min(delta, oa)
    assert BENCHMARKS[FIRST].references[-5].system == "LocoTrack-B 256x256"


@pytest.mark.parametrize("mode", ["first", "strided"])
def test_queries_equal_the_golden(mode):
    with np.load(GOLDEN / "tapvid_query_sampling.npz") as arrays:
        points, occluded = arrays["points"], arrays["occluded"]
        wanted, targets = arrays[f"{mode}__query_points"][0], arrays[f"{mode}__target_points"][0]
        hidden = arrays[f"{mode}__occluded"][0]
    tracks = torch.from_numpy(points.transpose(1, 0, 2) * 256)
    visible = torch.from_numpy(~occluded.T)
    queries, index = sample_queries(find(f"tapvid_davis_{mode}"), tracks, visible)
    assert np.abs(queries.numpy() - wanted[:, [0, 2, 1]]).max() < 1e-4
    assert np.abs(tracks[:, index].permute(1, 0, 2).numpy() - targets).max() < 1e-4
    assert (~visible[:, index].T.numpy() == hidden).all()


@pytest.mark.parametrize("mode", ["first", "strided"])
@pytest.mark.parametrize("chunk", [2, 16])
def test_a_task_is_the_video_by_lanczos_and_the_golden_rows_at_256(mode, chunk, davis, golden, monkeypatch):
    monkeypatch.setattr(points, "_CHUNK", chunk)
    for i, sample in enumerate(read_index(davis).samples):
        task = read_task(find(f"tapvid_davis_{mode}"), sample)
        frames = golden[f"video{i}_frames"]
        scale = np.array([256 / frames.shape[2], 256 / frames.shape[1]])
        wanted = golden[f"video{i}_{mode}_query_points"][0][:, [0, 2, 1]] * [1, *scale]
        assert np.abs(task.queries.numpy() - wanted).max() < 1e-3
        truth = golden[f"video{i}_{mode}_target_points"][0] * scale
        assert np.abs(task.tracks.permute(1, 0, 2).numpy() - truth).max() < 1e-3
        assert (~task.visible.T.numpy() == golden[f"video{i}_{mode}_occluded"][0]).all()
        small = [np.asarray(Image.fromarray(f).resize((256, 256), Image.Resampling.LANCZOS)) for f in frames]
        assert (task.clip.video[0].permute(0, 2, 3, 1).numpy() == np.stack(small)).all()
        assert task.count == len(golden[f"video{i}_points"])


def by_hand(queries, truth, hidden, mode, shift):
    """AJ, delta_avg and OA of a method that moves every point by `shift` a frame and sees it always, loop by loop."""
    jaccards, shares = [], []
    right = evaluated = 0
    for delta in (1, 2, 4, 8, 16):
        hits = positives = false = 0
        right = evaluated = 0
        for (q, x, y), track, occluded in zip(queries, truth, hidden, strict=True):
            for t in range(len(track)):
                if t == q or (mode == "first" and t < q):
                    continue
                evaluated += 1
                right += not occluded[t]
                within = (x + shift * (t - q) - track[t, 0]) ** 2 + (y + shift * (t - q) - track[t, 1]) ** 2 < delta**2
                positives += not occluded[t]
                hits += within and not occluded[t]
                false += occluded[t] or not within
        jaccards.append(hits / (positives + false))
        shares.append(hits / positives)
    return 100 * np.mean(jaccards), 100 * np.mean(shares), 100 * right / evaluated


@pytest.mark.parametrize("shift", [0.0, 3.0])
@pytest.mark.parametrize("mode", ["first", "strided"])
def test_figures_are_those_by_hand(mode, shift, bench, golden):
    result = bench(benchmark=f"tapvid_davis_{mode}", shift=shift).result
    for i, row in enumerate(result["rows"]):
        frames = golden[f"video{i}_frames"]
        scale = np.array([256 / frames.shape[2], 256 / frames.shape[1]])
        queries = golden[f"video{i}_{mode}_query_points"][0][:, [0, 2, 1]] * [1, *scale]
        truth = golden[f"video{i}_{mode}_target_points"][0] * scale
        wanted = by_hand(queries, truth, golden[f"video{i}_{mode}_occluded"][0], mode, shift)
        assert [row["AJ"], row["delta_avg"], row["OA"]] == pytest.approx(wanted, abs=1e-3)


def test_frames_of_another_size_leave_the_figures_of_a_still_method_as_they_are(bench):
    small, large = bench(out="a").result, bench("--input", "96x160", out="b").result
    assert large["input_size"] == [96, 160]
    assert large["summary"] == pytest.approx(small["summary"], abs=1e-6)


def test_above_the_threshold_a_point_is_visible(davis, weights, monkeypatch):
    benchmark, (sample, *_) = find(FIRST), read_index(davis).samples
    task = read_task(benchmark, sample)
    xy = task.tracks[None].float()
    for probability, threshold, aj in ((0.6, None, 100.0), (0.6, 0.7, 0.0), (0.5, None, 0.0)):
        tracks = Tracks(xy, torch.where(task.visible[None], probability, 0.0))
        assert points.score(benchmark, task, tracks, threshold)["AJ"] == pytest.approx(aj)


def test_queries_that_the_data_set_names_are_asked_and_all_other_frames_scored(tmp_path):
    tracks = torch.rand(1, 5, 3, 2) * 32
    visible = torch.ones(1, 5, 3, dtype=torch.bool)
    visible[:, :, 1] = False
    asked = torch.tensor([[[2.0, 0, 0], [1, 0, 0], [4, 0, 0]]])
    for n, t in ((0, 2), (1, 1), (2, 4)):
        asked[0, n, 1:] = tracks[0, t, n]
    clip = Clip(torch.zeros(1, 5, 3, 32, 32, dtype=torch.uint8), tracks, visible, visible | True, queries=asked)
    index = write_shards(tmp_path, "kubric", [("clip", encode(clip, None))], meta={"source": "tapvid_kubric"})
    benchmark = find("tapvid_kubric")
    task = read_task(benchmark, read_index(index).samples[0])
    assert torch.allclose(task.queries, (asked[0, [0, 2]] * torch.tensor([1, 8, 8])).double(), atol=1e-4)
    pred = task.tracks.clone()
    pred[0] += 100  # before the queries: scored all the same
    scores = points.score(benchmark, task, Tracks(pred[None], task.visible[None].float()))
    assert scores["delta_avg"] == pytest.approx(75) and scores["OA"] == 100


# Runs -----------------------------------------------------------------------------------------------------------


def test_a_result_says_what_was_measured_and_follows_from_its_lines(bench, davis):
    done = bench()
    result = done.result
    setup, *rows = lines()
    assert rows == result["rows"] and [r["key"] for r in rows] == [s.key for s in read_index(davis).samples]
    assert aggregate(rows, points.FIGURES) == result["summary"]
    assert result["summary"]["AJ"] == pytest.approx(np.mean([r["AJ"] for r in rows]))
    assert {k: result[k] for k in setup} == setup
    assert setup["method"] == "tiny" and setup["device"] == "cpu" and len(setup["weights"]) == 64
    assert {"trackpl", "torch", "trackpl-tiny"} <= setup["versions"].keys()
    assert result["seconds"] > 0 and result["peak_memory"] > 1e6 and result["nan_predictions"] == 0
    assert result["queries"] == sum(r["queries"] for r in rows) > 0


def test_the_table_stands_beside_the_published_figures_and_says_that_videos_are_missing(bench):
    done = bench()
    assert done.result["videos"] == {"expected": 30, "found": 2, "scored": 2, "skipped": 0, "complete": False}
    assert "tiny (this run)" in done.out and "2 of 30 videos" in done.out
    assert "NOT COMPLETE: the benchmark has 30 videos, this set 2" in done.out
    assert "LocoTrack-B 256x256       63.0       75.3       87.2   Cho et al." in done.out
    assert "trackpl test --compare out OTHER" in done.out


def test_a_whole_set_is_complete(bench, monkeypatch):
    monkeypatch.setitem(BENCHMARKS, FIRST, dataclasses.replace(BENCHMARKS[FIRST], videos=2))
    done = bench()
    assert done.result["videos"]["complete"] and "NOT COMPLETE" not in done.out


def test_a_stopped_run_goes_on_after_its_last_whole_line(bench, trackpl, monkeypatch):
    whole = bench(out="whole").result
    real, seen = evaluation.measure, []

    def measure(benchmark, method, task, setup):
        seen.append(task.clip.name[0])
        if len(seen) == 2:
            raise KeyboardInterrupt
        return real(benchmark, method, task, setup)

    monkeypatch.setattr(evaluation, "measure", measure)
    assert "repeat the command" in bench(status=130).err and not Path("out/result.json").exists()
    with open("out/videos.jsonl", "a") as file:
        file.write('{"key": "half a li')
    again = bench().result
    assert seen == ["vid-0.x", "vid-1.x", "vid-1.x"]
    assert untimed(again["rows"]) == untimed(whole["rows"]) and again["summary"] == whole["summary"]
    assert lines()[1:] == again["rows"]
    assert bench().result == again and len(seen) == 3  # nothing is left to do


@pytest.mark.parametrize("left", ["", '{"schema"'])
def test_a_run_that_was_stopped_before_its_first_line_starts_anew(left, bench):
    Path("out").mkdir()
    Path("out/videos.jsonl").write_text(left)
    assert len(bench().result["rows"]) == 2 and len(lines()) == 3


def test_a_limit_scores_the_first_and_the_rest_later(bench):
    first = bench("--limit", "1")
    assert len(first.result["rows"]) == 1 and "1 of 30 videos" in first.out and "without --limit" in first.out
    rest = bench()
    assert rest.result["rows"][0] == first.result["rows"][0] and len(rest.result["rows"]) == 2


@pytest.mark.parametrize(
    ("change", "what"),
    [({"shift": 1.0}, "weights"), ({"benchmark": STRIDED}, "benchmark"), ({"threshold": "0.6"}, "threshold 0.5")],
)
def test_a_folder_of_another_result_is_left_alone_unless_it_is_to_be_overwritten(change, what, bench):
    bench()
    before = Path("out/videos.jsonl").read_bytes()
    flags = [f"--threshold={change.pop('threshold')}"] if "threshold" in change else []
    refused = bench(*flags, status=2, **change).err
    assert f"a result of something else ({what}" in refused and "--overwrite" in refused
    assert Path("out/videos.jsonl").read_bytes() == before
    assert len(bench(*flags, "--overwrite", **change).result["rows"]) == 2


def test_lines_that_are_no_rows_are_named(bench):
    bench()
    with open("out/videos.jsonl", "a") as file:
        file.write('{"key": "vid-0_x"}\n')
    assert "out/videos.jsonl, line 4 has no 'AJ'" in bench(status=2).err


def broken(davis, folder):
    """Copy the set with the truth of the second video spoilt."""
    index = read_index(davis)
    for path in Path(davis).parent.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    sample = index.samples[1]
    offset, size = sample.members["tracks.npy"]
    with open(folder / Path(sample.shard.address).name, "r+b") as file:
        file.seek(offset)
        file.write(b"\xff" * size)
    return folder / Path(davis).name


def test_a_broken_video_is_named_and_not_averaged_away(bench, davis, tmp_path):
    good = bench().result
    (tmp_path / "copy").mkdir()
    done = bench(data=broken(davis, tmp_path / "copy"), out="bad", status=1)
    result = json.loads(Path("bad/result.json").read_text())
    assert result["videos"] == {"expected": 30, "found": 2, "scored": 1, "skipped": 1, "complete": False}
    assert result["summary"]["AJ"] == good["rows"][0]["AJ"]
    assert "1 cannot be read" in done.out and f"left out: {good['rows'][1]['key']}: " in done.out
    assert "tracks.npy" in result["skipped"][0]["skipped"]


def write_set(folder, visible, **meta):
    tracks = torch.full((1, 4, 2, 2), 8.0)
    clips = [Clip(torch.zeros(1, 4, 3, 16, 16, dtype=torch.uint8), tracks, seen, seen | True) for seen in visible]
    samples = [(f"clip{i}", encode(clip, None)) for i, clip in enumerate(clips)]
    return write_shards(folder, "set", samples, meta={"source": "tapvid_davis"} | meta)


def test_a_video_without_a_visible_track_has_no_figures_and_is_counted(bench, tmp_path):
    seen = torch.ones(1, 4, 2, dtype=torch.bool)
    done = bench(data=write_set(tmp_path / "set", [seen, ~seen]))
    one, other = done.result["rows"]
    assert one["AJ"] == 100 and other["queries"] == 0 and other["AJ"] is None and other["OA"] is None
    assert done.result["summary"]["AJ"] == 100 and done.result["undefined"]["AJ"] == 1
    assert "undefined (0/0) and left out of the means: AJ in 1" in done.out


def test_predictions_that_are_no_numbers_are_misses_and_counted(bench, tmp_path):
    seen = torch.ones(1, 4, 2, dtype=torch.bool)
    done = bench(data=write_set(tmp_path / "set", [seen]), shift=float("nan"))
    assert done.result["nan_predictions"] == 8 and done.result["summary"]["AJ"] == 0
    assert "8 predicted positions are not finite" in done.out


def test_results_lie_in_a_folder_named_by_benchmark_and_weights_and_options(trackpl, weights, davis):
    base = ("test", "--benchmark", FIRST, "--model=tiny", f"--checkpoint={weights()}", f"--data={davis}")
    done = trackpl(*base)
    assert done.status == 0, done.err
    (folder,) = Path("results", FIRST).iterdir()
    result = json.loads((folder / "result.json").read_text())
    assert folder.name == f"tiny-{result['weights'][:8]}"
    assert trackpl(*base, "--model.start", "2.5").status == 0  # beside it
    assert {f.name for f in folder.parent.iterdir()} == {folder.name, f"{folder.name}-start=2.5"}


def test_options_of_the_method_are_taken_and_recorded(bench):
    assert bench("--model.start", "2.5", "--model.wait=0").result["options"] == {"start": 2.5, "wait": 0}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--benchmark", "tapvid_davis_frist", "--model", "tiny"), "did you mean 'tapvid_davis_first'?"),
        (("--benchmark", "--model", "tiny"), "allowed: davis2017, jhmdb, kitti2015, robotap_first, sintel_clean"),
        (("--benchmark", FIRST, "--model", "tiny"), "`trackpl data make tapvid_davis SOURCE OUT` writes"),
        (("--benchmark", FIRST), "required: --model"),
        (("--benchmark", FIRST, "--model", "tiny", "--limt", "2"), "did you mean '--limit'?"),
        (("--benchmark", FIRST, "--model", "tiny", "--limit", "0"), "from 1 on"),
        (("--benchmark", FIRST, "--model", "tiny", "--input", "9x"), "such as 384x512"),
        (("--benchmark", FIRST, "--model", "tiny", "--threshold", "1"), "below 1"),
        (("--benchmark", FIRST, "--model", "tiny", "--model.wait"), "--model.wait needs a value"),
        (("--benchmark", FIRST, "--model", "tiny", "--device", "tpu"), "allowed: auto, cpu, cuda"),
        (("--benchmark", FIRST, "--model", "tiny", "--data", "nowhere"), "nowhere cannot be read"),
    ],
)
def test_mistakes_are_one_line(args, message, mistake):
    assert message in mistake("test", *args)
    assert not Path("results").exists()


def test_the_shards_of_another_data_set_are_refused(bench, davis):
    message = bench(benchmark="robotap_first", status=2).err
    assert "holds the data set 'tapvid_davis', but --benchmark robotap_first is of 'robotap'" in message


def test_an_unknown_option_of_the_method_is_named(bench):
    assert "no option 'stat'; did you mean 'start'?" in bench("--model.stat", "1", status=2).err


def test_two_processes_do_not_write_one_result(bench):
    from trackpl.results import alone

    with alone(Path("out")):
        assert "another process is writing to out" in bench(status=2).err


def test_help_lists_the_benchmarks(trackpl, capsys):
    with pytest.raises(SystemExit) as leaving:
        trackpl("test", "--benchmark", "--help")
    shown = capsys.readouterr().out
    assert leaving.value.code == 0 and all(f"  {name} " in shown for name in BENCHMARKS)


def test_without_a_benchmark_test_is_lightnings(trackpl):
    shown = trackpl("test", "--help").out
    assert "--ckpt_path" in shown and "trackpl test --benchmark --help" in shown


# Side by side ---------------------------------------------------------------------------------------------------


def test_results_are_compared_video_by_video(bench, trackpl):
    a, b = (bench(out=o, shift=s).result for o, s in (("a", 0.0), ("b", 3.0)))
    done = trackpl("test", "--compare", "a", "b/result.json")
    assert done.status == 0, done.err
    (aj, *_) = comparison.compare(a, b)
    changes = [y["AJ"] - x["AJ"] for x, y in zip(a["rows"], b["rows"], strict=True)]
    assert aj.mean == pytest.approx(np.mean(changes)) and aj.low <= aj.mean <= aj.high
    assert (aj.better, aj.worse, aj.same) == (sum(c > 0 for c in changes), sum(c < 0 for c in changes), 0)
    assert f"{aj.mean:+.2f}" in done.out and "2 videos in both results" in done.out
    assert "of 2 videos an interval says little" in done.out and "beyond chance" not in done.out
    assert "delta_16" in trackpl("test", "--compare", "a", "b", "--all").out


def test_the_interval_is_that_of_the_mean_and_the_same_each_time():
    values = np.random.default_rng(1).normal(2.0, 3.0, 200)
    low, high = comparison.interval(values)
    half = 1.96 * values.std() / 200**0.5
    assert low == pytest.approx(values.mean() - half, abs=0.06)
    assert high == pytest.approx(values.mean() + half, abs=0.06)
    assert comparison.interval(values) == (low, high)
    assert np.isnan(comparison.interval(values[:1])).all()


def made(values, **changes):
    metrics = list(HEADLINE)
    cost = {"frames": 1, "queries": 1, "nan_predictions": 0, "seconds": 1.0, "peak_memory": 1, "peak_gpu_memory": None}
    rows = [{"key": f"v{i}"} | cost | dict.fromkeys(metrics, value) for i, value in enumerate(values)]
    base = {"schema": 1, "benchmark": "synthetic", "protocol": {"metrics": metrics}, "method": "m", "data": "d"}
    return base | {"rows": rows} | changes


def save(path, result):
    Path(path).write_text(json.dumps(result))
    return path


def test_a_difference_on_every_video_is_beyond_chance_and_noise_is_not(trackpl):
    values = np.linspace(40, 60, 12)
    save("a", made(list(values)))
    save("b", made(list(values + 2)))
    save("c", made(list(values + np.tile([5, -5], 6))))
    better = trackpl("test", "--compare", "a", "b").out
    assert "B is better beyond chance" in better and "+2.00 .. +2.00" in better and "loses" not in better
    noise = trackpl("test", "--compare", "a", "c").out
    assert "no difference beyond chance" in noise and "B loses most in v1 (-5.0)" in noise


def test_videos_of_one_result_alone_are_left_out_and_said(trackpl):
    save("a", made([10.0, None, 30.0]))
    save("b", made([20.0, 20.0, 40.0, 99.0]))
    out = trackpl("test", "--compare", "a", "b").out
    assert "3 videos in both" in out and "NOT ALL: A has 3 videos, B 4" in out and "+10.00" in out
    assert "AJ: undefined in 1 videos" in out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"benchmark": "robotap_first"}, "different benchmarks cannot be compared: synthetic and robotap_first"),
        ({"data": "e"}, "of different data"),
        ({"protocol": {"metrics": ["AJ", "delta_avg", "OA"], "queried": "strided"}}, "different protocols"),
        ({"rows": []}, "no video in common"),
        ({"schema": 2}, "b is no result of `trackpl test --benchmark`: it has not the schema 1"),
        ({"protocol": {}}, "has not the metrics AJ"),
        ({"rows": [{"key": "v0"}]}, "has no 'AJ'"),
        ({"rows": [made([1.0])["rows"][0] | {"AJ": "high"}]}, "'AJ' of v0 must be a number"),
    ],
)
def test_what_cannot_be_compared_is_refused(changes, message, mistake):
    save("a", made([1.0, 2.0]))
    save("b", made([1.0, 2.0], **changes))
    assert message in mistake("test", "--compare", "a", "b")


def test_what_is_no_result_is_named(mistake):
    save("a", made([1.0]))
    Path("broken").write_bytes(b"{")
    Path("empty").mkdir()
    assert "no result at nowhere" in mistake("test", "--compare", "a", "nowhere")
    assert "no result at empty" in mistake("test", "--compare", "a", "empty")
    assert "broken is no result" in mistake("test", "--compare", "broken", "a")
    assert "takes two results, got 1" in mistake("test", "--compare", "a")


def test_tasks_need_truth(tmp_path):
    clip = Clip(torch.zeros(1, 2, 3, 16, 16, dtype=torch.uint8))
    index = write_shards(tmp_path, "set", [("clip", encode(clip, None))])
    with pytest.raises(DataError, match="has no tracks to score"):
        read_task(find("synthetic"), read_index(index).samples[0])
    with pytest.raises(Error, match="no benchmark is called 'x'"):
        find("x")
