"""The contrastive random walk on one level: probability of returning home, and its loss (paper, Eqs. 2 and 7).

A column q of a transition A stands for the place q + f(q) of the target frame, not for its node q. B_f, the N x N
matrix of bilinear weights, takes it there: T = A B_f goes from nodes to nodes, and T of successive frames may be
multiplied. For frames 0..m and back the probability of coming home is

    R_m = diag(T_01 ... T_(m-1)m T_m(m-1) ... T_10).

No matrix of N x N is ever built. One hop and back is computed for all nodes by gathers alone (`return_of_pair`);
longer walks push and pull the columns of a random set of starts (`returns_of_walk`), all of them where N allows.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trackpl_crw.transition import Transition, inside, local_correlation, node_grid, warp


class _Transpose(torch.autograd.Function):
    """Transpose of a windowed matrix: out[q, k] = A[q + offset k, -offset k]; zero where q + offset is off the grid."""

    @staticmethod
    def forward(a: Tensor) -> Tensor:
        b, h, w, k = a.shape
        side = round(k**0.5)
        r = side // 2
        a = F.pad(a, (0, 0, r, r, r, r))
        row = (w + 2 * r) * k
        # Reading the padded rows in steps of one node minus one column walks along the anti-diagonal.
        view = a.as_strided(
            (b, h, w, side, side), ((h + 2 * r) * row, row, k, row - side, k - 1), a.storage_offset() + k - 1
        )
        return view.reshape(b, h, w, k)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _Transpose.forward(grad)  # transposing is its own adjoint


def transpose(a: Tensor) -> Tensor:
    """Transpose a windowed matrix (B, h, w, K): out[q, k] = A[q + offset k, -offset k], differentiable."""
    return _Transpose.apply(a)


def _landing(flow: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where the nodes go: place (B, N, 2) clamped to the frame, its upper-left node and its fraction."""
    h, w = flow.shape[-2:]
    limit = flow.new_tensor([w - 1, h - 1])
    place = (node_grid(h, w, flow) + flow).flatten(2).mT
    place = torch.minimum(place.clamp(min=0), limit)
    corner = place.floor()
    return place, corner.long(), place - corner


def _corners(corner: Tensor, fraction: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Rows of B_f: the four nodes around each place, (B, N, 4) counted over the batch, and their weights.

    A node off the grid has weight 0.
    """
    h, w = size
    step = torch.tensor([[0, 0], [1, 0], [0, 1], [1, 1]], device=corner.device)
    node = corner.unsqueeze(-2) + step  # (B, N, 4, 2)
    limit = torch.tensor([w - 1, h - 1], device=corner.device)
    on_grid = ((node >= 0) & (node <= limit)).all(-1)
    weight = torch.where(step.bool(), fraction.unsqueeze(-2), 1 - fraction.unsqueeze(-2)).prod(-1) * on_grid
    x, y = torch.minimum(node.clamp(min=0), limit).unbind(-1)
    sample = torch.arange(corner.shape[0], device=corner.device).view(-1, 1, 1)
    return (sample * h + y) * w + x, weight


class _Meet(torch.autograd.Function):
    """Where both ways meet: R[p_c(q')] += w_c(q') <A(p_c(q')), Z(., q') in the window of p_c(q')>, over q' and c.

    By hand, because autograd would fill a zero tensor of the size of Z for each of the four slices.
    """

    @staticmethod
    def forward(rows: Tensor, z: Tensor, nodes: Tensor, weights: Tensor) -> Tensor:
        side = z.shape[1] - 1
        out = rows.new_zeros(len(rows))
        for c, near in enumerate(_quarters(z)):
            met = (rows.index_select(0, nodes[:, c]).view(-1, side, side) * near).sum((1, 2))
            out.index_add_(0, nodes[:, c], met * weights[:, c])
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, z, nodes, weights = ctx.saved_tensors
        side = z.shape[1] - 1
        grad_rows, grad_z = torch.zeros_like(rows), torch.zeros_like(z)
        for c, (near, grad_near) in enumerate(zip(_quarters(z), _quarters(grad_z), strict=True)):
            p = nodes[:, c]
            g = (grad[p] * weights[:, c]).view(-1, 1, 1)
            grad_near.addcmul_(rows.index_select(0, p).view(-1, side, side), g)
            grad_rows.index_add_(0, p, (near * g).flatten(1))
        return grad_rows, grad_z, None, None


def _quarters(z: Tensor) -> list[Tensor]:
    """Cut out the windows of the four corners, in the order of `_corners`."""
    side = z.shape[1] - 1
    return [z[:, y : y + side, x : x + side] for y in (0, 1) for x in (0, 1)]


def return_of_pair(forward: Transition, backward: Transition, shift: tuple[int, int] = (0, 0)) -> Tensor:
    """Probability of one hop and back, for all nodes; exact, and with the memory of a few transitions.

    Written so that everything is a gather: with columns q of the forward and q' of the backward transition,

        R(p) = sum_q' B_b(q', p) sum_q A_f(p, q) Z(q, q'),   Z(q, q') = sum_j B_f(q, j) A_b(j, q').

    For one q', Z(., q') is its column of A_b (a window of side 2r+1) sampled bilinearly at the places q + f(q), and p
    is one of the four nodes around q' + f_b(q'), so that only a window of side 2r+2 of q matters.

    Args:
        forward: transition s to t.
        backward: transition t to s, or to a view of s displaced by `shift` nodes.
        shift: (x, y) such that node p of s is node p - shift of the view that the walk returns to.

    Returns:
        R (B, h, w); 0 where p - shift is off the grid.
    """
    a, flow_f, flow_b = forward.probability, forward.flow_in, backward.flow_in
    b, h, w, k = a.shape
    side, r, n = 2 * forward.radius + 1, forward.radius, h * w
    _, corner, fraction = _landing(flow_b)
    corner = corner + torch.tensor(shift, device=a.device)  # node of s itself, may be off the grid

    # Places q + f(q) for the window of q around every corner, relative to q' in units of r, as grid_sample wants.
    place = _landing(flow_f)[0].mT.reshape(b, 2, h, w) / r
    pad = r + 1 + max(abs(shift[0]), abs(shift[1]))
    place = F.pad(place, [pad] * 4).flatten(2).mT.contiguous()
    place = torch.view_as_complex(place).flatten()  # one gather for both coordinates
    width, area = w + 2 * pad, (h + 2 * pad) * (w + 2 * pad)
    step = torch.arange(side + 1, device=a.device)
    window = (step[:, None] * width + step).flatten()
    start = (corner[..., 1] + pad - r) * width + corner[..., 0] + pad - r
    start = start + torch.arange(b, device=a.device)[:, None] * area
    near = torch.view_as_real(place[(start[..., None] + window).view(-1)]).view(b, n, side + 1, side + 1, 2)
    near -= node_grid(h, w, a).flatten(1).T.view(1, n, 1, 1, 2) / r
    z = F.grid_sample(
        transpose(backward.probability).view(b * n, 1, side, side),
        near.view(b * n, side + 1, side + 1, 2),
        padding_mode="zeros",
        align_corners=True,
    ).view(b * n, side + 1, side + 1)

    nodes, weights = _corners(corner, fraction, (h, w))
    return _Meet.apply(a.reshape(b * n, k), z, nodes.reshape(-1, 4), weights.reshape(-1, 4)).view(b, h, w)


def _apply(a: Tensor, columns: Tensor) -> Tensor:
    """Product of a windowed matrix A (B, h, w, K) with columns D (B, N, S): out[p] = sum_k A[p, k] D[p + offset k]."""
    b, h, w, k = a.shape
    side, n = round(k**0.5), h * w
    r = side // 2
    y = (torch.arange(h, device=a.device)[:, None] + torch.arange(side, device=a.device) - r).clamp(0, h - 1)
    x = (torch.arange(w, device=a.device)[:, None] + torch.arange(side, device=a.device) - r).clamp(0, w - 1)
    near = (y[:, None, :, None] * w + x[None, :, None, :]).view(1, n, k)
    near = near + torch.arange(b, device=a.device).view(b, 1, 1) * n  # off the grid A is zero
    flat = columns.reshape(b * n, -1)
    out = F.embedding_bag(near.view(b * n, k), flat, per_sample_weights=a.reshape(b * n, k), mode="sum")
    return out.view_as(columns)


def _rows_of_b(flow: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of B_f, see `_corners`; both (B N, 4)."""
    nodes, weights = _corners(*_landing(flow)[1:], (flow.shape[-2], flow.shape[-1]))
    return nodes.reshape(-1, 4), weights.reshape(-1, 4)


def _sample(flow: Tensor, columns: Tensor) -> Tensor:
    """B_f D: columns (B, N, S) of frame t sampled where the nodes go."""
    nodes, weights = _rows_of_b(flow)
    flat = columns.reshape(len(nodes), -1)
    return F.embedding_bag(nodes, flat, per_sample_weights=weights, mode="sum").view_as(columns)


def _splat(flow: Tensor, columns: Tensor) -> Tensor:
    """B_f^T D: columns (B, N, S) on the places q + f(q), spread over the nodes of frame t."""
    nodes, weights = _rows_of_b(flow)
    flat = columns.reshape(len(nodes), -1)
    out = torch.zeros_like(flat)
    for c in range(4):
        out.index_add_(0, nodes[:, c], flat * weights[:, c, None])
    return out.view_as(columns)


def _grad_a(here: Tensor, landed: Tensor, like: Tensor) -> Tensor:
    """Gradient of <here, A landed>, both (B, N, S), in A: a local correlation with S channels."""
    _, h, w, k = like.shape
    here, landed = (x.mT.unflatten(2, (h, w)).contiguous() for x in (here, landed))
    r = round(k**0.5) // 2
    return local_correlation(here, F.pad(landed, [r] * 4), r)


class _Pull(torch.autograd.Function):
    """A B_f D of columns D (B, N, S). By hand, to keep A, f and D for the backward pass and nothing else."""

    @staticmethod
    def forward(a: Tensor, flow: Tensor, columns: Tensor) -> Tensor:
        return _apply(a, _sample(flow, columns))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, flow, columns = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        grad_a = _grad_a(grad, _sample(flow, columns), a) if wanted[0] else None
        return grad_a, None, _Push.forward(a, flow, grad) if wanted[2] else None


class _Push(torch.autograd.Function):
    """B_f^T A^T D, the adjoint of `_Pull`."""

    @staticmethod
    def forward(a: Tensor, flow: Tensor, columns: Tensor) -> Tensor:
        return _splat(flow, _apply(_Transpose.forward(a), columns))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, flow, columns = ctx.saved_tensors
        landed = _sample(flow, grad)
        grad_a = _grad_a(columns, landed, a) if ctx.needs_input_grad[0] else None
        return grad_a, None, _apply(a, landed) if ctx.needs_input_grad[2] else None


def pull(step: Transition, columns: Tensor) -> Tensor:
    """T D: for every node of s, the D (B, N, S) expected where it lands in t."""
    return _Pull.apply(step.probability, step.flow_in, columns)


def push(step: Transition, columns: Tensor) -> Tensor:
    """T^T D: how a distribution D (B, N, S) over the nodes of s spreads over those of t."""
    return _Push.apply(step.probability, step.flow_in, columns)


def returns_of_walk(
    forward: Sequence[Transition], backward: Sequence[Transition], starts: Tensor, shift: tuple[int, int] = (0, 0)
) -> list[Tensor]:
    """Probability of returning from frame m to some starts, for m = 1..k-1; exact for each start.

    Args:
        forward: transitions i to i+1.
        backward: transitions i+1 to i; the one to frame 0 may go to a displaced view, see `return_of_pair`.
        starts: (B, S) nodes p = y w + x.
        shift: displacement of that view in nodes.

    Returns:
        k-1 tensors R_m (B, S).
    """
    b, h, w, _ = forward[0].probability.shape
    home = starts - shift[1] * w - shift[0]
    x, y = starts % w - shift[0], starts // w - shift[1]
    on_grid = (x >= 0) & (x < w) & (y >= 0) & (y < h)
    one = forward[0].probability.new_ones(())
    out_columns = torch.zeros(b, h * w, starts.shape[1], dtype=one.dtype, device=one.device)
    back_columns = out_columns.scatter(1, (home * on_grid).unsqueeze(1), on_grid.unsqueeze(1).to(one.dtype))
    out_columns = out_columns.scatter(1, starts.unsqueeze(1), 1.0)
    returns = []
    for away, back in zip(forward, backward, strict=True):
        out_columns, back_columns = push(away, out_columns), pull(back, back_columns)
        returns.append((out_columns * back_columns).sum(1))
    return returns


def path_inside(forward: Sequence[Transition]) -> list[Tensor]:
    """Which nodes stay in the frame along the composite flow up to frame m = 1..k-1; each bool (B, h, w)."""
    total, ok, out = torch.zeros_like(forward[0].flow_in), None, []
    for step in forward:
        total = total + warp(step.flow_in, total)
        ok = inside(total) if ok is None else ok & inside(total)
        out.append(ok)
    return out


def cycle_loss(
    forward: Sequence[Transition],
    backward: Sequence[Transition],
    starts: int = 512,
    shift: tuple[int, int] = (0, 0),
    eps: float = 1e-10,
) -> Tensor:
    """Mean over sub-cycles 0..m..0 of the mean over nodes of -log R_m (Eq. 7, with the sub-cycles of 3.3).

    A mean over the valid nodes and not the trace's sum, which would weigh the finest level 256 times the coarsest.

    Args:
        forward: k-1 transitions i to i+1, differentiable in their probabilities.
        backward: k-1 transitions i+1 to i.
        starts: nodes drawn for walks of three frames and more; all of them where a level has no more.
        shift: see `return_of_pair`.
        eps: bounds the loss of a node and its gradient.
    """
    _, h, w, _ = forward[0].probability.shape
    valid = torch.stack(path_inside(forward))
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    has_target = (x >= shift[0]) & (x < w + shift[0]) & (y >= shift[1]) & (y < h + shift[1])
    valid = (valid & has_target.to(valid.device)).flatten(2).to(forward[0].probability.dtype)

    returns, weights = [return_of_pair(forward[0], backward[0], shift).flatten(1)], [valid[0]]
    if len(forward) > 1:
        chosen = draw(valid[0], starts)
        returns += returns_of_walk(forward, backward, chosen, shift)[1:]
        weights += [v.gather(1, chosen) for v in valid[1:]]
    return mean_of_cycles([(p + eps).log() for p in returns], weights)


def draw(like: Tensor, starts: int) -> Tensor:
    """Draw distinct nodes (B, S) for each clip of (B, N), S = `starts` or all N."""
    b, n = like.shape
    return torch.rand(b, n, device=like.device).argsort(1)[:, : min(starts, n)]


def mean_of_cycles(logs: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Mean over sub-cycles and clips of the weighted mean over nodes of -log R_m, of pairs of (B, S)."""
    per_cycle = [-(log * v).sum(1) / v.sum(1).clamp(min=1) for log, v in zip(logs, weights, strict=True)]
    return torch.stack(per_cycle).mean()
