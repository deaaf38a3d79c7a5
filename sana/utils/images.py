"""Pixels: from tensors in [-1, 1] to 8 bits, files and grids."""

import io
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


def encode_png(image: Image.Image, metadata: Mapping[str, object] | None = None) -> bytes:
    """A PNG file with `metadata` as text chunks (read them with `Image.open().text`)."""
    info = PngInfo()
    for key, value in (metadata or {}).items():
        info.add_itxt(key, str(value))  # iTXt is UTF-8: prompts may hold any character
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", pnginfo=info)
    return buffer.getvalue()


def save_png(image: Image.Image, path: str | Path, metadata: Mapping[str, object] | None = None) -> Path:
    """Write `encode_png` to a file in one step (see `write_atomic`)."""
    return write_atomic(path, encode_png(image, metadata))


def load(path: str | Path) -> Image.Image:
    """Read a picture and close its file (`Image.open` keeps it open until the pixels are asked for)."""
    with Image.open(path) as picture:
        picture.load()
    return picture


def save_jpeg(image: Image.Image, path: str | Path, quality: int = 95, subsampling: str = "4:4:4") -> Path:
    """Write a JPEG in one step; `quality` in 1..100. With "4:4:4" colours keep their full resolution, and edges stay sharp."""
    settings = {"format": "JPEG", "quality": quality, "subsampling": subsampling}
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


def cover(pixels: Tensor, height: int, width: int) -> Tensor:
    """Scale (n, 3, H, W) so that it just covers (height, width), and cut the middle out; nothing if it fits already."""
    drawn_height, drawn_width = pixels.shape[-2:]
    if (drawn_height, drawn_width) == (height, width):
        return pixels
    scale = max(height / drawn_height, width / drawn_width)
    covering = (max(height, round(drawn_height * scale)), max(width, round(drawn_width * scale)))
    pixels = torch.nn.functional.interpolate(pixels, covering, mode="bilinear", align_corners=False)
    top, left = (covering[0] - height) // 2, (covering[1] - width) // 2
    return pixels[..., top : top + height, left : left + width]
