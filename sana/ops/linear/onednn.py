"""The linear layer of oneDNN, which PyTorch has as an operator for its compiler."""

import weakref
from collections.abc import Iterable

import torch

from sana.ops._operator import operator

AVAILABLE = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
"""Whether this build of PyTorch has it."""

_packed: dict[int, tuple[weakref.ref, int, torch.Tensor]] = {}
"""Address of a weight -> (the weight, its version when it was packed, the packed copy)."""


def pack_weights(weights: Iterable[torch.nn.Parameter], rows: int) -> None:
    """Keep a copy of each (M, K) or (M, K, 1, 1) weight in the order in which oneDNN reads it, for as long as it lives.

    That spares every call the reordering, 6 % in bfloat16, and costs the weights' memory again. A weight that is
    changed afterwards is used as it is then. Weights that are not dense, or in another dtype, are left alone.

    Args:
        weights: parameters on the CPU.
        rows: of the inputs to come, all tokens of a batch together; another number is right, and may be slower.
    """
    for weight in weights:
        if (
            AVAILABLE
            and type(weight) is torch.nn.Parameter
            and weight.dtype in (torch.float32, torch.bfloat16)
        ):
            address = weight.data_ptr()
            forget = weakref.ref(weight, lambda _, address=address: _packed.pop(address, None))
            with torch.no_grad():
                copy = torch.ops.mkldnn._reorder_linear_weight(weight.detach().flatten(1), rows)
            _packed[address] = (forget, weight._version, copy)


def linear_onednn(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, silu: bool
) -> torch.Tensor:
    """See `sana.ops.linear`; on a CPU, in float32 or bfloat16, without a gradient."""
    owner, version, packed = _packed.get(weight.data_ptr(), (None, None, None))
    if owner is not None and owner() is not None and owner()._version == version:
        weight = packed
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "swish" if silu else "none", [], "")


def _shape(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, silu: bool) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


# For the compiler, which knows the operator only with weights that it has packed itself.
linear_onednn_traced = operator("linear_onednn", linear_onednn, fake=_shape)
