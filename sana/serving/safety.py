"""An optional model that looks at prompts or at pictures, on the CPU unless told otherwise."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING

from sana.utils.pretrained import load_pretrained

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image


class Safety:
    """A classifier of transformers: of pictures (`...ForImageClassification`) or of prompts (`...ForSequenceClassification`)."""

    def __init__(
        self, model: str | Path, *, label: str = "nsfw", threshold: float = 0.5, device: str = "cpu"
    ) -> None:
        """Load it.

        Args:
            model: folder or hub name.
            label: the one of its labels that it acts on.
            threshold: the least probability of that label at which it acts, above 0 and at most 1.

        Raises:
            ValueError: nothing loadable is there, it is another kind of model, or it has no such label.
        """
        import torch
        from transformers import (
            AutoConfig,
            AutoImageProcessor,
            AutoModelForImageClassification,
            AutoModelForSequenceClassification,
            AutoTokenizer,
        )

        from sana.utils import hub

        if not 0 < threshold <= 1:
            raise ValueError(
                f"the threshold of the safety model must be above 0 and at most 1, got {threshold}"
            )
        config = AutoConfig.from_pretrained(hub.resolve_model(model))
        kinds = " ".join(config.architectures or ())
        self.of_pictures = "ForImageClassification" in kinds
        if not self.of_pictures and "ForSequenceClassification" not in kinds:
            raise ValueError(
                f"the safety model {str(model)!r} classifies neither pictures nor texts: it is {kinds or 'unknown'}"
            )
        parts = (
            (AutoModelForImageClassification, AutoImageProcessor)
            if self.of_pictures
            else (AutoModelForSequenceClassification, AutoTokenizer)
        )
        self._model, self._prepare = load_pretrained(
            "a safety model", model, *parts, dtype=torch.float32, device=device
        )
        names = {name.lower(): index for index, name in self._model.config.id2label.items()}
        if label.lower() not in names:
            raise ValueError(
                f"the safety model {str(model)!r} has no label {label!r}; choose from {', '.join(names)}"
            )
        self.label, self.threshold, self._index = label.lower(), threshold, names[label.lower()]
        self._alone = threading.Lock()

    def require_harmless(self, prompt: str) -> None:
        """Refuse a prompt; a classifier of pictures refuses none.

        Raises:
            ValueError: what it says of the prompt.
        """
        if not self.of_pictures:
            inputs = self._prepare(prompt, return_tensors="pt", truncation=True, max_length=512)
            probability = self._probability(inputs)
            if probability >= self.threshold:
                raise ValueError(f"the safety model refuses this prompt ({self.label}: {probability:.2f})")

    def objection(self, picture: Image) -> str:
        """Why a picture is withheld; empty if it is not. A classifier of prompts withholds none."""
        if self.of_pictures:
            probability = self._probability(self._prepare(picture, return_tensors="pt"))
            if probability >= self.threshold:
                return f"the safety model withheld this image ({self.label}: {probability:.2f})"
        return ""

    def _probability(self, inputs: dict[str, torch.Tensor]) -> float:
        import torch

        with self._alone, torch.no_grad():  # prompts come from many threads
            logits = self._model(
                **{key: value.to(self._model.device) for key, value in inputs.items()}
            ).logits
        return logits.float().softmax(-1)[0, self._index].item()
