"""Teachers label videos; the labels lie in the cache; a student learns from them."""

import csv
import json
import shutil
from itertools import islice
from pathlib import Path

import pytest
import torch
from kornia.filters import gaussian_blur2d
from plugin_site import install
from safetensors.torch import save_file

from trackpl import labelling
from trackpl.errors import Error
from trackpl.pseudo import PseudoLabels
from trackpl.shards import decode, encode, read_index, read_members, write_shards
from trackpl.teachers import Teacher, agree
from trackpl.types import Clip
from trackpl.writing import write_video

CODE = """
import torch
from torch import nn
from trackpl.method import Info, Method
from trackpl.types import Tracks


class Shift(Method):
    '''Everything moves by one learned shift, and is hidden in the last frames; `calls` counts the clips.'''

    info = Info(title="Shift", paper="", licence="Apache-2.0")
    contract = 1
    calls = []

    def __init__(self, hidden: int = 1, **kwargs) -> None:
        super().__init__(**kwargs)
        self.hidden, self.shift = hidden, nn.Parameter(torch.randn(2) * 0)
        self.save_hyperparameters("hidden")

    def losses(self, clip):
        steps = clip.tracks[:, 1:] - clip.tracks[:, :-1]
        both = clip.valid[:, 1:] & clip.valid[:, :-1]
        return {"shift": (steps[both].mean(0) - self.shift).square().sum()}

    def track(self, clip, queries):
        self.calls.append((torch.is_grad_enabled(), torch.is_autocast_enabled(clip.video.device.type)))
        t = torch.arange(clip.frames)[None, :, None]
        xy = queries[:, None, :, 1:] + (t - queries[:, None, :, 0])[..., None] * self.shift
        return Tracks(xy, (t < clip.frames - self.hidden).float().expand(xy.shape[:-1]))


class Bare(Shift):
    pass
"""
SHIFTS = {"right": (2.0, 0.0), "near": (2.25, 0.0), "down": (0.0, 1.0)}
SIZE, T = (48, 64), 8


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    points = "[trackpl.methods]\nshift = trackpl_shift:Shift\nbare = trackpl_shift:Bare\n"
    install(folder, "shift", CODE, entry_points=points)
    return folder


@pytest.fixture
def work(site, tmp_path, monkeypatch):
    """A folder to work in, with a cache of its own, weights of three teachers and the counter of their calls."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("TRACKPL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    for name, shift in SHIFTS.items():
        meta = {"class_path": "trackpl_shift.Shift", "init_args": "{}"}
        save_file({"shift": torch.tensor(shift)}, tmp_path / f"{name}.safetensors", meta)
    import trackpl_shift

    trackpl_shift.Shift.calls.clear()
    return tmp_path


@pytest.fixture
def calls(work):
    import trackpl_shift

    return trackpl_shift.Shift.calls


def teacher(name="right", **options):
    return Teacher("shift", checkpoint=f"{name}.safetensors", **options)


def moving(seed, frames=T, size=SIZE):
    """Return a texture that moves by two pixels a frame to the right, uint8 (T, 3, H, W)."""
    h, w = size
    noise = torch.randn(1, 3, h, w + 2 * frames, generator=torch.Generator().manual_seed(seed))
    smooth = gaussian_blur2d(noise, (9, 9), (1.5, 1.5))
    wide = ((0.5 + 0.2 * smooth / smooth.std()).clamp(0, 1) * 255).byte()[0]
    return torch.stack([wide[..., 2 * (frames - t) : 2 * (frames - t) + w] for t in range(frames)])


def make_set(folder, videos):
    samples = [(f"v{i:02d}", encode(Clip(video=v[None], name=(f"v{i}",), fps=10.0))) for i, v in enumerate(videos)]
    return str(write_shards(Path(folder), "set", samples, samples_per_shard=4))


def module(videos, teachers=None, **options):
    given = {"label_points": 16, "label_frames": T, "frames": T, "points": None, "batch_size": 1, "workers": 0}
    teachers = [teacher()] if teachers is None else teachers
    return PseudoLabels(videos, teachers, **given | {"val": {}} | options)


def labels(data):
    """Label, and return the clips of each set of labels."""
    data.prepare_data()
    return [[decode(read_members(s)) for s in read_index(a).samples] for a in data.addresses["train"]]


# Labels ----------------------------------------------------------------------------------------------------------


def test_a_clip_gets_the_tracks_of_its_teacher(work, calls):
    videos = [moving(i) for i in range(3)]
    (clips,) = labels(module(make_set("set", videos)))
    assert len(clips) == 3 and calls == [(False, True)] * 3
    for i, (clip, video) in enumerate(zip(clips, videos, strict=True)):
        assert clip.name == (f"v{i}@0",) and clip.fps == 10 and clip.video.shape[1:] == video.shape
        assert (clip.video[0].float() - video.float()).abs().mean() < 4
        t, xy = clip.queries[0, :, 0], clip.queries[0, :, 1:]
        assert clip.queries.shape == (1, 16, 3) and t.max() <= T // 4
        steps = torch.arange(T)[:, None] - t
        truth = xy + steps[..., None] * torch.tensor([2.0, 0.0])
        assert torch.allclose(clip.tracks[0], truth, atol=1e-4) and clip.valid.all()
        inside = ((truth >= 0) & (truth <= torch.tensor([64.0, 48.0]))).all(-1)
        assert torch.equal(clip.visible[0], inside & (torch.arange(T) < T - 1)[:, None])


def test_a_second_run_labels_nothing(work, calls, monkeypatch):
    index = make_set("set", [moving(i) for i in range(2)])
    first = module(index, held_out=index)
    first.prepare_data()
    assert len(calls) == 2  # the held-out videos are the same here
    calls.clear()
    other = module(index)  # as in another process
    other.setup("fit")
    assert other.addresses["train"] == first.addresses["train"] and not calls
    assert len(list(other.train_dataloader())) == 2
    shutil.copytree("set", "moved")
    module("moved").prepare_data()  # the same videos elsewhere
    assert not calls
    for change in ({"label_seed": 1}, {"label_points": 8}, {"queries": "uniform"}, {"label_size": 32}, {"bf16": False}):
        module(index, **change).prepare_data()
        assert len(calls) == 2, change
        calls.clear()
    module(index, [teacher(threshold=0.7)]).prepare_data()
    save_file({"shift": torch.ones(2)}, "right.safetensors", {"class_path": "trackpl_shift.Shift", "init_args": "{}"})
    module(index).prepare_data()  # other weights under the same name
    assert len(calls) == 4


def test_a_killed_run_goes_on(work, calls, monkeypatch):
    monkeypatch.setattr(labelling, "_PER_SHARD", 2)
    index = make_set("set", [moving(i, frames=2) for i in range(9)])
    whole = labels(module(index, label_frames=2, frames=2, label_seed=0))
    shutil.rmtree("cache")
    calls.clear()
    read = labelling.Labeller.read

    def killed(self, number, start):
        if number == 5:
            raise KeyboardInterrupt
        return read(self, number, start)

    with monkeypatch.context() as patch:
        patch.setattr(labelling.Labeller, "read", killed)
        with pytest.raises(KeyboardInterrupt):
            module(index, label_frames=2, frames=2).prepare_data()
    assert len(calls) == 5
    again = labels(module(index, label_frames=2, frames=2))
    assert len(calls) == 5 + 5  # the last of the interrupted shard anew
    for a, b in zip(whole[0], again[0], strict=True):
        assert a.name == b.name and torch.equal(a.tracks, b.tracks) and torch.equal(a.video, b.video)


def test_long_videos_are_cut_and_large_ones_shrunk(work):
    videos = [moving(0, frames=5), moving(1, frames=19, size=(96, 128)), moving(2, frames=21)]
    (clips,) = labels(module(make_set("set", videos), label_size=64))
    names = [(c.name[0], c.frames) for c in clips]
    assert names == [("v0@0", 5), ("v1@0", 8), ("v1@11", 8), *((f"v2@{s}", 8) for s in (0, 6, 13))]
    assert {c.size for c in clips} == {(48, 64)}
    assert ((clips[1].queries[..., 1:] > 0) & (clips[1].queries[..., 1:] < 64)).all()
    (few,) = labels(module(make_set("set", videos), label_size=64, label_clips=2))
    assert [c.name[0] for c in few] == ["v0@0", "v2@0"]


def test_clips_with_too_few_corners_are_left_out_and_counted(work, caplog):
    flat = torch.full((T, 3, *SIZE), 100, dtype=torch.uint8)
    index = make_set("set", [moving(0), flat, moving(1)])
    (clips,) = labels(module(index))
    assert [c.name[0] for c in clips] == ["v0@0", "v2@0"]
    assert "1 of 3 clips are left out" in caplog.text and "'v01' from frame 0 on has 0 corners" in caplog.text
    (clips,) = labels(module(index, queries="uniform"))
    assert len(clips) == 3 and len(clips[1].queries[0, :, 0].unique()) > 3
    with pytest.raises(Error, match=r"corners.*ask for fewer points"):
        module(make_set("flat", [flat])).prepare_data()


def test_labelling_leaves_the_training_as_it_is(work):
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    module(make_set("set", [moving(0)])).prepare_data()
    assert torch.equal(before, torch.random.get_rng_state())


# Several teachers ------------------------------------------------------------------------------------------------


def test_at_random_each_teacher_has_its_share(work):
    data = module(make_set("set", [moving(i) for i in range(2)]), [teacher("right"), teacher("down")])
    right, down = labels(data)
    assert len(right) == len(down) == 2 and data.weights == [0.5, 0.5]
    again = module(data.videos, [teacher("right"), teacher("down")], steps_per_epoch=1000)
    again.setup("fit")
    loader = again.train_dataloader()
    which = [next(iter(loader.dataset.draws.batch(step))).which for step in range(1000)]
    assert which.count(0) == which.count(1) == 500
    labelled = torch.stack([clip.tracks[0, 1, 0] - clip.tracks[0, 0, 0] for clip in islice(loader, 12)])
    assert labelled.round().unique(dim=0).tolist() == [[0.0, 1.0], [2.0, 0.0]]


def test_teachers_agree_where_they_are_near(work):
    near = module(make_set("set", [moving(0)]), [teacher("right"), teacher("near")], choice="agreement", within=4.01)
    ((clip,),) = labels(near)
    steps = (torch.arange(T)[:, None] - clip.queries[0, :, 0]).abs()
    central = ((clip.tracks[0] > 2) & (clip.tracks[0] < torch.tensor([62, 46]))).all(-1)  # seen by both or by none
    assert torch.equal(clip.valid[0][central], (steps * 0.25 * 256 / 64 <= 4.01)[central]) and not clip.valid.all()
    truth = clip.queries[0, :, 1] + (torch.arange(T)[:, None] - clip.queries[0, :, 0]) * 2.125
    assert torch.allclose(clip.tracks[0, ..., 0], truth, atol=1e-4)  # their mean
    wide = module(
        near.videos, [teacher("right"), teacher("near", options={"hidden": 3})], choice="agreement", within=99
    )
    ((clip,),) = labels(wide)
    assert clip.valid[0].any(1).tolist()[: T - 3] == [True] * (T - 3)
    seen_by_one = ((clip.tracks[0] > 4) & (clip.tracks[0] < 44)).all(-1)[T - 3 : T - 1]
    assert seen_by_one.any() and not clip.valid[0, T - 3 : T - 1][seen_by_one].any()


def test_agreement_of_three_is_that_of_the_two_farthest():
    xy = torch.tensor([[[[0.0, 0.0], [9.0, 9.0]]], [[[3.0, 0.0], [9.0, 9.0]]], [[[6.0, 0.0], [float("nan"), 9.0]]]])
    seen = torch.ones(3, 1, 2, dtype=torch.bool)
    assert agree(xy, seen, (256, 256), 5.9).valid.tolist() == [[False, False]]
    assert agree(xy, seen, (256, 256), 6.1).valid.tolist() == [[True, False]]
    assert agree(xy, seen, (256, 512), 3.1).valid.tolist() == [[True, False]]  # half as wide in a frame of 256
    assert agree(xy, seen, (256, 256), 9).tracks.isfinite().all()


# Videos of one's own ---------------------------------------------------------------------------------------------


def test_a_folder_of_videos_is_packed_once(work, calls):
    for name in "ab":
        write_video(work / "mine" / f"{name}.mp4", moving(ord(name), frames=12), 10.0)
    data = module("mine", label_frames=4, frames=4)
    (clips,) = labels(data)
    assert [c.name[0] for c in clips] == [f"{n}@{s}" for n in "ab" for s in (0, 4, 8)] and clips[0].size == SIZE
    packed = list(Path("cache/videos").glob("*/videos.index.json"))
    assert len(packed) == 1
    time = packed[0].stat().st_mtime_ns
    module("mine", label_frames=4, frames=4).setup()
    assert packed[0].stat().st_mtime_ns == time and len(calls) == 6
    (work / "mine" / "b.mp4").write_bytes(b"no video")
    with pytest.raises(Error, match=r"b\.mp4.*--data\.max_broken"):
        module("mine", label_frames=4, frames=4).prepare_data()
    (clips,) = labels(module("mine", label_frames=4, frames=4, max_broken=1))
    assert [c.name[0] for c in clips] == ["a@0", "a@4", "a@8"]


# Mistakes --------------------------------------------------------------------------------------------------------


def test_mistakes_are_told(work):
    index = make_set("set", [moving(0)])
    (work / "empty").mkdir()
    for videos, teachers, options, message in (
        (None, None, {}, "no videos to learn from: set data.videos"),
        ("nowhere", None, {}, "no videos at nowhere"),
        ("empty", None, {}, "no videos and no folders of frames in empty"),
        (index, [], {}, "no teachers: set data.teachers"),
        (index, ["shfit"], {}, "no installed method is called 'shfit'; did you mean 'shift'"),
        (index, ["bare"], {}, r"teacher 'bare' ships no weights; give its weights: \{name: bare, checkpoint: FILE\}"),
        (index, [Teacher("bare", "x.ckpt")], {}, "teacher 'bare' has no weights at x.ckpt"),
        (index, [teacher(options={"hiden": 1})], {}, "no option 'hiden'; did you mean 'hidden'"),
        (index, [teacher(), teacher()], {}, "names a teacher twice"),
        (index, [teacher()], {"choice": "agreement"}, "two at least"),
        (index, None, {"frames": 9}, "span 9|spans 9 frames"),
        (index, None, {"within": 0.0}, "distance"),
        (index, None, {"label_points": 0}, "data.label_points must be at least 1"),
    ):
        with pytest.raises(Error, match=message) as error:
            module(videos, teachers, **options).prepare_data()
        assert "\n" not in str(error.value) or videos == "empty"
    assert not list(Path("cache").glob("pseudo/*/*.tar"))
    write_video(work / "mine" / "a.mp4", moving(0), 10.0)
    with pytest.raises(Error, match="ships no weights"):
        module("mine", ["bare"]).prepare_data()
    assert not list(Path("cache/videos").glob("*/*.tar"))  # nothing was packed in vain


def test_broken_shards_stop_it(work):
    index = Path(make_set("set", [moving(i) for i in range(3)]))
    sample = read_index(index).samples[1]
    content = bytearray(Path(sample.shard.address).read_bytes())
    offset, size = sample.members["rgb.bin"]
    content[offset : offset + size] = bytes(size)
    Path(sample.shard.address).write_bytes(content)
    with pytest.raises(Error, match=r"1 of 3 samples are broken.*v01"):
        module(str(index)).prepare_data()


# From end to end -------------------------------------------------------------------------------------------------


def test_a_student_learns_what_its_teacher_says(work, capsys):
    from trackpl import cli

    for i in range(3):
        write_video(work / "mine" / f"{i}.mp4", moving(i), 10.0)
    write_video(work / "other" / "last.mp4", moving(7), 10.0)
    teachers = [{"name": "shift", "checkpoint": "right.safetensors"}]
    config = {
        "model": {
            "class_path": "shift",
            "init_args": {"optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.2}}},
        },
        "data": {
            "class_path": "trackpl.pseudo.PseudoLabels",
            "init_args": {
                "teachers": teachers, "label_frames": 8, "label_points": 16, "frames": 4, "workers": 0, "val": {},
            },
        },
        "trainer": {"max_steps": 20, "accelerator": "cpu", "log_every_n_steps": 5},
    }  # fmt: skip
    Path("student.yaml").write_text(json.dumps(config))
    status = cli.main(["fit", "--config", "student.yaml", "--data.videos", "mine", "--data.held_out", "other"])
    assert status == 0, capsys.readouterr().err
    (run,) = Path("runs/shift").iterdir()
    with open(run / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    figures = [float(r["val/held_out_shift/delta_avg"]) for r in rows if r.get("val/held_out_shift/delta_avg")]
    assert figures[-1] > 0.99
    learned = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]["shift"]
    assert torch.allclose(learned, torch.tensor([2.0, 0.0]), atol=0.02)
