"""The small layers around the transformer blocks: embedders, norms and the final layer.

Shapes: B batch, N = h * w image tokens, L text tokens, D hidden size, C caption channels, p patch size.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from sana.ops.linear import linear
from sana.ops.norm_modulate import norm_modulate
from sana.ops.rms_norm import rms_norm

NORM_EPS = 1e-6
"""eps of every LayerNorm in the transformer; none has parameters."""

TIME_CHANNELS = 256
"""Width of the sinusoidal timestep embedding."""


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in float32 or wider."""

    def __init__(self, dim: int, *, eps: float, kernels: str = "auto") -> None:
        super().__init__()
        self.eps = eps
        self.kernels = kernels
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., D) -> (..., D) in the dtype of x."""
        return rms_norm(x, self.weight, eps=self.eps, backend=self.kernels)


class Linear(nn.Linear):
    """`torch.nn.Linear` through `sana.ops.linear`, for the products of all image tokens."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., K) -> (..., M)."""
        return linear(x, self.weight, self.bias)


class PatchEmbed(nn.Module):
    """Cut the latent into p x p patches and project each to D: a convolution whose stride is its kernel."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """latents: (B, c, h p, w p) -> tokens (B, h w, D), row by row."""
        return self.proj(latents).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """Sinusoidal features of a number (the timestep, Sprint's guidance scale), then a two-layer perceptron."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(TIME_CHANNELS, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, timestep: torch.Tensor) -> torch.Tensor:
        """timestep: (B,) -> (B, D)."""
        return self.mlp(timestep_features(timestep).to(self.mlp[0].weight.dtype))


def timestep_features(timestep: torch.Tensor) -> torch.Tensor:
    """(B,) -> (B, 256) in float32: cos(t w_k), then sin(t w_k), with w_k = 10000^(-k / 128)."""
    half = TIME_CHANNELS // 2
    frequencies = torch.exp(
        -math.log(10000) / half * torch.arange(half, device=timestep.device, dtype=torch.float32)
    )
    angles = timestep.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class CaptionProjection(nn.Module):
    """Linear, tanh-approximated GELU, Linear."""

    def __init__(self, caption_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(caption_channels, hidden_size)
        self.fc2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, text_embeds: torch.Tensor) -> torch.Tensor:
        """(B, L, C) -> (B, L, D)."""
        return self.fc2(F.gelu(self.fc1(text_embeds), approximate="tanh"))


class CaptionEmbedder(nn.Module):
    """Text features to tokens; owns the null caption that replaces a dropped one in training.

    `y_embedding` (L, C) is a buffer: training sets it to the text encoder's features of the empty prompt.
    """

    y_embedding: torch.Tensor

    def __init__(self, caption_channels: int, hidden_size: int, *, max_length: int) -> None:
        super().__init__()
        self.y_proj = CaptionProjection(caption_channels, hidden_size)
        self.register_buffer("y_embedding", torch.empty(max_length, caption_channels))

    def drop(self, text_embeds: torch.Tensor, dropped: torch.Tensor) -> torch.Tensor:
        """Replace the features of the samples marked in `dropped` (B,) by the null caption."""
        length = text_embeds.shape[1]
        if length > len(self.y_embedding):
            raise ValueError(
                f"text_embeds has {length} tokens, but the null caption only {len(self.y_embedding)}: "
                "raise model_max_length or shorten the prompts' features"
            )
        null = self.y_embedding[:length].to(text_embeds.dtype)
        return torch.where(dropped.to(text_embeds.device, torch.bool)[:, None, None], null, text_embeds)

    def forward(self, text_embeds: torch.Tensor) -> torch.Tensor:
        """(B, L, C) -> (B, L, D)."""
        return self.y_proj(text_embeds)


class FinalLayer(nn.Module):
    """Modulated LayerNorm and projection to the p x p x c values of each patch."""

    def __init__(
        self, hidden_size: int, patch_size: int, out_channels: int, *, kernels: str = "auto"
    ) -> None:
        super().__init__()
        self.kernels = kernels
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.scale_shift_table = nn.Parameter(torch.empty(2, hidden_size))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """x: (B, N, D), t: (B, D), the timestep embedding itself (not t0) -> (B, N, p p c)."""
        shift, scale = (self.scale_shift_table[None] + t[:, None]).chunk(2, dim=1)
        return self.linear(norm_modulate(x, shift, scale, eps=NORM_EPS, backend=self.kernels))


def unpatchify(patches: torch.Tensor, grid: tuple[int, int], patch_size: int) -> torch.Tensor:
    """(B, h w, p p c) with channels ordered (row, column, c) -> (B, c, h p, w p)."""
    (height, width), p = grid, patch_size
    patches = patches.unflatten(1, (height, width)).unflatten(-1, (p, p, -1))  # (B, h, w, p, p, c)
    return patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def position_embedding(
    hidden_size: int,
    grid: tuple[int, int],
    *,
    base_size: int | None,
    interpolation: float,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float64,
    known: dict[tuple, torch.Tensor] | None = None,
) -> torch.Tensor:
    """The two-dimensional sine-cosine table of the 2K and 4K models, (h w, D), computed in float64.

    The first D/2 channels encode the column j at coordinate j / (w / base) / interpolation, the last D/2 the
    row likewise; each half is [sin, cos] of the coordinate times w_k = 10000^(-k / (D/4)).

    Args:
        grid: (h, w) in tokens.
        base_size: tokens a side at the training size; None takes the grid's own sides.
        interpolation: divides the coordinates (`pe_interpolation`).
        known: axes that were made with the same settings, and where new ones are put: a few hundred KiB for each length.
    """
    height, width = grid

    def axis(size: int) -> torch.Tensor:
        return _axis_embedding(hidden_size // 2, size, base_size or size, interpolation, device).to(dtype)

    def axis_once(size: int) -> torch.Tensor:
        if (key := (size, device, dtype)) not in known:
            known[key] = axis(size)
        return known[key]

    rows, columns = map(axis if known is None else axis_once, grid)
    table = torch.cat([columns[None].expand(height, -1, -1), rows[:, None].expand(-1, width, -1)], dim=-1)
    return table.flatten(0, 1)


def _axis_embedding(
    channels: int, size: int, base_size: int, interpolation: float, device: torch.device | str | None
) -> torch.Tensor:
    """(size, channels): sines, then cosines, of one axis."""
    half = channels // 2
    frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64, device=device) / half)
    coordinates = torch.arange(size, dtype=torch.float64, device=device) / (size / base_size) / interpolation
    angles = coordinates[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)
