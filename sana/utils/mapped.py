"""Memory that this process holds without need: pages of mapped files that were read, and what the allocator keeps."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_MAPS = Path("/proc/self/maps")


def forget(files: Iterable[Path]) -> None:
    """Give back the pages of `files`; whoever reads such a tensor again reads the file. Does nothing where it cannot.

    Tensors that are views of these files must not have been written to: what was written is lost.
    """
    wanted = {str(file.resolve()) for file in files}
    for first, last, path in _mappings() if wanted else ():
        if path in wanted:
            _give_back(first, last)


def forget_tensor(tensor: Tensor) -> None:
    """`forget` for the part of a file that `tensor` is a view of; nothing where it is none, or not on the CPU."""
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        return
    start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    for first, last, path in _mappings():
        if first <= start and end <= last and path.startswith("/"):
            _give_back(start - start % mmap.PAGESIZE, end)


def trim() -> None:
    """Give back what was freed and the C library keeps for later; nothing where it cannot (only glibc can)."""
    give_back = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if give_back is not None:
        give_back(0)


def _mappings() -> Iterable[tuple[int, int, str]]:
    """(first address, last, file or nothing) of each mapping; Linux tells."""
    lines = _MAPS.read_text(encoding="utf-8", errors="replace").splitlines() if _MAPS.is_file() else ()
    for line in lines:
        place, *rest = line.split(maxsplit=5)
        first, last = (int(side, 16) for side in place.split("-"))
        yield first, last, rest[4] if len(rest) == 5 else ""


def _give_back(first: int, last: int) -> None:
    ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)
