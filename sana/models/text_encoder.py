"""A decoder-only language model as text encoder, behind a complex human instruction (CHI).

The instruction asks the model to enhance the prompt; what the model is about to say is in the hidden states
of the prompt's tokens, and those condition the transformer. Sana, arXiv 2410.10629, section 2.3.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from sana.utils import hub
from sana.utils.oom import is_out_of_memory
from sana.utils.pretrained import no_loading_bar

T = TypeVar("T")

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

T5_NAMES = ("T5", "T5-small", "T5-base", "T5-large", "T5-xl", "T5-xxl")
"""Names that published configs may hold too; no published weights were trained with one of them."""

NULL_MASKS = ("prompt", "own")
"""Whose mask the unconditional branch has, see `unconditional_mask`; the first is the reference's choice."""


@dataclass(frozen=True, slots=True)
class TextFeatures:
    """Hidden states `embeds` (B, L, C) and `mask` (B, L) int64, 1 where a token is valid."""

    embeds: Tensor
    mask: Tensor

    def trimmed(self) -> TextFeatures:
        """Without the columns that are padding in every row: the same conditioning for less work."""
        width = int(self.mask.any(dim=0).nonzero().max()) + 1
        return TextFeatures(self.embeds[:, :width], self.mask[:, :width])


def unconditional_mask(text_mask: Tensor, null_mask: Tensor, convention: str = "prompt") -> Tensor:
    """The mask (B, L) under which the unconditional branch sees its negative prompts, empty or not.

    "prompt": that of the prompts, as in the reference. In training a dropped caption keeps its mask, so the
    network has learnt to read as many states of the null caption as the prompt has tokens, those of its
    padding among them. A negative prompt that is longer than the prompt is then cut off.
    "own": that of the negative prompts, as in diffusers.

    Args:
        text_mask: (B, L), of the prompts.
        null_mask: (B, L), of the negative prompts.
        convention: one of `NULL_MASKS`.

    Raises:
        ValueError: unknown convention.
    """
    if convention not in NULL_MASKS:
        raise ValueError(
            f"unknown mask of the negative prompts {convention!r}; choose from {', '.join(NULL_MASKS)}"
        )
    return text_mask if convention == "prompt" else null_mask


def trim_together(text: TextFeatures, null: TextFeatures) -> tuple[TextFeatures, TextFeatures]:
    """Both without the columns that are padding in every row of either: their masks as they are, less work."""
    both = TextFeatures(torch.cat([text.embeds, null.embeds]), torch.cat([text.mask, null.mask])).trimmed()
    rows = (len(text.embeds), len(null.embeds))
    return tuple(map(TextFeatures, both.embeds.split(rows), both.mask.split(rows)))


@dataclass(frozen=True, slots=True)
class _Instruction:
    """What every prompt is encoded behind: the instruction without its last token, which may merge with the prompt."""

    ids: Tensor
    """(P,)."""
    cache: DynamicCache
    """Its keys and values in every layer, batch 1."""
    first: Tensor
    """(1, 1, C): the hidden state of its token 0."""


class TextEncoder(nn.Module):
    """Prompts to `TextFeatures` of exactly `max_length` tokens.

    The instruction is run once and its keys and values kept, and so is the empty prompt, as long as the model stays
    on its device and in its dtype: its weights must not change.

    Args:
        model: the decoder without its language-model head; its first output is the hidden state after the
            final norm.
        tokenizer: its tokenizer; padding goes to the right, whatever it was set to.
        max_length: L, tokens that the transformer sees (300 in the published models).
        chi_prompt: lines of the instruction, joined by newlines; the prompt follows at once, so the last line
            should end with a space. Empty: no instruction.
        lowercase: lower-case prompts and strip their outer white space, as diffusers does. The reference does
            not.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int = 300,
        chi_prompt: Sequence[str] = (),
        lowercase: bool = False,
    ) -> None:
        super().__init__()
        if max_length < 2:
            raise ValueError(f"model_max_length must be at least 2, got {max_length}")
        self.model, self.tokenizer, self.max_length, self.lowercase = model, tokenizer, max_length, lowercase
        self.tokenizer.padding_side = "right"
        self.chi = "\n".join(chi_prompt)
        self._kept: dict[str, Any] = {}  # by what `_keep` is asked for
        self._kept_for: tuple[torch.device, torch.dtype] | None = None

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        max_length: int = 300,
        chi_prompt: Sequence[str] = (),
        lowercase: bool = False,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
    ) -> TextEncoder:
        """Load a transformers folder, a diffusers pipeline folder, a hub name, or one of `HUB_NAMES`.

        Of a pipeline folder, `text_encoder/` and `tokenizer/` are read; naming its `text_encoder/` does the
        same.

        Raises:
            ValueError: nothing loadable is there, weights are missing, or it is no decoder-only model.
        """
        model_folder, tokenizer_folder = find_folders(str(name_or_path))
        try:
            tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
            with no_loading_bar():
                model, report = AutoModel.from_pretrained(model_folder, dtype=dtype, output_loading_info=True)
        except (
            OSError,
            ValueError,
            RuntimeError,
            LookupError,
            TypeError,
            ImportError,
            SafetensorError,
        ) as error:
            if is_out_of_memory(error):
                raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(f"cannot load a text encoder from {str(name_or_path)!r}: {reason}") from error
        if model.config.is_encoder_decoder:
            raise ValueError(
                f"{str(name_or_path)!r} is a {model.config.model_type} encoder-decoder: "
                "Sana needs a decoder-only model"
            )
        # transformers would go on with random weights.
        if missing := sorted(report["missing_keys"]):
            raise ValueError(
                f"the text encoder in {str(name_or_path)!r} lacks {len(missing)} weights, "
                f"{missing[0]} among them"
            )
        encoder = cls(model, tokenizer, max_length=max_length, chi_prompt=chi_prompt, lowercase=lowercase)
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
    def encode(self, prompts: Sequence[str]) -> TextFeatures:
        """Encode prompts behind the instruction: position 0 (BOS) and the last `max_length` - 1 positions.

        With n tokens in the instruction alone, these are the positions n - 1 to n + `max_length` - 3,
        whatever stands there. The instruction ends with a space, its token n - 1, which merges with the word
        that follows; so the window begins with the prompt's first word. Where the space merges with nothing
        (before a digit, an emoji, a newline, most Chinese or Japanese, or the empty prompt), the window
        begins with the lone space, as it did in training. Tokens beyond the window are cut off.
        """
        length, start = self.max_length, 1
        if self.chi:
            start = len(self.tokenizer.encode(self.chi)) - 1
            length += start - 1
        ids, mask, each = self._tokenize([self.chi + self._cleaned(prompt) for prompt in prompts], length)
        # Padding lies to the right of a causal model's text: no valid state changes if it is not computed.
        width = max(1, int(mask.sum(dim=1).max()))
        hidden = self._hidden(ids[:, :width], mask[:, :width], start)
        hidden = F.pad(hidden, (0, 0, 0, self.max_length - hidden.shape[1]))
        return TextFeatures(hidden[each], torch.cat([mask[:, :1], mask[:, start:]], dim=1)[each])

    @torch.no_grad()
    def encode_unconditional(self, prompts: Sequence[str]) -> TextFeatures:
        """Encode the null caption "" or negative prompts: no instruction, but hidden states of the padding.

        They matter: see `unconditional_mask`.
        """
        if any(prompts):
            return self._encode_padding(prompts)
        null = self._keep("null", lambda: self._encode_padding([""]))
        return TextFeatures(null.embeds.repeat(len(prompts), 1, 1), null.mask.repeat(len(prompts), 1))

    def _encode_padding(self, prompts: Sequence[str]) -> TextFeatures:
        ids, mask, each = self._tokenize([self._cleaned(prompt) for prompt in prompts], self.max_length)
        hidden = self.model(input_ids=ids, attention_mask=mask, use_cache=False)[0]
        return TextFeatures(hidden[each], mask[each])

    def _cleaned(self, prompt: str) -> str:
        return prompt.lower().strip() if self.lowercase else prompt

    def _tokenize(self, texts: Sequence[str], length: int) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids and mask (distinct texts, `length`), and for each text the row that it has there."""
        rows = {text: row for row, text in enumerate(dict.fromkeys(texts))}
        tokens = self.tokenizer(
            list(rows),
            padding="max_length",
            truncation=True,
            max_length=length,
            return_tensors="pt",
            return_attention_mask=True,
        ).to(self.device)
        each = torch.tensor([rows[text] for text in texts], device=self.device)
        return tokens.input_ids, tokens.attention_mask, each

    def _hidden(self, ids: Tensor, mask: Tensor, start: int) -> Tensor:
        """Hidden states of token 0 and of the tokens from `start` on, (B, 1 + width - start, C)."""
        instruction = self._keep("instruction", self._run_instruction) if self.chi and start else None
        if instruction is None or not torch.equal(ids[:, :start], instruction.ids.expand(len(ids), -1)):
            # No instruction; or it ends in more than one token that merges with a prompt.
            hidden = self.model(input_ids=ids, attention_mask=mask, use_cache=False)[0]
            return torch.cat([hidden[:, :1], hidden[:, start:]], dim=1)
        cache = copy.deepcopy(instruction.cache)  # the model appends to it
        cache.batch_repeat_interleave(len(ids))
        hidden = self.model(input_ids=ids[:, start:], attention_mask=mask, past_key_values=cache)[0]
        return torch.cat([instruction.first.expand(len(ids), -1, -1), hidden], dim=1)

    def _run_instruction(self) -> _Instruction:
        ids = torch.tensor(self.tokenizer.encode(self.chi)[:-1], device=self.device)
        cache = DynamicCache(config=self.model.config)
        hidden = self.model(input_ids=ids[None], past_key_values=cache)[0]
        return _Instruction(ids, cache, hidden[:, :1])

    def _keep(self, what: str, make: Callable[[], T]) -> T:
        """The result of `make`, from the last call if the model is where and as it was."""
        now = (self.model.device, self.model.dtype)
        if self._kept_for != now:
            self._kept, self._kept_for = {}, now
        if what not in self._kept:
            self._kept[what] = make()
        return self._kept[what]


def find_folders(name: str, resolve: Callable[[str], Path] | None = None) -> tuple[Path, Path]:
    """The folders of the model and of its tokenizer; errors as in `TextEncoder.from_pretrained`.

    Args:
        resolve: how they are fetched; None is `sana.utils.hub.resolve_model`.
    """
    if name in T5_NAMES:
        raise ValueError(
            f"text encoder {name!r}: T5 is not supported; the published weights need gemma-2-2b-it"
        )
    try:
        folder = (resolve or hub.resolve_model)(HUB_NAMES.get(name, name))
    except ValueError as error:
        near = difflib.get_close_matches(name, HUB_NAMES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near and name not in HUB_NAMES else ""
        raise ValueError(f"cannot load a text encoder from {name!r}: {error}{hint}") from error
    model = folder / "text_encoder" if (folder / "text_encoder").is_dir() else folder
    beside = model.parent / "tokenizer"
    return model, beside if beside.is_dir() and not (model / "tokenizer_config.json").is_file() else model
