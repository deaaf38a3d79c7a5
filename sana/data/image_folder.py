"""A folder of pictures, each `NAME.{png,jpg,jpeg,webp}` with its caption in `NAME.txt`, as square training images."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from sana.utils.seeding import derive_seed

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp")


def load_square(path: str | Path, size: int) -> Tensor:
    """The picture at `path`, shorter side resized to `size` and centre-cropped: (3, size, size) in [-1, 1].

    Raises:
        ValueError: it cannot be read as a picture.
    """
    try:
        with Image.open(path) as image:
            image = ImageOps.fit(
                ImageOps.exif_transpose(image).convert("RGB"), (size, size), Image.Resampling.BICUBIC
            )
    except (OSError, SyntaxError, ValueError) as error:  # what PIL's readers raise for a broken file
        raise ValueError(f"cannot read the picture {path}: {error}") from error
    return to_tensor(np.asarray(image))


def to_tensor(pixels: np.ndarray) -> Tensor:
    """Pixels (H, W, 3) uint8 -> (3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 127.5 - 1


class ImageFolder:
    """The pictures of some folders, in the order of their names: the same everywhere."""

    def __init__(self, folders: Sequence[str | Path], size: int) -> None:
        self.size = size
        self.paths: list[Path] = []
        for folder in map(Path, folders):
            if not folder.is_dir():
                raise ValueError(f"no such folder of pictures: {folder}")
            self.paths += sorted(path for path in folder.iterdir() if path.suffix.lower() in EXTENSIONS)
        if not self.paths:
            raise ValueError(f"no picture ({', '.join(EXTENSIONS)}) in {', '.join(map(str, folders))}")
        # What is on disk decides what the pictures are, also when a file is replaced by another of its name.
        states = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in self.paths]
        self.name = f"pictures-{size}-{derive_seed(states):016x}"

    def __len__(self) -> int:
        return len(self.paths)

    def image(self, index: int) -> Tensor:
        """Picture `index`: (3, size, size) in [-1, 1]."""
        return load_square(self.paths[index], self.size)

    def caption(self, index: int, epoch: int = 0) -> str:
        """The first line of `NAME.txt`.

        Raises:
            ValueError: there is none.
        """
        path = self.paths[index].with_suffix(".txt")
        lines = path.read_text(encoding="utf-8").strip().splitlines() if path.is_file() else []
        if not lines:
            raise ValueError(f"{self.paths[index]} has no caption: write it on the first line of {path.name}")
        return lines[0].strip()
