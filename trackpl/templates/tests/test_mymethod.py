"""The promises of trackpl to its users, and that the method learns."""

import torch
from trackpl_mymethod.method import MyMethod
from trackpl_prep.synthetic import render

from trackpl.testing import check_method


def test_keeps_the_contract_of_trackpl() -> None:
    """Any size and length, independent points and clips, gradients, checkpoints, low precision."""
    check_method("mymethod", channels=16, size=64)


def test_learns_one_clip_by_heart() -> None:
    """The error on one clip falls to less than half in 100 steps."""
    torch.manual_seed(0)
    clip = render(seed=0, index=0, size=(64, 64), frames=4, points=64)
    method = MyMethod(channels=32, size=64)
    optimizer = torch.optim.AdamW(method.parameters(), lr=3e-3)
    errors = []
    for _ in range(100):
        losses = method.losses(clip)
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
        errors.append(losses["position"].item())
    assert sum(errors[-10:]) < 0.5 * sum(errors[:10])
