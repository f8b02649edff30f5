"""Kubric's MOVi-E and MOVi-F, the panning MOVi-E and TAP-Vid-Kubric, from TFDS folders of TFRecords as published.

Tracks are not in the records: `trackpl_prep.movi_tracks` computes them from the annotations. What is random in a clip
depends on the seed and the name of its video alone.
"""

from __future__ import annotations

import hashlib
import re
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from trackpl.errors import DataError
from trackpl_prep import movi_tracks
from trackpl_prep.dataset import Dataset, Item, Samples, folder_error, key_of, quality_option
from trackpl_prep.files.tfrecord import read_record, record_offsets
from trackpl_prep.movi_records import SCENE, flow_of, read_features, scene_of

LICENCE = "MOVi, google-research/kubric: Apache-2.0 (the code; no other licence is stated with the records)"
FPS = 12.0
LAYOUT = """
{name}/                                                  (this folder, or one below)
  {size}x{size}/1.0.0/
    {name}-train.tfrecord-00000-of-01024 ...
    {name}-validation.tfrecord-00000-of-NNNNN ...        (all files of the split)
    dataset_info.json, features.json                     (not needed)
"""
_RECORDS = re.compile(r"(?P<name>[\w.]+)-(?P<split>[a-z]+)\.tfrecord-(?P<number>\d{5})-of-(?P<count>\d{5})")
_FARTHEST = 5000  # pixels; DELTA leaves out clips with tracks beyond that
_LONGEST = 511  # pixels of a motion that flow in fixed point holds at full resolution


def options(parser: ArgumentParser, split: str = "train", points: int = 2048, lossless: bool = False) -> None:
    """Add the options, with what differs between the data sets."""
    add = parser.add_argument
    add("--split", choices=("train", "validation", "test"), default=split, help="which part of the set")
    add("--resolution", type=int, metavar="PIXELS", help="which of several folders, such as 256 for 256x256")
    add("--incomplete", action="store_true", help="take the record files that are there, though some are missing")
    add("--points", type=int, default=points, metavar="N", help="tracks in each clip, at most")
    add("--fraction", type=float, default=0.1, help="share of an object's pixels tracked, at most")
    add("--snap", action="store_true", help="near an edge track what is in front (snap_to_occluder)")
    add("--seed", type=int, default=0, help="another seed gives other tracks")
    add("--dense", choices=("none", "first", "last", "both"), default="none", help="dense tracks of these frames")
    add("--flow", choices=("none", "computed", "published"), default="none", help="flow to the frames before and after")
    quality_option(parser)
    add("--lossless", action=BooleanOptionalAction, default=lossless, help="keep the original PNG frames")
    for field in ("depth", "labels", "camera"):
        add(f"--{field}", action=BooleanOptionalAction, default=True, help=f"keep the {field}")
    add("--aspect", choices=("renderer", "challenge"), help="focal length of frames that are not square")


# Finding records --------------------------------------------------------------------------------------------


def items(source: Path, options: Namespace, name: str, layout: str) -> list[Item]:
    """List the records of a split: (file, offset, number in the file). `name` of the files; any if empty."""
    if not 1 <= options.points <= 2**20 or not 0 < options.fraction <= 1 or options.seed < 0:
        raise DataError("--points must be in 1..1048576, --fraction in (0, 1], --seed 0 or more")
    files = _record_files(source, options, name, layout)
    out: list[Item] = []
    for file in files:
        relative = file.relative_to(source).as_posix()
        out += [(relative, offset, number) for number, offset in enumerate(record_offsets(file))]
    return out


def _record_files(source: Path, options: Namespace, name: str, layout: str) -> list[Path]:
    """Find the record files of a split, in order, and complete."""
    every = [(p, m) for p in sorted(source.rglob("*.tfrecord-*")) if (m := _RECORDS.fullmatch(p.name))]
    ours = [(p, m) for p, m in every if name in ("", m["name"])]
    folders: dict[Path, dict[int, tuple[Path, int]]] = {}
    for path, match in ours:
        if match["split"] == options.split and _has_resolution(path, options.resolution):
            files = folders.setdefault(path.parent, {})
            if int(match["number"]) in files:
                raise folder_error(layout, f"{path.parent} holds two editions of file {match['number']}; keep one")
            files[int(match["number"])] = path, int(match["count"])
    if not folders:
        raise folder_error(layout, _what_is_missing(source, options, name, every, ours))
    if len(folders) > 1:
        found = ", ".join(str(f.relative_to(source)) for f in folders)
        raise folder_error(layout, f"{source} holds several editions ({found}); name one of them, or --resolution")
    ((folder, files),) = folders.items()
    counts = {count for _, count in files.values()}
    missing = sorted(set(range(max(counts))) - set(files))
    if len(counts) > 1 or max(files) >= min(counts):
        raise folder_error(layout, f"{folder} mixes editions of {sorted(counts)} files; keep one")
    if missing and not options.incomplete:
        what = f"{folder} lacks {len(missing)} of the {max(counts)} files of '{options.split}', first {missing[0]:05d}"
        raise folder_error(layout, f"{what} (--incomplete takes what is there)")
    return [files[number][0] for number in sorted(files)]


def _has_resolution(path: Path, resolution: int | None) -> bool:
    return resolution is None or f"{resolution}x{resolution}" in path.absolute().parts


def _what_is_missing(source: Path, options: Namespace, name: str, every: list[Any], ours: list[Any]) -> str:
    """Say why no record file fits."""
    wanted = f"'{name or '*'}-{options.split}.tfrecord-*'"
    size = f" under a folder {options.resolution}x{options.resolution}" if options.resolution else ""
    if ours:
        others = sorted({f"{m['split']} in {p.parent.name}" for p, m in ours})
        return f"{source} has no files {wanted}{size}, only {', '.join(others[:8])}"
    if every:
        return f"{source} has no files {wanted}, only those of {', '.join(sorted({m['name'] for _, m in every})[:8])}"
    if any(source.rglob("*.array_record-*")):
        return f"{source} holds array_record files; the published TFRecord files are read"
    return f"{source} has no files {wanted}{size}"


# Making samples ---------------------------------------------------------------------------------------------


def read(source: Path, item: Item, options: Namespace, name: str, queries: bool) -> Samples:
    """Make the sample of one record."""
    relative, offset, number = str(item[0]), int(item[1]), int(item[2])
    file = source / relative
    label = f"{file}, record {number}"
    facts = ("metadata/video_name", "background", "instances/asset_id")
    frames = ("video/png",) if options.lossless else ("video",)
    flows = ("forward_flow", "backward_flow") if options.flow == "published" else ()
    wanted = [*SCENE, *facts, *frames, *flows, *(f"metadata/{flow}_range" for flow in flows)]
    features = read_features(read_record(file, offset, number), wanted, label, optional=facts[1:])
    video = bytes(features["metadata/video_name"]).decode("utf-8", "replace")
    scene = scene_of(features, label, options.aspect)
    about = {"dataset": name, "file": file.name, "record": number, "video": video}
    if "background" in features:
        about["background"] = bytes(features["background"]).decode("utf-8", "replace")
    about["assets"] = [bytes(a).decode("utf-8", "replace") for a in features.get("instances/asset_id", ())]
    part = file.name.rpartition("tfrecord-")[2][:5]
    key = key_of(options.split, part, f"{number:03d}")
    yield key, sample_of(scene, features, options, about, label, queries=queries)


def sample_of(
    scene: movi_tracks.Scene,
    features: Mapping[str, np.ndarray],
    options: Namespace,
    about: Mapping[str, Any],
    label: str,
    *,
    queries: bool = False,
    fps: float = FPS,
    licence: str = LICENCE,
) -> dict[str, bytes]:
    """Make a sample of a scene: its video and every truth that the options ask for.

    Args:
        scene: the annotations.
        features: "video" (T, H, W, 3) or "video/png", the original frames; published flow, where it is asked for.
        options: as `options` adds them.
        about: facts of the original; "video" names the clip and, with the seed, decides what is random.
        label: the clip in messages.
        queries: store where the tracks were begun, as benchmarks need it.
        fps: frames a second.
        licence: goes along with the sample.
    """
    import torch

    from trackpl.encoding import decode_image, encode
    from trackpl.types import Camera, Clip

    def batch(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values))[None]

    digest = hashlib.sha256(str(about["video"]).encode()).digest()
    rng = np.random.default_rng([options.seed, int.from_bytes(digest[:8], "big")])
    pixels, begun = movi_tracks.sample(scene, options.points, rng, fraction=options.fraction, snap=options.snap)
    points = movi_tracks.track(scene, pixels, snap=options.snap)
    images = list(features["video/png"]) if options.lossless else None
    frames = features["video"] if images is None else np.stack([decode_image(i, label) for i in images])
    fields: dict[str, Any] = {"depth": None, "labels": None, "camera": None}
    if options.depth:
        fields["depth"] = batch(movi_tracks.depth_map(scene)[:, None])
    if options.labels:
        fields["labels"] = batch(scene.segments)
    if options.camera:
        fields["camera"] = Camera(*map(batch, movi_tracks.pinhole(scene)))
    if queries:
        fields["queries"] = batch((begun[:, [0, 2, 1]] + np.array([0, 0.5, 0.5])).astype(np.float32))
    clip = Clip(
        video=batch(frames.transpose(0, 3, 1, 2)),
        tracks=batch(points.xy.transpose(0, 2, 1)),
        visible=batch(~points.hidden),
        valid=batch(_known(points)),
        track_depth=batch(points.z),
        flow=_flow(scene, features, options, label),
        name=(str(about["video"]),),
        fps=fps,
        **fields,
    )
    return encode(clip, options.quality, licence, images=images, source=about)


def _known(points: movi_tracks.Points) -> np.ndarray:
    """Say where positions mean something, (T, N): before the camera, and not so far off that losses would burst."""
    return (points.z > 0) & (np.abs(points.xy).max(1) <= _FARTHEST)


def _flow(scene: movi_tracks.Scene, features: Mapping[str, np.ndarray], options: Namespace, label: str) -> Any:
    """Return the flow that the options ask for: dense tracks of the first or last frame, and to the next frames."""
    import torch

    from trackpl.types import Flow

    last, (h, w) = scene.frames - 1, scene.size
    dense = {"none": (), "first": (0,), "last": (last,), "both": (0, last)}[options.dense]
    pairs = {(s, t) for s in dense for t in range(last + 1)}
    if options.flow != "none":
        pairs |= {(s, t) for s in range(last + 1) for t in (s - 1, s + 1) if 0 <= t <= last}
    if not pairs:
        return None
    order = sorted(pairs)
    here = np.stack(np.meshgrid(np.arange(w) + 0.5, np.arange(h) + 0.5)).astype(np.float32)
    xy, z = np.empty((len(order), 2, h, w), np.float32), np.empty((len(order), h, w), np.float32)
    visible = np.empty(z.shape, bool)
    for s in sorted({s for s, _ in order}):
        mine = [i for i, pair in enumerate(order) if pair[0] == s]
        points = movi_tracks.track(scene, movi_tracks.every_pixel(scene, s), [order[i][1] for i in mine])
        xy[mine], z[mine] = points.xy.reshape(-1, 2, h, w) - here, points.z.reshape(-1, h, w)
        visible[mine] = ~points.hidden.reshape(-1, h, w)
    if options.flow == "published":
        _publish(xy, visible, order, features, label)
    # A pixel behind the camera is nowhere, and one that goes very far would cost all others their resolution.
    valid = (z > 0) & (np.abs(xy).max(1) <= _LONGEST)
    xy *= valid[:, None]
    z *= valid
    arrays = [torch.from_numpy(a)[None] for a in (xy, visible & valid, valid, z)]
    return Flow(arrays[0], tuple(order), arrays[1], arrays[2], arrays[3])


def _publish(
    xy: np.ndarray, visible: np.ndarray, pairs: list[tuple[int, int]], features: Mapping[str, np.ndarray], label: str
) -> None:
    """Put the published flow in the place of the computed one, where it tells the same.

    Publisher and threads disagree on whether the backward flow of frame t points from t to t - 1 or the other way
    round (google-research/kubric#152); the geometry says which.
    """
    for key, step in (("forward_flow", 1), ("backward_flow", -1)):
        flow = flow_of(features[key], features[f"metadata/{key}_range"])
        mine = [i for i, (s, t) in enumerate(pairs) if t - s == step]
        stored = flow[[pairs[i][0] for i in mine]]
        seen = visible[mine]
        if not seen.any():
            continue
        errors = {sign: np.median(np.abs(sign * stored - xy[mine]).max(1)[seen]) for sign in (1, -1)}
        sign = 1 if step == 1 or errors[1] <= errors[-1] else -1
        if errors[sign] > 0.5:
            what = f"{errors[sign]:.1f} px off the motion of its annotations (median)"
            raise DataError(f"{label}: the published {key} is {what}; use --flow computed")
        xy[mine] = sign * stored


# The data sets ----------------------------------------------------------------------------------------------


def _movi(name: str, about: str, where: str, **changes: Any) -> Dataset:
    """Make one of the data sets; they differ in the names of their files and in defaults."""
    files, size = changes.pop("files", name), changes.pop("size", 256)
    queries, defaults = changes.pop("queries", False), changes
    layout = LAYOUT.format(name=files or "movi_e", size=size)
    add: Callable[[ArgumentParser], None] = partial(options, **defaults)
    return Dataset(
        name=name,
        about=about,
        licence=LICENCE,
        where=where,
        layout=layout,
        items=partial(items, name=files, layout=layout),
        read=partial(read, name=name, queries=queries),
        options=add,
        per_shard=64,
    )


_BUCKET = "gs://kubric-public/tfds/"
MOVI_E = _movi(
    "movi_e",
    "MOVi-E: up to 23 scanned objects, a camera that moves straight; 24 frames of 256x256; tracks computed here",
    f"{_BUCKET}movi_e/256x256/1.0.0 (9,750 train, 250 validation, 1,000 test clips)",
)
MOVI_F = _movi(
    "movi_f",
    "MOVi-F: MOVi-E with motion blur, up to 512x512; tracks computed here",
    f"{_BUCKET}movi_f/512x512/1.0.0 (6,000 clips; no test split)",
    size=512,
)
PANNING = _movi(
    "movi_e_panning",
    "MOVi-E with a camera that pans after a moving target, as LocoTrack trains on; tracks computed here",
    "https://huggingface.co/datasets/hamacojr/LocoTrack-panning-MOVi-E (273 GB)",
    files="",
)
TAPVID_KUBRIC = _movi(
    "tapvid_kubric",
    "TAP-Vid-Kubric: 256 queried tracks in each clip of MOVi-E, frames untouched; for validation",
    f"{_BUCKET}movi_e/256x256/1.0.0 (250 validation clips)",
    files="movi_e",
    split="validation",
    points=256,
    lossless=True,
    queries=True,
)
DATASETS = (MOVI_E, MOVI_F, PANNING, TAPVID_KUBRIC)
