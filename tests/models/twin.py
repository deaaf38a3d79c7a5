"""A generic transformer and its twin in diffusers, for parity tests."""

import torch
from diffusers import SanaTransformer2DModel
from torch import nn

from sana.models.state_dict import to_diffusers
from sana.models.transformer import SanaTransformer, TransformerConfig

# Two heads in one attention and four in the other; every width differs from every other.
SMALL = dict(
    depth=2,
    hidden_size=64,
    num_heads=4,
    in_channels=8,
    out_channels=8,
    caption_channels=24,
    model_max_length=9,
)
LENGTH = 7
BATCH = 3


def make_generic(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every tensor values that hide nothing: norms in 0.5..1.5, visible biases, nothing initial."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "norm" in name:
                tensor.uniform_(0.5, 1.5, generator=generator)
            elif tensor.ndim == 1 or "table" in name:
                tensor.normal_(std=0.3, generator=generator)
            elif "y_embedding" in name:
                tensor.normal_(generator=generator)
            else:
                tensor.normal_(std=tensor[0].numel() ** -0.5, generator=generator)
    return model


def build(seed: int = 0, **overrides) -> SanaTransformer:
    """A small transformer with generic weights, in eval mode."""
    return make_generic(SanaTransformer(TransformerConfig(**{**SMALL, **overrides})), seed).eval()


def build_twin(model: SanaTransformer) -> SanaTransformer2DModel:
    """diffusers' model with the same weights, and with the reference's eps in the cross q/k norms."""
    config = model.config
    twin = SanaTransformer2DModel(
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        num_attention_heads=config.hidden_size // config.linear_head_dim,
        attention_head_dim=config.linear_head_dim,
        num_layers=config.depth,
        num_cross_attention_heads=config.num_heads,
        cross_attention_head_dim=config.hidden_size // config.num_heads,
        cross_attention_dim=config.hidden_size,
        caption_channels=config.caption_channels,
        mlp_ratio=config.mlp_ratio,
        sample_size=(config.pe_base_size or 4) * config.patch_size,
        patch_size=config.patch_size,
        interpolation_scale=config.pe_interpolation if config.use_pe else None,
        qk_norm="rms_norm_across_heads" if config.qk_norm else None,
    ).eval()
    twin.load_state_dict(to_diffusers(model.state_dict()), strict=True)
    for block in twin.transformer_blocks if config.cross_norm else ():
        for norm in (block.attn2.norm_q, block.attn2.norm_k):
            norm.eps = 1e-6
    return twin


def inputs(
    config: TransformerConfig, grid: tuple[int, int] = (4, 4), seed: int = 1, batch: int = BATCH
) -> dict:
    """Arguments of `SanaTransformer.forward`: `grid` in tokens, masks of several lengths."""
    generator = torch.Generator().manual_seed(seed)
    height, width = (side * config.patch_size for side in grid)
    lengths = torch.tensor([LENGTH, 2, 4])[torch.arange(batch) % 3]
    return {
        "latents": torch.randn(batch, config.in_channels, height, width, generator=generator),
        "timestep": torch.tensor([999.0, 3.0, 421.0])[torch.arange(batch) % 3],
        "text_embeds": 2 * torch.randn(batch, LENGTH, config.caption_channels, generator=generator),
        "text_mask": torch.arange(LENGTH)[None] < lengths[:, None],
    }


def run_twin(twin: SanaTransformer2DModel, arguments: dict) -> torch.Tensor:
    """diffusers' forward on arguments of ours."""
    mask = arguments.get("text_mask")
    return twin(
        arguments["latents"],
        encoder_hidden_states=arguments["text_embeds"],
        timestep=arguments["timestep"],
        encoder_attention_mask=None if mask is None else mask.float(),
        return_dict=False,
    )[0]


def relative_rms(actual: torch.Tensor, reference: torch.Tensor) -> float:
    """rms(actual - reference) / rms(reference), in float64."""
    actual, reference = actual.detach().double(), reference.detach().double()
    return float((actual - reference).square().mean().sqrt() / reference.square().mean().sqrt())
