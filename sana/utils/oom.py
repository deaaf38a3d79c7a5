"""What running out of memory looks like, and giving back what nothing needs."""

from __future__ import annotations

import gc
import sys

from sana.utils import mapped

# Of PyTorch's allocators, of C++ and the system below them, and of the GPU libraries that take memory without PyTorch.
_MESSAGES = (
    "allocate memory",  # "can't", of PyTorch on a CPU; "Cannot", of the system
    "not enough memory",
    "std::bad_alloc",
    "could not create a primitive",  # oneDNN, for want of memory for its code or its workspace
    "out of memory",  # "CUDA", "HIP", ...
    "_STATUS_ALLOC_FAILED",  # cuBLAS, cuDNN
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory, of the machine or of a GPU, did not suffice. One about values never does."""
    if isinstance(error, MemoryError | ValueError | ArithmeticError):
        return isinstance(error, MemoryError)
    return any(text in str(error) for text in _MESSAGES)


def free_memory() -> None:
    """Give back what nothing refers to any more. The error's traceback does refer to tensors: leave its `except` first."""
    gc.collect()
    mapped.trim()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
