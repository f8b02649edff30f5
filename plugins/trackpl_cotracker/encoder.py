"""The feature encoder that all versions share: a small residual network with instance norm, frame by frame (3.1).

The norms hold no parameters and see one frame alone, so features may be computed in any order, and kept. Without
gradients a CPU computes one frame after the other, channels last, with the norm and its ReLU in place.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHANNELS = 128  # of the features
STAGES = ((64, 64, 1), (64, 96, 2), (96, 128, 2), (128, 128, 2))  # channels in and out, stride of the first block
EPSILON = 1e-5


class Block(nn.Module):
    """Two 3 x 3 convolutions, each with norm and ReLU; a shortcut is projected where the shape changes."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1)
        self.shortcut = nn.Conv2d(channels_in, channels, 1, stride) if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', H / stride, W / stride)."""
        y = normalised(self.conv2(normalised(self.conv1(x), relu=True)), relu=True)
        skip = x if self.shortcut is None else normalised(self.shortcut(x))
        return F.relu(skip + y) if torch.is_grad_enabled() else y.add_(skip).relu_()


class Encoder(nn.Module):
    """Map each frame to features of one `stride`; the four stages' maps are resized to it and mixed.

    Args:
        stride: of the features, in pixels; it changes no parameter.
    """

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.stem = nn.Conv2d(3, 64, 7, 2, 3)
        self.stages = nn.ModuleList(nn.Sequential(Block(c_in, c, step), Block(c, c, 1)) for c_in, c, step in STAGES)
        self.mix = nn.Conv2d(sum(c for _, c, _ in STAGES), 2 * CHANNELS, 3, 1, 1)
        self.head = nn.Conv2d(2 * CHANNELS, CHANNELS, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, 3, H, W) in [-1, 1] to features (B, 128, H // stride, W // stride)."""
        if not _fast(images.device):
            return self._features(images)
        images = images.contiguous(memory_format=torch.channels_last)
        return torch.cat([self._features(image) for image in images.split(1)])  # one frame fits into a CPU's cache

    def _features(self, images: Tensor) -> Tensor:
        size = (images.shape[-2] // self.stride, images.shape[-1] // self.stride)
        x = normalised(self.stem(images), relu=True)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(F.interpolate(x, size, mode="bilinear", align_corners=True))
        return self.head(normalised(self.mix(torch.cat(maps, 1)), relu=True))


def normalised(x: Tensor, relu: bool = False) -> Tensor:
    """Normalise each channel of (B, C, H, W) over the pixels of its frame, in float32; then perhaps ReLU."""
    x = x.float()
    if not _fast(x.device):
        x = torch.instance_norm(x, None, None, None, None, True, 0.0, EPSILON, torch.backends.cudnn.enabled)
        return F.relu(x) if relu else x
    pixels = x.permute(0, 2, 3, 1).flatten(1, 2)  # (B, HW, C)
    centred = pixels - pixels.mean(1, keepdim=True)
    power = centred.square().mean(1, keepdim=True)
    centred *= (power + EPSILON).rsqrt()
    out = centred.relu_() if relu else centred
    return out.unflatten(1, x.shape[-2:]).permute(0, 3, 1, 2)


def _fast(device: torch.device) -> bool:
    """Whether the path for a CPU without gradients serves."""
    return device.type == "cpu" and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
