"""Networks without weights: what a config names, on the device "meta", from config files alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from diffusers import AutoencoderDC
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModel, AutoTokenizer, Gemma2Config, PreTrainedModel

from sana.models import dc_ae_names
from sana.models.autoencoder import NATIVE_WEIGHTS, PUBLISHED, Autoencoder
from sana.models.checkpoints import AUTOENCODERS
from sana.models.text_encoder import find_folders
from sana.utils import hub

_GEMMA_2_2B = ("gemma-2-2b", "gemma-2-2b-it")
_CHARACTERS_A_TOKEN = 4
"""About, of an English instruction."""


def outline_autoencoder(name: str) -> Autoencoder:
    """The autoencoder of a folder, local or on the hub, of which settings are fetched, not weights.

    The shape of a published one is known, but for the lighter ones: of these the authors' release is fetched.

    Raises:
        ValueError: nothing is there, or it is no DC-AE.
    """
    published = name.removeprefix("hf://")
    with torch.device("meta"):
        if published in AUTOENCODERS and "lite" not in published:
            return Autoencoder(AutoencoderDC(**asdict(PUBLISHED)))
        native = AUTOENCODERS.get(published) == "native"  # with settings that say nothing
        folder = hub.resolve_model(name) if native else hub.resolve_settings(name)
        try:
            if (folder / NATIVE_WEIGHTS).is_file():
                return Autoencoder(AutoencoderDC(**_native_layout(folder / NATIVE_WEIGHTS)))
            return Autoencoder(AutoencoderDC.from_config(AutoencoderDC.load_config(folder)))
        except (OSError, ValueError, TypeError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"cannot read the shape of an AutoencoderDC from {name!r}: {reason}") from error


def outline_text_encoder(name: str, instruction: Sequence[str]) -> tuple[PreTrainedModel, int]:
    """The language model of a folder, local or on the hub, in the dtype of its files, and how many tokens an instruction is.

    Of the hub settings are fetched, not weights; of Gemma-2-2b nothing, for it is known, and its tokens are guessed.

    Raises:
        ValueError: nothing is there, or it is no model of transformers.
    """
    text = "\n".join(instruction)
    try:
        if Path(name).name in _GEMMA_2_2B and not Path(name).is_dir():
            settings, tokens = Gemma2Config(dtype=torch.bfloat16), len(text) // _CHARACTERS_A_TOKEN
        else:
            folder, words = find_folders(name, hub.resolve_settings)
            settings = AutoConfig.from_pretrained(folder)
            tokens = len(AutoTokenizer.from_pretrained(words)(text).input_ids) if text else 0
        with torch.device("meta"):
            return AutoModel.from_config(settings, dtype=settings.dtype or torch.float32).eval(), tokens
    except (OSError, ValueError, LookupError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"cannot read the shape of a text encoder from {name!r}: {reason}") from error


def _native_layout(weights: Path) -> dict[str, object]:
    """The arguments of an authors' release, whose tensors alone tell them."""
    with safe_open(weights, "pt") as file:
        shapes = {key: torch.empty(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 no mapping
    return dc_ae_names.layout(dc_ae_names.from_native(shapes))
