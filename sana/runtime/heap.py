"""The C library's heap, on a CPU: what was freed and will be wanted again is kept."""

import ctypes
import functools
import sys

import torch

KEPT_BYTES = 256 * 2**20
"""Free memory that the process holds at most."""
MAPPED_BYTES = 32 * 2**20
"""Tensors from this size on are given back when they are freed; the most that glibc allows."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


@functools.cache
def keep_freed_memory(device: torch.device) -> None:
    """Let glibc keep the end of its heap, which it gives back to the system as soon as some MiB of it are free.

    A sampler's steps free and want the same tensors, and each of their pages is then made anew: at 256 x 256 pixels and
    batch 4 that took a quarter of the time. Other devices and C libraries are left alone.
    """
    if device.type != "cpu" or sys.platform != "linux":
        return
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES)
        mallopt(_M_MMAP_THRESHOLD, MAPPED_BYTES)
