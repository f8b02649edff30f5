"""The authors' checkpoints: where they are published, which options they imply, and how their keys translate."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from trackpl.published import Published

LICENCE = "CC-BY-NC-4.0"

_VERSION1 = "https://dl.fbaipublicfiles.com/cotracker"
_VERSION2 = "https://huggingface.co/facebook/cotracker/resolve/main"
_VERSION3 = "https://huggingface.co/facebook/cotracker3/resolve/main"
_SINGLE = "(AJ / <delta_avg / OA; paper, protocol single, --threshold 0.9)"


def _published(
    name: str, address: str, note: str, figures: dict[str, str] | None = None, options: dict[str, Any] | None = None
) -> Published:
    return Published(name, "cotracker", address, LICENCE, figures=figures or {}, note=note, options=options or {})


def _figures(values: dict[str, str], source: str) -> dict[str, str]:
    return {benchmark: f"{value} {source}" for benchmark, value in values.items()}


PUBLISHED = (
    _published(
        "cotracker_stride_4_wind_8",
        f"{_VERSION1}/cotracker_stride_4_wind_8.pth",
        "version 1, the model of the paper",
        _figures(
            {
                "TAP-Vid DAVIS first": "60.6 / 75.4 / 89.3",
                "TAP-Vid DAVIS strided": "64.8 / 79.1 / 88.7",
                "TAP-Vid Kinetics first": "48.7 / 64.3 / 86.5",
            },
            _SINGLE,
        ),
    ),
    _published(
        "cotracker_stride_4_wind_12",
        f"{_VERSION1}/cotracker_stride_4_wind_12.pth",
        "version 1 with windows of 12; under another file name give window=12",
        options={"window": 12},
    ),
    _published(
        "cotracker_stride_8_wind_16",
        f"{_VERSION1}/cotracker_stride_8_wind_16.pth",
        "version 1, fast; under another file name give stride=8",
        _figures({"TAP-Vid DAVIS first": "51.2 / 68.5 / 85.2"}, _SINGLE),
        options={"stride": 8, "window": 16},
    ),
    _published(
        "cotracker2",
        f"{_VERSION2}/cotracker2.pth",
        "version 2, windows of 8",
        _figures(
            {"TAP-Vid DAVIS first": "60.9 / 75.4 / 88.4", "TAP-Vid DAVIS strided": "65.1 / 79.0 / 89.4"},
            "(AJ / <delta_avg / OA; authors' README)",
        ),
    ),
    _published(
        "cotracker2v1",
        f"{_VERSION2}/cotracker2v1.pth",
        "version 2.1, windows of 16",
        _figures({"TAP-Vid DAVIS": "76.1", "TAP-Vid Kinetics": "63.0"}, "(<delta_avg; authors' README)"),
    ),
    _published(
        "cotracker3_scaled_offline",
        f"{_VERSION3}/scaled_offline.pth",
        "version 3 offline, learned from Kubric and from real video",
        _figures({"TAP-Vid DAVIS": "76.9", "TAP-Vid Kinetics": "67.8"}, "(<delta_avg; authors' README)"),
    ),
    _published(
        "cotracker3_scaled_online",
        f"{_VERSION3}/scaled_online.pth",
        "version 3 online, learned from Kubric and from real video",
        _figures({"TAP-Vid DAVIS": "76.7", "TAP-Vid Kinetics": "68.3"}, "(<delta_avg; authors' README)"),
    ),
    _published(
        "cotracker3_baseline_offline",
        f"{_VERSION3}/baseline_offline.pth",
        "version 3 offline, learned from Kubric alone",
    ),
    _published(
        "cotracker3_baseline_online", f"{_VERSION3}/baseline_online.pth", "version 3 online, learned from Kubric alone"
    ),
)

_ATTENTION = ((r"to_q", "q"), (r"to_kv", "kv"), (r"to_out|proj", "out"))
_BLOCKS = {
    "time_blocks": "time",
    "space_blocks": "space",
    "space_virtual_blocks": "among_virtual",
    "space_point2virtual_blocks": "to_points",
    "space_virtual2point_blocks": "to_virtual",
}
KEYS = (  # theirs (a regular expression), ours
    (r"fnet\.conv1\.", "encoder.stem."),
    (r"fnet\.conv2\.", "encoder.mix."),
    (r"fnet\.conv3\.", "encoder.head."),
    *((rf"fnet\.layer{i + 1}\.(\d)\.(conv\d)\.", rf"encoder.stages.{i}.\1.\2.") for i in range(4)),
    *((rf"fnet\.layer{i + 1}\.(\d)\.downsample\.0\.", rf"encoder.stages.{i}.\1.shortcut.") for i in range(4)),
    (r"updateformer\.input_transform\.", "transformer.input."),
    *(
        (rf"updateformer\.{block}\.(\d+)\.(?:cross_)?attn\.(?:{part})\.", rf"transformer.{ours}.\1.attention.{name}.")
        for block, ours in _BLOCKS.items()
        for part, name in _ATTENTION
    ),
    *(
        (rf"updateformer\.{block}\.(\d+)\.mlp\.fc{i}\.", rf"transformer.{ours}.\1.mlp.{name}.")
        for block, ours in _BLOCKS.items()
        for i, name in ((1, "expand"), (2, "contract"))
    ),
    *(
        (rf"updateformer\.{block}\.(\d+)\.norm_context\.", rf"transformer.{ours}.\1.context_norm.")
        for block, ours in _BLOCKS.items()
    ),
    (r"norm\.", "update_norm."),
    (r"(?:ffeat|track_feat)_updater\.0\.", "update."),
    (r"vis_predictor\.0\.", "visible."),
    (r"corr_mlp\.fc1\.", "correlation.expand."),
    (r"corr_mlp\.fc2\.", "correlation.contract."),
    (r"updateformer\.vis_conf_head\.", "judge."),
)
MOTION = {1: "transformer.output", 2: "output", 3: "move"}  # theirs is updateformer.flow_head, whatever the version
VIRTUAL = "updateformer.virual_tracks"  # as they spell it
TABLES = ("time_emb", "pos_emb")  # which we compute


def translate(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a published state under our names; a key that is not theirs stays as it is."""
    version, ours = version_of(state), {}
    for key, value in state.items():
        bare = key.removeprefix("module.")
        if version is not None and bare in TABLES:
            continue
        joined = re.fullmatch(r"updateformer\.(time|space)_blocks\.(\d+)\.attn\.qkv\.(weight|bias)", bare)
        if joined:
            dim = len(value) // 3
            name = f"model.transformer.{joined[1]}.{joined[2]}.attention"
            ours[f"{name}.q.{joined[3]}"], ours[f"{name}.kv.{joined[3]}"] = value[:dim], value[dim:]
        else:
            ours[_name(bare, version) or key] = value
    return ours


def _name(key: str, version: int | None) -> str | None:
    """Return our name of a published key, or None."""
    if key == VIRTUAL:
        return "model.transformer.virtual"
    if version is not None and (found := re.fullmatch(r"updateformer\.flow_head\.(weight|bias)", key)):
        return f"model.{MOTION[version]}.{found[1]}"
    for theirs, ours in KEYS:
        name, count = re.subn(rf"^{theirs}(?=(weight|bias)$)", ours, key)
        if count:
            return f"model.{name}"
    return None


def version_of(state: dict[str, Tensor]) -> int | None:
    """Return the version of a published checkpoint, or None if it is not one."""
    keys = {key.removeprefix("module.") for key in state}
    if "updateformer.input_transform.weight" not in keys:
        return None
    if "corr_mlp.fc1.weight" in keys:
        return 3
    return 2 if VIRTUAL in keys else 1


def options_of(state: dict[str, Tensor]) -> dict[str, Any]:
    """Return the version of a published checkpoint and, by its table of times, the window and mode of 2 and 3.

    The three checkpoints of version 1 are alike but for their values: only their file names tell stride and window.
    """
    version = version_of(state)
    if version is None:
        return {}
    times = next((v for k, v in state.items() if k.removeprefix("module.") == "time_emb" and v.ndim == 3), None)
    options: dict[str, Any] = {"version": version} | ({"entangled": True} if version == 1 else {})
    if times is not None and version > 1:
        options["window"] = times.shape[1]
    if version == 3:
        options["mode"] = "online" if times is not None and times.shape[1] != 60 else "offline"
    return options
