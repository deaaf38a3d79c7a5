"""The deep-compression autoencoder (DC-AE, F32C32): pixels in [-1, 1] to scaled latents and back.

The network is diffusers' `AutoencoderDC`, whose decoder has an arithmetic of ours (`dc_ae_decoder`). The scale travels
with the weights (`scaling_factor` of their config, 0.41407 for the published ones) and is applied here and nowhere else.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderDC
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from sana.models import dc_ae_decoder, dc_ae_names
from sana.models.checkpoints import AUTOENCODERS
from sana.models.tiling import in_tiles
from sana.utils import hub
from sana.utils.oom import is_out_of_memory

NATIVE_WEIGHTS = "model.safetensors"
"""The file of a DC-AE as its authors release it, beside a config.json; diffusers' has another name."""


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
    encoder_out_shortcut: bool = False
    decoder_in_shortcut: bool = False
    scaling_factor: float = 1.0


PUBLISHED = AutoencoderConfig(
    encoder_block_out_channels=(128, 256, 512, 512, 1024, 1024),
    decoder_block_out_channels=(128, 256, 512, 512, 1024, 1024),
    encoder_layers_per_block=(2, 2, 2, 3, 3, 3),
    decoder_layers_per_block=(3,) * 6,
    encoder_block_types=("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
    decoder_block_types=("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
    encoder_qkv_multiscales=((), (), (), (5,), (5,), (5,)),
    decoder_qkv_multiscales=((), (), (), (5,), (5,), (5,)),
    downsample_block_type="Conv",
    upsample_block_type="interpolate",
    encoder_out_shortcut=True,
    decoder_in_shortcut=True,
    scaling_factor=dc_ae_names.SCALING_FACTOR,
)
"""DC-AE 1.0 and 1.1 for Sana: 312,250,275 parameters."""


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
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype | None = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Autoencoder:
        """Load a folder, local or on the hub ("owner/name" or "hf://owner/name").

        Args:
            path: a diffusers folder, or one of the authors' releases (DC-AE 1.0, 1.1, Lite: `config.json` and
                `model.safetensors` with their own names).
            dtype: of the weights; None is what they are stored in.

        Raises:
            ValueError: nothing loadable is there.
        """
        folder = hub.resolve_model(path)
        try:
            if (folder / NATIVE_WEIGHTS).is_file():
                model = _read_native(folder)
            else:
                model = AutoencoderDC.from_pretrained(folder, torch_dtype=dtype or _stored_dtype(folder))
                model.register_to_config(_name_or_path="")  # a copy must not name a folder of this machine
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            if is_out_of_memory(error):
                raise
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"cannot load an AutoencoderDC from {str(path)!r}: {reason}") from error
        return cls(model).to(device, dtype).eval().requires_grad_(False)

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

    def encode(self, images: Tensor, *, tile: int | None = None, overlap: int | None = None) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1], H and W multiples of 32 -> scaled latents (B, 32, H/32, W/32), deterministic.

        Args:
            tile, overlap: as in `decode`.

        Raises:
            ValueError: a side or one of these is not a multiple of 32.
        """
        height, width = images.shape[-2:]
        if height % self.downsample or width % self.downsample:
            raise ValueError(f"image sides must be multiples of {self.downsample}, got {height} x {width}")
        return self._in_tiles(self._encode, images, tile, overlap, (self.downsample, 1)) * self.scaling_factor

    def decode(
        self,
        latents: Tensor,
        *,
        max_bytes: int | None = None,
        tile: int | None = None,
        overlap: int | None = None,
    ) -> Tensor:
        """Scaled latents (B, 32, h, w) -> images (B, 3, 32 h, 32 w) in about [-1, 1].

        Without gradients the arithmetic is that of `dc_ae_decoder`, equal but for rounding, on a CPU, where it is faster,
        and wherever the image is decoded in strips of rows; else it is diffusers'.

        Args:
            max_bytes: about what the tensors of one strip may take. None is 2 GiB on a CPU, and on a GPU the whole image,
                unless that is too large for any.
            tile: decode in blended tiles of so many pixels a side instead, for less memory; not exact.
            overlap: of tiles, in pixels; None is an eighth of `tile`, rounded up to a multiple of 32.

        Raises:
            ValueError: `tile` or `overlap` is not a multiple of 32, or the overlap is as long as a tile.
        """
        latents = latents / self.scaling_factor
        return self._in_tiles(
            lambda part: self._decode(part, max_bytes), latents, tile, overlap, (1, self.downsample)
        )

    def _encode(self, images: Tensor) -> Tensor:
        return self.model.encode(images.to(self.dtype)).latent

    def _decode(self, latents: Tensor, max_bytes: int | None) -> Tensor:
        """Unscaled latents to images."""
        latents = latents.to(self.dtype)
        whole = max_bytes is None and latents.device.type != "cpu" and not self._is_huge(latents)
        if torch.is_grad_enabled() or whole:
            return self.model.decode(latents).sample
        if hasattr(self.model, "_hf_hook"):  # accelerate's: AutoencoderDC.decode calls it
            self.model._hf_hook.pre_forward(self.model)
        max_bytes = max_bytes or dc_ae_decoder.WORKING_BYTES
        return dc_ae_decoder.decode(self.model.decoder, latents, max_bytes=max_bytes)

    def _in_tiles(
        self,
        function: Callable[[Tensor], Tensor],
        x: Tensor,
        tile: int | None,
        overlap: int | None,
        cell: tuple[int, int],
    ) -> Tensor:
        if tile is None:
            return function(x)
        side = self.downsample
        overlap = -(-tile // (8 * side)) * side if overlap is None else overlap
        if tile % side or overlap % side:
            raise ValueError(f"tile and overlap must be multiples of {side}, got {tile} and {overlap}")
        return in_tiles(function, x, tile=tile // side, overlap=overlap // side, cell=cell)

    def _is_huge(self, latents: Tensor) -> bool:
        """Whether a tensor of the decoder would have more values than a GPU's kernels count to."""
        width = self.model.config.decoder_block_out_channels[1]  # of the second stage's image, doubled
        return latents[:, 0].numel() * self.downsample**2 * width >= 2**31


def find_autoencoder(path: str | Path) -> Path | None:
    """The folder of a DC-AE that `path` names, judged without reading its weights; None if it names something else.

    Nothing but the published ones, by their hub ids, is downloaded.
    """
    published = str(path).removeprefix("hf://") in AUTOENCODERS
    folder = hub.resolve_model(path) if published else Path(path)
    if (folder / NATIVE_WEIGHTS).is_file():
        try:
            with safe_open(folder / NATIVE_WEIGHTS, "pt") as weights:
                return folder if dc_ae_names.is_native(weights.keys()) else None
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{folder / NATIVE_WEIGHTS}: truncated or corrupt: {error}") from error
    config = folder / "config.json"
    return folder if config.is_file() and '"AutoencoderDC"' in config.read_text(encoding="utf-8") else None


def _read_native(folder: Path) -> AutoencoderDC:
    """The network of an authors' release, in the dtype that it is stored in."""
    state = load_file(folder / NATIVE_WEIGHTS)
    if not dc_ae_names.is_native(state):
        raise ValueError(f"{NATIVE_WEIGHTS} holds no DC-AE")
    state = dc_ae_names.from_native(state)
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    scale = settings.get("scaling_factor", dc_ae_names.SCALING_FACTOR)
    with torch.device("meta"):
        model = AutoencoderDC(**dc_ae_names.layout(state), scaling_factor=scale)
    model.load_state_dict(state, assign=True)
    return model


def _stored_dtype(folder: Path) -> torch.dtype:
    """The dtype of the weights in a diffusers folder; float32 if it holds no safetensors file."""
    file = next(iter(sorted(folder.glob("*.safetensors"))), None)
    if file is None:
        return torch.float32
    with safe_open(file, "pt") as handle:
        return handle.get_tensor(next(iter(handle.keys()))).dtype
