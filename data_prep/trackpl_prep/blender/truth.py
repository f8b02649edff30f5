"""Exact truth of a scene from its triangles alone: what each ray meets, and where each surface point goes.

A frame's triangles are kept as three linear functions of the pixel each, e_i(x, y) = a x + b y + c, homogeneous
barycentric coordinates as of Olano and Greer 1997 ("Triangle scan conversion using 2D homogeneous coordinates"): a
triangle covers a pixel where none of them is negative, e_i / (e_0 + e_1 + e_2) are the barycentric coordinates there,
and (e_0 + e_1 + e_2) / det is one over the depth. A neighbour's function on the common edge is the same with the other
sign, to the last bit, so that no ray slips between two triangles. All numbers are float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trackpl_prep.blender.physics import rotations
from trackpl_prep.blender.scene import NEAR, Scene

Array = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
TOLERANCE = 1e-5  # of the depth: what is nearer by less does not hide
_CELL = 4  # pixels: side of the cells that triangles are sorted into
_CHUNK = 1 << 19  # pairs of a ray and a triangle at a time


@dataclass(frozen=True)
class Geometry:
    """All triangles of a scene in all T frames."""

    vertices: Array  # (T, V, 3) camera coordinates: x right, y down, z forward; metres
    faces: Ints  # (F, 3)
    labels: Ints  # (F,) 0 surroundings, bodies from 1
    item: Ints  # (F,) which surface of the scene
    intrinsics: Array  # (4,) fx, fy, cx, cy in pixels
    pose: Array  # (T, 4, 4) world to camera
    size: tuple[int, int]

    @property
    def frames(self) -> int:
        """Number of frames T."""
        return len(self.vertices)


@dataclass(frozen=True)
class View:
    """The triangles of one frame that can be seen, sorted into cells of the image."""

    planes: Array  # (9, G) the three functions' a, b, c of each triangle
    det: Array  # (G,)
    face: Ints  # (G,) number in the geometry
    start: Ints  # (cells + 1,) into `listed`
    listed: Ints  # numbers (of the G) of the triangles that touch each cell
    size: tuple[int, int]


@dataclass(frozen=True)
class Hits:
    """What rays meet first."""

    face: Ints  # (M,) number in the geometry; -1: nothing
    weights: Array  # (M, 3) barycentric coordinates
    depth: Array  # (M,) metres along the optical axis; infinite: nothing


def geometry(scene: Scene, size: tuple[int, int]) -> Geometry:
    """Place the triangles of all T frames of a scene, seen in images of `size` (H, W)."""
    h, w = size
    inner = slice(1, -1)  # without the frames before and after
    to_camera = scene.camera_turn[inner].swapaxes(-1, -2)
    turns, vertices, faces = rotations(scene.turns[inner]), [], []
    start = 0
    for k, item in enumerate(scene.items):
        world = item.mesh.vertices @ turns[:, k].swapaxes(-1, -2) + scene.places[inner, k, None]
        vertices.append((world - scene.camera_place[inner, None]) @ to_camera.swapaxes(-1, -2))
        faces.append(item.mesh.faces.astype(np.int64) + start)
        start += len(item.mesh.vertices)
    counts = [len(f) for f in faces]
    pose = np.broadcast_to(np.eye(4), (len(to_camera), 4, 4)).copy()
    pose[:, :3, :3] = to_camera
    pose[:, :3, 3] = -np.einsum("tij,tj->ti", to_camera, scene.camera_place[inner])
    return Geometry(
        np.concatenate(vertices, 1),
        np.concatenate(faces),
        np.repeat([item.label for item in scene.items], counts),
        np.repeat(np.arange(len(scene.items)), counts),
        np.array([scene.focal * w, scene.focal * w, w / 2, h / 2]),
        pose,
        size,
    )


def project(points: Array, intrinsics: Array) -> Array:
    """Project points (..., 3) in camera coordinates to pixels (..., 2); behind the camera they mean nothing."""
    z = points[..., 2:]
    z = np.where(np.abs(z) < 1e-6, 1e-6, z)
    return points[..., :2] / z * intrinsics[:2] + intrinsics[2:]


def view(geo: Geometry, frame: int) -> View:
    """Prepare one frame for `cast`."""
    fx, fy, cx, cy = geo.intrinsics
    points = geo.vertices[frame]
    a, b, c = (points[geo.faces[:, k]] for k in range(3))
    det = (a * np.cross(b, c)).sum(-1)
    # Of a closed body, seen from outside, a triangle that turns its back is never the nearest.
    depth = np.stack([p[:, 2] for p in (a, b, c)])
    keep = np.flatnonzero((np.abs(det) > 1e-14) & ((det < 0) | (geo.labels == 0)) & (depth > NEAR).any(0))
    low, high = _bounds(geo, points, keep)
    inside: Bools = np.all(low < np.array(geo.size[::-1]), -1) & np.all(high >= 0, -1)
    keep, low, high = keep[inside], low[inside], high[inside]
    sign = np.sign(det[keep])
    planes = []
    for p, q in ((b, c), (c, a), (a, b)):
        n = np.cross(p[keep], q[keep]) * sign[:, None]
        planes += [n[:, 0] / fx, n[:, 1] / fy, n[:, 2] - n[:, 0] * (cx / fx) - n[:, 1] * (cy / fy)]
    found = np.stack(planes)
    inside = _touching(found, np.zeros((2, 1)), np.array(geo.size[::-1])[:, None])
    found, keep = np.ascontiguousarray(found[:, inside]), keep[inside]
    start, listed = _cells(found, low[inside], high[inside], geo.size)
    return View(found, np.abs(det[keep]), keep, start, listed, geo.size)


def _bounds(geo: Geometry, points: Array, faces: Ints) -> tuple[Array, Array]:
    """Return the boxes (G, 2) of triangles in pixels; those that reach behind the camera may be anywhere."""
    xy = project(points, geo.intrinsics)[geo.faces[faces]]
    behind = np.any(points[:, 2][geo.faces[faces]] <= NEAR, axis=-1, keepdims=True)
    # A hundredth of a pixel wider, against rounding.
    return np.where(behind, 0.0, xy.min(1) - 0.01), np.where(behind, np.array(geo.size[::-1]), xy.max(1) + 0.01)


def _touching(planes: Array, low: Array, high: Array) -> Bools:
    """Tell which triangles (9, G) may touch boxes (2, G) of pixels: no edge has all of its box outside.

    Rounded arithmetic is monotone: what `cast` finds inside at any place of the box, this finds at a corner of it.
    """
    touching = np.ones(planes.shape[1], bool)
    for a, b, c in planes.reshape(3, 3, -1):
        x, y = np.where(a > 0, high[0], low[0]), np.where(b > 0, high[1], low[1])
        touching &= a * x + b * y + c >= 0
    return touching


def _cells(planes: Array, low: Array, high: Array, size: tuple[int, int]) -> tuple[Ints, Ints]:
    """List the triangles that touch each cell, row by row."""
    grid = np.array([-(-size[1] // _CELL), -(-size[0] // _CELL)])
    first = np.clip(np.floor(low / _CELL), 0, grid - 1).astype(np.int64)
    last = np.clip(np.floor(high / _CELL), 0, grid - 1).astype(np.int64)
    count = last - first + 1
    total = count.prod(-1)
    owner = np.repeat(np.arange(len(low)), total)
    place = np.arange(total.sum()) - np.repeat(np.cumsum(total) - total, total)
    wide = count[owner, 0]
    column, row = first[owner, 0] + place % wide, first[owner, 1] + place // wide
    corner = np.stack([column, row]) * float(_CELL)
    keep = np.flatnonzero((total[owner] == 1) | _touching(planes[:, owner], corner, corner + _CELL))
    owner, cell = owner[keep], (row * grid[0] + column)[keep]
    order = np.argsort(cell, kind="stable")
    return np.searchsorted(cell[order], np.arange(grid.prod() + 1)), owner[order]


def cast(seen: View, xy: Array) -> Hits:
    """Find what lies under the places `xy` (M, 2) of a frame, in pixels; outside the frame there is nothing."""
    h, w = seen.size
    count = len(xy)
    hits = Hits(np.full(count, -1), np.zeros((count, 3)), np.full(count, np.inf))
    x, y = xy.T
    within = np.flatnonzero((x >= 0) & (x <= w) & (y >= 0) & (y <= h))
    columns, rows = -(-w // _CELL), -(-h // _CELL)
    column = np.minimum(x[within] // _CELL, columns - 1).astype(np.int64)
    cell = np.minimum(y[within] // _CELL, rows - 1).astype(np.int64) * columns + column
    pairs = seen.start[cell + 1] - seen.start[cell]
    # Rays of one cell after another: their triangles are read once.
    order = np.argsort(cell, kind="stable")
    within, cell, pairs = within[order], cell[order], pairs[order]
    done = np.cumsum(pairs)
    begin = 0
    while begin < len(within):
        end = max(int(np.searchsorted(done, (done[begin - 1] if begin else 0) + _CHUNK, "right")), begin + 1)
        part = slice(begin, end)
        _cast(seen, within[part], x[within[part]], y[within[part]], seen.start[cell[part]], pairs[part], hits)
        begin = end
    return hits


def _cast(seen: View, ray: Ints, x: Array, y: Array, start: Ints, pairs: Ints, hits: Hits) -> None:
    """Test rays against all triangles of their cells, and note the nearest."""
    which = np.repeat(np.arange(len(ray)), pairs)
    triangle = seen.listed[np.arange(len(which)) + np.repeat(start - (np.cumsum(pairs) - pairs), pairs)]
    x, y = x[which], y[which]
    edges: list[Array] = []
    for k in (0, 3, 6):
        a, b, c = seen.planes[k : k + 3]
        edge = a[triangle] * x + b[triangle] * y + c[triangle]
        inside = np.flatnonzero(edge >= 0)
        if len(inside) < len(which):
            which, triangle, x, y = which[inside], triangle[inside], x[inside], y[inside]
            edges = [e[inside] for e in edges]
            edge = edge[inside]
        edges.append(edge)
    total = edges[0] + edges[1] + edges[2]
    with np.errstate(divide="ignore"):
        depth = seen.det[triangle] / total
    near = np.flatnonzero((total > 0) & (depth > NEAR))
    order = near[np.lexsort((triangle[near], depth[near], which[near]))]
    first = order[np.flatnonzero(np.diff(which[order], prepend=-1))]
    target = ray[which[first]]
    hits.face[target] = seen.face[triangle[first]]
    hits.depth[target] = depth[first]
    hits.weights[target] = np.stack([e[first] for e in edges], -1) / total[first, None]


def move(geo: Geometry, hits: Hits, frame: int) -> tuple[Array, Array]:
    """Return where surface points are in a frame: pixels (M, 2) and depth (M,), also behind other things."""
    corners = geo.vertices[frame][geo.faces[hits.face]]
    points = np.einsum("mk,mkc->mc", hits.weights, corners)
    return project(points, geo.intrinsics), points[:, 2]


def showing(seen: View, xy: Array, depth: Array) -> Bools:
    """Tell which points (M,) are inside a frame with nothing nearer on the way to the camera."""
    h, w = seen.size
    visible = (depth > NEAR) & (xy >= 0).all(-1) & (xy[:, 0] < w) & (xy[:, 1] < h)
    some = np.flatnonzero(visible)
    visible[some] = cast(seen, xy[some]).depth >= depth[some] * (1 - TOLERANCE)
    return visible


@dataclass(frozen=True)
class Tracked:
    """Points followed through all frames."""

    xy: Array  # (T, N, 2) pixels
    depth: Array  # (T, N) metres along the optical axis
    visible: Bools  # (T, N)


def follow(geo: Geometry, views: Sequence[View], hits: Hits) -> Tracked:
    """Follow surface points through all frames."""
    moved = [move(geo, hits, t) for t in range(geo.frames)]
    visible = [showing(seen, xy, depth) for seen, (xy, depth) in zip(views, moved, strict=True)]
    return Tracked(np.stack([m[0] for m in moved]), np.stack([m[1] for m in moved]), np.stack(visible))


def centres(size: tuple[int, int]) -> Array:
    """Return the centres (H * W, 2) of all pixels, row by row."""
    y, x = np.meshgrid(np.arange(size[0]) + 0.5, np.arange(size[1]) + 0.5, indexing="ij")
    return np.stack([x.ravel(), y.ravel()], -1)


def choose(
    rng: np.random.Generator, labels: Ints, points: int, background: float = 0.25, share: float = 0.5
) -> tuple[Ints, Array]:
    """Choose the places of query points as Kubric's sampler does: random pixels of random frames, fair to all bodies.

    A body, however small, gets as many points as a large one, but no more than `share` of its pixels in all frames;
    the surroundings get the part `background`, and what the bodies cannot take.

    Args:
        rng: random generator.
        labels: (T, H, W) 0 for surroundings.
        points: N.
        background: part of the points.
        share: part of a body's pixels.

    Returns:
        frames (N,), in no order, and places (N, 2) in pixels, anywhere within their pixel.
    """
    flat = labels.ravel()
    order = rng.permutation(len(flat))
    bodies = np.unique(flat[flat > 0])
    room = np.array([int((flat == k).sum() * share) for k in bodies], np.int64)
    quota = fair(room, points - round(background * points))
    chosen = [order[flat[order] == k][:n] for k, n in zip(bodies, quota, strict=True)]
    rest = points - int(quota.sum())
    around = order[flat[order] == 0][:rest]
    chosen += [around, rng.integers(0, len(flat), rest - len(around))]  # a scene without surroundings: anywhere
    pick = rng.permutation(np.concatenate(chosen))
    frame, row, column = np.unravel_index(pick, labels.shape)
    return frame.astype(np.int64), np.stack([column, row], -1) + rng.random((points, 2))


def fair(room: Ints, total: int) -> Ints:
    """Deal out `total` things to those who have this much room, as evenly as can be; fewer where there is no room."""
    quota = np.zeros_like(room)
    while (left := total - int(quota.sum())) > 0 and (quota < room).any():
        open_ = np.flatnonzero(quota < room)
        quota[open_] += np.minimum(room[open_] - quota[open_], max(left // len(open_), 1))
        if (over := int(quota.sum()) - total) > 0:  # fewer things than takers
            quota[open_[-over:]] -= 1
    return quota
