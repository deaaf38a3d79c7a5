"""Seeds from names: a draw depends on what it is for, never on how many draws came before it."""

from __future__ import annotations

import hashlib
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
