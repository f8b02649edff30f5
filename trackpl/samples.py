"""One sample of the shard format: a `Clip` as plain tar members.

A sample is a handful of members ``<key>.<extension>``; nothing in it is ever executed or unpickled:

=====================  ================================================================================
rgb.bin                one JPEG a frame (quality 95, 4:4:4), one after the other
tracks.npy             f32 [T, N, 2] pixels
visible.npy valid.npy  u8 [T, ceil(N / 8)], bits packed along N
depth.bin              one u16 plane a frame over the range in the meta data (65535: infinite)
seg.bin                one u8 or u16 plane of segment ids a frame
flow.bin               one i16 [2, H, W] plane a frame pair, fixed point, `scale` steps a pixel
flow_visible.bin       one bit plane a frame pair; flow_valid.bin likewise
camera.npy             f32 [T, 20]: fx fy cx cy, then world to camera, row by row
meta.json              schema, T, H, W, N, fields, conventions, name, fps, licence
=====================  ================================================================================

Every ``.bin`` has an ``.idx.npy``, u64 offsets [n + 1], so that any frame decodes alone. Number planes are
differences to the row above, then zlib level 1; bit planes are packed along the whole plane, then zlib level
1.
"""

from __future__ import annotations

import io
import json
import math
import re
import zlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
import simplejpeg
import torch
from torch import Tensor

from trackpl.errors import DataError, closest
from trackpl.types import Camera, Clip, Flow

SCHEMA = 1
FIELDS = ("video", "tracks", "visible", "valid", "depth", "flow", "labels", "camera")
MEMBERS: dict[str, tuple[str, ...]] = {
    "video": ("rgb.bin", "rgb.idx.npy"),
    "tracks": ("tracks.npy",),
    "visible": ("visible.npy",),
    "valid": ("valid.npy",),
    "depth": ("depth.bin", "depth.idx.npy"),
    "flow": (
        "flow.bin",
        "flow.idx.npy",
        "flow_visible.bin",
        "flow_visible.idx.npy",
        "flow_valid.bin",
        "flow_valid.idx.npy",
    ),
    "labels": ("seg.bin", "seg.idx.npy"),
    "camera": ("camera.npy",),
}
"""Which members hold which field of a clip; beside them there is only meta.json."""

EXTENSIONS = {"meta.json"}.union(*MEMBERS.values())
_COORDINATES = "raster pixels: (0, 0) is the outer corner of the top-left pixel, its centre is (0.5, 0.5)"
_INFINITE = 65535  # code of an infinite depth
_MAX_SIDE, _MAX_AREA, _MAX_BYTES = 8192, 2**26, 2**32  # of a frame; of everything that one call decodes
MAX_COUNT = 2**20  # frames, points, frame pairs
_MAX_JSON, _MAX_NESTING = 2**24, 64
_DTYPES = {"u1", "i1", "u2", "i2", "i4", "i8", "u8", "f2", "f4", "f8", "b1"}
_NPY = re.compile(r"\{'descr': '[<|]([a-z]\d)', 'fortran_order': False, 'shape': \(([\d, ]*)\), \}\s*")


# Writing a sample ------------------------------------------------------------------------------------------


def encode(clip: Clip, quality: int = 95, licence: str = "") -> dict[str, bytes]:
    """Turn a clip with B = 1 into tar members by extension.

    Lossless but for the video (JPEG of that quality), the depth (2^-16 of its range) and the flow (1/64
    pixel, coarser where a motion of more than 511 pixels does not fit).

    Raises:
        DataError: more than one clip, or a field that the format cannot hold (not finite, ids not in
            0..65535).
    """
    b, t, _, h, w = clip.video.shape
    if b != 1:
        raise DataError(f"a sample holds one clip, got a batch of {b}")
    n = 0 if clip.tracks is None else clip.tracks.shape[2]
    meta: dict[str, Any] = {"schema": SCHEMA, "T": t, "H": h, "W": w, "N": n, "coordinates": _COORDINATES}
    meta |= {"name": clip.name[0] if clip.name else "", "fps": clip.fps, "licence": licence}
    meta["fields"] = [f for f in FIELDS if getattr(clip, f) is not None]
    video = clip.video[0]
    if video.is_floating_point():
        video = (video.clamp(0, 1) * 255).round().to(torch.uint8)
    frames = np.ascontiguousarray(video.permute(0, 2, 3, 1).cpu().numpy())
    out = _join("rgb", [simplejpeg.encode_jpeg(f, quality, "RGB", "444") for f in frames])
    if clip.tracks is not None:
        out["tracks.npy"] = _npy(_finite("tracks", clip.tracks[0]).astype("<f4"))
    for field, mask in (("visible", clip.visible), ("valid", clip.valid)):
        if mask is not None:
            out[f"{field}.npy"] = _npy(np.packbits(mask[0].bool().cpu().numpy(), axis=-1))
    if clip.depth is not None:
        codes, meta["depth"] = _depth_codes(clip.depth[0, :, 0])
        out |= _planes("depth", codes)
    if clip.labels is not None:
        ids = clip.labels[0].cpu().numpy()
        if ids.min() < 0 or ids.max() > 65535:
            raise DataError(f"segment ids must lie in 0..65535, got {ids.min()}..{ids.max()}")
        meta["labels"] = {"dtype": "u1" if ids.max() < 256 else "u2"}
        out |= _planes("seg", ids.astype(meta["labels"]["dtype"]))
    if clip.flow is not None:
        members, meta["flow"] = _encode_flow(clip.flow)
        out |= members
    if clip.camera is not None:
        parts = [clip.camera.intrinsics[0], clip.camera.pose[0].flatten(1)]
        out["camera.npy"] = _npy(_finite("camera", torch.cat([p.float() for p in parts], 1)).astype("<f4"))
    out["meta.json"] = json.dumps(meta, sort_keys=True, allow_nan=False).encode()
    return out


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


def _depth_codes(depth: Tensor) -> tuple[np.ndarray, dict[str, Any]]:
    values = depth.detach().cpu().double().numpy()
    if np.isnan(values).any() or (values == -np.inf).any():
        raise DataError("depth must be a number or +inf")
    finite = np.isfinite(values)
    low, high = (float(f(values[finite])) for f in (np.min, np.max)) if finite.any() else (0.0, 0.0)
    steps = np.where(finite, values - low, 0) / max(high - low, 1e-12) * (_INFINITE - 1)
    codes = np.where(finite, np.rint(steps), _INFINITE).astype("<u2")
    return codes, {"range": [low, high], "kind": "z"}


def _encode_flow(flow: Flow) -> tuple[dict[str, bytes], dict[str, Any]]:
    xy = _finite("flow", flow.xy[0])
    scale, largest = 64.0, float(np.abs(xy).max(initial=0))
    while largest * scale > 32767:
        scale /= 2
    out = _planes("flow", np.rint(xy * scale).astype("<i2"))
    meta: dict[str, Any] = {"pairs": [list(p) for p in flow.pairs], "scale": scale}
    for part, mask in (("visible", flow.visible), ("valid", flow.valid)):
        meta[part] = mask is not None
        if mask is not None:
            out |= _bits(f"flow_{part}", mask[0])
    return out, meta


# Reading a sample ------------------------------------------------------------------------------------------


def decode(
    members: Mapping[str, bytes],
    frames: Sequence[int] | None = None,
    fields: Collection[str] | None = None,
    name: str = "",
) -> Clip:
    """Decode the wanted frames and fields of a sample; the members may come from anybody.

    Args:
        members: bytes by extension; those of fields that are not wanted may be missing.
        frames: distinct frame numbers, in the order of the result; none: all.
        fields: names of fields of `Clip`; none: all that the sample has. The video always comes along, a
            field that the sample does not have is None. Of the flow those pairs come whose two frames are
            wanted, renumbered.
        name: the sample in messages, and of the clip if the sample does not say its own.

    Raises:
        DataError: a member that is missing, broken, too large or not of this format; the message names it.
    """
    sample = _Members(members, name)
    meta = sample.meta
    check_fields(fields or ())
    t, h, w = meta["T"], meta["H"], meta["W"]
    chosen = list(range(t)) if frames is None else [int(f) for f in frames]
    if not chosen or len(set(chosen)) < len(chosen) or not all(0 <= f < t for f in chosen):
        raise DataError(f"sample '{name}' has the frames 0..{t - 1}; asked for {chosen[:8]}")
    has = set(meta["fields"]) & (set(FIELDS) if fields is None else {*fields, "video"})
    sample.limit("meta.json", len(chosen) * h * w * 3)
    values: dict[str, Any] = {"video": sample.video(chosen)}
    if "tracks" in has:
        tracks = sample.npy("tracks.npy", "f4", (t, meta["N"], 2))[chosen]
        if not np.isfinite(tracks).all():
            sample.fail("tracks.npy", "holds numbers that are not finite")
        values["tracks"] = tracks
    for field in (f for f in ("visible", "valid") if f in has):
        bits = sample.npy(f"{field}.npy", "u1", (t, -(-meta["N"] // 8)))[chosen]
        values[field] = np.unpackbits(bits, axis=-1, count=meta["N"]).astype(bool)
    if "depth" in has:
        values["depth"] = sample.depth(chosen)
    if "labels" in has:
        dtype = meta["labels"]["dtype"]
        values["labels"] = sample.planes("seg", chosen, t, (h, w), dtype).astype(np.int64)
    if "camera" in has:
        rows = torch.from_numpy(sample.npy("camera.npy", "f4", (t, 20))[chosen])[None]
        values["camera"] = Camera(rows[..., :4].clone(), rows[..., 4:].unflatten(-1, (4, 4)).clone())
    if "flow" in has:
        values["flow"] = sample.flow(chosen)
    clip: dict[str, Any] = {k: torch.from_numpy(v)[None] if isinstance(v, np.ndarray) else v for k, v in values.items()}
    return Clip(**clip, name=(meta["name"] or name,), fps=meta["fps"])


def check_fields(fields: Collection[str]) -> None:
    """Raise `DataError` if one of them is no field of a clip."""
    for word in sorted(set(fields) - set(FIELDS)):
        raise DataError(f"clips have no field '{word}'; {closest(word, FIELDS)}")


def check_meta(members: Mapping[str, bytes], name: str) -> dict[str, Any]:
    """Return the checked meta data of a sample; raises `DataError` for that and for unknown members."""
    return _Members(members, name).meta


class _Members:
    """The checked members of one sample; every method raises `DataError` with sample and member."""

    def __init__(self, members: Mapping[str, bytes], name: str) -> None:
        self.members, self.name = members, name
        for extension in members:
            if extension not in EXTENSIONS:
                self.fail(extension, f"is no member of this format; {closest(extension, EXTENSIONS)}")
        self.meta = _checked_meta(self)

    def fail(self, member: str, why: str) -> NoReturn:
        raise DataError(f"sample '{self.name}', member {member}: {why}")

    def member(self, member: str) -> bytes:
        if member not in self.members:
            self.fail(member, "is missing")
        return self.members[member]

    def limit(self, member: str, size: int) -> None:
        if size > _MAX_BYTES:
            self.fail(member, f"would decode to {size} bytes; at most {_MAX_BYTES} at a time, ask for fewer frames")

    def npy(self, member: str, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
        try:
            array = read_npy(self.member(member))
        except ValueError as error:
            self.fail(member, str(error))
        if array.dtype != np.dtype(f"<{dtype}") or array.shape != shape:
            self.fail(member, f"is {array.dtype} {array.shape}, expected {np.dtype(dtype)} {shape}")
        return array

    def chunks(self, name: str, wanted: Sequence[int], count: int) -> list[memoryview]:
        data = memoryview(self.member(f"{name}.bin"))
        offsets = self.npy(f"{name}.idx.npy", "u8", (count + 1,))
        if offsets[0] != 0 or offsets[-1] != len(data) or (offsets[1:] < offsets[:-1]).any():
            self.fail(f"{name}.idx.npy", f"the offsets do not divide the {len(data)} bytes of {name}.bin")
        return [data[int(offsets[i]) : int(offsets[i + 1])] for i in wanted]

    def inflate(self, name: str, wanted: Sequence[int], count: int, size: int) -> list[bytes]:
        """Inflate chunks that must hold exactly `size` bytes each; no chunk can make more than that."""
        out = []
        self.limit(f"{name}.bin", len(wanted) * size)
        for i, chunk in zip(wanted, self.chunks(name, wanted, count), strict=True):
            stream = zlib.decompressobj()
            try:
                data = stream.decompress(chunk, size + 1)
            except zlib.error as error:
                self.fail(f"{name}.bin", f"plane {i} is broken ({error})")
            if len(data) != size or not stream.eof or stream.unused_data:
                self.fail(f"{name}.bin", f"plane {i} does not hold exactly {size} bytes")
            out.append(data)
        return out

    def planes(self, name: str, wanted: Sequence[int], count: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        """Read integer planes (len(wanted), *shape), undoing the difference to the row above."""
        kind = np.dtype(f"<{dtype}")
        out = np.empty((len(wanted), *shape), kind)
        for i, data in enumerate(self.inflate(name, wanted, count, math.prod(shape) * kind.itemsize)):
            np.cumsum(np.frombuffer(data, kind).reshape(shape), axis=-2, dtype=kind, out=out[i])
        return out

    def bits(self, name: str, wanted: Sequence[int], count: int, shape: tuple[int, int]) -> np.ndarray:
        area = math.prod(shape)
        packed = b"".join(self.inflate(name, wanted, count, -(-area // 8)))
        rows = np.frombuffer(packed, np.uint8).reshape(len(wanted), -(-area // 8))
        return np.unpackbits(rows, axis=1, count=area).astype(bool).reshape(len(wanted), *shape)

    def video(self, frames: Sequence[int]) -> np.ndarray:
        h, w = self.meta["H"], self.meta["W"]
        out = np.empty((len(frames), h, w, 3), np.uint8)
        for i, (frame, jpeg) in enumerate(zip(frames, self.chunks("rgb", frames, self.meta["T"]), strict=True)):
            try:
                size = simplejpeg.decode_jpeg_header(jpeg)[:2]
                if size == (h, w):
                    simplejpeg.decode_jpeg(jpeg, "RGB", buffer=out[i])
            except ValueError as error:
                self.fail("rgb.bin", f"frame {frame} is no whole JPEG ({str(error).strip()})")
            if size != (h, w):
                self.fail("rgb.bin", f"frame {frame} is {size[0]}x{size[1]}, expected {h}x{w}")
        return np.ascontiguousarray(out.transpose(0, 3, 1, 2))

    def depth(self, frames: Sequence[int]) -> np.ndarray:
        low, high = self.meta["depth"]["range"]
        codes = self.planes("depth", frames, self.meta["T"], (self.meta["H"], self.meta["W"]), "u2")
        values = (codes * ((high - low) / (_INFINITE - 1)) + low).astype(np.float32)
        values[codes == _INFINITE] = np.inf
        return values[:, None]

    def flow(self, frames: Sequence[int]) -> Flow | None:
        meta, size = self.meta["flow"], (self.meta["H"], self.meta["W"])
        new = {old: i for i, old in enumerate(frames)}
        wanted = [i for i, (s, t) in enumerate(meta["pairs"]) if s in new and t in new]
        if not wanted:
            return None
        count = len(meta["pairs"])
        codes = self.planes("flow", wanted, count, (2, *size), "i2")
        masks = {
            part: torch.from_numpy(self.bits(f"flow_{part}", wanted, count, size))[None]
            for part in ("visible", "valid")
            if meta[part]
        }
        pairs = tuple((new[meta["pairs"][i][0]], new[meta["pairs"][i][1]]) for i in wanted)
        return Flow(torch.from_numpy(codes).float()[None] / meta["scale"], pairs, **masks)


def _checked_meta(sample: _Members) -> dict[str, Any]:
    try:
        meta = read_json(sample.member("meta.json"))
        if not isinstance(meta, dict) or meta.get("schema") != SCHEMA:
            found = meta.get("schema") if isinstance(meta, dict) else None
            raise ValueError(f"schema {found!r} is not the {SCHEMA} that this version reads")
        for key, low, high in (
            ("T", 1, MAX_COUNT),
            ("H", 1, _MAX_SIDE),
            ("W", 1, _MAX_SIDE),
            ("N", 0, MAX_COUNT),
        ):
            whole(meta.get(key), key, low, high)
        if meta["H"] * meta["W"] > _MAX_AREA:
            raise ValueError(f"frames of {meta['H']}x{meta['W']} are larger than {_MAX_AREA} pixels")
        fields = meta.get("fields")
        if not isinstance(fields, list) or "video" not in fields or not set(map(str, fields)) <= set(FIELDS):
            raise ValueError(f"'fields' must list 'video' and others of {', '.join(FIELDS)}")
        if not isinstance(meta.setdefault("name", ""), str) or len(meta["name"]) > 4096:
            raise ValueError("'name' must be a short text")
        if meta.setdefault("fps", None) is not None:
            _number(meta["fps"], "fps")
        if "depth" in fields:
            low, high = _entry(meta, "depth", "range")
            if _number(low, "depth range") > _number(high, "depth range") or meta["depth"].get("kind") != "z":
                raise ValueError("'depth' must have a range [low, high] and the kind 'z'")
        if "labels" in fields and _entry(meta, "labels", "dtype") not in ("u1", "u2"):
            raise ValueError("'labels' must have the dtype 'u1' or 'u2'")
        if "flow" in fields:
            _check_flow_meta(meta)
    except (ValueError, TypeError) as error:
        sample.fail("meta.json", str(error))
    return meta


def _check_flow_meta(meta: dict[str, Any]) -> None:
    pairs = _entry(meta, "flow", "pairs")
    if not isinstance(pairs, list) or len(pairs) > MAX_COUNT:
        raise ValueError("'flow' must have a list of frame pairs")
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(f"flow pair {pair!r} is not [from, to]")
        for frame in pair:
            whole(frame, "flow pair", 0, meta["T"] - 1)
    if _number(_entry(meta, "flow", "scale"), "flow scale") <= 0:
        raise ValueError("the flow scale must be above 0")
    for part in ("visible", "valid"):
        if not isinstance(_entry(meta, "flow", part), bool):
            raise ValueError(f"'flow' must say whether it has '{part}'")


def _entry(meta: dict[str, Any], section: str, key: str) -> Any:
    if not isinstance(meta.get(section), dict) or key not in meta[section]:
        raise ValueError(f"'{section}' must have '{key}'")
    return meta[section][key]


def whole(value: Any, what: str, low: int, high: int) -> int:
    """Return a whole number in low..high; raises ValueError if it is not that."""
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{what} must be a whole number in {low}..{high}, got {str(value)[:40]}")
    return value


def _number(value: Any, what: str) -> float:
    if type(value) not in (int, float) or not abs(value) < 1e30:
        raise ValueError(f"{what} must be a number, got {str(value)[:40]}")
    return float(value)


def read_npy(data: bytes) -> np.ndarray:
    """Read an npy array of plain numbers, never of objects.

    Raises:
        ValueError: no npy array, another number type, or not exactly the bytes that its shape needs.
    """
    if data[:8] != b"\x93NUMPY\x01\x00" or len(data) < 10:
        raise ValueError("is no npy array of version 1")
    end = 10 + int.from_bytes(data[8:10], "little")
    match = _NPY.fullmatch(data[10:end].decode("latin1"))
    if end > len(data) or match is None or match[1] not in _DTYPES:
        raise ValueError("has an npy header that is not of plain little-endian numbers in C order")
    dims = [d for d in match[2].replace(" ", "").split(",") if d]
    if len(dims) > 8 or any(len(d) > 12 for d in dims):
        raise ValueError("has an npy header with an impossible shape")
    shape, dtype = tuple(map(int, dims)), np.dtype(f"<{match[1]}")
    if math.prod(shape) * dtype.itemsize != len(data) - end:
        raise ValueError(f"holds {len(data) - end} bytes, not those of {dtype} {shape}")
    return np.frombuffer(data, dtype, offset=end).reshape(shape)


def read_json(data: bytes, limit: int = _MAX_JSON) -> Any:
    """Read JSON of bounded size and nesting, without NaN and infinities.

    Raises:
        ValueError: not that.
    """
    if len(data) > limit:
        raise ValueError(f"is larger than {limit} bytes")

    def refuse(word: str) -> NoReturn:
        raise ValueError(f"holds {word}, which is not JSON")

    try:
        value = json.loads(data, parse_constant=refuse)
    except RecursionError:
        raise ValueError(f"is nested deeper than {_MAX_NESTING}") from None
    level = [value]
    for _ in range(_MAX_NESTING):
        level = [x for v in level for x in (v.values() if isinstance(v, dict) else v if isinstance(v, list) else ())]
    if any(isinstance(v, dict | list) for v in level):
        raise ValueError(f"is nested deeper than {_MAX_NESTING}")
    return value
