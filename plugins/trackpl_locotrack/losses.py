"""The losses of TAPIR on every output of the method, in pixels of a frame of 256 x 256 (4.1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SIZE = 256.0
HUBER, POSITION_WEIGHT = 4.0, 0.05
FAR = 6.0  # pixels from which an estimate counts as far from the truth


def point_losses(
    place: Tensor, occluded: Tensor, far: Tensor, true_place: Tensor, true_occluded: Tensor, valid: Tensor
) -> dict[str, Tensor]:
    """Return the three losses of one output; each is a mean over all entries, those left out included.

    Args:
        place: (..., 2) of (x, y) in [0, 1] of the frame's size.
        occluded: (...) logits.
        far: (...) logits that the place is more than 6 px off.
        true_place: (..., 2) likewise.
        true_occluded: (...) bool.
        valid: (...) bool, what is supervised.
    """
    seen, hidden, valid = (valid & ~true_occluded).float(), true_occluded.float(), valid.float()
    true_place = torch.where((seen > 0)[..., None], true_place, place.detach())  # truth may be anything where hidden
    squared = ((place - true_place) * SIZE).square().sum(-1)
    distance = (squared + 1e-12).sqrt()
    huber = torch.where(distance < HUBER, squared / 2, HUBER * (distance - HUBER / 2))
    is_far = (squared.detach() > FAR**2).float()
    return {
        "position": POSITION_WEIGHT * (seen * huber).mean(),
        "occlusion": (valid * F.binary_cross_entropy_with_logits(occluded, hidden, reduction="none")).mean(),
        "uncertainty": (seen * F.binary_cross_entropy_with_logits(far, is_far, reduction="none")).mean(),
    }


def random_queries(tracks: Tensor, usable: Tensor) -> Tensor:
    """Draw for each track (B, T, N, 2) one of the frames where it is `usable` (B, T, N): queries (B, N, 3).

    A track that never is gets its place in frame 0.
    """
    frame = (torch.rand(usable.shape, device=tracks.device) * usable).argmax(1)  # (B, N)
    xy = tracks.gather(1, frame[:, None, :, None].expand(-1, 1, -1, 2))[:, 0]
    return torch.cat([frame[..., None].to(xy.dtype), xy], -1)
