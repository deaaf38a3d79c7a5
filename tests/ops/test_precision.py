"""The algebra of the linear attention's backward kernels in plain PyTorch, its products rounded as tensor cores round.

The interpreter multiplies in float32 whatever the kernel asks for, so it cannot show what rounding does.
"""

import pytest
import torch

from sana.ops.linear_attention import linear_attention
from tests.numerics import assert_close

EPS = 1e-8


def bfloat16(x):
    return x.bfloat16().float()


def tf32(x):
    """Ten bits of mantissa, the rest cut off."""
    return (x.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)


def split(x):
    """As the kernels take sums for bfloat16 inputs: in two bfloat16 parts."""
    return bfloat16(x) + bfloat16(x - bfloat16(x))


def kernel_algebra(q, k, v, do, rounded, *, centring=True):
    """o, dq, dk, dv by the equations of triton_kernels.py for one head; `rounded` sums go into every product."""
    q, k = q.relu(), k.relu()
    state, z = k.mT @ v, k.sum(0)
    c = state.sum(0) / z.sum() if centring else torch.zeros_like(z)
    centred = state - z[:, None] * c
    length = q @ z
    inverse = 1 / (length + EPS)
    output = (q @ rounded(centred)) * inverse[:, None] + (length * inverse)[:, None] * c
    image = do @ rounded(centred).mT
    r = (EPS * (do @ c) - (q * image).sum(1)) * inverse.square()
    dq = torch.where(q > 0, image * inverse[:, None] + r[:, None] * z, 0)
    dstate = q.mT @ rounded(do * inverse[:, None])
    dz = (r[:, None] * q).sum(0) - dstate @ c
    dk = torch.where(k > 0, v @ rounded(dstate).mT + dz, 0)
    return output, dq, dk, k @ rounded(dstate)


@pytest.fixture(scope="module", params=[0.0, 3.0], ids=["mean-0", "mean-3"])
def long(request):
    """16384 tokens, v with a mean: inputs, and the exact results."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, do = (torch.randn(16384, 32, generator=generator) for _ in range(4))
    inputs = [bfloat16(x) for x in (q, k, v + request.param, do)]
    wide = [x.double()[None, None].requires_grad_() for x in inputs[:3]]
    output = linear_attention(*wide, eps=EPS)
    gradients = torch.autograd.grad(output, wide, inputs[3].double()[None, None])
    return request.param, inputs, [x[0, 0].detach() for x in (output, *gradients)]


# Largest relative error of o, dq, dk, dv; measured at mean 3: see the right column.
BOUNDS = {
    bfloat16: (1.5e-3, 4e-3, 1.2e-2, 5e-3),  # 2e-6, 1.6e-3, 5e-3, 1.9e-3
    tf32: (4e-4, 1e-3, 4e-3, 2e-3),  # 4e-7, 4e-4, 1.3e-3, 7e-4
    split: (1e-5, 1e-4, 3e-5, 1e-5),  # 6e-8, 4e-5, 8e-6, 3e-6
}


@pytest.mark.parametrize("rounded", BOUNDS, ids=lambda f: f.__name__)
def test_gradients_survive_a_mean_in_v(long, rounded):
    _, inputs, exact = long
    for name, actual, reference, bound in zip(
        ("o", "dq", "dk", "dv"), kernel_algebra(*inputs, rounded), exact, BOUNDS[rounded], strict=True
    ):
        assert_close(name, actual, reference, rel_rms=bound)


def test_without_centring_the_query_gradient_is_lost(long):
    """What the centring is for: the plain equations, rounded to bfloat16, give dq an error of its own size."""
    mean, inputs, exact = long
    dq = kernel_algebra(*inputs, bfloat16, centring=False)[1]
    error = ((dq - exact[1]).norm() / exact[1].norm()).item()
    assert error > 0.3 if mean else error < 1e-2
