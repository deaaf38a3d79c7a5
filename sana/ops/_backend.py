"""Choice of implementation, shared by all operations."""

import functools
import importlib.util

import torch

BACKENDS = ("auto", "torch", "triton")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LOWEST_CAPABILITY = (8, 0)
"""The first NVIDIA GPUs with bfloat16 tensor cores (A100)."""


def use_triton(backend: str, *tensors: torch.Tensor, obstacle: str | None = None) -> bool:
    """Whether the operation on `tensors` runs as a Triton kernel.

    Args:
        backend: "torch" never does, "triton" always, "auto" where it can on a GPU. (Triton's interpreter, which runs
            kernels on a CPU for tests, is slow: only "triton" takes it.)
        tensors: the arguments; the first one names the device.
        obstacle: what keeps a kernel from taking arguments of these shapes, if anything.

    Raises:
        ValueError: an unknown backend, or "triton" where no kernel can run.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}: choose one of {', '.join(BACKENDS)}")
    device = tensors[0].device
    if backend == "torch" or (backend == "auto" and device.type != "cuda"):
        return False
    for tensor in tensors:
        if tensor.dtype not in KERNEL_DTYPES:
            obstacle = obstacle or f"there is no kernel for {tensor.dtype}"
        if tensor.device != device:
            raise ValueError(f"the arguments are on two devices, {device} and {tensor.device}")
        if tensor.numel() == 0:
            obstacle = obstacle or f"an argument is empty: {tuple(tensor.shape)}"
    obstacle = obstacle or _device_obstacle(device.type, device.index)
    if obstacle and backend == "triton":
        raise ValueError(f"backend 'triton': {obstacle}; choose backend 'auto' (model.kernels: auto)")
    return obstacle is None


# The compiler takes the answer as a constant instead of tracing into Triton's settings.
@torch.compiler.assume_constant_result
def _device_obstacle(kind: str, index: int | None) -> str | None:
    """Why kernels do not run on a device, or None."""
    return _find_obstacle(kind, index)


@functools.cache
def _find_obstacle(kind: str, index: int | None) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if kind != "cuda":
        return None if interpreted() else f"kernels need a CUDA GPU, the tensors are on {kind}"
    if torch.version.hip is None and torch.cuda.get_device_capability(index) < LOWEST_CAPABILITY:
        least, name = ".".join(map(str, LOWEST_CAPABILITY)), torch.cuda.get_device_name(index)
        return f"kernels need a GPU of compute capability {least}, {name} has less"
    return None


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1), on tensors of any device."""
    from triton import knobs

    return knobs.runtime.interpret
