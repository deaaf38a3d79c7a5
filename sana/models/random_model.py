"""A model with random weights on disk, as a release has it: for measurements that do not depend on what is drawn."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import AutoModel, Gemma2Config, PreTrainedTokenizerFast

from sana.models.autoencoder import PUBLISHED, Autoencoder, AutoencoderConfig
from sana.models.zoo import build_transformer

TEXT_SIZES: dict[str, dict[str, int]] = {
    "gemma-2-2b": {},
    "small": {
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 32000,
    },
}
"""Name -> fields of Gemma2Config that differ from its defaults, which are Gemma-2-2b."""

SHARD_BYTES = 2**30
SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")

AUTOENCODERS = {"dc-ae": PUBLISHED, "tiny": AutoencoderConfig()}


def write(
    folder: Path,
    *,
    transformer: str,
    autoencoder: str,
    text_encoder: str,
    dtype: torch.dtype,
    texts: Sequence[str],
    overrides: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> None:
    """Write `transformer/`, `autoencoder/` and `text_encoder/` into `folder`; about 1 GiB is in memory at a time.

    Args:
        transformer: a name in `sana.models.zoo.TRANSFORMERS`.
        autoencoder: a key of AUTOENCODERS.
        text_encoder: a key of TEXT_SIZES.
        dtype: of the files.
        texts: what the tokenizer learns its words from.
        overrides: of the transformer's fields, see `sana.models.zoo.build_transformer`.
    """
    settings = Gemma2Config(**TEXT_SIZES[text_encoder], architectures=["Gemma2Model"])
    settings.dtype = str(dtype).removeprefix("torch.")
    with torch.device("meta"):
        networks = {
            "text_encoder": AutoModel.from_config(settings),
            "autoencoder": Autoencoder.from_config(AUTOENCODERS[autoencoder]).model,
            "transformer": build_transformer(
                transformer, **({"caption_channels": settings.hidden_size} | dict(overrides or {}))
            ),
        }
    generator = torch.Generator().manual_seed(seed)
    for name, network in networks.items():
        (folder / name).mkdir(parents=True)
        stem = "model" if name == "text_encoder" else "diffusion_pytorch_model"
        _write_shards(network.state_dict(), folder / name, stem, dtype, generator)
    settings.save_pretrained(folder / "text_encoder")
    networks["autoencoder"].save_config(folder / "autoencoder")
    _make_tokenizer(texts).save_pretrained(folder / "text_encoder")


def _make_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-fallback BPE of a few thousand tokens, learnt from `texts`, that treats spaces as Gemma's does."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    alphabet = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=4000, special_tokens=alphabet, show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    names = dict(zip(("pad_token", "eos_token", "bos_token", "unk_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def _values(name: str, like: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Random weights that keep activations of about unit size: matrices by their inputs, norms near one."""
    if like.ndim > 1:
        return torch.randn(like.shape, dtype=dtype, generator=generator).mul_(
            1 / math.sqrt(max(1, like[0].numel()))
        )
    return (
        torch.randn(like.shape, dtype=dtype, generator=generator)
        .mul_(0.1)
        .add_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    )


def _write_shards(
    state: dict[str, Tensor], folder: Path, stem: str, dtype: torch.dtype, generator: torch.Generator
) -> None:
    """Files of at most about SHARD_BYTES, and their index if there are several; one shard is in memory at a time."""
    groups: list[list[str]] = [[]]
    room = SHARD_BYTES
    for name, like in state.items():
        if groups[-1] and like.numel() * dtype.itemsize > room:
            groups.append([])
            room = SHARD_BYTES
        groups[-1].append(name)
        room -= like.numel() * dtype.itemsize
    places = {}
    for number, names in enumerate(groups, 1):
        file = (
            f"{stem}.safetensors"
            if len(groups) == 1
            else f"{stem}-{number:05d}-of-{len(groups):05d}.safetensors"
        )
        save_file(
            {name: _values(name, state[name], dtype, generator) for name in names},
            folder / file,
            {"format": "pt"},
        )
        places |= dict.fromkeys(names, file)
    if len(groups) > 1:
        index = {"metadata": {}, "weight_map": places}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
