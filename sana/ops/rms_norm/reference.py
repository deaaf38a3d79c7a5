"""RMS norm in plain PyTorch: the definition, and the path without a kernel."""

import torch


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, *, eps: float) -> torch.Tensor:
    """See `sana.ops.rms_norm` for the equation and the arguments."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (wide * weight.to(wide.dtype)).to(x.dtype)
