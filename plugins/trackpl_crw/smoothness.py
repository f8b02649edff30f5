"""Edge-aware second-order smoothness of a flow (paper, Eq. 8)."""

from torch import Tensor


def smoothness(flow: Tensor, image: Tensor, edge_constant: float = 150.0) -> Tensor:
    """Penalise the second derivative of a flow where the image is even.

    Half the sum over both directions of mean( exp(-mean_c |lambda (I(p+d) - I(p-d))|) rho(f(p+d) - 2 f(p) + f(p-d)) ),
    rho(x) = sqrt(x^2 + 0.001^2); a direction with fewer than three samples adds nothing.

    Args:
        flow: (B, 2, h, w) in pixels of its level.
        image: (B, 3, h, w) in [0, 1].
        edge_constant: lambda.
    """
    total = flow.new_zeros(())
    for dim in (-1, -2):
        n = flow.shape[dim] - 2
        if n < 1:
            continue
        bend = flow.narrow(dim, 2, n) - 2 * flow.narrow(dim, 1, n) + flow.narrow(dim, 0, n)
        edge = (image.narrow(dim, 2, n) - image.narrow(dim, 0, n)).mul(edge_constant).abs().mean(1, keepdim=True)
        total = total + ((-edge).exp() * (bend**2 + 0.001**2).sqrt()).mean()
    return total / 2
