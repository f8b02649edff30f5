"""A `Clip` to a sample of the shard format (`trackpl.samples` describes it and reads it)."""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trackpl.errors import DataError
from trackpl.images import decode_image, encode_jpeg, encode_png, image_size
from trackpl.samples import FIELDS, INFINITE, SCHEMA, check_source
from trackpl.types import Clip, Flow

__all__ = ["decode_image", "encode"]

_COORDINATES = "raster pixels: (0, 0) is the outer corner of the top-left pixel, its centre is (0.5, 0.5)"


def encode(
    clip: Clip,
    quality: int | None = 95,
    licence: str = "",
    *,
    images: Sequence[bytes] | None = None,
    exact_flow: bool = False,
    source: Mapping[str, Any] | None = None,
) -> dict[str, bytes]:
    """Turn a clip with B = 1 into tar members by extension.

    Lossless but for the video (JPEG of that quality), depths (2^-16 of their range) and the flow (1/64 pixel, coarser
    where a motion of more than 511 pixels does not fit).

    Args:
        clip: what to store.
        quality: of the JPEG frames, 1 to 100 (see `encode_jpeg`); none stores them without loss.
        licence: goes along with the sample.
        images: the original JPEG or PNG bytes of every frame, stored untouched in place of `clip.video`.
        exact_flow: store the flow as the float32 that it is.
        source: facts of the original, such as its frame numbers; small, and JSON.

    Raises:
        DataError: more than one clip, or a field that the format cannot hold (not finite, ids not in 0..65535).
    """
    b, t, _, h, w = clip.video.shape
    if b != 1:
        raise DataError(f"a sample holds one clip, got a batch of {b}")
    n = next((x.shape[-2] for x in (clip.tracks, clip.queries) if x is not None), 0)
    meta: dict[str, Any] = {"schema": SCHEMA, "T": t, "H": h, "W": w, "N": n, "coordinates": _COORDINATES}
    meta |= {"name": clip.name[0] if clip.name else "", "fps": clip.fps, "licence": licence}
    meta["fields"] = [f for f in FIELDS if getattr(clip, f) is not None]
    if source:
        meta["source"] = check_source(dict(source))
    out = _join("rgb", _frames(clip.video[0], quality) if images is None else _originals(images, (t, h, w)))
    for field, values in (("tracks", clip.tracks), ("track_depth", clip.track_depth), ("queries", clip.queries)):
        if values is not None:
            out[f"{field}.npy"] = _npy(_finite(field, values[0]).astype("<f4"))
    for field, mask in (("visible", clip.visible), ("valid", clip.valid)):
        if mask is not None:
            out[f"{field}.npy"] = _npy(np.packbits(mask[0].bool().cpu().numpy(), axis=-1))
    if clip.depth is not None:
        codes, span = _depth_codes(clip.depth[0, :, 0])
        meta["depth"] = {"range": span, "kind": "z"}
        out |= _planes("depth", codes)
    if clip.labels is not None:
        ids = clip.labels[0].cpu().numpy()
        if ids.min() < 0 or ids.max() > 65535:
            raise DataError(f"segment ids must lie in 0..65535, got {ids.min()}..{ids.max()}")
        meta["labels"] = {"dtype": "u1" if ids.max() < 256 else "u2"}
        out |= _planes("seg", ids.astype(meta["labels"]["dtype"]))
    if clip.flow is not None:
        members, meta["flow"] = _encode_flow(clip.flow, exact_flow)
        out |= members
    if clip.camera is not None:
        parts = [clip.camera.intrinsics[0], clip.camera.pose[0].flatten(1)]
        out["camera.npy"] = _npy(_finite("camera", torch.cat([p.float() for p in parts], 1)).astype("<f4"))
    out["meta.json"] = json.dumps(meta, sort_keys=True, allow_nan=False).encode()
    return out


def _frames(video: Tensor, quality: int | None) -> list[bytes]:
    """Encode (T, 3, H, W), one image a frame."""
    if video.is_floating_point():
        video = (video.clamp(0, 1) * 255).round().to(torch.uint8)
    frames = np.ascontiguousarray(video.permute(0, 2, 3, 1).cpu().numpy())
    return [encode_png(f) if quality is None else encode_jpeg(f, quality) for f in frames]


def _originals(images: Sequence[bytes], shape: tuple[int, int, int]) -> Sequence[bytes]:
    """Check the images that are to stand for the frames."""
    if len(images) != shape[0]:
        raise DataError(f"{len(images)} images were given for the {shape[0]} frames of a clip")
    for i, image in enumerate(images):
        size = image_size(image, f"the image of frame {i}")
        if size != shape[1:]:
            raise DataError(f"the image of frame {i} is {size[0]}x{size[1]}, its clip {shape[1]}x{shape[2]}")
    return images


def _finite(field: str, x: Tensor) -> np.ndarray:
    if not torch.isfinite(x).all():
        raise DataError(f"{field} must be finite; mark what is unknown as not valid and write 0 there")
    return x.detach().cpu().numpy()


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def _join(name: str, chunks: Sequence[bytes]) -> dict[str, bytes]:
    offsets = np.cumsum([0, *map(len, chunks)]).astype("<u8")
    return {f"{name}.bin": b"".join(chunks), f"{name}.idx.npy": _npy(offsets)}


def _planes(name: str, planes: np.ndarray) -> dict[str, bytes]:
    """Pack integer planes (n, ..., H, W): difference to the row above modulo the word, zlib."""
    delta = planes.copy()
    delta[..., 1:, :] -= planes[..., :-1, :]
    return _join(name, [zlib.compress(d.tobytes(), 1) for d in delta])


def _bits(name: str, planes: Tensor) -> dict[str, bytes]:
    return _join(name, [zlib.compress(np.packbits(p).tobytes(), 1) for p in planes.bool().cpu().numpy()])


def _depth_codes(depth: Tensor) -> tuple[np.ndarray, list[float]]:
    """Return u16 codes of depths in metres, and the range that they divide."""
    values = depth.detach().cpu().double().numpy()
    if np.isnan(values).any() or (values == -np.inf).any():
        raise DataError("depth must be a number or +inf")
    finite = np.isfinite(values)
    low, high = (float(f(values[finite])) for f in (np.min, np.max)) if finite.any() else (0.0, 0.0)
    steps = np.where(finite, values - low, 0) / max(high - low, 1e-12) * (INFINITE - 1)
    return np.where(finite, np.rint(steps), INFINITE).astype("<u2"), [low, high]


def _encode_flow(flow: Flow, exact: bool) -> tuple[dict[str, bytes], dict[str, Any]]:
    xy = _finite("flow", flow.xy[0])
    scale, largest = 64.0, float(np.abs(xy).max(initial=0))
    while largest * scale > 32767:
        scale /= 2
    codes = xy.astype("<f4").view("<u4") if exact else np.rint(xy * scale).astype("<i2")
    out = _planes("flow", codes)
    meta: dict[str, Any] = {"pairs": [list(p) for p in flow.pairs], "scale": scale, "exact": exact}
    for part, mask in (("visible", flow.visible), ("valid", flow.valid)):
        meta[part] = mask is not None
        if mask is not None:
            out |= _bits(f"flow_{part}", mask[0])
    if flow.depth is not None:
        depth, meta["depth_range"] = _depth_codes(flow.depth[0])
        out |= _planes("flow_depth", depth)
    return out, meta
