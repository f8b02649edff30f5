"""Draws a `Scene` and answers, exactly, what is in front anywhere: a few operations a part, all frames at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from trackpl_prep.scene import NEAR, Part, Scene, Shear


@dataclass(frozen=True)
class Placed:
    """A part at S instants."""

    part: Part
    times: Tensor  # (S,) float32
    h: Tensor  # (S, 3, 3): (v, 1) to z (x, y, 1)
    g: Tensor  # (S, 3, 3): its inverse
    area: Tensor  # (S,) texels per pixel area at depth 1
    reach: float  # |v| is at most this; infinite for scenery
    shear: Shear | None

    def project(self, x: Tensor, y: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Send material coordinates at instants `s` (M,) to the image: x, y in pixels and depth, each (M,)."""
        if self.shear is not None:
            x, y = self.shear.forward(x, y, self.times.to(x)[s])
        h = self.h.to(x)[s]
        z = h[:, 2, 0] * x + h[:, 2, 1] * y + h[:, 2, 2]
        safe = z.clamp(min=0.02)  # behind the camera there is no image; the caller sees it from z
        px = (h[:, 0, 0] * x + h[:, 0, 1] * y + h[:, 0, 2]) / safe
        return px, (h[:, 1, 0] * x + h[:, 1, 1] * y + h[:, 1, 2]) / safe, z

    def unproject(self, x: Tensor, y: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Send pixels at instants `s` to material coordinates: u_x, u_y, depth, and whether the part is there (M,)."""
        g = self.g.to(x)[s]
        q = g[:, 2, 0] * x + g[:, 2, 1] * y + g[:, 2, 2]
        z = 1 / torch.where(q > 0, q, -1.0)
        vx = (g[:, 0, 0] * x + g[:, 0, 1] * y + g[:, 0, 2]) * z
        vy = (g[:, 1, 0] * x + g[:, 1, 1] * y + g[:, 1, 2]) * z
        there = z > NEAR
        if np.isfinite(self.reach):
            there &= (vx.abs() <= self.reach) & (vy.abs() <= self.reach)
        if self.shear is not None:
            vx, vy = self.shear.inverse(vx, vy, self.times.to(x)[s])
        return vx, vy, z, there

    def inside(self, x: Tensor, y: Tensor) -> Tensor:
        """Give the distance inside the outline in texels at material coordinates (M,)."""
        if self.part.field is None:
            return torch.full_like(x, 1e3)
        pad = "reflection" if self.repeats else "border"
        grid = torch.stack([x, y], -1).float()[None, None]
        out = F.grid_sample(self.part.field, grid, padding_mode=pad, align_corners=False)[0, 0, 0]
        return out.to(x)

    @property
    def repeats(self) -> bool:
        """Tell whether the texture goes on beyond its border, by reflection."""
        return not np.isfinite(self.reach)


def place(scene: Scene, times: NDArray[np.float64], device: torch.device) -> list[Placed]:
    """Evaluate every part of `scene` at `times` (S,)."""
    k = scene.camera.matrix(times)
    out = []
    for part in scene.parts:
        h = k @ part.plane(times, scene.camera)
        g = np.linalg.inv(h)
        rows, cols = part.stack.shape[-2:]
        area = np.abs(np.linalg.det(g)) * (rows * cols / 4)
        reach = np.inf
        if part.field is not None and not part.endless:
            reach = 1.0 + (part.shear.reach() if part.shear else 0.0)
        stamps, h_, g_, area_ = (torch.from_numpy(a).to(device) for a in (times, h, g, area))
        out.append(Placed(_on(part, device), stamps, h_, g_, area_, float(reach), part.shear))
    return out


def _on(part: Part, device: torch.device) -> Part:
    """Move a part's textures to `device`."""
    if part.stack.device == device:
        return part
    field = None if part.field is None else part.field.to(device)
    return Part(part.label, part.stack.to(device), field, part.plane, part.shear, part.gloss, part.endless)


def windows(placed: Placed, size: tuple[int, int]) -> tuple[Tensor, Tensor, int, int]:
    """Find a window (y0, x0 of every instant; rows, cols of all) that holds what the frame shows of the part."""
    h, w = size
    s = len(placed.times)
    zero = torch.zeros(s, dtype=torch.long, device=placed.h.device)
    if placed.repeats:
        return zero, zero, h, w
    corners = torch.tensor([[-1.0, -1, 1, 1], [-1, 1, -1, 1]], dtype=torch.float64, device=placed.h.device)
    corners = torch.cat([corners * placed.reach, torch.ones_like(corners[:1])])
    xyz = placed.h @ corners  # (S, 3, 4)
    xy = xyz[:, :2] / xyz[:, 2:].clamp(min=NEAR)
    safe = (xyz[:, 2].amin(-1) > NEAR)[:, None]
    top = torch.tensor([w, h], dtype=torch.float64, device=xy.device)
    low = torch.where(safe, xy.amin(-1) - 1, 0.0).floor().clamp(min=0).minimum(top)
    high = torch.where(safe, xy.amax(-1) + 1, top).ceil().clamp(min=0).minimum(top)
    cols, rows = (int(x) for x in (high - low).clamp(min=0).amax(0))
    x0 = low[:, 0].clamp(max=w - cols).long()
    y0 = low[:, 1].clamp(max=h - rows).long()
    return y0, x0, rows, cols


@dataclass
class Buffers:
    """The front-most surface at every pixel centre, flat over (S, H, W)."""

    colour: Tensor  # (S*H*W, 3)
    depth: Tensor  # (S*H*W,)
    owner: Tensor  # (S*H*W,) int16, index into the scene's parts
    ux: Tensor  # (S*H*W,) material coordinates
    uy: Tensor


def draw(placed: list[Placed], size: tuple[int, int]) -> Buffers:
    """Paint all parts, the first listed first; a pixel belongs to the nearest part that covers its centre."""
    h, w = size
    s = len(placed[0].times)
    device = placed[0].h.device
    n = s * h * w
    out = Buffers(
        torch.zeros(n, 3, device=device),
        torch.full((n,), torch.inf, device=device),
        torch.zeros(n, dtype=torch.int16, device=device),
        torch.zeros(n, device=device),
        torch.zeros(n, device=device),
    )
    for index, item in enumerate(placed):
        _paint(item, index, size, out)
    return out


def _paint(item: Placed, index: int, size: tuple[int, int], out: Buffers) -> None:
    """Draw one part over what is there, where it is nearer."""
    y0, x0, rows, cols = windows(item, size)
    if rows < 1 or cols < 1:
        return
    device, g = item.g.device, item.g
    x = (x0[:, None] + torch.arange(cols, device=device))[:, None].double() + 0.5  # (S, 1, cols)
    y = (y0[:, None] + torch.arange(rows, device=device))[:, :, None].double() + 0.5  # (S, rows, 1)
    # Double where it is cheap, on rows and columns; single on pixels.
    q = [
        (g[:, i, 0, None, None] * x).float() + (g[:, i, 1, None, None] * y + g[:, i, 2, None, None]).float()
        for i in range(3)
    ]
    z = 1 / q[2].clamp(min=1e-4)
    vx, vy = q[0] * z, q[1] * z
    if index == 0:
        _paint_wall(item, vx, vy, z, out)
        return
    frame = torch.arange(len(y0), device=device)
    flat = (frame * size[0])[:, None, None] + (y0[:, None] + torch.arange(rows, device=device))[:, :, None]
    flat = flat * size[1] + (x0[:, None] + torch.arange(cols, device=device))[:, None]
    there = (z > NEAR) & (q[2] > 1e-4) & (z < out.depth[flat])
    if not item.repeats:
        there &= (vx.abs() <= item.reach) & (vy.abs() <= item.reach)
    pick = there.flatten().nonzero()[:, 0]
    flat, vx, vy, z = (a.flatten()[pick] for a in (flat, vx, vy, z))
    s = pick // (rows * cols)
    if item.shear is not None:
        vx, vy = item.shear.inverse(vx, vy, item.times.float()[s])
    lod = 0.5 * torch.log2(item.area.float()[s] * z * z * z)
    if item.part.field is None:
        out.colour[flat] = _shade(item, _sample(item, vx, vy, lod), vx, vy, s)
    else:
        alpha = (item.inside(vx, vy) * torch.exp2(-lod) + 0.5).clamp(0, 1)
        some = (alpha > 0).nonzero()[:, 0]
        flat, vx, vy, z, s, lod, alpha = (a[some] for a in (flat, vx, vy, z, s, lod, alpha))
        colour = _shade(item, _sample(item, vx, vy, lod), vx, vy, s)
        out.colour[flat] = torch.lerp(out.colour[flat], colour, alpha[:, None])
        whole = (alpha >= 0.5).nonzero()[:, 0]
        flat, vx, vy, z = (a[whole] for a in (flat, vx, vy, z))
    out.depth[flat], out.ux[flat], out.uy[flat] = z, vx, vy
    out.owner[flat] = index


def _paint_wall(item: Placed, x: Tensor, y: Tensor, z: Tensor, out: Buffers) -> None:
    """Fill every pixel with the first part, which is behind all others and covers the frame."""
    lod = 0.5 * torch.log2(item.area.float()[:, None, None] * z * z * z)
    out.colour = _sample(item, x.flatten(), y.flatten(), lod.flatten())
    out.depth, out.ux, out.uy = z.flatten(), x.flatten(), y.flatten()


def _sample(item: Placed, x: Tensor, y: Tensor, lod: Tensor) -> Tensor:
    """Look the texture up at material coordinates, blurred for minification: (M, 3)."""
    stack = item.part.stack
    levels = stack.shape[1]
    pad = "reflection" if item.repeats else "border"
    low, high = (float(v.clamp(0, levels - 1)) for v in (lod.min(), lod.max())) if len(lod) else (0.0, 0.0)
    if high - low < 0.4:  # one blur will do for all pixels, at half the cost
        level = (low + high) / 2
        flat = torch.lerp(stack[:, int(level)], stack[:, min(int(level) + 1, levels - 1)], level - int(level))
        grid = torch.stack([x, y], -1)[None, None]
        return F.grid_sample(flat[None], grid, padding_mode=pad, align_corners=False)[0, :, 0].T
    depth = (lod.clamp(0, levels - 1) + 0.5) * (2 / levels) - 1
    grid = torch.stack([x, y, depth], -1)[None, None, None]
    return F.grid_sample(stack[None], grid, padding_mode=pad, align_corners=False)[0, :, 0, 0].T


def _shade(item: Placed, colour: Tensor, x: Tensor, y: Tensor, s: Tensor) -> Tensor:
    """Add the highlight of a lamp, which moves over the plane as the part turns."""
    strength, sharpness = item.part.gloss
    if not strength:
        return colour
    h = item.h.float()
    normal = torch.linalg.cross(h[:, :, 0], h[:, :, 1])
    normal = normal / normal.norm(dim=-1, keepdim=True).clamp(min=1e-6)
    cx, cy = (3 * normal[:, 0])[s], (3 * normal[:, 1])[s]
    glow = strength * torch.exp(-sharpness * ((x - cx) ** 2 + (y - cy) ** 2) * 0.5)
    return colour + glow[:, None]


def hidden(
    placed: list[Placed], owner: Tensor, x: Tensor, y: Tensor, z: Tensor, s: Tensor, slack: float = 1e-4
) -> Tensor:
    """Tell of points (M,) of part `owner` at instants `s` whether another part is nearer exactly there."""
    out = torch.zeros_like(owner, dtype=torch.bool)
    for index, found in _at(placed, x, y, s):
        pick, _, _, depth = found
        out[pick[(owner[pick] != index) & (depth < z[pick] * (1 - slack))]] = True
    return out


def front(placed: list[Placed], x: Tensor, y: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Find what is nearest exactly at places (M,): part, material coordinates, depth."""
    owner = torch.zeros_like(s)
    ux, uy, z = torch.zeros_like(x), torch.zeros_like(x), torch.full_like(x, torch.inf)
    for index, (pick, vx, vy, depth) in _at(placed, x, y, s):
        near = depth < z[pick]
        pick = pick[near]
        owner[pick], ux[pick], uy[pick], z[pick] = index, vx[near], vy[near], depth[near]
    return owner, ux, uy, z


def _at(
    placed: list[Placed], x: Tensor, y: Tensor, s: Tensor
) -> Iterator[tuple[int, tuple[Tensor, Tensor, Tensor, Tensor]]]:
    """For each part give which places (indices) it covers, and its material coordinates and depth there."""
    for index, item in enumerate(placed):
        pick = torch.arange(len(x), device=x.device)
        if not item.repeats:
            pick = (_boxed(item, x, y, s)).nonzero()[:, 0]
        vx, vy, z, there = item.unproject(x[pick], y[pick], s[pick])
        if item.part.field is not None:
            there &= item.inside(vx, vy) >= 0
        yield index, (pick[there], vx[there], vy[there], z[there])


def _boxed(item: Placed, x: Tensor, y: Tensor, s: Tensor) -> Tensor:
    """Tell which places (M,) lie in the part's window; places outside the frame do not matter."""
    y0, x0, rows, cols = windows(item, (1 << 20, 1 << 20))
    left, top = x0.to(x)[s], y0.to(x)[s]
    return (x >= left) & (x <= left + cols) & (y >= top) & (y <= top + rows)
