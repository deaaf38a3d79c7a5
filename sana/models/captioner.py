"""A vision-language model that describes pictures: the labelling of Sana (arXiv 2410.10629, section 4.2)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL.Image import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin

from sana.utils.logging import get_logger
from sana.utils.pretrained import chat_answers, load_pretrained

log = get_logger(__name__)


class Captioner:
    """Pictures to captions, greedily: equal pictures get equal captions.

    Args:
        model: generates text from text and pictures.
        processor: its processor, with a chat template; padding goes to the left, whatever it was set to.
        prompt: what the model is asked about each picture.
        max_new_tokens: longest answer; a longer one is cut, and a line says so once.

    Raises:
        ValueError: the processor knows no pictures, or has no chat template.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        *,
        prompt: str,
        max_new_tokens: int = 256,
    ) -> None:
        if not isinstance(processor, ProcessorMixin) or not hasattr(processor, "image_processor"):
            raise ValueError(f"the processor of the model takes no pictures: {type(processor).__name__}")
        if not processor.chat_template:
            raise ValueError(
                "the model has no chat template: take its instruction-tuned version (often -Instruct or -it)"
            )
        self.model, self.processor = model, processor
        self.prompt, self.max_new_tokens = prompt, max_new_tokens
        self.processor.tokenizer.padding_side = "left"
        self._said = False

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        prompt: str,
        max_new_tokens: int = 256,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
    ) -> Captioner:
        """Load a transformers folder or a hub name.

        Raises:
            ValueError: nothing loadable is there, it is no vision-language model, or weights are missing.
        """
        model, processor = load_pretrained(
            "a vision-language model",
            name_or_path,
            *(AutoModelForImageTextToText, AutoProcessor),
            dtype=dtype,
            device=device,
        )
        return cls(model, processor, prompt=prompt, max_new_tokens=max_new_tokens)

    @torch.inference_mode()
    def describe(self, pictures: Sequence[Image]) -> list[str]:
        """The caption of each picture on one line; empty where the model says nothing.

        Raises:
            ValueError: the processor refuses a picture (some do where one side is very long).
        """
        questions = [self.prompt] * len(pictures)
        tokens = chat_answers(self.model, self.processor, pictures, questions, self.max_new_tokens)
        self._say_if_cut(tokens)
        texts = self.processor.batch_decode(tokens, skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]

    def _say_if_cut(self, answers: torch.Tensor) -> None:
        """answers (B, n): one that did not end at its n-th token, the last allowed, was cut."""
        if self._said or answers.shape[1] < self.max_new_tokens:
            return
        ends = self.model.generation_config.eos_token_id
        ends = torch.tensor(ends if isinstance(ends, list) else [-1 if ends is None else ends])
        if not torch.isin(answers.cpu(), ends).any(dim=1).all():
            self._said = True
            log.warning(
                "an answer was cut at %d tokens (--max_new_tokens); others may follow", self.max_new_tokens
            )
