"""Latents of a data set, encoded once: with them, a training step needs no autoencoder."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from sana.data.loader import Samples
from sana.models.autoencoder import Autoencoder
from sana.utils import hub
from sana.utils.logging import get_logger

log = get_logger(__name__)


def cached_latents(
    samples: Samples,
    autoencoder: Autoencoder,
    autoencoder_name: str,
    folder: Path,
    accelerator: Accelerator,
    batch_size: int = 32,
) -> Callable[[int], Tensor]:
    """Index -> scaled latent (C, h, w) of each picture of `samples`, from a file in `folder` that is written if need be.

    The file's name holds a hash of the pictures' name and the autoencoder's weights: another data set or another
    autoencoder makes another file. Encoded under bfloat16 autocast and stored in half precision: on Sana-tiny's
    pictures that moves a latent by 0.4 % of its deviation, a tenth of the noise its decoder was trained to forgive.
    """
    weights = hub.sha256(hub.resolve_model(autoencoder_name))
    key = hashlib.sha256(f"{samples.name} {weights}".encode()).hexdigest()[:16]
    path = folder / f"latents-{key}.safetensors"
    if accelerator.is_main_process and not path.is_file():
        log.info("encoding %d pictures into %s", len(samples), path)
        latents = _encode(samples, autoencoder, batch_size)
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        save_file({"latents": latents}, partial, {"pictures": samples.name, "autoencoder": weights})
        partial.replace(path)
    accelerator.wait_for_everyone()
    with safe_open(path, "pt") as stored:
        latents = stored.get_tensor("latents")
    return lambda index: latents[index].float()


@torch.no_grad()
def _encode(samples: Samples, autoencoder: Autoencoder, batch_size: int) -> Tensor:
    device = autoencoder.model.device
    found = []
    for start in tqdm(range(0, len(samples), batch_size), desc="latents"):
        images = torch.stack([samples.image(i) for i in range(start, min(start + batch_size, len(samples)))])
        with torch.autocast(device.type, dtype=torch.bfloat16):
            latents = autoencoder.encode(images.to(device, memory_format=torch.channels_last))
        found.append(latents.to("cpu", torch.float16))
    return torch.cat(found).contiguous()  # safetensors takes no channels-last
