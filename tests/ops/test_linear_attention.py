"""Linear attention against its quadratic form in float64, forward and gradients."""

import pytest
import torch

from sana.ops.linear_attention import linear_attention
from tests.numerics import assert_close

EPS = 1e-8
SIZES = [(1, 1, 2, 32), (2, 3, 63, 32), (1, 2, 100, 20)]


def heads(b, h, n, d, dtype=torch.float32, seed=0, mean=0.0):
    """q, k, v as strided views of one (B, N, 3, H, D) tensor, as the model passes them."""
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(b, n, 3, h, d, generator=generator) + mean * torch.tensor([0.0, 0.0, 1.0]).view(3, 1, 1)
    return tuple(part.detach().requires_grad_() for part in qkv.to(dtype).permute(2, 0, 3, 1, 4).unbind(0))


def quadratic(q, k, v, eps):
    """The N x N attention matrix, written out in float64."""
    weights = torch.einsum("bhnd,bhmd->bhnm", q.double().relu(), k.double().relu())
    return torch.einsum("bhnm,bhme->bhne", weights / (weights.sum(-1, keepdim=True) + eps), v.double())


@pytest.mark.parametrize("size", SIZES, ids=lambda s: "B{}-H{}-N{}-D{}".format(*s))
@pytest.mark.parametrize("eps", [EPS, 1.0], ids=["small-eps", "large-eps"])
def test_equals_the_quadratic_form(size, eps):
    q, k, v = heads(*size)
    cotangent = torch.randn(size, generator=torch.Generator().manual_seed(1))
    actual, reference = linear_attention(q, k, v, eps=eps), quadratic(q, k, v, eps)
    assert_close("o", actual, reference, rel_rms=1e-6)  # measured: at most 1.2e-7
    gradients = torch.autograd.grad(actual, (q, k, v), cotangent)
    references = torch.autograd.grad(reference, (q, k, v), cotangent.double())
    for name, gradient, expected in zip(("dq", "dk", "dv"), gradients, references, strict=True):
        assert_close(name, gradient, expected, rel_rms=1e-6)  # measured: at most 2.2e-7


def test_scale_invariance():
    """Without eps the lengths of q_n and of all k do not matter: q_n.dq_n = 0, sum of k_n.dk_n = 0."""
    q, k, v = heads(2, 2, 50, 32)
    linear_attention(q, k, v, eps=0.0).square().sum().backward()
    scale = (q * q.grad).abs().sum()
    assert (q * q.grad).sum(-1).abs().max() < 1e-5 * scale
    assert (k * k.grad).sum((-2, -1)).abs().max() < 1e-5 * scale
    assert_close(
        "scaled", linear_attention(5 * q, 3 * k, v, eps=0.0), linear_attention(q, k, v, eps=0.0), rel_rms=1e-6
    )


def test_token_without_positive_query_gives_zero():
    q, k, v = heads(1, 1, 8, 32)
    dead = q.detach().clone()
    dead[:, :, 3] = -1.0
    out = linear_attention(dead.requires_grad_(), k, v, eps=EPS)
    assert not out[:, :, 3].any()
    out.sum().backward()
    assert dead.grad.isfinite().all()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 2e-3), (torch.float16, 3e-4)], ids=str)
def test_half_inputs_are_accumulated_in_float32(dtype, bound):
    """Only the output is rounded (measured: 1.5e-3 and 1.9e-4, the rounding alone)."""
    q, k, v = heads(1, 2, 1000, 32, dtype, mean=3.0)
    out = linear_attention(q, k, v, eps=EPS)
    assert out.dtype == dtype
    assert_close("o", out, quadratic(q, k, v, EPS), rel_rms=bound)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear_attention(q, k, v, eps=EPS), out)


def test_float16_normaliser_beyond_its_range():
    """N 4096 at standard deviation 4: the normaliser is about 3e5, over the 65504 of float16."""
    q, k, v = (4 * part for part in heads(1, 1, 4096, 32, torch.float16))
    out = linear_attention(q, k, v, eps=EPS)
    assert_close("o", out, quadratic(q, k, v, EPS), rel_rms=5e-4)
    assert not linear_attention(q, k, v, eps=EPS, fp32=False).isfinite().all()


def test_half_precision_products_on_request():
    """fp32=False rounds state and products too: about twice the error of rounding the output alone."""
    q, k, v = heads(1, 2, 1000, 32, torch.bfloat16, mean=3.0)
    rounded, reference = linear_attention(q, k, v, eps=EPS, fp32=False), quadratic(q, k, v, EPS)
    assert rounded.dtype == torch.bfloat16
    assert_close("o", rounded, reference, rel_rms=1e-2)
    assert not torch.equal(rounded, linear_attention(q, k, v, eps=EPS))


def test_float64_stays_float64():
    """For references of higher precision than the kernels under test."""
    q, k, v = (part.double() for part in heads(1, 2, 50, 32))
    assert_close("o", linear_attention(q, k, v, eps=EPS), quadratic(q, k, v, EPS), rel_rms=1e-14)


def test_unknown_backend_is_refused():
    q, k, v = heads(1, 1, 2, 4)
    assert torch.equal(
        linear_attention(q, k, v, eps=EPS, backend="torch"), linear_attention(q, k, v, eps=EPS)
    )
    with pytest.raises(ValueError, match="unknown backend 'cuda': choose one of auto, torch"):
        linear_attention(q, k, v, eps=EPS, backend="cuda")
