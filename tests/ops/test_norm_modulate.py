"""Modulated LayerNorm against its equation in float64."""

import pytest
import torch

from sana.ops.norm_modulate import norm_modulate
from tests.numerics import assert_close


@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_equals_the_equation(eps):
    generator = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(2, 5, 60, generator=generator) + 1).requires_grad_()
    shift, scale = (torch.randn(2, 1, 60, generator=generator, requires_grad=True) for _ in range(2))
    wide = x.double()
    centred = wide - wide.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    reference = normed * (1 + scale.double()) + shift.double()
    actual = norm_modulate(x, shift, scale, eps=eps)
    assert_close("y", actual, reference, rel_rms=1e-6)  # measured: 1e-7
    cotangent = torch.randn(actual.shape, generator=generator)
    gradients = torch.autograd.grad(actual, (x, shift, scale), cotangent)
    references = torch.autograd.grad(reference, (x, shift, scale), cotangent.double())
    for name, gradient, expected in zip(("dx", "dshift", "dscale"), gradients, references, strict=True):
        assert_close(name, gradient, expected, rel_rms=1e-6)  # measured: at most 2e-7


def test_unknown_backend_is_refused():
    x = torch.zeros(1, 1, 4)
    with pytest.raises(ValueError, match="unknown backend 'cuda'"):
        norm_modulate(x, x, x, eps=1e-6, backend="cuda")
