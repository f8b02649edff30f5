"""The learning rate of the paper: linear warm-up, then half a cosine to zero."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class WarmupCosine(LambdaLR):
    """Raise the rate from zero to the optimiser's in `warmup_steps`, then lower it to zero at `total_steps`.

    Args:
        optimizer: whose rate is the highest.
        warmup_steps: optimiser steps until then.
        total_steps: optimiser steps in all.
    """

    def __init__(self, optimizer: Optimizer, warmup_steps: int = 1000, total_steps: int = 300_000) -> None:
        if not 0 <= warmup_steps < total_steps:
            raise ValueError(
                f"WarmupCosine needs 0 <= warmup_steps < total_steps, got {warmup_steps} and {total_steps}"
            )

        def rate(step: int) -> float:
            if step < warmup_steps:
                return step / warmup_steps
            done = min(1.0, (step - warmup_steps) / (total_steps - warmup_steps))
            return (1 + math.cos(math.pi * done)) / 2

        super().__init__(optimizer, rate)
