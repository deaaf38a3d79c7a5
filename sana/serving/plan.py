"""How much memory a run will take, in one line."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from sana.runtime.memory import GIB
from sana.runtime.plan import READING_BYTES, Outline, Setting, make_plan

if TYPE_CHECKING:
    from sana.pipeline import SanaPipeline


@torch.no_grad()
def plan_line(pipeline: SanaPipeline, size: tuple[int, int], batch: int) -> str:
    """What drawing `batch` images of `size` (height, width) at once takes: the most of weights, then of each stage.

    It is the plan of `sana.runtime.plan`: what a device adds is not in it.
    """
    setting = Setting(
        size=pipeline.sizes(*size, binning=True)[1],
        batch=batch,
        device=pipeline.device.type,
        quantize=pipeline.quantize,
        offload=pipeline.offload,
        max_bytes=pipeline.decode_bytes,
        tile=pipeline.decode_tile,
    )
    reading = 0 if pipeline.offload == "none" else READING_BYTES
    plan = make_plan(_outline(pipeline), setting, reading=reading)
    weights = max(there for there, _ in plan.stages.values())
    stages = ", ".join(f"{stage} {passing / GIB:.2f}" for stage, (_, passing) in plan.stages.items())
    line = (
        f"about {plan.peak / GIB:.2f} GiB for {batch} of {size[1]} x {size[0]}: weights {weights / GIB:.2f}, "
        f"and for {stages}"
    )
    if pipeline.device.type == "cuda":
        free, whole = torch.cuda.mem_get_info(pipeline.device)
        left = free + torch.cuda.memory_reserved(pipeline.device)
        line += f"; the GPU has {whole / GIB:.0f}"
        if plan.peak > left:
            line += f", of which {left / GIB:.2f} are ours or free: **it will probably not fit**"
    return line


@functools.lru_cache(maxsize=4)
def _outline(pipeline: SanaPipeline) -> Outline:
    return Outline.of(pipeline.transformer, pipeline.autoencoder, pipeline.text_encoder)
