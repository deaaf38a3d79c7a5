"""How much memory a computation takes, found without doing it: its tensors lie on the device "meta", shapes without data.

Every operation runs, forwards and backwards, and the bytes of what it makes are counted while they live. So the figure is
that of the real computation's tensors; what a device adds (its context, workspaces of libraries, fragmentation) is not in it.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Component:
    """One line of a plan."""

    name: str
    bytes: int | None = None
    """Empty: not known."""
    parameters: int | None = None
    note: str = ""


def table(sections: Mapping[str, Sequence[Component]]) -> str:
    """Lines of name, parameters, GiB and note in columns, each section under its title."""
    rows = []
    for title, components in sections.items():
        rows.append((title, "parameters", "GiB", "") if not rows else (title, "", "", ""))
        for part in components:
            count = "" if part.parameters is None else f"{part.parameters:,}"
            size = "?" if part.bytes is None else f"{part.bytes / GIB:.2f}"
            rows.append((f"  {part.name}", count, size, part.note))
    wide = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = (
        f"{name:<{wide[0]}}  {count:>{wide[1]}}  {size:>{wide[2]}}  {note}"
        for name, count, size, note in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the memory under tensors; what several share counts once."""
    storages = {
        storage._cdata: storage.nbytes() for storage in (value.untyped_storage() for value in tensors)
    }
    return sum(storages.values())


class Allocations(TorchDispatchMode):
    """Counts, while it is on, the bytes of the tensors that operations make: those alive `now`, and their `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        inputs = {value.untyped_storage()._cdata for value in _tensors((args, kwargs))}
        result = func(*args, **kwargs)
        for value in _tensors(result):
            storage = value.untyped_storage()
            key = storage._cdata
            if key not in self._alive and key not in inputs:
                self._alive[key] = storage.nbytes()
                self.now += self._alive[key]
                weakref.finalize(storage, self._died, key)
        self.peak = max(self.peak, self.now)
        return result

    def _died(self, key: int) -> None:
        self.now -= self._alive.pop(key)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class LikeAutocast(TorchFunctionMode):
    """What torch.autocast does on a GPU, for the device "meta", which has none; on while `model` computes.

    Linear layers, convolutions and attention get their inputs in `dtype`, and the cast of a trained weight is kept until
    `forget`, as until autocast ends. Attention over text is the fused kernel, which keeps no scores. Products of plain
    matrices are left as they are: the models here compute those in a precision of their own.

    Args:
        model: on "meta"; not to be used for anything else afterwards. Blocks that are recomputed are casted as well.
        dtype: None only chooses the attention.
    """

    _CASTED = (F.linear, F.conv2d, F.scaled_dot_product_attention)

    def __init__(self, model: nn.Module, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.dtype = dtype
        self._kept: dict[int, Tensor] | None = {}
        for child in model.children():
            # Of a list each member: it has no forward, and recomputation calls a member, not the model.
            for part in child if isinstance(child, nn.ModuleList) else [child]:
                part.forward = functools.partial(self._run, part.forward)

    def forget(self) -> None:
        """The forward pass is over."""
        self._kept = None

    def _run(self, forward: Callable, *args: Any, **kwargs: Any) -> Any:
        with self:
            return forward(*args, **kwargs)

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in self._CASTED:
            return func(*args, **kwargs)
        mask = kwargs.pop("attn_mask", None)
        args = tuple(self._cast(value) for value in args)
        if func is not F.scaled_dot_product_attention:
            return func(*args, **{name: self._cast(value) for name, value in kwargs.items()})
        bias = None if mask is None else torch.empty(mask.shape, dtype=args[0].dtype, device=mask.device)
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return fused(*args, attn_mask=bias, **kwargs)[0]

    def _cast(self, value: Any) -> Any:
        if (
            not isinstance(value, Tensor)
            or not value.is_floating_point()
            or self.dtype in (None, value.dtype)
        ):
            return value
        if self._kept is None or not (value.is_leaf and value.requires_grad):
            return value.to(self.dtype)
        if id(value) not in self._kept:
            self._kept[id(value)] = value.to(self.dtype)
        return self._kept[id(value)]


def peak_of(function: Callable[[], Any]) -> int:
    """Most bytes alive at once of what `function` makes, without keeping anything for a backward pass."""
    with torch.no_grad(), Allocations() as made:
        function()
    return made.peak
