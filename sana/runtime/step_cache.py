"""Steps that run the first block only, where that is near enough: fewer operations for other pictures."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Hashable
from typing import Any

import torch

from sana.models.caches import StepCache, TextCache, TimeCache
from sana.models.transformer import SanaTransformer

FORMS = 3
"""Of the batches of one run: both branches of guidance, the prompts alone, and with perturbed blocks. Each keeps two tensors
of tokens and a text; those of earlier sizes go."""


class StepCachedTransformer:
    """A transformer as `sana.diffusion.guidance.guided` calls it, with a `StepCache` for each run and form of batch.

    A run ends where the text changes: `guided` hands over one text cache for all steps. Calls without one run in full.
    """

    def __init__(self, transformer: SanaTransformer, threshold: float) -> None:
        if not threshold > 0:
            raise ValueError(f"the threshold of the step cache must be above 0, got {threshold}")
        self.transformer, self.threshold = transformer, threshold
        self.encode_text, self.encode_time = transformer.encode_text, transformer.encode_time
        self._caches: OrderedDict[Hashable, tuple[TextCache, StepCache]] = OrderedDict()

    @property
    def reused(self) -> int:
        """Steps of the last run of each form that ran the first block alone."""
        return sum(cache.reused for _, cache in self._caches.values())

    def __call__(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor | TimeCache,
        text_embeds: torch.Tensor | None,
        text_mask: torch.Tensor | None = None,
        *,
        text_cache: TextCache | None = None,
        perturbed_blocks: Collection[int] = (),
    ) -> torch.Tensor:
        """As `SanaTransformer.forward`."""
        settings: dict[str, Any] = {"text_cache": text_cache, "perturbed_blocks": perturbed_blocks}
        if text_cache is not None:
            form = (latents.shape, tuple(sorted(perturbed_blocks)))
            text, cache = self._caches.pop(form, (None, None))
            if text is not text_cache:
                cache = StepCache(self.threshold)
            self._caches[form] = (text_cache, cache)  # the latest
            if len(self._caches) > FORMS:
                self._caches.popitem(last=False)
            settings["step_cache"] = cache
        return self.transformer(latents, timestep, text_embeds, text_mask, **settings)
