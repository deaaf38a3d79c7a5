"""What a transformer keeps from one forward pass to the next while it samples.

Shapes: B batch, N image tokens, L text tokens, D hidden size, H heads, d = D / H.
"""

from dataclasses import dataclass

import torch

from sana.models.attention import FoldedText

KeysValues = tuple[torch.Tensor, torch.Tensor]
"""Of a text in one block, (B, H, L, d) each."""


@dataclass(frozen=True, slots=True)
class TextCache:
    """What every block's cross-attention reads of the text: computed once per prompt."""

    blocks: tuple[KeysValues | FoldedText, ...]
    """Keys and values, or their products with the projections, where these are less work."""
    mask: torch.Tensor | None
    """(B, 1, 1, L) bool, True = valid; None: every token."""

    @property
    def batch(self) -> int:
        """B."""
        return len(self.blocks[0][0])

    def last(self, count: int) -> "TextCache":
        """Of the last `count` texts of the batch, as views."""
        blocks = (
            FoldedText(*(x[-count:] for x in block))
            if isinstance(block, FoldedText)
            else tuple(x[-count:] for x in block)
            for block in self.blocks
        )
        return TextCache(tuple(blocks), None if self.mask is None else self.mask[-count:])


@dataclass(frozen=True, slots=True)
class TimeCache:
    """What the blocks and the final layer read of the time, of one step for the whole batch: see `encode_time`."""

    blocks: torch.Tensor
    """(depth, 1, 6, D): the modulation of each block, its own table added."""
    embedding: torch.Tensor
    """(1, D), for the final layer."""


@dataclass(slots=True)
class StepCache:
    """First-block cache: where the first block changes the tokens as it did in an earlier step, so will the others.

    One for each sampling run and batch. Its decision is read from the device, so it costs a synchronisation a step.
    """

    threshold: float
    """The largest relative change of the first block's residual, in the mean of absolute values, at which the others'
    residual is used again."""
    change: torch.Tensor | None = None
    """(B, N, D), what the first block added when the others ran last."""
    rest: torch.Tensor | None = None
    """(B, N, D), what all others added then."""
    reused: int = 0
    """Steps that ran the first block alone."""

    def reuses(self, change: torch.Tensor) -> bool:
        """Whether to take `rest`, for what the first block adds now."""
        if self.change is None:
            return False
        moved = (change - self.change).abs().mean() / self.change.abs().mean()
        near = bool(moved < self.threshold)
        self.reused += near
        return near

    def keep(self, change: torch.Tensor, rest: torch.Tensor) -> None:
        """After a whole pass."""
        self.change, self.rest = change, rest
