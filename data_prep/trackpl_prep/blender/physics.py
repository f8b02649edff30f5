"""Rigid bodies that fall and collide: pybullet, without a window, in small steps.

Collision shapes are compounds of convex hulls. Quaternions are (w, x, y, z), rotations act on columns.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trackpl.errors import DataError
from trackpl_prep.blender import INSTALL

Array = NDArray[np.float64]
STEPS = 240  # a second


@dataclass(frozen=True)
class Thing:
    """One body as the physics sees it; it starts at `place` with the turn `quaternion`."""

    parts: tuple[Array, ...]  # convex hulls of these points (P, 3), metres, about the centre of mass
    place: Array  # (3,)
    quaternion: Array  # (4,)
    velocity: Array  # (3,) metres a second; not used before a static body comes to rest
    spin: Array  # (3,) radians a second
    static: bool  # let fall first, then held where it came to rest
    mass: float
    friction: float
    bounce: float


def simulate(things: Sequence[Thing], times: Array, gravity: float = 9.81, settle: float = 2.5) -> tuple[Array, Array]:
    """Let the static things come to rest on the floor z = 0, then throw the others among them.

    Args:
        things: K bodies.
        times: (T,) ascending seconds, from the throw at 0.
        gravity: metres a second squared, along -z, of the throw; things settle under the Earth's.
        settle: seconds that static things are given to come to rest.

    Returns:
        places (T, K, 3) and quaternions (T, K, 4), of continuous sign in time.

    Raises:
        DataError: pybullet is not installed.
    """
    places, turns = np.empty((len(times), len(things), 3)), np.empty((len(times), len(things), 4))
    with _world() as (bullet, world), tempfile.TemporaryDirectory() as folder:
        shapes = [_shape(bullet, world, thing.parts, Path(folder) / f"{k}.obj") for k, thing in enumerate(things)]
        ids: dict[int, int] = {}
        for k, thing in enumerate(things):
            if thing.static:
                ids[k] = _add(bullet, world, thing, shapes[k])
        _settle(bullet, world, list(ids.values()), settle)
        for k, thing in enumerate(things):
            if not thing.static:
                ids[k] = _add(bullet, world, thing, shapes[k])
                bullet.resetBaseVelocity(ids[k], thing.velocity.tolist(), thing.spin.tolist(), physicsClientId=world)
        bullet.setGravity(0, 0, -gravity, physicsClientId=world)
        done = 0
        for t, time in enumerate(times):
            while done < round(time * STEPS):
                bullet.stepSimulation(physicsClientId=world)
                done += 1
            for k in ids:
                place, (x, y, z, w) = bullet.getBasePositionAndOrientation(ids[k], physicsClientId=world)
                places[t, k], turns[t, k] = place, (w, x, y, z)
    return places, continuous(turns)


def continuous(turns: Array) -> Array:
    """Choose of q and -q, which are the same turn, that which is nearer to the one before, along the first axis."""
    same = (turns[1:] * turns[:-1]).sum(-1, keepdims=True) >= 0
    sign = np.cumprod(np.where(same, 1.0, -1.0), axis=0)
    return np.concatenate([turns[:1], turns[1:] * sign])


def rotations(turns: Array) -> Array:
    """Turn unit quaternions (..., 4) into matrices (..., 3, 3)."""
    w, x, y, z = np.moveaxis(turns / np.linalg.norm(turns, axis=-1, keepdims=True), -1, 0)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return np.stack([np.stack(row, -1) for row in rows], -2)


@contextmanager
def _world() -> Iterator[tuple[ModuleType, int]]:
    """Give pybullet and a new world with a floor."""
    try:
        import pybullet
    except ImportError as error:
        raise DataError(f"kubric-blender needs the module 'pybullet' ({error}); {INSTALL}") from None
    world = pybullet.connect(pybullet.DIRECT)
    try:
        pybullet.setTimeStep(1 / STEPS, physicsClientId=world)
        # Contacts in a fixed order: the same scene moves the same way again.
        pybullet.setPhysicsEngineParameter(deterministicOverlappingPairs=1, physicsClientId=world)
        floor = pybullet.createCollisionShape(pybullet.GEOM_PLANE, physicsClientId=world)
        floor = pybullet.createMultiBody(0, floor, physicsClientId=world)
        pybullet.changeDynamics(floor, -1, lateralFriction=0.7, restitution=0.5, physicsClientId=world)
        yield pybullet, world
    finally:
        pybullet.disconnect(world)


def _shape(bullet: Any, world: int, parts: Sequence[Array], path: Path) -> int:
    """Make a compound of hulls; pybullet takes any number of them only from a file."""
    lines, start = [], 1
    for i, part in enumerate(parts):
        lines.append(f"o part{i}")
        lines += ["v {:.9g} {:.9g} {:.9g}".format(*point) for point in part]
        # Only points that some triangle uses count; which triangles does not matter to a hull.
        lines += [f"f {start + j} {start + j + 1} {start + j + 2}" for j in range(len(part) - 2)]
        start += len(part)
    path.write_text("\n".join(lines) + "\n")
    return int(bullet.createCollisionShape(bullet.GEOM_MESH, fileName=str(path), physicsClientId=world))


def _add(bullet: Any, world: int, thing: Thing, shape: int) -> int:
    w, x, y, z = thing.quaternion.tolist()
    body = bullet.createMultiBody(thing.mass, shape, -1, thing.place.tolist(), [x, y, z, w], physicsClientId=world)
    bullet.changeDynamics(
        body,
        -1,
        lateralFriction=thing.friction,
        rollingFriction=0.01,
        spinningFriction=0.01,
        restitution=thing.bounce,
        linearDamping=0.02,
        angularDamping=0.02,
        physicsClientId=world,
    )
    return int(body)


def _settle(bullet: Any, world: int, ids: Sequence[int], seconds: float) -> None:
    """Let bodies fall and lose their speed, then hold them."""
    bullet.setGravity(0, 0, -9.81, physicsClientId=world)
    for body in ids:
        bullet.changeDynamics(body, -1, restitution=0.0, angularDamping=0.5, physicsClientId=world)
    for _ in range(round(seconds * STEPS) if ids else 0):
        bullet.stepSimulation(physicsClientId=world)
    for body in ids:
        bullet.resetBaseVelocity(body, [0, 0, 0], [0, 0, 0], physicsClientId=world)
        bullet.changeDynamics(body, -1, mass=0, restitution=0.4, physicsClientId=world)
