"""Linear layer in plain PyTorch: the definition, and the path that can be differentiated."""

import torch
import torch.nn.functional as F


def linear_reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, silu: bool = False
) -> torch.Tensor:
    """See `sana.ops.linear` for the equation and the arguments."""
    y = F.linear(x, weight, bias)
    return F.silu(y) if silu else y
