"""Depthwise convolution and gate in plain PyTorch: the definition, and the path without a kernel."""

import torch
import torch.nn.functional as F


def depthwise_glu_reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, silu: bool = False
) -> torch.Tensor:
    """See `sana.ops.mix_ffn.depthwise_glu` for the equation and the arguments."""
    if silu:
        x = F.silu(x)
    # The permuted view is a channels-last image: no copy on either side.
    mixed = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=1, groups=weight.shape[0])
    value, gate = mixed.permute(0, 2, 3, 1).chunk(2, dim=-1)
    return value * F.silu(gate)
