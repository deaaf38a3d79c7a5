"""Mix-FFN: a gated feed-forward network; its depthwise convolution also tells tokens where they are."""

from collections import OrderedDict

import torch
from torch import nn

from sana.ops.linear import linear
from sana.ops.mix_ffn import depthwise_glu


class PointwiseConv(nn.Conv2d):
    """A 1x1 convolution over channels-last input: a convolution's weights, a linear layer's speed."""

    def __init__(self, in_channels: int, out_channels: int, *, bias: bool) -> None:
        super().__init__(in_channels, out_channels, kernel_size=1, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in_channels) -> (..., out_channels)."""
        return linear(x, self.weight.flatten(1), self.bias)


def _named_conv(conv: nn.Conv2d) -> nn.Sequential:
    """Put the convolution under the name `conv`, as in the published checkpoints."""
    return nn.Sequential(OrderedDict(conv=conv))


class MixFFN(nn.Module):
    """1x1 convolution to 2F, SiLU, depthwise 3x3, value * SiLU(gate), 1x1 convolution back."""

    def __init__(self, hidden_size: int, inner_size: int, *, kernels: str = "auto") -> None:
        super().__init__()
        self.kernels = kernels
        both = 2 * inner_size
        self.inverted_conv = _named_conv(PointwiseConv(hidden_size, both, bias=True))
        self.depth_conv = _named_conv(nn.Conv2d(both, both, kernel_size=3, padding=1, groups=both))
        self.point_conv = _named_conv(PointwiseConv(inner_size, hidden_size, bias=False))

    def forward(self, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """x: (B, h w, D), grid = (h, w) -> (B, h w, D)."""
        x = self.inverted_conv(x).unflatten(1, grid)
        depth = self.depth_conv.conv
        x = depthwise_glu(x, depth.weight, depth.bias, silu=True, backend=self.kernels)
        return self.point_conv(x.flatten(1, 2))
