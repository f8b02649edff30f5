"""The feature pyramid: a ResNet-18 of pre-activated blocks with instance norm, frame by frame (3.1; TAPIR's).

Maps of strides 2, 4 and 8, with 64, 128 and 256 channels in the paper, each vector of length one. Without gradients on
a CPU the same network runs in the channels-last layout, with 3 x 3 convolutions by `winograd`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trackpl_locotrack.winograd import conv3x3, transformed

CHANNELS = {"tiny": (32, 64, 128), "small": (64, 128, 256), "base": (64, 128, 256)}  # maps of stride 2, 4, 8
STRIDES = (2, 4, 8)
QUICK_CHANNELS = 128  # from which `winograd` is quicker than a plain convolution


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Return the padding before and after of TensorFlow's SAME rule, asymmetric at stride 2."""
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def same_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1) -> Tensor:
    """Convolve (B, C, H, W) with SAME padding."""
    top, bottom = same_padding(x.shape[-2], weight.shape[-2], stride)
    left, right = same_padding(x.shape[-1], weight.shape[-1], stride)
    if top == bottom and left == right:
        return F.conv2d(x, weight, bias, stride, (top, left))
    return F.conv2d(F.pad(x, (left, right, top, bottom)), weight, bias, stride)


class SameConv2d(nn.Conv2d):
    """A convolution with SAME padding and no bias."""

    def __init__(self, channels_in: int, channels: int, kernel: int, stride: int = 1) -> None:
        super().__init__(channels_in, channels, kernel, stride, bias=False)
        self.quick: Tensor | None = None  # the kernel in the form of `winograd`, while it serves

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (B, C, H, W)."""
        if self.quick is not None:
            return conv3x3(x, self.quick)
        return same_conv(x, self.weight, None, int(self.stride[0]))


class NormReLU(nn.InstanceNorm2d):
    """Instance norm with gain and offset in float32, then ReLU."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each channel of (B, C, H, W) over the pixels."""
        x = x.float()
        if not _fast(x.device):
            return F.relu(super().forward(x))
        pixels = x.permute(0, 2, 3, 1).flatten(1, 2)  # (B, HW, C)
        centred = pixels - pixels.mean(1, keepdim=True)
        power = centred.square().mean(1, keepdim=True)
        out = torch.addcmul(self.bias, centred, self.weight * (power + self.eps).rsqrt(), out=centred).relu_()
        return out.unflatten(1, x.shape[-2:]).permute(0, 3, 1, 2)


class Block(nn.Module):
    """Two 3 x 3 convolutions, each after norm and ReLU; the shortcut of a group's first block reads the activation."""

    def __init__(self, channels_in: int, channels: int, stride: int, first: bool) -> None:
        super().__init__()
        self.norm1 = NormReLU(channels_in)
        self.conv1 = SameConv2d(channels_in, channels, 3, stride)
        self.norm2 = NormReLU(channels)
        self.conv2 = SameConv2d(channels, channels, 3)
        self.projection = SameConv2d(channels_in, channels, 1, stride) if first else None

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', H / stride, W / stride)."""
        active = self.norm1(x)
        shortcut = x if self.projection is None else self.projection(active)
        return self.conv2(self.norm2(self.conv1(active))) + shortcut


class Backbone(nn.Module):
    """ResNet-18 without max-pooling, and without stride in its last group."""

    def __init__(self, size: str) -> None:
        super().__init__()
        self.channels = fine, middle, coarse = CHANNELS[size]
        groups = ((fine, fine, 1), (fine, middle, 2), (middle, coarse, 2), (coarse, coarse, 1))
        self.stem = SameConv2d(3, fine, 7, 2)
        self.groups = nn.ModuleList(
            nn.Sequential(Block(c_in, c, stride, True), Block(c, c, 1, False)) for c_in, c, stride in groups
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        """Map images (B, 3, H, W) in [-1, 1], sides multiples of 8, to maps (B, h, w, C) of unit vectors, fine first.

        Normalising comes before any interpolation; interpolated vectors stay as they are.
        """
        return [unit(raw.float().permute(0, 2, 3, 1)) for raw in self.raw(images)]

    @contextmanager
    def quick(self, device: torch.device) -> Iterator[None]:
        """Convolve by `winograd` where that is quicker: on a CPU, without gradients, in float32, with many channels."""
        wide = [m for m in self.modules() if isinstance(m, SameConv2d) and _is_wide(m)]
        try:
            for conv in wide if _fast(device) else ():
                conv.quick = transformed(conv.weight)
            yield
        finally:
            for conv in wide:
                conv.quick = None

    def raw(self, images: Tensor) -> list[Tensor]:
        """Return the maps (B, C, h, w) before they are normalised."""
        if not _fast(images.device):
            return self._coarse(*self._fine(images))
        images = images.contiguous(memory_format=torch.channels_last)
        fine = [self._fine(image) for image in images.split(1)]  # one frame fits into a CPU's cache
        return self._coarse(*(torch.cat(maps) for maps in zip(*fine, strict=True)))

    def _fine(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the maps of stride 2 and 4."""
        half = self.groups[0](self.stem(images))
        return half, self.groups[1](half)

    def _coarse(self, half: Tensor, quarter: Tensor) -> list[Tensor]:
        return [half, quarter, self.groups[3](self.groups[2](quarter))]


def unit(vectors: Tensor) -> Tensor:
    """Scale vectors along the last axis to length one."""
    return vectors * vectors.square().sum(-1, keepdim=True).clamp(min=1e-12).rsqrt()


def _is_wide(conv: SameConv2d) -> bool:
    return conv.kernel_size == (3, 3) and conv.stride == (1, 1) and conv.in_channels >= QUICK_CHANNELS


def _fast(device: torch.device) -> bool:
    """Whether the path for a CPU without gradients serves."""
    return device.type == "cpu" and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
