"""Label propagation by any features: the single-scale routine that video representations are compared by.

After Jabri, Owens, Efros, "Space-Time Correspondence as a Contrastive Random Walk" (NeurIPS 2020): a node takes the
labels of the most similar nodes of frame 0, wherever they are, and of the last frames, near its own place.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

ROWS = 256
"""Nodes of the target that are compared at once with all nodes of all sources."""


@torch.no_grad()
def follow_features(
    features: Iterable[Tensor],
    labels: Tensor,
    *,
    context: int = 20,
    radius: float = 12,
    tau: float = 0.07,
    topk: int = 10,
) -> Iterator[Tensor]:
    """Propagate the labels of frame 0 by the similarity of features, frame by frame.

    Args:
        features: of each frame, (C, h, w), of any length; frame 0 first.
        labels: (K, h, w) of frame 0.
        context: frames before the target that are sources besides frame 0; frame 0 stands for those that are missing.
        radius: nodes of the context farther than this (or just as far) are not looked at.
        tau: temperature of the softmax over what is kept.
        topk: nodes that are kept, of all sources together.

    Yields:
        (K, h, w) of each frame; of frame 0 the labels as they are.
    """
    k, h, w = labels.shape
    node = torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"), -1).view(-1, 2).float()
    node = node.to(labels.device)
    seen: deque[tuple[Tensor, Tensor]] = deque(maxlen=context + 1)
    first: tuple[Tensor, Tensor] | None = None
    for image in features:
        unit = torch.nn.functional.normalize(image.flatten(1), dim=0)  # (C, N)
        if first is None:
            first = unit, labels.flatten(1)
            seen.extend([first] * context)
            yield labels
        else:
            sources = [first, *seen]
            keys, values = (torch.cat(parts, 1) for parts in zip(*sources, strict=True))
            found = []
            for rows in torch.arange(h * w, device=labels.device).split(ROWS):
                logits = unit[:, rows].T @ keys / tau
                far = torch.cdist(node[rows], node) >= radius
                # Far ones stay in their order, as good as nothing beside a near one.
                logits[:, h * w :] -= 1e10 * far.repeat(1, context)
                best, place = logits.topk(min(topk, logits.shape[1]), 1)
                found.append((values[:, place] * best.softmax(1)).sum(-1))
            now = torch.cat(found, 1)
            seen.append((unit, now))
            yield now.view(k, h, w)
        if len(seen) > context:
            seen.popleft()
