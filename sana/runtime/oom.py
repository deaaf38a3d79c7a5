"""What running out of memory looks like."""

from __future__ import annotations

import ctypes
import gc

import torch

# Of PyTorch's allocator on a CPU, of C++ below it, and of the GPU libraries that take memory without PyTorch.
_MESSAGES = (
    "can't allocate memory",
    "not enough memory",
    "std::bad_alloc",
    "could not create a primitive",  # oneDNN, for want of memory for its code or its workspace
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory, of the machine or of a GPU, did not suffice."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _MESSAGES)


def free_memory() -> None:
    """Give back what nothing refers to any more. The error's traceback does refer to tensors: leave its `except` first."""
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # glibc keeps what lies below the end of its heap
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
