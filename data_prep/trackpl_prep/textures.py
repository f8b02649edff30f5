"""Textures with the statistics of photographs, from a random generator: (3, h, w) float in [0, 1], CPU.

Natural images have amplitude spectra near 1/f, edges where one thing covers another, repetition in what people make,
large flat regions with weak gradients, and few, muted, correlated colours. Each family here has one of these; `texture`
mixes them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# Opponent axes of colour: red-green and yellow-blue, orthogonal to grey.
_OPPONENT = np.array([[0.75, -0.65, -0.10], [0.35, 0.30, -0.65]], np.float32)


def palette(rng: np.random.Generator, count: int) -> np.ndarray:
    """Draw `count` colours (count, 3) in [0, 1] that go together: one or two hues, mostly muted."""
    # Warm, sky, leaf or any hue: what photographs have most.
    hues = rng.normal([0.9, -1.7, 2.3, 0.0], [0.4, 0.3, 0.35, 3.0])[rng.choice(4, 2, p=[0.45, 0.25, 0.15, 0.15])]
    hue = hues[(rng.random(count) < 0.25).astype(int)] + rng.normal(0, 0.35, count)
    chroma = np.abs(rng.normal(0, rng.choice([0.04, 0.1, 0.22], p=[0.35, 0.45, 0.2]), count))
    light = np.clip(rng.normal(rng.uniform(0.28, 0.72), rng.uniform(0.08, 0.25), count), 0.04, 0.96)
    axes = np.stack([np.cos(hue), np.sin(hue)], -1) @ _OPPONENT
    return np.clip(light[:, None] + chroma[:, None] * axes, 0.01, 0.99).astype(np.float32)


def spectral(rng: np.random.Generator, channels: int, h: int, w: int, exponent: float) -> Tensor:
    """Draw periodic noise (channels, h, w) of unit deviation whose amplitude falls as 1/f**exponent."""
    fy = torch.fft.fftfreq(h)[:, None] * h
    fx = torch.fft.rfftfreq(w)[None] * w
    f2 = fy**2 + fx**2
    gain = f2.clamp(min=1.0).pow(-exponent / 2)
    gain[0, 0] = 0
    noise = torch.from_numpy(rng.standard_normal((channels, h, w // 2 + 1, 2), np.float32))
    field = torch.fft.irfft2(torch.view_as_complex(noise) * gain, s=(h, w))
    return field / field.std((-2, -1), keepdim=True).clamp(min=1e-8)


def _grain(rng: np.random.Generator, h: int, w: int, exponent: float) -> Tensor:
    """Draw one field (1, h, w) of noise, large ones as a repeated tile, which is four times cheaper."""
    if min(h, w) < 256 or h % 2 or w % 2:
        return spectral(rng, 1, h, w, exponent)
    return spectral(rng, 1, h // 2, w // 2, exponent).repeat(1, 2, 2)


def _cloud(rng: np.random.Generator, h: int, w: int) -> Tensor:
    """Coloured 1/f noise: strong in lightness, weak in colour."""
    exponent = rng.uniform(0.8, 1.6)
    # The three fields share half of their waves: colour goes with lightness.
    noise = spectral(rng, 3, h, w, exponent)
    noise[1:] = 0.5 * noise[1:] + 0.5 * rng.choice([-1, 1]) * noise[:1]
    base = torch.from_numpy(palette(rng, 1)[0])[:, None, None]
    axes = torch.from_numpy(_OPPONENT)
    chroma = torch.einsum("chw,cd->dhw", noise[1:], axes) * rng.uniform(0.005, 0.035)
    return base + noise[:1] * rng.uniform(0.05, 0.2) + chroma


def _ramp(rng: np.random.Generator, h: int, w: int) -> Tensor:
    """1/f noise sent through a colour map: marble, wood, soil, foliage."""
    noise = spectral(rng, 1, h, w, rng.uniform(0.9, 1.7))[0]
    if rng.random() < 0.4:  # veins
        noise = torch.sin(noise * rng.uniform(2, 5)) * 1.2
    return _coloured(rng, noise / 4 + 0.5)


def _coloured(rng: np.random.Generator, level: Tensor) -> Tensor:
    """Map `level` (h, w) in about [0, 1] through a piecewise linear colour map."""
    colours = torch.from_numpy(palette(rng, int(rng.integers(3, 7))))
    place = level.clamp(0, 0.9999) * (len(colours) - 1)
    low = place.long()
    part = (place - low)[..., None]
    return torch.lerp(colours[low], colours[low + 1], part).permute(2, 0, 1)


def _leaves(rng: np.random.Generator, h: int, w: int) -> Tensor:
    """Dead leaves: shapes of power-law size over one another, each of its own colour and material."""
    image = np.ascontiguousarray(_FAMILIES[int(rng.integers(2))](rng, h, w).permute(1, 2, 0).numpy())
    colours = palette(rng, int(rng.integers(5, 12)))
    rough = torch.cat([_grain(rng, h, w, a) for a in rng.uniform(0.5, 1.5, 3)])
    if rng.random() < 0.6:
        rough = torch.cat([rough, _lattice(rng, h, w)[None] * 2 - 1])
    materials = rough.numpy()[..., None]
    count = int(rng.integers(60, 320))
    small, large = 0.012 * max(h, w), rng.uniform(0.2, 0.4) * max(h, w)
    # Density r**-3 between the limits: scale invariant, as in photographs. Not fewer than two texels: it would alias.
    radius = np.maximum((small**-2 - rng.random(count) * (small**-2 - large**-2)) ** -0.5, 2.0)
    radius = np.sort(radius)[::-1] * rng.uniform(0.7, 1.3, count)  # large first, or they would bury everything
    square = rng.random() * 0.8
    draws = [
        radius,
        rng.uniform(0, w, count),
        rng.uniform(0, h, count),
        rng.uniform(0, np.pi, count) if rng.random() < 0.6 else rng.normal(0, 0.05, count),
        rng.uniform(0.3, 1, count),
        rng.random(count),
        rng.normal(0, 0.06, count),
        rng.exponential(0.05, count),
    ]
    for r, cx, cy, angle, aspect, shape, tone, contrast in np.stack(draws, 1).astype(np.float32):
        x0, x1, y0, y1 = max(int(cx - r) - 2, 0), int(cx + r) + 3, max(int(cy - r) - 2, 0), int(cy + r) + 3
        view = image[y0:y1, x0:x1]
        x = np.arange(x0, x0 + view.shape[1], dtype=np.float32)[None] + np.float32(0.5) - cx
        y = np.arange(y0, y0 + view.shape[0], dtype=np.float32)[:, None] + np.float32(0.5) - cy
        along = np.cos(angle) * x + np.sin(angle) * y
        a, b = np.abs(along), np.abs(np.cos(angle) * y - np.sin(angle) * x) / aspect
        reach = np.maximum(a, b) * np.float32(1.3) if shape < square else np.sqrt(a * a + b * b)
        alpha = np.clip((r - reach) * np.float32(0.7) + np.float32(0.5), 0, 1)[..., None]
        which = int(shape * 997)
        grain = materials[which % len(materials), y0:y1, x0:x1] * contrast + (along * (tone / r))[..., None]
        view += alpha * ((colours[which % len(colours)] + tone) * (1 + grain) + grain * np.float32(0.3) - view)
    return torch.from_numpy(image).permute(2, 0, 1)


def _pattern(rng: np.random.Generator, h: int, w: int) -> Tensor:
    """Repetition in two colours."""
    pair = torch.from_numpy(palette(rng, 2))[:, :, None, None]
    return torch.lerp(pair[0].expand(3, h, w), pair[1].expand(3, h, w), _lattice(rng, h, w))


def _lattice(rng: np.random.Generator, h: int, w: int) -> Tensor:
    """Stripes, checks, dots or bricks, a little bent: (h, w) in [0, 1]."""
    angle, period = rng.uniform(0, np.pi), rng.uniform(10, 56)
    y, x = torch.arange(h)[:, None] + 0.5, torch.arange(w)[None] + 0.5
    bend = rng.choice([0.0, 0.15, 0.6]) * period * spectral(rng, 2, h, w, 2.2)
    c, s = float(np.cos(angle)), float(np.sin(angle))
    a, b = (c * x + s * y + bend[0]) / period, (c * y - s * x + bend[1]) / (period * rng.uniform(0.6, 1.6))
    edge = period / 2.5  # one texel or two of transition, so that the edge does not alias
    kind = rng.choice(["stripes", "checks", "dots", "bricks"])
    if kind == "stripes":
        level = (torch.sin(2 * np.pi * a) + rng.uniform(-0.5, 0.5)) * edge / 4
    elif kind == "checks":
        level = torch.sin(np.pi * a) * torch.sin(np.pi * b) * edge / 2
    elif kind == "dots":
        reach = ((a - a.floor() - 0.5) ** 2 + (b - b.floor() - 0.5) ** 2).sqrt()
        level = (rng.uniform(0.2, 0.4) - reach) * edge * 2
    else:
        a = a + 0.5 * (b.floor() % 2)
        border = torch.minimum(0.5 - (a - a.floor() - 0.5).abs(), 0.5 - (b - b.floor() - 0.5).abs())
        level = (border - rng.uniform(0.05, 0.12)) * edge * 2
    return (level + 0.5).clamp(0, 1)


def _flat(rng: np.random.Generator, h: int, w: int) -> Tensor:
    """Shade a plain surface with a weak gradient of colour."""
    pair = torch.from_numpy(palette(rng, 2))
    y, x = torch.linspace(-1, 1, h)[:, None], torch.linspace(-1, 1, w)[None]
    level = 0.5 + 0.35 * (x * rng.uniform(-1, 1) + y * rng.uniform(-1, 1))
    return torch.lerp(pair[0], pair[1], level[..., None]).permute(2, 0, 1)


_FAMILIES = (_cloud, _ramp, _leaves, _pattern, _flat)
_SHARES = (0.16, 0.2, 0.36, 0.16, 0.12)  # of bodies
BACKDROP = (0.12, 0.17, 0.55, 0.08, 0.08)  # of scenery


def texture(
    rng: np.random.Generator,
    h: int,
    w: int,
    images: Sequence[Tensor] | None = None,
    shares: Sequence[float] = _SHARES,
) -> Tensor:
    """Draw a texture (3, h, w) in [0, 1]: a crop of one of `images` (3, h', w') if given, else of our own making."""
    if images:
        return crop(rng, images[int(rng.integers(len(images)))], h, w)
    image = _FAMILIES[int(rng.choice(len(_FAMILIES), p=shares))](rng, h, w)
    if rng.random() < 0.3:  # two materials side by side
        other = _FAMILIES[int(rng.choice(len(_FAMILIES), p=shares))](rng, h, w)
        mask = (spectral(rng, 1, h, w, 2.0) * rng.choice([3.0, 40.0]) + 0.5).clamp(0, 1)
        image = torch.lerp(image, other, mask)
    grain = _grain(rng, h, w, rng.uniform(0.7, 1.3)) * rng.choice([0.012, 0.04, 0.09], p=[0.35, 0.45, 0.2])
    return ((image + 0.02) * (1 + grain) + 0.07 * grain).clamp(0, 1)


def relief(rng: np.random.Generator, image: Tensor, field: Tensor) -> Tensor:
    """Shade a texture (3, h, w) as if its outline `field` (h, w) were that of a round body lit from one side."""
    h, w = field.shape
    depth = (field / (min(h, w) * rng.uniform(0.15, 0.4))).clamp(0, 1)
    height = (1 - (1 - depth) ** 2).sqrt()
    soft = F.avg_pool2d(height[None, None], 9, 1, 4, count_include_pad=False)[0, 0] * min(h, w) / 8
    dy, dx = torch.gradient(soft)
    angle, strength = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.6)
    light = float(np.cos(angle)) * dx + float(np.sin(angle)) * dy
    return (image * (1 + strength * torch.tanh(light))).clamp(0, 1)


def crop(rng: np.random.Generator, image: Tensor, h: int, w: int) -> Tensor:
    """Cut a random window of the wanted shape out of `image` and resize it to (h, w)."""
    image = image.float() / 255 if image.dtype == torch.uint8 else image.float()
    rows, cols = image.shape[-2:]
    scale = min(rows / h, cols / w) * rng.uniform(0.5, 1.0)
    ch, cw = max(int(h * scale), 1), max(int(w * scale), 1)
    y, x = int(rng.integers(rows - ch + 1)), int(rng.integers(cols - cw + 1))
    out = image[None, :, y : y + ch, x : x + cw]
    out = F.interpolate(out, (h, w), mode="bilinear", antialias=True, align_corners=False)[0]
    return (out.flip(-1) if rng.random() < 0.5 else out).clamp(0, 1)


def pyramid(image: Tensor, levels: int) -> Tensor:
    """Stack `image` (C, h, w) blurred for minification by 1, 2, 4, …: (C, levels, h, w), all of full size."""
    h, w = image.shape[-2:]
    stack, small = [image], image[None]
    for _ in range(1, levels):
        rows, cols = max(small.shape[-2] // 2, 1), max(small.shape[-1] // 2, 1)
        small = F.interpolate(small, (rows, cols), mode="area")
        stack.append(F.interpolate(small, (h, w), mode="bilinear", align_corners=False)[0])
    return torch.stack(stack, 1)


def outline(rng: np.random.Generator, h: int, w: int, kind: str = "any") -> Tensor:
    """Draw a shape as a field (h, w): about the distance inside its edge in texels, negative outside.

    Kinds: "blob" (a wavy closed curve), "noise" (a thresholded smooth field, with holes), "polygon", "limb" (a capsule
    along x), "screen" (covers all of the texture, with holes), "any" (one of the first three).
    """
    if kind == "any":
        kind = str(rng.choice(["blob", "noise", "polygon"], p=[0.5, 0.22, 0.28]))
    y = torch.linspace(-1 + 1 / h, 1 - 1 / h, h)[:, None]
    x = torch.linspace(-1 + 1 / w, 1 - 1 / w, w)[None]
    if kind == "limb":
        radius = 0.62 + 0.2 * torch.sin(x * rng.uniform(1, 3) + rng.uniform(0, 6))
        along = (x.abs() - 0.72).clamp(min=0) / 0.25
        field = (radius * 1.0 - (y**2 + (along * radius) ** 2).sqrt()) * h / 2
    elif kind == "screen":
        noise = spectral(rng, 1, h, w, rng.uniform(1.8, 2.6))[0]
        field = _distance(noise - rng.uniform(0.5, 1.1))
    elif kind == "noise":
        noise = spectral(rng, 1, h, w, rng.uniform(2.2, 3.0))[0]
        field = _distance(noise * 0.45 + 1.0 - 1.9 * (x**2 + y**2) + rng.uniform(-0.1, 0.25))
    elif kind == "polygon":
        angle = torch.from_numpy(
            np.sort(rng.uniform(0, 2 * np.pi, int(rng.integers(1, 3)))) + rng.uniform(0, 6)
        ).float()
        count = int(rng.integers(3, 7))
        angle = (
            torch.arange(count) * (2 * np.pi / count) + angle[0] + torch.from_numpy(rng.normal(0, 0.2, count)).float()
        )
        reach = torch.from_numpy(rng.uniform(0.45, 0.8, count)).float()
        sides = reach[:, None, None] - (torch.cos(angle)[:, None, None] * x + torch.sin(angle)[:, None, None] * y)
        field = _distance(-torch.logsumexp(-sides * 25, 0) / 25)
    else:
        theta, r = torch.atan2(y, x), (x**2 + y**2).sqrt()
        order = torch.arange(2, 8)[:, None, None]
        size = torch.from_numpy(rng.normal(0, 1, 6)).float()[:, None, None] / order**1.3 * rng.uniform(0.1, 0.45)
        phase = torch.from_numpy(rng.uniform(0, 2 * np.pi, 6)).float()[:, None, None]
        wave = (size * torch.sin(order * theta + phase)).sum(0)
        field = _distance(0.72 * (1 + wave).clamp(0.25, 1.3) - r)
        if rng.random() < 0.3:  # a hole
            cx, cy, hole = rng.uniform(-0.3, 0.3), rng.uniform(-0.3, 0.3), rng.uniform(0.1, 0.3)
            field = torch.minimum(field, (((x - cx) ** 2 + (y - cy) ** 2).sqrt() - hole) * min(h, w) / 2)
    if kind == "screen":
        return field
    border = torch.minimum((1 - x.abs()) * w, (1 - y.abs()) * h) / 2 - 1.5
    return torch.minimum(field, border)


def _distance(field: Tensor) -> Tensor:
    """Scale a field (h, w) so that near its zero it is the distance in texels (first order)."""
    dy, dx = torch.gradient(field)
    slope = (dx**2 + dy**2).sqrt()
    slope = F.avg_pool2d(slope[None, None], 5, 1, 2, count_include_pad=False)[0, 0]
    return field / slope.clamp(min=1e-4 + 0.1 * float(slope.mean()))
