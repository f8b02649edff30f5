"""LocoTrack: Local All-Pair Correspondence for Point Tracking (Cho, Huang, Nam, An, Kim, Lee; ECCV 2024).

Claim: correlating a patch around the query with a patch around the present estimate, all pairs at once (local 4D
correlation), tells matches apart that a single query feature confuses; a small encoder and a transformer over the
frames of each point then need few iterations, and points need not know of each other.

Glossary: B batch, T frames, N points, K iterations, place (N, T, 2) = (x, y) in [0, 1] of the frame's size, F_l
features of level l (strides 2, 4, 8), S_l (N, 49, C) patches around the query points, L_l (7, 7, 7, 7) local 4D
correlation; "occluded" and "far" are logits that a point is hidden, and that its place is more than 6 px off.

Where we differ from the paper, because the released code does: the initial track uses strides 4 and 8 only, pools
mean, maximum and minimum, and averages the peak over a hard disc; slopes of the attention's bias are 24^(-i/h); motion
is coded with other signs and order. All refinement happens at the last of the resolutions (`schedule`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from trackpl import Clip, Info, Method, Tracks
from trackpl.checkpoints import fit_state, read_checkpoint
from trackpl.errors import DataError, Error
from trackpl.kept import Kept
from trackpl.types import check_queries
from trackpl_locotrack import weights as weights_of
from trackpl_locotrack.backbone import CHANNELS, Backbone
from trackpl_locotrack.features import Features, extract, support
from trackpl_locotrack.initial import COARSE, FINE, InitialTrack
from trackpl_locotrack.losses import point_losses, random_queries
from trackpl_locotrack.refinement import Refinement, attention_bias
from trackpl_locotrack.schedule import WarmupCosine

Size = tuple[int, int]
State = tuple[Tensor, Tensor, Tensor]  # place (N, T, 2), occluded (N, T), far (N, T)


def _adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=1e-3, betas=(0.9, 0.95))


def _warmup_cosine(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return WarmupCosine(optimizer)


class LocoTrack(Method):
    """Sparse point tracking by local 4D correlation; points are independent of each other.

    Args:
        size: ``small`` (8.2 million values) or ``base`` (11.5 million) of the paper, or ``tiny`` (3.2 million), ours:
            half the channels of the pyramid and a transformer of width 192, to train without a GPU.
        iterations: K refinements of the initial track; 0 trains and gives the initial track alone, which is the first
            stage of training.
        initial_resolution: height and width at which the initial track is found, and refined where the clip is no
            larger.
        schedule: at which resolutions the track is refined: the ``last`` alone (the authors' PyTorch code), or ``all``
            of them one after the other, averaged (their JAX code).
        resolution: frames are resized first: an integer is their longest side, and smaller ones stay as they are;
            (height, width) takes every clip to that, as the authors' inference does; none keeps them.
        query_chunk: points tracked at once; it bounds memory and does not change results.
        temperature: of the softmax of the initial track.
        matching_weight: of a cross-entropy of the initial track's correlation, which the paper does not have; it makes
            short training possible (README).
        start_from: checkpoint whose weights training starts from, such as that of the first stage.
        optimizer: as ``{class_path, init_args}``; biases are kept from its weight decay.
        lr_scheduler: stepped once a batch.
    """

    info: ClassVar[Info] = Info(
        title="LocoTrack",
        paper="Cho et al., Local All-Pair Correspondence for Point Tracking, ECCV 2024",
        licence="Apache-2.0",
        weights_licence="Apache-2.0",
    )
    contract: ClassVar[int] = 1
    weights: ClassVar[str | None] = "locotrack_tiny.safetensors"
    published = weights_of.PUBLISHED

    def __init__(
        self,
        size: Literal["tiny", "small", "base"] = "small",
        iterations: int = 4,
        initial_resolution: tuple[int, int] = (256, 256),
        schedule: Literal["last", "all"] = "last",
        resolution: int | tuple[int, int] | None = 512,
        query_chunk: int = 64,
        temperature: float = 20.0,
        matching_weight: float = 0.0,
        start_from: str | None = None,
        optimizer: OptimizerCallable = _adamw,
        lr_scheduler: LRSchedulerCallable | None = _warmup_cosine,
    ) -> None:
        super().__init__(optimizer, lr_scheduler)
        if size not in CHANNELS or schedule not in ("last", "all"):
            raise Error(
                f"locotrack needs size {', '.join(CHANNELS)} and schedule last or all; got {size} and {schedule}"
            )
        if iterations < 0 or query_chunk < 1 or temperature <= 0 or matching_weight < 0:
            raise Error(
                "locotrack needs iterations >= 0, query_chunk >= 1, temperature > 0 and matching_weight >= 0; "
                f"got {iterations}, {query_chunk}, {temperature} and {matching_weight}"
            )
        if min(initial_resolution) < 16 or any(side % 8 for side in initial_resolution):
            raise Error(
                f"locotrack needs an initial_resolution of multiples of 8, 16 at least; got {initial_resolution}"
            )
        sides = [resolution] if isinstance(resolution, int) else list(resolution or [])
        if any(side < 1 for side in sides):
            raise Error(f"locotrack needs a resolution of 1 or more, got {resolution}")
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler", "start_from"])
        self.backbone = Backbone(size)
        self.initial = InitialTrack(temperature)
        self.refinement = Refinement(size)
        if iterations == 0:
            self.refinement.requires_grad_(False)
        self.iterations, self.schedule, self.query_chunk = iterations, schedule, query_chunk
        h, w = initial_resolution
        self.initial_resolution: Size = (h, w)
        self.resolution, self.start_from, self.matching_weight = resolution, start_from, matching_weight
        self._kept = Kept()

    def import_weights(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Translate the keys of the authors' PyTorch checkpoints, with or without their leading ``model.``."""
        return {weights_of.translate(k): v for k, v in state.items()}

    @classmethod
    def options_of(cls, state: dict[str, Tensor]) -> dict[str, Any]:
        """Tell the size of a published checkpoint by the width of its transformer."""
        return weights_of.options_of(state)

    # Inference -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def track(self, clip: Clip, queries: Tensor) -> Tracks:
        """Track points, each for itself; see `Method.track`.

        The features of the last clip are kept, so that more queries on it cost a fraction; `forget` frees them. Those
        of a batch of several videos are not, to bound memory.
        """
        check_queries(clip, queries)
        queries = queries.to(clip.video.device)
        if queries.shape[1] == 0:
            none = queries.new_zeros(len(queries), clip.frames, 0)
            return Tracks(none[..., None].expand(-1, -1, -1, 2), none)
        frame, place = _split(queries, clip.size)
        kept = self._kept.of(clip.video, self.backbone) if len(queries) == 1 else None
        xy, visible = [], []
        for b in range(len(queries)):
            video = self._resized(clip.video[b])
            where, occluded, far = self._track_video(video, frame[b], place[b], kept)[-1]
            seen = torch.sigmoid(-occluded) * torch.sigmoid(-far)
            rows = torch.arange(len(where), device=where.device)
            pixels = where * where.new_tensor([clip.size[1], clip.size[0]])
            pixels[rows, frame[b]] = queries[b, :, 1:].to(pixels)
            seen[rows, frame[b]] = 1
            xy.append(pixels.transpose(0, 1))
            visible.append(seen.transpose(0, 1))
        return Tracks(torch.stack(xy), torch.stack(visible))

    @torch.no_grad()
    def features(self, clip: Clip) -> None:
        """Compute and keep the features of a clip of one video, so that the first `track` is as quick as later ones.

        Raises:
            DataError: a batch of several videos.
        """
        if len(clip.video) != 1:
            raise DataError(f"locotrack keeps features of one video, got a batch of {len(clip.video)}")
        kept, video = self._kept.of(clip.video, self.backbone), self._resized(clip.video[0])
        first, levels = self._resolutions(video)
        for resolution in {first, *levels}:
            self._features(video, resolution, kept)

    def forget(self) -> None:
        """Free the features of the last clip."""
        self._kept.forget()

    def train(self, mode: bool = True) -> LocoTrack:
        """Set training mode; kept features are freed."""
        self._kept.forget()
        return super().train(mode)

    # The method, for one video -------------------------------------------------------------------------------------

    def _track_video(
        self,
        video: Tensor,
        frame: Tensor,
        place: Tensor,
        kept: dict[Size, Features] | None = None,
    ) -> list[State]:
        """Return the outputs of a video (T, 3, H, W) for queries in `frame` (N,) at `place` (N, 2) in [0, 1].

        They are the initial track, then those of the iterations; with gradients all, else the last one alone.
        """
        first, levels = self._resolutions(video)
        kept = {} if kept is None else kept
        n = len(frame)
        chunks = [slice(i, min(i + self.query_chunk, n)) for i in range(0, n, self.query_chunk)]

        features = self._features(video, first, kept)
        initial = _each(lambda c: [self._initial(features, frame[c], place[c])], chunks)[0]
        outputs = [initial]
        if self.iterations == 0:
            return outputs
        bias = attention_bias(len(video), self.refinement.transformer.heads, video.device)
        state, ends = initial, []
        for resolution in levels:
            features = self._features(video, resolution, kept)
            begin = (state[0], initial[1], initial[2])
            refine = partial(self._refine, features, frame, place, begin, bias)
            outputs += _each(refine, chunks)
            state = outputs[-1]
            ends.append(state)
        where, occluded, far = (torch.stack(parts).mean(0) for parts in zip(*ends, strict=True))
        return [*outputs[:-1], (where, occluded, far)]

    def _refine(
        self, features: Features, frame: Tensor, place: Tensor, begin: State, bias: Tensor, chunk: slice
    ) -> list[State]:
        """Refine a chunk of the points K times (3.2): the state after each with gradients, else the last alone."""
        supports = [support(features, level, frame[chunk], place[chunk]) for level in range(3)]
        state: State = (begin[0][chunk], begin[1][chunk], begin[2][chunk])
        history = []
        for _ in range(self.iterations):
            state = self.refinement(features, supports, state, self.initial_resolution, bias)
            history.append(state)
        return history if torch.is_grad_enabled() else history[-1:]

    def _initial(self, features: Features, frame: Tensor, place: Tensor) -> State:
        """Find the initial track (3.1); in its own frame each point is its query."""
        with torch.autocast(place.device.type, enabled=False):
            fine, coarse = (_centre(features, level, frame, place) for level in (FINE, COARSE))
            where, logits = self.initial(features, fine, coarse)
        own = torch.arange(features.frames, device=frame.device) == frame[:, None]
        return torch.where(own[..., None], place[:, None], where), logits[..., 0], logits[..., 1]

    def _matching(self, features: Features, frame: Tensor, place: Tensor, truth: Tensor, seen: Tensor) -> Tensor:
        with torch.autocast(place.device.type, enabled=False):
            fine, coarse = (_centre(features, level, frame, place) for level in (FINE, COARSE))
            return self.initial.matching(features, fine, coarse, truth, seen)

    def _features(self, video: Tensor, resolution: Size, kept: dict[Size, Features]) -> Features:
        if resolution not in kept:
            kept[resolution] = extract(self.backbone, video, resolution)
        return kept[resolution]

    def _resized(self, video: Tensor) -> Tensor:
        """Resize frames (T, 3, H, W) as the option `resolution` asks."""
        h, w = video.shape[-2:]
        if self.resolution is None:
            return video
        if isinstance(self.resolution, int):
            scale = self.resolution / max(h, w)
            size = (max(8, round(h * scale)), max(8, round(w * scale)))
            if scale >= 1:
                return video
        else:
            size = (self.resolution[0], self.resolution[1])
        if size == (h, w):
            return video
        images = video.float() / 255 if video.dtype == torch.uint8 else video.float()
        return F.interpolate(
            images, size, mode="bilinear", align_corners=False, antialias=isinstance(self.resolution, int)
        )

    def _resolutions(self, video: Tensor) -> tuple[Size, list[Size]]:
        """Return the resolutions of the initial track and of its refinement."""
        h, w = video.shape[-2:]
        sizes = default_resolutions((h, w), self.initial_resolution)
        return (sizes[0], sizes[-1:]) if self.schedule == "last" else (self.initial_resolution, sizes)

    # Training (4.1) ------------------------------------------------------------------------------------------------

    def losses(self, clip: Clip) -> dict[str, Tensor]:
        """Position, occlusion and uncertainty losses of the initial track (0) and of each iteration.

        Each track is queried where `clip.queries` says or, without it, in a random one of the frames that show it.

        Raises:
            DataError: a clip without tracks.
        """
        if clip.tracks is None or clip.visible is None:
            raise DataError("locotrack learns from tracks; data.fields must hold tracks and visible")
        h, w = clip.size
        valid = torch.ones_like(clip.visible) if clip.valid is None else clip.valid
        inside = (clip.tracks >= 0).all(-1) & (clip.tracks[..., 0] <= w) & (clip.tracks[..., 1] <= h)
        usable = clip.visible & valid & inside
        if clip.queries is None:
            queries = random_queries(clip.tracks, usable)
            valid = valid & usable.any(1, keepdim=True)  # a track never seen cannot be queried
        else:
            check_queries(clip, clip.queries)
            queries = clip.queries
        frame, place = _split(queries, clip.size)
        place = place.nan_to_num().clamp(0, 1)
        true_place = clip.tracks.float().transpose(1, 2) / clip.tracks.new_tensor([w, h])
        occluded, valid = ~clip.visible.transpose(1, 2), valid.transpose(1, 2)
        outputs: list[list[State]] = []
        losses: dict[str, Tensor] = {}
        for b, video in enumerate(clip.video):
            kept: dict[Size, Features] = {}
            outputs.append(self._track_video(self._resized(video), frame[b], place[b], kept))
            if self.matching_weight:
                features = kept[self._resolutions(self._resized(video))[0]]
                known = valid[b] & ~occluded[b]
                match = self._matching(features, frame[b], place[b], true_place[b], known) / len(clip.video)
                losses["matching"] = losses.get("matching", 0) + self.matching_weight * match
        with torch.autocast(clip.video.device.type, enabled=False):
            for k, states in enumerate(zip(*outputs, strict=True)):
                where, hidden, far = (torch.stack(parts).float() for parts in zip(*states, strict=True))
                for name, value in point_losses(where, hidden, far, true_place, occluded, valid).items():
                    losses[f"{name}_{k}"] = value
        return losses

    def setup(self, stage: str) -> None:
        """Take the weights that training starts from, unless it resumes."""
        if stage == "fit" and self.start_from is not None and self.trainer.ckpt_path is None:
            path = Path(self.start_from)
            fit_state(self, self.import_weights(read_checkpoint(path)[0]), path)

    def configure_optimizers(self) -> Any:
        """Build optimiser and schedule; biases have no weight decay, norms' gains do."""
        optimizer = self._optimizer(decay_groups(self.named_parameters()))
        if self._lr_scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self._lr_scheduler(optimizer), "interval": "step"},
        }


def decay_groups(parameters: Iterable[tuple[str, Tensor]]) -> list[dict[str, Any]]:
    """Split named parameters into those that decay and those, the biases, that do not."""
    named = [(name, p) for name, p in parameters if p.requires_grad]
    biases = [p for name, p in named if name.endswith("bias")]
    return [
        {"params": [p for name, p in named if not name.endswith("bias")]},
        {"params": biases, "weight_decay": 0.0},
    ]


def default_resolutions(full: Size, initial: Size) -> list[Size]:
    """Return the resolutions from the initial one to that of the video, at most a factor of two apart."""
    ratios = [f / i for f, i in zip(full, initial, strict=True)]
    steps = math.ceil(max(math.log2(r) for r in ratios))
    if steps <= 0:
        return [initial]
    return [
        (
            int(round(initial[0] * ratios[0] ** (i / steps)) // 8 * 8),
            int(round(initial[1] * ratios[1] ** (i / steps)) // 8 * 8),
        )
        for i in range(steps + 1)
    ]


def _split(queries: Tensor, size: Size) -> tuple[Tensor, Tensor]:
    """Split queries (..., 3) of (t, x, y) in pixels into integer frames and places in [0, 1], float32."""
    return queries[..., 0].round().long(), queries[..., 1:].float() / queries.new_tensor([size[1], size[0]]).float()


def _centre(features: Features, level: int, frame: Tensor, place: Tensor) -> Tensor:
    return support(features, level, frame, place)[:, 24]


def _each(function: Callable[[slice], list[State]], chunks: list[slice]) -> list[State]:
    """Apply `function` to each chunk of points and join its states.

    Without gradients results go straight to their place: small ones kept between large ones would scatter the memory.
    """
    if torch.is_grad_enabled():
        parts = [function(c) for c in chunks]
        return [_state([torch.cat(t) for t in zip(*same, strict=True)]) for same in zip(*parts, strict=True)]
    out: list[State] = []
    for c in chunks:
        states = function(c)
        if not out:
            out = [_state([t.new_empty(chunks[-1].stop, *t.shape[1:]) for t in state]) for state in states]
        for whole, state in zip(out, states, strict=True):
            for target, part in zip(whole, state, strict=True):
                target[c] = part
    return out


def _state(parts: list[Tensor]) -> State:
    place, occluded, far = parts
    return place, occluded, far
