"""Published networks of flowwalk and ARFlow, and the walk's own weights, as the start of a regressor."""

import pytest
import torch
from lightning import Trainer
from torch.utils.data import DataLoader
from trackpl_crw.method import MultiscaleCRW
from trackpl_crw.weights import shapes

import trackpl
from trackpl.errors import CheckpointError
from trackpl.testing import moving_clip


def network(reduce_dense=True):
    generator = torch.Generator().manual_seed(0)
    return {k: 0.01 * torch.randn(s, generator=generator) for k, s in shapes(reduce_dense).items()}


def save(path, state, **more):
    torch.save({"state_dict": state, **more}, path)
    return path


@pytest.fixture(scope="module")
def arflow(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "pwclite_ar.tar"
    return save(path, network(), epoch=5)


def test_shapes_are_the_published_ones():
    wanted = shapes(True)
    assert len(wanted) == len(shapes(False)) == 60
    assert wanted["feature_pyramid_extractor.convs.5.1.0.weight"] == (192, 192, 3, 3)
    assert wanted["flow_estimators.conv4.0.weight"] == (64, 224, 3, 3)
    assert wanted["context_networks.convs.0.0.weight"] == (128, 34, 3, 3)
    assert wanted["conv_1x1.1.0.bias"] == (32,)
    assert shapes(False)["flow_estimators.conv_last.0.weight"] == (2, 563, 3, 3)
    assert shapes(False)["context_networks.convs.0.0.weight"] == (128, 565, 3, 3)


def test_arflow_is_known_by_its_names(arflow):
    method = trackpl.load("crw_multiscale", arflow, resolution=None)
    given, own = network(), method.state_dict()
    assert method.hparams["regressor"] and method.hparams["input_range"] == "unit" and method.hparams["levels"] == 5
    for key, value in given.items():
        prefix = "" if key.startswith("feature_pyramid") else "regressor."
        assert torch.equal(own[prefix + key], value)
    assert method.flow(moving_clip(2, (32, 32)), [(0, 1)]).xy.isfinite().all()


def test_heads_that_no_file_has_keep_angles(arflow):
    one, two = (trackpl.load("crw_multiscale", arflow).embed_heads for _ in range(2))
    for a, b in zip(one, two, strict=True):
        weight = a.weight[:, :, 0, 0]
        assert torch.equal(a.weight, b.weight)
        assert torch.allclose(weight @ weight.T, torch.eye(len(weight)), atol=1e-5)
        assert not a.bias.any()


@pytest.mark.parametrize("reduce_dense", [True, False])
def test_flowwalk_is_known_by_the_end_of_its_names(tmp_path, capsys, reduce_dense):
    state = {f"model.net.{k}": v for k, v in network(reduce_dense).items()}
    state["loss.window"] = torch.zeros(3)
    method = trackpl.load("crw_multiscale", save(tmp_path / "walk.ckpt", state, epoch=3, global_step=9))
    assert method.hparams["reduce_dense"] == reduce_dense
    assert torch.equal(method.regressor.conv_1x1[4][0].bias, network(reduce_dense)["conv_1x1.4.0.bias"])
    assert "1 tensors of the checkpoint are not of this network" in capsys.readouterr().err


def test_other_names_are_known_by_position_if_all_shapes_agree(tmp_path, capsys):
    state = {f"part{i}.w": v for i, v in enumerate(network().values())} | {"more": torch.zeros(2)}
    method = trackpl.load("crw_multiscale", save(tmp_path / "walk.ckpt", state))
    assert torch.equal(method.regressor.conv_1x1[4][0].bias, network()["conv_1x1.4.0.bias"])
    assert "left out: more" in capsys.readouterr().err
    keys = list(state)
    state[keys[3]], state[keys[2]] = state[keys[2]], state[keys[3]]
    with pytest.raises(CheckpointError, match="does not fit"):
        trackpl.load("crw_multiscale", save(tmp_path / "other.ckpt", state))


def test_what_does_not_fit_is_refused(tmp_path, arflow):
    three = network() | {"flow_estimators.conv1.0.weight": torch.zeros(128, 198, 3, 3)}
    with pytest.raises(CheckpointError, match="for three frames"):
        trackpl.load("crw_multiscale", save(tmp_path / "pwclite_ar_mv.tar", three))
    few = dict(list(network().items())[:59])
    with pytest.raises(CheckpointError, match="does not fit MultiscaleCRW"):
        trackpl.load("crw_multiscale", save(tmp_path / "few.tar", few))
    with pytest.raises(CheckpointError, match="misshapen"):
        trackpl.load("crw_multiscale", arflow, embed_dim=32, reduce_dense=False)


def test_a_state_of_ours_is_left_as_it_is(tmp_path):
    method = MultiscaleCRW(levels=5, regressor=True, reduce_dense=False)
    again = trackpl.load("crw_multiscale", save(tmp_path / "bare.ckpt", method.state_dict()))
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in method.state_dict().items())
    plain = trackpl.load("crw_multiscale")
    assert plain.regressor is None and plain.import_weights(plain.state_dict()).keys() == plain.state_dict().keys()


def test_a_foreign_lightning_checkpoint_keeps_its_own_options_to_itself(tmp_path):
    state = {f"model.{k}": torch.rand(shape) for k, shape in shapes(True).items()}
    path = tmp_path / "flowwalk.ckpt"
    torch.save({"state_dict": state, "hyper_parameters": {"cfg": "theirs", "levels": 2}}, path)
    method = trackpl.load("crw_multiscale", path)
    assert method.regressor is not None and method.hparams["levels"] == 5


def fit(method, tmp_path):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = Trainer(max_steps=1, enable_checkpointing=False, default_root_dir=tmp_path, **quiet)
    trainer.fit(method, DataLoader([moving_clip(2, (48, 48))], batch_size=None))


def test_training_starts_from_the_shipped_walk(tmp_path):
    options = {"levels": 3, "regressor": True, "bound_crop": 16}
    method = MultiscaleCRW(**options, train_walk=False, start_from="shipped")
    before = method.regressor.conv_1x1[0][0].weight.clone()
    fit(method, tmp_path)
    shipped = trackpl.load("crw_multiscale")
    assert torch.equal(method.embed_heads[0].weight, shipped.embed_heads[0].weight)
    assert 0 < (method.regressor.conv_1x1[0][0].weight - before).abs().max() < 1e-3  # one step from its own start
    with pytest.raises(CheckpointError, match="does not fit"):
        fit(MultiscaleCRW(levels=2, start_from="shipped"), tmp_path)


def test_the_shipped_regressor_is_right_where_the_walk_has_nothing_to_match():
    clip, step = moving_clip(7, (128, 160)), torch.tensor([12.0, 6.0])  # frame 6 against frame 0
    stays = torch.zeros(128, 160, dtype=torch.bool)
    stays[:122, :148] = True
    error, seen = {}, {}
    for by in ("walk", "regressor"):
        flow = trackpl.load("crw_multiscale", "crw_regressor", flow_by=by, resolution=256).flow(clip, [(0, 6)])
        error[by] = (flow.xy[0, 0] - step.view(2, 1, 1)).norm(dim=0)
        seen[by] = flow.visible
    assert error["regressor"][stays].mean() < error["walk"][stays].mean() < 1.5
    assert error["regressor"][~stays].mean() < 0.3 * error["walk"][~stays].mean()
    assert seen["regressor"][0, 0][stays].mean() > 0.9 and seen["regressor"][0, 0][~stays].mean() < 0.05


def test_the_shipped_regressor_goes_with_the_shipped_walk():
    walk, both = trackpl.load("crw_multiscale"), trackpl.load("crw_multiscale", "crw_regressor")
    assert both.hparams["regress_from"] == "walk" and both.flow_by == "regressor"
    shared = walk.state_dict()
    assert all(torch.equal(both.state_dict()[k], v) for k, v in shared.items())
