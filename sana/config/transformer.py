"""What a run's config says about its transformer."""

import re
from typing import Any

from sana.config.schema import SanaConfig
from sana.config.yaml_io import ConfigError


def transformer_overrides(config: SanaConfig) -> dict[str, Any]:
    """Keyword arguments for `build_transformer(config.model.model, **overrides)`.

    Raises:
        ConfigError: a position embedding is asked for and the model's name does not say its patch size.
    """
    model, text = config.model, config.text_encoder
    return {
        "in_channels": config.vae.vae_latent_dim,
        "out_channels": config.vae.vae_latent_dim,
        "mlp_ratio": model.mlp_ratio,
        "linear_head_dim": model.linear_head_dim,
        "caption_channels": text.caption_channels,
        "model_max_length": text.model_max_length,
        "qk_norm": model.qk_norm,
        "cross_norm": model.cross_norm,
        "cfg_embed": model.cfg_embed,
        "cfg_embed_scale": model.cfg_embed_scale,
        "timestep_norm_scale_factor": config.scheduler.timestep_norm_scale_factor,
        "use_pe": model.use_pe,
        "pe_interpolation": model.pe_interpolation,
        "pe_base_size": _tokens_a_side(config) if model.use_pe else None,
        "y_norm": text.y_norm,
        "y_norm_scale_factor": text.y_norm_scale_factor,
        "class_dropout_prob": model.class_dropout_prob,
        "fp32_attention": model.fp32_attention,
        "clamp_attention": model.mixed_precision == "fp16",
        "kernels": model.kernels or ("triton" if model.attn_type == "triton_linear" else "auto"),
        "gradient_checkpointing": config.train.grad_checkpointing,
        "checkpointed_blocks": config.train.grad_checkpointing_blocks,
    }


def _tokens_a_side(config: SanaConfig) -> int:
    """Tokens along a side at the training size: image / autoencoder factor / patch."""
    patch = re.search(r"_P(\d+)_", config.model.model)
    if patch is None:
        raise ConfigError(
            f"model.use_pe: cannot read the patch size from model.model {config.model.model!r} (..._P1_...)"
        )
    return config.model.image_size // config.vae.vae_downsample_rate // int(patch[1])
