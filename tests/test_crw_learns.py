"""The loss teaches motion: a minute of unlabelled pairs, and held-out flow is far better than no motion."""

import pytest
import torch
import torch.nn.functional as F
from trackpl_crw.method import MultiscaleCRW

import trackpl


def pair(seed, size=64, reach=8):
    """A textured plane under a window that jumps by up to `reach` pixels, with some change of exposure."""
    g = torch.Generator().manual_seed(seed)
    side = size + 2 * reach
    canvas = sum(
        F.interpolate(torch.rand(1, 3, side // c + 2, side // c + 2, generator=g), (side, side), mode="bicubic")
        for c in (3, 6, 12)
    )
    (x, y), gain = torch.randint(-reach, reach + 1, (2,), generator=g).tolist(), 1 + 0.2 * torch.rand(2, generator=g)
    first = canvas[..., reach : reach + size, reach : reach + size]
    second = canvas[..., reach + y : reach + y + size, reach + x : reach + x + size]
    frames = [first * gain[0] / 4, second * gain[1] / 4]
    return torch.stack(frames, 1).clamp(0, 1), torch.tensor([-x, -y])


@pytest.mark.slow
def test_the_walk_learns_motion_from_unlabelled_pairs():
    torch.manual_seed(0)
    method = MultiscaleCRW(levels=2, median=5, stay=0.3, smooth_weight=1.0, edge_constant=20.0, resolution=None)
    held_out = [pair(10_000 + i) for i in range(16)]

    def error():
        errors = []
        for video, motion in held_out:
            flow = method.flow(trackpl.Clip(video=video), [(0, 1)]).xy[0, 0, :, 12:-12, 12:-12]
            errors.append((flow - motion.view(2, 1, 1)).norm(dim=0).mean())
        return float(torch.stack(errors).mean())

    still = float(torch.stack([motion.float().norm() for _, motion in held_out]).mean())
    before = error()
    optimizer = torch.optim.Adam(method.parameters(), lr=1e-3)
    for step in range(120):
        video = torch.cat([pair(4 * step + i)[0] for i in range(4)])
        loss = torch.stack(list(method.losses(trackpl.Clip(video=video)).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = error()
    assert after < still / 2 and after < before / 1.5, f"EPE {before:.2f} -> {after:.2f}, no motion {still:.2f}"
