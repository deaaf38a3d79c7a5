"""Gated residual in plain PyTorch: the definition, and the path without a kernel."""

import torch


def gate_residual_reference(x: torch.Tensor, gate: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
    """See `sana.ops.gate_residual` for the equation and the arguments."""
    return x + gate * branch
