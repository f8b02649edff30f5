"""The method: its flow against the golden, its losses, its contract."""

from pathlib import Path

import numpy as np
import pytest
import torch
from golden.fill import fill_
from lightning import Trainer
from torch.utils.data import DataLoader
from trackpl_crw.method import MultiscaleCRW, working_size

import trackpl
from trackpl.errors import DataError, Error
from trackpl.testing import check_method, moving_clip

GOLDEN = Path(__file__).parent / "golden" / "crw"
SMALL = {"levels": 2, "resolution": None, "propagation": {"resolution": None}}


@pytest.fixture(scope="module")
def filled():
    method = MultiscaleCRW(resolution=None).eval()
    state = method.state_dict()
    fill_(state, list(state), {"feature_pyramid_extractor.": 1.4})
    method.load_state_dict(state)
    return method


def test_flow_equals_the_golden(filled):
    d = {k: torch.from_numpy(v) for k, v in np.load(GOLDEN / "c2f_nonparam.npz").items()}
    embedded = filled.embed(d["images"][:, 0].float() / 255)
    for level in range(4):
        assert (embedded[level] - d[f"emb0_l{level}"]).abs().max() < 5e-3
    flow = filled.flow(trackpl.Clip(video=d["images"]), [(0, 1), (1, 0)])
    assert (flow.xy[:, 0] - d["fw_flow"]).abs().max() < 5e-3
    assert (flow.xy[:, 1] - d["bw_flow"]).abs().max() < 5e-3


def test_conformance():
    done = check_method("crw_multiscale", **SMALL)
    assert {"check_gradients", "check_overfit", "check_checkpoint", "check_points"} <= set(done)


def test_every_level_of_every_cycle_length_is_trained():
    for frames in (2, 3, 4):
        method = MultiscaleCRW(levels=3, starts=16)
        losses = method.losses(moving_clip(frames, (64, 64)))
        assert set(losses) == {f"{k}_{s}" for k in ("crw", "smooth") for s in (16, 8, 4)}
        torch.stack(list(losses.values())).sum().backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in method.parameters())


def test_the_curriculum_takes_so_many_frames():
    clip = moving_clip(4, (64, 64))
    three = MultiscaleCRW(levels=2, curriculum={0: 3})
    plain = MultiscaleCRW(levels=2)
    plain.load_state_dict(three.state_dict())
    first = clip.map(lambda x: x[:, :3])
    for key, value in plain.losses(first).items():
        assert torch.allclose(three.losses(clip)[key], value)
    with pytest.raises(DataError, match="asks for 3 frames at step 0"):
        three.losses(moving_clip(2, (64, 64)))


def test_at_a_switch_of_the_curriculum_optimiser_and_rate_begin_anew(tmp_path):
    seen = []

    class Watched(MultiscaleCRW):
        def losses(self, clip):
            losses = super().losses(clip)
            seen.append((self._walked(clip).frames, round(self.optimizers().param_groups[0]["lr"], 7)))
            return losses

    method = Watched(levels=1, embed_dim=4, curriculum={0: 2, 3: 3})
    clips = [moving_clip(3, (32, 32), seed=i) for i in range(5)]
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = Trainer(max_epochs=1, enable_checkpointing=False, default_root_dir=tmp_path, **quiet)
    trainer.fit(method, DataLoader(clips, batch_size=None))
    rates = [1e-4, 1.002e-4, 1.004e-4, 1e-4, 1.002e-4]
    assert seen == [(k, rate) for k, rate in zip([2, 2, 2, 3, 3], rates, strict=True)]
    assert {int(v["step"]) for v in method.optimizers().state.values()} == {2}


def test_a_displaced_end_view_is_the_same_place():
    method = MultiscaleCRW(levels=3, end_view_shift=32)
    video = moving_clip(2, (96, 128)).video
    for _ in range(8):
        view, end, (x, y) = method._displaced_view(video)
        assert view.shape[-2:] == (64, 96) and max(abs(x), abs(y)) == 32
        h, w = view.shape[-2:]
        ours = view[:, 0, :, max(0, y) : h + min(0, y), max(0, x) : w + min(0, x)]
        theirs = end[:, :, max(0, -y) : h + min(0, -y), max(0, -x) : w + min(0, -x)]
        assert torch.equal(ours, theirs)  # node p of the first is node p - shift of the second


def test_a_batch_is_the_mean_of_its_clips():
    method = MultiscaleCRW(levels=2)
    both = moving_clip(2, (64, 64), batch=2)
    losses = method.losses(both)
    alone = [method.losses(both.map(lambda x, i=i: x[i : i + 1])) for i in range(2)]
    for key, value in losses.items():
        assert torch.allclose(value, (alone[0][key] + alone[1][key]) / 2, atol=1e-5)


def test_fewer_levels_are_the_fine_end_of_more(filled):
    three = MultiscaleCRW(levels=3)
    wanted = {k: v.shape for k, v in three.state_dict().items() if k.startswith("feature")}
    assert wanted == {k: v.shape for k, v in filled.state_dict().items() if k in wanted}


def test_working_size():
    assert working_size(480, 854, 512, 64) == (512, 896)
    assert working_size(10, 10, None, 64) == (128, 128)


@pytest.mark.parametrize(
    "options",
    [
        {"radius": 0},
        {"tau": 0.0},
        {"levels": 6},
        {"median": 4},
        {"levels": 3, "end_view_shift": 8},
        {"end_view_shift": -64},
        {"curriculum": {5: 2}},
        {"curriculum": {0: 1}},
    ],
)
def test_bad_options_are_refused(options):
    with pytest.raises(Error, match="crw_multiscale needs"):
        MultiscaleCRW(**options)


def test_bad_clips_are_refused():
    method = MultiscaleCRW(levels=3)
    with pytest.raises(DataError, match="2 frames or more"):
        method.losses(moving_clip(1, (64, 64)))
    with pytest.raises(DataError, match="multiples of 16"):
        method.losses(moving_clip(2, (64, 70)))
    with pytest.raises(DataError, match="outside the clip of 2 frames"):
        method.flow(moving_clip(2, (64, 64)), [(0, 2)])
    with pytest.raises(DataError, match=r"query 1 .* is outside the clip"):
        method.track(moving_clip(2, (64, 64)), torch.tensor([[[0, 1.0, 1.0], [0, 65.0, 1.0]]]))
