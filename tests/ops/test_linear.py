"""The linear layer of oneDNN against the definition, packed and not."""

import gc

import pytest
import torch

from sana.models.layers import Linear
from sana.ops.linear import linear, linear_reference, onednn
from tests.numerics import assert_close

pytestmark = pytest.mark.skipif(not onednn.AVAILABLE, reason="this build of PyTorch has no oneDNN")
# Measured: at most 2e-7 in float32; in bfloat16 the rounding of the result, 1.7e-3, and that before SiLU.
BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 4e-3}


@pytest.fixture
def seen(monkeypatch):
    """The weights that oneDNN was given: packed ones are not dense."""
    layouts, run = [], torch.ops.mkldnn._linear_pointwise

    def recorded(x, weight, *others):
        layouts.append(weight.layout)
        return run(x, weight, *others)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", recorded)
    return layouts


def case(dtype, rows=7):
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in ((2, rows, 24), (40, 24), (40,)))
    return x.to(dtype), weight.to(dtype), bias.to(dtype)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("silu", [False, True])
def test_equals_the_definition(dtype, silu, seen):
    x, weight, bias = case(dtype)
    for given in (bias, None):
        exact = linear_reference(
            x.double(), weight.double(), None if given is None else given.double(), silu=silu
        )
        assert_close("y", linear(x, weight, given, silu=silu), exact, rel_rms=BOUNDS[dtype])
    assert seen == [torch.strided] * 2


def test_what_onednn_cannot_do_goes_to_pytorch(seen):
    x, weight, bias = case(torch.float32)
    wanted = weight.clone().requires_grad_()
    linear(x, wanted, bias).sum().backward()
    assert_close("gradient", wanted.grad, x.sum((0, 1)).expand_as(weight), rel_rms=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight, bias).dtype == torch.bfloat16
    linear(x.double(), weight.double())
    assert not seen
    with torch.no_grad():
        linear(x, wanted, bias)
    assert len(seen) == 1


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_a_packed_weight_is_used_until_it_changes(dtype, seen):
    x, weight, bias = case(dtype)
    layer = Linear(24, 40)
    layer.weight, layer.bias = torch.nn.Parameter(weight), torch.nn.Parameter(bias)
    layer.requires_grad_(False)
    onednn.pack_weights([layer.weight], rows=14)
    exact = linear_reference(x.double(), weight.double(), bias.double())
    assert_close("packed", layer(x), exact, rel_rms=BOUNDS[dtype])
    layer.weight.mul_(2)  # as a LoRA does
    exact = linear_reference(x.double(), layer.weight.double(), bias.double())
    assert_close("changed", layer(x), exact, rel_rms=BOUNDS[dtype])
    assert seen == [torch._mkldnn, torch.strided]


def test_a_packed_weight_goes_with_its_layer():
    before = len(onednn._packed)
    layer = Linear(24, 40)
    onednn.pack_weights([layer.weight], rows=14)
    assert len(onednn._packed) == before + 1
    del layer
    gc.collect()
    assert len(onednn._packed) == before
