"""LoRA files at inference: low-rank changes of the transformer's matrices, added into its weights.

With the files i loaded, W' = W + sum_i weight_i scale_i B_i A_i (arXiv 2106.09685), formed in float32 and
rounded once to the dtype of W; scale = alpha / rank, or alpha / sqrt(rank) where the file's settings ask for
it (use_rslora, arXiv 2312.03732). Queries, keys and values are one matrix here and three in diffusers: a
change of `to_q` adds to the first rows only.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sana.models.key_names import shorten, to_diffusers
from sana.models.transformer import SanaTransformer
from sana.utils import hub
from sana.utils.logging import get_logger

logger = get_logger(__name__)

_USUAL_NAMES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")  # of diffusers and of peft
_DIFFUSERS_SETTINGS = "lora_adapter_metadata"  # in the header of a diffusers file: JSON of peft's settings
_PREFIXES = ("lora_unet_", "lora_transformer_", "transformer.", "diffusion_model.", "base_model.model.")
_FACTOR = re.compile(
    r"(?P<module>.+)\.(?:(?P<down>lora_A|lora\.down|lora_down)|lora_B|lora\.up|lora_up)(?:\.\w+)?\.weight"
)
_RECORD = "_fused_lora"  # attribute of a model: parameter name -> _Fused


@dataclass(frozen=True)
class _Target:
    """Rows of a parameter that one module's change adds to."""

    key: str
    rows: slice
    shape: tuple[int, ...]


@dataclass(frozen=True)
class _Change:
    """`up` (rows, r), scaled, times `down` (r, columns), both float32."""

    target: _Target
    up: Tensor
    down: Tensor


@dataclass
class _Fused:
    """What a parameter was, bit for bit, on the CPU, and all that was added to it."""

    original: Tensor
    changes: list[_Change] = field(default_factory=list)

    def weight(self) -> Tensor:
        """The parameter with all changes, on the CPU: the same on every device."""
        wide = self.original.to(torch.float32, copy=True)
        for change in self.changes:
            wide[change.target.rows] += (change.up @ change.down).view(change.target.shape)
        return wide.to(self.original.dtype)


@torch.no_grad()
def load_lora(model: SanaTransformer, path: str | Path, weight: float = 1.0) -> None:
    """Add a LoRA file into the weights of `model`, in place, after those already loaded.

    Loading other weights into the model (`load_state_dict`) forgets all of them.

    Args:
        path: a .safetensors file, or the folder or hub name of one, as for `sana.utils.hub.resolve_model`.
            Its keys name modules of diffusers' transformer or the published ones, bare or as peft, diffusers
            and kohya write them. alpha is the file's own tensor, else that of its header or of the
            `adapter_config.json` beside it, else the rank.
        weight: multiplies the change; may be negative.

    Raises:
        ValueError: nothing is there, it is corrupt or no LoRA, or it does not fit. The model is then
            unchanged.
    """
    if not math.isfinite(weight):
        raise ValueError(f"the weight of a LoRA must be finite, got {weight}")
    file = _find(hub.resolve_model(path))
    changes = _changes(file, _targets(model), weight)
    parameters = dict(model.named_parameters())
    if not hasattr(model, _RECORD):
        setattr(model, _RECORD, {})
        model.register_load_state_dict_post_hook(_forget)
    record: dict[str, _Fused] = getattr(model, _RECORD)
    for change in changes:
        key = change.target.key
        if key not in record:
            record[key] = _Fused(parameters[key].detach().to("cpu", copy=True))
        record[key].changes.append(change)
    for key in {change.target.key for change in changes}:
        parameters[key].copy_(record[key].weight())
    ranks = sorted({len(change.down) for change in changes})
    logger.info("%s: %d changes of rank %s, weight %g", file, len(changes), shorten(map(str, ranks)), weight)


@torch.no_grad()
def unload_lora(model: SanaTransformer) -> None:
    """Take all LoRA files out again: every weight has the bits that it had before. Without one, do nothing.

    Weights that were cast in between are the original ones, cast.
    """
    record: dict[str, _Fused] = getattr(model, _RECORD, {})
    parameters = dict(model.named_parameters())
    for key, fused in record.items():
        parameters[key].copy_(fused.original)
    record.clear()


def _forget(model: SanaTransformer, _: Any) -> None:
    """After `load_state_dict`: what was fused is overwritten, and must not come back."""
    getattr(model, _RECORD).clear()


def _targets(model: SanaTransformer) -> dict[str, _Target]:
    """Names of the modules that can change: published, of diffusers, and both with "_" for "." (kohya)."""
    found: dict[str, _Target] = {}
    for key, weight in model.named_parameters():
        # Left out: norms, biases, tables; and the depthwise filter, of which peft's factors are no product B
        # A.
        if not key.endswith(".weight") or weight.ndim < 2 or (weight.ndim == 4 and weight.shape[1] == 1):
            continue
        rows = {key: torch.arange(len(weight))}
        for name, part in (rows | to_diffusers(rows, sprint=model.config.cfg_embed)).items():
            target = _Target(key, slice(int(part[0]), int(part[-1]) + 1), (len(part), *weight.shape[1:]))
            module = name.removesuffix(".weight")
            found[module] = found[module.replace(".", "_")] = target
    return found


def _find(path: Path) -> Path:
    """The file of a LoRA in a folder, or the file itself."""
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        usual = [file for file in files if file.name in _USUAL_NAMES] or files
        if len(usual) != 1:
            names = shorten(file.name for file in files) if files else "no .safetensors file"
            raise ValueError(f"{path}: name the LoRA's file; the folder holds {names}")
        return usual[0]
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: a LoRA is read from a .safetensors file")
    return path


def _changes(file: Path, targets: Mapping[str, _Target], weight: float) -> list[_Change]:
    """The scaled changes in a file, checked against the model."""
    try:
        with safe_open(file, "pt") as handle:
            tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118 no mapping
            metadata = handle.metadata() or {}
    except (SafetensorError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{file}: truncated or corrupt: {reason}") from error
    settings = _settings(file, metadata)
    modules = _group(file, tensors)
    names = {module: _without_prefixes(module) for module in modules}
    if unknown := [module for module, name in names.items() if name not in targets]:
        raise ValueError(f"{file}: the model has no matrix for {shorten(unknown)}")
    changes = []
    for module, parts in modules.items():
        if absent := {"down", "up"} - parts.keys():
            letter = "A (down)" if "down" in absent else "B (up)"
            raise ValueError(f"{file}: {module} lacks its lora_{letter}")
        target, down, up = targets[names[module]], parts["down"], parts["up"]
        shapes = f"lora_A {tuple(down.shape)} and lora_B {tuple(up.shape)}"
        if min(down.ndim, up.ndim) < 2 or math.prod(up.shape[1:]) != len(down) or not len(down):
            raise ValueError(f"{file}: {module}: {shapes} differ in their rank")
        if len(up) != target.shape[0] or math.prod(down.shape[1:]) != math.prod(target.shape[1:]):
            raise ValueError(f"{file}: {module}: {shapes} make no {target.shape}, the shape in the model")
        scale = weight * _scale(file, names[module], len(down), parts.get("alpha"), settings)
        changes.append(_Change(target, scale * up.float().flatten(1), down.float().flatten(1)))
    return changes


def _group(file: Path, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Module -> its tensors "down", "up" and perhaps "alpha"."""
    modules: dict[str, dict[str, Tensor]] = {}
    other = []
    for key, tensor in tensors.items():
        if match := _FACTOR.fullmatch(key):
            modules.setdefault(match["module"], {})["down" if match["down"] else "up"] = tensor
        elif key.endswith(".alpha") and tensor.numel() == 1:
            modules.setdefault(key.removesuffix(".alpha"), {})["alpha"] = tensor
        else:
            other.append(key)
    if other or not modules:
        what = f"it has {shorten(other)}" if other else "it is empty"
        raise ValueError(
            f"{file}: only pairs lora_A, lora_B (or lora.down, lora.up) and alpha can be read, "
            f"no DoRA, LoKr, biases or whole layers; {what}"
        )
    return modules


def _without_prefixes(module: str) -> str:
    for prefix in _PREFIXES:
        module = module.removeprefix(prefix)
    return module


def _settings(file: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """peft's settings of the file: in its header, else in the `adapter_config.json` beside it, else none."""
    beside = file.with_name("adapter_config.json")
    try:
        if _DIFFUSERS_SETTINGS in metadata:
            settings = json.loads(metadata[_DIFFUSERS_SETTINGS])
            settings = {key.removeprefix("transformer."): value for key, value in settings.items()}
        else:
            settings = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
        kind = settings.get("peft_type") or "LORA"
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"{file}: the settings in its header or in {beside.name} are no JSON object"
        ) from error
    if kind != "LORA" or settings.get("use_dora"):
        raise ValueError(
            f"{file}: its settings name {'DoRA' if kind == 'LORA' else kind}; only LoRA is supported"
        )
    return settings


def _scale(file: Path, module: str, rank: int, alpha: Tensor | None, settings: Mapping[str, Any]) -> float:
    """alpha / rank of one module."""
    stated = _for_module(settings.get("rank_pattern"), module, settings.get("r", rank))
    if stated != rank:
        raise ValueError(f"{file}: {module} has rank {rank}, but the settings say {stated}")
    value = _for_module(settings.get("alpha_pattern"), module, settings.get("lora_alpha", rank))
    value = value if alpha is None else float(alpha)
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{file}: alpha of {module} is {value!r}, not a finite number")
    return value / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _for_module(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The first value whose key, a regular expression as in peft, ends the module's name, or the default."""
    for pattern, value in (patterns or {}).items():
        if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", module):
            return value
    return default
