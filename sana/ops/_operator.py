"""Kernels as operators of PyTorch: what autograd and torch.compile need to know of them."""

from collections.abc import Callable
from typing import Any

import torch
from torch.library import CustomOpDef


def operator(
    name: str,
    function: Callable[..., Any],
    *,
    fake: Callable[..., Any],
    save: Callable[..., None] | None = None,
    differentiate: Callable[..., Any] | None = None,
) -> CustomOpDef:
    """Make `function` the operator sana::`name`, opaque to the compiler: it is traced through without a graph break.

    Args:
        function: launches the kernels; its annotations are the operator's schema.
        fake: the same arguments -> outputs of the right shapes and dtypes.
        save: (ctx, inputs, output), keeps what the backward pass needs.
        differentiate: (ctx, *gradients of the outputs) -> gradients of the inputs. Both or neither.
    """
    built = torch.library.custom_op(f"sana::{name}", function, mutates_args=())
    built.register_fake(fake)
    if differentiate is not None:
        built.register_autograd(differentiate, setup_context=save)
    return built
