"""Networks without weights: what a config names, on the device "meta", from config files alone."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch
from diffusers import AutoencoderDC
from transformers import AutoConfig, AutoModel, AutoTokenizer, Gemma2Config, PreTrainedModel

from sana.models.autoencoder import NATIVE_WEIGHTS, PUBLISHED, Autoencoder
from sana.models.checkpoints import AUTOENCODERS
from sana.utils import hub

_GEMMA_2_2B = ("gemma-2-2b", "gemma-2-2b-it")
_CHARACTERS_A_TOKEN = 4
"""About, of an English instruction."""


def outline_autoencoder(name: str) -> Autoencoder:
    """The autoencoder of a local folder, or a published one.

    Raises:
        ValueError: neither; nothing is downloaded.
    """
    folder = _local(name)
    with torch.device("meta"):
        if folder is not None and not (folder / NATIVE_WEIGHTS).is_file():
            return Autoencoder(AutoencoderDC.from_config(AutoencoderDC.load_config(folder)))
        if name.removeprefix("hf://") in AUTOENCODERS and "lite" not in name:
            return Autoencoder(AutoencoderDC(**asdict(PUBLISHED)))
    raise ValueError(
        f"no plan for autoencoder {name!r}: it is not on this machine, and none whose shape is known"
    )


def outline_text_encoder(name: str) -> PreTrainedModel:
    """The language model of a local folder, or Gemma-2-2b; its dtype is that of the files.

    Raises:
        ValueError: neither; nothing is downloaded.
    """
    folder = _local(name)
    if folder is not None:
        inner = folder / "text_encoder"
        settings = AutoConfig.from_pretrained(inner if inner.is_dir() else folder)
    elif Path(name).name in _GEMMA_2_2B:
        settings = Gemma2Config(dtype=torch.bfloat16)
    else:
        raise ValueError(
            f"no plan for text encoder {name!r}: it is not on this machine, and none whose shape is known"
        )
    with torch.device("meta"):
        return AutoModel.from_config(settings, dtype=settings.dtype or torch.float32).eval()


def instruction_tokens(name: str, lines: tuple[str, ...] | list[str]) -> int:
    """Tokens of the instruction: counted where the tokenizer is on this machine, else guessed."""
    text, folder = "\n".join(lines), _local(name)
    if not text or folder is None:
        return len(text) // _CHARACTERS_A_TOKEN
    return len(AutoTokenizer.from_pretrained(folder)(text).input_ids)


def _local(name: str) -> Path | None:
    if name.startswith("hf://") or hub.hub_address(name) is not None:
        return None
    try:
        return hub.resolve(name)
    except ValueError:
        return None
