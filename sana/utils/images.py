"""Pixels: from tensors in [-1, 1] to 8 bits, files and grids."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from sana.utils.files import write_atomic


def to_uint8(images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] -> (B, H, W, 3) uint8 on the CPU, rounded to the nearest level and clipped.

    Raises:
        ValueError: a value is not finite (it would become an arbitrary colour).
    """
    images = images.detach().float().cpu()
    if not images.isfinite().all():
        raise ValueError(f"{(~images.isfinite()).sum()} of {images.numel()} pixel values are not finite")
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def to_pil(images: Tensor) -> list[Image.Image]:
    """Images (B, 3, H, W) in [-1, 1] -> B pictures."""
    return [Image.fromarray(image.numpy()) for image in to_uint8(images)]


def save_png(image: Image.Image, path: str | Path, metadata: Mapping[str, object] | None = None) -> Path:
    """Write a PNG in one step (see `write_atomic`) with `metadata` as text chunks (read them with `Image.open().text`)."""
    info = PngInfo()
    for key, value in (metadata or {}).items():
        info.add_itxt(key, str(value))  # iTXt is UTF-8: prompts may hold any character
    return write_atomic(path, lambda handle: image.save(handle, format="PNG", pnginfo=info))


def load(path: str | Path) -> Image.Image:
    """Read a picture and close its file (`Image.open` keeps it open until the pixels are asked for)."""
    with Image.open(path) as picture:
        picture.load()
    return picture


def save_jpeg(image: Image.Image, path: str | Path, quality: int = 95) -> Path:
    """Write a JPEG in one step; `quality` in 1..100. Colours keep their full resolution, so that edges stay sharp."""
    settings = {"format": "JPEG", "quality": quality, "subsampling": 0}
    return write_atomic(path, lambda handle: image.convert("RGB").save(handle, **settings))


def grid(images: Sequence[Image.Image], columns: int | None = None) -> Image.Image:
    """One picture of all `images`, row by row, on white; `columns=None` makes it about square, if possible without holes.

    Every cell has the size of the largest picture; smaller ones are centred.
    """
    if not images:
        raise ValueError("a grid needs at least one image, got none")
    if columns is not None and columns < 1:
        raise ValueError(f"a grid needs at least one column, got {columns}")
    side = math.ceil(math.sqrt(len(images)))
    whole = (count for count in range(side, 2 * side) if len(images) % count == 0)
    columns = min(columns or next(whole, side), len(images))
    width, height = max(image.width for image in images), max(image.height for image in images)
    sheet = Image.new("RGB", (columns * width, math.ceil(len(images) / columns) * height), "white")
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        corner = (column * width + (width - image.width) // 2, row * height + (height - image.height) // 2)
        sheet.paste(image, corner)
    return sheet
