"""Two other ways to walk over a clip than that of `walk`: on whole nodes, and with all frames aligned to the first.

The paper does not say how its local steps are composed; `walk` splats each step bilinearly (T = A B). Here a walker
goes from node p directly to a node j in a window of K = (2r+1)^2 nodes around a centre c(p):

* `window`: c(p) is p + f(p) rounded, and T(p, j) the softmax over the window of S(p, j) = <x_s(p), x_t(j)> / tau.
  R can reach 1, but what f has beyond whole nodes does not count.
* `aligned`: all frames are resampled into frame 0 along the composite flow F_i, so that c(p) = p; forwards T is the
  softmax of the rows of S between frames i and i+1, backwards of its columns. It needs no flow back.

T is kept as log T (B, N, K) and its centres; no N x N matrix and no tensor of (N, K, d) is ever built. One hop and back
is computed for all nodes, in log space by gathers,

    log R(p) = logsumexp_j [log T_f(p, j) + log T_b(j, p)],

longer walks by pushing and pulling the columns of a random set of starts, as in `walk`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from trackpl_crw.transition import Matcher, Transition, inside, local_correlation, node_grid, offsets, unit, warp
from trackpl_crw.walk import cycle_loss, draw, mean_of_cycles, path_inside, transpose

Walk = Literal["splat", "window", "aligned"]
NEVER = -1e30  # log of the probability of what may not happen
CHUNK = 2**22  # numbers of the largest tensor of gathered windows


def walk_loss(
    walk: Walk,
    matcher: Matcher,
    embedded: Tensor,
    forward: Sequence[Transition],
    backward: Sequence[Transition],
    starts: int = 512,
    shift: tuple[int, int] = (0, 0),
    eps: float = 1e-10,
) -> Tensor:
    """Loss of the walks 0..m..0 over a clip at one level, see `cycle_loss`.

    Args:
        walk: ``splat``, ``window`` or ``aligned``.
        matcher: holds radius, tau and stay.
        embedded: raw embeddings (k, B, d, h, w), which the latter two compare themselves.
        forward: k-1 transitions i to i+1; of these the latter two use the incoming flow.
        backward: k-1 transitions i+1 to i; the aligned walk ignores them.
        starts: nodes drawn for walks of three frames and more; all of them where a level has no more.
        shift: see `return_of_pair`; for ``splat`` alone.
        eps: bounds the loss of a node and its gradient.
    """
    if walk == "splat":
        return cycle_loss(forward, backward, starts, shift, eps)
    embedded = embedded.to(torch.promote_types(embedded.dtype, torch.float32))
    there, back = ([step.flow_in for step in hops] for hops in (forward, backward))
    hops = window_hops(matcher, embedded, there, back) if walk == "window" else aligned_hops(matcher, embedded, there)
    valid = torch.stack(path_inside(forward)).flatten(2).to(embedded.dtype)

    logs = [torch.logaddexp(log_return_of_pair(hops[0][0], hops[1][0]), embedded.new_tensor(eps).log())]
    weights = [valid[0]]
    if len(forward) > 1:
        chosen = draw(valid[0], starts)
        logs += [(p + eps).log() for p in returns_of_hops(*hops, chosen)[1:]]
        weights += [v.gather(1, chosen) for v in valid[1:]]
    return mean_of_cycles(logs, weights)


@dataclass(frozen=True)
class Hop:
    """T from the nodes of one frame to those of another, by windows."""

    log: Tensor  # log T (B, N, K), NEVER where the walker may not go; a row that leads nowhere is NEVER throughout
    centre: Tensor  # c (B, N, 2) long, the node (x, y) in the middle of each row's window
    size: tuple[int, int]  # h, w


def _hop(matcher: Matcher, similarity: Tensor, allowed: Tensor, centre: Tensor, size: tuple[int, int]) -> Hop:
    """Softmax of the rows of S (B, N, K) over what is allowed."""
    distance = offsets(matcher.radius, similarity).square().sum(-1)
    logits = torch.where(allowed, similarity - matcher.stay * distance, NEVER)
    return Hop(torch.where(allowed, logits.log_softmax(-1), NEVER), centre, size)


def window_hops(
    matcher: Matcher, embedded: Tensor, flows: Sequence[Tensor], flows_back: Sequence[Tensor]
) -> tuple[list[Hop], list[Hop]]:
    """Hops i to i+1 and i+1 to i of the window walk, from raw embeddings (k, B, d, h, w) and flows (B, 2, h, w)."""
    h, w = embedded.shape[-2:]
    x = [unit(e).flatten(2).mT for e in embedded]  # (B, N, d)

    def hop(source: Tensor, target: Tensor, flow: Tensor) -> Hop:
        limit = torch.tensor([w - 1, h - 1], device=flow.device)
        centre = (node_grid(h, w, flow) + flow + 0.5).flatten(2).mT.floor().long()
        centre = torch.minimum(centre.clamp(min=0), limit)
        similarity = _Dots.apply(source / matcher.tau, target, centre, (h, w), matcher.radius)
        return _hop(matcher, similarity, _windows(centre, (h, w), matcher.radius)[1], centre, (h, w))

    forward = [hop(x[i], x[i + 1], f) for i, f in enumerate(flows)]
    return forward, [hop(x[i + 1], x[i], f) for i, f in enumerate(flows_back)]


def aligned_hops(matcher: Matcher, embedded: Tensor, flows: Sequence[Tensor]) -> tuple[list[Hop], list[Hop]]:
    """Hops of the aligned walk, where node p of any frame stands for p + F_i(p); see `window_hops`."""
    _, b, _, h, w = embedded.shape
    total = torch.zeros_like(flows[0])
    x, seen = [unit(embedded[0])], [inside(total)]
    for e, flow in zip(embedded[1:], flows, strict=True):
        total = total + warp(flow, total)
        x.append(unit(warp(e, total)))
        seen.append(inside(total))
    centre = node_grid(h, w, total).flatten(1).mT.long().expand(b, -1, 2)
    near, on_grid = _windows(centre, (h, w), matcher.radius)

    def hop(similarity: Tensor, target_seen: Tensor) -> Hop:
        allowed = on_grid & target_seen.flatten()[near]
        return _hop(matcher, similarity.flatten(1, 2), allowed, centre, (h, w))

    forward, backward = [], []
    for i in range(len(flows)):
        s = local_correlation(x[i] / matcher.tau, F.pad(x[i + 1], [matcher.radius] * 4), matcher.radius)
        forward.append(hop(s, seen[i + 1]))
        backward.append(hop(transpose(s), seen[i]))
    return forward, backward


def log_return_of_pair(forward: Hop, backward: Hop) -> Tensor:
    """Log of the probability R (B, N) of one hop and back, of all nodes; about -1e30 where there is no way home."""
    r = _radius(forward.log)
    near = _windows(forward.centre, forward.size, r)[0]
    home = node_grid(*forward.size, forward.log).flatten(1).mT.long().unsqueeze(1)  # p (N, 1, 2)
    home = home - backward.centre.reshape(-1, 2)[near] + r  # its place in the window of j
    within = ((home >= 0) & (home <= 2 * r)).all(-1)
    entry = near * backward.log.shape[-1] + torch.where(within, home[..., 1] * (2 * r + 1) + home[..., 0], 0)
    back = backward.log.view(1, -1).gather(1, entry.view(1, -1)).view_as(entry)
    return (forward.log + torch.where(within, back, NEVER)).logsumexp(-1)


def returns_of_hops(forward: Sequence[Hop], backward: Sequence[Hop], starts: Tensor) -> list[Tensor]:
    """Probability of returning from frame m to the nodes `starts` (B, S), for m = 1..k-1; exact for each start."""
    b, n, _ = forward[0].log.shape
    columns = forward[0].log.new_zeros(b, n, starts.shape[1]).scatter(1, starts.unsqueeze(1), 1.0)
    out, back, returns = columns, columns, []
    for away, home in zip(forward, backward, strict=True):
        out = _Scatter.apply(away.log.exp(), out, away.centre, away.size)
        back = _Gather.apply(home.log.exp(), back, home.centre, home.size)
        returns.append((out * back).sum(1))
    return returns


# Products with a matrix that is kept by windows: M (B, N, K) with centres (B, N, 2), columns u, v (B, N, C) of the
# frames that it leads from and to. Each is bilinear, and the gradients of one are the other two.


class _Product(torch.autograd.Function):
    """What the three of them keep: both factors, the centres, and the size of the grid."""

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs[:3])
        ctx.size = inputs[3]


class _Dots(_Product):
    """out[p, k] = <u(p), v(j)>, j the k-th node of the window around c(p)."""

    @staticmethod
    def forward(u: Tensor, v: Tensor, centre: Tensor, size: tuple[int, int], radius: int) -> Tensor:
        near, on_grid = _windows(centre, size, radius)
        (b, n, c), k = u.shape, near.shape[-1]
        rows, flat = u.reshape(b * n, c, 1), v.reshape(b * n, c)
        step = max(1, CHUNK // (k * c))
        out = [
            torch.bmm(flat.index_select(0, j.flatten()).view(-1, k, c), x)
            for j, x in zip(near.view(b * n, k).split(step), rows.split(step), strict=True)
        ]
        return torch.cat(out).view(b, n, k) * on_grid

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        u, v, centre = ctx.saved_tensors
        rest = centre, ctx.size
        return _Gather.forward(grad, v, *rest), _Scatter.forward(grad, u, *rest), None, None, None


class _Gather(_Product):
    """M v: out(p) = sum_k M[p, k] v(j)."""

    @staticmethod
    def forward(m: Tensor, v: Tensor, centre: Tensor, size: tuple[int, int]) -> Tensor:
        near, on_grid = _windows(centre, size, _radius(m))
        b, n, k = m.shape
        weights = (m * on_grid).view(b * n, k)
        flat = v.reshape(b * n, -1)
        return F.embedding_bag(near.view(b * n, k), flat, per_sample_weights=weights, mode="sum").view_as(v)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        m, v, centre = ctx.saved_tensors
        rest, wanted = (centre, ctx.size), ctx.needs_input_grad
        grad_m = _Dots.forward(grad, v, *rest, _radius(m)) if wanted[0] else None
        return grad_m, _Scatter.forward(m, grad, *rest) if wanted[1] else None, None, None


class _Scatter(_Product):
    """M^T u: out(j) = sum of M[p, k] u(p) over all p, k that lead to j."""

    @staticmethod
    def forward(m: Tensor, u: Tensor, centre: Tensor, size: tuple[int, int]) -> Tensor:
        near, on_grid = _windows(centre, size, _radius(m))
        b, n, k = m.shape
        # Sorted by where they lead, the entries of a node j are one bag.
        to, order = near.flatten().sort()
        bags = torch.searchsorted(to, torch.arange(b * n + 1, device=m.device))
        flat, weights = u.reshape(b * n, -1), (m * on_grid).flatten()[order]
        out = F.embedding_bag(order // k, flat, bags, per_sample_weights=weights, mode="sum", include_last_offset=True)
        return out.view_as(u)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        m, u, centre = ctx.saved_tensors
        rest, wanted = (centre, ctx.size), ctx.needs_input_grad
        grad_m = _Dots.forward(u, grad, *rest, _radius(m)) if wanted[0] else None
        return grad_m, _Gather.forward(m, grad, *rest) if wanted[1] else None, None, None


def _radius(m: Tensor) -> int:
    return (round(m.shape[-1] ** 0.5) - 1) // 2


def _windows(centre: Tensor, size: tuple[int, int], radius: int) -> tuple[Tensor, Tensor]:
    """Nodes of the window around each centre (B, N, 2): (B, N, K) counted over the batch, and which are on the grid."""
    h, w = size
    step = torch.arange(-radius, radius + 1, device=centre.device)
    x, y = centre[..., :1] + step, centre[..., 1:] + step  # (B, N, side)
    on_grid = ((y >= 0) & (y < h)).unsqueeze(-1) & ((x >= 0) & (x < w)).unsqueeze(-2)
    first = torch.arange(len(centre), device=centre.device).view(-1, 1, 1, 1) * (h * w)
    node = first + (y.clamp(0, h - 1) * w).unsqueeze(-1) + x.clamp(0, w - 1).unsqueeze(-2)
    return node.flatten(2), on_grid.flatten(2)
