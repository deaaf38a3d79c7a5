"""Names of the transformer's tensors: the published ones and those of diffusers, and which a model must have.

The table of names is that of diffusers' own conversion script (scripts/convert_sana_to_diffusers.py).
"""

from collections.abc import Iterable, Mapping

import torch

State = Mapping[str, torch.Tensor]

NULL_CAPTION = "y_embedder.y_embedding"
"""Buffer that only training reads, and overwrites first."""

IGNORED = ("pos_embed", "logvar_linear.weight", "logvar_linear.bias")
"""What published checkpoints hold and no model here has: the position table, a function of the grid; and the head that
weighs the loss in Sprint's training, on which no image depends."""

NOT_IN_DIFFUSERS = (NULL_CAPTION, *IGNORED)
"""Tensors of a checkpoint without a counterpart in diffusers."""

# Modules outside the blocks: published name -> diffusers name.
_TOP = {
    "x_embedder.proj": "patch_embed.proj",
    "t_embedder.mlp.0": "time_embed.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_embed.emb.timestep_embedder.linear_2",
    "t_block.1": "time_embed.linear",
    "y_embedder.y_proj.fc1": "caption_projection.linear_1",
    "y_embedder.y_proj.fc2": "caption_projection.linear_2",
    "attention_y_norm": "caption_norm",
    "final_layer": "",  # holds a scale_shift_table
    "final_layer.linear": "proj_out",
}
# Modules of a block. A tuple: one published matrix whose rows are these, in this order.
_BLOCK: dict[str, str | tuple[str, ...]] = {
    "": "",  # holds a scale_shift_table
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn.q_norm": "attn1.norm_q",
    "attn.k_norm": "attn1.norm_k",
    "attn.proj": "attn1.to_out.0",
    "cross_attn.q_linear": "attn2.to_q",
    "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
    "cross_attn.q_norm": "attn2.norm_q",
    "cross_attn.k_norm": "attn2.norm_k",
    "cross_attn.proj": "attn2.to_out.0",
    "mlp.inverted_conv.conv": "ff.conv_inverted",
    "mlp.depth_conv.conv": "ff.conv_depth",
    "mlp.point_conv.conv": "ff.conv_point",
}
# Where Sprint differs: its time embedding stands beside one of the guidance scale.
_SPRINT = {
    "t_embedder.mlp.0": "time_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_embed.timestep_embedder.linear_2",
    "cfg_embedder.mlp.0": "time_embed.guidance_embedder.linear_1",
    "cfg_embedder.mlp.2": "time_embed.guidance_embedder.linear_2",
}
_INVERSE_TOP = {theirs: ours for table in (_TOP, _SPRINT) for ours, theirs in table.items()}
# diffusers name -> (published name, index of the part, number of parts)
_INVERSE_BLOCK = {
    part: (ours, index, len(parts))
    for ours, theirs in _BLOCK.items()
    for parts in [(theirs,) if isinstance(theirs, str) else theirs]
    for index, part in enumerate(parts)
}


def to_diffusers(state: State, *, sprint: bool | None = None) -> dict[str, torch.Tensor]:
    """Rename published names to those of diffusers' `SanaTransformer2DModel`.

    Those of `NOT_IN_DIFFUSERS` have none and are left out.

    Args:
        sprint: use the names of a network with an embedding of the guidance scale (diffusers' `guidance_embeds`); None:
            if it has one. Sprint's teachers have none.

    Raises:
        ValueError: a name that the table does not have.
    """
    if sprint is None:
        sprint = any(key.startswith("cfg_embedder.") for key in state)
    top = _TOP | _SPRINT if sprint else _TOP
    renamed: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        if key in NOT_IN_DIFFUSERS:
            continue
        prefix, module, leaf = _split(key, "blocks")
        theirs = (_BLOCK if prefix else top).get(module)
        if theirs is None:
            raise ValueError(f"no diffusers name for {key!r}")
        if isinstance(theirs, str):
            renamed[_join(prefix and f"transformer_{prefix}", theirs, leaf)] = value
        else:
            for part, rows in zip(theirs, value.chunk(len(theirs)), strict=True):
                # A copy: safetensors refuses to save views of one storage.
                renamed[_join(f"transformer_{prefix}", part, leaf)] = rows.clone()
    return renamed


def from_diffusers(state: State) -> dict[str, torch.Tensor]:
    """Rename diffusers' names to the published ones; the inverse of `to_diffusers`, bit for bit.

    Raises:
        ValueError: a name that the table does not have, or a query, key or value without the others.
    """
    renamed: dict[str, torch.Tensor] = {}
    fused: dict[str, list[torch.Tensor | None]] = {}
    for key, value in state.items():
        prefix, module, leaf = _split(key, "transformer_blocks")
        if not prefix and module in _INVERSE_TOP:
            renamed[_join("", _INVERSE_TOP[module], leaf)] = value
        elif prefix and module in _INVERSE_BLOCK:
            ours, index, count = _INVERSE_BLOCK[module]
            name = _join(prefix.removeprefix("transformer_"), ours, leaf)
            fused.setdefault(name, [None] * count)[index] = value
        else:
            raise ValueError(f"no published name for {key!r}")
    for name, parts in fused.items():
        present = [part for part in parts if part is not None]
        if len(present) < len(parts):
            raise ValueError(
                f"{name} needs {len(parts)} tensors of the diffusers state, which has {len(present)}"
            )
        renamed[name] = present[0] if len(present) == 1 else torch.cat(present)
    return renamed


def to_published(state: State) -> dict[str, torch.Tensor]:
    """The state of a file under the published names, whatever its own.

    Raises:
        ValueError: a ControlNet, or names of diffusers that the table does not have.
    """
    if any(not isinstance(key, str) for key in state):
        raise ValueError("not a state dict: its keys are no names")
    if any(key.startswith("controlnet.") for key in state):
        raise ValueError("a ControlNet checkpoint; ControlNet is not supported here, only its base model is")
    if any(key.startswith("transformer_blocks.") for key in state):
        return from_diffusers(state)
    return dict(state)


def misfits(own: State, state: State) -> list[str]:
    """Every kind of difference between a model's state and a file's, with published names; empty if it fits.

    Two exceptions, and no other: the file may have tensors of `IGNORED` and lack the `NULL_CAPTION`. Of all kinds
    together about three names are told, and how many more there are.
    """
    kinds = {
        "it lacks ": own.keys() - state.keys() - {NULL_CAPTION},
        "the model has no ": state.keys() - own.keys() - {*IGNORED},
        "": [
            f"{key} is {tuple(state[key].shape)}, in the model {tuple(own[key].shape)}"
            for key in own
            if key in state and state[key].shape != own[key].shape
        ],
    }
    kinds = {kind: names for kind, names in kinds.items() if names}
    return [f"{kind}{shorten(names, limit=3 // len(kinds))}" for kind, names in kinds.items()]


def shorten(names: Iterable[str], limit: int = 5) -> str:
    """The first names in order, and how many more there are."""
    names = sorted(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _split(key: str, blocks: str) -> tuple[str, str, str]:
    """Split blocks.3.attn.qkv.weight into blocks.3, attn.qkv, weight; the first is "" outside the blocks."""
    *module, leaf = key.split(".")
    if module[:1] == [blocks] and len(module) > 1:
        return ".".join(module[:2]), ".".join(module[2:]), leaf
    return "", ".".join(module), leaf


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)
