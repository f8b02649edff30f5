"""Published networks that the regressor can take over: how their keys translate.

flowwalk (the authors' release) and ARFlow publish the same network: pyramid and regressor, without embedding heads.
Its 60 tensors are told by the end of their names; flowwalk's own loader goes by position, so that their beginnings are
not known: where names do not help, position counts, if all 60 shapes agree in their order.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from trackpl.errors import CheckpointError
from trackpl_crw.pwc import Regressor
from trackpl_crw.pyramid import FeaturePyramid

THREE_FRAMES = (128, 198, 3, 3)  # of flow_estimators.conv1.0.weight
TENSORS = 60


@cache
def shapes(reduce_dense: bool) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of the published network, in its order."""
    with torch.device("meta"):
        pyramid = nn.ModuleDict({"feature_pyramid_extractor": FeaturePyramid(5)}).state_dict()
        regressor = Regressor(5, reduce_dense).state_dict()
    return {k: tuple(v.shape) for k, v in (pyramid | regressor).items()}


def recognise(state: dict[str, Tensor]) -> tuple[dict[str, str], bool] | None:
    """Find the published network in a state: its keys by our names, and whether its estimator is the reduced one.

    Raises:
        CheckpointError: it is the variant for three frames.
    """
    for reduced in (True, False):
        wanted = shapes(reduced)
        found = {name: _ending(name, state) for name in wanted}
        keys = {name: key for name, key in found.items() if key is not None}
        if len(keys) == TENSORS:
            first = tuple(state[keys["flow_estimators.conv1.0.weight"]].shape)
            if first == THREE_FRAMES:
                raise CheckpointError(
                    "this is PWC-lite for three frames (ARFlow's ..._mv.tar), which takes another input; "
                    "allowed: the networks for two frames, such as pwclite_ar.tar"
                )
            if all(tuple(state[key].shape) == wanted[name] for name, key in keys.items()):
                return keys, reduced
    for reduced in (True, False):
        wanted = shapes(reduced)
        first_keys = list(state)[:TENSORS]
        if [tuple(state[k].shape) for k in first_keys] == list(wanted.values()):
            return dict(zip(wanted, first_keys, strict=True)), reduced
    return None


def _ending(name: str, state: dict[str, Tensor]) -> str | None:
    """Return the one key that is `name` or ends in it, or None where there is none or more."""
    keys = [k for k in state if k == name or k.endswith(f".{name}")]
    return keys[0] if len(keys) == 1 else None


def _is_ours(state: dict[str, Tensor]) -> bool:
    return any(key.startswith("embed_heads.") for key in state)


def translate(state: dict[str, Tensor], heads: nn.ModuleList) -> dict[str, Tensor]:
    """Return the state with our names; what is not of the published network is named on stderr and left out.

    The heads, which no published file has, become projections on orthonormal directions, always the same ones: they
    keep the angles between features as well as so few channels can, until they are trained.
    """
    found = None if _is_ours(state) else recognise(state)
    if found is None:
        return state
    keys, _ = found
    if rest := sorted(set(state) - set(keys.values())):
        more = ", ..." if len(rest) > 5 else ""
        print(
            f"trackpl: {len(rest)} tensors of the checkpoint are not of this network and are left out: "
            f"{', '.join(rest[:5])}{more}",
            file=sys.stderr,
        )
    pyramid = "feature_pyramid_extractor."
    ours = {name if name.startswith(pyramid) else f"regressor.{name}": state[key] for name, key in keys.items()}
    generator = torch.Generator().manual_seed(0)
    for i, head in enumerate(heads):
        assert isinstance(head, nn.Conv2d), "heads are 1x1 convolutions"
        weight = torch.empty(head.weight.shape)
        ours[f"embed_heads.{i}.weight"] = nn.init.orthogonal_(weight, generator=generator)
        ours[f"embed_heads.{i}.bias"] = torch.zeros(len(weight))
    return ours


def options_of(state: dict[str, Tensor]) -> dict[str, Any]:
    """Return the options that a published network implies, or a bare state of ours with a regressor."""
    if _is_ours(state):
        last = "regressor.flow_estimators.conv_last.0.weight"
        if not any(key.startswith("regressor.") for key in state):
            return {}
        return {"regressor": True, "reduce_dense": last not in state}
    found = recognise(state)
    if found is None:
        return {}
    return {"regressor": True, "levels": 5, "reduce_dense": found[1], "input_range": "unit", "cost_volume": "features"}
