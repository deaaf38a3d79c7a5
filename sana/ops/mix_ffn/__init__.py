"""Depthwise 3x3 convolution with a gated linear unit: the middle of the Mix-FFN (arXiv 2410.10629, 2.2)."""

import torch

from sana.ops._backend import check_backend
from sana.ops.mix_ffn.reference import depthwise_glu_reference


def depthwise_glu(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, backend: str = "auto"
) -> torch.Tensor:
    """y = a * silu(g), with (a, g) = the halves of dwconv3x3(x) + bias; value first, gate second.

    Args:
        x: (B, h, w, 2F), channels last.
        weight: (2F, 1, 3, 3), the depthwise filters; zero padding of one keeps the grid.
        bias: (2F,).
        backend: "torch" or "auto".

    Returns:
        (B, h, w, F).
    """
    check_backend(backend)
    return depthwise_glu_reference(x, weight, bias)
