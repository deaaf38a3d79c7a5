"""Softmax attention takes another path on CPUs when it trains in half precision; both are one function."""

import pytest
import torch

from sana.models.attention import softmax_attention
from tests.numerics import assert_close


@pytest.mark.parametrize("masked", [True, False], ids=["mask", "no-mask"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 1e-2), (torch.float16, 1.2e-3)], ids=str)
def test_half_precision_training_path_equals_float32(dtype, bound, masked):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 3, 10, 16, generator=generator).to(dtype)
    k, v = (torch.randn(2, 3, 7, 16, generator=generator).to(dtype) for _ in range(2))
    mask = (torch.arange(7)[None] < torch.tensor([[7], [3]]))[:, None, None] if masked else None
    cotangent = torch.randn(q.shape, generator=generator)

    def run(dtype):
        inputs = [tensor.detach().to(dtype, copy=True).requires_grad_() for tensor in (q, k, v)]
        out = softmax_attention(*inputs, mask)
        return out, *torch.autograd.grad(out, inputs, cotangent.to(out.dtype))

    reference = run(torch.float32)  # measured errors: at most 3.7e-3 in bfloat16, 4.6e-4 in float16
    assert_close("inference", softmax_attention(q, k, v, mask), reference[0], rel_rms=bound)
    for name, half, full in zip(("o", "dq", "dk", "dv"), run(dtype), reference, strict=True):
        assert half.dtype == dtype
        assert_close(name, half, full, rel_rms=bound)
