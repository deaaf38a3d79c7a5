"""Depthwise 3x3 convolution with a gated linear unit: the middle of the Mix-FFN (arXiv 2410.10629, 2.2)."""

import torch

from sana.ops._backend import use_triton
from sana.ops.mix_ffn.autograd import depthwise_glu_triton
from sana.ops.mix_ffn.reference import depthwise_glu_reference


def depthwise_glu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    silu: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """y = a * silu(g), with (a, g) = the halves of dwconv3x3(x) + bias; value first, gate second.

    Args:
        x: (B, h, w, 2F), channels last.
        weight: (2F, 1, 3, 3), the depthwise filters; zero padding of one keeps the grid.
        bias: (2F,).
        silu: take silu(x) first, in the same pass; x is then all that is kept for the backward pass.
        backend: "torch", "triton" or "auto".

    Returns:
        (B, h, w, F) in the dtype of x.

    Raises:
        ValueError: shapes that do not fit each other; "triton" where no kernel can run.
    """
    total = x.shape[-1]
    if x.ndim != 4 or total % 2 or weight.shape != (total, 1, 3, 3) or bias.shape != (total,):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (x, weight, bias))
        raise ValueError(f"x, weight and bias must be (B, h, w, 2F), (2F, 1, 3, 3) and (2F,), got {shapes}")
    if use_triton(backend, x, weight, bias):
        return depthwise_glu_triton(x, weight, bias, silu)
    return depthwise_glu_reference(x, weight, bias, silu=silu)
