"""What the regressor learns from (paper, 3.2, Eqs. 9 and 11): smoothness, features, constraint, and boundary.

Nothing here reaches the embeddings: features, embeddings, the walk's flow and all masks are constants. Pairs of frames
are stacked as the hops i to i+1 of a clip, then the same hops back: P = 2 (k-1) B of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from trackpl.errors import DataError
from trackpl_crw.occlusion import consistent, disagreement, in_frame, visible
from trackpl_crw.photometric import charbonnier, masked_mean, photometric
from trackpl_crw.smoothness import smoothness
from trackpl_crw.transition import unit, upsample, warp

TEACHER, STUDENT = 0.003, 0.03  # sigma of their masks, in diagonals of the frame
FINEST = 4  # stride of the finest flow


def both_ways(x: Tensor) -> tuple[Tensor, Tensor]:
    """Source and target (P, ...) of all hops i to i+1 and then of the hops back, of frames (k, B, ...)."""
    a, b = x[:-1].flatten(0, 1), x[1:].flatten(0, 1)
    return torch.cat([a, b]), torch.cat([b, a])


def hop_back(flow: Tensor) -> Tensor:
    """Put in the place of each hop's flow (P, 2, h, w) that of the hop back."""
    there, back = flow.chunk(2)
    return torch.cat([back, there])


def trusted(walk: Tensor) -> Tensor:
    """Where the walk's flow (P, 2, h, w) is undone by that of the hop back, in the frame: (P, 1, h, w) of 0 and 1."""
    return consistent(walk, hop_back(walk)) * in_frame(walk)


def comparable(embedded: Tensor) -> Tensor:
    """Scale embeddings (B, d, h, w) so that the mean over channels of a product is a cosine."""
    return unit(embedded.float()) * embedded.shape[1] ** 0.5


def feature_consistency(source: Tensor, target: Tensor, flow: Tensor, mask: Tensor) -> Tensor:
    """Mean over visible nodes of |x_s - warp(x_t, f)|^2 (Eq. 9, first term).

    Args:
        source: unit embeddings (B, d, h, w) of frame s.
        target: of frame t.
        flow: (B, 2, h, w) regressed.
        mask: (B, 1, h, w) visible nodes.
    """
    return masked_mean((source.detach() - warp(target.detach(), flow)).square(), mask.detach())


def constraint(flow: Tensor, walk: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean of |f_reg - g_avg(A)|^2: stay near the non-parametric flow (Eq. 9, second term); over a mask, if given."""
    distance = (flow - walk.detach()).square().sum(1, keepdim=True)
    return distance.mean() if mask is None else masked_mean(distance, mask)


def crop(images: Tensor, margin: int) -> Tensor:
    """Cut (B, C, H, W) by `margin` on each side and resize it back, bilinear."""
    h, w = images.shape[-2:]
    cut = images[..., margin : h - margin, margin : w - margin]
    return F.interpolate(cut, (h, w), mode="bilinear", align_corners=False)


def crop_flow(flow: Tensor, margin: int) -> Tensor:
    """Do the same with a flow, and scale its vectors."""
    h, w = flow.shape[-2:]
    return crop(flow, margin) * flow.new_tensor([w / (w - 2 * margin), h / (h - 2 * margin)]).view(1, 2, 1, 1)


def agreement(flow: Tensor, back: Tensor, sigma: float) -> Tensor:
    """exp(-|f + f'|^2 / (sigma^2 (h^2 + w^2))): 1 where the flow back brings a pixel home."""
    h, w = flow.shape[-2:]
    return (-disagreement(flow, back)[0] / (sigma**2 * (h * h + w * w))).exp()


def boxes(like: Tensor, count: int) -> Tensor:
    """Draw `count` rectangles in each image (B, C, H, W), of an eighth to a third of its sides: (B, 1, H, W) bool."""
    size = like.new_tensor([like.shape[-1], like.shape[-2]])
    centre = torch.rand(len(like), count, 2, device=like.device) * size
    reach = (torch.rand(len(like), count, 2, device=like.device) * (1 / 3 - 1 / 8) + 1 / 8) * size / 2
    x, y = (torch.arange(n, device=like.device) + 0.5 for n in (like.shape[-1], like.shape[-2]))
    across = (x - centre[..., :1]).abs() <= reach[..., :1]  # (B, count, W)
    down = (y - centre[..., 1:]).abs() <= reach[..., 1:]
    return (down[..., :, None] & across[..., None, :]).any(1, keepdim=True)


def boundary_loss(
    student: Tensor,
    student_back: Tensor,
    teacher: Tensor,
    teacher_back: Tensor,
    margin: int,
    covered: Tensor | None = None,
) -> Tensor:
    """L_bound: what the flow says from a crop should be what it says from the whole frame.

    Counts where the teacher is consistent and the student is not: pixels whose match the crop cut off.

    Args:
        student: flow (B, 2, h, w) from the cropped and enlarged frames; the only one with a gradient.
        student_back: its flow back.
        teacher: flow from the whole frames.
        teacher_back: its flow back.
        margin: of the crop on each side, in pixels of these flows.
        covered: share (B, 1, h, w) of each of the student's pixels that was painted over.
    """
    with torch.no_grad():
        sure = crop(agreement(teacher, teacher_back, TEACHER) * in_frame(teacher), margin)
        if covered is not None:
            sure = sure * (1 - covered)
        unsure = 1 - agreement(student, student_back, STUDENT) * in_frame(student)
        teacher = crop_flow(teacher, margin)
    error = charbonnier(teacher - student).sum(1, keepdim=True)
    return (sure * unsure * error).mean()


@dataclass(frozen=True)
class RegressorLosses:
    """Which losses the regressor learns from, and their weights; see `MultiscaleCRW` for what they mean."""

    smooth_weight: float = 30.0
    edge_constant: float = 150.0
    constraint_weight: float = 1.0
    feature_weight: float = 0.1
    bound_weight: float = 1.0
    bound_crop: int = 64
    bound_start: int = 0
    bound_ramp: int = 0
    photometric: str = "none"
    photometric_weight: float = 1.0
    occlusion: str = "wang"
    constraint_on: str = "all"
    bound_boxes: int = 0

    def of_levels(
        self, flows: Sequence[Tensor], walk: Sequence[Tensor], embedded: Sequence[Tensor], guides: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """L_smooth(f_reg) + L_feat (Eq. 9) of each level.

        Args:
            flows: regressed, (P, 2, h, w) each, coarse to fine.
            walk: the non-parametric ones.
            embedded: raw embeddings (k, B, d, h, w).
            guides: source frames (P, 3, h, w) in [0, 1].
        """
        losses = {}
        for level, (flow, matched, e, image) in enumerate(zip(flows, walk, embedded, guides, strict=True)):
            stride = FINEST << (len(flows) - 1 - level)
            source, target = (unit(x) for x in both_ways(e.detach().float()))
            feature = feature_consistency(source, target, flow, self._mask(flow))
            losses[f"feature_{stride}"] = self.feature_weight * feature
            matched = matched.float()
            known = None if self.constraint_on == "all" else trusted(matched)
            losses[f"constraint_{stride}"] = self.constraint_weight * constraint(flow, matched, known)
            if self.smooth_weight:
                smooth = smoothness(flow, image, self.edge_constant)
                losses[f"regressor_smooth_{stride}"] = self.smooth_weight * smooth
        return losses

    def of_colours(self, frames: Tensor, flow: Tensor) -> dict[str, Tensor]:
        """Compute the classical photometric term (Table 5), of frames (k, B, 3, H, W) and the finest flow."""
        if self.photometric == "none":
            return {}
        flow = upsample(flow, FINEST)
        source, target = both_ways(frames)
        loss = photometric(self.photometric, source, warp(target, flow), self._mask(flow))
        return {self.photometric: self.photometric_weight * loss}

    def bound_share(self, step: int) -> float:
        """How much of its weight the boundary loss has at an optimiser step."""
        done = step - self.bound_start
        return 0.0 if done < 0 or not self.bound_weight else min(1.0, (done + 1) / (self.bound_ramp + 1))

    def cropped(self, frames: Tensor) -> tuple[Tensor, Tensor | None]:
        """Cut frames (k, B, 3, H, W) for the boundary loss's student, and paint boxes of other pixels on them.

        Returns:
            The frames, and where they are painted over, (k, B, 1, H, W) of 0 and 1; None without boxes.

        Raises:
            DataError: nothing is left.
        """
        h, w = frames.shape[-2:]
        if 2 * self.bound_crop >= min(h, w):
            raise DataError(
                f"bound_crop={self.bound_crop} on each side leaves nothing of frames of {h} x {w}; "
                "train on larger ones, or lower model.bound_crop"
            )
        cut = crop(frames.flatten(0, 1), self.bound_crop)
        if not self.bound_boxes:
            return cut.unflatten(0, frames.shape[:2]), None
        covered = boxes(cut, self.bound_boxes)
        other = frames.roll(1, 1).flip(-1).flatten(0, 1)
        painted = torch.where(covered, other, cut)
        return painted.unflatten(0, frames.shape[:2]), covered.to(cut.dtype).unflatten(0, frames.shape[:2])

    def of_boundary(self, student: Tensor, teacher: Tensor, covered: Tensor | None = None) -> Tensor:
        """L_bound of the finest flows of the cropped and of the whole frames; what is `covered` is not counted."""
        back, teacher = hop_back(student.detach()), teacher.detach()
        if covered is not None:
            covered = F.interpolate(both_ways(covered)[0], student.shape[-2:], mode="area")
        args = student, back, teacher, hop_back(teacher), self.bound_crop // FINEST, covered
        return self.bound_weight * boundary_loss(*args)

    def _mask(self, flow: Tensor) -> Tensor:
        return visible(flow.detach(), hop_back(flow.detach()), self.occlusion)
