"""Makes one clip: scene, frames, and all truth, as a `Clip`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trackpl.errors import DataError
from trackpl.types import Camera, Clip, Flow
from trackpl_prep.blender import truth
from trackpl_prep.blender.scene import NEAR, Scene, scene
from trackpl_prep.blender.truth import Geometry, Hits, View

LICENCE = "CC0-1.0"
DENSE = ("none", "first", "last", "both")
_REACH = 511.0  # pixels: longest motion of the shards' fixed-point flow at full precision; longer ones are not valid


@dataclass(frozen=True)
class Request:
    """What a clip follows from; the same request, the same clip."""

    seed: int
    index: int
    size: tuple[int, int] = (256, 256)  # H, W pixels
    frames: int = 24
    points: int = 2048
    samples: int = 16
    fps: float = 12.0
    motion_blur: float = 0.0
    dense: str = "none"  # frames whose pixels are tracked through all others; none: flow of (t, t + 1)
    textures: str | None = None  # folder of photographs


def check(request: Request) -> None:
    """Refuse what cannot be rendered; raises `DataError`."""
    r = request
    if r.seed < 0 or r.index < 0:
        raise DataError(f"seed and clip number must not be negative, got {r.seed} and {r.index}")
    if min(r.size) < 16 or max(r.size) > 4096 or r.frames < 1 or r.points < 0 or r.samples < 1 or not 1 <= r.fps <= 240:
        raise DataError(
            f"cannot render {r.size[0]}x{r.size[1]} pixels, {r.frames} frames, {r.points} points, {r.samples} samples, "
            f"{r.fps:g} frames a second; at least 16x16, 1, 0, 1 and 1, at most 4096 pixels a side and 240 a second"
        )
    if not 0 <= r.motion_blur <= 1:
        raise DataError(f"--motion-blur is the part of the clips that have it, 0 to 1, got {r.motion_blur:g}")
    if r.dense not in DENSE:
        raise DataError(f"--dense must be one of {', '.join(DENSE)}, got '{r.dense}'")


def setting(request: Request) -> Scene:
    """Draw the scene of a clip."""
    images = None
    if request.textures is not None:
        from trackpl_prep.synthetic import load_textures

        images = load_textures(request.textures)
    detail = 512 if max(request.size) <= 320 else 1024
    return scene(request.seed, request.index, request.frames, request.fps, images, request.motion_blur, detail)


def make(request: Request, folder: Path) -> tuple[Clip, dict[str, Any]]:
    """Render a clip with every field of `Clip` (B = 1), and some facts of its scene; `folder` is for Blender's files.

    Belongs into a process of its own, with torch on one thread: Blender is one global state.

    Raises:
        DataError: a request out of range; Blender or pybullet is not installed.
    """
    from trackpl_prep.blender.render import blender, render

    check(request)
    version = blender().app.version_string  # before the work, not after it
    drawn = setting(request)
    video = render(drawn, request.size, folder, samples=request.samples)
    facts = {
        "seed": request.seed,
        "clip": request.index,
        "renderer": f"Blender {version} Cycles",
        "samples": request.samples,
        "bodies": [item.kind for item in drawn.items if item.label],
        "shutter": round(drawn.shutter, 4),
    }
    return label(drawn, video, request), facts


def label(drawn: Scene, video: NDArray[np.uint8], request: Request) -> Clip:
    """Add the truth to the frames (T, H, W, 3) of a scene."""
    geo = truth.geometry(drawn, request.size)
    views = [truth.view(geo, t) for t in range(geo.frames)]
    places = truth.centres(request.size)
    pixels = [truth.cast(seen, places) for seen in views]
    if any((hit.face < 0).any() for hit in pixels):
        raise DataError("the surroundings of a scene must be closed: a pixel shows nothing at all")
    labels = np.stack([geo.labels[hit.face] for hit in pixels]).reshape(-1, *request.size)
    rng = np.random.default_rng([request.seed, request.index, 9])
    queries, tracked = tracks(rng, geo, views, labels, request.points)
    depth = np.stack([hit.depth for hit in pixels]).reshape(labels.shape)
    valid = _valid(tracked.xy, tracked.depth, request.size)
    intrinsics = np.broadcast_to(geo.intrinsics, (geo.frames, 4))
    return Clip(
        video=torch.from_numpy(video).permute(0, 3, 1, 2)[None].contiguous(),
        tracks=_single(np.where(valid[..., None], tracked.xy, 0)),
        visible=torch.from_numpy(tracked.visible & valid)[None],
        valid=torch.from_numpy(valid)[None],
        track_depth=_single(tracked.depth),
        queries=_single(queries),
        depth=_single(depth)[:, :, None],
        flow=flow(geo, views, pixels, pairs(request.dense, geo.frames), bool(request.dense != "none")),
        labels=torch.from_numpy(labels)[None],
        camera=Camera(_single(intrinsics), _single(geo.pose)),
        name=(f"kubric-blender-{request.seed}-{request.index:06d}",),
        fps=request.fps,
    )


def _single(array: NDArray[Any]) -> Tensor:
    """Return a float32 tensor with a batch of one."""
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))[None]


def _valid(xy: NDArray[Any], depth: NDArray[Any], size: tuple[int, int]) -> NDArray[np.bool_]:
    """Tell which places are in front of the camera and not absurdly far outside of the frame."""
    reach = 8 * max(size)
    return (depth > NEAR) & (np.abs(xy) < reach).all(-1)


def pairs(dense: str, frames: int) -> tuple[tuple[int, int], ...]:
    """List the frame pairs (s, t) of the flow."""
    sources = {"none": (), "first": (0,), "last": (frames - 1,), "both": (0, frames - 1)}[dense]
    if dense == "none":
        return tuple((t, t + 1) for t in range(frames - 1))
    return tuple((s, t) for s in sorted(set(sources)) for t in range(frames))


def tracks(
    rng: np.random.Generator, geo: Geometry, views: Sequence[View], labels: NDArray[np.int64], points: int
) -> tuple[NDArray[np.float64], truth.Tracked]:
    """Choose points and follow them: queries (N, 3) of (t, x, y), and the tracks."""
    frame, xy = truth.choose(rng, labels, points)
    hits = Hits(np.empty(points, np.int64), np.empty((points, 3)), np.empty(points))
    for t, seen in enumerate(views):
        mine = np.flatnonzero(frame == t)
        found = truth.cast(seen, xy[mine])
        hits.face[mine], hits.weights[mine], hits.depth[mine] = found.face, found.weights, found.depth
    return np.concatenate([frame[:, None], xy], 1), truth.follow(geo, views, hits)


def flow(
    geo: Geometry, views: Sequence[View], pixels: Sequence[Hits], wanted: Sequence[tuple[int, int]], with_depth: bool
) -> Flow | None:
    """Displace every pixel of frame s to frame t for each pair: motion, visibility, validity, depth there."""
    if not wanted:
        return None
    h, w = geo.size
    start = truth.centres(geo.size)
    xy = np.empty((len(wanted), 2, h, w), np.float32)
    depth = np.empty((len(wanted), h, w), np.float32)
    visible, valid = np.empty((len(wanted), h, w), bool), np.empty((len(wanted), h, w), bool)
    for p, (s, t) in enumerate(wanted):
        end, z = truth.move(geo, pixels[s], t)
        ok = (z > NEAR) & (np.abs(end - start) <= _REACH).all(-1)
        xy[p] = np.where(ok[:, None], end - start, 0).T.reshape(2, h, w)
        depth[p] = z.reshape(h, w)
        visible[p] = (truth.showing(views[t], end, z) & ok).reshape(h, w)
        valid[p] = ok.reshape(h, w)
    return Flow(
        torch.from_numpy(xy)[None],
        tuple(wanted),
        torch.from_numpy(visible)[None],
        torch.from_numpy(valid)[None],
        torch.from_numpy(depth)[None] if with_depth else None,
    )
