"""The noise that an image begins with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sana.diffusion.scm import FreshNoise
from sana.utils import seeding


def starting_noise(
    count: int,
    copies: int,
    shape: tuple[int, int, int],
    device: torch.device,
    *,
    generator: torch.Generator | None = None,
    latents: Tensor | None = None,
    seed: int | Sequence[int] | None = None,
) -> tuple[Tensor, FreshNoise]:
    """Noise (count, *shape), float32 on `device`, and a source of more of it for the steps of scm.

    Args:
        count: of images, which come in groups of `copies` for each prompt.
        generator, latents, seed: see `SanaPipeline.__call__`.

    Raises:
        ValueError: two sources of noise, latents of another shape, or not as many seeds as images.
    """
    if sum(source is not None for source in (generator, latents, seed)) > 1:
        raise ValueError("generator, latents and seed each decide the noise: give one of them")
    if latents is not None and latents.shape != (count, *shape):
        raise ValueError(
            f"latents have shape {tuple(latents.shape)}; these prompts and size need {(count, *shape)}"
        )
    if generator is not None:
        sources, group = [generator] * (count // copies), copies
    else:
        seeds = seeding.image_seeds(seed, count, copies)
        sources, group = [torch.Generator().manual_seed(image_seed) for image_seed in seeds], 1

    def draw() -> Tensor:
        parts = [torch.randn((group, *shape), generator=own, device=own.device) for own in sources]
        drawn = torch.cat(parts)
        if device.type == "cuda" and drawn.device.type == "cpu":
            # A copy of other memory would wait for the GPU, in the steps of scm too.
            return drawn.pin_memory().to(device, non_blocking=True)
        return drawn.to(device)

    noise = draw()
    return noise if latents is None else latents.to(noise), lambda step: draw()
