"""The transformers that update the points: over the frames of a point, then over the points of a frame.

`FactorisedTransformer` (version 1) lets all points of a group attend to each other; `VirtualTransformer` (versions 2
and 3) lets them exchange through a few learned *virtual tracks*, at a cost that is linear in their number.

G groups of N points over S frames, D channels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TOKENS_A_CALL = {"cpu": 8192, "cuda": 2**17}  # without gradients; bounds the memory of a block


class Attention(nn.Module):
    """Attention of the elements of a sequence to themselves or to a context."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.kv, self.out = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)

    def forward(
        self, x: Tensor, context: Tensor | None = None, keys: Tensor | None = None, queries: Tensor | None = None
    ) -> Tensor:
        """Attend from x (B, L, D) to the context (B, M, D), or to x itself: (B, L, D).

        `keys` (B, M) bool are those that may be looked at; elements that are not in `queries` (B, L) bool look at
        everything alike.
        """
        q = self.q(x)
        if queries is not None:
            q = q * queries[..., None]
        k, v = self.kv(x if context is None else context).chunk(2, -1)
        q, k, v = (each.unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in (q, k, v))
        mask = None if keys is None else keys[:, None, None]
        return self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two layers with the tanh approximation of GELU."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.expand, self.contract = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to the same shape."""
        return self.contract(F.gelu(self.expand(x), approximate="tanh"))


class Block(nn.Module):
    """Self-attention and a perceptron, each after a layer norm without parameters and around a residual."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(dim, heads), Mlp(dim)

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        """Map (B, L, D) to the same shape; `keys` (B, L) bool are the elements that may be looked at."""
        x = x + self.attention(normalise(x), keys=keys)
        return x + self.mlp(normalise(x))


class CrossBlock(nn.Module):
    """Attention to a context and a perceptron, each after a layer norm and around a residual."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(dim, heads), Mlp(dim)
        self.context_norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, context: Tensor, keys: Tensor | None = None, queries: Tensor | None = None) -> Tensor:
        """Map x (B, L, D) to the same shape by what it sees of the context (B, M, D); masks as in `Attention`."""
        x = x + self.attention(normalise(x), self.context_norm(context), keys, queries)
        return x + self.mlp(normalise(x))


class FactorisedTransformer(nn.Module):
    """Time blocks, and after each (or every few) of them a block over the points of a frame: version 1."""

    def __init__(
        self, inputs: int, outputs: int, dim: int = 384, heads: int = 8, time: int = 6, space: int = 6
    ) -> None:
        super().__init__()
        self.every = time // space if space else 0  # a space block after each `every` time blocks, from the first
        self.input, self.output = nn.Linear(inputs, dim), nn.Linear(dim, outputs)
        self.time = nn.ModuleList(Block(dim, heads) for _ in range(time))
        self.space = nn.ModuleList(Block(dim, heads) for _ in range(space))
        initialise(self)

    def forward(self, tokens: Tensor, started: Tensor | None = None) -> Tensor:
        """Map tokens (G, N, S, inputs) to (G, N, S, outputs); nobody looks at points not `started` (G, N) bool."""
        x = self.input(tokens).float()
        keys = _per_frame(started, x.shape[2])
        for i, time in enumerate(self.time):
            x = over_time(time, x)
            if self.every and i % self.every == 0:
                x = over_points(self.space[i // self.every], x, keys)
        return self.output(x)


class VirtualTransformer(nn.Module):
    """Time blocks over points and virtual tracks, which exchange within each frame: versions 2 and 3."""

    def __init__(self, inputs: int, dim: int = 384, heads: int = 8, depth: int = 6, virtual: int = 64) -> None:
        super().__init__()
        self.input = nn.Linear(inputs, dim)
        self.virtual = nn.Parameter(torch.randn(1, virtual, 1, dim))
        self.time = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.to_virtual = nn.ModuleList(CrossBlock(dim, heads) for _ in range(depth))
        self.among_virtual = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.to_points = nn.ModuleList(CrossBlock(dim, heads) for _ in range(depth))
        initialise(self)

    def forward(self, tokens: Tensor, started: Tensor | None = None) -> Tensor:
        """Map tokens (G, N, S, inputs) to (G, N, S, D).

        Virtual tracks do not look at points that are not `started` (G, N) bool, and these look at all virtual tracks
        alike.
        """
        groups, _, frames, _ = tokens.shape
        points = self.input(tokens).float()
        virtual = self.virtual.expand(groups, -1, frames, -1)
        keys, queries = _per_frame(started, frames), _per_frame(started, frames, none=False)
        for time, gather, exchange, scatter in zip(
            self.time, self.to_virtual, self.among_virtual, self.to_points, strict=True
        ):
            points, virtual = over_time(time, points), over_time(time, virtual)
            virtual = over_points(gather, virtual, points, keys)
            virtual = over_points(exchange, virtual)
            points = over_points(scatter, points, virtual, None, queries)
        return points


def normalise(x: Tensor) -> Tensor:
    """Apply a layer norm without parameters to the last dimension."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def over_time(block: nn.Module, x: Tensor) -> Tensor:
    """Apply a block within each point of (G, N, S, D)."""
    return _in_parts(block, x.flatten(0, 1)).unflatten(0, x.shape[:2])


def over_points(block: nn.Module, x: Tensor, *others: Tensor | None) -> Tensor:
    """Apply a block within each frame of (G, N, S, D); others are contexts (G, M, S, D) or masks (G S, M)."""
    rest = (_frames_first(y) if y is not None and y.ndim == 4 else y for y in others)
    return _in_parts(block, _frames_first(x), *rest).unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)


def initialise(module: nn.Module) -> None:
    """Draw the weights of all linear layers after Xavier and set their biases to zero."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            nn.init.zeros_(part.bias)


def _frames_first(x: Tensor) -> Tensor:
    """Make sequences over points of (G, N, S, D): (G S, N, D)."""
    return x.transpose(1, 2).flatten(0, 1)


def _in_parts(block: Callable[..., Tensor], x: Tensor, *others: Tensor | None) -> Tensor:
    """Apply a block to sequences (B, L, D), without gradients a bounded number of tokens at a time."""
    length = max(y.shape[1] for y in (x, *others) if y is not None)
    step = max(1, TOKENS_A_CALL.get(x.device.type, 8192) // length)
    if torch.is_grad_enabled() or len(x) <= step:
        return block(x, *others)
    parts = range(0, len(x), step)
    return torch.cat([block(*(None if y is None else y[a : a + step] for y in (x, *others))) for a in parts])


def _per_frame(started: Tensor | None, frames: int, none: bool = True) -> Tensor | None:
    """Repeat a mask (G, N) for each frame, (G S, N); with `none`, a group in which no point started counts whole.

    An attention without any key would be undefined; nobody uses what such a group says.
    """
    if started is None:
        return None
    mask = started | ~started.any(1, keepdim=True) if none else started
    return mask.repeat_interleave(frames, 0)
