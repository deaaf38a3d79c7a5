"""Every fused operation as a case: arguments, and how it is called. The kernels' tests run over all of them."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from sana.ops.gate_residual import gate_residual
from sana.ops.linear_attention import linear_attention, linear_attention_qkv
from sana.ops.mix_ffn import depthwise_glu
from sana.ops.norm_modulate import norm_modulate
from sana.ops.rms_norm import rms_norm

EPS = 1e-6
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Case:
    """An operation on arguments of certain shapes."""

    call: Callable[..., torch.Tensor]
    """Takes the arguments and `backend`."""
    shapes: tuple[tuple[int, ...], ...]
    """Of the arguments; every one gets a gradient."""
    permute: dict[int, tuple[int, ...]] = field(default_factory=dict)
    """Argument -> the order in which its dimensions lie in memory: not the one of its shape."""

    def arguments(self, dtype: torch.dtype, seed: int = 0) -> list[torch.Tensor]:
        """Normal values rounded to `dtype`; the last argument has a mean of 1.5."""
        generator = torch.Generator().manual_seed(seed)
        tensors = []
        for index, shape in enumerate(self.shapes):
            order = self.permute.get(index, tuple(range(len(shape))))
            stored = torch.randn([shape[i] for i in order], generator=generator)
            tensors.append(stored.permute([order.index(i) for i in range(len(shape))]))
        tensors[-1] = tensors[-1] + 1.5
        return [tensor.to(DEVICE, dtype).requires_grad_() for tensor in tensors]


def _attention(q, k, v, *, backend):
    return linear_attention(q, k, v, eps=EPS, backend=backend)


def _attention_qkv(qkv, *, backend):
    return linear_attention_qkv(qkv, 2, eps=EPS, backend=backend)


def _glu(x, weight, bias, *, backend):
    return depthwise_glu(x, weight, bias, backend=backend)


def _silu_glu(x, weight, bias, *, backend):
    return depthwise_glu(x, weight, bias, silu=True, backend=backend)


def _modulate(x, shift, scale, *, backend):
    return norm_modulate(x, shift, scale, eps=EPS, backend=backend)


def _gate(x, gate, branch, *, backend):
    return gate_residual(x, gate, branch, backend=backend)


def _rms(x, weight, *, backend):
    return rms_norm(x, weight, eps=EPS, backend=backend)


TOKENS_BEFORE_HEADS = (0, 2, 1, 3)
CASES = {
    "attention-B1-N1": Case(_attention, ((1, 1, 1, 32),) * 3),
    # Keys as the projection leaves them, queries and values as separate tensors; two splits.
    "attention-B3-N77": Case(_attention, ((3, 1, 77, 32),) * 3, {1: TOKENS_BEFORE_HEADS}),
    "attention-qkv-B1-N67": Case(_attention_qkv, ((1, 67, 192),)),
    "glu-B1-1x1": Case(_glu, ((1, 1, 1, 2), (2, 1, 3, 3), (2,))),
    # Two strips of rows, two of columns, transposed in memory.
    "glu-B1-9x9": Case(_glu, ((1, 9, 9, 6), (6, 1, 3, 3), (6,)), {0: (0, 2, 1, 3)}),
    "silu-glu-B3-2x3": Case(_silu_glu, ((3, 2, 3, 8), (8, 1, 3, 3), (8,))),
    # Two tiles of channels, the second of which is not full.
    "silu-glu-B1-1x2": Case(_silu_glu, ((1, 1, 2, 132), (132, 1, 3, 3), (132,))),
    "modulate-B1-N1": Case(_modulate, ((1, 1, 1), (1, 1, 1), (1, 1, 1))),
    "modulate-B3-N17": Case(_modulate, ((3, 17, 60), (3, 1, 60), (1, 1, 60)), {0: (1, 0, 2)}),
    "gate-B1-N1": Case(_gate, ((1, 1, 4), (1, 1, 4), (1, 1, 4))),
    "gate-B3-N17": Case(_gate, ((3, 17, 60), (3, 1, 60), (3, 17, 60)), {2: (0, 2, 1)}),
    "rms-N1": Case(_rms, ((1, 5), (5,))),
    "rms-B3-N17": Case(_rms, ((3, 17, 60), (60,)), {0: (1, 0, 2)}),
}


def differentiate(
    case: Case, arguments: list[torch.Tensor], cotangent: torch.Tensor, backend: str
) -> dict[str, torch.Tensor]:
    """The output and the gradient of each argument, by name."""
    output = case.call(*arguments, backend=backend)
    gradients = torch.autograd.grad(output, arguments, cotangent.to(output))
    return {"output": output.detach()} | {f"gradient {i}": g for i, g in enumerate(gradients)}


def exact(case: Case, arguments: list[torch.Tensor], cotangent: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same by the reference in float64."""
    wide = [argument.detach().double().requires_grad_() for argument in arguments]
    return differentiate(case, wide, cotangent, "torch")


def cotangent_of(case: Case, dtype: torch.dtype) -> torch.Tensor:
    """A random gradient of the output, rounded to `dtype`."""
    arguments = [argument.detach().double() for argument in case.arguments(torch.float32)]
    shape = case.call(*arguments, backend="torch").shape
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
