"""The authors' checkpoints: where they are published, which options they imply, and how their keys translate."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

SOURCES = {
    size: {
        "url": f"https://huggingface.co/datasets/hamacojr/LocoTrack-pytorch-weights/resolve/main/locotrack_{size}.ckpt",
        "licence": "Apache-2.0 (the authors' code, cvlab-kaist/locotrack; the weights' page states none of its own)",
        "about": f"LocoTrack-{size[0].upper()} of the authors' PyTorch port, trained on Panning MOVi-E",
    }
    for size in ("small", "base")
}

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
    widths = {256: "small", 384: "base"}
    for key, value in state.items():
        if translate(key) == "refinement.transformer.norm.weight" and len(value) in widths:
            return {"size": widths[len(value)]}
    return {}
