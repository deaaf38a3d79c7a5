"""Models of what people prefer that are CLIPs: PickScore (arXiv 2305.01569) and HPSv2.1 (arXiv 2306.09341)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as pictures
from transformers import CLIPModel

from sana.metrics.alignment import Scorer
from sana.metrics.clip_score import CLIP_MEAN, CLIP_STD, ClipScore, ClipScorer
from sana.metrics.image_reward import ImageReward
from sana.metrics.weights import (
    Published,
    fetched_by,
    folder_sha256,
    hub_command,
    labelled,
    load_state,
    load_tokenizer,
    read_state,
)
from sana.utils import hub
from sana.utils.pretrained import load_pretrained

PICK_SCORE = "yuvalkirstain/PickScore_v1"
PICK_TOKENIZER = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
HPS_WEIGHTS = Published(
    "HPSv2.1", "hf://xswu/HPSv2/HPS_v2.1_compressed.pt", "hf download xswu/HPSv2 HPS_v2.1_compressed.pt"
)


def pick_score(
    weights: str | Path | None = None,
    *,
    tokenizer: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> ClipScorer:
    """PickScore: exp(logit scale) * cosine, about 20 for a good picture.

    Args:
        weights: a transformers folder or hub name; None is the published one.
        tokenizer: likewise; None is the published one.

    Raises:
        ValueError: something is missing; the message has the command that fetches it.
    """
    place = weights or PICK_SCORE
    with fetched_by(hub_command(PICK_SCORE), place):
        (model,) = load_pretrained("PickScore", place, CLIPModel, dtype=dtype, device=device)
    tokens, sha256 = load_tokenizer(tokenizer or PICK_TOKENIZER), folder_sha256(place)
    return ClipScorer(
        ClipScore(model, tokens, CLIP_MEAN, CLIP_STD),
        sha256,
        metric="PickScore",
        protocol=f"exp(logit scale) cos; {labelled(place, sha256)}",
        scale=float(model.logit_scale.float().exp()),
    )


class HPSv2(Scorer):
    """100 * cosine of OpenCLIP's ViT-H-14 as tuned to the choices of people; the published tables are of version 2.1.

    Args:
        model: an `open_clip.CLIP`, in the dtype to compute in.
        tokenize: texts to (B, 77) tokens, the end token kept.
        sha256: of the weights.
    """

    metric = "HPSv2.1"
    protocol = "100 cos, no logit scale; longer side to 224, padded with black"

    def __init__(self, model: nn.Module, tokenize: Callable[[Sequence[str]], Tensor], sha256: str) -> None:
        self.model, self.tokenize, self.sha256 = model.eval().requires_grad_(False), tokenize, sha256
        self.dtype = next(model.parameters()).dtype
        self._size = model.visual.image_size[0]

    @classmethod
    def from_file(
        cls,
        weights: str | Path | None = None,
        *,
        architecture: str = "ViT-H-14",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> HPSv2:
        """The published file, or one like it (`state_dict` of OpenCLIP's network `architecture`).

        Raises:
            ValueError: OpenCLIP is not installed, or the weights are missing or others.
        """
        try:
            import open_clip
        except ImportError as error:
            raise ValueError("HPSv2.1 needs OpenCLIP: pip install 'sana[metrics]'") from error
        path = HPS_WEIGHTS.find(weights)
        state = read_state(path, HPS_WEIGHTS.what)
        model = open_clip.create_model(architecture, pretrained=None, load_weights=False)
        load_state(model, state, path, HPS_WEIGHTS.what)
        return cls(model.to(device, dtype), open_clip.get_tokenizer(architecture), hub.sha256(path))

    def prepare(self, picture: Image) -> Tensor:
        scale = self._size / max(picture.size)
        width, height = (round(side * scale) for side in picture.size)
        picture = pictures.resize(picture, [height, width], InterpolationMode.BICUBIC)
        right, below = self._size - width, self._size - height
        padding = [right // 2, below // 2, right - right // 2, below - below // 2]
        return pictures.normalize(pictures.to_tensor(pictures.pad(picture, padding)), CLIP_MEAN, CLIP_STD)

    @torch.inference_mode()
    def score_pixels(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        device = next(self.model.parameters()).device
        images = self.model.encode_image(pixels.to(device, self.dtype))
        texts = self.model.encode_text(self.tokenize(list(prompts)).to(device))
        return 100 * F.cosine_similarity(images.float(), texts.float()).cpu()

    def is_cut(self, prompt: str) -> bool:
        return len(self.tokenize.encode(prompt)) + 2 > self.tokenize.context_length  # begin and end token


def load_scorer(
    name: str,
    weights: str | Path | None = None,
    *,
    tokenizer: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Scorer:
    """A scorer by name: CLIP score, ImageReward, PickScore or HPSv2.1.

    Args:
        weights: in place of the published ones.
        tokenizer: likewise, of those `WITHOUT_TOKENIZER`.

    Raises:
        ValueError: unknown name, a tokenizer where there is no choice, or weights that are not there.
    """
    if name not in SCORERS:
        raise ValueError(f"unknown model {name!r}; choose from {', '.join(SCORERS)}")
    settings = {"dtype": dtype, "device": device}
    if name in WITHOUT_TOKENIZER:
        settings["tokenizer"] = tokenizer
    elif tokenizer is not None:
        raise ValueError(
            f"{name} comes with its tokenizer; --tokenizer is for {' and '.join(WITHOUT_TOKENIZER)}"
        )
    return SCORERS[name](weights, **settings)


SCORERS: dict[str, Callable[..., Scorer]] = {
    "CLIP score": ClipScorer.from_pretrained,
    "ImageReward": ImageReward.from_file,
    "PickScore": pick_score,
    "HPSv2.1": HPSv2.from_file,
}
"""Name -> how it is loaded: called as load(weights, dtype=, device=), and with tokenizer= where it comes without one."""
WITHOUT_TOKENIZER = ("ImageReward", "PickScore")
