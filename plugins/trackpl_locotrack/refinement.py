"""Refinement of a track: tokens of local correlation and motion, and a transformer over the frames (3.2)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trackpl_locotrack.correlation import EMBEDDING, CorrelationEncoder, local_correlation
from trackpl_locotrack.features import Features

ORDER = (1, 2, 0)  # levels in a token: strides 4, 8, 2
WAVES = 10
CODE = 4 + 2 * 4 * WAVES
TOKEN = 2 + len(ORDER) * EMBEDDING + CODE
OUTPUTS, USED = 388, 4  # outputs of the published head, of which the rest feeds nothing
TRAINED_FRAMES = 24  # length of the clips that the slopes of the attention's bias are made for
ROWS_A_BLOCK = {"cpu": 192, "cuda": 8192}  # points x frames whose correlation is made at once


class Refinement(nn.Module):
    """One iteration: correlate around the track, code its motion, and update it by a transformer over the frames."""

    def __init__(self, size: str) -> None:
        super().__init__()
        dim, heads = {"tiny": (192, 4), "small": (256, 4), "base": (384, 6)}[size]
        self.encoders = nn.ModuleList(CorrelationEncoder(size) for _ in ORDER)
        self.transformer = TemporalTransformer(dim, heads)

    def forward(
        self,
        features: Features,
        supports: list[Tensor],
        state: tuple[Tensor, Tensor, Tensor],
        initial_resolution: tuple[int, int],
        bias: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Update places (N, T, 2) of (x, y) in [0, 1], and logits (N, T) occluded and far from the truth.

        Args:
            features: of the video, at the resolution to refine at.
            supports: patches (N, 49, C) of the queries by level.
            state: what to update; no gradient goes through it.
            initial_resolution: in whose pixels motion is coded.
            bias: of the attention, see `attention_bias`.
        """
        place, occluded, far = (s.detach() for s in state)
        embedding = self.embed(features, supports, place)
        token = torch.cat(
            [
                occluded[..., None],
                far[..., None],
                *embedding,
                motion_code(place, features.resolution, initial_resolution),
            ],
            -1,
        )
        update = self.transformer(token, bias).float()
        h, w = features.resolution
        place = place + update[..., :2] / update.new_tensor([w, h])
        return place, occluded + update[..., 2], far + update[..., 3]

    def embed(self, features: Features, supports: list[Tensor], place: Tensor) -> list[Tensor]:
        """Encode the local correlation at places (N, T, 2): (N, T, 256) for each level, in the token's order."""
        n, t = place.shape[:2]
        rows = ROWS_A_BLOCK.get(place.device.type, 192)
        points, frames = max(1, rows // t), min(t, rows)
        out = [place.new_empty(0)] * len(ORDER)
        for i, level in enumerate(ORDER):
            blocks = []
            for a in range(0, n, points):
                spans = [
                    self._embed(
                        features, i, level, place[a : a + points, b : b + frames], supports[level][a : a + points], b
                    )
                    for b in range(0, t, frames)
                ]
                blocks.append(spans[0] if len(spans) == 1 else torch.cat(spans, 1))
            out[i] = torch.cat(blocks)
        return out

    def _embed(self, features: Features, i: int, level: int, place: Tensor, support: Tensor, start: int) -> Tensor:
        def run(table: Tensor, support: Tensor) -> Tensor:
            tables = tuple(table if k == level else other for k, other in enumerate(features.tables))
            part = Features(tables, features.sizes, features.frames, features.resolution)
            correlation = local_correlation(part, level, place, support, start)
            return self.encoders[i](correlation.flatten(0, 1)).float().unflatten(0, place.shape[:2])

        if torch.is_grad_enabled():  # the correlation is made again in the backward pass: it is large and cheap
            return checkpoint(run, features.tables[level], support, use_reentrant=False)
        return run(features.tables[level], support)


def motion_code(place: Tensor, resolution: tuple[int, int], initial_resolution: tuple[int, int]) -> Tensor:
    """Code the motion to the next and from the last frame by its sines: (N, T, 84) of places (N, T, 2) (Eq. 7).

    Units, signs and order are those of the released code, not of the equation.
    """
    h0, w0 = initial_resolution
    # Pixels of the initial resolution times (resolution / initial resolution), over the initial resolution.
    scale = place.new_tensor([resolution[1] / w0, resolution[0] / h0])
    step = (place[:, 1:] - place[:, :-1]) * scale
    none = torch.zeros_like(place[:, :1])
    v = torch.cat([torch.cat([-step, none], 1), torch.cat([none, step], 1)], -1)
    waves = (v[..., None, :] * 2.0 ** torch.arange(WAVES, device=v.device)[:, None]).flatten(-2)
    return torch.cat([v, waves.sin(), (waves + math.pi / 2).sin()], -1)


def attention_bias(frames: int, heads: int, device: torch.device) -> Tensor:
    """Return the linear bias (heads, T, T) of attention: half of the heads look at the past, half at the future."""
    half = heads // 2
    slopes = TRAINED_FRAMES ** (-(torch.arange(half, device=device) + 1.0) / half)
    index = torch.arange(frames, device=device)
    past = (index[:, None] - index).float()
    left = torch.where(past >= 0, -slopes[:, None, None] * past, -1e9)
    right = torch.where(past <= 0, slopes[:, None, None] * past, -1e9)
    return torch.cat([left, right])


class TemporalTransformer(nn.Module):
    """A transformer over the frames of one point, of any length."""

    def __init__(self, dim: int, heads: int, layers: int = 3) -> None:
        super().__init__()
        self.heads = heads
        self.input = nn.Linear(TOKEN, dim)
        self.layers = nn.ModuleList(TransformerLayer(dim, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.output = nn.Linear(dim, OUTPUTS)

    def forward(self, token: Tensor, bias: Tensor) -> Tensor:
        """Map tokens (N, T, 854) to updates (N, T, 4): x and y in pixels, occluded and far logits."""
        x = self.input(token)
        for layer in self.layers:
            x = layer(x, bias)
        return F.linear(self.norm(x), self.output.weight[:USED], self.output.bias[:USED])


class TransformerLayer(nn.Module):
    """Attention and a perceptron, each after a layer norm and around a residual."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query, self.key, self.value = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)
        self.expand, self.contract = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """Map (N, T, D) to the same shape."""
        x = x + self.attend(self.norm1(x), bias)
        return x + self.contract(F.gelu(self.expand(self.norm2(x))))

    def attend(self, x: Tensor, bias: Tensor) -> Tensor:
        """Attend from each frame to the frames, (N, T, D), with `bias` (heads, T, T) on the logits."""
        parts = (self.query, self.key, self.value)
        qkv = F.linear(x, torch.cat([p.weight for p in parts]), torch.cat([p.bias for p in parts]))
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype)[None])
        return self.out(out.transpose(1, 2).flatten(2))
