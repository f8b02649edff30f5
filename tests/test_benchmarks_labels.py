"""Benchmarks of label propagation: DAVIS and JHMDB, by `trackpl test` on tiny converted trees."""

import io
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from trackpl_prep import davis, jhmdb
from trackpl_prep.convert import convert

from trackpl import evaluation
from trackpl.benchmarks import find
from trackpl.encoding import encode
from trackpl.errors import DataError, Error
from trackpl.method import Info, Method
from trackpl.metrics.segmentation import jf_scores
from trackpl.protocols import aggregate
from trackpl.protocols.pose import Task
from trackpl.shards import read_index, write_shards
from trackpl.types import Clip, Tracks

pytest_plugins = ["tiny_site"]
pytestmark = pytest.mark.usefixtures("work")

GOLDEN = Path(__file__).parent / "golden"
OWN, SQUARE = {"input_size": None}, {"input_size": [320, 320]}


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "data_metrics" / "formats.npz") as arrays:
        return {k: arrays[k] for k in arrays.files if k.startswith(("davis2017__", "jhmdb__"))}


@pytest.fixture(scope="module")
def sets(golden, tmp_path_factory):
    """Make a DAVIS of two sequences of 4 frames of 24x32, and a JHMDB of clips of 5 and 4 frames of that size."""
    folder = tmp_path_factory.mktemp("labels")
    for name in ("davis2017", "jhmdb"):
        with tarfile.open(fileobj=io.BytesIO(golden[f"{name}__tar"].tobytes())) as tar:
            tar.extractall(folder, filter="data")
    return {
        "davis2017": convert(davis.DATASET, folder / "DAVIS", folder / "shards", quiet=True),
        "jhmdb": convert(jhmdb.DATASET, folder / "JHMDB", folder / "shards", quiet=True),
    }


@pytest.fixture
def bench(trackpl, work, sets):
    """Run a benchmark with the tiny method, which moves everything by `shift` a frame."""

    def run(name, *args, shift=0.0, status=0):
        path = work / f"shift{shift:g}.pt"
        torch.save({"shift": torch.full((2,), float(shift))}, path)
        base = ("test", "--benchmark", name, "--model", "tiny", "--checkpoint", path, "--device", "cpu")
        done = trackpl(*base, "--data", sets[name], "--out", "out", *args)
        assert done.status == status, done.err
        done.result = json.loads(Path("out/result.json").read_text()) if status == 0 else None
        return done

    return run


class Follows(Method):
    """Propagates labels as `maps` says, by default as they were given; keeps what it was shown."""

    info = Info(title="Follows", paper="", licence="")

    def __init__(self, maps=lambda t, given: given, grid=None):
        super().__init__()
        self.maps, self.grid, self.given, self.shown = maps, grid, None, []

    def label_size(self, size):
        return self.grid or size

    def propagate_frames(self, frames, labels):
        self.given = labels
        for t, frame in enumerate(frames):
            self.shown.append(tuple(frame.shape))
            yield self.maps(t, labels)


def task_of(sets, name, i=0, setup=OWN):
    benchmark = find(name)
    return benchmark, benchmark.read(read_index(sets[name]).samples[i], setup)


# DAVIS ------------------------------------------------------------------------------------------------------------


def test_masks_are_scored_as_the_metric_says_and_over_objects(bench, golden):
    result = bench("davis2017").result
    scores = []
    for row, name in zip(result["rows"], ("camel", "dog-x"), strict=True):
        truth = torch.from_numpy(golden[f"davis2017__{name}_labels"])
        scores.append(jf_scores(truth[:1].expand_as(truth), truth))  # a method that holds still
        assert row["queries"] == len(scores[-1]["J"])
        assert row["J"] == pytest.approx(100 * float(scores[-1]["J"].mean()))
    for name in find("davis2017").metrics:
        wanted = 100 * float(torch.cat([s[name] for s in scores]).mean())
        assert result["summary"][name] == pytest.approx(wanted, abs=1e-6), name
    assert result["way"] == "flow"  # the tiny method has flow and no propagation of its own


def test_the_table_of_davis_stands_beside_the_published_figures(bench):
    said = " ".join(bench("davis2017").out.split())
    assert "J&F J F" in said and "CRW multiscale, YouTube-VOS 57.9 - - Bian et al., 2022" in said
    assert "the benchmark has 30 videos and 61 objects, this set 2" in said and "frames/s" in said


def test_a_method_gets_the_first_masks_and_all_frames_and_its_highest_channel_counts(sets):
    benchmark, task = task_of(sets, "davis2017")
    perfect = [torch.stack([m == i for i in (0, *task.labels[0].unique()[1:])])[None].float() for m in task.labels]
    method = Follows(lambda t, given: perfect[t])
    row = evaluation.measure(benchmark, method, task, OWN)
    assert torch.equal(method.given, perfect[0]) and method.shown == [(1, 3, *task.clip.size)] * task.clip.frames
    assert row["J&F"] == 100 and row["J_recall"] == 100 and row["J_decay"] == 0
    assert benchmark.way(method) == "propagate"


@dataclass(frozen=True)
class Settings:
    """Some method's settings of propagation."""

    context: int = 7
    size: int | None = None


@pytest.mark.parametrize("name", ["davis2017", "jhmdb"])
def test_results_say_the_settings_of_a_methods_own_propagation(name):
    method = Follows()
    method.propagation = Settings(20)
    assert find(name).way(method) == "propagate (context=20, size=None)"


def test_void_in_the_first_frame_is_background_and_no_object(sets):
    benchmark, task = task_of(sets, "davis2017")
    task.labels[0, :3] = 255
    method = Follows()
    evaluation.measure(benchmark, method, task, OWN)
    assert method.given.shape[1] == 1 + len(set(task.labels[0].unique().tolist()) - {0, 255})
    assert (method.given[0, 0, :3] == 1).all()


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        (lambda t, given: given[..., :-1], "labels of shape"),
        (lambda t, given: given * torch.nan, "labels of frame 0 of 'camel' are not finite"),
    ],
)
def test_labels_that_cannot_be_scored_are_an_error(maps, message, sets):
    benchmark, task = task_of(sets, "davis2017")
    with pytest.raises(Error, match=message):
        evaluation.measure(benchmark, Follows(maps), task, OWN)


def test_sequences_without_masks_or_objects_are_named(tmp_path):
    video = torch.zeros(1, 3, 3, 16, 16, dtype=torch.uint8)
    clips = [Clip(video), Clip(video, labels=torch.zeros(1, 3, 16, 16, dtype=torch.long))]
    index = read_index(write_shards(tmp_path, "set", [(f"c{i}", encode(c, None)) for i, c in enumerate(clips)]))
    with pytest.raises(DataError, match="'c0' has no masks; the benchmark 'davis2017' needs them"):
        find("davis2017").read(index.samples[0], OWN)
    with pytest.raises(DataError, match="'c1' shows no object in its first frame"):
        find("davis2017").read(index.samples[1], OWN)


def test_a_sequence_too_short_to_score_is_undefined(bench, sets, monkeypatch):
    benchmark, task = task_of(sets, "davis2017")
    short = type(task)(Clip(task.clip.video[:, :2], name=("short",)), task.labels[:2])
    row = evaluation.measure(benchmark, Follows(), short, OWN)
    assert row["J"] is None and row["weights"]["J"] == 0
    whole = evaluation.measure(benchmark, Follows(), task, OWN)
    assert aggregate([row, whole], ["J"])["J"] == pytest.approx(whole["J"])


# JHMDB ------------------------------------------------------------------------------------------------------------


def still_pck(joints, alpha):
    """PCK of a method that holds still, pooled over clips joint by joint, frame by frame."""
    hits, count = np.zeros(15), np.zeros(15)
    for clip in joints:
        inside = ((clip[0] >= -0.5) & (clip[0] <= np.array([31.5, 23.5]))).all(-1)
        for frame in clip[1:]:
            kept = frame[inside]
            box = 0.6 * np.linalg.norm(kept.max(0) - kept.min(0))
            for j in np.flatnonzero(inside):
                hits[j] += np.linalg.norm(clip[0, j] - frame[j]) <= alpha * box
                count[j] += 1
    return 100 * np.mean(hits[count > 0] / count[count > 0])


def test_joints_that_are_tracked_score_as_by_hand(bench, golden):
    result = bench("jhmdb").result
    joints = [golden[f"jhmdb__{v}_joints"].astype(np.float64) for v in ("a_v1", "c_v3")]
    for alpha in (0.05, 0.1, 0.2):
        assert result["summary"][f"PCK@{alpha:g}"] == pytest.approx(still_pck(joints, alpha), abs=1e-3)
    assert result["way"] == "track" and result["input_size"] == [320, 320]
    outside = [~((c[0] >= -0.5) & (c[0] <= [31.5, 23.5])).all(-1) for c in joints]
    known = [15 * (len(c) - 1) for c in joints]
    share = sum(o.sum() * (len(c) - 1) for o, c in zip(outside, joints, strict=True)) / sum(known)
    assert result["summary"]["abstained"] == pytest.approx(100 * share)


def test_the_table_of_jhmdb_stands_beside_the_published_figures(bench):
    said = " ".join(bench("jhmdb").out.split())
    assert "PCK@0.05 PCK@0.1 PCK@0.2 abstained" in said
    assert "CRW multiscale, Sintel 38.0 63.1 81.4 - Bian et al., 2022" in said


def test_a_method_with_propagation_gets_maps_on_its_grid_and_joints_are_read_off_them(sets):
    benchmark, task = task_of(sets, "jhmdb", setup=SQUARE)
    method = Follows(grid=(40, 40))
    (places, found) = benchmark.predict(method, task, SQUARE)
    assert method.given.shape == (1, 16, 40, 40) and method.shown == [(1, 3, 320, 320)] * task.clip.frames
    assert found[:, task.inside].all() and not found[:, ~task.inside].any()
    h, w = task.clip.size
    off = (places[0] - task.joints[0])[task.inside].abs()
    assert (off <= torch.tensor([w / 40, h / 40]) * 1.01).all()  # a cell: the stamp is not symmetric
    assert torch.equal(places[0], places[-1])
    assert benchmark.way(method) == "propagate"


def test_joints_whose_maps_vanish_are_given_no_place_and_counted(sets):
    benchmark, task = task_of(sets, "jhmdb", setup=SQUARE)
    row = evaluation.measure(benchmark, Follows(lambda t, given: given * 0, (40, 40)), task, SQUARE)
    assert row["abstained"] == 100 and row["PCK@0.1"] is None and row["nan_predictions"] == 0
    half = evaluation.measure(benchmark, Follows(lambda t, given: given * (t < 2), (40, 40)), task, SQUARE)
    assert 0 < half["abstained"] < 100 and half["PCK@0.1"] is not None


def test_clips_are_pooled_joint_by_joint_as_the_golden_says():
    benchmark, rows = find("jhmdb"), []
    with np.load(GOLDEN / "crw" / "pck.npz") as arrays:
        for i, (h, w) in enumerate(arrays["sizes"]):
            truth, cells = (torch.from_numpy(arrays[f"{k}_{i}"]).permute(2, 1, 0) for k in ("gt", "pred"))
            found = cells[..., 0] >= 0
            video = torch.zeros(1, len(truth), 3, int(h), int(w), dtype=torch.uint8)
            task = Task(Clip(video), truth + 0.5, found[0], torch.ones_like(found))
            rows.append(benchmark.score(task, (cells / 40 * cells.new_tensor([w, h]) + 0.5, found), SQUARE))
        rows = json.loads(json.dumps([{k: None if v != v else v for k, v in row.items()} for row in rows]))
        for k, alpha in enumerate((0.05, 0.1, 0.2, 0.3, 0.4, 0.5)):
            name = f"PCK@{alpha:g}"
            assert aggregate(rows, [name])[name] == pytest.approx(arrays["pck"][k, 15], abs=1e-6)


def test_a_clip_whose_joints_all_lie_outside_is_not_asked_about(sets):
    benchmark, task = task_of(sets, "jhmdb", setup=SQUARE)
    task = Task(task.clip, task.joints, task.inside & False, task.valid)

    class Refuses(Method):
        info = Info(title="", paper="", licence="")

        def track(self, clip, queries):
            raise AssertionError(f"asked for {queries.shape[1]} points")

    row = evaluation.measure(benchmark, Refuses(), task, SQUARE)
    assert row["queries"] == 0 and row["abstained"] == 100 and row["PCK@0.2"] is None


def test_places_that_are_no_numbers_are_counted_and_missed(sets):
    benchmark, task = task_of(sets, "jhmdb", setup=SQUARE)

    class Nowhere(Method):
        info = Info(title="", paper="", licence="")

        def track(self, clip, queries):
            xy = torch.full((1, clip.frames, queries.shape[1], 2), torch.nan)
            return Tracks(xy, torch.ones(xy.shape[:-1]))

    row = evaluation.measure(benchmark, Nowhere(), task, SQUARE)
    assert row["nan_predictions"] == task.clip.frames * int(task.inside.sum()) and row["abstained"] == 100


def test_a_method_that_gives_nothing_is_told_so(sets):
    class Nothing(Method):
        info = Info(title="Nothing", paper="", licence="")

    for name, setup in (("jhmdb", SQUARE), ("davis2017", OWN)):
        benchmark, task = task_of(sets, name, setup=setup)
        with pytest.raises(Error, match=r"Nothing has neither"):
            evaluation.measure(benchmark, Nothing(), task, setup)


def test_maps_of_another_shape_or_of_too_few_frames_are_an_error(sets):
    benchmark, task = task_of(sets, "jhmdb", setup=SQUARE)
    with pytest.raises(Error, match=r"maps of 5 frames of \(16, 40, 39\) for 5 of \(16, 40, 40\)"):
        evaluation.measure(benchmark, Follows(lambda t, given: given[..., 1:], (40, 40)), task, SQUARE)

    class Stops(Follows):
        def propagate_frames(self, frames, labels):
            yield from ()

    with pytest.raises(Error, match=r"maps of 0 frames of nothing for 5"):
        evaluation.measure(benchmark, Stops(grid=(40, 40)), task, SQUARE)
    benchmark, task = task_of(sets, "davis2017")
    with pytest.raises(Error, match=r"labels of 0 frames for 4"):
        evaluation.measure(benchmark, Stops(), task, OWN)
