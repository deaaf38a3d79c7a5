"""Names of architectures to their parameters."""

import difflib
from dataclasses import fields, replace
from typing import Any

from sana.models.transformer import SanaTransformer, TransformerConfig

_600M = TransformerConfig(depth=28, hidden_size=1152, num_heads=16)
_1600M = TransformerConfig(depth=20, hidden_size=2240, num_heads=20)

TRANSFORMERS: dict[str, TransformerConfig] = {
    "SanaMS_600M_P1_D28": _600M,
    "SanaMS_600M_P2_D28": replace(_600M, patch_size=2),
    "SanaMS_600M_P4_D28": replace(_600M, patch_size=4),
    "SanaMS_1600M_P1_D20": _1600M,
    "SanaMS_1600M_P2_D20": replace(_1600M, patch_size=2),
    "SanaMS_2400M_P1_D30": replace(_1600M, depth=30),
    "SanaMS_3200M_P1_D40": replace(_1600M, depth=40),
    "SanaMS_4800M_P1_D60": replace(_1600M, depth=60),
    # The embedded model of this repository (asset/sana_tiny).
    "SanaMS_Tiny_P1_D8": TransformerConfig(
        depth=8, hidden_size=160, num_heads=5, caption_channels=128, model_max_length=64
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
