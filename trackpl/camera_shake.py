"""`CameraShake`: a camera that zooms and sways from frame to frame, and occluders, for clips with tracks.

It is the augmentation of CoTracker (Karaev et al., ECCV 2024, appendix A), whose numbers are the defaults. As in
`trackpl.augment`, all choices for a clip come from one seed; here every frame has a map of its own.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from kornia.filters import gaussian_blur2d
from torch import Tensor

from trackpl.augment import Augment, warp
from trackpl.errors import DataError
from trackpl.occluders import covered, draw_boxes, draw_jitter, erase, jitter, replace
from trackpl.types import Batch, Clip

BLUR = 11  # pixels of the kernel
SIGMA = (0.1, 2.0)  # pixels
MARGIN = 10  # pixels by which a scaled frame is larger than the crop, at least
KEEP = 0.8  # of the change from the frame before
SCALES = (0.2, 2.0)  # what the scale of any frame is held to


class CameraShake(Augment):
    """Random occluders, colours and blur by frame, zoom and sway of the camera, a crop, flips.

    Tracks, visibility and queries move with the pixels. A point that a box covers or that leaves the crop is not
    visible, and stays valid.

    Args:
        size: height and width to crop to.
        erase: probability that a frame after the first has boxes of one colour.
        replace: probability that a frame after the first has boxes filled from elsewhere in the clip; 0 in the third
            version of CoTracker.
        boxes: largest number of either in a frame.
        box: smallest and largest side of a box, in pixels.
        colour: probability that brightness, contrast, saturation and hue change in a clip, in each frame by itself.
        brightness: largest relative change either way.
        contrast: largest relative change either way.
        saturation: largest relative change either way.
        hue: largest shift either way, as a fraction of the colour circle.
        blur: probability that a clip is blurred, each frame by itself.
        pad: largest width of a black margin, in pixels; each of the four has its own.
        scale: range of the scale of the first frame.
        scale_step: largest change of the scale from a frame to the next.
        shift_step: largest sway from a frame to the next, in pixels.
        horizontal_flip: probability of a mirror image.
        vertical_flip: probability of an upside-down image.
        reference_flip: put the tracks of a flipped clip one pixel too far, as the released code does.
    """

    def __init__(
        self,
        size: tuple[int, int] = (384, 512),
        erase: float = 0.5,
        replace: float = 0.5,
        boxes: int = 10,
        box: tuple[int, int] = (2, 99),
        colour: float = 0.25,
        brightness: float = 0.2,
        contrast: float = 0.2,
        saturation: float = 0.2,
        hue: float = 0.25 / 3.14,
        blur: float = 0.25,
        pad: int = 24,
        scale: tuple[float, float] = (0.75, 1.25),
        scale_step: float = 0.05,
        shift_step: int = 15,
        horizontal_flip: float = 0.5,
        vertical_flip: float = 0.5,
        reference_flip: bool = False,
    ) -> None:
        super().__init__(size, scale, 1.0, horizontal_flip, vertical_flip, 0.0, hue, brightness, saturation, contrast)
        for name, value in (("erase", erase), ("replace", replace), ("colour", colour), ("blur", blur)):
            if not 0 <= value <= 1:
                raise DataError(f"augmentation: {name} is a probability, 0..1, got {value}")
        if boxes < 1 or not 1 <= box[0] <= box[1] or min(pad, scale_step, shift_step) < 0:
            raise DataError(
                "augmentation: boxes must be 1 or more, box (low, high) from 1, pad, scale_step and shift_step 0 or "
                f"more; got boxes {boxes}, box {box}, pad {pad}, scale_step {scale_step}, shift_step {shift_step}"
            )
        self.crop = size
        self.erase, self.replace, self.boxes, self.box = erase, replace, boxes, box
        self.colour, self.blur, self.pad = colour, blur, pad
        self.scale_step, self.shift_step, self.reference_flip = scale_step, shift_step, reference_flip

    @torch.no_grad()
    def forward(self, clip: Clip, seeds: Tensor | None = None) -> Clip:
        """Augment each clip of a batch by itself; see `Augment.forward`.

        Raises:
            DataError: a clip with flow, depth, labels or a camera, which occluders would make untrue.
        """
        for name in ("flow", "depth", "labels", "camera"):
            if getattr(clip, name) is not None:
                raise DataError(
                    f"CameraShake cannot keep {name} true; leave it out of data.fields, or use trackpl.augment.Augment"
                )
        if seeds is None:
            seeds = torch.randint(2**62, (clip.video.shape[0],))
        chosen = [self._draw(clip, int(seed)) for seed in seeds]
        choice = _Choice(*(torch.stack([getattr(c, f.name) for c in chosen]) for f in fields(_Choice)))
        choice = choice.to(clip.video.device)
        return self._move(self._colours(self._occlude(clip, choice), choice), choice)

    def _draw(self, clip: Clip, seed: int) -> _Choice:
        """Draw every number for one clip, in an order that does not depend on which operations are on."""
        g, frames = torch.Generator().manual_seed(seed), clip.frames
        u = torch.rand(8, generator=g, dtype=torch.float64)
        strength = (self.brightness, self.contrast, self.saturation, self.hue)
        erased = draw_boxes(g, frames, clip.size, self.erase, self.boxes, self.box)
        replaced = draw_boxes(g, frames, clip.size, self.replace, self.boxes, self.box)
        source = torch.randint(0, frames, (frames, self.boxes), generator=g)
        corner = torch.rand(frames, self.boxes, 2, generator=g)
        (factors, order), *copies = (draw_jitter(g, frames, strength) for _ in range(3))
        sigma = SIGMA[0] + torch.rand(frames, generator=g) * (SIGMA[1] - SIGMA[0])
        pads = torch.randint(0, self.pad + 1, (4,), generator=g)
        zoom = (torch.rand(frames, 2, generator=g, dtype=torch.float64) * 2 - 1) * self.scale_step
        sway = (torch.rand(frames, 2, generator=g, dtype=torch.float64) * 2 - 1) * self.shift_step
        return _Choice(
            erased=erased,
            replaced=replaced,
            source=source,
            corner=corner,
            colour=u[0] < self.colour,
            blur=u[1] < self.blur,
            factors=torch.stack([factors, *(f for f, _ in copies)]),
            order=torch.stack([order, *(o for _, o in copies)]),
            sigma=sigma,
            pads=pads,
            base=self.scale[0] + u[2] * (self.scale[1] - self.scale[0]),
            zoom=zoom,
            sway=sway,
            flips=torch.stack([u[3] < self.horizontal_flip, u[4] < self.vertical_flip]),
        )

    def _occlude(self, clip: Clip, choice: _Choice) -> Clip:
        """Paint the boxes, and hide the points under them."""
        b, t = clip.video.shape[:2]
        images = clip.float_video().flatten(0, 1)
        erased, replaced = choice.erased.flatten(0, 1), choice.replaced.flatten(0, 1)
        if self.erase:
            images = erase(images, erased)
        if self.replace:
            source = choice.source + t * torch.arange(b, device=images.device)[:, None, None]
            colours = [(choice.factors[:, i].flatten(0, 1), choice.order[:, i].flatten(0, 1)) for i in (1, 2)]
            images = replace(images, replaced, source.flatten(0, 1), choice.corner.flatten(0, 1), colours)
        clip = dataclasses.replace(clip, video=images.unflatten(0, (b, t)))
        if clip.tracks is None:
            return clip
        hidden = covered(torch.cat([erased, replaced], 1), clip.tracks.flatten(0, 1)).unflatten(0, (b, t))
        return _hide(clip, hidden)

    def _colours(self, clip: Clip, choice: _Choice) -> Clip:
        """Change colours and sharpness of the frames of some clips."""
        video = clip.video
        which = choice.colour.nonzero()[:, 0]
        if len(which):
            factors, order = choice.factors[which, 0].flatten(0, 1), choice.order[which, 0].flatten(0, 1)
            video = video.clone()
            video[which] = jitter(video[which].flatten(0, 1), factors, order).unflatten(0, (-1, clip.frames))
        which = choice.blur.nonzero()[:, 0]
        if len(which):
            sigma = choice.sigma[which].flatten()[:, None].expand(-1, 2)
            video = video.clone()
            blurred = gaussian_blur2d(video[which].flatten(0, 1), BLUR, sigma, border_type="replicate")
            video[which] = blurred.unflatten(0, (-1, clip.frames))
        return dataclasses.replace(clip, video=video)

    def _move(self, clip: Clip, choice: _Choice) -> Clip:
        """Zoom, sway, crop and flip, in one resampling of every frame."""
        (b, t), (h, w) = clip.video.shape[:2], self.crop
        grow, start = self._path(clip, choice)  # (B, T, 2) each
        left_top = choice.pads[:, None, :2]
        shift = grow * (left_top - self.pad) - start  # from the canvas with the widest margins
        flip = choice.flips[:, None].expand(-1, t, -1)
        limit = grow.new_tensor([w, h])
        grow, shift = torch.where(flip, -grow, grow), torch.where(flip, limit - shift, shift)

        canvas = F.pad(clip.video.flatten(0, 1), [self.pad] * 4).unsqueeze(1)
        frames = Clip(video=canvas)
        if clip.tracks is not None:
            visible = None if clip.visible is None else clip.visible.flatten(0, 1)[:, None]
            tracks = clip.tracks.flatten(0, 1)[:, None] + self.pad
            frames = Clip(video=canvas, tracks=tracks, visible=visible)
        frames = warp(frames, grow.flatten(0, 1), shift.flatten(0, 1), self.crop)

        def unfold(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[:, 0].unflatten(0, (b, t))

        places = unfold(frames.tracks)
        if places is not None and self.reference_flip:
            places = places + flip[:, :, None].float()
        video = frames.video[:, 0].unflatten(0, (b, t))
        moved = dataclasses.replace(clip, video=video, tracks=places, visible=unfold(frames.visible))
        if clip.queries is None:
            return moved
        return _move_queries(clip, moved, grow, shift + grow * self.pad)

    def _path(self, clip: Clip, choice: _Choice) -> tuple[Tensor, Tensor]:
        """Return how much each frame is enlarged and where its crop starts, (B, T, 2) of (x, y) each, float64."""
        crop = choice.zoom.new_tensor([self.crop[1], self.crop[0]])
        old = choice.zoom.new_tensor([clip.size[1], clip.size[0]]) + choice.pads[:, :2] + choice.pads[:, 2:]
        scale, change = choice.base[:, None].expand(-1, 2), torch.zeros_like(choice.zoom[:, 0])
        sizes = []
        for t in range(clip.frames):
            if t > 0:
                change = choice.zoom[:, 1] if t == 1 else KEEP * change + (1 - KEEP) * choice.zoom[:, t]
                scale = scale + change
                scale = ((scale + scale.mean(1, keepdim=True)) / 2).clamp(*SCALES)
            sizes.append((old * scale).floor().maximum(crop + MARGIN))
        size = torch.stack(sizes, 1)
        grow = size / old[:, None]

        middle = crop.expand(len(old), 2)
        if clip.tracks is not None and clip.visible is not None:
            seen = clip.visible[:, 0] & torch.isfinite(clip.tracks[:, 0]).all(-1)
            total = torch.where(seen[..., None], clip.tracks[:, 0], 0).sum(1) / seen.sum(1).clamp(min=1)[:, None]
            middle = torch.where(seen.any(1, keepdim=True), (total + choice.pads[:, :2]) * grow[:, 0], middle)
        offset, offsets = torch.zeros_like(middle), [torch.zeros_like(middle)]
        for t in range(1, clip.frames):
            sway = choice.sway[:, t]
            offset = sway.floor() if t == 1 else (KEEP * offset + (1 - KEEP) * sway).trunc()
            offsets.append(offset)
        start = (middle - crop / 2)[:, None] + torch.stack(offsets, 1).cumsum(1)
        return grow, start.trunc().clamp(min=0).minimum(size - crop - 1)


@dataclass(frozen=True)
class _Choice(Batch):
    """All that is random: of one clip, or stacked of a batch."""

    erased: Tensor  # (T, K, 4) boxes
    replaced: Tensor  # (T, K, 4) boxes
    source: Tensor  # (T, K) frames that fill them
    corner: Tensor  # (T, K, 2) where in these, in [0, 1)
    colour: Tensor  # () bool
    blur: Tensor  # () bool
    factors: Tensor  # (3, T, 4) of the clip's colours, and of the two changes of what fills boxes
    order: Tensor  # (3, T, 4)
    sigma: Tensor  # (T,) of the blur
    pads: Tensor  # (4,) left, top, right, bottom
    base: Tensor  # () scale of the first frame
    zoom: Tensor  # (T, 2)
    sway: Tensor  # (T, 2)
    flips: Tensor  # (2,) bool, horizontal and vertical


def _hide(clip: Clip, hidden: Tensor) -> Clip:
    """Make points (B, T, N) invisible; a track whose query is among them is no longer supervised."""
    if clip.visible is None:
        return clip
    clip = dataclasses.replace(clip, visible=clip.visible & ~hidden)
    if clip.queries is None:
        return clip
    frame = clip.queries[..., 0].long().clamp(0, clip.frames - 1)
    return _drop(clip, hidden.gather(1, frame[:, None])[:, 0])


def _move_queries(old: Clip, new: Clip, grow: Tensor, shift: Tensor) -> Clip:
    """Move queries as their frames (B, T, 2) do; a track whose query leaves the crop is no longer supervised."""
    assert old.queries is not None
    frame = old.queries[..., 0].long().clamp(0, old.frames - 1)
    index = frame[..., None].expand(-1, -1, 2)
    xy = (old.queries[..., 1:] * grow.gather(1, index) + shift.gather(1, index)).to(old.queries.dtype)
    inside = xy.clamp(min=0).minimum(xy.new_tensor([new.size[1], new.size[0]]))
    new = dataclasses.replace(new, queries=torch.cat([old.queries[..., :1], inside], -1))
    return _drop(new, (inside != xy).any(-1))


def _drop(clip: Clip, tracks: Tensor) -> Clip:
    """Supervise no frame of some tracks (B, N)."""
    if clip.visible is None:
        return clip
    valid = torch.ones_like(clip.visible) if clip.valid is None else clip.valid
    return dataclasses.replace(clip, valid=valid & ~tracks[:, None])
