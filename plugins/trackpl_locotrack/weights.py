"""The authors' checkpoints: where they are published, which options they imply, and how their keys translate."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from trackpl.published import Published

_FIGURES = {  # AJ / <delta_avg / OA of the JAX models at 256x256 (paper, tables 1 and 2); nobody states the port's
    "small": {"TAP-Vid DAVIS first": "62.0 / 74.3 / 86.1", "TAP-Vid DAVIS strided": "66.9 / 78.8 / 88.9"},
    "base": {"TAP-Vid DAVIS first": "63.0 / 75.3 / 87.2", "TAP-Vid DAVIS strided": "67.8 / 79.6 / 89.9"},
}
PUBLISHED = tuple(
    Published(
        name=f"locotrack_{size}",
        method="locotrack",
        address=f"https://huggingface.co/datasets/hamacojr/LocoTrack-pytorch-weights/resolve/main/locotrack_{size}.ckpt",
        licence="Apache-2.0 (of the authors' code; the page of the weights states none of its own)",
        figures={k: f"{v} (paper, of the JAX model)" for k, v in figures.items()},
        note=f"LocoTrack-{size[0].upper()} of the authors' PyTorch code, trained on Panning MOVi-E",
    )
    for size, figures in _FIGURES.items()
)

KEYS = (  # theirs (a regular expression), ours
    (r"resnet_torch\.initial_conv\.", "backbone.stem."),
    (r"resnet_torch\.block_groups\.(\d)\.blocks\.(\d)\.bn_0\.", r"backbone.groups.\1.\2.norm1."),
    (r"resnet_torch\.block_groups\.(\d)\.blocks\.(\d)\.bn_1\.", r"backbone.groups.\1.\2.norm2."),
    (r"resnet_torch\.block_groups\.(\d)\.blocks\.(\d)\.conv_0\.", r"backbone.groups.\1.\2.conv1."),
    (r"resnet_torch\.block_groups\.(\d)\.blocks\.(\d)\.conv_1\.", r"backbone.groups.\1.\2.conv2."),
    (r"resnet_torch\.block_groups\.(\d)\.blocks\.(\d)\.proj_conv\.", r"backbone.groups.\1.\2.projection."),
    (r"cost_conv\.", "initial.cost."),
    (r"occ_linear\.", "initial.visibility."),
    (r"cmdtop\.(\d)\.conv\.(\d)\.0\.", r"refinement.encoders.\1.stages.\2.conv."),
    (r"cmdtop\.(\d)\.conv\.(\d)\.1\.", r"refinement.encoders.\1.stages.\2.norm."),
    (r"torch_pips_mixer\.input_proj\.", "refinement.transformer.input."),
    (r"torch_pips_mixer\.output_proj\.", "refinement.transformer.output."),
    (r"torch_pips_mixer\.transformer\.ln_out\.", "refinement.transformer.norm."),
    (r"torch_pips_mixer\.transformer\.layers\.(\d)\.layer_norm(\d)\.", r"refinement.transformer.layers.\1.norm\2."),
    (
        r"torch_pips_mixer\.transformer\.layers\.(\d)\.attn\.(query|key|value)_proj\.",
        r"refinement.transformer.layers.\1.\2.",
    ),
    (r"torch_pips_mixer\.transformer\.layers\.(\d)\.attn\.final_proj\.", r"refinement.transformer.layers.\1.out."),
    (r"torch_pips_mixer\.transformer\.layers\.(\d)\.dense\.0\.", r"refinement.transformer.layers.\1.expand."),
    (r"torch_pips_mixer\.transformer\.layers\.(\d)\.dense\.2\.", r"refinement.transformer.layers.\1.contract."),
)


def translate(key: str) -> str:
    """Return our name of a key of the published checkpoints; a key that is not theirs stays as it is."""
    bare = key.removeprefix("model.")
    for theirs, ours in KEYS:
        name, found = re.subn(rf"^{theirs}(?=weight$|bias$)", ours, bare)
        if found:
            return name
    return key


def options_of(state: dict[str, Tensor]) -> dict[str, Any]:
    """Return the size that the width of the transformer implies, of a published checkpoint or of one of ours."""
    widths = {192: "tiny", 256: "small", 384: "base"}
    for key, value in state.items():
        if translate(key) == "refinement.transformer.norm.weight" and len(value) in widths:
            return {"size": widths[len(value)]}
    return {}
