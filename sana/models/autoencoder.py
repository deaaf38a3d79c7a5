"""The deep-compression autoencoder (DC-AE, F32C32): pixels in [-1, 1] to scaled latents and back.

The network is diffusers' `AutoencoderDC`. What is ours is the scale: it travels with the weights (`scaling_factor` of
their config, 0.41407 for the published ones) and is applied here and nowhere else.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderDC
from torch import Tensor, nn

from sana.utils import hub


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """The arguments of diffusers' `AutoencoderDC` that differ between our autoencoders; defaults are Sana-tiny's.

    Widths and depths go from full resolution (index 0) down to 1/32. A depth of 0 at index 0 skips that resolution: the
    first convolution halves the image at once, which on a CPU is most of the cost.
    """

    encoder_block_out_channels: tuple[int, ...] = (16, 16, 32, 64, 128, 128)
    decoder_block_out_channels: tuple[int, ...] = (16, 16, 32, 64, 128, 128)
    encoder_layers_per_block: tuple[int, ...] = (0, 1, 1, 2, 2, 2)
    decoder_layers_per_block: tuple[int, ...] = (0, 1, 2, 2, 3, 2)
    encoder_block_types: str | tuple[str, ...] = "ResBlock"
    decoder_block_types: str | tuple[str, ...] = "ResBlock"
    encoder_qkv_multiscales: tuple[tuple[int, ...], ...] = ((),) * 6
    decoder_qkv_multiscales: tuple[tuple[int, ...], ...] = ((),) * 6
    downsample_block_type: str = "pixel_unshuffle"
    upsample_block_type: str = "pixel_shuffle"
    latent_channels: int = 32
    scaling_factor: float = 1.0


class Autoencoder(nn.Module):
    """`AutoencoderDC` behind two methods that speak scaled latents."""

    def __init__(self, model: AutoencoderDC) -> None:
        super().__init__()
        self.model = model

    @classmethod
    def from_config(cls, config: AutoencoderConfig) -> Autoencoder:
        """A randomly initialised autoencoder, to be trained."""
        return cls(AutoencoderDC(**asdict(config)))

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> Autoencoder:
        """Load a diffusers folder, local or on the hub ("owner/name" or "hf://owner/name").

        Raises:
            ValueError: nothing loadable is there.
        """
        folder = hub.resolve_model(path)
        try:
            model = AutoencoderDC.from_pretrained(folder, torch_dtype=dtype)
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"cannot load an AutoencoderDC from {str(path)!r}: {reason}") from error
        return cls(model).to(device).eval().requires_grad_(False)

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write a diffusers folder, its weights stored as `dtype` (as they are when None)."""
        model = self.model
        if dtype is not None:
            model = AutoencoderDC.from_config(model.config)
            model.load_state_dict(
                {key: value.to(dtype) for key, value in self.model.state_dict().items()}, assign=True
            )
        model.save_pretrained(folder)

    @property
    def scaling_factor(self) -> float:
        """What unscaled latents are multiplied by, so that the transformer sees about unit variance."""
        return self.model.config.scaling_factor

    @property
    def downsample(self) -> int:
        """Pixels to a latent, along each side."""
        return self.model.spatial_compression_ratio

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return self.model.config.latent_channels

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the network computes in."""
        return self.model.dtype

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1], H and W multiples of 32 -> scaled latents (B, 32, H/32, W/32), deterministic.

        Raises:
            ValueError: a side is not a multiple of 32.
        """
        height, width = images.shape[-2:]
        if height % self.downsample or width % self.downsample:
            raise ValueError(f"image sides must be multiples of {self.downsample}, got {height} x {width}")
        return self.model.encode(images.to(self.dtype)).latent * self.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, 32, h, w) -> images (B, 3, 32 h, 32 w) in about [-1, 1]."""
        return self.model.decode((latents / self.scaling_factor).to(self.dtype)).sample
