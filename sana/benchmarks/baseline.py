"""What a user would take instead, diffusers, with the weights of ours: networks of any published size, made at random.

Both read the same memory, but for what one of them needs in another form: diffusers has queries, keys and values apart.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderDC
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2Model, PreTrainedTokenizerFast

from sana.config import SanaConfig, load_config, transformer_overrides
from sana.models.autoencoder import PUBLISHED, Autoencoder, AutoencoderConfig
from sana.models.diffusers_folder import build_scheduler, build_transformer_twin
from sana.models.text_encoder import TextEncoder, TextFeatures
from sana.models.transformer import SanaTransformer
from sana.models.zoo import build_transformer
from sana.pipeline import SanaPipeline

STAGES = ("text", "denoise", "decode", "all")
"""Prompts to features, noise and features to latents, latents to pixels, prompts to pixels."""

MODELS = {"0.6B": "SanaMS_600M_P1_D28", "1.6B": "SanaMS_1600M_P1_D20", "tiny": None}
"""Names of the command line; tiny is the whole model of the repository, its weights included."""

CONFIGS = {
    512: "configs/sana_config/512ms/Sana_1600M_img512.yaml",
    1024: "configs/sana_config/1024ms/Sana_1600M_img1024.yaml",
    2048: "configs/sana_config/2048ms/Sana_1600M_img2048_bf16.yaml",
    4096: "configs/sana_config/4096ms/Sana_1600M_img4096_bf16.yaml",
}
"""Pixels a side -> config; that of the other model differs in its name alone."""

VALID_TOKENS = 40
"""Of a prompt; the others up to the model's length are padding."""


def build_pipeline(
    model: str, size: int, *, dtype: torch.dtype, device: torch.device, stages: Collection[str] = STAGES
) -> SanaPipeline:
    """A whole pipeline in one dtype; what `stages` do not need is small.

    Args:
        model: of `MODELS`.
        size: pixels a side, of `CONFIGS`; with tiny, anything.
    """
    if MODELS[model] is None:
        pipeline = SanaPipeline(device=device, dtype=dtype)
        pipeline.autoencoder.to(dtype)
        pipeline.text_encoder.to(dtype)
        return pipeline
    if size not in CONFIGS:
        raise ValueError(f"no config for {size} pixels; choose from {', '.join(map(str, CONFIGS))}")
    config = load_config(CONFIGS[size], [f"--model.model={MODELS[model]}"])
    with torch.device("meta"):
        transformer = build_transformer(config.model.model, **transformer_overrides(config))
        decodes = {"decode", "all"} & set(stages)
        autoencoder = Autoencoder.from_config(PUBLISHED if decodes else AutoencoderConfig())
    return SanaPipeline.from_components(
        config,
        with_random_weights(transformer, dtype, device),
        with_random_weights(autoencoder, dtype, device),
        random_text_encoder(config, dtype, device)
        if {"text", "all"} & set(stages)
        else FixedText(config, dtype, device),
    )


def with_random_weights(module: nn.Module, dtype: torch.dtype, device: torch.device) -> Any:
    """Give a network on the meta device memory and values that hide nothing: visible biases, norms from 0.5 to 1.5."""
    module = module.to(dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for name, tensor in module.state_dict().items():
        if "norm" in name and name.endswith("weight"):
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif tensor.ndim == 1 or "table" in name:
            tensor.normal_(std=0.3, generator=generator)
        elif "y_embedding" in name:
            tensor.normal_(generator=generator)
        else:
            tensor.normal_(std=tensor[0].numel() ** -0.5, generator=generator)
    return module.eval().requires_grad_(False)


class FixedText:
    """In the text encoder's place where text is not measured: random features of prompts of `VALID_TOKENS` tokens."""

    def __init__(self, config: SanaConfig, dtype: torch.dtype, device: torch.device) -> None:
        self.settings = config.text_encoder
        self.hidden_size = self.settings.caption_channels
        self.valid = min(VALID_TOKENS, self.settings.model_max_length)
        self.dtype, self.device = dtype, device
        self._features = cache(self._draw)

    def encode(self, prompts: Sequence[str]) -> TextFeatures:
        """As `TextEncoder.encode`, of nothing but the number of prompts."""
        return self._features(len(prompts), 1)

    def encode_unconditional(self, prompts: Sequence[str]) -> TextFeatures:
        """As `TextEncoder.encode_unconditional`."""
        return self._features(len(prompts), 2)

    def _draw(self, count: int, seed: int) -> TextFeatures:
        length = self.settings.model_max_length
        generator = torch.Generator(self.device).manual_seed(seed)
        shape = (count, length, self.hidden_size)
        embeds = torch.randn(shape, generator=generator, dtype=self.dtype, device=self.device)
        mask = (torch.arange(length, device=self.device) < self.valid).long()
        return TextFeatures(embeds, mask.repeat(count, 1))


def random_text_encoder(config: SanaConfig, dtype: torch.dtype, device: torch.device) -> TextEncoder:
    """A Gemma-2-2b of random weights, behind a tokenizer whose tokens are words."""
    settings = config.text_encoder
    texts = [*settings.chi_prompt, *prompts_of(64, VALID_TOKENS - 2)]
    split = pre_tokenizers.Whitespace()
    words = {word for text in texts for word, _ in split.pre_tokenize_str(text)}
    vocabulary = {
        word: place for place, word in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", *sorted(words)])
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = split
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    special = {f"{name}_token": f"<{name}>" for name in ("pad", "eos", "bos", "unk")}
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)  # 2.6 billion weights in float32 may not fit
        with torch.device(device), torch.random.fork_rng():
            torch.manual_seed(0)
            model = Gemma2Model(Gemma2Config(hidden_size=settings.caption_channels))
    finally:
        torch.set_default_dtype(default)
    return TextEncoder(
        model.eval().requires_grad_(False),
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special),
        max_length=settings.model_max_length,
        chi_prompt=settings.chi_prompt,
    )


def prompts_of(count: int, words: int) -> list[str]:
    """Different prompts, in lower case, of so many words; at most 64 of them."""
    colours = ("red", "blue", "green", "yellow", "purple", "orange", "black", "white")
    shapes = ("circle", "square", "star", "heart", "ring", "triangle", "cross", "diamond")
    pairs = itertools.islice(itertools.product(colours, shapes), count)
    return [
        " ".join(f"a {colour} {shape} on a gray background {'and more ' * words}".split()[:words])
        for colour, shape in pairs
    ]


def build_diffusers(ours: SanaPipeline, *, dtype: torch.dtype | None = None) -> diffusers.SanaPipeline:
    """diffusers' pipeline on the weights of `ours`; with another `dtype` than theirs, on a copy.

    Its modules are new objects, so that what is done to them does not touch the others on these weights.
    """

    def cast(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {key: value if dtype is None else value.to(dtype) for key, value in state.items()}

    transformer = build_transformer_twin(
        cast(ours.transformer.state_dict()), ours.transformer.config, ours.config.model.image_size
    )
    with torch.device("meta"):
        autoencoder = AutoencoderDC.from_config(ours.autoencoder.model.config)
    autoencoder.load_state_dict(cast(ours.autoencoder.model.state_dict()), assign=True)
    text = {"text_encoder": None, "tokenizer": None}
    if isinstance(ours.text_encoder, TextEncoder):
        model = ours.text_encoder.model
        text = {
            "text_encoder": model if dtype in (None, model.dtype) else copy.deepcopy(model).to(dtype),
            "tokenizer": ours.text_encoder.tokenizer,
        }
    pipeline = diffusers.SanaPipeline(
        **text,
        vae=autoencoder.eval(),
        transformer=transformer,
        scheduler=build_scheduler("flow_dpm-solver", ours.flow_shift),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def compiled_ours(ours: SanaPipeline) -> SanaPipeline:
    """A pipeline on the same weights after `SanaPipeline.compile`; on a CPU, where that packs them, on a copy."""
    state = ours.transformer.state_dict()
    if ours.device.type == "cpu":
        state = {key: value.clone() for key, value in state.items()}
    with torch.device("meta"):
        transformer = SanaTransformer(ours.transformer.config)
    transformer.load_state_dict(state, assign=True)
    transformer.eval().requires_grad_(False)
    # On a GPU its decoder is compiled too, which that of `ours` must not be.
    autoencoder = ours.autoencoder if ours.device.type == "cpu" else copy.deepcopy(ours.autoencoder)
    compiled = SanaPipeline.from_components(ours.config, transformer, autoencoder, ours.text_encoder)
    return compiled.compile()


def compiled_diffusers(ours: SanaPipeline, mode: str | None = None) -> diffusers.SanaPipeline:
    """diffusers' pipeline with the whole transformer and the decoder under torch.compile, as its users have it."""
    pipeline = build_diffusers(ours)
    pipeline.transformer.compile(mode=mode)
    pipeline.vae.decoder.compile(mode=mode)
    return pipeline


IMPLEMENTATIONS: dict[str, Callable[[SanaPipeline], Any]] = {
    "ours": lambda ours: ours,
    "ours_compiled": compiled_ours,
    "diffusers": build_diffusers,
    "diffusers_compiled": compiled_diffusers,
    "diffusers_graphs": lambda ours: compiled_diffusers(ours, mode="reduce-overhead"),
}
"""Name -> pipeline from ours. On a GPU the second and the last capture CUDA graphs."""
