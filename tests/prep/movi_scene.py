"""A scene as MOVi annotates it, ray traced: floor, dome and turning boxes before a moving camera.

It shares no code with the converter: `Truth.move` knows by its own arithmetic where every pixel goes.
"""

import struct
from dataclasses import dataclass

import cv2
import google_crc32c
import numpy as np

RADIUS = 20.0  # of the dome, metres


def product(p, q):
    """Multiply quaternions (..., 4), w first."""
    w, v, u, x = p[..., :1], p[..., 1:], q[..., :1], q[..., 1:]
    return np.concatenate([w * u - (v * x).sum(-1, keepdims=True), w * x + u * v + np.cross(v, x)], -1)


def turn(axis, angle):
    """Make quaternions of turns about an axis."""
    angle = np.asarray(angle, float)[..., None] / 2
    return np.concatenate([np.cos(angle), np.sin(angle) * np.asarray(axis, float)], -1)


def rotate(q, v):
    """Turn vectors (..., 3) by a quaternion."""
    zero = np.zeros((*v.shape[:-1], 1))
    q = np.broadcast_to(q, (*v.shape[:-1], 4))
    conjugate = q * np.array([1, -1, -1, -1])
    return product(product(q, np.concatenate([zero, v], -1)), conjugate)[..., 1:]


@dataclass
class Truth:
    """What the scene is made of, and what is seen of it."""

    half: np.ndarray  # (K, 3) half sides of the boxes
    positions: np.ndarray  # (K, T, 3)
    quaternions: np.ndarray  # (K, T, 4)
    centres: np.ndarray  # (T, 3) of the camera
    cameras: np.ndarray  # (T, 4)
    focal: float  # pixels
    size: tuple
    ids: np.ndarray  # (T, H, W)
    points: np.ndarray  # (T, H, W, 3) in the world
    normals: np.ndarray  # (T, H, W, 3)
    own: np.ndarray  # (T, H, W, 3) in the box, -1 to 1

    def project(self, world, t):
        """Project points (..., 3) into frame t: pixels (..., 2) and depth along the axis (...)."""
        seen = rotate(self.cameras[t] * np.array([1, -1, -1, -1]), world - self.centres[t])
        z = -seen[..., 2]
        h, w = self.size
        return np.stack([w / 2 + self.focal * seen[..., 0] / z, h / 2 - self.focal * seen[..., 1] / z], -1), z

    def move(self, s, t):
        """Say where every pixel of frame s is in frame t: (H, W, 2) pixels and (H, W) depth."""
        world = self.points[s].copy()
        for k in range(len(self.half)):
            mine = self.ids[s] == k + 1
            local = self.own[s][mine] * self.half[k]
            world[mine] = rotate(self.quaternions[k, t], local) + self.positions[k, t]
        return self.project(world, t)


def truth(frames=24, size=(256, 256), boxes=20, seed=0):
    """Trace the scene."""
    rng = np.random.default_rng(seed)
    h, w = size
    time = np.arange(frames) / 24
    half = rng.uniform(0.3, 1.0, (boxes, 3))
    start, speed = rng.uniform(-4, 4, (boxes, 3)), rng.uniform(-2, 2, (boxes, 3))
    start[:, 2] = rng.uniform(0.5, 2.5, boxes)
    positions = start[:, None] + speed[:, None] * time[None, :, None] * [1, 1, 0.2]
    axes = rng.normal(size=(boxes, 3))
    axes /= np.linalg.norm(axes, axis=-1, keepdims=True)
    angles = rng.uniform(-3, 3, (boxes, 1)) + rng.uniform(-2, 2, (boxes, 1)) * time
    quaternions = turn(axes[:, None], angles)
    cameras = product(turn([0, 0, 1], 0.5 + 0.3 * time), turn([1, 0, 0], np.full(frames, 1.15)))
    centres = rotate(cameras, np.broadcast_to([0.0, 0, 1], (frames, 3))) * 9 + [0, 0, 1]
    focal = 35 / 32 * w
    v, u = np.meshgrid(np.arange(h) + 0.5, np.arange(w) + 0.5, indexing="ij")
    rays = np.stack([(u - w / 2) / focal, (h / 2 - v) / focal, -np.ones_like(u)], -1)
    rays /= np.linalg.norm(rays, axis=-1, keepdims=True)
    poses = [(rotate(cameras[t], rays), centres[t], positions[:, t], quaternions[:, t]) for t in range(frames)]
    seen = [_trace(half, *pose) for pose in poses]
    ids, points, normals, own = (np.stack(x) for x in zip(*seen, strict=True))
    return Truth(half, positions, quaternions, centres, cameras, focal, size, ids, points, normals, own)


def _trace(half, rays, centre, positions, quaternions):
    """Find what each ray (H, W, 3) meets first."""
    with np.errstate(divide="ignore", invalid="ignore"):
        floor = -centre[2] / rays[..., 2]
    b = (rays * centre).sum(-1)
    dome = -b + np.sqrt(b * b - (centre * centre).sum() + RADIUS**2)
    on_floor = (floor > 0) & (floor < dome)
    nearest = np.where(on_floor, floor, dome)
    ids = np.zeros(rays.shape[:2], np.uint8)
    points = centre + rays * nearest[..., None]
    normals = np.where(on_floor[..., None], [0.0, 0, 1], -points / RADIUS)
    own = np.zeros_like(points)
    for k in range(len(half)):
        back = quaternions[k] * np.array([1, -1, -1, -1])
        local, origin = rotate(back, rays), rotate(back, centre - positions[k])
        with np.errstate(divide="ignore"):
            a, c = (-half[k] - origin) / local, (half[k] - origin) / local
        near, far = np.minimum(a, c), np.maximum(a, c)
        enter = near.max(-1)
        hit = (enter < far.min(-1)) & (enter > 0) & (enter < nearest)
        side = near.argmax(-1)[hit]
        nearest[hit], ids[hit] = enter[hit], k + 1
        inside = origin + local[hit] * enter[hit][:, None]
        points[hit] = centre + rays[hit] * enter[hit][:, None]
        own[hit] = inside / half[k]
        flat = np.zeros_like(inside)
        flat[np.arange(len(side)), side] = -np.sign(local[hit][np.arange(len(side)), side])
        normals[hit] = rotate(quaternions[k], flat)
    return ids, points, normals, own


def annotations(world):
    """Quantise the scene as MOVi stores it: features by name, images as arrays."""
    distance = np.linalg.norm(world.points - world.centres[:, None, None], axis=-1)
    low, high = np.float32(distance.min()), np.float32(distance.max())
    corners = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], float)
    local = corners * world.half[:, None, None]
    boxes = rotate(world.quaternions[:, :, None], np.broadcast_to(local, (*world.quaternions.shape[:2], 8, 3)))
    boxes += world.positions[:, :, None]
    checks = (np.floor(world.points * 2).sum(-1) % 2).astype(int)
    colours = np.array([[90, 90, 90], [200, 60, 60], [60, 200, 60], [60, 60, 200], [200, 200, 60], [60, 200, 200]])
    video = (colours[world.ids % 6] * (0.6 + 0.4 * checks[..., None])).astype(np.uint8)
    facing = np.where((world.ids > 0)[..., None], (world.own + 1) / 2, 0)
    return {
        "video": video,
        "segmentations": world.ids[..., None],
        "depth": np.rint((distance - low) / (high - low) * 65535).clip(0, 65535).astype(np.uint16)[..., None],
        "normal": ((world.normals + 1) / 2 * 65535).astype(np.uint16),
        "object_coordinates": (facing * 65535).clip(0, 65535).astype(np.uint16),
        "instances/bboxes_3d": boxes.astype(np.float32),
        "instances/quaternions": world.quaternions.astype(np.float32),
        "instances/positions": world.positions.astype(np.float32),
        "camera/positions": world.centres.astype(np.float32),
        "camera/quaternions": world.cameras.astype(np.float32),
        "camera/focal_length": np.float32(35),
        "camera/sensor_width": np.float32(32),
        "metadata/depth_range": np.array([low, high]),
    }


def flows(world, step):
    """Return what MOVi stores of the motion to the frame t + step: u16 (T, H, W, 2) of (row, column), and its range."""
    frames = len(world.ids)
    here = np.stack(np.meshgrid(np.arange(world.size[1]) + 0.5, np.arange(world.size[0]) + 0.5), -1)
    xy = [world.move(t, t + step)[0] - here if 0 <= t + step < frames else np.zeros_like(here) for t in range(frames)]
    values = np.stack(xy)[..., ::-1]
    low, high = np.float32(values.min()), np.float32(values.max())
    return np.rint((values - low) / (high - low) * 65535).clip(0, 65535).astype(np.uint16), np.array([low, high])


# The published files, written here --------------------------------------------------------------------------


def varint(value):
    """Encode one integer."""
    out = bytearray()
    value &= 2**64 - 1
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def field(number, body):
    """Encode a length-delimited field."""
    return varint(number << 3 | 2) + varint(len(body)) + body


def feature(value):
    """Encode a Feature of byte strings, floats or integers, packed."""
    if isinstance(value, bytes | list):
        return field(1, b"".join(field(1, v) for v in ([value] if isinstance(value, bytes) else value)))
    value = np.asarray(value)
    if value.dtype.kind == "f":
        return field(2, field(1, value.astype("<f4").tobytes()))
    return field(3, field(1, b"".join(map(varint, value.ravel().tolist()))))


def example(features):
    """Encode an Example."""
    entries = (field(1, field(1, key.encode()) + field(2, feature(value))) for key, value in features.items())
    return field(1, b"".join(entries))


def masked(data):
    """Return the masked CRC-32C of TFRecord files as four bytes."""
    crc = google_crc32c.value(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32)


def record(payload):
    """Frame one record."""
    length = struct.pack("<Q", len(payload))
    return length + masked(length) + payload + masked(payload)


def png(image):
    """Encode one image, of 8 or 16 bits, grey or RGB."""
    return cv2.imencode(".png", image[..., ::-1] if image.shape[-1] == 3 else image)[1].tobytes()


def movi_record(features, name="scene_0", **changes):
    """Encode a clip as a record of MOVi: image features as PNGs, and the sizes."""
    frames, height, width = features["segmentations"].shape[:3]
    out = {k: [png(f) for f in v] if "/" not in k and "flow" not in k else v for k, v in features.items()}
    sizes = {
        "num_frames": frames,
        "height": height,
        "width": width,
        "num_instances": len(features["instances/bboxes_3d"]),
    }
    out |= {f"metadata/{k}": np.array(v) for k, v in sizes.items()}
    return example(out | {"metadata/video_name": name.encode(), "background": b"dome"} | changes)
