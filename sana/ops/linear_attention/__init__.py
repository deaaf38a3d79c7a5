"""ReLU linear attention (Sana, arXiv 2410.10629, section 2.2; spec of the reference: LiteLA)."""

import torch

from sana.ops._backend import use_triton
from sana.ops.linear_attention.autograd import linear_attention_qkv_triton, linear_attention_triton
from sana.ops.linear_attention.reference import linear_attention_reference

KERNEL_HEAD_DIM = 32
"""Channels of a head in every published model, and the only number that the kernels take."""


def linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    eps: float,
    fp32: bool = True,
    backend: str = "auto",
) -> torch.Tensor:
    """Non-causal linear attention with a ReLU feature map, linear in the number of tokens.

    With q' = relu(q), k' = relu(k), S = sum_m k'_m v_m^T and z = sum_m k'_m:

        o_n = (q'_n S) / (q'_n . z + eps)

    There is no softmax, no 1/sqrt(D) and no 1/N. Outputs are convex combinations of the rows of v (but for
    eps), so they never leave its range.

    Args:
        q, k, v: (B, H, N, D), one dtype, any strides. Float64 stays float64 wherever float32 is said here.
        eps: added to the normaliser, in float32.
        fp32: compute S, z and both products in float32 whatever the input dtype; False computes them in the
            input dtype, which rounds S, z and the products, and only divides in float32. The kernels always sum in
            float32.
        backend: "torch", "triton" (D = 32 only) or "auto".

    Returns:
        (B, H, N, D) in the dtype of v; from the kernels a view of (B, N, H, D).

    Raises:
        ValueError: shapes or dtypes that do not fit each other; "triton" where no kernel can run.
    """
    if q.ndim != 4 or q.shape != k.shape or q.shape != v.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"q, k and v must be (B, H, N, D) of one shape, got {shapes}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    if use_triton(backend, q, k, v, obstacle=_obstacle(q.shape[-1])):
        return linear_attention_triton(q, k, v, eps)[0].transpose(1, 2)
    return linear_attention_reference(q, k, v, eps=eps, fp32=fp32)


def linear_attention_qkv(
    qkv: torch.Tensor, num_heads: int, *, eps: float, fp32: bool = True, backend: str = "auto"
) -> torch.Tensor:
    """`linear_attention` of the output of one projection, which spares the kernels' backward pass two copies.

    Args:
        qkv: (B, N, 3 H D): all of q, then k, then v; channel c of each belongs to head c // D.
        num_heads: H.
        eps, fp32, backend: as in `linear_attention`.

    Returns:
        (B, N, H D).

    Raises:
        ValueError: as in `linear_attention`.
    """
    if qkv.ndim != 3 or qkv.shape[-1] % (3 * num_heads):
        raise ValueError(f"qkv must be (B, N, 3 H D) with H = {num_heads}, got {tuple(qkv.shape)}")
    if use_triton(backend, qkv, obstacle=_obstacle(qkv.shape[-1] // (3 * num_heads))):
        return linear_attention_qkv_triton(qkv, num_heads, eps)[0].flatten(2)
    q, k, v = (part.unflatten(-1, (num_heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
    return linear_attention_reference(q, k, v, eps=eps, fp32=fp32).transpose(1, 2).flatten(2)


def _obstacle(head_dim: int) -> str | None:
    """What keeps the kernels from heads of this size."""
    if head_dim == KERNEL_HEAD_DIM:
        return None
    return f"the kernels take heads of {KERNEL_HEAD_DIM} channels, got {head_dim}"
