"""Random bodies: twelve families of closed, textured meshes, from a random generator."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from trackpl_prep.blender import mesh as m
from trackpl_prep.blender.mesh import Array, Mesh

Rng = np.random.Generator


def body(rng: Rng, kind: str, radius: float) -> Mesh:
    """Draw a body of one of `KINDS`, its centre at the origin, its farthest point at `radius` metres.

    At most some 4,000 triangles and 32 convex parts: more costs time in the physics, and shows no more.
    """
    return m.fitted(KINDS[kind](rng), radius)


def _power(x: Array, exponent: float) -> Array:
    return np.sign(x) * np.abs(x) ** exponent


def _ball(rng: Rng, e1: float, e2: float) -> Array:
    """Points (U, V, 3) of a superellipsoid of half sides 0.6 to 1 (Barr 1981), e1 along and e2 around its axis."""
    rows = np.linspace(-np.pi / 2, np.pi / 2, 29)[:, None]
    around = 2 * np.pi * np.arange(48)[None] / 48
    c, s = np.cos(rows), np.sin(rows)
    c[[0, -1]] = 0  # the poles are one point each
    x = _power(c, e1) * _power(np.cos(around), e2)
    y = _power(c, e1) * _power(np.sin(around), e2)
    return np.stack([x, y, _power(s, e1) + 0 * x], -1) * rng.uniform(0.6, 1, 3)


def _closed_ball(points: Array) -> Mesh:
    mesh = m.surface(points, (False, True), (2.0, 4.0))
    hull = points[::4, ::4].reshape(-1, 3)
    return m.outward(m.cleaned(Mesh(mesh.vertices, mesh.faces, mesh.uv, (hull,))))


def _round(rng: Rng) -> Mesh:
    """Draw a sphere, a rounded box, a cylinder, a cushion."""
    e1, e2 = rng.choice([0.25, 0.5, 1.0, 1.0, 1.4], 2)
    return _closed_ball(_ball(rng, e1, e2))


def _rock(rng: Rng) -> Mesh:
    """Draw a ball with bumps."""
    points = _ball(rng, 1.0, 1.0)
    way = points / np.linalg.norm(points, axis=-1, keepdims=True)
    waves = rng.normal(0, 1, (8, 3)) * rng.uniform(1.5, 4.0)
    bump = np.sin(way @ waves.T + rng.uniform(0, 2 * np.pi, 8)).sum(-1, keepdims=True) / 8
    points = points * (1 + rng.uniform(0.3, 0.7) * bump)
    points[0], points[-1] = points[0].mean(0), points[-1].mean(0)
    return _closed_ball(points)


def _torus(rng: Rng) -> Mesh:
    """Draw a ring, thick or thin, round or flat, sometimes wavy."""
    t = 2 * np.pi * np.arange(72) / 72
    wave = rng.choice([0.0, 0.25]) * np.sin(rng.integers(2, 6) * t)
    path = np.stack([np.cos(t), np.sin(t), wave], -1)
    radius = rng.uniform(0.16, 0.42) * (1 + rng.choice([0.0, 0.25]) * np.sin(rng.integers(2, 7) * t))
    return m.tube(path, radius, 20, True, 16, rng.uniform(0.5, 1))


def _knot(rng: Rng) -> Mesh:
    """Draw a torus knot."""
    p, q = ((2, 3), (3, 2), (2, 5), (3, 4))[rng.integers(4)]
    t = 2 * np.pi * np.arange(150) / 150
    r = 1 + 0.45 * np.cos(q * t)
    path = np.stack([r * np.cos(p * t), r * np.sin(p * t), 0.45 * np.sin(q * t)], -1)
    return m.tube(path, np.full(150, rng.uniform(0.1, 0.2)), 12, True, 30)


def _spring(rng: Rng) -> Mesh:
    """Draw a coil."""
    turns = rng.uniform(2.5, 4.5)
    t = np.linspace(0, 1, 140)
    angle = 2 * np.pi * turns * t
    width = 0.6 * (1 + rng.uniform(-0.4, 0.4) * (t - 0.5))
    path = np.stack([width * np.cos(angle), width * np.sin(angle), rng.uniform(1.2, 2.2) * (t - 0.5)], -1)
    return m.tube(path, np.full(140, rng.uniform(0.07, 0.15)), 12, False, 30)


def _sheet(rng: Rng) -> Mesh:
    """Draw a sheet, rolled, waved or twisted."""
    u, v = np.meshgrid(np.linspace(-1, 1, 33), np.linspace(-1, 1, 25) * rng.uniform(0.4, 0.9), indexing="ij")
    kind = rng.choice(["rolled", "waved", "twisted"])
    if kind == "rolled":
        bend = rng.uniform(0.5, 2.2)
        middle = np.stack([np.sin(u * bend) / bend, v, (1 - np.cos(u * bend)) / bend], -1)
    elif kind == "waved":
        middle = np.stack([u, v, rng.uniform(0.1, 0.3) * np.sin(rng.uniform(2, 5) * u + rng.uniform(-1, 1) * v)], -1)
    else:
        angle = rng.uniform(0.5, 1.5) * u
        middle = np.stack([u, v * np.cos(angle), v * np.sin(angle)], -1)
    return m.slab(middle, rng.uniform(0.04, 0.1), (8, 3))


def _star(rng: Rng) -> Mesh:
    """Draw a star, a gear or a flower cut out of a plate."""
    n = int(rng.integers(3, 10))
    kind, deep = rng.choice(["star", "gear", "flower"]), rng.uniform(0.2, 0.5)
    per = 2 if kind == "star" else 12
    t = np.arange(n * per)
    wave = {
        "star": np.where(t % 2, 1.0, 0.0),
        "gear": ((t % per > 1) & (t % per < 7)).astype(float),
        "flower": 0.5 + 0.5 * np.cos(2 * np.pi * t / per),
    }[str(kind)]
    r, angle = 1 - deep * wave, 2 * np.pi * t / len(t)
    outline = np.stack([r * np.cos(angle), r * np.sin(angle)], -1)
    return m.prism(outline, rng.uniform(0.2, 0.8), min(2 * n, 20))


def _vessel(rng: Rng) -> Mesh:
    """Draw a vase, cup or bowl: hollow and open at the top."""
    z = np.linspace(0, 1, 24)
    wave = 0.7 + rng.uniform(0.05, 0.3) * np.sin(rng.uniform(2, 6) * z + rng.uniform(0, 6))
    wall = rng.uniform(0.05, 0.1)
    outer = np.stack([wave, z * rng.uniform(0.9, 2.2)], -1)
    inner = np.stack([wave - wall, outer[:, 1]], -1)[::-1]
    inner[-1, 1] += wall  # the floor of the vessel
    inner = inner[inner[:, 1] >= inner[-1, 1]]
    axis = np.array([[0, inner[-1, 1]], [0, 0]])
    return m.lathe(np.concatenate([outer, inner, axis]), 40, 16)


def _cone(rng: Rng) -> Mesh:
    """Draw a cone, a bottle or a skittle: a closed profile that narrows."""
    z = np.linspace(0, 1, 20)
    kind = rng.choice(["cone", "bottle", "skittle"])
    r = {
        "cone": 1 - rng.uniform(0.6, 1.0) * z,
        "bottle": 0.25 + 0.55 / (1 + np.exp((z - 0.65) * 25)),
        "skittle": 0.45 + 0.25 * np.cos(4.5 * z) + 0.05 * z,
    }[str(kind)]
    rise = z * rng.uniform(1.2, 2.2)
    profile = np.concatenate([[[0, 0]], np.stack([r * 0.7, rise], -1), [[0, rise[-1]]]])
    mesh = m.lathe(profile, 40, 1)
    return Mesh(mesh.vertices, mesh.faces, mesh.uv, (mesh.vertices[::5],), smooth=True)


def _chair(rng: Rng) -> Mesh:
    """Draw a chair, a stool or a table."""
    w, d, seat = rng.uniform(0.35, 0.7), rng.uniform(0.35, 0.7), rng.uniform(0.5, 0.9)
    leg, thick, back = rng.uniform(0.04, 0.09), rng.uniform(0.04, 0.08), rng.uniform(0.5, 1.0)
    centres = [[x * (w - leg), y * (d - leg), seat / 2] for x in (-1, 1) for y in (-1, 1)]
    halves = [[leg, leg, seat / 2]] * 4
    centres.append([0, 0, seat + thick])
    halves.append([w, d, thick])
    if rng.random() < 0.7:  # a back
        posts = int(rng.integers(2, 5))
        for x in np.linspace(-1, 1, posts):
            centres.append([x * (w - leg), -d + leg, seat + thick + back / 2])
            halves.append([leg * 0.8, leg * 0.8, back / 2])
        centres.append([0, -d + leg, seat + thick + back])
        halves.append([w, leg * 0.9, 0.1])
    return m.boxes(np.array(centres), np.array(halves))


def _crate(rng: Rng) -> Mesh:
    """Draw a box, or a letter made of bars: L, T, U, H or a cross."""
    letters = {
        "box": ([[0, 0, 0]], [[1, 0.8, 0.6]]),
        "L": ([[-0.6, 0, 0], [0.2, 0, -0.8]], [[0.2, 0.3, 1], [0.6, 0.3, 0.2]]),
        "T": ([[0, 0, -0.2], [0, 0, 0.8]], [[0.2, 0.3, 0.8], [0.8, 0.3, 0.2]]),
        "U": ([[-0.6, 0, 0], [0.6, 0, 0], [0, 0, -0.8]], [[0.2, 0.3, 1], [0.2, 0.3, 1], [0.4, 0.3, 0.2]]),
        "H": ([[-0.6, 0, 0], [0.6, 0, 0], [0, 0, 0]], [[0.2, 0.3, 1], [0.2, 0.3, 1], [0.4, 0.3, 0.2]]),
        "cross": ([[0, 0, 0]] * 3, [[1, 0.2, 0.2], [0.2, 1, 0.2], [0.2, 0.2, 1]]),
    }
    kind = str(rng.choice(list(letters), p=[0.5, 0.1, 0.1, 0.1, 0.1, 0.1]))
    centres, halves = (np.array(a, float) for a in letters[kind])
    stretch = rng.uniform(0.5, 1.2, 3)
    return m.boxes(centres * stretch, halves * stretch)


def _ladder(rng: Rng) -> Mesh:
    """Draw a ladder, a grid or a shelf of bars."""
    rungs, bar = int(rng.integers(3, 6)), rng.uniform(0.05, 0.1)
    wide, deep = rng.uniform(0.4, 0.9), rng.uniform(0.06, 0.4)
    centres = [[x * wide, 0, 0] for x in (-1, 1)] + [[0, 0, z] for z in np.linspace(-0.85, 0.85, rungs)]
    halves = [[bar, deep, 1.0]] * 2 + [[wide, deep * 0.95, bar * 0.8]] * rungs
    return m.boxes(np.array(centres), np.array(halves))


KINDS: dict[str, Callable[[Rng], Mesh]] = {
    "round": _round, "rock": _rock, "torus": _torus, "knot": _knot, "spring": _spring, "sheet": _sheet,
    "star": _star, "vessel": _vessel, "cone": _cone, "chair": _chair, "crate": _crate, "ladder": _ladder,
}  # fmt: skip
