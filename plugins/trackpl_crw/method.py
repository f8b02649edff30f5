"""Learning Pixel Trajectories with Multiscale Contrastive Random Walks (Bian, Jabri, Efros, Owens; CVPR 2022).

Claim: a walker that steps from pixel to pixel between frames, by the similarity of learned embeddings, and back again
should come home. Maximising the probability that it does teaches the embeddings to match, without any label. Dense
frames are affordable because each step is local: at every level of a pyramid it only corrects the flow found above it.

Glossary: B batch, k frames of a clip, l level (stride 64 to 4, coarse to fine), N = h w nodes of a level, d channels
of an embedding, r window radius, K = (2r+1)^2 window offsets, A (N, K) local transition, f (2, h, w) flow.

With `regressor` on, a small network learns beside the walk to give flow where there is nothing to match: it keeps to
the walk's flow, and to smoothness where the walk is lost (3.2). It never changes what the walk learns.

Where we differ from the paper: the loss of a level is the mean over the nodes whose path stays in the frame (the paper
sums, which would weigh the finest level 256 times the coarsest); transitions are composed as T = A B with the bilinear
weights B of their incoming flow (the paper multiplies A alone); convolutions start from Kaiming initialisation. Off by
default, for training from scratch on small clips: fewer `levels`, a `median` filter on the flow between levels, a pull
towards the incoming flow where embeddings say nothing (`stay`), and a walk that ends in a displaced view of frame 0
(`end_view_shift`), so that absolute position is of no use to it. The regressor's cost volume compares the pyramid's
features, as the published networks do; the paper speaks of the walk's embeddings (`cost_volume`).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from trackpl import Clip, Flow, Info, Method
from trackpl.checkpoints import fit_state, read_checkpoint
from trackpl.errors import DataError, Error
from trackpl.published import resolve, shipped_path
from trackpl_crw import weights as weights_of
from trackpl_crw.occlusion import consistent, in_frame
from trackpl_crw.other_walks import Walk, walk_loss
from trackpl_crw.photometric import LOSSES
from trackpl_crw.propagation import Propagation, embedded_size, label_stride, propagate_frames
from trackpl_crw.pwc import Regressor
from trackpl_crw.pyramid import FeaturePyramid, embed_heads, image_pyramid
from trackpl_crw.regressor import RegressorLosses, both_ways, comparable, trusted
from trackpl_crw.smoothness import smoothness
from trackpl_crw.transition import Matcher, Transition, upsample

FINEST = 4  # stride of the finest level


def _adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-4)


def _cyclic(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.CyclicLR(
        optimizer, base_lr=1e-4, max_lr=5e-4, step_size_up=2000, cycle_momentum=False
    )


class MultiscaleCRW(Method):
    """Self-supervised dense correspondence by multiscale contrastive random walks, with or without a regressor.

    Args:
        levels: levels of the pyramid, 1 to 5; the paper's five reach from stride 64 to stride 4. Clips of 256 px move
            little enough for three.
        embed_dim: channels of an embedding.
        radius: radius of the window; 5 is the paper's 11 x 11.
        tau: temperature of the transition softmax.
        padding_mode: border of the convolutions; ``reflect`` leaks less absolute position than ``zeros``.
        expected_flow: ``paper`` (Eq. 6) or ``exact``, where the walker lands on average.
        median: side of the median filter on the flow between levels (as in Sun, Roth, Black 2010): 5, or 1 for none, as
            in the paper.
        stay: by how much each squared node of distance lowers a logit, see `transition`; 0, the paper, is none.
        crw_weight: weight of the walk's loss.
        smooth_weight: weight of the smoothness loss.
        edge_constant: lambda of the smoothness loss.
        walk: how local steps become the walk of the loss: ``splat`` spreads each bilinearly over nodes; ``window`` goes
            to the nodes around the rounded flow; ``aligned`` lays all frames on the first. Flow is the same for all.
        walk_levels: how many levels, from the coarsest on, the walk and the smoothness of its flow teach (Table 8);
            None is all. Of the others only the heads stay as they are: coarser blocks sit on top of the finer ones.
        starts: nodes drawn at each level for walks of three frames and more.
        end_view_shift: the walk ends in a view of frame 0 displaced by this many pixels (a multiple of the coarsest
            stride) along either axis or both, at random; 0 ends it in frame 0 itself.
        curriculum: from which optimiser step on how many frames of a clip the walk takes, such as ``{0: 2, 4000: 3}``;
            optimiser and learning rate begin anew at each switch. Empty takes all frames from the start.
        resolution: shorter side of the frames that flow is computed on; frames are resized to it and to multiples of
            the coarsest stride. None keeps their size.
        input_range: of the images that the pyramid sees: ``symmetric`` is [-1, 1], the paper's; ``unit`` is [0, 1],
            that of the published networks.
        regressor: add the regressor of flow (3.2), which the flow then comes from.
        flow_by: ``regressor``, where there is one, or ``walk``, the non-parametric flow.
        reduce_dense: the regressor's estimator: the reduced one, or the dense one.
        cost_volume: what the regressor's cost volume compares: ``features`` or ``embeddings``.
        regress_from: where each level of the regressor begins: at the level ``above``, as in the paper, or at the
            ``walk``'s flow of the level wherever the walk back undoes it, and at the level above elsewhere.
        constraint_weight: of the regressor's distance from the walk's flow.
        constraint_on: where that counts: on ``all`` pixels, as in the paper, or on the ``consistent`` ones, whose flow
            the walk back undoes.
        feature_weight: of the feature consistency loss.
        bound_weight: of the boundary loss; 0 saves its second pass.
        bound_crop: pixels that it cuts off on each side, a multiple of 4.
        bound_boxes: rectangles of other pixels painted on each cropped frame, so that it also teaches what moves behind
            something (as in SelFlow, Liu et al. 2019); 0, the paper, is none.
        bound_start: optimiser step at which it begins.
        bound_ramp: steps over which it then grows to its weight.
        photometric: a classical photometric term beside the learned one (Table 5): ``none``, ``charbonnier``,
            ``census`` or ``ssim``.
        photometric_weight: its weight.
        occlusion: which pixels count in both: ``wang``, those that the flow back reaches, or ``brox``, those that it
            brings home.
        train_walk: false trains the regressor alone and keeps pyramid and embeddings.
        start_from: checkpoint whose weights training starts from, or ``shipped`` for those that come with the plugin;
            it may lack the regressor.
        propagation: how labels are propagated: the name of published settings, ``davis`` or ``jhmdb``, or fields of
            `Propagation` to change, such as ``{tau: 0.07}``; None is its own.
        optimizer: as ``{class_path, init_args}``.
        lr_scheduler: stepped once a batch.
    """

    info: ClassVar[Info] = Info(
        title="Multiscale Contrastive Random Walks",
        paper="Bian et al., Learning Pixel Trajectories with Multiscale Contrastive Random Walks, CVPR 2022",
        licence="Apache-2.0",
        weights_licence="Apache-2.0",
    )
    contract: ClassVar[int] = 1
    weights: ClassVar[str | None] = "crw_multiscale.safetensors"
    more_weights: ClassVar[Mapping[str, str]] = {"crw_regressor": "crw_regressor.safetensors"}

    def __init__(
        self,
        levels: int = 5,
        embed_dim: int = 32,
        radius: int = 5,
        tau: float = 0.07,
        padding_mode: Literal["zeros", "reflect"] = "zeros",
        expected_flow: Literal["paper", "exact"] = "paper",
        median: Literal[1, 5] = 1,
        stay: float = 0.0,
        crw_weight: float = 1.0,
        smooth_weight: float = 30.0,
        edge_constant: float = 150.0,
        walk: Walk = "splat",
        walk_levels: int | None = None,
        starts: int = 512,
        end_view_shift: int = 0,
        curriculum: dict[int, int] | None = None,
        resolution: int | None = 512,
        input_range: Literal["symmetric", "unit"] = "symmetric",
        regressor: bool = False,
        flow_by: Literal["regressor", "walk"] = "regressor",
        reduce_dense: bool = True,
        cost_volume: Literal["features", "embeddings"] = "features",
        regress_from: Literal["above", "walk"] = "above",
        constraint_weight: float = 1.0,
        constraint_on: Literal["all", "consistent"] = "all",
        feature_weight: float = 0.1,
        bound_weight: float = 1.0,
        bound_crop: int = 64,
        bound_boxes: int = 0,
        bound_start: int = 0,
        bound_ramp: int = 0,
        photometric: Literal["none", "charbonnier", "census", "ssim"] = "none",
        photometric_weight: float = 1.0,
        occlusion: Literal["wang", "brox"] = "wang",
        train_walk: bool = True,
        start_from: str | None = None,
        propagation: str | dict[str, Any] | None = None,
        optimizer: OptimizerCallable = _adam,
        lr_scheduler: LRSchedulerCallable | None = _cyclic,
    ) -> None:
        super().__init__(optimizer, lr_scheduler)
        if not 1 <= levels <= 5 or radius < 1 or tau <= 0 or median not in (1, 5):
            raise Error(
                "crw_multiscale needs levels in 1..5, radius >= 1, tau > 0 and median 1 or 5; "
                f"got {levels}, {radius}, {tau} and {median}"
            )
        self.coarsest = FINEST << (levels - 1)  # stride
        if end_view_shift < 0 or end_view_shift % self.coarsest:
            raise Error(
                f"crw_multiscale needs end_view_shift a multiple of its coarsest stride {self.coarsest}, "
                f"got {end_view_shift}"
            )
        if end_view_shift and walk != "splat":
            raise Error(f"crw_multiscale needs end_view_shift 0 with walk '{walk}'; only walk 'splat' ends elsewhere")
        if walk_levels is not None and not 1 <= walk_levels <= levels:
            raise Error(f"crw_multiscale needs walk_levels in 1..{levels}, its levels, or null; got {walk_levels}")
        if curriculum and (0 not in curriculum or min(curriculum.values()) < 2):
            raise Error(
                f"crw_multiscale needs a curriculum that begins at step 0 with 2 frames or more, got {curriculum}"
            )
        if regressor and end_view_shift:
            raise Error(
                "crw_multiscale needs end_view_shift 0 with a regressor, which learns from the walk's own frames"
            )
        if not regressor and not train_walk:
            raise Error("crw_multiscale needs train_walk or a regressor; with neither nothing is trained")
        if bound_crop < FINEST or bound_crop % FINEST or min(bound_boxes, bound_start, bound_ramp) < 0:
            raise Error(
                f"crw_multiscale needs bound_crop a multiple of {FINEST} above 0, and bound_boxes, bound_start and "
                f"bound_ramp of 0 or more; got {bound_crop}, {bound_boxes}, {bound_start} and {bound_ramp}"
            )
        for name, given, allowed in (
            ("walk", walk, get_args(Walk)),
            ("input_range", input_range, ("symmetric", "unit")),
            ("flow_by", flow_by, ("regressor", "walk")),
            ("cost_volume", cost_volume, ("features", "embeddings")),
            ("regress_from", regress_from, ("above", "walk")),
            ("constraint_on", constraint_on, ("all", "consistent")),
            ("photometric", photometric, ("none", *LOSSES)),
            ("occlusion", occlusion, ("wang", "brox")),
        ):
            if given not in allowed:
                raise Error(f"crw_multiscale needs {name} one of {', '.join(allowed)}; got '{given}'")
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler", "start_from"])
        self.feature_pyramid_extractor = FeaturePyramid(levels, padding_mode)
        self.embed_heads = embed_heads(levels, embed_dim)
        self.matcher = Matcher(radius, tau, expected_flow, median, stay)
        self.crw_weight, self.smooth_weight, self.edge_constant = crw_weight, smooth_weight, edge_constant
        self.walk, self.walk_levels = walk, levels if walk_levels is None else walk_levels
        self.starts, self.end_view_shift, self.resolution = starts, end_view_shift, resolution
        self.curriculum = curriculum or {}
        self.input_range, self.flow_by, self.cost_volume = input_range, flow_by, cost_volume
        self.from_walk = regress_from == "walk"
        self.regressor = Regressor(levels, reduce_dense, self.from_walk) if regressor else None
        self.regressor_losses = RegressorLosses(
            smooth_weight=smooth_weight,
            edge_constant=edge_constant,
            constraint_weight=constraint_weight,
            feature_weight=feature_weight,
            bound_weight=bound_weight,
            bound_crop=bound_crop,
            bound_start=bound_start,
            bound_ramp=bound_ramp,
            photometric=photometric,
            photometric_weight=photometric_weight,
            occlusion=occlusion,
            constraint_on=constraint_on,
            bound_boxes=bound_boxes,
        )
        self.train_walk, self.start_from = train_walk, start_from
        self.propagation = Propagation.of(propagation)
        self.embed_heads[self.walk_levels :].requires_grad_(False)
        if not train_walk:
            self.feature_pyramid_extractor.requires_grad_(False)
            self.embed_heads.requires_grad_(False)

    def pyramid(self, images: Tensor) -> list[Tensor]:
        """Map images (B, 3, H, W) in [0, 1] to features (B, C, h, w) of each level, coarse to fine."""
        symmetric = self.input_range == "symmetric"  # appendix B: RGB in [-1, 1]
        return self.feature_pyramid_extractor(images * 2 - 1 if symmetric else images)

    def embed(self, images: Tensor) -> list[Tensor]:
        """Map images (B, 3, H, W) in [0, 1] to raw embeddings (B, d, h, w) of each level, coarse to fine."""
        return self._embeddings(self.pyramid(images))

    def _embeddings(self, features: Sequence[Tensor]) -> list[Tensor]:
        return [head(f) for head, f in zip(self.embed_heads, features, strict=True)]

    # 3.3, Eqs. 10 and 11: L_non = L_msCRW + L_smooth, L_reg = L_non + L_feat + L_bound ------------------------------

    def losses(self, clip: Clip) -> dict[str, Tensor]:
        """Walk and smoothness losses of the palindrome 0, 1, .., k-1, .., 1, 0, and the regressor's, each a level.

        Raises:
            DataError: clips with too few frames, or smaller than two nodes of the coarsest stride.
        """
        clip = self._walked(clip)
        if clip.frames < 2:
            raise DataError("crw_multiscale learns from clips of 2 frames or more; set data.frames to 2, 3 or 4")
        video, end_view, shift = self._displaced_view(clip.float_video())
        k, (h, w) = clip.frames, video.shape[-2:]
        if min(h, w) < 2 * self.coarsest or h % self.coarsest or w % self.coarsest:
            raise DataError(
                f"crw_multiscale trains on frames of at least {2 * self.coarsest} px whose sides are multiples of "
                f"{self.coarsest} (after end_view_shift={self.end_view_shift} is taken off); got {h} x {w}"
            )
        # Embed every frame once, then match all adjacent pairs in both orders as one batch; the last hop goes home.
        frames = video.transpose(0, 1)  # (k, B, 3, h, w)
        images = frames if end_view is None else torch.cat([frames, end_view.unsqueeze(0)])
        with torch.set_grad_enabled(self.train_walk and torch.is_grad_enabled()):
            features = self.pyramid(images.flatten(0, 1))
            embedded = [e.unflatten(0, images.shape[:2]) for e in self._embeddings(features)]
        home = slice(0, 1) if end_view is None else slice(k, k + 1)
        sources = [torch.cat([e[: k - 1], e[1:k]]).flatten(0, 1) for e in embedded]
        targets = [torch.cat([e[1:k], e[home], e[1 : k - 1]]).flatten(0, 1) for e in embedded]
        steps = self.matcher.transitions(sources, targets)

        start_images = torch.cat([frames[: k - 1], frames[1:k]]).flatten(0, 1)
        guides = image_pyramid(start_images, [(s.flow.shape[-2], s.flow.shape[-1]) for s in steps])
        losses = {}
        for level in range(self.walk_levels) if self.train_walk else ():
            step, image = steps[level], guides[level]
            stride = self.coarsest >> level
            forward, backward = _hops(step, k - 1)
            nodes = (shift[0] // stride, shift[1] // stride)
            with torch.autocast(video.device.type, enabled=False):
                args = embedded[level][:k], forward, backward, self.starts, nodes
                walk = walk_loss(self.walk, self.matcher, *args)
                smooth = smoothness(step.flow, image, self.edge_constant)
            losses[f"crw_{stride}"] = self.crw_weight * walk
            if self.smooth_weight:
                losses[f"smooth_{stride}"] = self.smooth_weight * smooth
        if self.regressor is not None:
            features = [f.unflatten(0, (k, -1)) for f in features]
            losses |= self._of_regressor(
                frames, features, embedded, [self.matcher.filtered(s.flow.detach()) for s in steps], guides
            )
        return losses

    # 3.2: the regressor learns from constants, so that nothing of it reaches the embeddings --------------------------

    def _of_regressor(
        self, frames: Tensor, features: list[Tensor], embedded: list[Tensor], walk: list[Tensor], guides: list[Tensor]
    ) -> dict[str, Tensor]:
        """Losses of the regressor from frames (k, B, 3, H, W) and what is known of them, see `RegressorLosses`."""
        wanted, device = self.regressor_losses, frames.device.type
        flows = self._regress(features, embedded, walk)
        with torch.autocast(device, enabled=False):
            losses = wanted.of_levels(flows, walk, embedded, guides) | wanted.of_colours(frames, flows[-1])
        if share := wanted.bound_share(self._step()):
            with torch.no_grad():
                cropped, covered = wanted.cropped(frames)
                features = self.pyramid(cropped.flatten(0, 1))
                embedded = [e.unflatten(0, (len(frames), -1)) for e in self._embeddings(features)]
                features = [f.unflatten(0, (len(frames), -1)) for f in features]
                walk = self.matcher.flows(*zip(*map(both_ways, embedded), strict=True)) if self.from_walk else []
            student = self._regress(features, embedded, walk)[-1]
            with torch.autocast(device, enabled=False):
                losses["bound"] = share * wanted.of_boundary(student, flows[-1], covered)
        return losses

    def _regress(self, features: Sequence[Tensor], embedded: Sequence[Tensor], walk: Sequence[Tensor]) -> list[Tensor]:
        """Regress the flow of all adjacent pairs both ways, a level each, from (k, B, C, h, w) taken as constants."""
        assert self.regressor is not None, "called with a regressor only"
        pairs = [both_ways(f.detach()) for f in features]
        sources, compared = [s for s, _ in pairs], pairs
        if self.cost_volume == "embeddings":
            compared = [both_ways(e.detach()) for e in embedded]
            compared = [(comparable(s), comparable(t)) for s, t in compared]
        known = [(f.float(), trusted(f.float())) for f in walk] if self.from_walk else None
        return self.regressor(sources, [s for s, _ in compared], [t for _, t in compared], known)

    def on_train_batch_start(self, batch: Clip, batch_idx: int) -> None:
        """Begin optimiser and learning rate anew where the curriculum switches (3.3, multi-frame training)."""
        if self.global_step and self.global_step in self.curriculum:
            self.trainer.strategy.setup_optimizers(self.trainer)

    def _walked(self, clip: Clip) -> Clip:
        """Cut a clip to the frames that the curriculum takes at this step."""
        if not self.curriculum:
            return clip
        step = self._step()
        frames = self.curriculum[max(start for start in self.curriculum if start <= step)]
        if clip.frames < frames:
            raise DataError(f"the curriculum asks for {frames} frames at step {step}; set data.frames to as many")
        return Clip(video=clip.video[:, :frames], name=clip.name)

    def _step(self) -> int:
        return self.global_step if self._trainer is not None else 0

    def setup(self, stage: str) -> None:
        """Take the weights that training starts from, unless it resumes."""
        if stage != "fit" or self.start_from is None or self.trainer.ckpt_path is not None:
            return
        shipped = shipped_path(type(self))
        path = shipped if self.start_from == "shipped" and shipped else resolve(self.start_from, type(self))
        state = self.import_weights(read_checkpoint(path)[0])
        if not any(key.startswith("regressor.") for key in state):  # of a walk alone: the regressor begins here
            state |= {k: v for k, v in self.state_dict().items() if k.startswith("regressor.")}
        fit_state(self, state, path)

    def _displaced_view(self, video: Tensor) -> tuple[Tensor, Tensor | None, tuple[int, int]]:
        """Crop all frames by `end_view_shift`, and frame 0 once more displaced by it: node p is p - shift there."""
        margin = self.end_view_shift
        if not margin:
            return video, None, (0, 0)
        h, w = video.shape[-2] - margin, video.shape[-1] - margin
        start_x, start_y, axes = (int(i) for i in torch.randint(0, 6, (3,)))
        begin = (start_x % 2 * margin, start_y % 2 * margin)  # corner of the walk's own view
        moves = ((True, False), (False, True), (True, True))[axes % 3]
        end = tuple(margin - b if move else b for b, move in zip(begin, moves, strict=True))
        view = video[..., begin[1] : begin[1] + h, begin[0] : begin[0] + w]
        end_view = video[:, 0, :, end[1] : end[1] + h, end[0] : end[0] + w]
        return view, end_view, (end[0] - begin[0], end[1] - begin[1])

    # 3.1.2: optical flow as the walk's expectation ----------------------------------------------------------------

    @property
    def _regresses(self) -> bool:
        return self.regressor is not None and self.flow_by == "regressor"

    @torch.no_grad()
    def encode(self, images: Tensor) -> list[Tensor]:
        """Embed frames (B, 3, H, W) resized to `resolution` and to multiples of the coarsest stride.

        For the regressor: the features of the pyramid, then the embeddings if it needs them.
        """
        size = working_size(images.shape[-2], images.shape[-1], self.resolution, self.coarsest)
        if images.shape[-2:] != size:
            images = F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)
        if not self._regresses:
            return self.embed(images)
        features = self.pyramid(images)
        embedded = self._embeddings(features) if self.from_walk or self.cost_volume == "embeddings" else []
        return features + embedded

    @torch.no_grad()
    def match(self, source: list[Tensor], target: list[Tensor], size: tuple[int, int]) -> Tensor:
        """Give the displacement of every pixel (B, 2, H, W); the walk has no notion of occlusion (3.2)."""
        flow = self._regressed(source, target) if self._regresses else self.matcher.flow(source, target)
        return resize_flow(upsample(flow, FINEST), size)

    def _regressed(self, source: list[Tensor], target: list[Tensor]) -> Tensor:
        """Flow of the finest level from what `encode` gives, in its pixels."""
        assert self.regressor is not None, "called with a regressor only"
        n = len(self.embed_heads)
        compared, known = (source[:n], target[:n]), None
        if self.cost_volume == "embeddings":
            compared = [comparable(e) for e in source[n:]], [comparable(e) for e in target[n:]]
        if self.from_walk:
            there, back = self.matcher.flows(source[n:], target[n:]), self.matcher.flows(target[n:], source[n:])
            known = [(f, consistent(f, g) * in_frame(f)) for f, g in zip(there, back, strict=True)]
        return self.regressor(source[:n], *compared, known)[-1]

    @torch.no_grad()
    def flow(self, clip: Clip, pairs: Sequence[tuple[int, int]]) -> Flow:
        """Give flow as `Method.flow`; the regressor's comes with `visible`, 1 where the flow back brings it home."""
        if not self._regresses:
            return super().flow(clip, pairs)
        both = super().flow(clip, [*pairs, *((t, s) for s, t in pairs)])
        n = len(both.pairs) // 2
        there, home = both.xy[:, :n].flatten(0, 1), both.xy[:, n:].flatten(0, 1)
        seen = consistent(there, home) * in_frame(there) if n else there[:, :1]
        return Flow(both.xy[:, :n], both.pairs[:n], seen.view(len(both.xy), n, *clip.size))

    def import_weights(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Translate the published networks of the authors (flowwalk) and of ARFlow, see `weights`."""
        return weights_of.translate(state, self.embed_heads)

    @classmethod
    def options_of(cls, state: dict[str, Tensor]) -> dict[str, Any]:
        """Tell a published network by its names or shapes: it has a regressor and sees images in [0, 1]."""
        return weights_of.options_of(state)

    # 4.2: label propagation ---------------------------------------------------------------------------------------

    @property
    def label_stride(self) -> int:
        """Stride of the nodes that carry labels, see `Propagation`."""
        return label_stride(self)

    def label_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return how many nodes (h, w) carry labels of frames of this size."""
        h, w = embedded_size(size, self.propagation.resolution, self.coarsest)
        return h // self.label_stride, w // self.label_stride

    def propagate_frames(self, frames: Iterable[Tensor], labels: Tensor) -> Iterator[Tensor]:
        """Follow labels by residual transitions of hypercolumns; settings are in `propagation`."""
        return propagate_frames(self, frames, labels)


def _hops(step: Transition, hops: int) -> tuple[list[Transition], list[Transition]]:
    """Split the transitions of one level, stacked as k-1 hops forward and k-1 backward, into lists."""
    parts = [
        Transition(*fields)
        for fields in zip(
            step.probability.chunk(2 * hops), step.flow_in.chunk(2 * hops), step.flow.chunk(2 * hops), strict=True
        )
    ]
    return parts[:hops], parts[hops:]


def working_size(height: int, width: int, resolution: int | None, stride: int) -> tuple[int, int]:
    """Nearest multiples of `stride`, two at least, to the frame's size scaled to a shorter side of `resolution`."""
    scale = 1.0 if resolution is None else resolution / min(height, width)
    return max(2, round(height * scale / stride)) * stride, max(2, round(width * scale / stride)) * stride


def resize_flow(flow: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize a flow (B, 2, H, W) and scale its vectors."""
    h, w = flow.shape[-2:]
    if (h, w) == size:
        return flow
    scale = flow.new_tensor([size[1] / w, size[0] / h]).view(1, 2, 1, 1)
    return F.interpolate(flow, size, mode="bilinear", align_corners=False) * scale
