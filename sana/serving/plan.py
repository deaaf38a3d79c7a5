"""How much memory a run will take, in one line."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from sana.runtime.memory import GIB, peak_of, tensor_bytes

if TYPE_CHECKING:
    from sana.pipeline import SanaPipeline


def plan_line(pipeline: SanaPipeline, size: tuple[int, int], batch: int) -> str:
    """What drawing `batch` images of `size` (height, width) at once takes: weights, then the most of the two stages.

    The stages are walked through on the device "meta", so the figure is that of their tensors; what a device adds is not
    in it. The text encoder's own tensors are small beside them, and are left out; decoding is that of whole pictures, not of
    tiles. Under offloading the largest network counts.
    """
    modules = (pipeline.transformer, pipeline.autoencoder, pipeline.text_encoder.model)
    sizes = [tensor_bytes([*module.parameters(), *module.buffers()]) for module in modules]
    weights = sum(sizes) if pipeline.offload == "none" else max(sizes)
    denoising, decoding = _peaks(pipeline, pipeline.sizes(*size, binning=True)[1], batch)
    total = weights + max(denoising, decoding)
    line = (
        f"about {total / GIB:.2f} GiB for {batch} of {size[1]} x {size[0]}: weights {weights / GIB:.2f}, "
        f"and for drawing {denoising / GIB:.2f}, then decoding {decoding / GIB:.2f}"
    )
    if pipeline.device.type == "cuda":
        free, whole = torch.cuda.mem_get_info(pipeline.device)
        left = free + torch.cuda.memory_reserved(pipeline.device)
        line += f"; the GPU has {whole / GIB:.0f}"
        if total > left:
            line += f", of which {left / GIB:.2f} are ours or free: **it will probably not fit**"
    return line


@functools.lru_cache(maxsize=64)
def _peaks(pipeline: SanaPipeline, size: tuple[int, int], batch: int) -> tuple[int, int]:
    """Most bytes alive in one evaluation of the transformer with guidance, and in decoding."""
    with torch.device("meta"):
        transformer = type(pipeline.transformer)(pipeline.transformer.config).to(pipeline.dtype).eval()
        decoder = pipeline.autoencoder.model.from_config(pipeline.autoencoder.model.config)
        decoder = torch.nn.Module.to(
            decoder, pipeline.autoencoder.dtype
        ).eval()  # diffusers' own writes a line
        config = transformer.config
        height, width = (side // pipeline.autoencoder.downsample for side in size)
        latents = torch.empty(batch, config.in_channels, height, width)
        text = torch.empty(2 * batch, config.model_max_length, config.caption_channels, dtype=pipeline.dtype)
        time = torch.empty(2 * batch)
        mask = torch.empty(2 * batch, config.model_max_length, dtype=torch.long)
        denoising = peak_of(lambda: transformer(torch.cat([latents, latents]), time, text, mask))
        decoding = peak_of(lambda: decoder.decode(latents.to(pipeline.autoencoder.dtype)))
    return denoising, decoding
