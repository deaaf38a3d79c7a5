"""What is kept of a drawn picture: its file, or its latents where that fails, and its line in the manifest."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL.Image import Image

from sana.runtime.latents import Picture, latents_path, save_latents
from sana.runtime.streaming import Drawn
from sana.utils import images
from sana.utils.logging import get_logger
from sana.utils.manifest import Part, Row
from sana.utils.oom import is_out_of_memory

logger = get_logger(__name__)


def png_text(row: Row) -> dict[str, str]:
    """What a PNG says of itself, from its line in the manifest: enough to draw it again, see `sana.data.prompts.read_picture`."""
    return {"prompt": row["prompt"], "seed": str(row["seed"]), "settings": json.dumps(row["settings"])}


def write_picture(image: Image, path: Path, picture: Picture) -> Path:
    """Write the file of `image`, PNG or JPEG as the name says."""
    if path.suffix == ".png":
        return images.save_png(image, path, picture.text)
    return images.save_jpeg(image, path, picture.jpeg_quality, picture.jpeg_subsampling)


@dataclass(frozen=True, kw_only=True)
class Keeper:
    """Keeps what was drawn in a folder."""

    folder: Path
    part: Part
    """Of the folder's manifest."""
    rest: Row
    """Of every line: `settings`, as in `sana.generation.Settings.record`, and `versions`."""
    autoencoder: str
    """Folder or hub id."""
    dtype: torch.dtype
    """Of the autoencoder."""

    def keep(self, drawn: Drawn) -> None:
        """Write the picture and its line; what can be had where that fails."""
        row, error = drawn.task.row() | self.rest, drawn.error
        path, picture = self.folder / row["file"], self._picture(row)
        if drawn.picture is not None:
            try:
                write_picture(drawn.picture, path, picture)
                latents_path(path).unlink(missing_ok=True)  # of a run before, in which it failed
            except (OSError, MemoryError, RuntimeError) as failure:
                if isinstance(failure, RuntimeError) and not is_out_of_memory(failure):
                    raise
                error = f"cannot be saved: {str(failure) or type(failure).__name__}"
        if error:
            left = self._keep_latents(drawn, path, picture)
            logger.error(
                "%s: %s; %s",
                row["file"],
                error,
                f"its latents are in {left}" if left else "nothing is left of it",
            )
            row |= {"error": error} | ({"latents": left.name} if left else {})
        elif drawn.decoded:
            row["decoded"] = drawn.decoded
        self.part.add(row)

    def _picture(self, row: Row) -> Picture:
        record = row["settings"]
        return Picture(
            file=Path(row["file"]).name,
            size=(row["height"], row["width"]),
            autoencoder=self.autoencoder,
            dtype=str(self.dtype).removeprefix("torch."),
            jpeg_quality=record["jpeg_quality"],
            jpeg_subsampling=record.get("jpeg_subsampling", "4:4:4"),
            text=png_text(row),
            row=row,
        )

    def _keep_latents(self, drawn: Drawn, path: Path, picture: Picture) -> Path | None:
        """The file of the latents, which `scripts/decode_latents.py` makes the picture of; None where there are none."""
        if drawn.latents is None or not drawn.latents.isfinite().all():
            return None
        try:
            return save_latents(latents_path(path), drawn.latents, picture)
        except (OSError, MemoryError) as error:
            logger.error("%s cannot be written: %s", latents_path(path), error)
            return None
