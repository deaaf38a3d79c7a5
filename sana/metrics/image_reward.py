"""ImageReward (arXiv 2304.05977): what people like about a picture for a prompt, about N(0, 1) on its training data.

BLIP-large (ViT-L/16 and BERT-base with cross-attention, arXiv 2201.12086) and five linear layers without activations.
The published ImageReward.pt is read into the BLIP modules of transformers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor, nn
from transformers import (
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
    PreTrainedTokenizerBase,
)

from sana.metrics.alignment import Scorer
from sana.metrics.clip_score import CLIP_MEAN, CLIP_STD, picture_transform
from sana.metrics.weights import Published, load_state, load_tokenizer, read_state
from sana.utils import hub

WEIGHTS = Published(
    "ImageReward", "hf://THUDM/ImageReward/ImageReward.pt", "hf download THUDM/ImageReward ImageReward.pt"
)
TOKENIZER = "google-bert/bert-base-uncased"
MAX_TOKENS = 35
MEAN, STD = 0.16717362830052426, 1.0333394966054072

# The names of the published vision tower -> those of transformers. The text encoder's are the same in both.
_VISION_NAMES = (
    (r"cls_token", "embeddings.class_embedding"),
    (r"pos_embed", "embeddings.position_embedding"),
    (r"patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"blocks\.(\d+)\.norm(\d)\.", r"encoder.layers.\1.layer_norm\2."),
    (r"blocks\.(\d+)\.attn\.qkv\.", r"encoder.layers.\1.self_attn.qkv."),
    (r"blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.projection."),
    (r"blocks\.(\d+)\.mlp\.", r"encoder.layers.\1.mlp."),
    (r"norm\.", "post_layernorm."),
)
# In the file and of no effect on the score: BLIP's contrastive heads, and a constant of BERT.
_UNUSED = re.compile(r"blip\.(vision_proj|text_proj)\.|blip\.text_encoder\.embeddings\.position_ids$")


@dataclass(frozen=True)
class RewardConfig:
    """The network's shape; the defaults are the published one."""

    vision: dict[str, Any] = field(
        default_factory=lambda: {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 224,
            "patch_size": 16,
        }
    )
    text: dict[str, Any] = field(
        default_factory=lambda: {
            "vocab_size": 30524,
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "max_position_embeddings": 512,
        }
    )


class RewardNetwork(nn.Module):
    """Pixels (B, 3, 224, 224), tokens (B, L) and their mask -> rewards (B,)."""

    def __init__(self, config: RewardConfig) -> None:
        super().__init__()
        vision = BlipVisionConfig(**config.vision, layer_norm_eps=1e-6, hidden_act="gelu")
        text = BlipTextConfig(
            **config.text,
            encoder_hidden_size=vision.hidden_size,
            layer_norm_eps=1e-12,
            hidden_act="gelu",
            is_decoder=True,  # gives it cross-attention; its forward reads both ways all the same
            pad_token_id=0,
        )
        self.vision = BlipVisionModel(vision)
        self.text = BlipTextModel(text, add_pooling_layer=False)
        widths = (text.hidden_size, 1024, 128, 64, 16, 1)
        places = (0, 2, 4, 6, 7)  # between them the published file counts dropouts
        self.mlp = nn.ModuleDict(
            {
                str(place): nn.Linear(*pair)
                for place, pair in zip(places, zip(widths, widths[1:], strict=False), strict=True)
            }
        )

    def forward(self, pixels: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        seen = self.vision(pixel_values=pixels).last_hidden_state
        output = self.text(
            is_decoder=False,
            input_ids=tokens,
            attention_mask=mask,
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=seen.device),
        )
        reward = output.last_hidden_state[:, 0]
        for layer in self.mlp.values():
            reward = layer(reward)
        return (reward[:, 0].float() - MEAN) / STD


def our_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the published file under the names of `RewardNetwork`, without those that have no effect."""
    renamed = {}
    for name, value in state.items():
        if _UNUSED.match(name):
            continue
        if name.startswith("blip.visual_encoder."):
            rest = name.removeprefix("blip.visual_encoder.")
            for pattern, new in _VISION_NAMES:
                rest, count = re.subn(f"^{pattern}", new, rest)
                if count:
                    break
            name = f"vision.{rest}"
        else:
            name = name.replace("blip.text_encoder.", "text.", 1).replace("mlp.layers.", "mlp.", 1)
        renamed[name] = value
    return renamed


class ImageReward(Scorer):
    """Pictures and prompts to rewards; of a prompt the first 35 tokens count, the ends of the text among them.

    Args:
        network: in the dtype to compute in.
        tokenizer: BERT's, uncased.
        sha256: of the weights.
    """

    metric = "ImageReward"
    protocol = f"ImageReward 1.0, {MAX_TOKENS} tokens, mean over pictures"

    def __init__(self, network: RewardNetwork, tokenizer: PreTrainedTokenizerBase, sha256: str) -> None:
        self.network, self.tokenizer, self.sha256 = network.eval().requires_grad_(False), tokenizer, sha256
        self.dtype = network.vision.dtype
        self._transform = picture_transform(network.vision.config.image_size, CLIP_MEAN, CLIP_STD)

    @classmethod
    def from_file(
        cls,
        weights: str | Path | None = None,
        *,
        tokenizer: str | Path | None = None,
        config: RewardConfig | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> ImageReward:
        """The published file, or one with its names.

        Args:
            weights: a file, a folder with ImageReward.pt, or a hub name; None is the published one.
            tokenizer: a folder or hub name; None is bert-base-uncased.

        Raises:
            ValueError: something is missing, with the command that fetches it; or the names or shapes are others.
        """
        path = WEIGHTS.find(weights)
        state = our_names(read_state(path, WEIGHTS.what))
        network = RewardNetwork(config or RewardConfig())
        load_state(network, state, path, WEIGHTS.what)
        return cls(network.to(device, dtype), load_tokenizer(tokenizer or TOKENIZER), hub.sha256(path))

    def prepare(self, picture: Image) -> Tensor:
        return self._transform(picture)

    @torch.inference_mode()
    def score_pixels(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        device = self.network.vision.device
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        ).to(device)
        return self.network(pixels.to(device, self.dtype), tokens.input_ids, tokens.attention_mask).cpu()

    def is_cut(self, prompt: str) -> bool:
        return len(self.tokenizer(prompt, verbose=False).input_ids) > MAX_TOKENS
