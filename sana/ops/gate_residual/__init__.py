"""Gated residual: the exit of both modulated branches of a block (adaLN)."""

import torch

from sana.ops._backend import use_triton
from sana.ops.gate_residual.autograd import gate_residual_triton
from sana.ops.gate_residual.reference import gate_residual_reference


def gate_residual(
    x: torch.Tensor, gate: torch.Tensor, branch: torch.Tensor, *, backend: str = "auto"
) -> torch.Tensor:
    """y = x + gate * branch.

    Args:
        x, branch: (B, N, D).
        gate: (B, 1, D), or (1, 1, D).
        backend: "torch", "triton" or "auto".

    Returns:
        (B, N, D) in the widest dtype of the three.

    Raises:
        ValueError: shapes that do not fit each other; "triton" where no kernel can run.
    """
    batch, _, width = x.shape
    if branch.shape != x.shape or gate.shape not in ((batch, 1, width), (1, 1, width)):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (x, gate, branch))
        raise ValueError(f"x, gate and branch must be (B, N, D), (B, 1, D) and (B, N, D), got {shapes}")
    if use_triton(backend, x, gate, branch):
        return gate_residual_triton(x, gate.expand(batch, 1, width), branch)
    return gate_residual_reference(x, gate, branch)
