"""CoTracker: It is Better to Track Together (Karaev, Rocco, Graham, Neverova, Vedaldi, Rupprecht; ECCV 2024).

Claim: points of one scene move together, so a transformer that attends over the frames of each track and over the
tracks of each frame follows them better than trackers of single points; sliding windows with half overlap, unrolled in
training, carry them through long videos and through occlusions. Version 2 lets the tracks exchange through a few
virtual ones, which is linear in their number. Version 3 (Karaev et al., "CoTracker3: Simpler and Better Point Tracking
by Pseudo-Labelling Real Videos", 2024) drops what proved needless, correlates patch with patch, predicts a confidence,
and learns from real video.

Glossary: B batch, T frames, N points, S window, M updates of a window, s stride of the features, G groups of points
that attend to each other; P place (G, S, N, 2) in feature pixels, Q feature of a track, v and c logits of visibility
and confidence.

Where we differ from the papers, because the released code does: see README. Where we differ from the released code:
frames before a query come from the backward pass alone, a query is its own place in its frame, a clip shorter than half
a window is tracked by repeating its last frame, and Huber's loss serves occluded points too.
"""

from __future__ import annotations

import math
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
from trackpl.streams import Stream
from trackpl.types import DenseTracks, check_queries
from trackpl_cotracker import protocol as protocols
from trackpl_cotracker import weights as weights_of
from trackpl_cotracker.features import Features
from trackpl_cotracker.grids import global_grid, local_grid
from trackpl_cotracker.losses import Truth, paper_losses, version3_losses, windows_of
from trackpl_cotracker.protocol import Found, Groups, track_in_parts
from trackpl_cotracker.sampling import FAR, choose_points, choose_queries, usable
from trackpl_cotracker.stream import stream_of
from trackpl_cotracker.version1 import Version1
from trackpl_cotracker.version2 import Version2
from trackpl_cotracker.version3 import Version3
from trackpl_cotracker.windows import track_groups, unroll

Size = tuple[int, int]  # height and width

HEADS = 8
CHOICES: dict[str, tuple[Any, ...]] = {
    "version": (1, 2, 3),
    "mode": ("offline", "online"),
    "protocol": ("joint", "single"),
    "hidden_loss": ("huber", "l1"),
    "stride": (4, 8),
}


def _adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=5e-4, weight_decay=1e-5)


class CoTracker(Method):
    """Joint tracking of many points, in windows over any number of frames.

    Args:
        version: 1 (the paper's), 2 (also of the weights called 2.1) or 3.
        stride: s, of the features: 4 or 8.
        window: S; none takes the published one: 8, or 16 with stride 8 or online in version 3. Version 3 offline sees
            all frames at once, whatever their number; its window, 60, is the length of its table of times.
        mode: of version 3, whose `offline` weights see the past and the future of a query. Versions 1 and 2 have
            windows in any case.
        iterations: M; none means 4 in training and 6 otherwise.
        resolution: height and width that frames are resized to; none keeps them, but for multiples of the stride.
        protocol: `joint` tracks all points of a video together, `single` each for itself with its support points, as
            most published figures were measured.
        support_grid: points along a side of a grid over the frame that is tracked along and not returned; 0 for none.
        local_grid: the same around each point, with the single protocol.
        backward: track to frames before a query by a pass over the reversed video; else a point stays there, unseen.
        chunk: points tracked at a time, where they need not be together: groups of the single protocol, and passes of
            dense tracks. It bounds memory; dense tracks depend on it, for points of a pass see each other.
        weigh_visible: of version 3, multiply the probability of being visible by the confidence, as the authors'
            benchmark does.
        mask_unstarted: of version 3 online, keep points whose query is still to come from being looked at.
        entangled: of version 1, mix up flags of different points as the released code does and its weights expect; see
            `version1`. Tracks then depend on the order of points. True for a published checkpoint.
        width: of the transformer, a multiple of 8; the published weights have the default.
        depth: its time blocks, each with its exchange between points; none means the published 6, in version 3 3.
        train_points: tracks drawn from each training clip; none, or a clip that names queries, takes all.
        hidden_loss: of version 3, for occluded points; `l1` is that of the released code.
        divide_by_points: in versions 1 and 2 divide a window's loss by its number of points, as released.
        start_from: checkpoint whose weights training starts from, one of ours or the authors'.
        optimizer: as ``{class_path, init_args}``.
        lr_scheduler: stepped once a batch.
    """

    info: ClassVar[Info] = Info(
        title="CoTracker",
        paper="Karaev et al., CoTracker: It is Better to Track Together, ECCV 2024; CoTracker3, 2024",
        licence="Apache-2.0",
        weights_licence=weights_of.LICENCE,
        joint_points=True,
    )
    contract: ClassVar[int] = 1
    weights: ClassVar[str | None] = None
    published = weights_of.PUBLISHED

    def __init__(
        self,
        version: Literal[1, 2, 3] = 1,
        stride: int = 4,
        window: int | None = None,
        mode: Literal["offline", "online"] = "offline",
        iterations: int | None = None,
        resolution: tuple[int, int] | None = (384, 512),
        protocol: Literal["joint", "single"] = "joint",
        support_grid: int = 6,
        local_grid: int = 6,
        backward: bool = True,
        chunk: int = 1024,
        weigh_visible: bool = False,
        mask_unstarted: bool = False,
        entangled: bool = False,
        width: int = 384,
        depth: int | None = None,
        train_points: int | None = 256,
        hidden_loss: Literal["huber", "l1"] = "huber",
        divide_by_points: bool = True,
        start_from: str | None = None,
        optimizer: OptimizerCallable = _adamw,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(optimizer, lr_scheduler)
        _check_choices(version=version, mode=mode, protocol=protocol, hidden_loss=hidden_loss, stride=stride)
        window = published_window(version, stride, mode) if window is None else window
        if window < 2 or window % 2:
            raise Error(f"cotracker needs an even window of 2 frames or more, got {window}")
        _check_sizes(1, iterations=iterations, chunk=chunk, train_points=train_points, width=width, depth=depth)
        _check_sizes(0, support_grid=support_grid, local_grid=local_grid)
        if width % HEADS:
            raise Error(f"cotracker needs a width that is a multiple of {HEADS}, got {width}")
        if resolution is not None and (min(resolution) < 4 * stride or any(side % stride for side in resolution)):
            raise Error(
                f"cotracker needs a resolution of multiples of its stride {stride}, {4 * stride} at least; "
                f"got {resolution}"
            )
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler", "start_from"])
        self.version, self.mode, self.protocol = version, mode, protocol
        self.resolution: Size | None = None if resolution is None else (resolution[0], resolution[1])
        self.support_grid, self.local_grid = support_grid, local_grid
        self.looks_back, self.chunk, self.weigh_visible = backward, chunk, weigh_visible
        self.train_points, self.hidden_loss, self.divide_by_points = train_points, hidden_loss, divide_by_points
        self.start_from = start_from
        rounds = (4, 6) if iterations is None else (iterations, iterations)
        depth = (3 if version == 3 else 6) if depth is None else depth
        self.model: Version1 | Version3
        if version == 1:
            self.model = Version1(stride, window, rounds, width, HEADS, depth, depth, entangled)
        elif version == 2:
            self.model = Version2(stride, window, rounds, width, HEADS, depth)
        else:
            self.model = Version3(stride, window, rounds, mode == "online", mask_unstarted, width, HEADS, depth)
        self._kept = Kept()

    def import_weights(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Translate the keys of the authors' checkpoints of any version, with or without a leading ``module.``."""
        return weights_of.translate(state)

    @classmethod
    def options_of(cls, state: dict[str, Tensor]) -> dict[str, Any]:
        """Tell the version and, of 2 and 3, window and mode of a published checkpoint.

        Those of version 1 do not hold their stride and window.
        """
        return weights_of.options_of(state)

    # Inference -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def track(self, clip: Clip, queries: Tensor, *, reference_merge: bool = False) -> Tracks:
        """Track points together, or each with its support points; see `Method.track`.

        The features of the last clip are kept, so that more queries on it cost less; `forget` frees them. Those of a
        batch of several videos are not, to bound memory. `confidence` is that of version 3.

        Args:
            clip: of any length and size.
            queries: (B, N, 3) of (t, x, y).
            reference_merge: in frames before a query that its first window holds, give what the forward pass says, as
                the authors' version 1 does, though it means nothing.
        """
        check_queries(clip, queries)
        return self._track(clip, queries.to(clip.video.device), self.protocol == "joint", reference_merge)

    @torch.no_grad()
    def track_dense(self, clip: Clip, source: int = 0) -> DenseTracks:
        """Track every pixel of the frame `source`, in passes of about `chunk` points spread evenly over the frame."""
        if not 0 <= source < clip.frames:
            raise DataError(f"source frame {source} is outside the clip; allowed: 0 to {clip.frames - 1}")
        (h, w), b, device = clip.size, len(clip.video), clip.video.device
        step = math.ceil(math.sqrt(h * w / self.chunk))
        xy = torch.empty(b, clip.frames, 2, h, w, device=device)
        visible = torch.empty(b, clip.frames, h, w, device=device)
        features = self._features(clip)
        for top in range(min(step, h)):
            for left in range(min(step, w)):
                y, x = torch.arange(top, h, step, device=device), torch.arange(left, w, step, device=device)
                places = torch.stack(torch.meshgrid(x + 0.5, y + 0.5, indexing="xy"), -1)
                queries = F.pad(places.flatten(0, 1), (1, 0), value=source).expand(b, -1, -1)
                tracks = self._track(clip, queries, joint=True, features=features)
                shape = (len(y), len(x))
                xy[..., top::step, left::step] = tracks.xy.unflatten(2, shape).permute(0, 1, 4, 2, 3)
                visible[..., top::step, left::step] = tracks.visible.unflatten(2, shape)
        return DenseTracks(xy, visible, source)

    def stream(self, queries: Tensor | None = None) -> Stream:
        """Begin to track online, equal to `track` from each query frame on; see `Method.stream`.

        Version 3 offline and the single protocol get windows of the platform instead, which equal nothing: they start
        each point anew where it was last seen.
        """
        stream = stream_of(self)
        if queries is not None:
            stream.add(queries)
        return stream

    @torch.no_grad()
    def features(self, clip: Clip) -> None:
        """Compute and keep the features of a clip of one video, so that the first `track` is as quick as later ones.

        Raises:
            DataError: a batch of several videos.
        """
        if len(clip.video) != 1:
            raise DataError(f"cotracker keeps features of one video, got a batch of {len(clip.video)}")
        self._features(clip)

    def forget(self) -> None:
        """Free the features of the last clip."""
        self._kept.forget()

    def train(self, mode: bool = True) -> CoTracker:
        """Set training mode; kept features are freed."""
        self._kept.forget()
        return super().train(mode)

    @property
    def bidirectional(self) -> bool:
        """Whether one pass sees the frames before a query as well as those after it: version 3 offline."""
        return not self.model.sliding

    def _track(
        self, clip: Clip, queries: Tensor, joint: bool, reference_merge: bool = False, features: Features | None = None
    ) -> Tracks:
        """Track queries (B, N, 3) forwards, backwards to the frames before them, and give back pixels of the clip."""
        frame, place = queries[..., 0].round().long(), self.to_features(queries[..., 1:], clip.size)
        if queries.shape[1] == 0:
            none = place.new_zeros(len(queries), clip.frames, 0)
            return self.tracks((none[..., None].expand(-1, -1, -1, 2), none, none), clip.size)
        if features is None and clip.frames > 1:
            features = self._features(clip)
        size = self.model_size(clip.size)
        found = self._pass(features, frame, place, size, clip.frames, joint, backward=False)
        if not self.bidirectional:
            time = torch.arange(clip.frames, device=frame.device)[:, None]
            earlier = time < frame[:, None]
            if reference_merge:
                earlier = protocols.unseen(frame, clip.frames, self.model.window)
            other = self._pass(features, frame, place, size, clip.frames, joint, backward=True)
            found = protocols.merge(found, other, earlier)
        return self.tracks(found, clip.size, queries)

    def _pass(
        self,
        features: Features | None,
        frame: Tensor,
        place: Tensor,
        size: Size,
        total: int,
        joint: bool,
        backward: bool,
    ) -> Found:
        """Track points (B, N) in one direction; (B, T, N, ..) in feature pixels and probabilities.

        A point stays at its query, at probability 0, where the pass has no frame to track it to. `size` is that of the
        model's frames; without `features` there is one frame.
        """
        n, stride = frame.shape[1], self.model.stride
        needed = frame > 0 if backward else frame < total - 1
        if self.bidirectional or (backward and not self.looks_back):
            needed = torch.full_like(needed, not backward and total > 1)
        support = (global_grid(self.version, self.support_grid, size) / stride).to(place)
        if joint:
            groups, needed, points = protocols.joint(frame, place, total, support, backward), needed.any(1), n
        else:
            video = torch.arange(len(frame), device=frame.device).repeat_interleave(n)
            frame, place, needed, points = frame.flatten(), place.flatten(0, 1), needed.flatten(), 1
            around = local_grid(self.version, self.local_grid, place * stride) / stride
            support = torch.cat([around, support.expand(len(place), -1, -1)], 1)
            groups = protocols.single(video, frame, place, total, support, backward, crop=self.version < 3)

        def track(some: Groups) -> Found:
            assert features is not None
            where = (some.frames, some.lengths, some.frame, some.place)
            return track_groups(self.model, features, *where, self.model.iterations[1])

        found = track_in_parts(groups, needed, points, self.chunk, track, self.model.confident)
        if joint:
            return found

        def of_videos(x: Tensor) -> Tensor:
            return x.squeeze(2).unflatten(0, (-1, n)).transpose(1, 2)

        return of_videos(found[0]), of_videos(found[1]), None if found[2] is None else of_videos(found[2])

    # The border: pixels of the clip on one side, feature pixels on the other ------------------------------------------

    def model_size(self, size: Size) -> Size:
        """Return height and width that frames of some size are resized to."""
        if self.resolution is not None:
            return self.resolution
        stride = self.model.stride
        h, w = (max(4 * stride, round(side / stride) * stride) for side in size)
        return h, w

    def to_features(self, xy: Tensor, size: Size) -> Tensor:
        """Convert pixels (.., 2) of clips of some size to feature pixels, float32.

        Centres become integers. The frames of versions 2 and 3 are resized so that the centres of the corner pixels
        stay there; those of version 1 as everywhere in trackpl.
        """
        scale = self._scale(size).to(xy.device)
        xy = xy.float()
        xy = xy * scale - 0.5 if self.version == 1 else (xy - 0.5) * scale
        return xy / self.model.stride

    def to_pixels(self, place: Tensor, size: Size) -> Tensor:
        """Convert feature pixels (.., 2) to pixels of clips of some size; inverse of `to_features`."""
        scale, place = self._scale(size).to(place.device), place.float() * self.model.stride
        return (place + 0.5) / scale if self.version == 1 else place / scale + 0.5

    def _scale(self, size: Size) -> Tensor:
        less = 0 if self.version == 1 else 1
        h, w = ((model - less) / max(side - less, 1) for model, side in zip(self.model_size(size), size, strict=True))
        return torch.tensor([w, h])

    def tracks(self, found: Found, size: Size, queries: Tensor | None = None) -> Tracks:
        """Make tracks, in pixels of clips of some size, of what was found; each of the queries (B, N, 3) as itself."""
        place, visible, confidence = found
        xy = self.to_pixels(place, size)
        if confidence is not None and self.weigh_visible:
            visible = visible * confidence
        if queries is not None:
            own = torch.arange(xy.shape[1], device=xy.device)[:, None] == queries[:, None, :, 0].round()
            xy = torch.where(own[..., None], queries[:, None, :, 1:].to(xy), xy)
            visible = visible.masked_fill(own, 1)
            confidence = None if confidence is None else confidence.masked_fill(own, 1)
        return Tracks(xy, visible, confidence=confidence)

    def extract(self, video: Tensor) -> Features:
        """Compute the features of frames (F, 3, H, W), uint8 or in [0, 1], of any size."""
        size = self.model_size((video.shape[-2], video.shape[-1]))

        def prepare(images: Tensor) -> Tensor:
            images = images.float() / 255 if images.dtype == torch.uint8 else images.float()
            if images.shape[-2:] != size:
                images = F.interpolate(images, size, mode="bilinear", align_corners=self.version > 1)
            return 2 * images - 1

        return self.model.encode(video, prepare)

    def _features(self, clip: Clip) -> Features:
        """Return the features of all frames of a batch, kept if they are those of one video, video after video."""
        if len(clip.video) > 1:
            return self.extract(clip.video.flatten(0, 1))
        kept = self._kept.of(clip.video, self.model.encoder)
        if "features" not in kept:
            kept["features"] = self.extract(clip.video[0])
        features: Features = kept["features"]
        return features

    # Training ------------------------------------------------------------------------------------------------------

    def losses(self, clip: Clip) -> dict[str, Tensor]:
        """Losses of all windows of a clip, which is tracked with gradients from the first to the last.

        Points and query frames are drawn as `sampling` says, unless the clip names queries.

        Raises:
            DataError: a clip without tracks.
        """
        possible = usable(clip).any(1)
        if clip.queries is None:
            if self.train_points is not None:
                far = FAR if self.version == 3 else None
                clip = choose_points(clip, self.train_points, last=self.bidirectional, far=far)
            queries, possible = choose_queries(clip, random=1.0 if self.bidirectional else 0.25)
        else:
            check_queries(clip, clip.queries)
            queries, possible = clip.queries, torch.ones_like(possible)
        assert clip.tracks is not None and clip.visible is not None
        b, total, device = len(queries), clip.frames, clip.video.device
        frame, place = queries[..., 0].round().long(), self.to_features(queries[..., 1:], clip.size)
        valid = torch.ones_like(clip.visible) if clip.valid is None else clip.valid
        xy = self.to_features(clip.tracks, clip.size) * self.model.stride
        truth = Truth(xy, clip.visible, valid & possible[:, None], frame)
        features = self.extract(clip.video.flatten(0, 1))
        frames = torch.arange(b * total, device=device).view(b, total)
        windows = unroll(
            self.model, features, frames, frame.new_full((b,), total), frame, place, self.model.iterations[0]
        )
        unrolled = [(w.start, w.states) for w in windows]
        with torch.autocast(device.type, enabled=False):
            seen = windows_of(unrolled, truth, self.model.stride, self.version, offline=self.bidirectional)
            if self.version == 3:
                return version3_losses(seen, hidden=self.hidden_loss)
            return paper_losses(seen, divide_by_points=self.divide_by_points)

    def setup(self, stage: str) -> None:
        """Take the weights that training starts from, unless it resumes."""
        if stage == "fit" and self.start_from is not None and self.trainer.ckpt_path is None:
            path = Path(self.start_from)
            fit_state(self, self.import_weights(read_checkpoint(path)[0]), path)


def published_window(version: int, stride: int, mode: str) -> int:
    """Return the window of the published weights of this kind."""
    if version == 3:
        return 60 if mode == "offline" else 16
    return 16 if version == 1 and stride == 8 else 8


def _check_choices(**given: Any) -> None:
    for option, value in given.items():
        if value not in CHOICES[option]:
            raise Error(f"cotracker has no {option} {value}; allowed: {', '.join(map(str, CHOICES[option]))}")


def _check_sizes(least: int, **given: int | None) -> None:
    for option, value in given.items():
        if value is not None and value < least:
            raise Error(f"cotracker needs {option} of {least} or more, got {value}")
