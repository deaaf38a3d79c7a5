"""Decoding that does not lose the picture: where memory runs out, in smaller strips, then in tiles, then later."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

from sana.models.autoencoder import Autoencoder
from sana.models.dc_ae_decoder import WORKING_BYTES
from sana.utils.logging import get_logger
from sana.utils.oom import free_memory, is_out_of_memory

LEAST_STRIP = 2**26
"""Bytes: below 64 MiB the images that are held whole count for more than a strip does."""

TILES = (1024, 512, 256)
"""Pixels a side, tried one after the other; smaller ones would show at their edges."""

logger = get_logger(__name__)


_shortages: ContextVar[list[Attempt]] = ContextVar("shortages")


class DecodeError(MemoryError):
    """Memory did not suffice for any way of decoding; `latents` (B, C, h, w), scaled, on the CPU, are what was to be decoded."""

    def __init__(self, message: str, latents: Tensor) -> None:
        super().__init__(message)
        self.latents = latents


@dataclass(frozen=True)
class Attempt:
    """One way of decoding a batch."""

    images: int
    """At once."""
    max_bytes: int | None
    tile: int | None

    def __str__(self) -> str:
        how = "one image" if self.images == 1 else f"{self.images} images at once"
        if self.tile is not None:
            return f"{how}, tiles of {self.tile} pixels"
        return how if self.max_bytes is None else f"{how}, strips of {self.max_bytes / 2**20:.0f} MiB"


@contextmanager
def shortages() -> Iterator[list[Attempt]]:
    """Within the block, with what else `decode` succeeded where it could not as it was asked to."""
    found: list[Attempt] = []
    token = _shortages.set(found)
    try:
        yield found
    finally:
        _shortages.reset(token)


def decode(
    autoencoder: Autoencoder, latents: Tensor, *, max_bytes: int | None = None, tile: int | None = None
) -> Tensor:
    """`autoencoder.decode`, again with less memory for as long as that runs out.

    A batch is then divided into its images; strips of rows are halved down to 64 MiB, which changes nothing but rounding;
    at last come blended tiles, down to 256 pixels a side.

    Args:
        max_bytes, tile: what to begin with, as in `Autoencoder.decode`.

    Raises:
        DecodeError: it ran out every time.
    """
    size = tuple(side * autoencoder.downsample for side in latents.shape[-2:])
    failed: Attempt | None = None
    for attempt in _attempts(len(latents), max(size), max_bytes, tile):
        if failed is not None:
            free_memory()
            logger.warning("out of memory while decoding %s x %s (%s); again: %s", *size, failed, attempt)
        try:
            parts = [
                autoencoder.decode(part, max_bytes=attempt.max_bytes, tile=attempt.tile)
                for part in latents.split(attempt.images)
            ]
            pixels = parts[0] if len(parts) == 1 else torch.cat(parts)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            failed = attempt
        else:
            if failed is not None:
                _shortages.get([]).append(attempt)
            return pixels
    free_memory()
    message = f"out of memory while decoding {size[0]} x {size[1]}, at last with {failed}"
    raise DecodeError(message, latents.detach().cpu())


def _attempts(images: int, side: int, max_bytes: int | None, tile: int | None) -> Iterator[Attempt]:
    """Ways of decoding, from the one asked for to that with the least memory; `side` is the picture's longer one."""
    yield Attempt(images, max_bytes, tile)
    if images > 1:
        yield Attempt(1, max_bytes, tile)
    if tile is None:
        max_bytes = (max_bytes or WORKING_BYTES) // 2
        while max_bytes >= LEAST_STRIP:
            yield Attempt(1, max_bytes, None)
            max_bytes //= 2
    for smaller in TILES:
        if smaller < min(tile or side, side):
            yield Attempt(1, LEAST_STRIP, smaller)
