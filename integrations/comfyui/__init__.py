"""ComfyUI nodes over this library: loader, text encoder, sampler, decoder.

ComfyUI imports this folder under a name of its own making, so all of it is in this one file. Nothing of ComfyUI is
needed: what it offers (progress, interruption, model folders) is used where it has been loaded.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from sana.diffusion.solvers import DEFAULT_STEPS, Callback

if TYPE_CHECKING:
    from sana.pipeline import SanaPipeline
    from sana.runtime.stages import PromptFeatures

MODEL_FOLDERS = ("diffusion_models", "checkpoints", "diffusers", "loras")
"""Kinds of folders of ComfyUI in which a name is looked for."""

Inputs = dict[str, dict[str, tuple[Any, dict[str, Any]]]]
"""What ComfyUI asks of a node: "required" or "optional" -> name -> (type or choices, settings of the widget)."""


@dataclass(frozen=True)
class Conditioning:
    """A prompt as the sampler takes it, with the model whose text encoder has read it."""

    model: SanaPipeline
    prompt: str
    """Without a size option."""
    negative_prompt: str
    size: tuple[int, int] | None
    """(height, width) that `--ar` or `--hw` in the prompt asked for."""
    features: PromptFeatures


@dataclass(frozen=True)
class Latents:
    """What was sampled, (B, C, h, w), with the model whose autoencoder reads it and the (height, width) asked for."""

    model: SanaPipeline
    samples: Tensor
    size: tuple[int, int]


class SanaPipelineLoader:
    """A checkpoint with its text encoder and autoencoder."""

    CATEGORY, FUNCTION = "Sana", "load"
    RETURN_TYPES, RETURN_NAMES = ("SANA_PIPELINE_MODEL",), ("model",)
    DESCRIPTION = (
        "Loads a Sana checkpoint: .pth, .safetensors or diffusers folder. Empty: the embedded Sana-tiny."
    )

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        """The widgets."""
        from sana.runtime.offload import TOGETHER

        return {
            "required": {
                "checkpoint": _text(
                    "File or folder, also in ComfyUI's model folders, or owner/name of the hub."
                ),
            },
            "optional": {
                "config": _text("YAML of the model. Empty: what the checkpoint says."),
                "dtype": (["auto", "fp32", "bf16", "fp16"], {"tooltip": "Of the transformer."}),
                "offload": (list(TOGETHER), {"tooltip": "Which networks make room for each other."}),
                "quantize": _text("Such as transformer=int8,text_encoder=nf4. Empty: nothing."),
                "lora": _text("Adapter of peft, diffusers or kohya. Empty: none."),
                "lora_weight": _number(1.0, -10.0, 10.0, step=0.05),
            },
        }

    def load(
        self,
        checkpoint: str,
        config: str = "",
        dtype: str = "auto",
        offload: str = "none",
        quantize: str = "",
        lora: str = "",
        lora_weight: float = 1.0,
    ) -> tuple[SanaPipeline]:
        """Errors as those of `SanaPipeline` and `load_lora`."""
        from sana.loading import find_config
        from sana.pipeline import SanaPipeline

        model = SanaPipeline(
            find_config(_find(config), _find(checkpoint)),
            dtype=None if dtype == "auto" else dtype,
            offload=offload,
            quantize=quantize.strip() or None,
        )
        if adapter := _find(lora):
            model.load_lora(adapter, lora_weight)
        return (model,)


class SanaPipelineTextEncode:
    """A prompt, and what to steer away from."""

    CATEGORY, FUNCTION = "Sana", "encode"
    RETURN_TYPES, RETURN_NAMES = ("SANA_PIPELINE_CONDITIONING",), ("conditioning",)
    DESCRIPTION = "Reads a prompt with the model's text encoder. --ar H:W in the prompt asks for a size."

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        """The widgets."""
        text = {"multiline": True, "default": "", "dynamicPrompts": True}
        return {
            "required": {"model": ("SANA_PIPELINE_MODEL", {}), "prompt": ("STRING", text)},
            "optional": {"negative_prompt": ("STRING", dict(text))},
        }

    def encode(self, model: SanaPipeline, prompt: str, negative_prompt: str = "") -> tuple[Conditioning]:
        """Errors as those of `parse_prompt_size`."""
        from sana.resolution import parse_prompt_size

        text, size = parse_prompt_size(prompt, model.buckets)
        sampler = "scm" if model.transformer.config.cfg_embed else None  # Sprint has no other
        features = model.encode([text], [negative_prompt], sampler=sampler)
        return (Conditioning(model, text, negative_prompt, size, features),)


class SanaPipelineSampler:
    """Noise to latents with the library's solvers."""

    CATEGORY, FUNCTION = "Sana", "sample"
    RETURN_TYPES, RETURN_NAMES = ("SANA_PIPELINE_LATENTS",), ("latents",)
    DESCRIPTION = "Draws with the published solvers. Steps, width and height of 0 are the model's own."

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        """The widgets; the settings and their usual values are those of `SanaPipeline.__call__`."""
        side = _number(0, 0, 8192, step=32, tooltip="Pixels; 0: the model's own.")
        return {
            "required": {
                "conditioning": ("SANA_PIPELINE_CONDITIONING", {}),
                "seed": _number(0, 0, 2**63 - 1, control_after_generate=True),
                "steps": _number(0, 0, 1000, tooltip="0: the sampler's usual number."),
                "cfg": _number(4.5, 1.0, 30.0, step=0.1, tooltip="Classifier-free guidance; 1: off."),
                "pag": _number(1.0, 1.0, 30.0, step=0.1, tooltip="Perturbed-attention guidance; 1: off."),
                "width": side,
                "height": side,
                "batch_size": _number(1, 1, 64),
                "sampler": (["auto", *DEFAULT_STEPS], {"tooltip": "auto: that of the model's config."}),
            }
        }

    def sample(
        self,
        conditioning: Conditioning,
        seed: int,
        steps: int,
        cfg: float,
        pag: float,
        width: int,
        height: int,
        batch_size: int,
        sampler: str,
    ) -> tuple[Latents]:
        """Image i of the batch is sample i of `scripts/inference.py --prompt --seed`; errors as those of `SanaPipeline`."""
        model = conditioning.model
        own = model.config.model.image_size
        size = conditioning.size or (height or own, width or own)
        samples = model(
            conditioning.prompt,
            *size,
            negative_prompt=conditioning.negative_prompt,
            num_inference_steps=steps or None,
            guidance_scale=cfg,
            pag_guidance_scale=pag,
            num_images_per_prompt=batch_size,
            seed=seed,
            sampler=None if sampler == "auto" else sampler,
            output_type="latent",
            callback=_callback(),
            features=_repeated(conditioning.features, batch_size),
        )
        return (Latents(model, samples, size),)


class SanaPipelineDecode:
    """Latents to ComfyUI's images."""

    CATEGORY, FUNCTION = "Sana", "decode"
    RETURN_TYPES, RETURN_NAMES = ("IMAGE",), ("images",)
    DESCRIPTION = "Decodes with the model's autoencoder, in tiles where memory is short."

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        """The widgets."""
        return {"required": {"latents": ("SANA_PIPELINE_LATENTS", {})}}

    def decode(self, latents: Latents) -> tuple[Tensor]:
        """Images (B, H, W, 3) float32 in [0, 1] on the CPU; errors as those of `SanaPipeline.decode`.

        ComfyUI cuts to 8 bits where this library rounds: rounded here, its files hold the pixels of `scripts/inference.py`.
        """
        from sana.utils.images import to_uint8

        return (to_uint8(latents.model.decode(latents.samples, latents.size)).float() / 255,)


def _text(tooltip: str) -> tuple[str, dict[str, Any]]:
    """A line of text."""
    return "STRING", {"default": "", "tooltip": tooltip}


def _number(default: float, low: float, high: float, **more: Any) -> tuple[str, dict[str, Any]]:
    """A whole number, or a fraction where `default` is one."""
    kind = "FLOAT" if isinstance(default, float) else "INT"
    return kind, {"default": default, "min": low, "max": high, **more}


def _find(name: str) -> str | Path | None:
    """A name as the library takes it: in ComfyUI's model folders if it is there; None where it is empty."""
    name = name.strip()
    folder_paths = sys.modules.get("folder_paths")
    if not name or folder_paths is None:
        return name or None
    roots = (Path(root) for kind in MODEL_FOLDERS for root in folder_paths.get_folder_paths(kind))
    return next((root / name for root in roots if (root / name).exists()), name)


def _repeated(features: PromptFeatures, count: int) -> PromptFeatures:
    """The features of a batch of one prompt."""
    from sana.models.text_encoder import TextFeatures
    from sana.runtime.stages import PromptFeatures

    parts = (features.text, features.null)
    return PromptFeatures(
        *(
            part and TextFeatures(part.embeds.repeat(count, 1, 1), part.mask.repeat(count, 1))
            for part in parts
        )
    )


def _callback() -> Callback | None:
    """Moves ComfyUI's progress bar and ends the run where Cancel was pressed; None outside ComfyUI."""
    utils, management = sys.modules.get("comfy.utils"), sys.modules.get("comfy.model_management")
    if utils is None or management is None:
        return None
    bar = None

    def after_step(step: int, total: int, x: Tensor, x0: Tensor) -> None:
        nonlocal bar
        management.throw_exception_if_processing_interrupted()
        bar = bar or utils.ProgressBar(total)
        bar.update_absolute(step, total)

    return after_step


NODE_CLASS_MAPPINGS = {
    node.__name__: node
    for node in (SanaPipelineLoader, SanaPipelineTextEncode, SanaPipelineSampler, SanaPipelineDecode)
}
"""ComfyUI has one such table for all its extensions, in which the later one wins: others have taken plainer names."""

NODE_DISPLAY_NAME_MAPPINGS = {
    "SanaPipelineLoader": "Load Sana",
    "SanaPipelineTextEncode": "Sana Text Encode",
    "SanaPipelineSampler": "Sana Sampler",
    "SanaPipelineDecode": "Sana Decode",
}
