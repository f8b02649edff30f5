"""`trackpl.load`: whole, by content, or a clear refusal."""

import json

import pytest
import torch
from safetensors.torch import save_file
from trackpl_crw.method import MultiscaleCRW

import trackpl
from trackpl.errors import CheckpointError, PluginError
from trackpl.testing import check_mirror, moving_clip

CLASS = "trackpl_crw.method.MultiscaleCRW"
OPTIONS = {"levels": 2, "embed_dim": 8, "resolution": None}


@pytest.fixture(scope="module")
def method():
    torch.manual_seed(0)
    return MultiscaleCRW(**OPTIONS).eval()


def flow(method):
    return method.flow(moving_clip(2, (64, 64)), [(0, 1)]).xy


def test_shipped_weights_track_a_moving_plane_and_its_mirror_image():
    method = trackpl.load("crw_multiscale", resolution=256)
    assert not method.training
    clip = moving_clip(4, (128, 160), points=32)
    queries = torch.cat([torch.zeros(1, 32, 1), clip.tracks[:, 0]], -1)
    tracks = method.track(clip, queries)
    assert (tracks.xy - clip.tracks).norm(dim=-1).median() < 1
    assert (tracks.visible > 0.5).float().mean() > 0.9
    check_mirror(method)


@pytest.mark.parametrize("form", ["lightning", "bare", "nested", "safetensors"])
def test_every_form_of_checkpoint_loads_whole(method, tmp_path, form):
    state, path = method.state_dict(), tmp_path / "weights.ckpt"
    if form == "safetensors":
        path = tmp_path / "weights.safetensors"
        save_file(state, path, metadata={"class_path": CLASS, "init_args": json.dumps(OPTIONS)})
    elif form == "lightning":
        torch.save({"state_dict": state, "hyper_parameters": {"_class_path": CLASS, **OPTIONS}, "epoch": 1}, path)
    else:
        torch.save(state if form == "bare" else {"model": state}, path)
    options = OPTIONS if form in ("bare", "nested") else {}
    assert torch.equal(flow(trackpl.load("crw_multiscale", path, **options)), flow(method))


def test_options_given_go_before_those_of_the_checkpoint(method, tmp_path):
    path = tmp_path / "a.ckpt"
    torch.save({"state_dict": method.state_dict(), "hyper_parameters": {"_class_path": CLASS, **OPTIONS}}, path)
    assert trackpl.load("crw_multiscale", path, stay=0.5).matcher.stay == 0.5
    with pytest.raises(CheckpointError, match=r"no option 'stya'; did you mean 'stay'\?"):
        trackpl.load("crw_multiscale", path, stya=0.5)


def test_what_does_not_fit_is_tabled_and_nothing_loaded(method, tmp_path):
    state = dict(method.state_dict())
    state["embed_heads.0.weight"] = torch.zeros(3, 3)
    state["extra"] = state.pop("embed_heads.1.bias")
    torch.save(state, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match="1 missing, 1 unexpected, 1 misshapen") as error:
        trackpl.load("crw_multiscale", tmp_path / "a.ckpt", **OPTIONS)
    text = str(error.value)
    assert "missing     embed_heads.1.bias (8,)" in text and "unexpected  extra (8,)" in text
    assert "misshapen   embed_heads.0.weight (3, 3), needed (8, 64, 1, 1)" in text


def test_a_checkpoint_of_another_method_is_named(method, tmp_path):
    path = tmp_path / "a.ckpt"
    torch.save({"state_dict": {"w": torch.ones(1)}, "hyper_parameters": {"_class_path": "other.Tracker"}}, path)
    with pytest.raises(CheckpointError, match=r"a checkpoint of method 'other.Tracker', not of 'crw_multiscale'"):
        trackpl.load("crw_multiscale", path)


class Evil:
    """Would run code when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("content", [b"", b"hello\n" * 50, b"PK\x03\x04" + b"\0" * 300, b"\x80\x02}q\x00.", None])
@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_hostile_or_broken_files_are_refused_in_one_line_and_run_nothing(tmp_path, content, suffix):
    path, flag = tmp_path / f"a{suffix}", tmp_path / "ran"
    if content is None:
        torch.save({"state_dict": {"w": Evil(flag)}}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        trackpl.load("crw_multiscale", path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert not flag.exists()


def test_names_that_do_not_exist(tmp_path):
    (tmp_path / "best.ckpt").touch()
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*bets.ckpt; did you mean 'best.ckpt'\?"):
        trackpl.load("crw_multiscale", tmp_path / "bets.ckpt")
    with pytest.raises(PluginError, match=r"did you mean 'crw_multiscale'\?"):
        trackpl.load("crw_multscale")


def test_a_published_checkpoint_says_which_options_it_was_made_with(method, tmp_path, monkeypatch):
    path = tmp_path / "published.pth"
    torch.save({"state_dict": method.state_dict()}, path)
    with pytest.raises(CheckpointError, match="does not fit"):
        trackpl.load("crw_multiscale", path)
    monkeypatch.setattr(MultiscaleCRW, "options_of", classmethod(lambda cls, state: {**OPTIONS, "radius": 4}))
    assert trackpl.load("crw_multiscale", path).hparams.radius == 4
    assert trackpl.load("crw_multiscale", path, radius=3).hparams.radius == 3
