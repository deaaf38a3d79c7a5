"""Every Triton kernel, on the GPU or in Triton's interpreter, against float64 autograd of its reference."""

import pytest
import torch

from sana.ops.gate_residual.autograd import gate_residual_triton
from sana.ops.linear_attention import linear_attention
from sana.ops.linear_attention.autograd import linear_attention_qkv_triton, linear_attention_triton
from sana.ops.mix_ffn.autograd import depthwise_glu_triton
from sana.ops.norm_modulate import norm_modulate
from sana.ops.norm_modulate.autograd import norm_modulate_triton
from sana.ops.rms_norm.autograd import rms_norm_triton
from tests.numerics import assert_close
from tests.ops.cases import CASES, DEVICE, EPS, cotangent_of, differentiate, exact

# On a GPU the same tests are the check of the real kernels.
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []

HALVES = [torch.bfloat16, torch.float16]
# The interpreter truncates where it stores bfloat16: twice the error of rounding, before the other half is allowed.
TRUNCATION = {torch.bfloat16: 2.0 if DEVICE == "cpu" else 1.0, torch.float16: 1.0}
ROUNDING = {torch.bfloat16: 1.7e-3, torch.float16: 2.1e-4}
SMALL = ["attention-B3-N77", "glu-B1-1x1", "silu-glu-B3-2x3", "modulate-B3-N17", "gate-B3-N17", "rms-B3-N17"]


def relative_rms(actual, reference):
    difference = actual.double() - reference.double()
    return float(
        difference.square().mean().sqrt() / reference.double().square().mean().sqrt().clamp_min(1e-30)
    )


@pytest.mark.parametrize("name", CASES)
def test_float32_equals_float64(name):
    case = CASES[name]
    arguments, cotangent = case.arguments(torch.float32), cotangent_of(case, torch.float32)
    actual, reference = differentiate(case, arguments, cotangent, "triton"), exact(case, arguments, cotangent)
    for key, value in actual.items():
        # Of a single channel or token some gradients are zero, but for eps.
        if reference[key].abs().max() > 1e-4:
            assert_close(key, value, reference[key], rel_rms=1e-5)  # measured: at most 6e-7
        else:
            assert value.abs().max() < 1e-5, key


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", SMALL)
def test_half_precision_is_as_exact_as_eager(name, dtype):
    """At most twice the error of the eager operation in that dtype, or of rounding its exact result."""
    case = CASES[name]
    arguments, cotangent = case.arguments(dtype), cotangent_of(case, dtype)
    actual, eager = (differentiate(case, arguments, cotangent, backend) for backend in ("triton", "torch"))
    for key, reference in exact(case, arguments, cotangent).items():
        assert actual[key].dtype == dtype
        allowed = 2 * TRUNCATION[dtype] * max(relative_rms(eager[key], reference), ROUNDING[dtype])
        assert_close(key, actual[key], reference, rel_rms=allowed)


@pytest.mark.parametrize("name", ["attention-B3-N77", "glu-B1-1x1", "modulate-B3-N17", "rms-N1"])
def test_two_runs_are_equal(name):
    case = CASES[name]
    arguments, cotangent = case.arguments(torch.float32), cotangent_of(case, torch.float32)
    first, second = (differentiate(case, arguments, cotangent, "triton") for _ in range(2))
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


OPERATORS = {
    "attention": (linear_attention_triton, [(1, 1, 5, 32)] * 3, (EPS,)),
    "attention-qkv": (linear_attention_qkv_triton, [(1, 5, 96)], (1, EPS)),
    "glu": (depthwise_glu_triton, [(1, 1, 2, 4), (4, 1, 3, 3), (4,)], (True,)),
    "modulate": (norm_modulate_triton, [(1, 3, 4), (1, 1, 4), (1, 1, 4)], (EPS, torch.float32)),
    "gate": (gate_residual_triton, [(1, 3, 4), (1, 1, 4), (1, 3, 4)], ()),
    "rms": (rms_norm_triton, [(3, 4), (4,)], (EPS,)),
}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # by opcheck
@pytest.mark.parametrize(("operator", "shapes", "settings"), OPERATORS.values(), ids=OPERATORS)
def test_operator_is_registered_right(operator, shapes, settings):
    """Schema, shapes of the fake results, autograd, and tracing with symbolic shapes."""
    tensors = [torch.randn(shape, device=DEVICE, requires_grad=True) for shape in shapes]
    torch.library.opcheck(operator, (*tensors, *settings))


def test_saved_for_backward_is_small():
    """q, k and v are the caller's; what is kept besides does not grow with the tokens."""
    kept = []
    q, k, v = (torch.randn(1, 2, 128, 32, device=DEVICE, requires_grad=True) for _ in range(3))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        linear_attention(q, k, v, eps=EPS, backend="triton")
    ours = [x for x in kept if all(x.data_ptr() != given.data_ptr() for given in (q, k, v))]
    assert sum(x.numel() for x in ours) == 2 * 2 * 33 * 32  # heads x splits x (S and z)


def test_output_needs_no_transpose():
    q, k, v = (torch.randn(2, 3, 5, 32, device=DEVICE) for _ in range(3))
    out = linear_attention(q, k, v, eps=EPS, backend="triton")
    assert out.shape == (2, 3, 5, 32) and out.transpose(1, 2).is_contiguous()


@pytest.mark.filterwarnings(
    "ignore:(overflow|invalid value) encountered"
)  # the interpreter's numpy, as meant
@pytest.mark.parametrize("eps", [1e-8, 1e-37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_dead_heads_give_zero(dtype, eps):
    """Where no query channel is positive 1 / den is 1 / eps, and do / den may be infinite; where no key is, S and z are 0."""
    q, k, v = (torch.randn(1, 2, 8, 32, device=DEVICE).to(dtype) for _ in range(3))
    q[:, 0, 3] = -1.0
    k[:, 1] = -1.0
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out = linear_attention(q, k, v, eps=eps, backend="triton")
    assert not out[:, 0, 3].any() and not out[:, 1].any()
    out.backward(torch.full_like(out, 1e4))
    for gradient in (q.grad, k.grad, v.grad):
        assert gradient.isfinite().all()
    assert not q.grad[:, 0, 3].any() and not k.grad[:, 1].any()


def test_float16_sums_beyond_its_range():
    """Standard deviation 60: the normaliser is about 1e6 at 256 tokens, over the 65504 of float16."""
    q, k, v = (60 * torch.randn(1, 1, 256, 32, device=DEVICE) for _ in range(3))
    q, k, v = (x.half() for x in (q, k, v))
    reference = linear_attention(q.double(), k.double(), v.double(), eps=EPS)
    assert_close("o", linear_attention(q, k, v, eps=EPS, backend="triton"), reference, rel_rms=5e-4)


def test_autocast_dtype_of_the_modulation():
    """The linear layer behind would round to it anyway."""
    x, row = torch.randn(1, 3, 8, device=DEVICE), torch.randn(1, 1, 8, device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        out = norm_modulate(x, row, row, eps=EPS, backend="triton")
    assert out.dtype == torch.bfloat16
    assert norm_modulate(x.bfloat16(), row, row, eps=EPS, backend="triton").dtype == torch.float32


def test_triton_insists():
    narrow = torch.randn(1, 1, 4, 16, device=DEVICE)
    with pytest.raises(ValueError, match="'triton': the kernels take heads of 32 channels, got 16; choose"):
        linear_attention(narrow, narrow, narrow, eps=EPS, backend="triton")
    assert linear_attention(narrow, narrow, narrow, eps=EPS).shape == narrow.shape
    wide = torch.randn(1, 1, 4, 32, device=DEVICE, dtype=torch.float64)
    with pytest.raises(ValueError, match="there is no kernel for torch.float64"):
        linear_attention(wide, wide, wide, eps=EPS, backend="triton")
    empty, row = torch.randn(1, 0, 8, device=DEVICE), torch.randn(1, 1, 8, device=DEVICE)
    with pytest.raises(ValueError, match=r"an argument is empty: \(1, 0, 8\)"):
        norm_modulate(empty, row, row, eps=EPS, backend="triton")
    assert norm_modulate(empty, row, row, eps=EPS).shape == empty.shape
