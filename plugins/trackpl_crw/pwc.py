"""The regressor's network (paper, 3.2): PWC-lite's decoder, one estimator and one context network for all levels.

Names of the parameters equal those of the published PWC-lite checkpoints (ARFlow, flowwalk), see `weights`.

Glossary: level l of h x w nodes, coarse to fine; c(p, d) the cost volume, the mean over channels of x_s(p) x~_t(p + d)
for the 81 offsets d of a window of radius 4, x~_t being frame t warped by the flow so far; e the features of frame s
reduced to 32 channels; flow (B, 2, h, w) in level pixels.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trackpl_crw.pyramid import WIDTHS
from trackpl_crw.transition import local_correlation, upsample, warp

REACH = 4  # radius of the cost volume's window
REDUCED = 32  # channels of the features that the estimator sees
ESTIMATOR = (128, 128, 96, 64, 32)
CONTEXT = ((128, 1), (128, 2), (128, 4), (96, 8), (64, 16), (32, 1))  # channels, dilation


def _conv(inputs: int, outputs: int, kernel: int = 3, dilation: int = 1, last: bool = False) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, padding=(kernel - 1) * dilation // 2, dilation=dilation)
    return nn.Sequential(conv) if last else nn.Sequential(conv, nn.LeakyReLU(0.1, inplace=True))


def cost_volume(source: Tensor, target: Tensor) -> Tensor:
    """Correlate (B, C, h, w) with the window around: (B, 81, h, w), offsets row-major in (dy, dx), zero outside."""
    correlation = local_correlation(source, F.pad(target, [REACH] * 4), REACH)
    return correlation.permute(0, 3, 1, 2) / source.shape[1]


class ReducedEstimator(nn.Module):
    """Flow estimator in which every layer sees the two before it only."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        a, b, c, d, e = ESTIMATOR
        self.conv1 = _conv(inputs, a)
        self.conv2 = _conv(a, b)
        self.conv3 = _conv(a + b, c)
        self.conv4 = _conv(b + c, d)
        self.conv5 = _conv(c + d, e)
        self.predict_flow = _conv(d + e, 2, last=True)
        self.features = e

    @property
    def last(self) -> nn.Module:
        """The layer that gives the step of the flow."""
        return self.predict_flow

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return features for the context network and the step of the flow (B, 2, h, w)."""
        x1 = self.conv1(x)
        x2 = self.conv2(x1)
        x3 = self.conv3(torch.cat([x1, x2], 1))
        x4 = self.conv4(torch.cat([x2, x3], 1))
        x5 = self.conv5(torch.cat([x3, x4], 1))
        return x5, self.predict_flow(torch.cat([x4, x5], 1))


class DenseEstimator(nn.Module):
    """Flow estimator in which every layer sees all before it, the newest first."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        for i, width in enumerate(ESTIMATOR, 1):
            setattr(self, f"conv{i}", _conv(inputs, width))
            inputs += width
        self.conv_last = _conv(inputs, 2, last=True)
        self.features = inputs

    @property
    def last(self) -> nn.Module:
        """The layer that gives the step of the flow."""
        return self.conv_last

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return features for the context network and the step of the flow (B, 2, h, w)."""
        for i in range(1, len(ESTIMATOR) + 1):
            x = torch.cat([getattr(self, f"conv{i}")(x), x], 1)
        return x, self.conv_last(x)


class ContextNetwork(nn.Module):
    """Dilated convolutions that correct the flow by what they see far around."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        convs = []
        for width, dilation in CONTEXT:
            convs.append(_conv(inputs, width, dilation=dilation))
            inputs = width
        self.convs = nn.Sequential(*convs, _conv(inputs, 2, last=True))

    def forward(self, x: Tensor) -> Tensor:
        """Return the step of the flow (B, 2, h, w)."""
        return self.convs(x)


class Regressor(nn.Module):
    """g_reg: from features of both frames to the flow of every level.

    Args:
        levels: of the pyramid, see `FeaturePyramid`.
        reduce_dense: the reduced estimator (0.68 million values), or the dense one (1.78 million).
        from_walk: each level begins at the walk's flow where that is trusted, and at the level above elsewhere; the
            estimator sees which. Its first steps are zero, so that an untrained one gives just this flow.
    """

    def __init__(self, levels: int = 5, reduce_dense: bool = True, from_walk: bool = False) -> None:
        super().__init__()
        inputs = (2 * REACH + 1) ** 2 + REDUCED + 2 + from_walk
        self.flow_estimators = ReducedEstimator(inputs) if reduce_dense else DenseEstimator(inputs)
        self.context_networks = ContextNetwork(self.flow_estimators.features + 2)
        self.conv_1x1 = nn.ModuleList(_conv(c, REDUCED, kernel=1) for c in WIDTHS[levels:0:-1])
        if from_walk:
            for last in (self.flow_estimators.last, self.context_networks.convs[-1]):
                for value in last.parameters():
                    nn.init.zeros_(value)

    def forward(
        self,
        features: Sequence[Tensor],
        source: Sequence[Tensor],
        target: Sequence[Tensor],
        walk: Sequence[tuple[Tensor, Tensor]] | None = None,
    ) -> list[Tensor]:
        """Estimate the flow of each level, coarse to fine.

        Args:
            features: pyramid of frame s, (B, C_l, h, w) each.
            source: what the cost volume compares of frame s: the same features, or embeddings.
            target: likewise of frame t.
            walk: with `from_walk`, the walk's flow (B, 2, h, w) of each level and where to trust it, (B, 1, h, w) of
                0 and 1.
        """
        flow, flows = features[0].new_zeros(len(features[0]), 2, *features[0].shape[-2:], dtype=torch.float32), []
        for level, (x, s, t) in enumerate(zip(features, source, target, strict=True)):
            # Places and products in float32: half of it could not tell pixels of a large frame apart.
            with torch.autocast(x.device.type, enabled=False):
                s, t, flow = s.float(), t.float(), flow.float()
                if level:
                    flow = upsample(flow, 2)
                known = []
                if walk is not None:
                    matched, trusted = walk[level]
                    flow, known = torch.where(trusted.bool(), matched, flow), [trusted]
                if level or known:
                    t = warp(t, flow)
                cost = F.leaky_relu(cost_volume(s, t), 0.1, inplace=True)
            seen, step = self.flow_estimators(torch.cat([cost, self.conv_1x1[level](x), flow, *known], 1))
            flow = flow + step
            flow = flow + self.context_networks(torch.cat([seen, flow], 1))
            flows.append(flow.float())
        return flows
