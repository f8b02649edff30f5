"""The feature pyramid (PWC-lite, reduced filters) and the 1x1 heads that embed each of its levels.

Keys equal those of the published PWC-lite checkpoints, so that their pyramids load without translation.
"""

from itertools import pairwise
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

Padding = Literal["zeros", "reflect", "replicate", "circular"]
WIDTHS = (16, 32, 64, 96, 128, 192)  # strides 2, 4, 8, 16, 32, 64; all but the first are matched


def _conv(inputs: int, outputs: int, stride: int, padding_mode: Padding) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, padding_mode=padding_mode), nn.LeakyReLU(0.1, inplace=True)
    )


class FeaturePyramid(nn.Module):
    """Blocks of two 3x3 convolutions, the first of stride 2 (paper, appendix C); one more than there are levels.

    Args:
        levels: 1 to 5; the finest has stride 4, five reach stride 64.
        padding_mode: how the convolutions see the border; ``reflect`` leaks less absolute position than ``zeros``.
    """

    def __init__(self, levels: int = 5, padding_mode: Padding = "zeros") -> None:
        super().__init__()
        widths = (3, *WIDTHS[: levels + 1])
        self.convs = nn.ModuleList(
            nn.Sequential(_conv(i, o, 2, padding_mode), _conv(o, o, 1, padding_mode)) for i, o in pairwise(widths)
        )
        # torch's own start shrinks the signal layer by layer until the biases drown it: at stride 16 all embeddings
        # point the same way, every return has probability 1/K, and nothing is ever learned.
        for conv in self.modules():
            if isinstance(conv, nn.Conv2d):
                nn.init.kaiming_normal_(conv.weight, a=0.1)
                if conv.bias is not None:
                    nn.init.zeros_(conv.bias)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Map (B, 3, H, W), H and W multiples of the coarsest stride, to the levels from the coarsest to stride 4."""
        levels = []
        for conv in self.convs:
            images = conv(images)
            levels.append(images)
        return levels[:0:-1]


def embed_heads(levels: int, embed_dim: int) -> nn.ModuleList:
    """Make the linear 1x1 heads that embed each level, coarse to fine; normalised only where they are compared."""
    return nn.ModuleList(nn.Conv2d(c, embed_dim, 1) for c in WIDTHS[levels:0:-1])


def image_pyramid(images: Tensor, sizes: list[tuple[int, int]]) -> list[Tensor]:
    """Halve images (B, 3, H, W) until each of `sizes` (coarse to fine) is reached."""
    levels: dict[tuple[int, int], Tensor] = {}
    while images.shape[-2] >= sizes[0][0]:
        levels[(images.shape[-2], images.shape[-1])] = images
        if min(images.shape[-2:]) < 2:
            break
        images = F.avg_pool2d(images, 2)
    return [levels[size] for size in sizes]
