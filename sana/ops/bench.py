"""What the fused operations take: Triton, eager and compiled PyTorch, beside what the device can do at most.

Shapes: B images of s x s tokens, D the model's width, F the inner width of its Mix-FFN.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from sana.ops.gate_residual import gate_residual
from sana.ops.linear import linear
from sana.ops.linear_attention import linear_attention_qkv
from sana.ops.mix_ffn import depthwise_glu
from sana.ops.norm_modulate import norm_modulate
from sana.ops.rms_norm import rms_norm

WIDTHS = {"0.6B": (1152, 2880), "1.6B": (2240, 5600)}
"""Model: (D, F)."""
EPS = 1e-6
LARGEST_ERROR = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Relative RMS error against float64 at which an implementation is wrong: a few roundings of the dtype."""

Timed = Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Operation:
    """An operation with the shapes of its arguments and the traffic of its kernels."""

    call: Callable[..., torch.Tensor]
    """Takes the arguments and `backend`."""
    shapes: tuple[tuple[int, ...], ...]
    forward: float
    """Values read and written by the kernels."""
    backward: float


def operations(model: str, batch: int, side: int) -> dict[str, Operation]:
    """Every operation of a block, by name. (Sums and tables that are small beside the tokens are not counted.)"""
    width, inner = WIDTHS[model]
    tokens = side * side
    unit, wide = batch * tokens * width, batch * tokens * inner
    x, row = (batch, tokens, width), (batch, 1, width)
    glu = ((batch, side, side, 2 * inner), (2 * inner, 1, 3, 3), (2 * inner,))

    def attend(qkv: torch.Tensor, *, backend: str) -> torch.Tensor:
        return linear_attention_qkv(qkv, width // 32, eps=EPS, backend=backend)

    def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, *, backend: str) -> torch.Tensor:
        return norm_modulate(x, shift, scale, eps=EPS, backend=backend)

    def silu_glu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, backend: str) -> torch.Tensor:
        return depthwise_glu(x, weight, bias, silu=True, backend=backend)

    def norm(x: torch.Tensor, weight: torch.Tensor, *, backend: str) -> torch.Tensor:
        return rms_norm(x, weight, eps=EPS, backend=backend)

    return {
        "linear_attention": Operation(attend, ((batch, tokens, 3 * width),), 4 * unit, 7 * unit),
        "depthwise_glu": Operation(depthwise_glu, glu, 3 * wide, 11 * wide),
        "silu_depthwise_glu": Operation(silu_glu, glu, 3 * wide, 11 * wide),
        "norm_modulate": Operation(modulate, (x, row, row), 2 * unit, 3 * unit),
        "gate_residual": Operation(gate_residual, (x, row, x), 3 * unit, 3 * unit),
        "rms_norm": Operation(norm, (x, (width,)), 2 * unit, 3 * unit),
    }


def arguments(operation: Operation, device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    """Normal values; every argument wants a gradient."""
    generator = torch.Generator(device).manual_seed(0)
    settings = {"device": device, "dtype": dtype, "generator": generator}
    return [torch.randn(shape, **settings).requires_grad_() for shape in operation.shapes]


def implementations(operation: Operation, device: torch.device, *, compiled: bool) -> dict[str, Callable]:
    """Name -> function of the arguments: triton (on CUDA), eager and, with `compiled`, inductor."""

    def eager(*tensors: torch.Tensor) -> torch.Tensor:
        return operation.call(*tensors, backend="torch")

    def triton(*tensors: torch.Tensor) -> torch.Tensor:
        return operation.call(*tensors, backend="triton")

    found: dict[str, Callable] = {"triton": triton} if device.type == "cuda" else {}
    found["eager"] = eager
    if compiled:
        torch.compiler.reset()  # all of these functions count as recompilations of one
        found["compiled"] = torch.compile(eager, fullgraph=True, dynamic=False)
    return found


def largest_error(
    operation: Operation, function: Callable, device: torch.device, dtype: torch.dtype
) -> float:
    """The largest relative RMS error of the output and the gradients against the reference in float64."""
    given = arguments(operation, device, dtype)
    wide = [tensor.detach().double().requires_grad_() for tensor in given]
    output, reference = function(*given), operation.call(*wide, backend="torch")
    cotangent = torch.randn_like(output)
    pairs = zip(
        (output, *torch.autograd.grad(output, given, cotangent)),
        (reference, *torch.autograd.grad(reference, wide, cotangent.double())),
        strict=True,
    )
    return max(((ours.double() - exact).norm() / exact.norm()).item() for ours, exact in pairs)


def measure(
    operation: Operation,
    functions: dict[str, Callable],
    device: torch.device,
    dtype: torch.dtype,
    repeats: int,
) -> Iterator[tuple[str, str, float, float]]:
    """Yield (pass, implementation, seconds, bytes a second) for each of both passes and each implementation."""
    given = arguments(operation, device, dtype)
    detached = [tensor.detach() for tensor in given]
    outputs = {name: function(*given) for name, function in functions.items()}
    cotangent = torch.randn_like(outputs["eager"])
    forward = {name: lambda f=function: f(*detached) for name, function in functions.items()}
    backward = {
        name: lambda o=output: torch.autograd.grad(o, given, cotangent, retain_graph=True)
        for name, output in outputs.items()
    }
    for direction, timed, values in (
        ("forward", forward, operation.forward),
        ("backward", backward, operation.backward),
    ):
        for name, seconds in medians(timed, device, repeats).items():
            yield direction, name, seconds, values * dtype.itemsize / seconds


def medians(functions: dict[str, Timed], device: torch.device, repeats: int) -> dict[str, float]:
    """Median seconds of each function; the functions take turns, so that what else happens meets all alike."""
    calls = 10 if device.type == "cuda" else 1  # one call is too short for the clock
    for function in functions.values():
        for _ in range(3):
            function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            _wait(device)
            start = time.perf_counter()
            for _ in range(calls):
                function()
            _wait(device)
            times[name].append((time.perf_counter() - start) / calls)
    return {name: statistics.median(values) for name, values in times.items()}


def ceilings(device: torch.device, dtype: torch.dtype, repeats: int) -> dict[str, float]:
    """Bytes a second of a copy far larger than the caches, and FLOP a second of a square matrix product.

    The product is that of `sana.ops.linear`: on a CPU, PyTorch's own is up to a third slower in float32.
    """
    large = device.type == "cuda"
    source = torch.randn(2**29 if large else 2**25, device=device, dtype=dtype)
    target = torch.empty_like(source)
    size = 8192 if large else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    taken = medians({"copy": lambda: target.copy_(source), "matmul": lambda: linear(a, b)}, device, repeats)
    return {
        "copy_bytes_per_second": 2 * source.numel() * dtype.itemsize / taken["copy"],
        "matmul_flop_per_second": 2 * size**3 / taken["matmul"],
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
