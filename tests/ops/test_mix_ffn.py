"""Depthwise convolution with gate against sums written out tap by tap in float64."""

import pytest
import torch

from sana.ops.mix_ffn import depthwise_glu
from tests.numerics import assert_close


def by_hand(x, weight, bias):
    """Every tap as a shifted sum; zero outside the grid."""
    x, weight = x.double(), weight.double()
    _, height, width, _ = x.shape
    mixed = bias.double().expand_as(x).clone()
    for i in range(height):
        for j in range(width):
            for di in (-1, 0, 1):
                for dj in (-1, 0, 1):
                    if 0 <= i + di < height and 0 <= j + dj < width:
                        mixed[:, i, j] = mixed[:, i, j] + x[:, i + di, j + dj] * weight[:, 0, di + 1, dj + 1]
    value, gate = mixed[..., : x.shape[-1] // 2], mixed[..., x.shape[-1] // 2 :]
    return value * gate * torch.sigmoid(gate)


@pytest.mark.parametrize("size", [(1, 1, 1, 2), (2, 3, 5, 12), (1, 7, 4, 66)], ids=str)
def test_equals_the_sum_over_taps(size):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, generator=generator, requires_grad=True)
    weight = torch.randn(size[-1], 1, 3, 3, generator=generator, requires_grad=True)
    bias = torch.randn(size[-1], generator=generator, requires_grad=True)
    actual, reference = depthwise_glu(x, weight, bias), by_hand(x, weight, bias)
    assert actual.shape == (*size[:-1], size[-1] // 2)
    assert_close("y", actual, reference, rel_rms=1e-6)  # measured: at most 2e-7
    cotangent = torch.randn(actual.shape, generator=generator)
    gradients = torch.autograd.grad(actual, (x, weight, bias), cotangent)
    references = torch.autograd.grad(reference, (x, weight, bias), cotangent.double())
    for name, gradient, expected in zip(("dx", "dweight", "dbias"), gradients, references, strict=True):
        assert_close(name, gradient, expected, rel_rms=1e-6)  # measured: at most 3e-7


def test_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="unknown backend 'cuda'"):
        depthwise_glu(torch.zeros(1, 1, 1, 2), torch.zeros(2, 1, 3, 3), torch.zeros(2), backend="cuda")
