"""Learning Pixel Trajectories with Multiscale Contrastive Random Walks (Bian, Jabri, Efros, Owens; CVPR 2022).

Claim: a walker that steps from pixel to pixel between frames, by the similarity of learned embeddings, and back again
should come home. Maximising the probability that it does teaches the embeddings to match, without any label. Dense
frames are affordable because each step is local: at every level of a pyramid it only corrects the flow found above it.

Glossary: B batch, k frames of a clip, l level (stride 64 to 4, coarse to fine), N = h w nodes of a level, d channels
of an embedding, r window radius, K = (2r+1)^2 window offsets, A (N, K) local transition, f (2, h, w) flow.

Where we differ from the paper: the loss of a level is the mean over the nodes whose path stays in the frame (the paper
sums, which would weigh the finest level 256 times the coarsest); transitions are composed as T = A B with the bilinear
weights B of their incoming flow (the paper multiplies A alone); convolutions start from Kaiming initialisation. Off by
default, for training from scratch on small clips: fewer `levels`, a `median` filter on the flow between levels, a pull
towards the incoming flow where embeddings say nothing (`stay`), and a walk that ends in a displaced view of frame 0
(`end_view_shift`), so that absolute position is of no use to it.
"""

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from trackpl import Clip, Info, Method
from trackpl.errors import DataError, Error
from trackpl_crw.pyramid import FeaturePyramid, embed_heads, image_pyramid
from trackpl_crw.smoothness import smoothness
from trackpl_crw.transition import Matcher, Transition, upsample
from trackpl_crw.walk import cycle_loss

FINEST = 4  # stride of the finest level


def _adam(parameters) -> torch.optim.Optimizer:  # noqa: ANN001
    return torch.optim.Adam(parameters, lr=1e-4)


def _cyclic(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.CyclicLR(
        optimizer, base_lr=1e-4, max_lr=5e-4, step_size_up=2000, cycle_momentum=False
    )


class MultiscaleCRW(Method):
    """Self-supervised dense correspondence by multiscale contrastive random walks (the non-parametric model).

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
        starts: nodes drawn at each level for walks of three frames and more.
        end_view_shift: the walk ends in a view of frame 0 displaced by this many pixels (a multiple of the coarsest
            stride) along either axis or both, at random; 0 ends it in frame 0 itself.
        curriculum: from which optimiser step on how many frames of a clip the walk takes, such as ``{0: 2, 4000: 3}``;
            optimiser and learning rate begin anew at each switch. Empty takes all frames from the start.
        resolution: shorter side of the frames that flow is computed on; frames are resized to it and to multiples of
            the coarsest stride. None keeps their size.
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
        starts: int = 512,
        end_view_shift: int = 0,
        curriculum: dict[int, int] | None = None,
        resolution: int | None = 512,
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
        if curriculum and (0 not in curriculum or min(curriculum.values()) < 2):
            raise Error(
                f"crw_multiscale needs a curriculum that begins at step 0 with 2 frames or more, got {curriculum}"
            )
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"])
        self.feature_pyramid_extractor = FeaturePyramid(levels, padding_mode)
        self.embed_heads = embed_heads(levels, embed_dim)
        self.matcher = Matcher(radius, tau, expected_flow, median, stay)
        self.crw_weight, self.smooth_weight, self.edge_constant = crw_weight, smooth_weight, edge_constant
        self.starts, self.end_view_shift, self.resolution = starts, end_view_shift, resolution
        self.curriculum = curriculum or {}

    def embed(self, images: Tensor) -> list[Tensor]:
        """Map images (B, 3, H, W) in [0, 1] to raw embeddings (B, d, h, w) of each level, coarse to fine."""
        features = self.feature_pyramid_extractor(images * 2 - 1)  # appendix B: RGB in [-1, 1]
        return [head(f) for head, f in zip(self.embed_heads, features, strict=True)]

    # 3.3, Eq. 10: L_non = L_msCRW + L_smooth ----------------------------------------------------------------------

    def losses(self, clip: Clip) -> dict[str, Tensor]:
        """Walk and smoothness losses of the palindrome 0, 1, .., k-1, .., 1, 0, one entry of each a level.

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
        embedded = [e.unflatten(0, images.shape[:2]) for e in self.embed(images.flatten(0, 1))]
        home = slice(0, 1) if end_view is None else slice(k, k + 1)
        sources = [torch.cat([e[: k - 1], e[1:k]]).flatten(0, 1) for e in embedded]
        targets = [torch.cat([e[1:k], e[home], e[1 : k - 1]]).flatten(0, 1) for e in embedded]
        steps = self.matcher.transitions(sources, targets)

        start_images = torch.cat([frames[: k - 1], frames[1:k]]).flatten(0, 1)
        guides = image_pyramid(start_images, [(s.flow.shape[-2], s.flow.shape[-1]) for s in steps])
        losses = {}
        for level, (step, image) in enumerate(zip(steps, guides, strict=True)):
            stride = self.coarsest >> level
            forward, backward = _hops(step, k - 1)
            nodes = (shift[0] // stride, shift[1] // stride)
            with torch.autocast(video.device.type, enabled=False):
                walk = cycle_loss(forward, backward, self.starts, nodes)
                smooth = smoothness(step.flow, image, self.edge_constant)
            losses[f"crw_{stride}"] = self.crw_weight * walk
            if self.smooth_weight:
                losses[f"smooth_{stride}"] = self.smooth_weight * smooth
        return losses

    def on_train_batch_start(self, batch: Clip, batch_idx: int) -> None:
        """Begin optimiser and learning rate anew where the curriculum switches (3.3, multi-frame training)."""
        if self.global_step and self.global_step in self.curriculum:
            self.trainer.strategy.setup_optimizers(self.trainer)

    def _walked(self, clip: Clip) -> Clip:
        """Cut a clip to the frames that the curriculum takes at this step."""
        if not self.curriculum:
            return clip
        step = self.global_step if self._trainer is not None else 0
        frames = self.curriculum[max(start for start in self.curriculum if start <= step)]
        if clip.frames < frames:
            raise DataError(f"the curriculum asks for {frames} frames at step {step}; set data.frames to as many")
        return Clip(video=clip.video[:, :frames], name=clip.name)

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

    @torch.no_grad()
    def encode(self, images: Tensor) -> list[Tensor]:
        """Embed frames (B, 3, H, W) resized to `resolution` and to multiples of the coarsest stride."""
        size = working_size(images.shape[-2], images.shape[-1], self.resolution, self.coarsest)
        if images.shape[-2:] != size:
            images = F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)
        return self.embed(images)

    @torch.no_grad()
    def match(self, source: list[Tensor], target: list[Tensor], size: tuple[int, int]) -> Tensor:
        """Give the expected displacement of every pixel (B, 2, H, W); the walk has no notion of occlusion (3.2)."""
        return resize_flow(upsample(self.matcher.flow(source, target), FINEST), size)


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
