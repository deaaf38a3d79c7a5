"""The Triton modulated LayerNorm as an operator that autograd and torch.compile know. Kept: x and scale."""

from typing import Any

import torch

from sana.ops._operator import operator


def _forward(
    x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, eps: float, dtype: torch.dtype
) -> torch.Tensor:
    """x: (B, N, D); shift, scale: (B, 1, D) -> (B, N, D) of the given dtype."""
    from sana.ops.norm_modulate import triton_kernels

    return triton_kernels.forward(x, shift, scale, eps, dtype)


def _launch_backward(
    x: torch.Tensor, scale: torch.Tensor, grad: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    from sana.ops.norm_modulate import triton_kernels

    return triton_kernels.backward(x, scale, grad, eps)


def _fake(
    x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, eps: float, dtype: torch.dtype
) -> torch.Tensor:
    return x.new_empty(x.shape, dtype=dtype)


def _fake_backward(
    x: torch.Tensor, scale: torch.Tensor, grad: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), x.new_empty((x.shape[0], 2, x.shape[2]), dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, shift, scale, ctx.eps, _ = inputs
    ctx.shift_dtype = shift.dtype
    ctx.save_for_backward(x, scale)


def _differentiate(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, scale = ctx.saved_tensors
    dx, both = _backward(x, scale, grad, ctx.eps)
    dshift, dscale = both.chunk(2, dim=1)
    return dx, dshift.to(ctx.shift_dtype), dscale.to(scale.dtype), None, None


_backward = operator("norm_modulate_backward", _launch_backward, fake=_fake_backward)
norm_modulate_triton = operator(
    "norm_modulate", _forward, fake=_fake, save=_save, differentiate=_differentiate
)
