"""The file of a picture that could not be decoded: its latents, and what it takes to finish it elsewhere or later.

A safetensors file with one tensor, `latents` (1, C, h, w), scaled as the transformer makes them, and one text, `picture`, the
JSON of a `Picture`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sana.utils.files import write_atomic

SUFFIX = ".latents.safetensors"

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class Picture:
    """What is known of a picture beside its latents."""

    file: str
    """The name of its file, which belongs beside that of the latents; .png or .jpg."""
    size: tuple[int, int]
    """(height, width) asked for, in pixels: what was drawn is scaled and cropped to it."""
    autoencoder: str
    """Folder or hub id of the autoencoder, as in a config."""
    dtype: str
    """Which it computes in, one of DTYPES."""
    jpeg_quality: int = 95
    jpeg_subsampling: str = "4:4:4"
    text: Mapping[str, str] = field(default_factory=dict)
    """To be written into a PNG: prompt, seed, settings."""
    row: Mapping[str, Any] | None = None
    """The line of the folder's manifest; None where there is none."""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"unknown dtype {self.dtype!r}; choose from {', '.join(DTYPES)}")


def latents_path(image: str | Path) -> Path:
    """The file of latents beside an image file: NAME.png -> NAME.latents.safetensors."""
    return Path(image).with_suffix(SUFFIX)


def save_latents(path: str | Path, latents: Tensor, picture: Picture) -> Path:
    """Write the file, in one step.

    Raises:
        ValueError: the latents are not those of one picture.
    """
    if latents.dim() != 4 or len(latents) != 1:
        raise ValueError(f"one file holds one picture: latents (1, C, h, w), not {tuple(latents.shape)}")
    metadata = {"picture": json.dumps(asdict(picture), ensure_ascii=False)}
    return write_atomic(path, save({"latents": latents.detach().cpu().contiguous()}, metadata))


def load_latents(path: str | Path) -> tuple[Tensor, Picture]:
    """What `save_latents` wrote.

    Raises:
        ValueError: it is no such file, or it is damaged.
    """
    try:
        with safe_open(path, "pt") as handle:
            values = json.loads((handle.metadata() or {})["picture"])
            latents = handle.get_tensor("latents")
        unknown = values.keys() - {known.name for known in fields(Picture)}
        if unknown:
            raise ValueError(f"unknown {', '.join(sorted(unknown))}: written by a later version")
        picture = Picture(**values | {"size": tuple(values["size"])})
    except (OSError, SafetensorError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no file of latents: {type(error).__name__}: {error}") from error
    return latents, picture
