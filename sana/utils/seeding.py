"""Seeds from names: a draw depends on what it is for, never on how many draws came before it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def derive_seed(*parts: object) -> int:
    """A seed in [0, 2^63) from any parts with a stable `repr` (numbers, strings, tuples of them).

    The same on every machine and Python version: the first 63 bits of sha256(repr(parts)).
    """
    digest = hashlib.sha256(repr(parts).encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(*parts: object) -> torch.Generator:
    """A CPU generator seeded by `derive_seed(*parts)`; CPU, so that its draws are the same beside every device."""
    import torch  # lazy: derive_seed is used where torch is not

    return torch.Generator().manual_seed(derive_seed(*parts))


def image_seed(seed: int, prompt_index: int, sample: int) -> int:
    """The seed of one image's noise: of sample number `sample` of prompt number `prompt_index` under `seed`."""
    return derive_seed(seed, prompt_index, sample)


def image_seeds(seed: int | Sequence[int] | None, count: int, copies: int) -> list[int]:
    """The seeds of `count` images, `copies` of each prompt: given one by one, or under one seed (None: 0).

    Raises:
        ValueError: not one for each.
    """
    if seed is None or isinstance(seed, int):
        return [image_seed(seed or 0, *divmod(index, copies)) for index in range(count)]
    if len(seed) != count:
        raise ValueError(f"{len(seed)} seeds for {count} images: give one for each, or a single number")
    return list(seed)
