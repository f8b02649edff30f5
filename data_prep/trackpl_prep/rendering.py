"""Renders one synthetic clip with exact truth: a pure function of (seed, index) and options."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trackpl.errors import DataError
from trackpl.types import Camera, Clip, Flow
from trackpl_prep import raster
from trackpl_prep.raster import Buffers, Placed
from trackpl_prep.scene import NEAR, Scene, scene

VERSION = 1  # of what is drawn: a default set made by another version is never reused
FPS = 24.0


def render(
    seed: int,
    index: int,
    *,
    size: tuple[int, int] = (256, 256),
    frames: int = 24,
    points: int = 256,
    device: torch.device | str = "cpu",
    textures: Sequence[Tensor] | None = None,
    flow_pairs: Sequence[tuple[int, int]] | None = None,
) -> Clip:
    """Render clip `index` of `seed` with every field of `Clip` filled (B = 1); the same arguments give the same clip.

    `size` is (H, W) pixels; `textures` are images (3, h, w), uint8 or float in [0, 1], that replace our own;
    `flow_pairs` are the frame pairs (s, t) of dense flow, all (t, t + 1) if None. Labels are 0 for scenery and count
    the bodies from 1; depth is in metres. Raises `DataError` for what cannot be rendered.
    """
    pairs = _check(seed, index, size, frames, points, flow_pairs)
    with _one_thread():
        return _render(seed, index, size, frames, points, torch.device(device), textures, pairs)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keep torch to one thread: sums split over several differ in the last bit, and so would the clip."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _render(
    seed: int,
    index: int,
    size: tuple[int, int],
    frames: int,
    points: int,
    device: torch.device,
    textures: Sequence[Tensor] | None,
    pairs: tuple[tuple[int, int], ...],
) -> Clip:
    """Do the work of `render`."""
    look, world, choice = (np.random.default_rng([seed, index, k]) for k in range(3))
    setting = scene(world, size, frames, textures)
    times = np.arange(frames, dtype=np.float64)
    placed = raster.place(setting, times, device)
    buffers = raster.draw(placed, size)
    colour = _expose(look, setting, buffers.colour, times, size)
    video = _finish(look, colour.view(frames, *size, 3).permute(0, 3, 1, 2))
    tracks, visible, valid = _tracks(choice, placed, buffers, size, points)
    shape = (1, frames, *size)
    labels = torch.tensor([p.label for p in setting.parts], dtype=torch.int16, device=device)
    intrinsics, pose = _camera(setting, times)
    return Clip(
        video=video,
        tracks=tracks[None],
        visible=visible[None],
        valid=valid[None],
        depth=buffers.depth.view(shape)[:, :, None],
        flow=_flow(placed, buffers, size, pairs),
        labels=labels[buffers.owner.long()].view(shape),
        camera=Camera(intrinsics.to(device), pose.to(device)),
        name=(f"synthetic-{seed}-{index:06d}",),
        fps=FPS,
    )


def _check(
    seed: int,
    index: int,
    size: tuple[int, int],
    frames: int,
    points: int,
    pairs: Sequence[tuple[int, int]] | None,
) -> tuple[tuple[int, int], ...]:
    """Refuse what cannot be rendered; give the pairs."""
    if seed < 0 or index < 0:
        raise DataError(f"seed and index must not be negative, got {seed} and {index}")
    if min(size) < 8 or frames < 1 or points < 0:
        raise DataError(
            f"cannot render size {tuple(size)}, {frames} frames, {points} points; "
            "at least 8x8 pixels, 1 frame and 0 points"
        )
    pairs = [(t, t + 1) for t in range(frames - 1)] if pairs is None else pairs
    for s, t in pairs:
        if not (0 <= s < frames and 0 <= t < frames):
            raise DataError(f"flow pair ({s}, {t}) is outside the clip: frames are 0 to {frames - 1}")
    return tuple((int(s), int(t)) for s, t in pairs)


def _camera(setting: Scene, times: np.ndarray) -> tuple[Tensor, Tensor]:
    """Give intrinsics (1, T, 4) and world-to-camera poses (1, T, 4, 4)."""
    turn, shift = setting.camera.pose(times)
    pose = np.broadcast_to(np.eye(4), (len(times), 4, 4)).copy()
    pose[:, :3, :3], pose[:, :3, 3] = turn, shift
    intrinsics = setting.camera.intrinsics(times)
    return torch.from_numpy(intrinsics).float()[None], torch.from_numpy(pose).float()[None]


def _expose(
    rng: np.random.Generator, setting: Scene, colour: Tensor, times: np.ndarray, size: tuple[int, int]
) -> Tensor:
    """Blur some clips by motion: the mean of three instants while the shutter is open, `colour` the middle one."""
    if rng.random() >= 0.12:
        return colour
    half = rng.uniform(0.06, 0.18)
    others = [raster.draw(raster.place(setting, times + dt, colour.device), size).colour for dt in (-half, half)]
    return (colour + others[0] + others[1]) / 3


def _finish(rng: np.random.Generator, video: Tensor) -> Tensor:
    """Light and photograph colours (T, 3, H, W), both changing slowly, with noise; (1, T, 3, H, W) uint8."""
    frames, _, h, w = video.shape
    device = video.device
    t = torch.arange(frames, dtype=torch.float32)
    # A coarse grid over time and place, smoothly enlarged: light that moves slowly.
    coarse = torch.from_numpy(rng.standard_normal((1, 1, 3, 3, 3), np.float32)) * float(rng.choice([0.05, 0.12, 0.25]))
    light = F.interpolate(coarse, (frames, h, w), mode="trilinear", align_corners=True)[0, 0]
    speed, phase = rng.uniform(0.02, 0.3), rng.uniform(0, 6.3)
    exposure = rng.normal(-0.08, 0.12) + float(rng.choice([0.0, 0.06, 0.2])) * torch.sin(t * speed + phase)
    y, x = torch.linspace(-1, 1, h)[:, None], torch.linspace(-1, 1, w)[None]
    light = light + exposure[:, None, None] - float(rng.choice([0.0, 0.2])) * (x * x + y * y) / 2
    video = (video * torch.exp(light).to(device)[:, None]).clamp(1e-4, 1)
    gamma, swing = float(np.exp(rng.normal(0, 0.12))), float(rng.choice([0.0, 0.08]))
    curve = gamma * torch.exp(swing * torch.sin(t * speed - phase))
    video = video.pow(curve.to(device)[:, None, None, None])
    sigma = float(rng.choice([0.0, 0.006, 0.015, 0.03], p=[0.25, 0.4, 0.25, 0.1]))
    if sigma:  # windows of one sheet of noise: as good as fresh noise, and much cheaper
        sheet = torch.from_numpy(rng.standard_normal((3, 2 * h, 2 * w), np.float32)) * sigma
        ys, xs = rng.integers(0, h + 1, frames), rng.integers(0, w + 1, frames)
        noise = torch.stack([sheet[:, y : y + h, x : x + w] for y, x in zip(ys, xs, strict=True)])
        video = video + noise.to(device)
    return (video.clamp(0, 1) * 255 + 0.5).to(torch.uint8)[None].contiguous()


def _tracks(
    rng: np.random.Generator, placed: list[Placed], buffers: Buffers, size: tuple[int, int], points: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose points on what is seen in some frame, and follow them: tracks (T, N, 2), visible and valid (T, N)."""
    device, frames = buffers.owner.device, len(placed[0].times)
    x, y, s = (a.to(device) for a in _choose(rng, placed, buffers, size, points))
    owner, ux, uy, _ = raster.front(placed, x, y, s)
    n = torch.arange(points, device=device)
    every = torch.arange(frames, device=device)[:, None].expand(frames, points)
    tracks = torch.zeros(frames, points, 2, dtype=torch.float64, device=device)
    depth = torch.zeros(frames, points, dtype=torch.float64, device=device)
    for index, item in enumerate(placed):
        mine = n[owner == index]
        if len(mine):
            instants = every[:, mine].flatten()
            px, py, z = item.project(ux[mine].repeat(frames), uy[mine].repeat(frames), instants)
            tracks[:, mine] = torch.stack([px, py], -1).view(frames, len(mine), 2)
            depth[:, mine] = z.view(frames, len(mine))
    px, py, z = tracks[..., 0].flatten(), tracks[..., 1].flatten(), depth.flatten()
    seen = _seen(placed, owner.repeat(frames), px, py, z, every.flatten(), size)
    return tracks.float(), seen.view(frames, points), depth > NEAR


def _seen(
    placed: list[Placed], owner: Tensor, x: Tensor, y: Tensor, z: Tensor, s: Tensor, size: tuple[int, int]
) -> Tensor:
    """Tell which points (M,) are inside the frame with nothing nearer exactly there."""
    h, w = size
    seen = (x >= 0) & (x < w) & (y >= 0) & (y < h) & (z > NEAR)
    some = seen.nonzero()[:, 0]
    seen[some] = ~raster.hidden(placed, owner[some], x[some], y[some], z[some], s[some])
    return seen


def _choose(
    rng: np.random.Generator, placed: list[Placed], buffers: Buffers, size: tuple[int, int], points: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose places (x, y, frame) of query points: about 0.6 on bodies, of these a third close to an edge."""
    h, w = size
    frames = len(placed[0].times)
    labels = np.array([p.part.label for p in placed], np.int16)[buffers.owner.cpu().numpy()].reshape(frames, h, w)
    # Four times as many places as wanted, at random; then the wanted shares of them.
    count = max(16 * points, 64)
    s, row, col = rng.integers(0, frames, count), rng.integers(0, h, count), rng.integers(0, w, count)
    step = max(2, round(max(size) / 64))
    here = labels[s, row, col]
    edge = np.zeros(count, bool)
    for dy, dx in ((-step, 0), (step, 0), (0, -step), (0, step)):
        edge |= labels[s, np.clip(row + dy, 0, h - 1), np.clip(col + dx, 0, w - 1)] != here
    body = here > 0
    groups = [body & edge, body & ~edge, ~body]
    wanted = [round(0.2 * points), round(0.4 * points), points]
    chosen: list[np.ndarray] = []
    for group, share in zip(groups, wanted, strict=True):
        chosen.append(np.flatnonzero(group)[: min(share, points - sum(map(len, chosen)))])
    rest = np.setdiff1d(np.arange(count), np.concatenate(chosen))
    pick = np.concatenate([*chosen, rest])[:points]
    x, y = col[pick] + rng.random(points), row[pick] + rng.random(points)
    return torch.from_numpy(x), torch.from_numpy(y), torch.from_numpy(s[pick])


def _flow(placed: list[Placed], buffers: Buffers, size: tuple[int, int], pairs: tuple[tuple[int, int], ...]) -> Flow:
    """Displace every pixel of frame s to frame t, for each pair; and tell whether t shows it."""
    h, w = size
    device = buffers.owner.device
    xy = torch.zeros(len(pairs), 2, h, w, device=device)
    visible = torch.zeros(len(pairs), h, w, dtype=torch.bool, device=device)
    uniform = _uniform(buffers.owner.view(-1, h, w))
    for start in range(0, len(pairs), 32):  # bounds the memory
        part = slice(start, start + 32)
        _flow_chunk(placed, buffers, size, pairs[part], uniform, xy[part], visible[part])
    return Flow(xy[None], pairs, visible[None], torch.ones_like(visible)[None])


def _uniform(owner: Tensor) -> Tensor:
    """Give the owner of each 2x2 block of pixel centres (T, H-1, W-1), -1 where the four differ."""
    first = owner[:, :-1, :-1]
    same = (first == owner[:, 1:, :-1]) & (first == owner[:, :-1, 1:]) & (first == owner[:, 1:, 1:])
    return torch.where(same, first, -1)


def _flow_chunk(
    placed: list[Placed],
    buffers: Buffers,
    size: tuple[int, int],
    pairs: tuple[tuple[int, int], ...],
    uniform: Tensor,
    xy: Tensor,
    visible: Tensor,
) -> None:
    """Fill `xy` (P, 2, H, W) and `visible` (P, H, W)."""
    h, w = size
    device = xy.device
    source, target = (torch.tensor([p[k] for p in pairs], device=device) for k in (0, 1))
    owner = buffers.owner.view(-1, h * w)[source].flatten()
    ends, z = _wall_flow(placed[0], source, target, size)
    for index, item in enumerate(placed[1:], 1):
        mine = (owner == index).nonzero()[:, 0]
        if not len(mine):
            continue
        pair, pixel = mine // (h * w), mine % (h * w)
        at = source[pair] * (h * w) + pixel
        ends[0, mine], ends[1, mine], z[mine] = item.project(buffers.ux[at], buffers.uy[at], target[pair])
    xs = (torch.arange(w, device=device) + 0.5).repeat(h).repeat(len(pairs))
    ys = (torch.arange(h, device=device) + 0.5).repeat_interleave(w).repeat(len(pairs))
    xy[:, 0], xy[:, 1] = (ends[0] - xs).view(-1, h, w), (ends[1] - ys).view(-1, h, w)
    # Where the four centres around the target show the same part, it is in front; else ask exactly.
    s = target.repeat_interleave(h * w)
    seen = (ends[0] >= 0) & (ends[0] < w) & (ends[1] >= 0) & (ends[1] < h) & (z > NEAR)
    col = (ends[0] - 0.5).long().clamp(0, w - 2)
    row = (ends[1] - 0.5).long().clamp(0, h - 2)
    sure = uniform.flatten()[(s * (h - 1) + row) * (w - 1) + col] == owner
    ask = (seen & ~sure).nonzero()[:, 0]
    x, y = ends[:, ask].double()
    seen[ask] = ~raster.hidden(placed, owner[ask].long(), x, y, z[ask].double(), s[ask])
    visible.copy_(seen.view(-1, h, w))


def _wall_flow(wall: Placed, source: Tensor, target: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Send all pixels of frames `source` (P,) as if the first part covered them: x, y (2, P*H*W) and depth (P*H*W,)."""
    h, w = size
    m = wall.h[target] @ wall.g[source]
    x = torch.arange(w, device=m.device)[None, None] + 0.5
    y = torch.arange(h, device=m.device)[None, :, None] + 0.5
    # Double on rows and columns, single on pixels.
    q = [
        (m[:, i, 0, None, None] * x).float() + (m[:, i, 1, None, None] * y + m[:, i, 2, None, None]).float()
        for i in range(3)
    ]
    g = wall.g[source]
    here = (g[:, 2, 0, None, None] * x).float() + (g[:, 2, 1, None, None] * y + g[:, 2, 2, None, None]).float()
    ratio = q[2].clamp(min=1e-3)  # depth there over depth here
    return torch.stack([(q[0] / ratio).flatten(), (q[1] / ratio).flatten()]), (q[2] / here.clamp(min=1e-4)).flatten()
