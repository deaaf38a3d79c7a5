"""Names of architectures to their parameters."""

import difflib
from dataclasses import fields, replace
from typing import Any

import torch

from sana.models.key_names import NULL_CAPTION, State, misfits, to_published
from sana.models.transformer import SanaTransformer, TransformerConfig

_600M = TransformerConfig(depth=28, hidden_size=1152, num_heads=16)
_1600M = TransformerConfig(depth=20, hidden_size=2240, num_heads=20)
# Sprint: the network inside `sana.models.sprint.TrigFlow`.
_SPRINT: dict[str, Any] = {
    "qk_norm": True,
    "cross_norm": True,
    "cfg_embed": True,
    "timestep_norm_scale_factor": 1000.0,
}

TRANSFORMERS: dict[str, TransformerConfig] = {
    "SanaMS_600M_P1_D28": _600M,
    "SanaMS_600M_P2_D28": replace(_600M, patch_size=2),
    "SanaMS_600M_P4_D28": replace(_600M, patch_size=4),
    "SanaMS_1600M_P1_D20": _1600M,
    "SanaMS_1600M_P2_D20": replace(_1600M, patch_size=2),
    "SanaMS_2400M_P1_D30": replace(_1600M, depth=30),
    "SanaMS_3200M_P1_D40": replace(_1600M, depth=40),
    "SanaMS_4800M_P1_D60": replace(_1600M, depth=60),
    "SanaMSCM_600M_P1_D28": replace(_600M, **_SPRINT),
    "SanaMSCM_1600M_P1_D20": replace(_1600M, **_SPRINT),
    "SanaMSCM_2400M_P1_D30": replace(_1600M, depth=30, **_SPRINT),
    # The embedded model of this repository (asset/sana_tiny).
    "SanaMS_Tiny_P1_D8": TransformerConfig(
        depth=8, hidden_size=224, num_heads=7, caption_channels=128, model_max_length=64
    ),
}
"""P: patch size, D: depth. The q/k norms of SANA-1.5 are overrides: `qk_norm=True, cross_norm=True`."""


def build_transformer(name: str, **overrides: Any) -> SanaTransformer:
    """Build a freshly initialised transformer; `overrides` replace fields of its `TransformerConfig`.

    Raises:
        ValueError: unknown name or field (the message lists the valid ones), or a refused value.
    """
    if name not in TRANSFORMERS:
        raise ValueError(_unknown("transformer", name, TRANSFORMERS))
    valid = [field.name for field in fields(TransformerConfig)]
    for key in overrides:
        if key not in valid:
            raise ValueError(_unknown("transformer setting", key, valid))
    return SanaTransformer(replace(TRANSFORMERS[name], **overrides))


def _unknown(kind: str, name: str, valid: Any) -> str:
    nearest = difflib.get_close_matches(name, valid, n=1, cutoff=0)
    return f"unknown {kind} {name!r}: did you mean {nearest[0]!r}? Valid: {', '.join(valid)}"


def recognise(state: State) -> tuple[str, dict[str, Any]]:
    """The architecture of a transformer's weights, from the names and shapes of its tensors.

    Shapes cannot tell the position embedding, the clipping of the attention, the scales of time and guidance, or which
    blocks PAG perturbs: those are in `sana.models.checkpoints.PUBLISHED` or in a config. A teacher of Sprint looks like
    a SANA-1.5.

    Args:
        state: published or diffusers' names; the tensors may be on the meta device.

    Returns:
        A name in `TRANSFORMERS` and the overrides with which `build_transformer` makes a model that the state fits.

    Raises:
        ValueError: no known architecture fits; names the nearest, where it is a transformer at all.
    """
    state = to_published(state)
    seen = _dimensions(state)
    candidates = {
        key: config for key, config in TRANSFORMERS.items() if config.cfg_embed == seen["cfg_embed"]
    }

    def distance(name: str) -> tuple[int, ...]:
        config = candidates[name]
        return tuple(abs(getattr(config, key) - seen[key]) for key in ("hidden_size", "depth", "patch_size"))

    nearest = min(candidates, key=distance)
    if any(distance(nearest)):
        raise ValueError(
            f"no known transformer is {seen['hidden_size']} wide and {seen['depth']} blocks deep with patches of "
            f"{seen['patch_size']}; the nearest is {nearest}"
        )
    overrides = {key: value for key, value in seen.items() if value != getattr(candidates[nearest], key)}
    with torch.device("meta"):
        model = build_transformer(nearest, **overrides)
    if problems := misfits(model.state_dict(), state):
        raise ValueError(f"no known transformer; the nearest is {nearest}, but {'; '.join(problems)}")
    return nearest, overrides


def _dimensions(state: State) -> dict[str, Any]:
    """The fields of `TransformerConfig` that names and shapes tell."""

    def size(key: str, dimension: int) -> int:
        if key not in state or state[key].ndim <= dimension:
            raise ValueError(f"not the weights of a Sana transformer: no {key} of the right shape")
        return state[key].shape[dimension]

    blocks = {key.split(".")[1] for key in state if key.startswith("blocks.")}
    patch_size, hidden_size = size("x_embedder.proj.weight", 3), size("x_embedder.proj.weight", 0)
    seen = {
        "depth": len(blocks),
        "hidden_size": hidden_size,
        "patch_size": patch_size,
        "in_channels": size("x_embedder.proj.weight", 1),
        "out_channels": size("final_layer.linear.weight", 0) // max(1, patch_size**2),
        "mlp_ratio": size("blocks.0.mlp.point_conv.conv.weight", 1) / max(1, hidden_size),
        "caption_channels": size("y_embedder.y_proj.fc1.weight", 1),
        "qk_norm": "blocks.0.attn.q_norm.weight" in state,
        "cross_norm": "blocks.0.cross_attn.q_norm.weight" in state,
        "y_norm": "attention_y_norm.weight" in state,
        "cfg_embed": "cfg_embedder.mlp.0.weight" in state,
    }
    if NULL_CAPTION in state:
        seen["model_max_length"] = size(NULL_CAPTION, 0)
    return seen
