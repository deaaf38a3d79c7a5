"""The feature networks of Frechet distances, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import Compose, InterpolationMode, Normalize, Resize, ToTensor
from transformers import CLIPImageProcessor, CLIPModel, Dinov2Model

from sana.metrics import inception
from sana.metrics.clip_score import picture_transform
from sana.metrics.weights import fetched_by, folder_sha256, hub_command
from sana.utils import hub
from sana.utils.pretrained import load_pretrained

DEFAULT_PRESET = "pytorch-fid@512"
_TRANSFORMERS = {
    "clip-vit-b-32": "openai/clip-vit-base-patch32",
    "clip-vit-l-14": "openai/clip-vit-large-patch14",
    "dinov2-vit-b-14": "facebook/dinov2-base",
    "dinov2-vit-l-14": "facebook/dinov2-large",
}
NAMES = ("inception", *_TRANSFORMERS)
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class FeatureNetwork:
    """From pictures to features."""

    metric: str
    """The name of the distance over these features."""
    name: str
    """Network, preset and length: statistics of two names do not compare."""
    prepare: Callable[[Image.Image], Tensor]
    """A picture in RGB -> (3, H, W); what may run in threads."""
    embed: Callable[[Tensor], Tensor]
    """(B, 3, H, W) -> (B, D) float32 on the CPU."""
    sha256: str
    """Of the weights."""


def feature_network(
    name: str = "inception",
    *,
    preset: str | None = None,
    dims: int | None = None,
    weights: str | Path | None = None,
    device: torch.device | str = "cpu",
) -> FeatureNetwork:
    """A network in float32, as published numbers have it.

    Args:
        name: "inception"; "clip-vit-b-32" as clean-fid has it (the embedding, not normalised) and "clip-vit-l-14"; or
            "dinov2-vit-b-14", "dinov2-vit-l-14" (the class token behind the last norm, pictures squeezed to 224 x 224
            by Pillow's bicubic filter), the FD-DINOv2 of arXiv 2306.04675.
        preset: of Inception only, see `sana.metrics.inception.Preset`.
        dims: of Inception only, one of 64, 192, 768, 2048.
        weights: a file of the Inception; else a transformers folder or hub name.

    Raises:
        ValueError: unknown name or preset, one that has no effect, or weights that are not there.
    """
    if name not in NAMES:
        raise ValueError(f"unknown features {name!r}; choose from {', '.join(NAMES)}")
    if name == "inception":
        return _inception(preset or DEFAULT_PRESET, dims or 2048, weights, device)
    if preset or dims:
        raise ValueError(f"a preset and a number of dimensions belong to Inception, not to {name}")
    place = str(weights or _TRANSFORMERS[name])
    build = _clip if name.startswith("clip") else _dinov2
    with fetched_by(hub_command(_TRANSFORMERS[name]), place):
        prepare, embed = build(place, device)
    metric = "CLIP-FID" if name.startswith("clip") else "FD-DINOv2"
    return FeatureNetwork(metric, name, prepare, _in_batches(embed, device), folder_sha256(place))


def _inception(
    preset: str, dims: int, weights: str | Path | None, device: torch.device | str
) -> FeatureNetwork:
    prepare = inception.Preset(preset)
    if dims not in inception.DIMS:
        raise ValueError(
            f"Inception has features of {', '.join(map(str, inception.DIMS))} numbers, not of {dims}"
        )
    path = inception.WEIGHTS.find(weights)
    network = inception.load_inception(path, device)
    name = f"inception {preset} {dims}"
    embed = _in_batches(lambda pixels: network(pixels, dims), device)
    return FeatureNetwork("FID", name, prepare, embed, hub.sha256(path))


_Parts = tuple[Callable[[Image.Image], Tensor], Callable[[Tensor], Tensor]]


def _clip(place: str, device: torch.device | str) -> _Parts:
    model, processor = load_pretrained(
        "a CLIP model", place, CLIPModel, CLIPImageProcessor, dtype=torch.float32, device=device
    )
    size = model.config.vision_config.image_size
    transform = picture_transform(size, processor.image_mean, processor.image_std)
    return transform, lambda pixels: model.get_image_features(pixel_values=pixels).pooler_output


def _dinov2(place: str, device: torch.device | str) -> _Parts:
    (model,) = load_pretrained("a DINOv2", place, Dinov2Model, dtype=torch.float32, device=device)
    size = 16 * model.config.patch_size  # 224 for the published patches of 14
    resize = Resize((size, size), InterpolationMode.BICUBIC)
    transform = Compose([resize, ToTensor(), Normalize(*_IMAGENET)])
    return transform, lambda pixels: model(pixel_values=pixels).pooler_output


def _in_batches(embed: Callable[[Tensor], Tensor], device: torch.device | str) -> Callable[[Tensor], Tensor]:
    """`embed` for pixels on the CPU, without gradients."""

    @torch.inference_mode()
    def run(pixels: Tensor) -> Tensor:
        return embed(pixels.to(device)).float().cpu()

    return run
