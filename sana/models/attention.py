"""The two attentions of a block: linear among image tokens, softmax from image to text tokens.

Shapes: B batch, N image tokens, L text tokens, D hidden size, H heads, d = D / H channels a head.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from sana.models.layers import Linear, RMSNorm
from sana.ops.linear_attention import linear_attention, linear_attention_qkv

LINEAR_ATTENTION_EPS = 1e-8
"""Added to the normaliser of the linear attention (reference: every SanaMS block)."""

SELF_QK_NORM_EPS = 1e-5
CROSS_QK_NORM_EPS = 1e-6
"""The reference's two values; diffusers uses 1e-5 for both."""

FP16_MAX = 65504.0
"""The largest float16."""


def split_heads(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    """(B, N, D) -> (B, H, N, d): channel c belongs to head c // d."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(x: torch.Tensor) -> torch.Tensor:
    """(B, H, N, d) -> (B, N, D)."""
    return x.transpose(1, 2).flatten(2)


def _qk_norm(hidden_size: int, wanted: bool, eps: float, kernels: str) -> nn.Module:
    return RMSNorm(hidden_size, eps=eps, kernels=kernels) if wanted else nn.Identity()


class LinearSelfAttention(nn.Module):
    """Self-attention with a ReLU feature map: cost linear in the number of tokens."""

    def __init__(
        self,
        hidden_size: int,
        *,
        head_dim: int,
        qk_norm: bool,
        fp32: bool,
        clamp: bool = False,
        kernels: str = "auto",
    ) -> None:
        super().__init__()
        self.qk_norm = qk_norm
        self.kernels = kernels
        self.num_heads = hidden_size // head_dim
        self.fp32 = fp32
        self.clamp = clamp
        self.qkv = Linear(hidden_size, 3 * hidden_size, bias=False)
        self.proj = Linear(hidden_size, hidden_size)
        # Over the full width, before the heads are split.
        self.q_norm = _qk_norm(hidden_size, qk_norm, SELF_QK_NORM_EPS, kernels)
        self.k_norm = _qk_norm(hidden_size, qk_norm, SELF_QK_NORM_EPS, kernels)

    def forward(self, x: torch.Tensor, *, perturbed: bool = False) -> torch.Tensor:
        """x: (B, N, D) -> (B, N, D).

        `perturbed` makes the attention map the identity, proj(V x), for perturbed-attention guidance
        (arXiv 2403.17377). With `clamp` the output is clipped to the range of float16, in any dtype.
        """
        qkv = self.qkv(x)
        settings = {"eps": LINEAR_ATTENTION_EPS, "fp32": self.fp32, "backend": self.kernels}
        if perturbed:
            mixed = qkv.chunk(3, dim=-1)[2]
        elif self.qk_norm:
            q, k, v = qkv.chunk(3, dim=-1)
            q, k, v = (split_heads(part, self.num_heads) for part in (self.q_norm(q), self.k_norm(k), v))
            mixed = merge_heads(linear_attention(q, k, v, **settings))
        else:
            mixed = linear_attention_qkv(qkv, self.num_heads, **settings)
        output = self.proj(mixed)
        return output.clamp(-FP16_MAX, FP16_MAX) if self.clamp else output


class FoldedText(NamedTuple):
    """Keys and values of a text, multiplied into the projections beside them, as `CrossAttention.fold` makes them."""

    keys: torch.Tensor
    """(B, H L, D): the row of head h and token l is W_q,h^T k_hl."""
    bias: torch.Tensor
    """(B, 1, H L): b_q,h . k_hl / sqrt(d), and minus infinity where the token is masked."""
    values: torch.Tensor
    """(B, H L, D): W_o,h v_hl."""


class CrossAttention(nn.Module):
    """Softmax attention from image tokens to text tokens."""

    def __init__(self, hidden_size: int, *, num_heads: int, qk_norm: bool, kernels: str = "auto") -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = hidden_size // num_heads
        self.q_linear = Linear(hidden_size, hidden_size)
        self.kv_linear = Linear(hidden_size, 2 * hidden_size)
        self.proj = Linear(hidden_size, hidden_size)
        self.q_norm = _qk_norm(hidden_size, qk_norm, CROSS_QK_NORM_EPS, kernels)
        self.k_norm = _qk_norm(hidden_size, qk_norm, CROSS_QK_NORM_EPS, kernels)

    def keys_values(self, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """text: (B, L, D) -> keys and values, (B, H, L, d) each, of neither image nor timestep."""
        k, v = self.kv_linear(text).chunk(2, dim=-1)
        return split_heads(self.k_norm(k), self.num_heads), split_heads(v, self.num_heads)

    def can_fold(self, keys: torch.Tensor) -> bool:
        """Whether `fold` may take these keys, and saves work: fewer tokens than channels in a head.

        Layers that were replaced or hold another kind of weight (LoRA, shards, int8) are used as they are; with
        gradients, the two products of `fold` would have to be differentiated.
        """
        layers = (self.q_linear, self.proj)
        plain = all(type(layer) is Linear and type(layer.weight) is nn.Parameter for layer in layers)
        # An offloaded layer is elsewhere, and comes for `forward` alone.
        plain = plain and self.proj.weight.device == keys.device
        unchanged = plain and isinstance(self.q_norm, nn.Identity) and keys.dtype == self.proj.weight.dtype
        return unchanged and not torch.is_grad_enabled() and keys.shape[-2] < keys.shape[-1]

    def fold(self, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None) -> FoldedText:
        """The text's side of the attention, in products that do not depend on the image.

        (W_q x + b_q) . k = x . (W_q^T k) + b_q . k, and the output projection of a sum is the sum of the projections.
        `read` then costs 4 N H L D operations, where `forward` costs 4 N D^2 + 4 N L D.

        Args:
            keys, values: (B, H, L, d).
            mask: (B, 1, 1, L) bool, or None.
        """
        heads = self.num_heads
        into_heads = self.q_linear.weight.unflatten(0, (heads, -1))  # (H, d, D)
        out_of_heads = self.proj.weight.unflatten(1, (heads, -1)).permute(1, 2, 0)  # (H, d, D)
        bias = (keys * self.q_linear.bias.view(heads, 1, -1)).sum(-1, keepdim=True).transpose(2, 3)
        bias = bias * keys.shape[-1] ** -0.5
        if mask is not None:
            bias = bias.masked_fill(~mask, float("-inf"))
        return FoldedText(
            keys=(keys @ into_heads).flatten(1, 2),
            bias=bias.flatten(1).unsqueeze(1),
            values=(values @ out_of_heads).flatten(1, 2),
        )

    def read(self, x: torch.Tensor, text: FoldedText) -> torch.Tensor:
        """`forward` with a folded text: x (B, N, D) -> (B, N, D)."""
        scale = self.head_dim**-0.5
        scores = torch.baddbmm(text.bias, x, text.keys.transpose(1, 2), alpha=scale)
        scores = scores.unflatten(-1, (self.num_heads, -1))
        return torch.baddbmm(self.proj.bias, scores.softmax(dim=-1).flatten(2), text.values)

    def forward(
        self, x: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """x: (B, N, D); keys, values: (B, H, L, d); mask: (B, 1, 1, L) bool or None -> (B, N, D)."""
        q = split_heads(self.q_norm(self.q_linear(x)), self.num_heads)
        return self.proj(merge_heads(softmax_attention(q, keys, values, mask)))


def softmax_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """softmax(q k^T / sqrt(d) + bias) v with a bias of minus infinity where `mask` is False.

    q: (B, H, N, d); k, v: (B, H, L, d); mask: broadcastable to (B, H, N, L) -> (B, H, N, d).
    """
    if q.device.type == "cpu" and q.requires_grad and q.dtype.itemsize == 2:
        # PyTorch's fused CPU kernel is slow backwards in half precision: 64 ms against 12 ms for forward and
        # backward of B 64, H 7, N = L 64, d 32 in bfloat16 on one core of an AVX512-BF16 EPYC (torch 2.14.1).
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        return scores.softmax(dim=-1, dtype=torch.float32).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
