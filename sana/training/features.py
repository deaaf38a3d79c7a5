"""The two encoders of a training, and what takes the text encoder's place when captions are in the cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sana.config import SanaConfig
from sana.data.cache import FeatureCache
from sana.models.autoencoder import Autoencoder
from sana.models.text_encoder import TextFeatures


def load_autoencoder(config: SanaConfig, device: torch.device) -> Autoencoder:
    """The autoencoder as training uses it. Raises as `Autoencoder.from_pretrained`."""
    return Autoencoder.from_pretrained(config.vae.vae_pretrained, device=device)


PIXELS_AT_ONCE = 2**21
"""In float32 the published autoencoder has 2.5 GiB in passing for each 2**20 pixels: the whole batch of a published run
would take 20 GiB, more than anything else in its step."""


def encode_pictures(autoencoder: Autoencoder, pixels: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] -> scaled latents (B, C, H/32, W/32), `PIXELS_AT_ONCE` at a time, one image at least."""
    count = max(1, PIXELS_AT_ONCE // pixels[0, 0].numel())
    return torch.cat([autoencoder.encode(part) for part in pixels.split(count)])


class CachedTextEncoder:
    """Answers as `TextEncoder` does, from the cache: for the captions and prompts that are in it."""

    def __init__(self, features: FeatureCache, max_length: int, device: torch.device) -> None:
        self.features, self.max_length, self.device = features, max_length, device

    @property
    def hidden_size(self) -> int:
        """C, the width of the embeddings."""
        return self.features.null().shape[1]

    def encode(self, prompts: Sequence[str]) -> TextFeatures:
        """As `TextEncoder.encode`. Raises as `FeatureCache.text`."""
        return padded([self.features.text(prompt) for prompt in prompts], self.device, self.max_length)

    def encode_unconditional(self, prompts: Sequence[str]) -> TextFeatures:
        """As `TextEncoder.encode_unconditional`, for the empty prompt alone, of which the start token is valid."""
        if any(prompts):
            raise ValueError(f"the cache holds no negative prompts, got {next(filter(None, prompts))!r}")
        null = self.features.null().to(self.device).float().repeat(len(prompts), 1, 1)
        mask = torch.zeros(null.shape[:2], dtype=torch.int64, device=self.device)
        mask[:, 0] = 1
        return TextFeatures(null, mask)


def padded(texts: Sequence[Tensor], device: torch.device, length: int | None = None) -> TextFeatures:
    """Hidden states (tokens, C) of some texts as one float32 batch, with zeros up to `length`, or to the longest."""
    embeds = pad_sequence(list(texts), batch_first=True).to(device).float()
    counts = torch.tensor([len(text) for text in texts], device=device)
    mask = (torch.arange(embeds.shape[1], device=device) < counts[:, None]).long()
    missing = 0 if length is None else length - embeds.shape[1]
    return TextFeatures(F.pad(embeds, (0, 0, 0, missing)), F.pad(mask, (0, missing)))
