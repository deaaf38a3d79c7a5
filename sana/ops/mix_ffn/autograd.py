"""The Triton middle of the Mix-FFN as an operator that autograd and torch.compile know. Kept: x, weight, bias."""

from typing import Any

import torch

from sana.ops._operator import operator


def _forward(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, silu: bool) -> torch.Tensor:
    """x: (B, h, w, 2F) -> (B, h, w, F)."""
    from sana.ops.mix_ffn import triton_kernels

    return triton_kernels.forward(x, weight, bias, silu)


def _launch_backward(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, grad: torch.Tensor, silu: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from sana.ops.mix_ffn import triton_kernels

    return triton_kernels.backward(x, weight, bias, grad, silu)


def _fake(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, silu: bool) -> torch.Tensor:
    return x.new_empty((*x.shape[:3], x.shape[3] // 2))


def _fake_backward(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, grad: torch.Tensor, silu: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    wide = torch.float32
    return (
        x.new_empty(x.shape),
        weight.new_empty(weight.shape, dtype=wide),
        bias.new_empty(bias.shape, dtype=wide),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, weight, bias, ctx.silu = inputs
    ctx.save_for_backward(x, weight, bias)


def _differentiate(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, weight, bias = ctx.saved_tensors
    dx, dweight, dbias = _backward(x, weight, bias, grad, ctx.silu)
    return dx, dweight.to(weight.dtype), dbias.to(bias.dtype), None


_backward = operator("depthwise_glu_backward", _launch_backward, fake=_fake_backward)
depthwise_glu_triton = operator(
    "depthwise_glu", _forward, fake=_fake, save=_save, differentiate=_differentiate
)
