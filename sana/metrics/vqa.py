"""Judges: vision-language models of transformers that answer a question about a picture with yes or no."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    BlipForQuestionAnswering,
    ProcessorMixin,
    ViltForQuestionAnswering,
)

from sana.metrics.dpg import Judge
from sana.metrics.weights import fetched_by, hub_command
from sana.utils import hub
from sana.utils.logging import first_line
from sana.utils.pretrained import chat_answers, load_pretrained

JUDGE_NAME = "Salesforce/blip-vqa-capfilt-large"
"""Small and trained for questions. No judge's scores compare with another's, nor with the published ones (mPLUG)."""


class _Network:
    """A model with its processor; `name` is in the name of a metric."""

    def __init__(self, model: Any, processor: ProcessorMixin, name: str) -> None:
        self.model, self.processor, self.name = model, processor, name

    def _inputs(self, image: Image, questions: Sequence[str], **settings: object) -> Any:
        inputs = self.processor(
            images=[image.convert("RGB")] * len(questions),
            text=list(questions),
            padding=True,
            return_tensors="pt",
            **settings,
        )
        return inputs.to(self.model.device, self.model.dtype)


class BlipJudge(_Network):
    """BLIP, fine-tuned for questions: it writes its answer."""

    @torch.inference_mode()
    def __call__(self, image: Image, questions: Sequence[str]) -> list[str]:
        """The answer to each question."""
        # Its decoder sees the padding behind a question: only those of one length can be asked together.
        lengths = [len(ids) for ids in self.processor.tokenizer(list(questions)).input_ids]
        answers = [""] * len(questions)
        for length in set(lengths):
            places = [place for place, own in enumerate(lengths) if own == length]
            inputs = self._inputs(image, [questions[place] for place in places])
            tokens = self.model.generate(**inputs, max_new_tokens=10, num_beams=1)
            texts = self.processor.batch_decode(tokens, skip_special_tokens=True)
            for place, text in zip(places, texts, strict=True):
                answers[place] = text.strip()
        return answers


class ViltJudge(_Network):
    """ViLT, fine-tuned for questions: it chooses among 3129 answers."""

    @torch.inference_mode()
    def __call__(self, image: Image, questions: Sequence[str]) -> list[str]:
        """The answer to each question; of one longer than the model's context (40 tokens) the beginning counts."""
        context = self.model.config.max_position_embeddings
        logits = self.model(**self._inputs(image, questions, truncation=True, max_length=context)).logits
        return [self.model.config.id2label[index] for index in logits.argmax(-1).tolist()]


class ChatJudge(_Network):
    """Any instruction-tuned model for pictures and text.

    Raises:
        ValueError: it has no chat template, or its processor takes no pictures.
    """

    PROMPT = "{question} Answer only yes or no."

    def __init__(self, model: Any, processor: ProcessorMixin, name: str) -> None:
        super().__init__(model, processor, name)
        if not isinstance(processor, ProcessorMixin) or not processor.chat_template:
            raise ValueError(
                f"the judge {name} has no chat template: take its instruction-tuned version (often -Instruct or -it)"
            )
        self.processor.tokenizer.padding_side = "left"

    @torch.inference_mode()
    def __call__(self, image: Image, questions: Sequence[str]) -> list[str]:
        """The answer to each question, greedily."""
        pictures = [image.convert("RGB")] * len(questions)
        texts = [self.PROMPT.format(question=text) for text in questions]
        tokens = chat_answers(self.model, self.processor, pictures, texts, max_new_tokens=8)
        return [text.strip() for text in self.processor.batch_decode(tokens, skip_special_tokens=True)]


_KINDS = {"blip": (BlipForQuestionAnswering, BlipJudge), "vilt": (ViltForQuestionAnswering, ViltJudge)}


def load_judge(
    name_or_path: str | Path = JUDGE_NAME,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Judge:
    """The judge of a transformers folder or hub name, by the kind of its model.

    Raises:
        ValueError: nothing loadable is there, or it is no model that answers questions.
    """
    with fetched_by(hub_command(name_or_path), name_or_path):
        folder = hub.resolve_model(name_or_path)
        try:
            kind = AutoConfig.from_pretrained(folder).model_type
        except (OSError, ValueError) as error:
            raise ValueError(f"{name_or_path} is no model of transformers: {first_line(error)}") from error
        model_class, judge = _KINDS.get(kind, (AutoModelForImageTextToText, ChatJudge))
        parts = load_pretrained(
            "a judge", name_or_path, model_class, AutoProcessor, dtype=dtype, device=device
        )
    return judge(*parts, str(name_or_path).rstrip("/").rpartition("/")[2])
