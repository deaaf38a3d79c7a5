"""CLIP score: how well a text fits a picture, 100 * cosine of their CLIP embeddings.

The convention of Sana's tables and of the scores of its captions: OpenAI's ViT-L/14, the text as it is without a template,
not clamped at 0, and not the 2.5 * max(cos, 0) of the CLIPScore paper (arXiv 2104.08718).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel, PreTrainedTokenizerBase

from sana.metrics.alignment import Scorer
from sana.metrics.weights import fetched_by, folder_sha256, hub_command, labelled
from sana.utils.pretrained import load_pretrained

CLIP_NAME = "openai/clip-vit-large-patch14"
"""The model of Sana's numbers: scores of another model cannot be compared with them."""
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of the three channels, as OpenAI's CLIPs and their descendants were trained."""


def picture_transform(size: int, mean: Sequence[float], std: Sequence[float]) -> Compose:
    """What the openai/CLIP package makes of a picture in RGB: (3, size, size)."""
    resize = Resize(size, InterpolationMode.BICUBIC)
    return Compose([resize, CenterCrop(size), ToTensor(), Normalize(mean, std)])


class ClipScore:
    """Pictures and texts to CLIP embeddings, and pairs of them to scores.

    Pictures are prepared as the openai/CLIP package does: Pillow's bicubic resize of the shorter side, the middle square.
    (The tensor resize of transformers' own processor gives other numbers.) Texts are cut to CLIP's context of 77 tokens,
    the end token kept, as there; that package mends broken Unicode (ftfy) and HTML entities first, this does not.

    Args:
        model: in the dtype to compute in; norms and products are float32 in any case.
        tokenizer: ends each text with the end token where it cuts it.
        mean, std: of the three channels, as the model was trained.
    """

    def __init__(
        self,
        model: CLIPModel,
        tokenizer: PreTrainedTokenizerBase,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.context = model.config.text_config.max_position_embeddings
        """Tokens of a text that count, begin and end token included."""
        self.prepare = picture_transform(model.config.vision_config.image_size, mean, std)
        """A picture in RGB -> (3, H, W) for `embed`."""

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path = CLIP_NAME,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> ClipScore:
        """Load a CLIP in the layout of transformers: a folder or a hub name.

        Raises:
            ValueError: there is none, it is no CLIP, or weights are missing.
        """
        parts = (CLIPModel, AutoTokenizer, CLIPImageProcessor)
        model, tokenizer, processor = load_pretrained(
            "a CLIP model", name_or_path, *parts, dtype=dtype, device=device
        )
        return cls(model, tokenizer, processor.image_mean, processor.image_std)

    def images(self, pictures: Sequence[Image]) -> Tensor:
        """Pictures -> (B, D) float32 of norm 1, on the model's device."""
        return self.embed(torch.stack([self.prepare(picture.convert("RGB")) for picture in pictures]))

    @torch.inference_mode()
    def embed(self, pixels: Tensor) -> Tensor:
        """What `prepare` gave, (B, 3, H, W) -> (B, D) float32 of norm 1, on the model's device."""
        pixels = pixels.to(self.model.device, self.model.dtype)
        return _unit(self.model.get_image_features(pixel_values=pixels).pooler_output)

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Texts -> (B, D) float32 of norm 1, on the model's device."""
        # No mask is needed: CLIP reads from left to right and its embedding is that of the end token, before the padding.
        ids = self.tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=self.context, return_tensors="pt"
        ).input_ids
        return _unit(self.model.get_text_features(input_ids=ids.to(self.model.device)).pooler_output)

    def score(self, pictures: Sequence[Image], texts: Sequence[str]) -> Tensor:
        """The score of each picture with the text at its place: (B,) float32 in [-100, 100], on the CPU.

        Raises:
            ValueError: not as many texts as pictures.
        """
        if len(pictures) != len(texts):
            raise ValueError(f"a text for each picture is needed, got {len(texts)} for {len(pictures)}")
        return compare(self.images(pictures), self.texts(texts))

    def is_cut(self, text: str) -> bool:
        """Whether a text is longer than CLIP's context, so that only its beginning counts."""
        return len(self.tokenizer(text, verbose=False).input_ids) > self.context


class ClipScorer(Scorer):
    """A CLIP as a metric of sets of pictures: `scale` * cosine.

    Args:
        clip: pictures and texts to embeddings.
        metric, protocol, sha256: see `Scorer`.
        scale: 100 for the CLIP score.
    """

    def __init__(
        self,
        clip: ClipScore,
        sha256: str,
        *,
        metric: str = "CLIP score",
        protocol: str = "100 cos, prompt without a template",
        scale: float = 100.0,
    ) -> None:
        self.clip, self.scale = clip, scale
        self.metric, self.protocol, self.sha256 = metric, protocol, sha256
        self.dtype = clip.model.dtype

    @classmethod
    def from_pretrained(
        cls,
        weights: str | Path | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> ClipScorer:
        """The CLIP score of a transformers folder or hub name; None is the ViT-L/14 of Sana's tables.

        Raises:
            ValueError: as `ClipScore.from_pretrained`; the message has the command that fetches the published one.
        """
        place = weights or CLIP_NAME
        with fetched_by(hub_command(CLIP_NAME), place):
            clip = ClipScore.from_pretrained(place, dtype=dtype, device=device)
        sha256 = folder_sha256(place)
        return cls(clip, sha256, protocol=f"100 cos, prompt without a template; {labelled(place, sha256)}")

    def prepare(self, picture: Image) -> Tensor:
        return self.clip.prepare(picture)

    def score_pixels(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.scale / 100 * compare(self.clip.embed(pixels), self.clip.texts(prompts))

    def is_cut(self, prompt: str) -> bool:
        return self.clip.is_cut(prompt)


def compare(images: Tensor, texts: Tensor) -> Tensor:
    """Scores (B,), on the CPU, of embeddings (B, D) of norm 1 pair by pair."""
    return 100 * (images * texts).sum(dim=-1).cpu()


def _unit(features: Tensor) -> Tensor:
    return F.normalize(features.float(), dim=-1)
