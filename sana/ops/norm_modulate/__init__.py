"""LayerNorm with an adaptive scale and shift: the entry of both modulated branches of a block (adaLN)."""

import torch

from sana.ops._backend import check_backend
from sana.ops.norm_modulate.reference import norm_modulate_reference


def norm_modulate(
    x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, *, eps: float, backend: str = "auto"
) -> torch.Tensor:
    """y = LN(x) (1 + scale) + shift, where LN has no affine parameters and runs over the last dimension.

    Args:
        x: (B, N, D).
        shift, scale: (B, 1, D).
        eps: of the LayerNorm.
        backend: "torch" or "auto".

    Returns:
        (B, N, D).
    """
    check_backend(backend)
    return norm_modulate_reference(x, shift, scale, eps=eps)
