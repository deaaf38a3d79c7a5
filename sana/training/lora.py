"""LoRA: low-rank changes trained beside frozen weights (arXiv 2106.09685), with the library peft.

W' = W + (alpha / rank) B A. A is random and B zero at first, so that a run starts from the weights as they are. Here the
matrices lie under their published names; a file for others has those of diffusers, where queries, keys and values are
matrices of their own: they share A, and each has its rows of B.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from sana.config import ConfigError
from sana.models.key_names import misfits, shorten, to_diffusers
from sana.models.mix_ffn import PointwiseConv
from sana.models.state_dict import load_into
from sana.models.transformer import SanaTransformer
from sana.training.parallel import gathered
from sana.utils.files import write_atomic

FILE_NAME = "pytorch_lora_weights.safetensors"
"""What diffusers calls such a file; the LoRA of a finished run."""

ATTENTION = ("attn.qkv", "attn.proj", "cross_attn.q_linear", "cross_attn.kv_linear", "cross_attn.proj")
"""The matrices that are changed where the config does not say which: those of both attentions of every block."""

_FACTOR = ".lora_"  # in the names of all factors, and in no other
_ADAPTER = "default"  # peft's name of the only one
_SETTINGS = "lora_adapter_metadata"  # in a file's header, as of diffusers: JSON of peft's settings


@dataclass(frozen=True)
class LoraSettings:
    """`train.lora` of a config."""

    rank: int
    alpha: float
    """The change is alpha / rank times B A; the rank unless it is given."""
    targets: tuple[str, ...]
    """Matrices, by the ends of their published names."""

    @classmethod
    def of(cls, entries: Mapping[str, Any]) -> LoraSettings:
        """From the entries of `train.lora`."""
        rank = entries["rank"]
        return cls(rank, entries.get("alpha", rank), tuple(entries.get("target_modules", ATTENTION)))


def add_lora(transformer: SanaTransformer, settings: LoraSettings) -> None:
    """Put new factors beside the matrices, in place, and freeze everything else.

    Raises:
        ConfigError: peft is not installed, or no matrix has one of the names.
    """
    targets = _chosen(transformer, settings.targets)
    try:
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import Linear
    except ImportError as error:
        raise ConfigError("train.lora needs peft: pip install peft") from error
    config = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=targets)
    config._register_custom_module({PointwiseConv: Linear})  # for it computes as a linear layer does
    inject_adapter_in_model(config, transformer, _ADAPTER)


def _chosen(transformer: SanaTransformer, ends: Sequence[str]) -> list[str]:
    """The matrices whose names are, or end in, one of `ends`; a depthwise convolution is none."""
    names = [
        name
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
    ]
    chosen: set[str] = set()
    for end in ends:
        fitting = {name for name in names if f".{name}".endswith(f".{end}")}
        if not fitting:
            kinds = {".".join(name.split(".")[2:]) if name.startswith("blocks.") else name for name in names}
            raise ConfigError(
                f"train.lora.target_modules: no matrix is called {end!r}; there are {shorten(kinds, 30)}"
            )
        chosen |= fitting
    return sorted(chosen)


def has_factors(state: Mapping[str, Tensor]) -> bool:
    """Whether a state is that of a LoRA, alone or beside its base."""
    return any(_FACTOR in name for name in state)


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """The part of the model's state that training changes, on the CPU: the factors of a LoRA, else everything.

    Gathered if it is sharded: then every process must call it.
    """
    state = model.state_dict()
    factors = {name: value for name, value in state.items() if _FACTOR in name}
    return {name: gathered(value).cpu() for name, value in (factors or state).items()}


def load_trained(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load what `trained_state` gave, strictly; into a model without a LoRA also a published state.

    Raises:
        ValueError: it is of another model, of another LoRA, or only one of the two is a LoRA.
    """
    own = {name: value for name, value in model.state_dict().items() if _FACTOR in name}
    if not own and has_factors(state):
        raise ValueError(
            "the checkpoint is of a LoRA: set train.lora and model.load_from as its run had them"
        )
    if own and not has_factors(state):
        raise ValueError(
            "the checkpoint holds whole weights, no LoRA: to train one of them, set model.load_from"
        )
    if not own:
        load_into(model, state)
        return
    if problems := misfits(own, state):
        raise ValueError(f"the checkpoint's LoRA is not that of train.lora: {'; '.join(problems)}")
    model.load_state_dict(state, strict=False)  # the frozen rest is not in it


def header(entries: Mapping[str, Any] | None) -> dict[str, str]:
    """What the file of a LoRA's own factors says in its metadata, so that it can be loaded as one; else nothing."""
    if entries is None:
        return {}
    settings = LoraSettings.of(entries)
    return {_SETTINGS: json.dumps({"r": settings.rank, "lora_alpha": settings.alpha})}


@torch.no_grad()
def save_lora(model: SanaTransformer, path: Path) -> Path:
    """Write the LoRA of a model as `SanaPipeline.load_lora_weights` of diffusers and `SanaPipeline.load_lora` here take it.

    In float32, with alpha / rank multiplied into B: a reader that does not know the settings draws the same.
    """
    from peft.tuners.lora import LoraLayer

    tensors, modules, rank = {}, [], 0
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        down = layer.lora_A[_ADAPTER].weight.float().cpu()
        up = layer.lora_B[_ADAPTER].weight.float().cpu() * layer.scaling[_ADAPTER]
        kernel, rank = layer.get_base_layer().weight.shape[2:], len(down)
        down = down.view(rank, -1, *kernel)
        up = up.view(-1, rank, *(1 for _ in kernel))
        parts = to_diffusers({f"{name}.weight": up}, sprint=model.config.cfg_embed)
        for key, rows in parts.items():  # more than one of a fused matrix
            module = key.removesuffix(".weight")
            modules.append(module)
            tensors[f"transformer.{module}.lora_A.weight"] = down.clone()
            tensors[f"transformer.{module}.lora_B.weight"] = rows.contiguous()
    settings = {"r": rank, "lora_alpha": rank, "target_modules": sorted(modules)}
    settings = {f"transformer.{key}": value for key, value in settings.items()}
    return write_atomic(path, save(tensors, {"format": "pt", _SETTINGS: json.dumps(settings)}))
