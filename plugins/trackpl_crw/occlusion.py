"""Which pixels the other frame shows, told from the flow there and the flow back (paper, 3.2, "masking").

Flows are (B, 2, h, w) in pixels of their own size; masks (B, 1, h, w), 1 where the pixel is visible.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from trackpl_crw.transition import inside, node_grid

SHARE, SLACK = 0.01, 0.5  # a flow is consistent where |f + f'|^2 < SHARE (|f|^2 + |f'|^2) + SLACK


def warp_zeros(values: Tensor, flow: Tensor) -> Tensor:
    """Sample (B, C, h, w) at p + flow(p), bilinear; what lies off the frame counts as 0."""
    h, w = flow.shape[-2:]
    place = (node_grid(h, w, flow) + flow).permute(0, 2, 3, 1)
    scale = place.new_tensor([max(w - 1, 1), max(h - 1, 1)])
    return F.grid_sample(values, place / scale * 2 - 1, padding_mode="zeros", align_corners=True)


def in_frame(flow: Tensor) -> Tensor:
    """Whether p + flow(p) lies in the frame, as 0 or 1."""
    return inside(flow).unsqueeze(1).to(flow.dtype)


def range_map(back: Tensor) -> Tensor:
    """Count, bilinearly, how many pixels of the other frame its flow `back` sends to each pixel of this one."""
    b, _, h, w = back.shape
    place = (node_grid(h, w, back) + back).flatten(2).mT  # (B, N, 2)
    corner = place.floor()
    fraction = place - corner
    out = back.new_zeros(b, h * w)
    for dy in (0, 1):
        for dx in (0, 1):
            x, y = corner[..., 0] + dx, corner[..., 1] + dy
            step = fraction.new_tensor([dx, dy])
            weight = torch.where(step.bool(), fraction, 1 - fraction).prod(-1)
            on_grid = (x >= 0) & (x < w) & (y >= 0) & (y < h)
            node = (y.clamp(0, h - 1) * w + x.clamp(0, w - 1)).long()
            out.scatter_add_(1, node, weight * on_grid)
    return out.view(b, 1, h, w)


def reached(back: Tensor) -> Tensor:
    """Soft mask of the pixels that the other frame's flow reaches (Wang et al. 2018): clip(range map, 0, 1)."""
    return range_map(back).clamp(max=1)


def disagreement(flow: Tensor, back: Tensor) -> tuple[Tensor, Tensor]:
    """Return |f + f'|^2 and |f|^2 + |f'|^2, each (B, 1, h, w); f' the flow back where f lands, 0 off the frame."""
    returned = warp_zeros(back, flow)
    gap = (flow + returned).square().sum(1, keepdim=True)
    return gap, flow.square().sum(1, keepdim=True) + returned.square().sum(1, keepdim=True)


def consistent(flow: Tensor, back: Tensor) -> Tensor:
    """Mask of the pixels whose flow the flow back undoes (Brox, Malik; Sundaram et al. 2010), as 0 or 1."""
    gap, length = disagreement(flow, back)
    return (gap <= SHARE * length + SLACK).to(flow.dtype)


@torch.no_grad()
def visible(flow: Tensor, back: Tensor, method: str = "wang") -> Tensor:
    """Mask of the pixels that count in a photometric loss: visible in the other frame, and moved within it.

    Args:
        flow: to the other frame.
        back: its flow, to this one.
        method: ``wang`` (soft, `reached`) or ``brox`` (`consistent`).
    """
    return (reached(back) if method == "wang" else consistent(flow, back)) * in_frame(flow)
