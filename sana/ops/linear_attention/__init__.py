"""ReLU linear attention (Sana, arXiv 2410.10629, section 2.2; spec of the reference: LiteLA)."""

import torch

from sana.ops._backend import check_backend
from sana.ops.linear_attention.reference import linear_attention_reference


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
            input dtype, which rounds S, z and the products, and only divides in float32.
        backend: "torch" or "auto".

    Returns:
        (B, H, N, D) in the dtype of v.
    """
    check_backend(backend)
    return linear_attention_reference(q, k, v, eps=eps, fp32=fp32)
