"""Compile every kernel for a GPU that need not be there, at the launch settings of real shapes; print what each takes.

Run in a process of its own, without TRITON_INTERPRET: `python compile_kernels.py 90 bfloat16 0.6B`. One JSON line for each kernel:
name, (batch, tokens a side), registers, bytes of stack (spills), bytes of shared memory, warps.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

# Model: (width, heads of 32, inner width of the Mix-FFN).
MODELS = {"0.6B": (1152, 36, 2880), "1.6B": (2240, 70, 5600)}
# (batch, tokens a side): one image with guidance at 512 and 4096 pixels, and a training batch.
SHAPES = [(2, 16), (2, 128), (32, 32)]


class Device:
    """Enough of a Triton driver to compile for a target."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def launches(batch: int, side: int, width: int, heads: int, inner: int, dtype: torch.dtype) -> None:
    """Call the launchers of all kernels with tensors without memory."""
    from sana.ops.gate_residual import triton_kernels as gate_residual
    from sana.ops.linear_attention import triton_kernels as linear_attention
    from sana.ops.mix_ffn import triton_kernels as mix_ffn
    from sana.ops.norm_modulate import triton_kernels as norm_modulate
    from sana.ops.rms_norm import triton_kernels as rms_norm

    tokens = side * side

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    q, k, v = empty(batch, tokens, 3, heads, 32).permute(2, 0, 3, 1, 4).unbind(0)
    out, state = linear_attention.forward(q, k, v, 1e-8)
    linear_attention.backward(q, k, v, state, out.transpose(1, 2), 1e-8)
    for silu in (False, True):
        x, weight, bias = empty(batch, side, side, 2 * inner), empty(2 * inner, 1, 3, 3), empty(2 * inner)
        y = mix_ffn.forward(x, weight, bias, silu)
        mix_ffn.backward(x, weight, bias, y, silu)
    x, row = empty(batch, tokens, width), empty(batch, 6, width)[:, :1]
    norm_modulate.backward(x, row, norm_modulate.forward(x, row, row, 1e-6, dtype), 1e-6)
    gate_residual.backward(row, x, gate_residual.forward(x, row, x))
    x, weight = empty(batch * tokens, 3 * width)[:, :width], empty(width)
    rms_norm.backward(x, weight, rms_norm.forward(x, weight, 1e-5), 1e-5)


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes of stack, where spilled registers go."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        command = [tool, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    return int(found[1]), int(found[2])


def main(capability: str, dtype: str, model: str) -> None:
    triton.runtime.driver.set_active(Device(int(capability)))
    run, seen = JITFunction.run, []

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if kernel not in seen:
            seen.append(kernel)
            registers, stack = resources(kernel.asm["cubin"])
            row = {"kernel": f"{self.fn.__module__.split('.')[-2]}.{self.fn.__name__}", "shape": shape}
            row |= {"registers": registers, "stack": stack, "shared": kernel.metadata.shared}
            sys.stdout.write(json.dumps(row | {"warps": kernel.metadata.num_warps}) + "\n")

    JITFunction.run = compile_only
    for shape in SHAPES:
        launches(*shape, *MODELS[model], getattr(torch, dtype))


if __name__ == "__main__":
    main(*sys.argv[1:])
