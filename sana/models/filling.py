"""Weights into a network, one layer after the other, so that no more than one layer is held in another form."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

import torch
from torch import nn

from sana.utils import mapped

Finish = Callable[[str, nn.Module], nn.Module]
"""(name of a module, the module with its own weights in place) -> what stands in its place from then on."""

BYTES_AT_ONCE = 2**26
"""After so much that was read, the pages of the files are given back."""


def fill(
    model: nn.Module,
    state: dict[str, torch.Tensor] | None,
    *,
    device: torch.device,
    dtype: torch.dtype | None,
    finish: Finish | None = None,
    files: Collection[Path] = (),
) -> None:
    """Put weights into `model`, module by module.

    Args:
        model: on "meta"; or, without `state`, with weights that may be views of mapped files.
        state: a tensor for every parameter and buffer that `model.state_dict()` names, which are taken out of it; None
            takes the model's own, which stay the views that they are if neither device nor dtype changes.
        dtype: of floating-point weights; None leaves them as they are.
        finish: called with every module once its own weights are there, for example to quantise it.
        files: the mapped files that the tensors are views of, whose pages are given back.
    """
    read = 0
    for name in [name for name, _ in model.named_modules()]:  # names alone: what is replaced must not stay
        module = model.get_submodule(name)
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for key, tensor in own:
            is_weight = key not in module._non_persistent_buffers_set
            taken = state is not None and is_weight
            source = state.pop(f"{name}.{key}" if name else key) if taken else tensor
            kind = dtype if is_weight and source.is_floating_point() else None
            value = source.detach().to(device, kind, copy=taken, memory_format=torch.contiguous_format)
            if isinstance(tensor, nn.Parameter):
                module._parameters[key] = nn.Parameter(value, requires_grad=False)
            else:
                module._buffers[key] = value
            read += source.nbytes
        new = module if finish is None else finish(name, module)
        if new is not module:
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, new)
        own = source = value = tensor = module = new = None  # what was replaced is freed now
        if read >= BYTES_AT_ONCE:
            mapped.forget(files)
            mapped.trim()  # layers that were freed lie between those that stay
            read = 0
    mapped.forget(files)
    mapped.trim()
