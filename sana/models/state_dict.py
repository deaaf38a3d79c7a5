"""Transformer weights: read files, rename between the published names and those of diffusers, load strictly.

The table of names is that of diffusers' own conversion script (scripts/convert_sana_to_diffusers.py).
"""

import pickle
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from sana.utils.files import write_atomic
from sana.utils.hub import resolve
from sana.utils.logging import get_logger

logger = get_logger(__name__)

State = Mapping[str, torch.Tensor]

NULL_CAPTION = "y_embedder.y_embedding"
"""Buffer without a counterpart in diffusers; only training reads it, and overwrites it first."""

RECOMPUTED = ("pos_embed",)
"""Stored in published checkpoints, but a function of the grid: dropped on load."""

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
_INVERSE_TOP = {theirs: ours for ours, theirs in _TOP.items()}
# diffusers name -> (published name, index of the part, number of parts)
_INVERSE_BLOCK = {
    part: (ours, index, len(parts))
    for ours, theirs in _BLOCK.items()
    for parts in [(theirs,) if isinstance(theirs, str) else theirs]
    for index, part in enumerate(parts)
}


def load_transformer_state(path: str | Path) -> dict[str, torch.Tensor]:
    """Read the weights of a transformer, under the published names whatever the file's own.

    Args:
        path: a local path or an `hf://` address (see `sana.utils.hub.resolve`) of a `.pth` file (a state
            dict, bare or under the key "state_dict") or a `.safetensors` file, with the published names or
            those of diffusers.

    Raises:
        ValueError: no such file, an unknown kind of file, a corrupt one, or one of something else.
    """
    file = resolve(path)
    reader = _READERS.get(file.suffix)
    if reader is None or not file.is_file():
        raise ValueError(f"{file}: not a checkpoint file; expected one that ends in {' or '.join(_READERS)}")
    state = reader(file)
    wrong = [key for key, value in state.items() if not isinstance(value, torch.Tensor)]
    if wrong or not state:
        raise ValueError(
            f"{file}: not a state dict: {_shorten(wrong) + ' no tensor' if wrong else 'it is empty'}"
        )
    return from_diffusers(state) if any(key.startswith("transformer_blocks.") for key in state) else state


# What torch.load was seen to raise on damaged files in its two formats.
_UNREADABLE = (
    *(RuntimeError, OSError, EOFError, ValueError, TypeError, LookupError, AttributeError, AssertionError),
    *(pickle.UnpicklingError, struct.error),
)


def _read_pickle(file: Path) -> dict[str, torch.Tensor]:
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        raise ValueError(f"{file}: truncated, corrupt, or not only tensors: {_first_line(error)}") from error
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict):
        raise ValueError(f"{file}: holds a {type(content).__name__}, not a state dict")
    return dict(state)


def _read_safetensors(file: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: truncated or corrupt: {_first_line(error)}") from error


_READERS: dict[str, Callable[[Path], dict[str, torch.Tensor]]] = {
    ".pth": _read_pickle,
    ".safetensors": _read_safetensors,
}


def load_into(model: nn.Module, state: State) -> None:
    """Load a state with published names into `model`, strictly.

    Two exceptions, and no other: `pos_embed` is ignored, for the model recomputes it; the null caption may be
    absent (a state that comes from diffusers has none), and the model then keeps its own.

    Raises:
        ValueError: names every kind of missing, unexpected and misshapen tensor. The model is then unchanged.
    """
    own = model.state_dict()
    state = {key: value for key, value in state.items() if key not in RECOMPUTED}
    problems = []
    if missing := own.keys() - state.keys() - {NULL_CAPTION}:
        problems.append(f"the checkpoint lacks {_shorten(missing)}")
    if unexpected := state.keys() - own.keys():
        problems.append(f"the model has no {_shorten(unexpected)}")
    if misshapen := [
        f"{key} is {tuple(state[key].shape)} in the checkpoint, {tuple(own[key].shape)} in the model"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]:
        problems.append(_shorten(misshapen))
    if problems:
        raise ValueError(f"the checkpoint does not fit the model: {'; '.join(problems)}")
    if NULL_CAPTION in own and NULL_CAPTION not in state:
        logger.info("the checkpoint has no %s: the model keeps its own", NULL_CAPTION)
        state[NULL_CAPTION] = own[NULL_CAPTION]
    model.load_state_dict(state)


def to_diffusers(state: State) -> dict[str, torch.Tensor]:
    """Rename published names to those of diffusers' `SanaTransformer2DModel`.

    The null caption and `pos_embed` have none and are left out.

    Raises:
        ValueError: a name that the table does not have.
    """
    renamed: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        if key in (*RECOMPUTED, NULL_CAPTION):
            continue
        prefix, module, leaf = _split(key, "blocks")
        theirs = (_BLOCK if prefix else _TOP).get(module)
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


def _split(key: str, blocks: str) -> tuple[str, str, str]:
    """Split blocks.3.attn.qkv.weight into blocks.3, attn.qkv, weight; the first is "" outside the blocks."""
    *module, leaf = key.split(".")
    if module[:1] == [blocks] and len(module) > 1:
        return ".".join(module[:2]), ".".join(module[2:]), leaf
    return "", ".".join(module), leaf


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _shorten(names: Iterable[str], limit: int = 5) -> str:
    names = sorted(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def save_transformer(
    state: State, path: str | Path, *, name: str, dtype: torch.dtype = torch.float32
) -> Path:
    """Write weights as one `.safetensors` file, in one step.

    Args:
        state: a transformer's state dict, with the published names.
        path: the file.
        name: architecture, a name in `sana.models.zoo.TRANSFORMERS`; kept in the file's metadata.
        dtype: what floating-point tensors are stored as.
    """
    stored = {key: value.to("cpu", dtype).contiguous() for key, value in state.items()}
    return write_atomic(path, save(stored, {"architecture": name, "format": "pt"}))
