"""What one clip shows: bodies and their motion, surroundings, camera, lamps, textures, all from random generators.

A `Scene` is plain arrays; `truth` and `render` both work from it, and from nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from trackpl.errors import DataError
from trackpl_prep import textures
from trackpl_prep.blender import bodies, mesh, physics
from trackpl_prep.blender.mesh import Array, Mesh

DOME, FLOOR = 38.0, 38.0  # metres: radius of the surroundings
NEAR = 0.05  # metres: nothing nearer to the camera is drawn


@dataclass(frozen=True)
class Material:
    """How a surface looks."""

    texture: NDArray[np.uint8]  # (h, w, 3) sRGB
    roughness: float
    metallic: float
    glow: float = 0.0  # radiance of the texture itself; 0: lit by the lamps


@dataclass(frozen=True)
class Item:
    """One surface of the scene; those with label 0 do not move."""

    mesh: Mesh
    material: Material
    label: int  # 0 surroundings, bodies from 1
    kind: str


@dataclass(frozen=True)
class Lamp:
    """A lamp far away (`size` in radians) or a square one (`size` in metres) that looks at the centre."""

    far: bool
    place: Array  # (3,) metres; of a far one the direction it stands in
    power: float  # watts a square metre, or watts
    size: float
    colour: Array  # (3,) linear


@dataclass(frozen=True)
class Scene:
    """One clip. Arrays run over `times`: the frame before the first, the T frames, and the frame after the last."""

    items: tuple[Item, ...]
    times: Array  # (T + 2,) seconds
    places: Array  # (T + 2, items, 3)
    turns: Array  # (T + 2, items, 4) quaternions (w, x, y, z) of continuous sign
    camera_place: Array  # (T + 2, 3)
    camera_turn: Array  # (T + 2, 3, 3) camera (x right, y down, z forward) to world
    focal: float  # in units of the image's width
    lamps: tuple[Lamp, ...]
    sky: Array  # (3,) linear radiance of the light from all sides
    shutter: float  # part of a frame's time that the shutter is open; 0: sharp


def scene(
    seed: int,
    index: int,
    frames: int,
    fps: float,
    images: Sequence[Tensor] | None = None,
    motion_blur: float = 0.0,
    detail: int = 512,
) -> Scene:
    """Draw the scene of clip `index` of `seed`; the same arguments give the same scene.

    Args:
        seed: of the set.
        index: of the clip.
        frames: T.
        fps: frames a second.
        images: photographs (3, h, w) to use as textures instead of our own making.
        motion_blur: probability that the shutter stays open for a while.
        detail: side of a body's texture in texels.

    Raises:
        DataError: pybullet is not installed.
    """
    shapes, moves, looks, view = (np.random.default_rng([seed, index, k]) for k in range(4))
    times = np.arange(-1, frames + 1) / fps
    static, moving = int(shapes.integers(4, 10)), int(shapes.integers(3, 8))
    meshes, kinds = _meshes(shapes, static, moving)
    things = _things(moves, meshes, static)
    gravity = 9.81 if moves.random() < 0.85 else moves.uniform(0.3, 3.0)
    # Some clips begin before the bodies arrive, some in the middle of the turmoil.
    start = moves.uniform(0, 0.6) + 1 / fps
    places, turns = physics.simulate(things, times + start, gravity)
    surroundings = _surroundings(looks, images, detail)
    items = [*surroundings]
    for label, (shape, kind) in enumerate(zip(meshes, kinds, strict=True), 1):
        items.append(Item(shape, _material(looks, images, detail), label, kind))
    still = np.broadcast_to([1.0, 0, 0, 0], (len(times), len(surroundings), 4))
    radii = np.array([np.linalg.norm(m.vertices, axis=-1).max() for m in meshes])
    camera_place, camera_turn, focal = _camera(view, times, places, radii)
    return Scene(
        tuple(items),
        times,
        np.concatenate([np.zeros((len(times), len(surroundings), 3)), places], 1),
        np.concatenate([still, turns], 1),
        camera_place,
        camera_turn,
        focal,
        *_light(looks),
        shutter=float(view.uniform(0.15, 0.6)) if view.random() < motion_blur else 0.0,
    )


def _meshes(rng: np.random.Generator, static: int, moving: int) -> tuple[list[Mesh], list[str]]:
    names = list(bodies.KINDS)
    # Without repetition while there are other kinds.
    order = np.concatenate([rng.permutation(len(names)), rng.permutation(len(names))])[: static + moving]
    kinds = [names[i] for i in order]
    sizes = np.concatenate([rng.uniform(0.6, 1.4, static), rng.uniform(0.45, 1.1, moving)])
    return [bodies.body(rng, kind, size) for kind, size in zip(kinds, sizes, strict=True)], kinds


def _things(rng: np.random.Generator, meshes: Sequence[Mesh], static: int) -> list[physics.Thing]:
    """Place bodies apart: static ones over the middle, the others around it and on their way there."""
    things: list[physics.Thing] = []
    radii = [np.linalg.norm(m.vertices, axis=-1).max() for m in meshes]
    placed: list[tuple[Array, float]] = []
    for k, shape in enumerate(meshes):
        rest = k < static
        place = _free_place(rng, rest, radii[k], placed if rest else placed[static:], 0 if rest else static)
        placed.append((place, radii[k]))
        aim = np.array([*rng.normal(0, 1.0, 2), 0]) - place
        reach = float(np.linalg.norm(aim[:2]))
        velocity = np.array([*(aim[:2] / max(reach, 1e-6) * rng.uniform(1.0, 5.0)), rng.uniform(-1.5, 3.5)])
        things.append(
            physics.Thing(
                shape.parts,
                place,
                _turn(rng),
                velocity,
                rng.normal(0, 2.5, 3),
                rest,
                mass=float(np.clip(mesh.volume(shape), 0.05, 4.0)),
                friction=float(rng.uniform(0.3, 0.9)),
                bounce=float(rng.uniform(0.1, 0.7)),
            )
        )
    return things


def _free_place(
    rng: np.random.Generator, rest: bool, radius: float, placed: Sequence[tuple[Array, float]], above: int
) -> Array:
    """Draw a place at which the body touches no other; higher and higher up where it is crowded.

    `above`: how many bodies lie on the floor already, above which it begins.
    """
    for attempt in range(1000):
        high = 0.02 * attempt
        if rest:
            place = np.array([*rng.uniform(-2.8, 2.8, 2), radius + rng.uniform(0.05, 1.0) + high])
        else:
            angle, reach = rng.uniform(0, 2 * np.pi), rng.uniform(0.3, 4.0)
            low = 2.2 if above and reach < 3.5 else 0.2
            place = np.array([reach * np.cos(angle), reach * np.sin(angle), radius + low + rng.uniform(0, 2.0) + high])
        if all(np.linalg.norm(place - p) > radius + r + 0.02 for p, r in placed):
            return place
    raise DataError("no room for the bodies of a scene")


def _turn(rng: np.random.Generator) -> Array:
    q = rng.normal(0, 1, 4)
    return q / np.linalg.norm(q)


def _camera(rng: np.random.Generator, times: Array, places: Array, radii: Array) -> tuple[Array, Array, float]:
    """Draw a camera that moves along a line and looks at the centre, or pans, and stays clear of all bodies."""
    # Short clips show a part of the way: a speed that suits two seconds.
    part = times / max(2.0, times[-2])
    focal = float(rng.uniform(0.95, 1.5))
    for attempt in range(200):
        elevation, azimuth = rng.uniform(0.12, 0.9), rng.uniform(0, 2 * np.pi)
        distance = rng.uniform(5.8, 8.8) * focal / 1.2 + 0.02 * attempt
        start = distance * np.array([
            np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation)
        ])  # fmt: skip
        kind = rng.choice(["linear", "pan", "both", "still"], p=[0.5, 0.15, 0.3, 0.05])
        way = rng.normal(0, 1, 3) * [1, 1, 0.6]
        way *= rng.uniform(0.5, 5.0) / np.linalg.norm(way) * (kind in ("linear", "both"))
        centre = np.array([*rng.normal(0, 0.5, 2), rng.uniform(0.4, 1.2)])
        pan = rng.normal(0, 1, 3) * [1, 1, 0.3]
        pan *= rng.uniform(0.5, 3.0) / np.linalg.norm(pan) * (kind in ("pan", "both"))
        place = start + part[:, None] * way
        target = centre + (part[:, None] - 0.5) * pan
        apart = np.linalg.norm(places - place[:, None], axis=-1) - radii
        if place[:, 2].min() > 0.5 and apart.min() > 0.7 and np.linalg.norm(place - target, axis=-1).min() > 3.5:
            return place, look_at(place, target, rng.normal(0, 0.06)), focal
    raise DataError("no free way for the camera of a scene")


def look_at(place: Array, target: Array, roll: float = 0.0) -> Array:
    """Return camera-to-world rotations (T, 3, 3) that look from places to targets (T, 3), rolled by radians."""
    ahead = target - place
    ahead = ahead / np.linalg.norm(ahead, axis=-1, keepdims=True)
    right = np.cross(ahead, [0.0, 0, 1])
    right /= np.linalg.norm(right, axis=-1, keepdims=True)
    down = np.cross(ahead, right)
    c, s = np.cos(roll), np.sin(roll)
    return np.stack([c * right + s * down, c * down - s * right, ahead], -1)


def _material(rng: np.random.Generator, images: Sequence[Tensor] | None, detail: int) -> Material:
    texture = textures.texture(rng, detail, detail, images)
    if not images:  # things that people make are more colourful than what photographs show on average
        grey = texture.mean(0)
        vivid, contrast = rng.uniform(1.0, 2.4), rng.uniform(1.0, 1.5)
        grey_out = (grey - grey.mean()) * contrast + rng.uniform(0.3, 0.6)
        texture = ((texture - grey) * vivid + grey_out).clamp(0.02, 0.98)
    return Material(_texels(texture), float(rng.uniform(0.3, 0.95)), float(rng.choice([0.0, 0.4], p=[0.92, 0.08])))


def _texels(image: Tensor) -> NDArray[np.uint8]:
    return (image * 255 + 0.5).byte().permute(1, 2, 0).numpy().copy()


def _surroundings(rng: np.random.Generator, images: Sequence[Tensor] | None, detail: int) -> list[Item]:
    """Make the floor and a dome over it, which glows as a photograph of far things would."""
    side = np.linspace(-FLOOR, FLOOR, 17)
    x, y = np.meshgrid(side, side, indexing="ij")
    turn = rng.uniform(0, 2 * np.pi)
    repeats = 2 * FLOOR / rng.uniform(5, 12)
    floor = mesh.surface(np.stack([x, y, 0 * x], -1), (False, False), (repeats, repeats))
    c, s = np.cos(turn), np.sin(turn)
    floor = Mesh(floor.vertices, floor.faces, floor.uv @ np.array([[c, -s], [s, c]]))
    rows = np.linspace(-0.02, np.pi / 2, 17)[:, None]
    around = 2 * np.pi * np.arange(64)[None] / 64
    flat = np.cos(rows)
    dome = DOME * np.stack([flat * np.cos(around), -flat * np.sin(around), np.sin(rows) + 0 * around], -1)
    sky = mesh.cleaned(mesh.surface(dome, (False, True), (1.0, 4.0)))
    far = _texels(textures.texture(rng, 2 * detail, 2 * detail, images, textures.BACKDROP))
    near = _texels(textures.texture(rng, 2 * detail, 2 * detail, images, textures.BACKDROP))
    return [
        Item(floor, Material(near, float(rng.uniform(0.5, 1.0)), 0.0), 0, "floor"),
        Item(sky, Material(far, 1.0, 0.0, glow=float(rng.uniform(0.7, 1.3))), 0, "dome"),
    ]


def _light(rng: np.random.Generator) -> tuple[tuple[Lamp, ...], Array]:
    """Draw a sun or a large lamp, one or two smaller ones, and light from all sides."""

    def tint(width: float) -> Array:
        warm = rng.normal(0, width)
        return np.clip([1 + warm, 1.0, 1 - warm], 0.3, 1.7)

    def way(low: float) -> Array:
        elevation, azimuth = rng.uniform(low, 1.2), rng.uniform(0, 2 * np.pi)
        flat = np.cos(elevation)
        return np.array([flat * np.cos(azimuth), flat * np.sin(azimuth), np.sin(elevation)])

    lamps = [Lamp(True, way(0.45), float(rng.uniform(1.5, 4.5)), float(rng.uniform(0.02, 0.3)), tint(0.12))]
    for _ in range(int(rng.integers(1, 3))):
        lamps.append(Lamp(False, way(0.5) * 8, float(rng.uniform(200, 1200)), float(rng.uniform(0.5, 4)), tint(0.2)))
    return tuple(lamps), tint(0.1) * rng.uniform(0.3, 0.9)
