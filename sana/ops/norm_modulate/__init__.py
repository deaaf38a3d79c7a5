"""LayerNorm with an adaptive scale and shift: the entry of both modulated branches of a block (adaLN)."""

import torch

from sana.ops._backend import use_triton
from sana.ops._launch import autocast_dtype
from sana.ops.norm_modulate.autograd import norm_modulate_triton
from sana.ops.norm_modulate.reference import norm_modulate_reference


def norm_modulate(
    x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, *, eps: float, backend: str = "auto"
) -> torch.Tensor:
    """y = LN(x) (1 + scale) + shift, where LN has no affine parameters and runs over the last dimension.

    Args:
        x: (B, N, D).
        shift, scale: (B, 1, D), or (1, 1, D).
        eps: of the LayerNorm.
        backend: "torch", "triton" or "auto".

    Returns:
        (B, N, D) in the widest dtype of the three. Under autocast the kernels return autocast's dtype, to which the
        linear layer behind would round anyway.

    Raises:
        ValueError: shapes that do not fit each other; "triton" where no kernel can run.
    """
    batch, _, width = x.shape
    for name, tensor in (("shift", shift), ("scale", scale)):
        if tensor.shape not in ((batch, 1, width), (1, 1, width)):
            raise ValueError(f"{name} must be (B, 1, D) for x of {tuple(x.shape)}, got {tuple(tensor.shape)}")
    if use_triton(backend, x, shift, scale):
        wide = torch.promote_types(torch.promote_types(x.dtype, shift.dtype), scale.dtype)
        shift, scale = shift.expand(batch, 1, width), scale.expand(batch, 1, width)
        return norm_modulate_triton(x, shift, scale, eps, autocast_dtype(x.device.type, wide))
    return norm_modulate_reference(x, shift, scale, eps=eps)
