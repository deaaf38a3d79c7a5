"""Weights in 8 or 4 bits: less memory, and on some devices less time, for a small error.

Of the transformer the large products of its blocks are quantised, 1x1 convolutions among them; of a text encoder all linear
layers. Embeddings, norms, convolutions with a neighbourhood, the arithmetic of the linear attention and the modulation
stay as they are.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from sana.models.filling import Finish
from sana.models.layers import Linear
from sana.models.mix_ffn import PointwiseConv
from sana.models.transformer import SanaTransformer
from sana.utils.logging import hush_imports

PARTS = ("transformer", "text_encoder")
"""What can be quantised, each in a way of its own."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A way to hold weights."""

    library: str
    """What does it; an extra of this package."""
    value_bytes: float
    """Of one weight."""
    row_bytes: float = 0.0
    """Of the scale of one output channel, in addition."""
    dynamic: bool = False
    """Inputs are quantised too, each token with a scale of its own."""


KINDS: dict[str, Kind] = {
    "int8": Kind(library="torchao", value_bytes=1, row_bytes=4),
    "int8-dynamic": Kind(library="torchao", value_bytes=1, row_bytes=4, dynamic=True),
    "fp8": Kind(library="torchao", value_bytes=1, row_bytes=4),
    "fp8-dynamic": Kind(library="torchao", value_bytes=1, row_bytes=4, dynamic=True),
    "nf4": Kind(library="bitsandbytes", value_bytes=0.5 + 1 / 64),  # a scale of 8 bits for 64 weights
}
"""Name -> kind. `-dynamic` computes with 8-bit inputs too; the others unpack a layer's weights for each product."""

KEPT_IN_DYNAMIC = ("cross_attn.kv_linear",)
"""Run once for a prompt on few tokens, whose outliers 8 bits would lose: not quantised where inputs are."""


def parse(setting: str | Mapping[str, str] | None) -> dict[str, str]:
    """Part -> kind, from "transformer=int8,text_encoder=nf4" or a mapping; {} from None.

    Raises:
        ValueError: an unknown part or kind, or a part named twice.
    """
    if isinstance(setting, str):
        pairs = [word.strip().partition("=")[::2] for word in setting.split(",") if word.strip()]
        if len({part for part, _ in pairs}) < len(pairs):
            raise ValueError(f"quantize {setting!r} names a part twice")
        setting = dict(pairs)
    for part, kind in (setting or {}).items():
        if part not in PARTS or kind not in KINDS:
            raise ValueError(
                f"quantize {part}={kind}: expected PART=KIND with {' or '.join(PARTS)} and one of {', '.join(KINDS)}"
            )
    return dict(setting or {})


def check(kinds: Mapping[str, str], device: torch.device) -> None:
    """Refuse what cannot work here, before anything is loaded; `kinds` as from `parse`.

    Raises:
        ValueError: as `check_kind`.
    """
    for kind in kinds.values():
        check_kind(kind, device)


def check_kind(kind: str, device: torch.device) -> None:
    """Refuse a kind that cannot work here.

    Raises:
        ValueError: unknown kind, its library is not installed, or the device cannot compute so.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind of quantisation {kind!r}; choose from {', '.join(KINDS)}")
    library = KINDS[kind].library
    if importlib.util.find_spec(library) is None:
        raise ValueError(
            f"quantisation {kind} needs {library}, which is not installed: pip install {library}"
        )
    if kind == "fp8-dynamic" and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9)):
        raise ValueError(
            f"quantisation fp8-dynamic needs a GPU of compute capability 8.9 or more, not {device}: use fp8 or int8-dynamic"
        )


def is_wanted(name: str, module: nn.Module, kind: str, part: str) -> bool:
    """Whether a module of that name in a network is quantised."""
    layers = (Linear, PointwiseConv) if part == "transformer" else nn.Linear
    kept = KINDS[kind].dynamic and name.endswith(KEPT_IN_DYNAMIC)
    return isinstance(module, layers) and not kept


def finisher(kind: str, part: str) -> Finish:
    """For `fill`: every layer of a network, one of `PARTS`, that is to be quantised comes back quantised."""
    return lambda name, module: quantized(module, kind) if is_wanted(name, module, kind, part) else module


def part_of(model: nn.Module) -> str:
    """Which of `PARTS` a network is."""
    return "transformer" if isinstance(model, SanaTransformer) else "text_encoder"


def quantize_(model: nn.Module, kind: str) -> nn.Module:
    """Quantise the weights of `model`, in place, layer by layer; returns it.

    Args:
        model: a `SanaTransformer` or a language model, on the device where it will compute.
        kind: a key of `KINDS`.

    Raises:
        ValueError: as `check_kind`.
    """
    check_kind(kind, next(model.parameters()).device)
    finish = finisher(kind, part_of(model))
    for name in [name for name, _ in model.named_modules()]:  # names alone: what is replaced must not stay
        module = model.get_submodule(name)
        new = finish(name, module)
        if new is not module:
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, new)
    return model


def quantized(layer: nn.Linear | PointwiseConv, kind: str) -> nn.Module:
    """A linear layer that computes what `layer` does, with quantised weights; `layer` itself is left as it was."""
    weight, bias = layer.weight.detach().flatten(1), layer.bias
    with torch.device("meta"):
        new = Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    new.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        new.bias = nn.Parameter(bias.detach(), requires_grad=False)
    new = _nf4(new) if kind == "nf4" else _torchao(new, kind)
    return new.eval()


def _torchao(layer: nn.Linear, kind: str) -> nn.Linear:
    hush_imports()
    from torchao import quantization as ao

    configs = {
        "int8": lambda: ao.Int8WeightOnlyConfig(version=2),
        "int8-dynamic": lambda: ao.Int8DynamicActivationInt8WeightConfig(version=2),
        "fp8": ao.Float8WeightOnlyConfig,
        "fp8-dynamic": lambda: ao.Float8DynamicActivationFloat8WeightConfig(granularity=ao.PerRow()),
    }
    ao.quantize_(layer, configs[kind]())
    return layer


def _nf4(layer: nn.Linear) -> nn.Module:
    hush_imports()
    from bitsandbytes.nn import Linear4bit, Params4bit

    has_bias, dtype = layer.bias is not None, layer.weight.dtype
    with torch.device("meta"):
        new = Linear4bit(
            layer.in_features, layer.out_features, has_bias, compute_dtype=dtype, quant_type="nf4"
        )
    new.weight = Params4bit(layer.weight.detach(), requires_grad=False, quant_type="nf4", module=new)
    new.bias = layer.bias
    new.support_avx512bf16_for_cpu = (
        False  # a path that rounds to bfloat16 whatever the dtype, and not for all widths
    )
    return new.to(layer.weight.device)  # which packs the weights


def weight_bytes(model: nn.Module, kind: str | None) -> int:
    """Bytes of the parameters and buffers of `model`, which may lie on "meta", if it were quantised."""
    seen: dict[int, float] = {}
    for name, module in model.named_modules():
        small = kind is not None and is_wanted(name, module, kind, part_of(model))
        for key, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            size = tensor.nbytes
            if small and key == "weight":
                size = tensor.numel() * KINDS[kind].value_bytes + len(tensor) * KINDS[kind].row_bytes
            seen.setdefault(id(tensor), size)
    return int(sum(seen.values()))
