"""Point tracks out of what Kubric's MOVi data sets annotate: object coordinates, boxes, cameras, depth, segments.

The geometry and the visibility test are those of google-research/kubric ``challenges/point_tracking`` (TAP-Vid-Kubric);
numbers in brackets name the steps:

1. decode: distance D = low + step·d, object coordinates o = u / 65535, normals n = 2u / 65535 - 1;
2. lift the query pixel of frame q: on an object of id k to o in its box, which is then carried along,
   X_t = b0 + o_x (b4 - b0) + o_y (b2 - b0) + o_z (b1 - b0); in the background to the fixed point
   X = c + R g / |g| · D, g = ((u - 1/2) / f_x, -(v - 1/2) / f_y, -1), (u, v) = the pixel's centre / (W, H);
3. project: y = R_tᵀ (X_t - c_t), x_px = W (f_x y_x / -y_z + 1/2), y_px = H (1/2 - f_y y_y / -y_z);
4. hidden if (a) behind the camera, (b) the farthest of the four pixels around it lies before 0.99 of its distance,
   (c) none of those four has its id, (d) it is outside the window, (e) its surface faces away.

Kubric's cameras look along -Z with +Y up; ours (`pinhole`) along +z with y down. Image coordinates are raster pixels.
Steps 2 and 3 are linear in (o, 1) or (X, 1), so each object and frame has one 3 x 4 matrix: nothing is solved a point.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise

import numpy as np

from trackpl.errors import DataError

MAX_ID = 254  # 255 means "not annotated" in a clip
_NOBODY = 255
_FAR, _BEFORE, _TRUST = np.float32(0.99), 0.95, 0.05**2


@dataclass(frozen=True)
class Scene:
    """The annotations of one clip: T frames of H x W pixels, K objects; T, H and W at least 1.

    Raises `DataError` on construction where they do not fit together.
    """

    segments: np.ndarray  # (T, H, W) uint8: 0 background, k the object k - 1
    depth: np.ndarray  # (T, H, W) uint16 or float32; the distance to the camera's centre is low + step * depth
    low: float  # metres
    step: float  # metres
    objects: np.ndarray  # (T, H, W, 3) uint16 over [0, 1]: where in its box the surface is
    normals: np.ndarray  # (T, H, W, 3) uint16 over [-1, 1], in the world
    boxes: np.ndarray  # (K, T, 8, 3) metres: corners in the world, z of the box running fastest, then y
    rotations: np.ndarray  # (K, T, 4) quaternions (w, x, y, z), object to world
    centres: np.ndarray  # (T, 3) metres: where the camera is
    cameras: np.ndarray  # (T, 4) quaternions, camera to world
    focal: tuple[float, float]  # f_x in widths, f_y in heights of the image

    def __post_init__(self) -> None:
        t, h, w = self.segments.shape
        k = len(self.boxes)
        wanted = {"segments": (t, h, w), "depth": (t, h, w), "objects": (t, h, w, 3), "normals": (t, h, w, 3)}
        wanted |= {"boxes": (k, t, 8, 3), "rotations": (k, t, 4), "centres": (t, 3), "cameras": (t, 4)}
        for name, shape in wanted.items():
            if (found := getattr(self, name).shape) != shape:
                raise DataError(f"'{name}' has the shape {found}, expected {shape}")
        for field in fields(self):
            value = np.asarray(getattr(self, field.name))
            if value.dtype.kind == "f" and not (np.abs(value) < 1e6).all():  # also false for what is no number
                raise DataError(f"'{field.name}' holds numbers that are not finite, or beyond a million")
        if self.segments.dtype != np.uint8 or self.segments.max() > min(k, MAX_ID):
            raise DataError(f"segment ids up to {self.segments.max()} do not fit {k} objects (at most {MAX_ID})")
        if self.step < 0 or min(self.focal) <= 0:
            raise DataError(f"the depth step {self.step:g} and focal lengths {self.focal} must be positive")

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.segments.shape[1], self.segments.shape[2]

    @property
    def frames(self) -> int:
        """Number of frames."""
        return len(self.segments)


@dataclass(frozen=True)
class Points:
    """N points in the frames that were asked for."""

    xy: np.ndarray  # (T, 2, N) float32, raster pixels; mirrored and meaningless behind the camera
    hidden: np.ndarray  # (T, N) bool
    z: np.ndarray  # (T, N) float32 metres along the optical axis; negative behind the camera


def focal(focal_mm: float, sensor_mm: float, size: tuple[int, int], aspect: str | None = None) -> tuple[float, float]:
    """Return f_x in widths and f_y in heights of an image of `size` (H, W).

    For images that are not square Kubric's renderer has f_y = f_x W / H (`aspect` "renderer") and its point-tracking
    code f_x H / W ("challenge"); one has to be chosen.

    Raises:
        DataError: not square and no choice made; a length that is not positive.
    """
    h, w = size
    if not (0 < focal_mm < 1e6 and 0 < sensor_mm < 1e6):
        raise DataError(f"focal length {focal_mm} mm and sensor width {sensor_mm} mm must be positive")
    if h != w and aspect is None:
        raise DataError(f"frames of {h}x{w} are not square: say --aspect renderer (what Kubric renders) or challenge")
    x = float(focal_mm) / float(sensor_mm)
    return x, x * h / w if aspect == "challenge" else x * w / h


def matrices(quaternions: np.ndarray) -> np.ndarray:
    """Turn unit quaternions (..., 4), w first, into rotation matrices (..., 3, 3), float64."""
    w, x, y, z = np.moveaxis(np.asarray(quaternions, np.float64), -1, 0)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    return np.stack([np.stack(row, -1) for row in rows], -2)


# Where points are -------------------------------------------------------------------------------------------


def track(
    scene: Scene,
    queries: np.ndarray,
    frames: Sequence[int] | None = None,
    window: tuple[float, float, float, float] | None = None,
    snap: bool = False,
) -> Points:
    """Follow the surfaces at the pixels `queries` (N, 3), whole numbers (frame, row, column), through `frames` (all).

    `window` (top, left, bottom, right) in pixels is what counts as seen; the whole image if None. Coordinates are
    always those of the whole image. With `snap` (see `sample`) a pixel with something clearly before it beside it
    shows nothing but that.
    """
    (h, w), (fx, fy) = scene.size, scene.focal
    chosen = list(range(scene.frames)) if frames is None else list(frames)
    xy = np.empty((len(chosen), 2, len(queries)), np.float32)
    z, hidden = np.empty(xy[:, 0].shape, np.float32), np.empty(xy[:, 0].shape, bool)
    top, left, bottom, right = window or (0, 0, h, w)
    where = np.ravel_multi_index(tuple(queries.T), scene.segments.shape)
    ids = scene.segments.ravel()[where]
    segments = np.where(beside_occluder(scene), np.uint8(_NOBODY), scene.segments) if snap else scene.segments
    world, background = _lift_background(scene, queries), _cameras(scene, chosen)
    order = np.argsort(ids, kind="stable")
    on_objects = order[np.searchsorted(ids[order], 1) :]  # by id
    projected, away = _project_objects(scene, where[on_objects], ids[on_objects], chosen)
    mine, seen = ids * np.uint32(0x01010101), np.empty((3, len(ids)), np.float32)
    for t, frame in enumerate(chosen):  # a frame at a time: what is in work stays in the processor's cache
        np.matmul(background[t], world, out=seen)  # as if all were background, which most is; then the objects
        for row, values in zip(seen, projected[t], strict=True):
            row[on_objects] = values
        z[t] = seen[2]
        scale = 1 / np.where(np.abs(seen[2]) < 1e-9, np.float32(1e-9), seen[2])
        x, y = np.multiply(seen[0], scale, out=xy[t, 0]), np.multiply(seen[1], scale, out=xy[t, 1])
        cell = np.clip(y + 0.5, 0, h).astype(np.int32) * np.int32(w + 1) + np.clip(x + 0.5, 0, w).astype(np.int32)
        nearer = _farthest(scene.depth[frame]).take(cell, mode="clip") * np.float32(scene.step) + np.float32(scene.low)
        a, b = (x - w / 2) * (1 / (fx * w)), (y - h / 2) * (1 / (fy * h))
        distance = np.abs(seen[2]) * np.sqrt(a * a + b * b + 1)
        out = np.less(nearer, _FAR * distance, out=hidden[t])  # (4b)
        out |= seen[2] < 0  # (4a)
        out |= _no_zero_byte(_four_ids(segments[frame]).take(cell, mode="clip") ^ mine)  # (4c)
        out |= (x < left) | (x > right) | (y < top) | (y > bottom)  # (4d)
        out[on_objects] |= away[t]  # (4e)
    return Points(xy, hidden, z)


def _cameras(scene: Scene, chosen: list[int]) -> np.ndarray:
    """Return what takes points of the world, homogeneous, to (x z, y z, z) in pixels and metres (3): (T, 3, 4)."""
    (h, w), (fx, fy) = scene.size, scene.focal
    to_image = np.array([[fx * w, 0, -w / 2], [0, -fy * h, -h / 2], [0, 0, -1]])
    turn = to_image @ matrices(scene.cameras[chosen]).swapaxes(-1, -2)  # R_tᵀ
    centres = scene.centres[chosen].astype(np.float64)[..., None]
    return np.concatenate([turn, -turn @ centres], -1).astype(np.float32)


def _lift_background(scene: Scene, queries: np.ndarray) -> np.ndarray:
    """Lift pixels to points of the world, homogeneous (4, N) (2)."""
    (h, w), (fx, fy) = scene.size, scene.focal
    t, i, j = queries.T
    out = np.ones((4, len(t)), np.float32)
    ray = np.stack([((j + 0.5) / w - 0.5) / fx, (0.5 - (i + 0.5) / h) / fy, -out[3]]).astype(np.float32)
    distance = scene.depth[t, i, j] * np.float32(scene.step) + np.float32(scene.low)
    ray *= distance / np.sqrt((ray * ray).sum(0))
    rotations = matrices(scene.cameras).astype(np.float32)
    for frame, here in _by_frame(t):
        out[:3, here] = rotations[frame] @ ray[:, here] + scene.centres[frame, :, None].astype(np.float32)
    return out


def _by_frame(t: np.ndarray) -> list[tuple[int, slice | np.ndarray]]:
    """Divide queries by their frame: (frame, which of them)."""
    if len(t) and (t == t[0]).all():
        return [(int(t[0]), slice(None))]
    return [(int(frame), np.flatnonzero(t == frame)) for frame in np.unique(t)]


def _project_objects(
    scene: Scene, pixels: np.ndarray, ids: np.ndarray, chosen: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Lift and project the points on objects, sorted by id (2, 3): (T, 3, N) of (x z, y z, z); who faces away (T, N).

    `pixels` count through all pixels of the clip.
    """
    out = np.empty((len(chosen), 3, len(pixels)), np.float32)
    away, cameras = np.zeros((len(chosen), len(pixels)), bool), _cameras(scene, chosen)
    trusted = trusted_normals(scene.normals, pixels)
    normals = scene.normals.reshape(-1, 3).take(pixels, axis=0) * np.float32(2 / 65535) - 1  # (1)
    inside = np.ones((4, len(pixels)), np.float32)
    inside[:3] = scene.objects.reshape(-1, 3).take(pixels, axis=0).T * np.float32(1 / 65535)  # (1)
    query_frames = pixels // scene.segments[0].size
    bounds = np.searchsorted(ids, np.arange(len(scene.boxes) + 2))  # of ids 0 to K + 1
    for k, (begin, end) in enumerate(pairwise(bounds[1:])):
        if begin == end:
            continue
        box, part = _box_maps(scene.boxes[k]), slice(begin, end)
        maps = cameras @ np.concatenate([box[chosen], np.tile([[[0, 0, 0, 1.0]]], (len(chosen), 1, 1))], 1)
        out[:, :, part] = (maps.reshape(-1, 4).astype(np.float32) @ inside[:, part]).reshape(len(chosen), 3, -1)
        sure = begin + np.flatnonzero(trusted[part])
        box[..., 3] -= scene.centres  # X_t - c_t
        turn = matrices(scene.rotations[k]).swapaxes(-1, -2)
        away[:, sure] = _faces_away(turn, turn @ box, chosen, query_frames[sure], normals[sure], inside[:, sure])
    return out, away


def _box_maps(corners: np.ndarray) -> np.ndarray:
    """Return what takes places in a box (o, 1) to the world (2): corners (T, 8, 3) to (T, 3, 4)."""
    b = corners.astype(np.float64)
    return np.stack([b[:, 4] - b[:, 0], b[:, 2] - b[:, 0], b[:, 1] - b[:, 0], b[:, 0]], -1)


def _faces_away(
    turn: np.ndarray, sight: np.ndarray, chosen: list[int], at: np.ndarray, normals: np.ndarray, inside: np.ndarray
) -> np.ndarray:
    """Test which surfaces of one object face away (4e): (T, N).

    m_t · (X_t - c_t) > 0 with m_t = R_t R_qᵀ n is, seen from the object, (R_qᵀ n) · R_tᵀ (X_t - c_t): linear in the
    twelve products of R_qᵀ n and (o, 1). Ignored where it would hide a point in the frame of its query.
    """
    own, ignored = np.empty((3, len(at)), np.float32), np.empty(len(at), bool)
    for frame, here in _by_frame(at):
        own[:, here] = turn[frame].astype(np.float32) @ normals[here].T
    products, rows = (own[:, None] * inside).reshape(12, -1), sight.reshape(-1, 12).astype(np.float32)
    for frame, here in _by_frame(at):
        ignored[here] = rows[frame] @ products[:, here] > 0
    out = rows[chosen] @ products > 0
    return np.logical_and(out, ~ignored, out=out)


def trusted_normals(normals: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """Say whose normal can be trusted: at most two of the four diagonal neighbours differ by more than 0.05.

    `normals` (T, H, W, 3) uint16, `pixels` (N) count through all of them; beyond the border everything differs.
    """
    h, w = normals.shape[1:3]
    flat = normals.reshape(-1, 3)
    row, column = pixels // w % h, pixels % w
    own, differing = flat.take(pixels, axis=0).astype(np.float32), np.zeros(len(pixels), np.int8)
    for up, left in ((-1, -1), (-1, 1), (1, -1), (1, 1)):
        inside = (row != (0 if up < 0 else h - 1)) & (column != (0 if left < 0 else w - 1))
        apart = (flat.take(pixels + (up * w + left), axis=0, mode="clip") - own) * np.float32(2 / 65535)
        differing += ~inside | (np.einsum("ij,ij->i", apart, apart) > _TRUST)
    return differing <= 2


def beside_occluder(scene: Scene) -> np.ndarray:
    """Test which pixels have one among the 3 x 3 around at a distance below 0.95 of their own: (T, H, W) bool."""
    around = [_padded(scene.depth)[:, i:][:, : scene.size[0]] for i in range(3)]
    column = np.minimum(np.minimum(around[0], around[1]), around[2])
    least = np.minimum(np.minimum(column[:, :, :-2], column[:, :, 1:-1]), column[:, :, 2:])
    return least * scene.step + scene.low < _BEFORE * (scene.depth * scene.step + scene.low)


def _padded(planes: np.ndarray) -> np.ndarray:
    """Repeat the border of (..., H, W) once: (..., H + 2, W + 2)."""
    *rest, h, w = planes.shape
    out = np.empty((*rest, h + 2, w + 2), planes.dtype)
    out[..., 1:-1, 1:-1] = planes
    out[..., 0, 1:-1], out[..., -1, 1:-1] = planes[..., 0, :], planes[..., -1, :]
    out[..., 0], out[..., -1] = out[..., 1], out[..., -2]
    return out


def _farthest(depth: np.ndarray) -> np.ndarray:
    """Return the largest of the four pixels around each corner of the raster, (H + 1)(W + 1), the border repeated."""
    padded = _padded(depth)
    rows = np.maximum(padded[:-1], padded[1:])
    return np.maximum(rows[:, :-1], rows[:, 1:]).ravel()


def _four_ids(segments: np.ndarray) -> np.ndarray:
    """Return the ids of the four pixels around each corner of the raster, one a byte: (H + 1)(W + 1) uint32."""
    padded = _padded(segments)
    pairs = padded[:, :-1] | padded[:, 1:].astype(np.uint16) << np.uint16(8)
    return (pairs[:-1] | pairs[1:].astype(np.uint32) << np.uint32(16)).ravel()


def _no_zero_byte(words: np.ndarray) -> np.ndarray:
    """Test which uint32 have no byte that is zero."""
    return ((words - np.uint32(0x01010101)) & ~words & np.uint32(0x80808080)) == 0


# Which points -----------------------------------------------------------------------------------------------


def allocate(counts: np.ndarray, total: int, fraction: float) -> np.ndarray:
    """Share `total` tracks among ids seen `counts` times: the rarest first, none more than `fraction` of its count."""
    out, left = np.zeros(len(counts), np.int64), total
    for i, k in enumerate(np.argsort(counts, kind="stable")):
        out[k] = min(np.rint(left / (len(counts) - i)), np.rint(fraction * counts[k]))  # rounds half to even
        left -= out[k]
    return out


def sample(
    scene: Scene,
    points: int,
    rng: np.random.Generator,
    *,
    fraction: float = 0.1,
    stride: int = 4,
    window: tuple[int, int, int, int] | None = None,
    snap: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Choose at most `points` pixels to track: (N, 3) whole (frame, row, column), by id, then by frame; and queries.

    They come from a grid of every `stride`-th frame, row and column of the `window` (top, left, bottom, right), begun
    at random, with replacement. Where there are few pixels there are fewer rows, never copies to fill up. Queries
    equal the pixels unless `snap`: then no pixel has a neighbour clearly before it, and half of them are queried up to
    a pixel beside it where something clearly lies behind, as a hand may click beside a thin object.
    """
    top, left, bottom, right = window or (0, 0, *scene.size)
    begin = [int(rng.integers(min(stride, n))) for n in (scene.frames, bottom - top, right - left)]
    ends = (scene.frames, bottom, right)
    axes = [np.arange(a + s, b, stride) for a, b, s in zip((0, top, left), ends, begin, strict=True)]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
    if snap:
        grid = grid[~beside_occluder(scene)[tuple(grid.T)]]
    ids = scene.segments[tuple(grid.T)]
    counts = np.bincount(ids)
    order, first = np.argsort(ids, kind="stable"), np.cumsum([0, *counts])
    shares = allocate(counts, points, fraction)
    chosen = [np.sort(rng.integers(first[k], first[k + 1], n)) for k, n in enumerate(shares) if n]
    pixels = grid[order[np.concatenate(chosen)]] if chosen else grid[:0]
    return pixels, _snapped(scene, pixels, rng) if snap else pixels


def _distance(scene: Scene, pixels: np.ndarray) -> np.ndarray:
    return scene.depth[tuple(pixels.T)] * scene.step + scene.low


def _snapped(scene: Scene, pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Move half of the pixels by up to one, where what is there lies 1 / 0.95 as far."""
    shift = np.pad(rng.integers(-1, 2, (len(pixels), 2)), ((0, 0), (1, 0)))
    moved = (pixels + shift).clip(0, np.array([scene.frames, *scene.size]) - 1)
    go = (rng.random(len(pixels)) < 0.5) & (_distance(scene, moved) >= _distance(scene, pixels) / _BEFORE)
    return np.where(go[:, None], moved, pixels)


def every_pixel(scene: Scene, frame: int) -> np.ndarray:
    """Return the pixels of one frame, row by row: (H W, 3) whole (frame, row, column)."""
    h, w = scene.size
    i, j = np.divmod(np.arange(h * w), w)
    return np.stack([np.full(h * w, frame), i, j], -1)


# Camera and depth -------------------------------------------------------------------------------------------


def pinhole(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Return cameras with x right, y down, z forward: (T, 4) fx fy cx cy in pixels, (T, 4, 4) world to camera."""
    (h, w), (fx, fy) = scene.size, scene.focal
    intrinsics = np.tile(np.array([fx * w, fy * h, w / 2, h / 2], np.float32), (scene.frames, 1))
    turn = np.diag([1.0, -1.0, -1.0]) @ matrices(scene.cameras).swapaxes(-1, -2)
    pose = np.tile(np.eye(4), (scene.frames, 1, 1))
    pose[:, :3, :3], pose[:, :3, 3] = turn, -(turn @ scene.centres[..., None].astype(np.float64))[..., 0]
    return intrinsics, pose.astype(np.float32)


def depth_map(scene: Scene) -> np.ndarray:
    """Return metres along the optical axis (T, H, W), float32: the distance over the length of the ray at z = 1."""
    (h, w), (fx, fy) = scene.size, scene.focal
    x, y = ((np.arange(w) + 0.5) / w - 0.5) / fx, ((np.arange(h) + 0.5) / h - 0.5) / fy
    ray = np.sqrt(1 + x * x + (y * y)[:, None]).astype(np.float32)
    return (scene.depth * np.float32(scene.step) + np.float32(scene.low)) / ray
