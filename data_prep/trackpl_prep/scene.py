"""What a synthetic clip shows: a camera, scenery and bodies made of textured flat parts, each a function of time.

A part is a plane piece with material coordinates u in [-1, 1]^2 (its texture's coordinates). It may be sheared smoothly
within its plane, u -> v (`Shear`, exactly invertible), and then goes to the image by a homography that depends on time:
H_t (v, 1) = z (x, y, 1), with z the depth in metres. All truth follows from H_t, its inverse and `Shear`.
Times are frame numbers and may lie between frames (motion blur).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trackpl_prep import textures

Array = NDArray[np.float64]
WALL = 10.0  # metres from the first camera to the scenery
NEAR = 0.2  # metres; nothing nearer than this is seen


@dataclass(frozen=True)
class Wave:
    """A smooth function of time with C channels: offset + rate t + sines, in a time that may speed up or slow down."""

    offset: Array  # (C,)
    rate: Array  # (C,) per frame
    size: Array  # (C, K)
    speed: Array  # (C, K) radians per frame
    phase: Array  # (C, K)
    warp: tuple[float, float, float] = (0.0, 0.0, 1.0)  # change of speed, when, over how many frames

    def __call__(self, times: Array) -> Array:
        """Evaluate at `times` (S,): (S, C)."""
        change, when, width = self.warp
        t = times + change * width * (np.logaddexp(0, (times - when) / width) - np.logaddexp(0, -when / width))
        sines = np.sin(t[:, None, None] * self.speed + self.phase)
        return self.offset + self.rate * t[:, None] + (self.size * sines).sum(-1)


def wave(
    rng: np.random.Generator,
    offset: Sequence[float] | Array,
    rate: Sequence[float] | Array,
    sway: Sequence[float] | Array,
    frames: int,
    period: tuple[float, float] = (14, 60),
) -> Wave:
    """Draw a `Wave` with given offsets and rates, and sines of total size `sway` and periods in `period` frames."""
    offset, rate, sway = (np.asarray(x, np.float64) for x in (offset, rate, sway))
    count = len(offset)
    size = rng.dirichlet((1.0, 0.6), count) * sway[:, None]
    speed = 2 * np.pi / np.exp(rng.uniform(math.log(period[0]), math.log(period[1]), (count, 2)))
    warp = (0.0, 0.0, 1.0)
    if rng.random() < 0.3:  # an acceleration, or a halt
        warp = (float(rng.uniform(-1, 1.5)), float(rng.uniform(0, frames)), float(rng.uniform(1, 5)))
    return Wave(offset, rate, size, speed, rng.uniform(0, 2 * np.pi, (count, 2)), warp)


def rotation(angles: Array) -> Array:
    """Turn (S, 3) angles (pitch about x, yaw about y, roll about z) into matrices (S, 3, 3) = roll yaw pitch."""
    (a, b, c), (p, q, r) = np.cos(angles).T, np.sin(angles).T
    o, i = np.zeros_like(a), np.ones_like(a)
    pitch = np.array([[i, o, o], [o, a, -p], [o, p, a]])
    yaw = np.array([[b, o, q], [o, i, o], [-q, o, b]])
    roll = np.array([[c, -r, o], [r, c, o], [o, o, i]])
    return np.einsum("ijs,jks,kls->sil", roll, yaw, pitch)


@dataclass(frozen=True)
class Shear:
    """Bends a plane, exactly both ways: v_x = u_x + f(u_y), then v_y = u_y + g(v_x), with sums of travelling sines."""

    size: Tensor  # (2, K)
    wave: Tensor  # (2, K) radians per unit of u
    phase: Tensor  # (2, K)
    speed: Tensor  # (2, K) radians per frame

    def reach(self) -> float:
        """Bound how far a point is moved along an axis, in units of u."""
        return float(self.size.sum(1).max())

    def _offset(self, axis: int, along: Tensor, times: Tensor) -> Tensor:
        size, wave, phase, speed = (x[axis].to(along) for x in (self.size, self.wave, self.phase, self.speed))
        total = torch.zeros_like(along)
        for k in range(len(size)):
            total += size[k] * torch.sin(along * wave[k] + (times * speed[k] + phase[k]))
        return total

    def forward(self, x: Tensor, y: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        """Material to plane coordinates, elementwise."""
        x = x + self._offset(0, y, times)
        return x, y + self._offset(1, x, times)

    def inverse(self, x: Tensor, y: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        """Plane to material coordinates, elementwise."""
        y = y - self._offset(1, x, times)
        return x - self._offset(0, y, times), y


@dataclass(frozen=True)
class Part:
    """One textured plane piece of a body or of the scenery."""

    label: int  # 0: scenery
    stack: Tensor  # (3, L, h, w) colours, level l blurred for minification by 2**l
    field: Tensor | None  # (1, 1, h, w) distance inside the outline in texels; None: no outline, repeats by reflection
    plane: Callable[[Array, Camera], Array]  # times, camera -> (S, 3, 3): camera coordinates in metres of (v, 1)
    shear: Shear | None = None
    gloss: tuple[float, float] = (0.0, 8.0)  # strength and sharpness of the highlight
    endless: bool = False  # texture and outline go on beyond the border, by reflection


@dataclass(frozen=True)
class Camera:
    """Where the camera is, how it is turned and how far it is zoomed."""

    place: Wave  # x, y, z (before the bound on z), metres
    turn: Wave  # pitch, yaw, roll, radians
    zoom: Wave  # logarithm of the relative focal length (before its bound)
    focal: float  # pixels
    size: tuple[int, int]  # H, W

    def intrinsics(self, times: Array) -> Array:
        """Give fx, fy, cx, cy in pixels: (S, 4)."""
        f = self.focal * np.exp(0.35 * np.tanh(self.zoom(times)[:, 0]))
        h, w = self.size
        return np.stack([f, f, np.full_like(f, w / 2), np.full_like(f, h / 2)], -1)

    def matrix(self, times: Array) -> Array:
        """Give K: (S, 3, 3)."""
        k = np.zeros((len(times), 3, 3))
        k[:, [0, 1, 0, 1], [0, 1, 2, 2]] = self.intrinsics(times)
        k[:, 2, 2] = 1
        return k

    def pose(self, times: Array) -> tuple[Array, Array]:
        """Give rotation (S, 3, 3) and translation (S, 3), world to camera."""
        place = self.place(times)
        place[:, 2] = 1.2 * np.tanh(place[:, 2] / 1.2)  # never into the bodies
        angles = self.turn(times)
        angles[:, :2] = 0.45 * np.tanh(angles[:, :2] / 0.45)  # never past the end of the wall
        turn = rotation(angles)
        return turn, -np.einsum("sij,sj->si", turn, place)


@dataclass(frozen=True)
class Scene:
    """All that is needed to render a clip, the farthest part first."""

    camera: Camera
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class _Body:
    """Pose of a body: a ray and a depth in the frame of a camera, and angles."""

    ray: Wave  # (X / Z, Y / Z)
    depth: Wave  # logarithm of metres
    turn: Wave  # pitch, yaw (before their bound), roll
    meets: float | None  # the time of the camera in whose frame it lives; None: it moves with the camera

    def pose(self, times: Array, camera: Camera) -> tuple[Array, Array]:
        """Give rotation (S, 3, 3) and place (S, 3), body to camera."""
        z = np.exp(np.clip(self.depth(times)[:, 0], math.log(1.2), math.log(WALL * 0.8)))
        place = np.concatenate([self.ray(times), np.ones((len(times), 1))], 1) * z[:, None]
        angles = self.turn(times)
        angles[:, :2] = 0.95 * np.tanh(angles[:, :2] / 0.95)  # never edge on
        turn = rotation(angles)
        if self.meets is None:
            return turn, place
        r0, t0 = (x[0] for x in camera.pose(np.array([self.meets])))
        r, t = camera.pose(times)
        back = r @ r0.T
        return back @ turn, np.einsum("sij,sj->si", back, place - t0) + t


def _flat(scale: Array, local: Callable[[Array], Array] | None, body: _Body) -> Callable[[Array, Camera], Array]:
    """Make a part's `plane`: its place on a body, `local` (times -> (S, 3, 3): axes and origin), times scale."""

    def plane(times: Array, camera: Camera) -> Array:
        turn, place = body.pose(times, camera)
        mine = np.eye(3)[None] * [1, 1, 0] if local is None else local(times)
        out = turn @ mine
        out[..., 2] += place
        out[..., :2] *= scale
        return out

    return plane


def _fixed(scale: float, turn: Array, place: Array) -> Callable[[Array, Camera], Array]:
    """Make the `plane` of scenery that stands still in the world."""

    def plane(times: Array, camera: Camera) -> Array:
        r, t = camera.pose(times)
        out = r @ np.concatenate([turn[:, :2] * scale, place[:, None]], 1)
        out[..., 2] += t
        return out

    return plane


def _speed(rng: np.random.Generator, median: float, top: float) -> Array:
    """Draw a velocity (2,) in pixels per frame of a 256-pixel image, log-normal in size."""
    size = min(median * math.exp(rng.normal(0, 0.9)), top)
    angle = rng.uniform(0, 2 * np.pi)
    return size * np.array([math.cos(angle), 0.7 * math.sin(angle)])


def _camera(rng: np.random.Generator, size: tuple[int, int], frames: int) -> Camera:
    """Draw a camera: still, hand-held, panning, travelling, rolling or zooming, or several of these."""
    focal = max(size) * rng.uniform(0.85, 1.5)
    px = max(size) / 256 / focal  # radians for a pixel of a 256-pixel image
    still = rng.random() < 0.12
    shake = 0 if still else rng.choice([0.3, 1.5, 4.0]) * px
    pan = _speed(rng, 1.2, 6) * px if not still and rng.random() < 0.5 else np.zeros(2)
    move = _speed(rng, 1.2, 5) * px * WALL if not still and rng.random() < 0.5 else np.zeros(2)
    dolly = rng.normal(0, 0.05) if not still and rng.random() < 0.4 else 0.0
    roll = rng.normal(0, 0.008) if not still and rng.random() < 0.25 else 0.0
    zoom = rng.normal(0, 0.04) if not still and rng.random() < 0.2 else 0.0
    middle = frames / 2  # it looks at the middle of the scene in the middle of the clip
    place = np.array([*move, dolly])
    turn = np.array([pan[1], pan[0], roll])
    sway = np.array([shake * 2, shake * 2, shake * 2]) * WALL * 0.3
    return Camera(
        wave(rng, -place * middle, place, sway, frames),
        wave(rng, -turn * middle, turn, np.array([shake, shake, shake]) * 2, frames, (10, 50)),
        wave(rng, [-zoom * middle], [zoom], [0.0], frames),
        focal,
        size,
    )


Paint = Callable[[int, int], Tensor]  # a texture (3, h, w) of the wanted size


def _scenery(rng: np.random.Generator, camera: Camera, paint: Paint) -> list[Part]:
    """Draw a wall, often with a floor before it: planes without end."""
    side = min(math.ceil(max(camera.size) * 2.5 / 64) * 64, 1280)
    floor = rng.random() < 0.45
    lean = rng.normal(0, 0.12 if floor else 0.25, 2).clip(-0.4, 0.4)
    turn = rotation(np.array([[lean[0], lean[1], rng.uniform(-0.2, 0.2)]]))[0]
    density = camera.focal / WALL * 1.15
    stack = textures.pyramid(paint(side, side), 3)
    parts = [Part(0, stack, None, _fixed(side / 2 / density, turn, np.array([0, 0, WALL])))]
    if floor:
        drop = rng.uniform(0.9, 1.8)
        turn = rotation(np.array([[np.pi / 2 + rng.normal(0, 0.04), 0.0, rng.normal(0, 0.06)]]))[0]
        turn = turn @ rotation(np.array([[0.0, 0.0, rng.uniform(0, 6.3)]]))[0]
        density = camera.focal / 5 * 1.1
        stack = textures.pyramid(paint(side, side), 4)
        parts.append(Part(0, stack, None, _fixed(side / 2 / density, turn, np.array([0, drop, 6.0]))))
    return parts


def _shear(rng: np.random.Generator, slope: float = 0.5) -> Shear:
    """Draw a bend with slopes up to `slope`."""
    waves = rng.uniform(1.2, 4.5, (2, 2))
    size = rng.dirichlet((1.0, 1.0), 2) * slope * rng.uniform(0.4, 1.0) / waves
    speed = rng.normal(0, 0.22, (2, 2))
    phase = rng.uniform(0, 2 * np.pi, (2, 2))
    return Shear(*(torch.from_numpy(np.asarray(x)) for x in (size, waves, phase, speed)))


def _pose(rng: np.random.Generator, camera: Camera, frames: int, depth: float) -> _Body:
    """Draw how a body moves: through the picture at some time, across and in depth, turning."""
    px = max(camera.size) / 256 / camera.focal
    h, w = (x / max(camera.size) * 256 for x in camera.size)
    meets = float(rng.uniform(0, max(frames - 1, 1)))
    where = np.array([rng.uniform(-0.45, 0.45) * w, rng.uniform(-0.45, 0.45) * h]) * px
    rate = np.zeros(2) if rng.random() < 0.2 else _speed(rng, 2.2, 22) * px
    sway = np.abs(rng.normal(0, rng.choice([0.5, 6, 16]), 2)) * px
    far = rng.normal(0, 0.012) if rng.random() < 0.6 else 0.0
    spin = rng.normal(0, 0.035) if rng.random() < 0.5 else 0.0
    lean = rng.normal(0, 0.35, 2)
    rock = np.abs(rng.normal(0, rng.choice([0.05, 0.35]), 3)) * [1, 1, 0.7]
    ray = wave(rng, where - rate * meets, rate, sway, frames)
    depths = wave(rng, [math.log(depth) - far * meets], [far], [abs(rng.normal(0, 0.08))], frames, (20, 80))
    turn = wave(rng, [*lean, rng.uniform(0, 6.3)], [0, 0, spin], rock, frames)
    return _Body(ray, depths, turn, None if rng.random() < 0.2 else meets)


def _texels(pixels: float) -> int:
    """Choose a texture size for a length in pixels, from a few sizes that Fourier transforms like."""
    sizes = (48, 64, 96, 128, 160, 192, 256, 320, 384, 512, 768)
    return next((s for s in sizes if s >= pixels * 1.1), sizes[-1])


def _piece(
    rng: np.random.Generator,
    label: int,
    kind: str,
    half: Array,
    body: _Body,
    focal: float,
    depth: float,
    paint: Paint,
    local: Callable[[Array], Array] | None = None,
    shear: Shear | None = None,
) -> Part:
    """Make one part with its own texture and outline; `half` (2,) is its half size in metres."""
    w, h = (_texels(2 * x * focal / depth) for x in half)
    field = textures.outline(rng, h, w, kind)[None, None]
    gloss = (float(rng.uniform(0.1, 0.5)) if rng.random() < 0.3 else 0.0, float(rng.uniform(2, 12)))
    image = textures.relief(rng, paint(h, w), field[0, 0])
    return Part(label, textures.pyramid(image, 3), field, _flat(half, local, body), shear, gloss)


def _limbs(rng: np.random.Generator, trunk: Array) -> list[tuple[Array, Callable[[Array], Array]]]:
    """Draw chains of limbs on a trunk of half size `trunk`: their half sizes and in-plane places over time."""
    out: list[tuple[Array, Callable[[Array], Array]]] = []

    def joint(
        parent: Callable[[Array], Array] | None, at: Array, swing: Wave, half: Array, lift: float
    ) -> Callable[[Array], Array]:
        def local(times: Array) -> Array:
            base = np.eye(3)[None] * np.ones((len(times), 1, 1)) if parent is None else parent(times)
            angle = swing(times)[:, 0]
            c, s = np.cos(angle), np.sin(angle)
            base2 = base[:, :2, :2]
            turn = base2 @ np.stack([np.stack([c, -s], -1), np.stack([s, c], -1)], -2)
            # The limb's own centre lies half its length beyond the joint.
            origin = (base[:, :2, 2] if parent is not None else 0) + np.einsum("sij,j->si", base2, at)
            origin = origin + turn[..., 0] * half[0] * 0.8
            full = np.zeros((len(times), 3, 3))
            full[:, :2, :2], full[:, :2, 2], full[:, 2, 2] = turn, origin, lift
            return full

        return local

    lift = 0.0
    for _ in range(int(rng.integers(1, 4))):
        angle, parent = rng.uniform(0, 2 * np.pi), None
        at = 0.6 * trunk * [math.cos(angle), math.sin(angle)]
        side = rng.choice([-1, 1])
        for link in range(int(rng.integers(1, 3))):
            lift += 0.012
            half = float(trunk.max()) * np.array([rng.uniform(0.5, 0.9), rng.uniform(0.16, 0.3)]) * 0.8**link
            sway = [abs(rng.normal(0, 0.5)) + 0.1]
            swing = wave(rng, [angle if link == 0 else rng.normal(0, 0.4)], [0.0], sway, 24, (10, 40))
            parent = joint(parent, at, swing, half, side * lift)
            out.append((half, parent))
            at = np.array([half[0] * 0.8, 0.0])
    return out


def _body(rng: np.random.Generator, label: int, camera: Camera, frames: int, paint: Paint) -> list[Part]:
    """Draw a body: rigid, smoothly bending, or a trunk with limbs."""
    depth = math.exp(rng.uniform(math.log(2.2), math.log(7.5)))
    body = _pose(rng, camera, frames, depth)
    px = max(camera.size) / 256
    radius = math.exp(rng.uniform(math.log(18), math.log(90))) * px * depth / camera.focal
    half = radius * np.array([1.0, math.exp(rng.normal(0, 0.3))])
    args = (body, camera.focal, depth * 0.9, paint)
    kind = rng.choice(["rigid", "smooth", "limbs"], p=[0.4, 0.32, 0.28])
    if kind == "smooth":
        return [_piece(rng, label, "any", half, *args, shear=_shear(rng))]
    parts = [_piece(rng, label, "any", half, *args)]
    if kind == "limbs":
        parts += [_piece(rng, label, "limb", size, *args, local=local) for size, local in _limbs(rng, half)]
    return parts


def _screen(rng: np.random.Generator, label: int, camera: Camera, paint: Paint) -> Part:
    """Draw a layer with holes across the whole picture: foliage, a fence, a crowd; it may wave."""
    depth = rng.uniform(4.5, 8.0)
    side = min(math.ceil(max(camera.size) * 1.6 / 64) * 64, 768)
    turn = rotation(np.array([[*rng.normal(0, 0.2, 2), rng.uniform(0, 6.3)]]))[0]
    field = textures.outline(rng, side, side, "screen")[None, None]
    plane = _fixed(side / 2 / (camera.focal / depth), turn, np.array([0, 0, depth]))
    shear = _shear(rng, 0.12) if rng.random() < 0.5 else None
    return Part(label, textures.pyramid(paint(side, side), 3), field, plane, shear, endless=True)


def scene(rng: np.random.Generator, size: tuple[int, int], frames: int, images: Sequence[Tensor] | None) -> Scene:
    """Draw everything a clip shows; `images` (3, h, w) replace our textures."""
    camera = _camera(rng, size, frames)

    def paint(h: int, w: int) -> Tensor:
        return textures.texture(rng, h, w, images)

    def backdrop(h: int, w: int) -> Tensor:
        return textures.texture(rng, h, w, images, textures.BACKDROP)

    parts = _scenery(rng, camera, backdrop)
    label = 1
    if rng.random() < 0.25:
        parts.append(_screen(rng, label, camera, paint))
        label += 1
    # More bodies for long clips, since bodies pass by.
    for _ in range(round(int(rng.integers(3, 9)) * min(max(frames / 48, 1.0), 2.5))):
        parts += _body(rng, label, camera, frames, paint)
        label += 1
    middle = np.array([frames / 2])
    scenery = [p for p in parts if p.label == 0]
    others = [p for p in parts if p.label > 0]
    others.sort(key=lambda p: -float(p.plane(middle, camera)[0, 2, 2]))
    return Scene(camera, tuple(scenery + others))
