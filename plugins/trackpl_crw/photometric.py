"""Classical photometric terms, which the learned one may be joined by or replaced with (paper, Table 5).

Each compares an image with the other one, warped to it; images (B, 3, H, W) in [0, 1], masks (B, 1, H, W).
"""

import torch.nn.functional as F
from torch import Tensor

GREY = (0.2989, 0.5870, 0.1140)


def charbonnier(x: Tensor) -> Tensor:
    """rho(x) = sqrt(x^2 + 0.001^2)."""
    return (x.square() + 1e-6).sqrt()


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of values (B, C, h, w) where the mask (B, 1, h, w) counts: sum over channels, mean over pixels."""
    return (values * mask).sum() / (mask.sum() + 1e-16)


def census(images: Tensor, radius: int = 3) -> Tensor:
    """Ternary census transform, soft: each pixel's grey value against its window's, (B, (2r+1)^2, H, W)."""
    grey = (images * images.new_tensor(GREY).view(1, 3, 1, 1)).sum(1, keepdim=True) * 255
    b, _, h, w = grey.shape
    around = F.unfold(grey, 2 * radius + 1, padding=radius).view(b, -1, h, w)
    difference = around - grey
    return difference * (0.81 + difference.square()).rsqrt()


def hamming(a: Tensor, b: Tensor, radius: int = 3) -> Tensor:
    """Soft Hamming distance of two census transforms, (B, 1, H, W), a sum over the window."""
    square = (census(a, radius) - census(b, radius)).square()
    return (square / (0.1 + square)).sum(1, keepdim=True)


def without_border(mask: Tensor, width: int) -> Tensor:
    """Set a border of a mask to 0."""
    h, w = mask.shape[-2:]
    return F.pad(mask[..., width : h - width, width : w - width], [width] * 4)


def census_loss(image: Tensor, warped: Tensor, mask: Tensor, radius: int = 3) -> Tensor:
    """(soft Hamming + 0.01)^0.4 over visible pixels whose window lies in the frame (DDFlow's, as UFlow has it)."""
    distance = (hamming(image, warped, radius).abs() + 0.01) ** 0.4
    return masked_mean(distance, without_border(mask, radius))


def charbonnier_loss(image: Tensor, warped: Tensor, mask: Tensor) -> Tensor:
    """Robust difference of colours over visible pixels, a sum over channels."""
    return masked_mean(charbonnier(image - warped), mask)


def dissimilarity(a: Tensor, b: Tensor) -> Tensor:
    """clamp((1 - SSIM) / 2, 0, 1) of 3 x 3 windows, (B, 3, H - 2, W - 2)."""
    mean_a, mean_b = F.avg_pool2d(a, 3, 1), F.avg_pool2d(b, 3, 1)
    var_a = F.avg_pool2d(a * a, 3, 1) - mean_a.square()
    var_b = F.avg_pool2d(b * b, 3, 1) - mean_b.square()
    covariance = F.avg_pool2d(a * b, 3, 1) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    ssim = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    ssim = ssim / ((mean_a.square() + mean_b.square() + c1) * (var_a + var_b + c2))
    return ((1 - ssim) / 2).clamp(0, 1)


def ssim_loss(image: Tensor, warped: Tensor, mask: Tensor) -> Tensor:
    """Structural dissimilarity over visible pixels, a mean over channels."""
    return masked_mean(dissimilarity(image, warped).mean(1, keepdim=True), mask[..., 1:-1, 1:-1])


LOSSES = {"charbonnier": charbonnier_loss, "census": census_loss, "ssim": ssim_loss}


def photometric(kind: str, image: Tensor, warped: Tensor, mask: Tensor) -> Tensor:
    """Return the term called `kind`, see `LOSSES`; nothing differentiates the mask."""
    return LOSSES[kind](image, warped, mask.detach())
