"""From a picture of any size to a training picture: the nearest bucket, resize to cover it, crop the middle."""

from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from sana.data.quarantine import UNREADABLE
from sana.resolution import Table, nearest_bucket

_ORIENTATION, _SIDEWAYS = 0x0112, (5, 6, 7, 8)  # the EXIF tag, and its values that swap height and width
_LANCZOS = ("ASPECT_RATIO_2048", "ASPECT_RATIO_2880")  # as the reference; bicubic under the other tables


@dataclass(frozen=True, kw_only=True)
class Frame:
    """The sizes of training pictures: squares of `size`, or the buckets of a table."""

    size: int
    table: Table | None = None
    table_name: str = ""
    multiple: int = 1
    """Sides of buckets are rounded to multiples of this, the autoencoder's factor: the 256 table has others."""

    @property
    def name(self) -> str:
        """Says how pictures are cut: part of the key of caches."""
        return str(self.size) if self.table is None else f"{self.table_name}-{self.multiple}"

    @property
    def resample(self) -> Image.Resampling:
        """The filter of the resize."""
        return Image.Resampling.LANCZOS if self.table_name in _LANCZOS else Image.Resampling.BICUBIC

    def bucket(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of the training picture of a picture of that size.

        Raises:
            ValueError: a side is not positive.
        """
        if self.table is None:
            return self.size, self.size
        _, (h, w) = nearest_bucket(height, width, self.table)
        return self._rounded(h), self._rounded(w)

    def _rounded(self, side: int) -> int:
        return max(1, round(side / self.multiple)) * self.multiple


def header_size(source: str | Path | bytes | BinaryIO) -> tuple[int, int]:
    """(height, width) of a picture as it is shown, from its header alone.

    Raises:
        sana.data.quarantine.UNREADABLE: it cannot be read.
    """
    with Image.open(BytesIO(source) if isinstance(source, bytes) else source) as image:
        width, height = image.size
        # The base class's: that of PNG decodes the whole picture to look for a tag behind it.
        sideways = Image.Image.getexif(image).get(_ORIENTATION) in _SIDEWAYS
    return (width, height) if sideways else (height, width)


def load_picture(
    source: str | Path | bytes,
    size: tuple[int, int],
    resample: Image.Resampling = Image.Resampling.BICUBIC,
    name: str | Path | None = None,
) -> Tensor:
    """The picture at a path, or in bytes, resized to cover `size` (height, width) and centre-cropped to it.

    Returns (3, height, width) in [-1, 1].

    Raises:
        ValueError: it cannot be read as a picture; `name` (default: the path) says which.
    """
    try:
        with Image.open(BytesIO(source) if isinstance(source, bytes) else source) as image:
            rgb = ImageOps.exif_transpose(image).convert("RGB")
            return to_tensor(np.asarray(ImageOps.fit(rgb, (size[1], size[0]), resample)))
    except UNREADABLE as error:
        raise ValueError(f"cannot read the picture {name or source}: {error}") from error


def to_tensor(pixels: np.ndarray) -> Tensor:
    """Pixels (H, W, 3) uint8 -> (3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 127.5 - 1
