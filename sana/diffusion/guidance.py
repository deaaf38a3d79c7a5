"""Guidance: from a conditional network to a velocity v(x, t) for a solver.

With u, c, p the network's velocities without the prompt, with it, and with it but perturbed self-attention:

    classifier-free guidance (CFG)        u + g (c - u)                  (Ho & Salimans 2022)
    ... in an interval of t               the above inside, c outside    (Kynkaanniemi et al. 2024)
    perturbed-attention guidance (PAG)    ... + s (c - p)                (Ahn et al. 2024)
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from sana.diffusion.flow import network_time
from sana.diffusion.solvers import Velocity


class TextConditions(Protocol):
    """What the text encoder hands over: features, and the mask of valid tokens."""

    @property
    def embeds(self) -> Tensor:
        """(B, L, C)."""
        ...

    @property
    def mask(self) -> Tensor | None:
        """(B, L), 1 = valid; None when every token is."""
        ...


@dataclass(frozen=True)
class Guidance:
    """Guidance settings; sequences may be given as lists.

    Raises:
        ValueError: a value out of range, or one that could have no effect.
    """

    scale: float = 4.5
    """g of CFG, at least 0. 1 turns CFG off and halves the cost."""
    interval: tuple[float, float] = (0.0, 1.0)
    """CFG acts only where lo < t < hi; an end at 0 or 1 is no limit. Without PAG only."""
    pag_scale: float = 1.0
    """s of PAG, on when above 1. The multiplier is s itself, not s - 1: there is a jump at 1."""
    pag_blocks: tuple[int, ...] = ()
    """Indices of the transformer blocks whose self-attention is replaced by its value path when PAG is on."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "interval", tuple(self.interval))
        object.__setattr__(self, "pag_blocks", tuple(self.pag_blocks))
        if not 0 <= self.scale < math.inf:
            raise ValueError(f"guidance scale must be finite and at least 0, got {self.scale}; 1 is off")
        if not 0 <= self.pag_scale < math.inf:
            raise ValueError(f"PAG scale must be finite and at least 0, got {self.pag_scale}; 1 is off")
        if len(self.interval) != 2 or not 0 <= self.interval[0] <= self.interval[1] <= 1:
            raise ValueError(f"guidance interval must have 0 <= lo <= hi <= 1, got {self.interval}")
        if self.uses_pag and not self.pag_blocks:
            raise ValueError(f"PAG scale {self.pag_scale} needs pag_blocks, the blocks to perturb; got none")
        if self.uses_pag and self.interval != (0, 1):
            raise ValueError(f"PAG (scale {self.pag_scale}) takes no guidance interval, got {self.interval}")

    @property
    def uses_pag(self) -> bool:
        """Whether PAG is on, at every t."""
        return self.pag_scale > 1

    def uses_cfg(self, t: float) -> bool:
        """Whether CFG is on at time t in [0, 1]."""
        lo, hi = self.interval
        return self.scale != 1 and (lo < t or lo == 0) and (t < hi or hi == 1)


def guided(
    model: Callable[..., Tensor],
    text: TextConditions,
    null: TextConditions | None,
    guidance: Guidance,
    times: Sequence[float] = (),
) -> Velocity:
    """A velocity v(x, t) that asks the model under guidance, for one batch of prompts.

    Args:
        model: called as model(latents, time, embeds, mask, text_cache=, perturbed_blocks=). The time is (B,)
            float32, whole numbers from `network_time`. The model computes in its own dtype, and should be in
            eval mode: in training it drops captions. If it has `encode_text(embeds, mask)`, the result is its
            `text_cache`, made once for each batch of text and kept as long as the returned velocity; what has a
            method `last(count)` gives that of the prompts alone from that of [null, text].
        text: the prompts' features, batch B.
        null: features of the negative or empty prompts, batch B or 1; None is enough at guidance.scale 1.
            Its mask is used as it comes: which tokens an empty prompt attends to is the caller's choice.
        guidance: the settings.
        times: where the solver will ask. If the model has `encode_time(times)`, it is asked for all of them at once,
            and what it returns for a time is given in its place.

    Returns:
        velocity(x, t): x (B, ...), t float; result in the dtype of x. CFG is one call on the batch
        [null, text], PAG a second one on the text; with both off there is a single call on the text.

    Raises:
        ValueError: null is missing, or does not fit text; in velocity(), x is not of batch B.
    """
    encoded = _encode_times(model, times, text.embeds.device)
    both_branches = None
    if guidance.scale != 1:
        both_branches = _Branch(model, *_null_then_text(null, text), encoded)
    conditional_branch = _Branch(model, text.embeds, text.mask, encoded, part_of=both_branches)
    guides = [guidance.uses_cfg(t) for t in times]
    if any(guides):  # now, so that no step has to
        both_branches.encode_text()
    if times and (guidance.uses_pag or not all(guides)):
        conditional_branch.encode_text()

    def velocity(x: Tensor, t: float) -> Tensor:
        if len(x) != len(text.embeds):
            raise ValueError(f"{len(x)} latents for {len(text.embeds)} prompts: use one prompt per latent")
        if guidance.uses_cfg(t):
            unconditional, conditional = both_branches(torch.cat([x, x]), t).chunk(2)
            result = unconditional + guidance.scale * (conditional - unconditional)
        else:
            result = conditional = conditional_branch(x, t)
        if guidance.uses_pag:
            perturbed = conditional_branch(x, t, guidance.pag_blocks)
            result = result + guidance.pag_scale * (conditional - perturbed)
        return result

    return velocity


class _Branch:
    """The model with one batch of text, and the text's cross-attention cache once it has been needed."""

    def __init__(
        self,
        model: Callable[..., Tensor],
        embeds: Tensor,
        mask: Tensor | None,
        times: Mapping[float, Any],
        part_of: "_Branch | None" = None,
    ) -> None:
        self.model, self.embeds, self.mask, self.times = model, embeds, mask, times
        self._part_of = part_of
        self._text_cache: Any = None

    def encode_text(self) -> Any:
        """What the model makes of the text, kept; None if it has no `encode_text`."""
        encode_text = getattr(self.model, "encode_text", None)
        if self._text_cache is None and encode_text is not None:
            whole = self._part_of and self._part_of._text_cache
            if hasattr(whole, "last"):
                self._text_cache = whole.last(len(self.embeds))
            else:
                self._text_cache = encode_text(self.embeds, self.mask)
        return self._text_cache

    def __call__(self, x: Tensor, t: float, perturbed_blocks: tuple[int, ...] = ()) -> Tensor:
        time = self.times.get(t)
        if time is None:
            time = torch.full((len(x),), network_time(t), dtype=torch.float32, device=x.device)
        velocity = self.model(
            x, time, self.embeds, self.mask, text_cache=self.encode_text(), perturbed_blocks=perturbed_blocks
        )
        return velocity.to(x.dtype)


def _encode_times(
    model: Callable[..., Tensor], times: Sequence[float], device: torch.device
) -> dict[float, Any]:
    """What the model makes of each time, or nothing."""
    encode_time = getattr(model, "encode_time", None)
    if encode_time is None or not len(times):
        return {}
    network_times = torch.tensor([network_time(t) for t in times], dtype=torch.float32)
    return dict(zip(times, encode_time(network_times.to(device)), strict=True))


def _null_then_text(null: TextConditions | None, text: TextConditions) -> tuple[Tensor, Tensor | None]:
    """Features and mask of the doubled batch [null, text], a null batch of 1 expanded."""
    if null is None:
        raise ValueError("a guidance scale other than 1 needs features of the negative or empty prompt")
    if (null.mask is None) != (text.mask is None):
        raise ValueError("the negative prompt and the prompt must both have a mask, or neither")
    embeds = _after(null.embeds, text.embeds)
    return embeds, None if text.mask is None else _after(null.mask, text.mask)


def _after(null: Tensor, text: Tensor) -> Tensor:
    """cat([null, text]) along the batch, with a null batch of 1 expanded to that of text."""
    if null.shape[1:] != text.shape[1:] or len(null) not in (1, len(text)):
        raise ValueError(
            f"negative prompt features {tuple(null.shape)} do not fit the prompt's {tuple(text.shape)}: "
            f"use the same length and width, and batch 1 or {len(text)}"
        )
    return torch.cat([null.expand_as(text), text])
