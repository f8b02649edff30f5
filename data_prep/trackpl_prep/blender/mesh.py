"""Triangle meshes from curves and surfaces: what `bodies` is made with.

All meshes are closed and their triangles counter-clockwise seen from outside, unless a function says otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Mesh:
    """A textured triangle mesh and the convex pieces that stand for it in collisions."""

    vertices: Array  # (V, 3) metres
    faces: NDArray[np.int32]  # (F, 3) numbers of vertices
    uv: Array  # (F, 3, 2) place of each corner in the texture, which repeats with period 1 (mirrored)
    parts: tuple[Array, ...] = ()  # convex hulls of these points (P, 3)
    smooth: bool = True  # shaded as if round


def corners(mesh: Mesh) -> Array:
    """Return the corners (F, 3, 3) of all triangles."""
    return mesh.vertices[mesh.faces]


def volume(mesh: Mesh) -> float:
    """Return the enclosed volume in cubic metres; negative where the triangles face inward."""
    a, b, c = corners(mesh).swapaxes(0, 1)
    return float((a * np.cross(b, c)).sum() / 6)


def join(meshes: Sequence[Mesh]) -> Mesh:
    """Put meshes into one."""
    starts = np.cumsum([0, *(len(m.vertices) for m in meshes)])
    return Mesh(
        np.concatenate([m.vertices for m in meshes]),
        np.concatenate([m.faces + s for m, s in zip(meshes, starts, strict=False)]).astype(np.int32),
        np.concatenate([m.uv for m in meshes]),
        tuple(p for m in meshes for p in m.parts),
        meshes[0].smooth,
    )


def outward(mesh: Mesh) -> Mesh:
    """Turn all triangles round if they face inward."""
    if volume(mesh) >= 0:
        return mesh
    return replace(mesh, faces=mesh.faces[:, ::-1].copy(), uv=mesh.uv[:, ::-1].copy())


def cleaned(mesh: Mesh) -> Mesh:
    """Drop triangles without area, as at the poles of a sphere."""
    a, b, c = corners(mesh).swapaxes(0, 1)
    keep = np.linalg.norm(np.cross(b - a, c - a), axis=-1) > 1e-9 * np.ptp(mesh.vertices) ** 2
    return replace(mesh, faces=mesh.faces[keep], uv=mesh.uv[keep])


def fitted(mesh: Mesh, radius: float) -> Mesh:
    """Move the centre of the volume to the origin and scale the farthest vertex to `radius` metres."""
    a, b, c = corners(mesh).swapaxes(0, 1)
    weight = (a * np.cross(b, c)).sum(-1)
    centre = ((a + b + c) / 4 * weight[:, None]).sum(0) / weight.sum()
    scale = radius / np.linalg.norm(mesh.vertices - centre, axis=-1).max()
    parts = tuple((p - centre) * scale for p in mesh.parts)
    return replace(mesh, vertices=(mesh.vertices - centre) * scale, parts=parts)


def surface(points: Array, closed: tuple[bool, bool], repeat: tuple[float, float] = (1.0, 1.0)) -> Mesh:
    """Make a grid of points (U, V, 3) into triangles, joined at its ends where `closed`; it need not enclose anything.

    The texture runs `repeat` times over the grid, an even number along a closed side, that its mirrored ends meet.
    """
    u, v = points.shape[:2]
    nu, nv = (n if c else n - 1 for n, c in zip((u, v), closed, strict=True))
    i, j = (a.ravel() for a in np.meshgrid(np.arange(nu), np.arange(nv), indexing="ij"))
    steps = np.array([[0, 0], [1, 0], [1, 1], [0, 1]])
    ij = np.stack([i, j], -1)[:, None] + steps  # (quads, 4, 2)
    index = ij[..., 0] % u * v + ij[..., 1] % v
    uv = ij / np.array([nu, nv]) * np.array(repeat)
    split = np.array([[0, 1, 2], [0, 2, 3]])
    return Mesh(points.reshape(-1, 3), index[:, split].reshape(-1, 3).astype(np.int32), uv[:, split].reshape(-1, 3, 2))


def tube(path: Array, radius: Array, sides: int, closed: bool, pieces: int, flat: float = 1.0) -> Mesh:
    """Sweep a circle (an ellipse if `flat` is below 1) along a path (n, 3) with radius (n,): a closed skin.

    The circle turns as little as it can; along a closed path the rest of the turn is spread evenly.
    """
    ahead = np.roll(path, -1, 0) - np.roll(path, 1, 0)
    if not closed:
        ahead[0], ahead[-1] = path[1] - path[0], path[-1] - path[-2]
    ahead /= np.linalg.norm(ahead, axis=-1, keepdims=True)
    side = _transported(ahead)
    turn = np.zeros(len(path))
    if closed:
        last = _carried(side[-1], ahead[-1], ahead[0])
        turn = -np.arctan2(last @ np.cross(ahead[0], side[0]), last @ side[0]) * np.arange(len(path)) / len(path)
    angle = 2 * np.pi * np.arange(sides)[None] / sides
    up = np.cross(ahead, side)
    x, y, c, s = np.cos(angle), flat * np.sin(angle), np.cos(turn)[:, None], np.sin(turn)[:, None]
    a, b = x * c - y * s, x * s + y * c
    rings = path[:, None] + radius[:, None, None] * (a[..., None] * side[:, None] + b[..., None] * up[:, None])
    length = np.linalg.norm(np.diff(path, axis=0), axis=-1).sum()
    wraps = 2 * max(1, round(length / (4 * np.pi * radius.mean())))
    mesh = surface(rings, (closed, True), (float(wraps), 2.0))
    if not closed:
        mesh = join([mesh, _cap(rings[0][::-1], path[0]), _cap(rings[-1], path[-1])])
    step = max(1, sides // 8)
    ends = np.linspace(0, len(path) if closed else len(path) - 1, pieces + 1).round().astype(int)
    rings = np.concatenate([rings, rings[:1]])
    parts = tuple(rings[sorted({a, (a + b) // 2, b}), ::step].reshape(-1, 3) for a, b in pairwise(ends))
    return outward(cleaned(Mesh(mesh.vertices, mesh.faces, mesh.uv, parts)))


def _carried(vector: Array, old: Array, new: Array) -> Array:
    """Carry a vector square to the direction `old` over to the direction `new`, turning as little as possible."""
    vector = vector - (vector @ new) / (1 + old @ new) * (old + new)
    vector = vector - new * (vector @ new)
    return vector / np.linalg.norm(vector)


def _transported(ahead: Array) -> Array:
    """Return a vector (n, 3) square to each direction of a path."""
    start = np.eye(3)[np.abs(ahead[0]).argmin()]
    side = [_carried(start, ahead[0], ahead[0])]
    for old, new in pairwise(ahead):
        side.append(_carried(side[-1], old, new))
    return np.stack(side)


def _cap(ring: Array, centre: Array) -> Mesh:
    """Close a ring (n, 3) by triangles to its centre; faces the side from which the ring runs clockwise."""
    n = len(ring)
    i = np.arange(n)
    faces = np.stack([np.full(n, n), (i + 1) % n, i], -1).astype(np.int32)
    angle = 2 * np.pi * i / n
    rim = np.stack([np.cos(angle), np.sin(angle)], -1) * 0.3 + 0.5
    uv = np.stack([np.full((n, 2), 0.5), np.roll(rim, -1, 0), rim], 1)
    return Mesh(np.concatenate([ring, centre[None]]), faces, uv)


def lathe(profile: Array, sides: int, pieces: int) -> Mesh:
    """Turn a closed profile (n, 2) of (radius, height) about the z axis."""
    angle = 2 * np.pi * np.arange(sides) / sides
    r, z = profile.T[:, None]
    points = np.stack([r * np.cos(angle)[:, None], r * np.sin(angle)[:, None], z + 0 * angle[:, None]], -1)
    mesh = surface(points, (True, True), (4.0, 2.0))
    ends = np.linspace(0, sides, pieces + 1).round().astype(int)
    rings = np.concatenate([points, points[:1]])
    parts = tuple(rings[a : b + 1 : max(1, b - a), ::2].reshape(-1, 3) for a, b in pairwise(ends))
    return outward(cleaned(Mesh(mesh.vertices, mesh.faces, mesh.uv, parts)))


def prism(outline: Array, thickness: float, pieces: int) -> Mesh:
    """Give a star-shaped outline (n, 2) about the origin a thickness along z."""
    n, half = len(outline), thickness / 2
    low, high = (np.concatenate([outline, np.full((n, 1), z)], 1) for z in (-half, half))
    around = 2.0 * max(1, round(np.linalg.norm(np.roll(outline, -1, 0) - outline, axis=-1).sum() / (4 * thickness)))
    side = surface(np.stack([low, high], 1), (True, False), (around, 1.0))
    flat = outline / (2 * np.abs(outline).max()) + 0.5
    caps = []
    for ring, centre in ((high, half), (low, -half)):
        i = np.arange(n)
        faces = np.stack([np.full(n, n), i, (i + 1) % n], -1).astype(np.int32)
        uv = np.stack([np.full((n, 2), 0.5), flat, np.roll(flat, -1, 0)], 1)
        if centre < 0:
            faces, uv = faces[:, ::-1], uv[:, ::-1]
        caps.append(Mesh(np.concatenate([ring, [[0, 0, centre]]]), faces, uv))
    ends = np.linspace(0, n, pieces + 1).round().astype(int)
    loop = np.concatenate([outline, outline[:1]])
    parts = []
    for a, b in pairwise(ends):
        wedge = np.concatenate([np.zeros((1, 2)), loop[a : b + 1]])
        parts.append(np.concatenate([np.insert(wedge, 2, z, 1) for z in (-half, half)]))
    mesh = join([side, *caps])
    return outward(cleaned(Mesh(mesh.vertices, mesh.faces, mesh.uv, tuple(parts), smooth=False)))


def slab(middle: Array, thickness: float, pieces: tuple[int, int]) -> Mesh:
    """Give a bent sheet (U, V, 3) a thickness along its normals."""
    du, dv = np.gradient(middle, axis=0), np.gradient(middle, axis=1)
    normal = np.cross(du, dv)
    normal *= thickness / 2 / np.linalg.norm(normal, axis=-1, keepdims=True)
    top, bottom = middle + normal, middle - normal
    u, v = middle.shape[:2]
    i, j = np.arange(u - 1), np.arange(v - 1)
    rim = np.concatenate([  # the border once around, as (row, column)
        np.stack([i, 0 * i], 1), np.stack([0 * j + u - 1, j], 1), np.stack([u - 1 - i, 0 * i + v - 1], 1),
        np.stack([0 * j, v - 1 - j], 1),
    ])  # fmt: skip
    edge = surface(np.stack([top[rim[:, 0], rim[:, 1]], bottom[rim[:, 0], rim[:, 1]]], 1), (True, False), (8.0, 0.1))
    upper, lower = surface(top, (False, False)), surface(bottom, (False, False))
    lower = replace(lower, faces=lower.faces[:, ::-1], uv=lower.uv[:, ::-1])
    # The border runs with the top's triangles, its own would face inward if they ran alike.
    edge_faces = replace(edge, faces=edge.faces[:, ::-1], uv=edge.uv[:, ::-1])
    mesh = join([upper, lower, edge if _facing(edge, middle) else edge_faces])
    rows, columns = (np.linspace(0, n - 1, k + 1).round().astype(int) for n, k in zip((u, v), pieces, strict=True))
    parts = []
    for a, b in pairwise(rows):
        for c, d in pairwise(columns):
            pick = np.ix_(sorted({a, (a + b) // 2, b}), sorted({c, (c + d) // 2, d}))
            parts.append(np.concatenate([top[pick].reshape(-1, 3), bottom[pick].reshape(-1, 3)]))
    return outward(cleaned(Mesh(mesh.vertices, mesh.faces, mesh.uv, tuple(parts))))


def _facing(edge: Mesh, middle: Array) -> bool:
    """Tell whether the strip around a sheet faces away from it, judged at the first quad of its border."""
    a, b, c = corners(edge)[0]
    return bool(np.cross(b - a, c - a) @ (middle[0, 0] - middle[0, 1]) > 0)


def boxes(centres: Array, halves: Array) -> Mesh:
    """Make boxes with these centres and half sides (K, 3), which may overlap; the texture is laid on square to each."""
    sign = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], float)
    quads = np.array([[0, 1, 3, 2], [4, 6, 7, 5], [0, 4, 5, 1], [2, 3, 7, 6], [0, 2, 6, 4], [1, 5, 7, 3]])
    split = quads[:, [[0, 1, 2], [0, 2, 3]]].reshape(-1, 3)
    meshes = []
    reach = np.abs(centres).max() + halves.max()
    for k, (centre, half) in enumerate(zip(centres, halves, strict=True)):
        points = centre + sign * half
        across = np.repeat([0, 0, 1, 1, 2, 2], 2)
        flat = np.array([[1, 2], [0, 2], [0, 1]])[across]
        place = points[split][np.arange(12)[:, None, None], np.arange(3)[None, :, None], flat[:, None]]
        uv = place / (1.5 * reach) + 0.37 * k + 0.21 * across[:, None, None]
        meshes.append(Mesh(points, split.astype(np.int32), uv, (points,), smooth=False))
    return outward(join(meshes))
