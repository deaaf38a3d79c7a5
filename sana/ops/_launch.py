"""Launch settings as plain functions of the shape, shared by the kernels; nothing is tuned at run time."""

from contextlib import AbstractContextManager, nullcontext

import torch

PROGRAMS = 528
"""Programs that fill a large GPU: four for each of the 132 multiprocessors of an H100 or H200."""

TOKEN_BLOCK = 64
"""Tokens in a tile of the linear attention."""


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def pieces(length: int, others: int, *, multiple: int, programs: int = PROGRAMS) -> tuple[int, int]:
    """Cut `length` items into pieces, so that pieces x `others` is about `programs`.

    Returns:
        (number of pieces, items in each but the last); the latter a multiple of `multiple`.
    """
    wanted = max(1, programs // others)
    size = ceil_div(ceil_div(length, wanted), multiple) * multiple
    return ceil_div(length, size), size


def row_block(width: int) -> tuple[int, int]:
    """(block, warps) of a kernel that holds one row of `width` values: the next power of two, 16 values a thread."""
    block = 1 << max(width - 1, 1).bit_length()
    return block, min(max(block // 512, 1), 16)


def on_device(tensor: torch.Tensor) -> AbstractContextManager:
    """Make the tensor's GPU current: Triton launches on the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def unit_stride(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, copied only if its last dimension is not contiguous."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def autocast_dtype(kind: str, otherwise: torch.dtype) -> torch.dtype:
    """Autocast's dtype where it is on for devices of this kind."""
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else otherwise
