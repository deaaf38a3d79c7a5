"""A transformer as one file: the published `.pth`, or a `.safetensors` that says itself what it holds."""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file

from sana.models.key_names import State
from sana.models.transformer import TransformerConfig
from sana.models.zoo import TRANSFORMERS
from sana.utils.files import write_atomic

SUFFIXES = (".pth", ".safetensors")
"""What `write_single_file` writes."""


def write_single_file(
    path: Path,
    state: State,
    *,
    name: str,
    network: TransformerConfig,
    config_text: str,
    published: str | None = None,
) -> None:
    """Write weights with published names, in their dtype and in one step.

    Args:
        path: ends in one of `SUFFIXES`. A `.pth` holds nothing but {"state_dict": state}, as published.
        state: the weights.
        name: architecture, a name in `TRANSFORMERS`.
        network: the settings of the transformer.
        config_text: the complete config of the model as YAML.
        published: the published checkpoint that the weights are, a key in `sana.models.checkpoints.PUBLISHED`.

    The metadata of a `.safetensors` has `architecture`, `overrides` (JSON: the settings that differ from those of that
    architecture), `config` (the YAML) and, where it is one, `published`.
    """
    if path.suffix == ".pth":
        write_atomic(path, lambda handle: torch.save({"state_dict": dict(state)}, handle))
        return
    usual = asdict(TRANSFORMERS[name])
    overrides = {key: value for key, value in asdict(network).items() if value != usual[key]}
    metadata = {
        "format": "pt",
        "architecture": name,
        "overrides": json.dumps(overrides),
        "config": config_text,
    }
    if published:
        metadata["published"] = published
    tensors = {key: value.contiguous() for key, value in state.items()}
    # By its name: to write through the handle, the file would first stand in memory as a whole.
    write_atomic(path, lambda handle: save_file(tensors, handle.name, metadata))
