"""A decoder-only language model as text encoder, behind a complex human instruction (CHI).

The instruction asks the model to enhance the prompt; what the model is about to say is in the hidden states of the
prompt's tokens, and those condition the transformer. Sana, arXiv 2410.10629, section 2.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from sana.utils import hub

HUB_NAMES = {
    "gemma-2b": "google/gemma-2b",
    "gemma-2b-it": "google/gemma-2b-it",
    "gemma-2-2b": "google/gemma-2-2b",
    "gemma-2-2b-it": "Efficient-Large-Model/gemma-2-2b-it",  # an ungated mirror
    "gemma-2-9b": "google/gemma-2-9b",
    "gemma-2-9b-it": "google/gemma-2-9b-it",
    "Qwen2-0.5B-Instruct": "Qwen/Qwen2-0.5B-Instruct",
    "Qwen2-1.5B-Instruct": "Qwen/Qwen2-1.5B-Instruct",
}
"""The names that published configs use; the released weights want gemma-2-2b-it."""


@dataclass(frozen=True, slots=True)
class TextFeatures:
    """Hidden states `embeds` (B, L, C) and `mask` (B, L) int64, 1 where a token is valid."""

    embeds: Tensor
    mask: Tensor

    def trimmed(self) -> TextFeatures:
        """Without the columns that are padding in every row: the same conditioning for less work."""
        width = int(self.mask.any(dim=0).nonzero().max()) + 1
        return TextFeatures(self.embeds[:, :width], self.mask[:, :width])


class TextEncoder(nn.Module):
    """Prompts to `TextFeatures` of exactly `max_length` tokens.

    Args:
        model: the decoder without its language-model head; its first output is the hidden state after the final norm.
        tokenizer: its tokenizer; padding goes to the right, whatever it was set to.
        max_length: L, tokens that the transformer sees (300 in the published models).
        chi_prompt: lines of the instruction, joined by newlines; the prompt follows at once, so the last line should end
            with a space. Empty: no instruction.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int = 300,
        chi_prompt: Sequence[str] = (),
    ) -> None:
        super().__init__()
        if max_length < 2:
            raise ValueError(f"model_max_length must be at least 2, got {max_length}")
        self.model, self.tokenizer, self.max_length = model, tokenizer, max_length
        self.tokenizer.padding_side = "right"
        self.chi = "\n".join(chi_prompt)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        max_length: int = 300,
        chi_prompt: Sequence[str] = (),
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
    ) -> TextEncoder:
        """Load a transformers folder, a hub name, or one of `HUB_NAMES`.

        Raises:
            ValueError: nothing loadable is there.
        """
        name = HUB_NAMES.get(str(name_or_path), str(name_or_path))
        folder = hub.resolve_model(name)
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder)
            model = AutoModel.from_pretrained(folder, dtype=dtype)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"cannot load a text encoder from {name!r}: {reason}") from error
        encoder = cls(model, tokenizer, max_length=max_length, chi_prompt=chi_prompt)
        return encoder.to(device).eval().requires_grad_(False)

    @property
    def hidden_size(self) -> int:
        """C, the width of the embeddings."""
        return self.model.config.hidden_size

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.model.device

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> TextFeatures:
        """Encode prompts behind the instruction: the first token (BOS) and the last `max_length` - 1 positions.

        The instruction's trailing space is a token of its own when it stands alone and merges with the prompt's first
        word when not; so one token of the instruction is given back, and the window begins with that first word.
        """
        if not self.chi:
            return self._forward(prompts, self.max_length, trim=True)
        length = len(self.tokenizer.encode(self.chi)) + self.max_length - 2
        features = self._forward([self.chi + prompt for prompt in prompts], length, trim=True)
        window = [0, *range(length - self.max_length + 1, length)]
        return TextFeatures(features.embeds[:, window], features.mask[:, window])

    @torch.no_grad()
    def encode_unconditional(self, prompts: list[str]) -> TextFeatures:
        """Encode the null caption "" or negative prompts: no instruction, and hidden states of the padding as well.

        The padding's states matter: in training a dropped caption keeps its mask, so the transformer has learnt to read
        as many of the null caption's states as the prompt has tokens.
        """
        return self._forward(prompts, self.max_length, trim=False)

    def _forward(self, texts: list[str], length: int, *, trim: bool) -> TextFeatures:
        """Hidden states of `texts`, padded or truncated to `length` tokens.

        With `trim` the columns that are padding in every text are not computed but zero. Padding lies to the right of a
        causal model's text, so that the valid states do not change.
        """
        tokens = self.tokenizer(
            texts,
            padding="max_length",
            truncation=True,
            max_length=length,
            return_tensors="pt",
            return_attention_mask=True,
        ).to(self.device)
        ids, mask = tokens.input_ids, tokens.attention_mask
        width = int(mask.sum(dim=1).max()) if trim else length
        hidden = self.model(input_ids=ids[:, :width], attention_mask=mask[:, :width], use_cache=False)[0]
        return TextFeatures(F.pad(hidden, (0, 0, 0, length - width)), mask)
