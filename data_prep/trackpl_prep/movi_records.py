"""MOVi's records as TFDS publishes them: features by name, arrays of the published types and shapes.

`read_features` decodes those that are asked for out of the bytes of a record, `scene_of` makes of them what
`trackpl_prep.movi_tracks` works on. T frames of H x W pixels, K objects; lists of events have a length of their own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from trackpl.errors import DataError, closest
from trackpl_prep.files.tfrecord import Feature, parse_example
from trackpl_prep.movi_tracks import Scene, focal

IMAGES = {
    "video": ("u1", 3),
    "segmentations": ("u1", 1),
    "depth": ("u2", 1),
    "normal": ("u2", 3),
    "object_coordinates": ("u2", 3),
}
"""Features that are one PNG a frame: type and channels."""

ARRAYS: dict[str, tuple[str, tuple[str | int, ...]]] = {
    "forward_flow": ("u2", ("T", "H", "W", 2)),
    "backward_flow": ("u2", ("T", "H", "W", 2)),
    "background": ("S", ()),
    "camera/focal_length": ("f4", ()),
    "camera/sensor_width": ("f4", ()),
    "camera/field_of_view": ("f4", ()),
    "camera/positions": ("f4", ("T", 3)),
    "camera/quaternions": ("f4", ("T", 4)),
    "instances/positions": ("f4", ("K", "T", 3)),
    "instances/quaternions": ("f4", ("K", "T", 4)),
    "instances/velocities": ("f4", ("K", "T", 3)),
    "instances/angular_velocities": ("f4", ("K", "T", 3)),
    "instances/bboxes_3d": ("f4", ("K", "T", 8, 3)),
    "instances/image_positions": ("f4", ("K", "T", 2)),
    "instances/visibility": ("u2", ("K", "T")),
    "instances/bboxes/ragged_flat_values": ("f4", ("?", 4)),
    "instances/bboxes/ragged_row_lengths_0": ("i8", ("K",)),
    "instances/bbox_frames/ragged_flat_values": ("i4", ("?",)),
    "instances/bbox_frames/ragged_row_lengths_0": ("i8", ("K",)),
    "instances/mass": ("f4", ("K",)),
    "instances/friction": ("f4", ("K",)),
    "instances/restitution": ("f4", ("K",)),
    "instances/scale": ("f4", ("K",)),
    "instances/asset_id": ("S", ("K",)),
    "instances/category": ("i8", ("K",)),
    "instances/is_dynamic": ("b1", ("K",)),
    "events/collisions/contact_normal": ("f4", ("?", 3)),
    "events/collisions/force": ("f4", ("?",)),
    "events/collisions/frame": ("i4", ("?",)),
    "events/collisions/image_position": ("f4", ("?", 2)),
    "events/collisions/instances": ("u2", ("?", 2)),
    "events/collisions/position": ("f4", ("?", 3)),
    "metadata/backward_flow_range": ("f4", (2,)),
    "metadata/forward_flow_range": ("f4", (2,)),
    "metadata/depth_range": ("f4", (2,)),
    "metadata/height": ("i4", ()),
    "metadata/width": ("i4", ()),
    "metadata/num_frames": ("i4", ()),
    "metadata/num_instances": ("u2", ()),
    "metadata/video_name": ("S", ()),
    "metadata/motion_blur": ("f4", ()),
}
"""Features that are lists of values: type and shape; `?` is any length."""

SCENE = (
    "segmentations",
    "depth",
    "normal",
    "object_coordinates",
    "metadata/depth_range",
    "instances/bboxes_3d",
    "instances/quaternions",
    "camera/focal_length",
    "camera/sensor_width",
    "camera/positions",
    "camera/quaternions",
)
"""What `scene_of` needs."""

_SIZES = {
    "T": "metadata/num_frames",
    "H": "metadata/height",
    "W": "metadata/width",
    "K": "metadata/num_instances",
}
_MAX_PIXELS = 2**28  # of all frames of a clip
_MAX_SIDE, _MAX_OBJECTS = 8192, 2**12
_PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"


def read_features(data: bytes, wanted: Iterable[str], name: str, optional: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """Decode features of a record by name.

    Args:
        data: the payload of a record.
        wanted: names of `IMAGES` and `ARRAYS`; images come as (T, H, W, channels), ``video/png`` as the T byte strings.
        name: the record in messages.
        optional: those of them that may be missing.

    Raises:
        DataError: no such feature, or one that is not what the data set publishes.
    """
    wanted = list(wanted)
    keys = {feature.removesuffix("/png") for feature in wanted}
    for key in keys - {*IMAGES, *ARRAYS}:
        raise DataError(f"MOVi has no feature '{key}'; {closest(key, [*IMAGES, *ARRAYS])}")
    example = parse_example(data, {*keys, *_SIZES.values()}, name)
    sizes = _read_sizes(example, name)
    out = {}
    for feature in wanted:
        key, label = feature.removesuffix("/png"), f"{name}, feature '{feature}'"
        if key not in example and key in optional:
            continue
        if key not in example:
            raise DataError(f"{label} is missing")
        if key in ARRAYS:
            out[feature] = _array(example[key], *ARRAYS[key], sizes, label)
            continue
        images = _byte_strings(example[key], label)
        if len(images) != sizes["T"]:
            raise DataError(f"{label} has {len(images)} images for {sizes['T']} frames")
        if feature != key:
            out[feature] = np.array(images, object)
        else:
            out[feature] = decode_pngs(images, (sizes["H"], sizes["W"]), *IMAGES[key], label)
    return out


def _read_sizes(example: Mapping[str, Feature], name: str) -> dict[str, int]:
    """Read T, H, W and K, and refuse what no data set has."""
    out = {}
    for symbol, key in _SIZES.items():
        if key not in example:
            raise DataError(f"{name} has no feature '{key}'; is it a record of MOVi?")
        out[symbol] = int(_array(example[key], *ARRAYS[key], {}, f"{name}, feature '{key}'"))
    t, h, w, k = out.values()
    if min(t, h, w) < 1 or max(h, w) > _MAX_SIDE or t * h * w > _MAX_PIXELS or k > _MAX_OBJECTS:
        raise DataError(f"{name} says it has {t} frames of {h}x{w} pixels and {k} objects, which cannot be")
    return out


def _byte_strings(feature: Feature, label: str) -> list[bytes]:
    if not isinstance(feature, list):
        raise DataError(f"{label} is a list of numbers, not of byte strings")
    return feature


def _array(
    feature: Feature, kind: str, shape: tuple[str | int, ...], sizes: Mapping[str, int], label: str
) -> np.ndarray:
    """Give a list its type and shape."""
    if kind == "S":
        values = np.array(_byte_strings(feature, label), bytes)
    elif isinstance(feature, list) and feature:
        raise DataError(f"{label} is a list of byte strings, not of numbers")
    else:
        values = _numbers(np.asarray(feature), np.dtype(kind), label)
    fixed = [sizes[s] if isinstance(s, str) else s for s in shape if s != "?"]
    rows = len(values) // max(math.prod(fixed), 1)
    full = tuple(rows if s == "?" else sizes[s] if isinstance(s, str) else s for s in shape)
    if math.prod(full) != len(values):
        raise DataError(f"{label} has {len(values)} values, expected the shape {full}")
    return values.reshape(full)


def _numbers(values: np.ndarray, dtype: np.dtype, label: str) -> np.ndarray:
    """Cast float32 or int64 values, refusing what does not fit."""
    if not len(values):
        return np.zeros(0, dtype)
    if (dtype.kind == "f") != (values.dtype.kind == "f"):
        raise DataError(f"{label} is {values.dtype}, expected {dtype}")
    low, high = (0, 1) if dtype.kind == "b" else (-np.inf, np.inf)
    if dtype.kind in "iu":
        low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    if values.dtype.kind == "i" and (values.min() < low or values.max() > high):
        raise DataError(f"{label} holds {values.min()}..{values.max()}, more than {dtype} can")
    return values.astype(dtype)


def decode_pngs(images: list[bytes], size: tuple[int, int], kind: str, channels: int, label: str) -> np.ndarray:
    """Decode PNG images of one size (H, W), type and number of channels: (T, H, W, channels).

    Raises:
        DataError: one that is broken, or another size or kind of image.
    """
    from kornia_rs.io import decode_image_png_u8, decode_image_png_u16  # Pillow cuts 16-bit colours to 8 bits

    decode, bits = (decode_image_png_u8, 8) if kind == "u1" else (decode_image_png_u16, 16)
    out = np.empty((len(images), *size, channels), kind)
    for i, image in enumerate(images):
        found = int.from_bytes(image[20:24], "big"), int.from_bytes(image[16:20], "big")
        if image[:16] != _PNG or found != size or image[24:26] != bytes((bits, 0 if channels == 1 else 2)):
            what = f"{found[0]}x{found[1]} PNG" if image[:16] == _PNG else f"not PNG ({image[:4]!r})"
            want = f"{size[0]}x{size[1]} PNG of {channels} x {bits} bits"
            raise DataError(f"{label}, frame {i} is {what}, expected {want}")
        try:
            out[i] = decode(image, size, "mono" if channels == 1 else "rgb")
        except Exception as error:  # the decoder raises nothing more exact
            raise DataError(f"{label}, frame {i} is no whole PNG ({str(error).strip()})") from None
    return out


def scene_of(features: Mapping[str, np.ndarray], name: str, aspect: str | None = None) -> Scene:
    """Make the scene of the features `SCENE`; `aspect` as in `movi_tracks.focal`.

    Raises:
        DataError: they do not fit together; the message names the record.
    """
    low, high = map(float, features["metadata/depth_range"])
    segments = features["segmentations"][..., 0]
    size = segments.shape[1], segments.shape[2]
    try:
        return Scene(
            segments=segments,
            depth=features["depth"][..., 0],
            low=low,
            step=(high - low) / 65535,
            objects=features["object_coordinates"],
            normals=features["normal"],
            boxes=features["instances/bboxes_3d"],
            rotations=features["instances/quaternions"],
            centres=features["camera/positions"],
            cameras=features["camera/quaternions"],
            focal=focal(float(features["camera/focal_length"]), float(features["camera/sensor_width"]), size, aspect),
        )
    except DataError as error:
        raise DataError(f"{name}: {error}") from None


def flow_of(codes: np.ndarray, span: np.ndarray) -> np.ndarray:
    """Turn stored flow u16 (T, H, W, 2) of (row, column) and its range to pixels (T, 2, H, W) of (dx, dy), float32."""
    low, high = map(float, span)
    pixels = codes[..., ::-1] * np.float32((high - low) / 65535) + np.float32(low)
    return np.ascontiguousarray(np.moveaxis(pixels, -1, 1))
