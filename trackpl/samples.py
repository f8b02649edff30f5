"""One sample of the shard format: a `Clip` as plain tar members.

A sample is a handful of members ``<key>.<extension>``; nothing in it is ever executed or unpickled:

=====================  ================================================================================
rgb.bin                one JPEG or PNG a frame, one after the other
tracks.npy             f32 [T, N, 2] pixels
track_depth.npy        f32 [T, N] metres along the optical axis
queries.npy            f32 [N, 3] of (t, x, y), where the data set names the query of each track
visible.npy valid.npy  u8 [T, ceil(N / 8)], bits packed along N
depth.bin              one u16 plane a frame over the range in the meta data (65535: infinite)
seg.bin                one u8 or u16 plane of segment ids a frame
flow.bin               one i16 [2, H, W] plane a frame pair, fixed point, `scale` steps a pixel; or, where the meta
                       data say `exact`, the bits of f32 as u32
flow_visible.bin       one bit plane a frame pair; flow_valid.bin likewise
flow_depth.bin         one u16 plane a frame pair, as depth.bin
camera.npy             f32 [T, 20]: fx fy cx cy, then world to camera, row by row
meta.json              schema, T, H, W, N, fields, conventions, name, fps, licence, source (facts of the original)
=====================  ================================================================================

Every ``.bin`` has an ``.idx.npy``, u64 offsets [n + 1], so that any frame decodes alone. Number planes are
differences to the row above, then zlib level 1; bit planes are packed along the whole plane, then zlib level
1.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NoReturn, Protocol

import numpy as np
import torch

from trackpl.errors import DataError, closest
from trackpl.handover import stack
from trackpl.images import MAX_AREA, MAX_SIDE, decode_image
from trackpl.parsing import number, read_json, read_npy, whole
from trackpl.types import Camera, Clip, Flow

SCHEMA = 1
FIELDS = ("video", "tracks", "visible", "valid", "track_depth", "queries", "depth", "flow", "labels", "camera")
MEMBERS: dict[str, tuple[str, ...]] = {
    "video": ("rgb.bin", "rgb.idx.npy"),
    "tracks": ("tracks.npy",),
    "visible": ("visible.npy",),
    "valid": ("valid.npy",),
    "track_depth": ("track_depth.npy",),
    "queries": ("queries.npy",),
    "depth": ("depth.bin", "depth.idx.npy"),
    "flow": (
        "flow.bin",
        "flow.idx.npy",
        "flow_visible.bin",
        "flow_visible.idx.npy",
        "flow_valid.bin",
        "flow_valid.idx.npy",
        "flow_depth.bin",
        "flow_depth.idx.npy",
    ),
    "labels": ("seg.bin", "seg.idx.npy"),
    "camera": ("camera.npy",),
}
"""Which members hold which field of a clip; beside them there is only meta.json."""

EXTENSIONS = {"meta.json"}.union(*MEMBERS.values())
INFINITE = 65535  # code of an infinite depth
_MAX_BYTES = 2**32  # of everything that one call decodes
_MAX_SOURCE = 2**16  # characters of the facts of an original
MAX_COUNT = 2**20  # frames, points, frame pairs


class Stored(Protocol):
    """Bytes that lie elsewhere, of which parts can be had."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice) -> bytes: ...


Member = bytes | Stored


# Reading a sample ------------------------------------------------------------------------------------------


def decode(
    members: Mapping[str, Member],
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
            wanted, renumbered; queries are renumbered too, -1 where their frame is not wanted.
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
    for field, tail in (("tracks", (2,)), ("track_depth", ())):
        if field in has:
            values[field] = sample.finite(f"{field}.npy", (t, meta["N"], *tail))[chosen]
    if "queries" in has:
        queries, place = sample.finite("queries.npy", (meta["N"], 3)), {f: i for i, f in enumerate(chosen)}
        queries = queries.copy()
        queries[:, 0] = [place.get(int(f), -1) for f in queries[:, 0]]
        values["queries"] = queries
    for field in (f for f in ("visible", "valid") if f in has):
        bits = sample.npy(f"{field}.npy", "u1", (t, -(-meta["N"] // 8)))[chosen]
        values[field] = np.unpackbits(bits, axis=-1, count=meta["N"]).astype(bool)
    if "depth" in has:
        values["depth"] = sample.depths("depth", chosen, t, meta["depth"]["range"])[:, None]
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


def check_meta(members: Mapping[str, Member], name: str) -> dict[str, Any]:
    """Return the checked meta data of a whole sample.

    Raises:
        DataError: broken meta data, or not exactly the members that they call for.
    """
    sample = _Members(members, name)
    meta = sample.meta
    needed = {"meta.json"}.union(*(MEMBERS[f] for f in meta["fields"] if f != "flow"))
    if "flow" in meta["fields"]:
        parts = ["flow", *(f"flow_{p}" for p in ("visible", "valid") if meta["flow"][p])]
        parts += ["flow_depth"] if "depth_range" in meta["flow"] else []
        needed |= {f"{part}.{end}" for part in parts for end in ("bin", "idx.npy")}
    for extension in sorted(needed ^ set(members)):
        sample.fail(extension, "is missing" if extension in needed else "is not of a field that the meta data list")
    return meta


class _Members:
    """The checked members of one sample; every method raises `DataError` with sample and member."""

    def __init__(self, members: Mapping[str, Member], name: str) -> None:
        self.members, self.name = members, name
        for extension in members:
            if extension not in EXTENSIONS:
                self.fail(extension, f"is no member of this format; {closest(extension, EXTENSIONS)}")
        self.meta = _checked_meta(self)

    def fail(self, member: str, why: str) -> NoReturn:
        raise DataError(f"sample '{self.name}', member {member}: {why}")

    def member(self, member: str) -> Member:
        if member not in self.members:
            self.fail(member, "is missing")
        return self.members[member]

    def limit(self, member: str, size: int) -> None:
        if size > _MAX_BYTES:
            self.fail(member, f"would decode to {size} bytes; at most {_MAX_BYTES} at a time, ask for fewer frames")

    def npy(self, member: str, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
        try:
            array = read_npy(bytes(self.member(member)[:]))
        except ValueError as error:
            self.fail(member, str(error))
        if array.dtype != np.dtype(f"<{dtype}") or array.shape != shape:
            self.fail(member, f"is {array.dtype} {array.shape}, expected {np.dtype(dtype)} {shape}")
        return array

    def finite(self, member: str, shape: tuple[int, ...]) -> np.ndarray:
        array = self.npy(member, "f4", shape)
        if not np.isfinite(array).all():
            self.fail(member, "holds numbers that are not finite")
        return array

    def chunks(self, name: str, wanted: Sequence[int], count: int) -> list[memoryview]:
        data = self.member(f"{name}.bin")
        offsets = self.npy(f"{name}.idx.npy", "u8", (count + 1,))
        if offsets[0] != 0 or offsets[-1] != len(data) or (offsets[1:] < offsets[:-1]).any():
            self.fail(f"{name}.idx.npy", f"the offsets do not divide the {len(data)} bytes of {name}.bin")
        first, last = int(offsets[min(wanted)]), int(offsets[max(wanted) + 1])
        together = isinstance(data, bytes) or last - first <= 2 * sum(int(offsets[i + 1] - offsets[i]) for i in wanted)
        if not together:  # frames far apart in a long video: each by itself
            return [memoryview(data[int(offsets[i]) : int(offsets[i + 1])]) for i in wanted]
        part = memoryview(data)[first:last] if isinstance(data, bytes) else memoryview(data[first:last])
        return [part[int(offsets[i]) - first : int(offsets[i + 1]) - first] for i in wanted]

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
        for plane, data in zip(out, self.inflate(name, wanted, count, math.prod(shape) * kind.itemsize), strict=True):
            plane[:] = np.frombuffer(data, kind).reshape(shape)
        for row in range(1, shape[-2]):  # of all planes at once: several times as fast as cumsum along columns
            np.add(out[..., row, :], out[..., row - 1, :], out=out[..., row, :])
        return out

    def bits(self, name: str, wanted: Sequence[int], count: int, shape: tuple[int, int]) -> np.ndarray:
        area = math.prod(shape)
        packed = b"".join(self.inflate(name, wanted, count, -(-area // 8)))
        rows = np.frombuffer(packed, np.uint8).reshape(len(wanted), -(-area // 8))
        return np.unpackbits(rows, axis=1, count=area).astype(bool).reshape(len(wanted), *shape)

    def video(self, frames: Sequence[int]) -> np.ndarray:
        images = self.chunks("rgb", frames, self.meta["T"])

        def fill(i: int, out: np.ndarray) -> None:
            decode_image(images[i], f"sample '{self.name}', member rgb.bin: frame {frames[i]}", out)

        out = stack(len(frames), (self.meta["H"], self.meta["W"], 3), fill)
        return out.transpose(0, 3, 1, 2)  # a view: whoever joins or moves the clip copies it anyway

    def depths(self, name: str, wanted: Sequence[int], count: int, span: list[float]) -> np.ndarray:
        low, high = span
        codes = self.planes(name, wanted, count, (self.meta["H"], self.meta["W"]), "u2")
        values = codes.astype(np.float32)
        values *= np.float32((high - low) / (INFINITE - 1))
        values += np.float32(low)
        values[codes == INFINITE] = np.inf
        return values

    def flow(self, frames: Sequence[int]) -> Flow | None:
        meta, size = self.meta["flow"], (self.meta["H"], self.meta["W"])
        new = {old: i for i, old in enumerate(frames)}
        wanted = [i for i, (s, t) in enumerate(meta["pairs"]) if s in new and t in new]
        if not wanted:
            return None
        count, exact = len(meta["pairs"]), meta.get("exact") is True
        codes = self.planes("flow", wanted, count, (2, *size), "u4" if exact else "i2")
        xy = torch.from_numpy(codes.view("<f4") if exact else codes)[None]
        if exact and not torch.isfinite(xy).all():
            self.fail("flow.bin", "holds numbers that are not finite")
        more = {
            part: torch.from_numpy(self.bits(f"flow_{part}", wanted, count, size))[None]
            for part in ("visible", "valid")
            if meta[part]
        }
        if "depth_range" in meta:
            more["depth"] = torch.from_numpy(self.depths("flow_depth", wanted, count, meta["depth_range"]))[None]
        pairs = tuple((new[meta["pairs"][i][0]], new[meta["pairs"][i][1]]) for i in wanted)
        return Flow(xy if exact else xy.float().mul_(1 / meta["scale"]), pairs, **more)


def _checked_meta(sample: _Members) -> dict[str, Any]:
    try:
        meta = read_json(bytes(sample.member("meta.json")[:]))
        if not isinstance(meta, dict) or meta.get("schema") != SCHEMA:
            found = meta.get("schema") if isinstance(meta, dict) else None
            raise ValueError(f"schema {found!r} is not the {SCHEMA} that this version reads")
        for key, low, high in (
            ("T", 1, MAX_COUNT),
            ("H", 1, MAX_SIDE),
            ("W", 1, MAX_SIDE),
            ("N", 0, MAX_COUNT),
        ):
            whole(meta.get(key), key, low, high)
        if meta["H"] * meta["W"] > MAX_AREA:
            raise ValueError(f"frames of {meta['H']}x{meta['W']} are larger than {MAX_AREA} pixels")
        fields = meta.get("fields")
        if not isinstance(fields, list) or "video" not in fields or not set(map(str, fields)) <= set(FIELDS):
            raise ValueError(f"'fields' must list 'video' and others of {', '.join(FIELDS)}")
        if not isinstance(meta.setdefault("name", ""), str) or len(meta["name"]) > 4096:
            raise ValueError("'name' must be a short text")
        if meta.setdefault("fps", None) is not None:
            number(meta["fps"], "fps")
        if meta.get("source") is not None and not isinstance(meta["source"], dict):
            raise ValueError("'source' must be an object")
        if "depth" in fields:
            _check_range(_entry(meta, "depth", "range"), "depth range")
            if meta["depth"].get("kind") != "z":
                raise ValueError("'depth' must be of the kind 'z'")
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
    if number(_entry(meta, "flow", "scale"), "flow scale") <= 0:
        raise ValueError("the flow scale must be above 0")
    if "depth_range" in meta["flow"]:
        _check_range(meta["flow"]["depth_range"], "flow depth range")
    for part in ("visible", "valid"):
        if not isinstance(_entry(meta, "flow", part), bool):
            raise ValueError(f"'flow' must say whether it has '{part}'")


def _check_range(span: Any, what: str) -> None:
    if not isinstance(span, list) or len(span) != 2 or number(span[0], what) > number(span[1], what):
        raise ValueError(f"the {what} must be [low, high]")


def check_source(source: Any) -> dict[str, Any]:
    """Return the facts of an original if they are a small JSON object; raises `DataError` if not."""
    try:
        if isinstance(source, dict) and len(json.dumps(source, allow_nan=False)) <= _MAX_SOURCE:
            return source
        raise ValueError(f"is no object of at most {_MAX_SOURCE} characters")
    except (TypeError, ValueError) as error:
        raise DataError(f"the source of a sample must be a small JSON object: {error}") from None


def _entry(meta: dict[str, Any], section: str, key: str) -> Any:
    if not isinstance(meta.get(section), dict) or key not in meta[section]:
        raise ValueError(f"'{section}' must have '{key}'")
    return meta[section][key]
