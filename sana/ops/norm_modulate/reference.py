"""LayerNorm and modulation in plain PyTorch: the definition, and the path without a kernel."""

import torch
import torch.nn.functional as F


def norm_modulate_reference(
    x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, *, eps: float
) -> torch.Tensor:
    """See `sana.ops.norm_modulate` for the equation and the arguments."""
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift
