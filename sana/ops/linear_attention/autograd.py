"""The Triton linear attention as operators that autograd and torch.compile know: no graph break.

Kept for the backward pass: q, k, v as given, and the float32 state of each head; nothing else grows with the tokens.
"""

from typing import Any

import torch

from sana.ops._launch import TOKEN_BLOCK, pieces
from sana.ops._operator import operator


def _heads(qkv: torch.Tensor, heads: int) -> tuple[torch.Tensor, ...]:
    """(B, N, 3 H D) -> q, k, v, views of (B, H, N, D)."""
    return qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """q, k, v: (B, H, N, 32) -> o (B, N, H, 32), and the state."""
    from sana.ops.linear_attention import triton_kernels

    return triton_kernels.forward(q, k, v, eps)


def _forward_qkv(qkv: torch.Tensor, heads: int, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of one (B, N, 3 H 32): its gradient is written in place, where three would be put together by copies."""
    from sana.ops.linear_attention import triton_kernels

    return triton_kernels.forward(*_heads(qkv, heads), eps)


def _launch_backward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, state: torch.Tensor, grad: torch.Tensor, eps: float
) -> torch.Tensor:
    from sana.ops.linear_attention import triton_kernels

    return triton_kernels.backward(q, k, v, state, grad, eps)


def _outputs_like(v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    batch, heads, tokens, dim = v.shape
    splits, _ = pieces(tokens, batch * heads, multiple=TOKEN_BLOCK)
    state = v.new_empty((batch * heads, splits, dim + 1, dim), dtype=torch.float32)
    return v.new_empty((batch, tokens, heads, dim)), state


def _fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    return _outputs_like(v)


def _fake_qkv(qkv: torch.Tensor, heads: int, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    return _outputs_like(_heads(qkv, heads)[2])


def _fake_backward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, state: torch.Tensor, grad: torch.Tensor, eps: float
) -> torch.Tensor:
    batch, heads, tokens, dim = v.shape
    return v.new_empty((batch, tokens, 3, heads, dim))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors, output[1])


def _save_qkv(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    qkv, ctx.heads, ctx.eps = inputs
    ctx.save_for_backward(qkv, output[1])


def _differentiate(ctx: Any, grad: torch.Tensor, _: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    *tensors, state = ctx.saved_tensors
    dqkv = _backward(*tensors, state, grad.transpose(1, 2), ctx.eps)
    return (*dqkv.permute(2, 0, 3, 1, 4).unbind(0), None)


def _differentiate_qkv(
    ctx: Any, grad: torch.Tensor, _: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    qkv, state = ctx.saved_tensors
    dqkv = _backward(*_heads(qkv, ctx.heads), state, grad.transpose(1, 2), ctx.eps)
    return dqkv.flatten(2), None, None


_backward = operator("linear_attention_backward", _launch_backward, fake=_fake_backward)
linear_attention_triton = operator(
    "linear_attention", _forward, fake=_fake, save=_save, differentiate=_differentiate
)
linear_attention_qkv_triton = operator(
    "linear_attention_qkv", _forward_qkv, fake=_fake_qkv, save=_save_qkv, differentiate=_differentiate_qkv
)
