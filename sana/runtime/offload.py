"""Which of the three networks are on the device while one of them computes.

On a GPU the weights of the others wait in the CPU's memory. On a CPU they are dropped, and read from their files again when
they are needed: reading what the system still holds in its cache takes about a second for a gigabyte.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sana.models.filling import Finish
from sana.models.mix_ffn import PointwiseConv
from sana.utils import mapped
from sana.utils.oom import free_memory

PARTS = ("text_encoder", "transformer", "autoencoder")

TOGETHER: dict[str, tuple[tuple[str, ...], ...]] = {
    "none": (PARTS,),
    "text": (("text_encoder",), ("transformer", "autoencoder")),
    "model": (("text_encoder",), ("transformer",), ("autoencoder",)),
    "sequential": (("text_encoder",), ("transformer",), ("autoencoder",)),
}
"""Mode -> groups of networks that are on the device together. "none": all of them, all the time. "text": the text encoder gives
way to the others. "model": one at a time. "sequential": as "model", and of the first two one layer at a time."""

LAYERED = ("text_encoder", "transformer")
"""What "sequential" brings layer by layer; the autoencoder is small."""


def others(mode: str, name: str) -> list[str]:
    """The networks that have to go before `name` comes."""
    group = next(group for group in TOGETHER[mode] if name in group)
    return [part for part in PARTS if part not in group]


def check(mode: str, *, quantized: bool, compile: bool) -> None:
    """Refuse what does not go together.

    Raises:
        ValueError: unknown mode, or what it cannot be combined with.
    """
    if mode not in TOGETHER:
        raise ValueError(f"unknown offload {mode!r}; choose from {', '.join(TOGETHER)}")
    if mode == "sequential" and quantized:
        raise ValueError("offload sequential moves weights as they are: use offload model with quantize")
    if compile and mode not in ("none", "text"):
        raise ValueError(f"compile needs a transformer that stays where it is: not offload {mode}")


def bring(owner: Any, name: str, read: Callable[[str], nn.Module]) -> bool:
    """Have the network `name` on the device, after those are gone that cannot be there together with it.

    Args:
        owner: has `offload`, `device`, and the networks as attributes; one that was dropped is read and set again.

    Returns:
        Whether it was.
    """
    make_way(owner.offload, owner.device, name, {part: getattr(owner, part) for part in PARTS})
    free_memory()
    module = getattr(owner, name)
    dropped = is_dropped(module)
    if dropped:
        module = read(name)
        setattr(owner, name, module)
    if not _is_layered(owner.offload, name):
        module.to(owner.device)
    return dropped


def make_way(mode: str, device: torch.device, name: str, modules: Mapping[str, nn.Module]) -> None:
    """Take those of `modules` off `device` that cannot be there together with `name`."""
    for other, module in modules.items():
        if other in others(mode, name) and not _is_layered(mode, other) and not is_dropped(module):
            rest(module, device)


def _is_layered(mode: str, name: str) -> bool:
    """Whether the weights are gone all the time, but for a layer's."""
    return mode == "sequential" and name in LAYERED


def is_dropped(module: nn.Module) -> bool:
    """Whether the weights have to be read again."""
    return next(module.parameters()).device.type == "meta"


def rest(module: nn.Module, device: torch.device) -> None:
    """Take the weights off `device`: to the CPU's memory, or, where that is the device, away."""
    if device.type != "cpu":
        module.to("cpu")
        return
    for child in module.modules():
        for key, value in child._parameters.items():
            if value is not None:
                empty = torch.empty(value.shape, dtype=value.dtype, device="meta")
                child._parameters[key] = nn.Parameter(empty, requires_grad=False)
        if getattr(child, "quant_state", None) is not None:
            child.quant_state = None  # the scales of bitsandbytes
    mapped.trim()


class _Copies(Mapping[str, Tensor]):
    """Tensors that are views of mapped files, as copies; the files' pages are given back then."""

    def __init__(self, tensors: Mapping[str, Tensor], names: Sequence[str]) -> None:
        self._tensors, self._names = tensors, names

    def __getitem__(self, name: str) -> Tensor:
        value = self._tensors[name]
        copy = value.clone()
        mapped.forget_tensor(value)
        return copy

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def layer_by_layer(device: torch.device, tensors: Mapping[str, Tensor] | None = None) -> Finish:
    """For `fill` on the CPU: from then on the weights of a linear layer are on `device` only while it computes.

    The rest, which is small, goes to `device`. It is accelerate's hooks that do it.

    Args:
        tensors: where weights are taken from each time, under the names of the network, if not from where they are now. On
            a CPU they should be views of mapped files.
    """
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module
    from accelerate.utils import PrefixedDataset

    on_cpu = device.type == "cpu"
    # Of an embedding on the CPU only the rows of a prompt are read.
    kinds = (nn.Linear, PointwiseConv) if on_cpu else (nn.Linear, PointwiseConv, nn.Embedding)

    def finish(name: str, module: nn.Module) -> nn.Module:
        if not isinstance(module, kinds):
            for key, value in module._parameters.items():
                if value is not None:
                    module._parameters[key] = nn.Parameter(value.to(device), requires_grad=False)
            for key, value in module._buffers.items():
                module._buffers[key] = value.to(device)
            return module
        own: Mapping[str, Tensor] = {key: value.detach() for key, value in module.named_parameters()}
        if tensors is not None:
            own = PrefixedDataset(tensors, f"{name}.")
        weights = _Copies(own, [key for key, _ in module.named_parameters()]) if on_cpu else own
        hook = AlignDevicesHook(execution_device=device, offload=True, weights_map=weights)
        return add_hook_to_module(module, hook)

    return finish
