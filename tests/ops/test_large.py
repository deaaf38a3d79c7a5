"""The last image of a batch is that image alone: on a GPU at 4096 pixels, in tensors of more values than 32 bits can count."""

import math

import pytest
import torch

from sana.ops import bench
from tests.numerics import assert_close
from tests.ops.cases import DEVICE

BYTES = 40 * 2**30
GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        DEVICE == "cpu" or torch.cuda.get_device_properties(0).total_memory < BYTES,
        reason="needs a CUDA device of 40 GiB",
    ),
]
SMALL = (64, 80)
"""Width and inner width for Triton's interpreter."""


@pytest.mark.parametrize("name", bench.operations("0.6B", 1, 1))
@pytest.mark.parametrize(
    ("model", "side", "values", "dtype"),
    [
        pytest.param("small", 3, 2**11, torch.float32, id="small"),
        pytest.param("1.6B", 128, 2**31, torch.bfloat16, id="4096", marks=GPU),
    ],
)
def test_last_image_of_a_batch_is_that_image_alone(name, model, side, values, dtype, monkeypatch):
    monkeypatch.setitem(bench.WIDTHS, "small", SMALL)
    single = bench.operations(model, 1, side)[name]
    batch = 1 + values // math.prod(single.shapes[0])
    many = bench.operations(model, batch, side)[name]
    given = bench.arguments(many, torch.device(DEVICE), dtype)
    own = [index for index, shape in enumerate(many.shapes) if shape != single.shapes[index]]  # of each image
    alone = [x.detach()[-1:] if index in own else x.detach() for index, x in enumerate(given)]
    output = many.call(*given, backend="triton")
    cotangent = torch.randn_like(output)
    wanted = [given[index] for index in own]
    found = [output.detach(), *torch.autograd.grad(output, wanted, cotangent)]
    for backend, kind in (("triton", dtype), ("torch", torch.float32)):
        inputs = [x.to(kind).requires_grad_() for x in alone]
        expected = single.call(*inputs, backend=backend)
        gradients = torch.autograd.grad(expected, [inputs[i] for i in own], cotangent[-1:].to(kind))
        for index, (actual, reference) in enumerate(zip(found, (expected, *gradients), strict=True)):
            bound = bench.LARGEST_ERROR[dtype]
            assert_close(f"{name} {index} {backend}", actual[-1:], reference, rel_rms=bound)
