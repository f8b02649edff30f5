"""Augmentation of whole clips on the device: what is known of a clip moves exactly with its pixels.

A clip's flips, scale and crop are one map ``new = scale * old + shift`` of coordinates, applied in one
resampling to every frame and field. All choices for a clip come from one seed, so that they depend neither on
its batch nor on the process; colours are kornia's.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from kornia.enhance import adjust_brightness, adjust_contrast, adjust_hue, adjust_saturation
from kornia.filters import gaussian_blur2d
from torch import Tensor, nn

from trackpl.errors import DataError
from trackpl.types import Camera, Clip, Flow


class Augment(nn.Module):
    """Random flips, crop, scale, colours, noise and direction of time; the same for all frames of a clip.

    Args:
        size: height and width to crop to; none keeps the clip's.
        scale: range of the factor of enlargement before the crop, log-uniform; it is raised where the clip
            would no longer fill the crop. 1 to 1 crops only, without resampling.
        aspect: largest factor by which the enlargement of x and y may differ.
        horizontal_flip: probability of a mirror image.
        vertical_flip: probability of an upside-down image.
        reverse: probability of running backwards.
        hue: largest shift of the hue either way, as a fraction of the colour circle (0.5: any hue).
        brightness: largest shift of the brightness either way, of a range of 1.
        saturation: largest relative change of the saturation either way.
        contrast: largest relative change of the contrast either way.
        swap_channels: probability of a random order of the colour channels.
        jitter_hue: as `hue`, but another shift for each frame after the first.
        jitter_brightness: as `brightness`, but another shift for each frame after the first.
        noise: largest standard deviation of Gaussian noise, of a range of 1.
    """

    def __init__(
        self,
        size: tuple[int, int] | None = None,
        scale: tuple[float, float] = (1.0, 1.0),
        aspect: float = 1.0,
        horizontal_flip: float = 0.5,
        vertical_flip: float = 0.0,
        reverse: float = 0.0,
        hue: float = 0.5,
        brightness: float = 0.1,
        saturation: float = 0.0,
        contrast: float = 0.0,
        swap_channels: float = 0.0,
        jitter_hue: float = 0.0,
        jitter_brightness: float = 0.0,
        noise: float = 0.0,
    ) -> None:
        super().__init__()
        for name, value, high in (
            ("horizontal_flip", horizontal_flip, 1),
            ("vertical_flip", vertical_flip, 1),
            ("reverse", reverse, 1),
            ("swap_channels", swap_channels, 1),
            ("hue", hue, 0.5),
            ("jitter_hue", jitter_hue, 0.5),
            ("brightness", brightness, 1),
            ("jitter_brightness", jitter_brightness, 1),
            ("saturation", saturation, 1),
            ("contrast", contrast, 1),
            ("noise", noise, 1),
        ):
            if not 0 <= value <= high:
                raise DataError(f"augmentation: {name} must lie in 0..{high}, got {value}")
        if not 0 < scale[0] <= scale[1] or aspect < 1 or (size is not None and min(size) < 1):
            raise DataError(
                f"augmentation: scale must be (low, high) above 0, aspect at least 1 and size at least 1x1, "
                f"got scale {scale}, aspect {aspect}, size {size}"
            )
        self.size, self.scale, self.aspect = size, scale, aspect
        self.horizontal_flip, self.vertical_flip, self.reverse = horizontal_flip, vertical_flip, reverse
        self.hue, self.brightness, self.saturation, self.contrast = hue, brightness, saturation, contrast
        self.swap_channels, self.noise = swap_channels, noise
        self.jitter_hue, self.jitter_brightness = jitter_hue, jitter_brightness

    @torch.no_grad()
    def forward(self, clip: Clip, seeds: Tensor | None = None) -> Clip:
        """Augment each clip of a batch by itself.

        Args:
            clip: any batch; the video uint8 or float in [0, 1].
            seeds: (B,) int64 from which each clip's choices follow; none draws them from torch's generator.

        Returns:
            A clip with float video in [0, 1]. Points that leave the crop are not visible, and stay valid.
        """
        if seeds is None:
            seeds = torch.randint(2**62, (clip.video.shape[0],))
        choices = [self._choose(clip, int(seed)) for seed in seeds]
        clip = self._reverse(clip, torch.tensor([c.reverse for c in choices]))
        clip = warp(
            clip,
            torch.stack([c.scale for c in choices]),
            torch.stack([c.shift for c in choices]),
            self.size or clip.size,
        )
        return dataclasses.replace(clip, video=self._recolour(clip.float_video(), choices))

    def _choose(self, clip: Clip, seed: int) -> _Choice:
        """Draw every number for one clip, in an order that does not depend on which operations are on."""
        g = torch.Generator().manual_seed(seed)
        u = torch.rand(16, generator=g, dtype=torch.float64).tolist()
        swing = [2 * x - 1 for x in u]
        scale, shift = self._map(clip.size, u)
        shifts = torch.rand(2, clip.frames, generator=g) * 2 - 1
        shifts[:, 0] = 0
        return _Choice(
            scale=scale,
            shift=shift,
            reverse=u[6] < self.reverse,
            hue=swing[7] * self.hue + shifts[0] * self.jitter_hue,
            brightness=swing[8] * self.brightness + shifts[1] * self.jitter_brightness,
            saturation=1 + swing[9] * self.saturation,
            contrast=1 + swing[10] * self.contrast,
            channels=torch.randperm(3, generator=g) if u[11] < self.swap_channels else torch.arange(3),
            noise=u[12] * self.noise,
            seed=seed,
        )

    def _map(self, old: tuple[int, int], u: list[float]) -> tuple[Tensor, Tensor]:
        """Draw scale and shift, each (x, y), of the map from old to new coordinates."""
        new = self.size or old
        low, high = map(math.log, self.scale)
        factor = math.exp(low + u[0] * (high - low))
        stretch = self.aspect ** ((2 * u[1] - 1) / 2)
        flips = (u[4] < self.horizontal_flip, u[5] < self.vertical_flip)
        scale, shift = [], []
        for axis, stretched in ((1, factor * stretch), (0, factor / stretch)):
            enlarged = max(stretched, new[axis] / old[axis])
            room = old[axis] * enlarged - new[axis]
            whole = enlarged == 1  # pixels, so that a mere crop copies
            start = float(math.floor(u[3 - axis] * (room + 1))) if whole else u[3 - axis] * room
            flip = flips[1 - axis]
            scale.append(-enlarged if flip else enlarged)
            shift.append(new[axis] + start if flip else -start)
        return torch.tensor(scale, dtype=torch.float64), torch.tensor(shift, dtype=torch.float64)

    def _reverse(self, clip: Clip, wanted: Tensor) -> Clip:
        """Run the wanted clips (B,) bool backwards; see `reversed_clip` for the flow."""
        if clip.flow is not None and not _symmetric(clip.flow.pairs, clip.frames):
            wanted = wanted[:1].expand_as(wanted)  # the pairs are the batch's: all of its clips or none
        if not wanted.any():
            return clip
        backwards = reversed_clip(clip)
        if wanted.all():
            return backwards
        if clip.flow is not None and backwards.flow is not None:
            order = [backwards.flow.pairs.index(p) for p in clip.flow.pairs]
            flow = backwards.flow.map(lambda x: x[:, order])
            backwards = dataclasses.replace(backwards, flow=dataclasses.replace(flow, pairs=clip.flow.pairs))
        return _choose_clips(wanted.to(clip.video.device), backwards, clip)

    def _recolour(self, video: Tensor, choices: list[_Choice]) -> Tensor:
        """Shift the colours of (B, T, 3, H, W) in [0, 1]."""
        b, t = video.shape[:2]
        device = video.device
        flat = video.flatten(0, 1)

        def per_frame(values: list[Tensor]) -> Tensor:
            return torch.stack(values).to(device=device, dtype=video.dtype).flatten()

        if self.swap_channels:
            order = torch.stack([c.channels for c in choices]).to(device)[:, None, :, None, None]
            flat = video.gather(2, order.expand_as(video)).flatten(0, 1)
        if self.hue or self.jitter_hue:
            flat = adjust_hue(flat, per_frame([c.hue for c in choices]) * (2 * math.pi))
        if self.saturation:
            flat = adjust_saturation(flat, per_frame([torch.full((t,), c.saturation) for c in choices]))
        if self.contrast:
            flat = adjust_contrast(flat, per_frame([torch.full((t,), c.contrast) for c in choices]))
        if self.brightness or self.jitter_brightness:
            flat = adjust_brightness(flat, per_frame([c.brightness for c in choices]))
        video = flat.unflatten(0, (b, t))
        if self.noise:
            noise = [_normal(v, c.seed) * c.noise for v, c in zip(video, choices, strict=True)]
            video = (video + torch.stack(noise)).clamp(0, 1)
        return video


@dataclass(frozen=True)
class _Choice:
    scale: Tensor  # (2,) x, y
    shift: Tensor  # (2,) x, y
    reverse: bool
    hue: Tensor  # (T,) turns
    brightness: Tensor  # (T,)
    saturation: float
    contrast: float
    channels: Tensor  # (3,)
    noise: float
    seed: int


def _normal(like: Tensor, seed: int) -> Tensor:
    generator = torch.Generator(like.device).manual_seed(seed + 1)  # not the choices' numbers again
    return torch.randn(like.shape, generator=generator, device=like.device, dtype=like.dtype)


# Time -------------------------------------------------------------------------------------------------------


def reversed_clip(clip: Clip) -> Clip:
    """Run a clip backwards: frame t becomes T-1-t, a flow pair (s, t) becomes (T-1-s, T-1-t)."""
    last = clip.frames - 1
    out = dataclasses.replace(clip, flow=None, queries=None).map(lambda x: x.flip(1))
    if clip.queries is not None:
        t, xy = clip.queries.split([1, 2], -1)
        t = torch.where(t < 0, t, last - t)  # below 0: in a frame that the clip has not
        out = dataclasses.replace(out, queries=torch.cat([t, xy], -1))
    if clip.flow is None:
        return out
    pairs = tuple((last - s, last - t) for s, t in clip.flow.pairs)
    return dataclasses.replace(out, flow=dataclasses.replace(clip.flow, pairs=pairs))


def _symmetric(pairs: tuple[tuple[int, int], ...], frames: int) -> bool:
    return {(frames - 1 - s, frames - 1 - t) for s, t in pairs} == set(pairs)


def _choose_clips(first: Tensor, a: Clip, b: Clip) -> Clip:
    """Take clip i of `a` where first[i], else of `b`; both have the same fields and shapes."""

    def take(clip: Clip, i: int) -> Clip:
        return dataclasses.replace(clip.map(lambda x: x[i : i + 1]), name=clip.name[i : i + 1])

    return Clip.cat([take(a if f else b, i) for i, f in enumerate(first.tolist())])


# Space ------------------------------------------------------------------------------------------------------


def resize(clip: Clip, size: tuple[int, int]) -> Clip:
    """Resize every field of a clip, each axis by itself; the video stays uint8 or float."""
    if clip.size == size:
        return clip
    flat = clip.video.flatten(0, 1)
    video = F.interpolate(flat, size, mode="bilinear", antialias=True).unflatten(0, clip.video.shape[:2])
    factor = torch.tensor([size[1] / clip.size[1], size[0] / clip.size[0]], dtype=torch.float64)
    scale = factor.expand(clip.video.shape[0], 2)
    return _move(clip, _Sampler(clip.size, scale, torch.zeros_like(scale), size), video)


def warp(clip: Clip, scale: Tensor, shift: Tensor, size: tuple[int, int]) -> Clip:
    """Move every field of a clip by ``new = scale * old + shift`` and cut it to `size`.

    Whole-pixel shifts and flips copy pixels; everything else is one bilinear resampling (segment ids:
    nearest), with a blur before it where the clip shrinks. A video that was resampled is float in [0, 1].
    Flow and depth are not mixed across a jump. A mirrored camera has a negative focal length.

    Args:
        clip: batch of B clips.
        scale: (B, 2) for x and y; negative mirrors.
        shift: (B, 2) in pixels of the new clip.
        size: height and width of the new clip, which the old one must cover.

    Raises:
        DataError: the old clip does not cover the new one.
    """
    sampler = _Sampler(clip.size, scale.double().cpu(), shift.double().cpu(), size)
    return _move(clip, sampler, sampler.video(clip.video))


def _move(clip: Clip, sampler: _Sampler, video: Tensor) -> Clip:
    """Move all fields but the video, which has been moved already."""
    size, device = sampler.new, clip.video.device
    grow = sampler.scale.float().to(device)[:, None, None]  # (B, 1, 1, 2) of x, y
    shift = sampler.shift.float().to(device)[:, None, None]
    changes: dict[str, Any] = {"video": video}
    if clip.tracks is not None:
        tracks = clip.tracks * grow + shift
        changes["tracks"] = tracks
        if clip.visible is not None:
            changes["visible"] = clip.visible & _inside(tracks, size, -1)
    if clip.queries is not None:
        t, xy = clip.queries.split([1, 2], -1)
        changes["queries"] = torch.cat([t, xy * grow[:, 0] + shift[:, 0]], -1)
    if clip.depth is not None:
        changes["depth"] = sampler.surface(clip.depth, lambda d: 0.1 * d.abs())
    if clip.labels is not None:
        changes["labels"] = sampler.nearest(clip.labels)
    if clip.flow is not None:
        changes["flow"] = _move_flow(clip.flow, sampler, grow)
    if clip.camera is not None:
        focal, centre = clip.camera.intrinsics.split(2, -1)
        intrinsics = torch.cat([focal * grow[:, 0], centre * grow[:, 0] + shift[:, 0]], -1)
        changes["camera"] = Camera(intrinsics, clip.camera.pose)
    return dataclasses.replace(clip, **changes)


def _inside(xy: Tensor, size: tuple[int, int], dim: int) -> Tensor:
    x, y = xy.unbind(dim)
    return (x >= 0) & (x <= size[1]) & (y >= 0) & (y <= size[0])


def _move_flow(flow: Flow, sampler: _Sampler, grow: Tensor) -> Flow:
    xy = sampler.surface(flow.xy, lambda f: torch.full_like(f[:, :, :1], 2)) * grow.transpose(2, 3)[..., None]
    visible = valid = None
    if flow.visible is not None:
        ends = xy + pixel_centres(sampler.new, xy.device)
        visible = sampler.nearest(flow.visible) & _inside(ends, sampler.new, 2)
    if flow.valid is not None:
        valid = sampler.nearest(flow.valid)
    depth = None
    if flow.depth is not None:
        depth = sampler.surface(flow.depth.unsqueeze(2), lambda d: 0.1 * d.abs()).squeeze(2)
    return Flow(xy, flow.pairs, visible, valid, depth)


def pixel_centres(size: tuple[int, int], device: torch.device | str = "cpu") -> Tensor:
    """Return the coordinates (2, H, W) of all pixel centres, x first."""
    h, w = size
    y, x = torch.meshgrid(torch.arange(h, device=device), torch.arange(w, device=device), indexing="ij")
    return torch.stack([x, y]).float() + 0.5


class _Sampler:
    """Reads images (B, ..., H, W) at the places where the new pixels come from."""

    def __init__(self, old: tuple[int, int], scale: Tensor, shift: Tensor, new: tuple[int, int]) -> None:
        h, w = new
        self.new, self.scale, self.shift = new, scale, shift
        x = (torch.arange(w, dtype=torch.float64) + 0.5 - shift[:, :1]) / scale[:, :1]  # (B, w) old coordinates
        y = (torch.arange(h, dtype=torch.float64) + 0.5 - shift[:, 1:]) / scale[:, 1:]
        edges = torch.stack([torch.zeros(2), torch.tensor([w, h])]).double()
        reach = (edges - shift[:, None]) / scale[:, None]  # (B, 2, 2) old coordinates of the new corners
        limits = torch.tensor([old[1], old[0]]).double()
        if (reach < -1e-6).any() or (reach > limits + 1e-6).any():
            raise DataError(f"a clip of {old[0]}x{old[1]} pixels does not cover the crop of {h}x{w} asked for")
        self.columns = x.floor().long().clamp(0, old[1] - 1)
        self.rows = y.floor().long().clamp(0, old[0] - 1)
        self.copies = bool((scale.abs() == 1).all() and (shift == shift.round()).all())
        grid_x, grid_y = 2 * x / old[1] - 1, 2 * y / old[0] - 1
        self.grid = torch.stack(
            [grid_x[:, None].expand(-1, h, -1), grid_y[:, :, None].expand(-1, -1, w)], -1
        ).float()  # (B, h, w, 2)

    def nearest(self, x: Tensor) -> Tensor:
        """Take the pixel that each new centre falls into."""
        parts = zip(x, self.rows.to(x.device), self.columns.to(x.device), strict=True)
        return torch.stack([image[..., rows[:, None], columns] for image, rows, columns in parts])

    def bilinear(self, x: Tensor) -> Tensor:
        """Interpolate between pixel centres; at the border the outermost pixel goes on."""
        shape = x.shape
        x = x.reshape(shape[0], -1, *shape[-2:])
        out = F.grid_sample(x, self.grid.to(x.device, x.dtype), "bilinear", "border", align_corners=False)
        return out.reshape(*shape[:-2], *out.shape[-2:])

    def video(self, x: Tensor) -> Tensor:
        """Read a video (B, T, 3, H, W): a copy, or resampled float without aliasing."""
        if self.copies:
            return self.nearest(x)
        x = x.float() / 255 if x.dtype == torch.uint8 else x
        sigma = ((1 / self.scale.abs()).flip(1) - 1).clamp(min=0) / 2  # (B, 2) y, x
        if sigma.max() > 0.2:
            kernel = 2 * math.ceil(2 * float(sigma.max())) + 1
            sigma = sigma.clamp(min=0.01).to(x.device, x.dtype).repeat_interleave(x.shape[1], 0)
            x = gaussian_blur2d(x.flatten(0, 1), kernel, sigma).unflatten(0, x.shape[:2])
        return self.bilinear(x)

    def surface(self, x: Tensor, jump: Callable[[Tensor], Tensor]) -> Tensor:
        """Interpolate (B, P, C, H, W), but copy the nearest pixel where its neighbours span more than `jump` of it."""
        near = self.nearest(x)
        if self.copies:
            return near
        smooth, flat = self.bilinear(x.float()), x.float().flatten(0, 1)
        span = F.max_pool2d(flat, 3, 1, 1) + F.max_pool2d(-flat, 3, 1, 1)
        span = self.nearest(span.unflatten(0, x.shape[:2]).amax(2, keepdim=True))
        return torch.where((span > jump(near)) | ~torch.isfinite(smooth), near, smooth)
