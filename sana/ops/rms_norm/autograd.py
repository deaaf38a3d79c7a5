"""The Triton RMS norm as an operator that autograd and torch.compile know. Kept: x and weight."""

from typing import Any

import torch

from sana.ops._operator import operator


def _forward(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x: (rows, D); weight: (D,) -> (rows, D) in the dtype of x."""
    from sana.ops.rms_norm import triton_kernels

    return triton_kernels.forward(x, weight, eps)


def _launch_backward(
    x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    from sana.ops.rms_norm import triton_kernels

    return triton_kernels.backward(x, weight, grad, eps)


def _fake(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x.new_empty(x.shape)


def _fake_backward(
    x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape, dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _differentiate(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    dx, dweight = _backward(x, weight, grad, ctx.eps)
    return dx, dweight.to(weight.dtype), None


_backward = operator("rms_norm_backward", _launch_backward, fake=_fake_backward)
rms_norm_triton = operator("rms_norm", _forward, fake=_fake, save=_save, differentiate=_differentiate)
