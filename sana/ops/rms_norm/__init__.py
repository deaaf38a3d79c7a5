"""RMS norm: of the caption, and of queries and keys (SANA-1.5, Sprint)."""

import torch

from sana.ops._backend import use_triton
from sana.ops.rms_norm.autograd import rms_norm_triton
from sana.ops.rms_norm.reference import rms_norm_reference


def rms_norm(x: torch.Tensor, weight: torch.Tensor, *, eps: float, backend: str = "auto") -> torch.Tensor:
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in float32 or wider.

    Args:
        x: (..., D).
        weight: (D,).
        eps: added to the mean square.
        backend: "torch", "triton" or "auto".

    Returns:
        (..., D) in the dtype of x.

    Raises:
        ValueError: a weight of another size; "triton" where no kernel can run.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(
            f"weight must be ({x.shape[-1]},) for x of {tuple(x.shape)}, got {tuple(weight.shape)}"
        )
    if use_triton(backend, x, weight):
        return rms_norm_triton(x.reshape(-1, x.shape[-1]), weight, eps).view(x.shape)
    return rms_norm_reference(x, weight, eps=eps)
