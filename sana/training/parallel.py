"""How the processes of a run share the work: copies of the model (DDP), or shards of it (FSDP2)."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from sana.config import ConfigError, SanaConfig
from sana.models.transformer import SanaTransformer
from sana.utils.logging import get_logger

log = get_logger(__name__)
T = TypeVar("T")


def build_accelerator(config: SanaConfig) -> Accelerator:
    """The processes of this run, and its precision.

    Raises:
        ConfigError: a precision that the device cannot, or that does not go with sharding.
    """
    # DDP says it of depthwise kernels (C, 1, 3, 3), whose axis of length 1 has two correct strides.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    # accelerate shares the cores out.
    warnings.filterwarnings("ignore", "OMP_NUM_THREADS/MKL_NUM_THREADS unset")
    precision = {"fp16": "fp16", "bf16": "bf16", "fp32": "no"}[config.model.mixed_precision]
    if precision == "fp16" and not torch.cuda.is_available():
        log.warning("model.mixed_precision fp16 needs a GPU: training in bf16 instead")
        precision = "bf16"
    if precision == "fp16" and config.train.use_fsdp:
        raise ConfigError("model.mixed_precision: fp16 does not go with train.use_fsdp; use bf16")
    try:
        accelerator = Accelerator(
            cpu=not torch.cuda.is_available(),  # else processes without a GPU would not join each other
            mixed_precision=precision,
            gradient_accumulation_steps=config.train.gradient_accumulation_steps,
            step_scheduler_with_optimizer=False,
            # One rank may draw, encode or write for hours while the others wait; what hangs is the watchdog's to end.
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))],
        )
    except ValueError as error:
        raise ConfigError(f"model.mixed_precision: {error}") from error
    if config.train.use_fsdp and not dist.is_initialized():
        raise ConfigError(
            "train.use_fsdp: a single process has nothing to share with; start it by train.sh --np=N"
        )
    return accelerator


def together(processes: Accelerator | PartialState, function: Callable[[], T]) -> T:
    """What `function` gives in the main process, or the ValueError that it raises there, in all of them."""
    outcome: list[Any] = [None, None]
    if processes.is_main_process:
        try:
            outcome[0] = function()
        except ValueError as error:
            outcome[1] = error
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def shard(transformer: SanaTransformer) -> None:
    """Shard the parameters over all processes, block by block, in place.

    Each block is gathered when it computes and given up again; gradients and the optimizer's state stay sharded. Applied
    here because accelerate falls back to copies, without a word, where there is no GPU.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    for block in transformer.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(transformer, mesh=mesh)


def gathered(value: Tensor) -> Tensor:
    """A tensor whole, also where it was sharded."""
    return value.full_tensor() if isinstance(value, DTensor) else value
