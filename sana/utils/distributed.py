"""Which process this is: the only code in the package that reads the environment.

`torchrun` and `accelerate launch` set RANK, LOCAL_RANK and WORLD_SIZE; without them there is one process, rank 0.
"""

import atexit
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta

_alone: ContextVar[bool] = ContextVar("alone", default=False)


def _read(name: str, default: int) -> int:
    value = os.environ.get(name, "")
    if not value:
        return default
    if not value.isdigit():
        raise ValueError(
            f"environment variable {name}={value!r} is not a number; it is set by torchrun or accelerate"
        )
    return int(value)


def rank() -> int:
    """Index of this process among all of the run, from 0."""
    return 0 if _alone.get() else _read("RANK", 0)


def local_rank() -> int:
    """Index of this process on its machine, from 0: also the index of its GPU."""
    return _read("LOCAL_RANK", 0)


def world_size() -> int:
    """Number of processes of the run."""
    return 1 if _alone.get() else _read("WORLD_SIZE", 1)


def is_main() -> bool:
    """True in the one process that writes logs and merges results."""
    return rank() == 0


@contextmanager
def alone() -> Iterator[None]:
    """Let this process work as if it were the only one: it shares nothing out and waits for nobody."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def barrier(timeout: timedelta = timedelta(days=7)) -> None:
    """Wait until every process of the run is here; does nothing in a single process.

    Starts a gloo group if none exists, so it needs no GPU. The timeout is long because ranks may finish hours apart;
    a rank that dies is noticed by torchrun, which ends the others.
    """
    if world_size() == 1:
        return
    import torch.distributed as dist  # lazy: most users of this module need no torch

    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timeout)
        # A process that ends with its group's threads still running is sometimes aborted by the C++ runtime.
        atexit.register(dist.destroy_process_group)
    dist.barrier()
