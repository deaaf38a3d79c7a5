"""Train the small text encoder of Sana-tiny: a tokenizer and a Gemma-2 language model of the captions.

The model learns to continue "instruction + caption" with retellings of the caption, as the instruction of the large models
asks for an enhanced prompt, and to leave what the caption says where one step of attention finds it (`sana.training.questions`).
The hidden states of the caption then condition the transformer, and the model stays frozen.
"""

from __future__ import annotations

import itertools
import json
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast

from sana.shapes.captions import caption, noun_phrase, says
from sana.shapes.scene import OPPOSITE, Scene
from sana.shapes.splits import training_scene
from sana.training.questions import NOTHING_ASKED, Answers, Reader, answers, share_right
from sana.utils.logging import get_logger
from sana.utils.seeding import derive_seed

log = get_logger(__name__)

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")  # in Gemma's order
ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789.,▁\n"


class Text(NamedTuple):
    """A text to learn from."""

    given: str
    """The instruction and a caption: not learnt, but asked about. Or nothing."""
    follows: str
    answers: Answers
    """To the questions about the caption."""


class Row(NamedTuple):
    """A text in tokens."""

    tokens: list[int]
    given: int
    """How many of them, from the first, are given."""
    answers: Answers


_WINDOW = 16  # batches whose texts are sorted by length together
_RETELLINGS = 3
_SCENES = 10**9  # that training draws from


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-fallback BPE tokenizer in Gemma's manner: a space belongs to the word after it; BOS comes first.

    Every string has tokens: what the merges do not know falls back to letters, and those to bytes. Text is lower-cased.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Lowercase()
    words = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never", split=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.Punctuation("isolated")])
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))],
        initial_alphabet=list(ALPHABET),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    state = json.loads(tokenizer.to_str())
    # The bytes are ordinary tokens, only reserved as special.
    state["added_tokens"] = state["added_tokens"][: len(SPECIAL)]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    bos = tokenizer.token_to_id("<bos>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", bos)]
    )
    names = {f"{token[1:-1]}_token": token for token in SPECIAL}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="right", **names)


def build_language_model(
    tokenizer: PreTrainedTokenizerFast, *, hidden_size: int = 128, layers: int = 4, heads: int = 4
) -> Gemma2ForCausalLM:
    """A randomly initialised Gemma-2 of about one million parameters.

    Matrices begin at 1 / sqrt(inputs): with Gemma's 0.02, made for wide models, attention begins so even that the
    same loss took twice the steps.
    """
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=hidden_size // heads,
        query_pre_attn_scalar=hidden_size // heads,
        max_position_embeddings=512,
        sliding_window=512,
        attn_logit_softcapping=None,  # only needed at scale, and it would rule out fused attention
        final_logit_softcapping=None,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = Gemma2ForCausalLM(config)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return model


def load(folder: Path) -> tuple[Gemma2ForCausalLM, PreTrainedTokenizerFast]:
    """(model in float32, tokenizer) of a transformers folder on this disk.

    Raises:
        ValueError: there is no such model.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"no text encoder in {folder}: it has no config.json")
    return (
        Gemma2ForCausalLM.from_pretrained(folder, dtype=torch.float32),
        AutoTokenizer.from_pretrained(folder),
    )


def training_text(index: int, chi: str) -> Text:
    """Text number `index`: mostly instruction + caption, then retellings of it.

    A retelling says no more than the caption, in plain words and in either order ("right of" for "left of"): it can only be
    foretold by looking up what belongs to what. What the caption does not say is left out, for what is chance teaches
    nothing: with a description of the scene instead, colours took 2,000 steps, and relations were not learnt in 2,750. Most
    scenes are pairs whose relation is told. One text in sixteen is a bare caption with nothing given, as negative prompts
    come without the instruction.
    """
    rng = random.Random(derive_seed("language model", index))
    scene = training_scene(rng.randrange(_SCENES))
    while scene.relation is None and rng.random() > 0.2:
        scene = training_scene(rng.randrange(_SCENES))
    prompt = caption(scene, rng)
    while scene.relation and not says(scene, prompt)[1] and rng.random() > 0.1:
        prompt = caption(scene, rng)
    if rng.random() < 1 / 16:
        return Text("", prompt, NOTHING_ASKED)
    colours, related = says(scene, prompt)
    retold = "".join(f"\n{_retold(scene, rng, colours, related)}" for _ in range(_RETELLINGS))
    return Text(chi + prompt, retold, answers(scene, prompt))


def _retold(scene: Scene, rng: random.Random, colours: bool, related: bool) -> str:
    groups, relation = list(scene.groups), scene.relation
    if rng.random() < 0.5:
        groups.reverse()
        relation = relation and OPPOSITE[relation]
    phrases = [noun_phrase(group, colour=colours) for group in groups]
    return (f" {relation} " if related else " and ").join(phrases)


def row_of(tokenizer: PreTrainedTokenizerFast, text: Text) -> Row:
    """The tokens of a text and the end; what follows has tokens of its own, so that the given ones are those of a prompt."""
    head = tokenizer.encode(text.given) if text.given else []
    tail = tokenizer.encode(text.follows)[bool(head) :]
    return Row([*head, *tail, tokenizer.eos_token_id], len(head), text.answers)


def train_language_model(
    model: Gemma2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    chi: str,
    *,
    steps: int,
    batch_size: int = 64,
    lr: float = 2e-3,
    seed: int = 0,
    log_every: int = 100,
) -> list[float]:
    """Next-token prediction on all that is not given, and the questions; returns the losses of the tokens.

    Linear warm-up, then a cosine to zero. The log says what share of the answers to new captions is right.
    """
    reader = Reader(model.config.hidden_size).to(model.device)
    parameters = [*model.parameters(), *reader.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), weight_decay=0.05)
    warmup = min(100, steps)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=warmup),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps - warmup)),
        ],
        milestones=[warmup],
    )
    losses: list[float] = []
    began = time.perf_counter()
    model.train()
    for step, rows in enumerate(_similar_batches(tokenizer, chi, seed, steps, batch_size)):
        batch = _batch(tokenizer, rows, chi).to(model.device)
        with torch.autocast(model.device.type, dtype=torch.bfloat16):
            hidden = model.model(input_ids=batch.ids, attention_mask=batch.valid).last_hidden_state
            scores = model.lm_head(hidden)
        loss = functional.cross_entropy(scores[:, :-1].float().mT, batch.labels[:, 1:])
        optimizer.zero_grad(set_to_none=True)
        (loss + reader.loss(hidden.float(), batch.caption, batch.answers)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if (step + 1) % log_every == 0:
            recent = losses[-log_every:]
            rate = (step + 1) * batch_size / (time.perf_counter() - began)
            log.info(
                "step %d / %d  loss %.4f  %.0f texts/s", step + 1, steps, sum(recent) / len(recent), rate
            )
        if (step + 1) % (10 * log_every) == 0 or step + 1 == steps:
            shares = answered(model, reader, tokenizer, chi)
            log.info("answered: %s", "  ".join(f"{aspect} {share:.2f}" for aspect, share in shares.items()))
    return losses


def _similar_batches(
    tokenizer: PreTrainedTokenizerFast, chi: str, seed: int, steps: int, batch_size: int
) -> Iterator[list[Row]]:
    """`steps` batches of texts of similar length, in random order: half of a batch of unsorted ones would be padding."""
    for window in range(0, steps, _WINDOW):
        number = min(_WINDOW, steps - window)
        first = (seed * steps + window) * batch_size
        rows = [row_of(tokenizer, training_text(first + i, chi)) for i in range(number * batch_size)]
        rows.sort(key=lambda row: len(row.tokens))
        order = random.Random(derive_seed("order of batches", seed, window)).sample(range(number), number)
        for i in order:
            yield rows[i * batch_size : (i + 1) * batch_size]


class _Batch(NamedTuple):
    """Rows as tensors (B, L), and the answers (B, questions, aspects)."""

    ids: Tensor
    valid: Tensor
    labels: Tensor
    caption: Tensor
    answers: Tensor

    def to(self, device: torch.device) -> _Batch:
        return _Batch(*(part.to(device) for part in self))


def _batch(tokenizer: PreTrainedTokenizerFast, rows: Sequence[Row], chi: str) -> _Batch:
    """Labels are -100 on padding and on what is given; `caption` is what the transformer would see of it, as `TextEncoder`."""
    padded = itertools.zip_longest(*(row.tokens for row in rows), fillvalue=tokenizer.pad_token_id)
    ids = torch.tensor(list(padded)).T.contiguous()
    valid = ids != tokenizer.pad_token_id
    place, given = torch.arange(ids.shape[1]), torch.tensor([row.given for row in rows])[:, None]
    # The last token of the instruction, a space, belongs to the first word of the caption.
    instruction = len(tokenizer.encode(chi)) - 1
    return _Batch(
        ids=ids,
        valid=valid.long(),
        labels=ids.masked_fill(~valid | (place < given), -100),
        caption=(place == 0) | (place >= instruction) & (place < given),
        answers=torch.tensor([row.answers for row in rows]),
    )


@torch.no_grad()
def answered(
    model: Gemma2ForCausalLM,
    reader: Reader,
    tokenizer: PreTrainedTokenizerFast,
    chi: str,
    captions: int = 256,
) -> dict[str, float]:
    """Share of the right answers to questions about captions that training does not see, for each aspect."""
    was_training = model.training
    model.eval()
    texts = (training_text(-1 - i, chi) for i in range(captions))
    batch = _batch(tokenizer, [row_of(tokenizer, text) for text in texts], chi).to(model.device)
    hidden = model.model(input_ids=batch.ids, attention_mask=batch.valid).last_hidden_state
    model.train(was_training)
    return share_right(reader(hidden.float(), batch.caption), batch.answers)


def save(
    model: Gemma2ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path, dtype: torch.dtype
) -> None:
    """Write a transformers folder with weights as `dtype`."""
    model.eval().to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
