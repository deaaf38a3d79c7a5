"""Between the stages of a picture: what they hand on, and what is said when one of them fails."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sana.models.text_encoder import TextFeatures
from sana.utils.oom import free_memory, is_out_of_memory


class NonFiniteError(ArithmeticError):
    """Latents or pixels hold NaN or infinity: nothing that could be shown."""


@dataclass(frozen=True, slots=True)
class PromptFeatures:
    """What the networks read of prompts, and of what to steer away from (None: nothing is)."""

    text: TextFeatures
    null: TextFeatures | None

    def row(self, index: int) -> PromptFeatures:
        """Those of one prompt."""
        parts = (
            part and TextFeatures(part.embeds[[index]], part.mask[[index]]) for part in (self.text, self.null)
        )
        return PromptFeatures(*parts)

    def save(self, path: Path) -> None:
        """Write a file for `load`."""
        parts = (self.text,) if self.null is None else (self.text, self.null)
        torch.save([(part.embeds.cpu(), part.mask.cpu()) for part in parts], path)

    @classmethod
    def load(cls, path: Path, device: torch.device) -> PromptFeatures:
        """What `save` wrote."""
        parts = torch.load(path, map_location=device, weights_only=True)
        text, null = (*(TextFeatures(*part) for part in parts), None)[:2]
        return cls(text, null)


@contextmanager
def stage(what: str) -> Iterator[None]:
    """Running out of memory becomes a `MemoryError` of one line that says where, after what can be freed is free."""
    try:
        yield
        return
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error) or str(error).startswith("out of memory"):
            raise
        reason = str(error).partition("\n")[0][:200]
    free_memory()  # the exception is gone, and with it the tensors that its traceback held
    raise MemoryError(
        f"out of memory while {what}: fewer images at once, --offload or --quantize take less ({reason})"
    )


def require_finite(what: str, values: Tensor, hint: str) -> None:
    """NaN turns into a black picture if nobody looks.

    Raises:
        NonFiniteError: names the images, and holds `hint`.
    """
    bad = (~values.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
    if bad:
        raise NonFiniteError(f"the {what} of image(s) {', '.join(map(str, bad))} are not finite, {hint}")


def require_plain_guidance(
    negatives: Sequence[str], *, uses_pag: bool, interval: tuple[float, float]
) -> None:
    """Refuse what sampler scm would silently leave out.

    Raises:
        ValueError: a negative prompt, a PAG scale or an interval.
    """
    if any(negatives) or uses_pag or interval != (0, 1):
        raise ValueError(
            "sampler scm has no unconditional branch: a negative prompt, a PAG scale above 1 or a guidance interval would "
            "have no effect; leave them out"
        )


def pair_prompts(
    prompts: Sequence[str], negative_prompt: str | Sequence[str], copies: int
) -> tuple[list[str], list[str]]:
    """Prompt and negative prompt of each image.

    Raises:
        ValueError: no prompt, or not as many negative ones.
    """
    if not prompts:
        raise ValueError("an empty list of prompts; give at least one (which may be the empty text)")
    negatives = (
        [negative_prompt] * len(prompts) if isinstance(negative_prompt, str) else list(negative_prompt)
    )
    if len(negatives) != len(prompts):
        raise ValueError(
            f"{len(negatives)} negative prompts for {len(prompts)} prompts: give one for each, or one for all"
        )
    repeated = ([text for text in texts for _ in range(copies)] for texts in (prompts, negatives))
    return tuple(repeated)
