"""The Triton gated residual as an operator that autograd and torch.compile know. Kept: gate and branch."""

from typing import Any

import torch

from sana.ops._operator import operator


def _forward(x: torch.Tensor, gate: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
    """x, branch: (B, N, D); gate: (B, 1, D) -> (B, N, D) in the widest dtype."""
    from sana.ops.gate_residual import triton_kernels

    return triton_kernels.forward(x, gate, branch)


def _launch_backward(
    gate: torch.Tensor, branch: torch.Tensor, grad: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    from sana.ops.gate_residual import triton_kernels

    return triton_kernels.backward(gate, branch, grad)


def _fake(x: torch.Tensor, gate: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
    dtype = torch.promote_types(torch.promote_types(x.dtype, gate.dtype), branch.dtype)
    return x.new_empty(x.shape, dtype=dtype)


def _fake_backward(
    gate: torch.Tensor, branch: torch.Tensor, grad: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return branch.new_empty(branch.shape), gate.new_empty(gate.shape, dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, gate, branch = inputs
    ctx.x_dtype = x.dtype
    ctx.save_for_backward(gate, branch)


def _differentiate(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
    gate, branch = ctx.saved_tensors
    dbranch, dgate = _backward(gate, branch, grad)
    return grad.to(ctx.x_dtype), dgate.to(gate.dtype), dbranch


_backward = operator("gate_residual_backward", _launch_backward, fake=_fake_backward)
gate_residual_triton = operator(
    "gate_residual", _forward, fake=_fake, save=_save, differentiate=_differentiate
)
