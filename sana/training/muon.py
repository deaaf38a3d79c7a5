"""Muon: momentum made orthogonal, for the matrices of the blocks; AdamW for every other parameter."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, distributed

from sana.training.came import is_matrix

_FUSED = {"attn.qkv.weight": 3, "kv_linear.weight": 2}
"""Weights that are several matrices, one above the other, by how their names end."""

_QUINTIC = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


def count_matrices(name: str, parameter: Tensor) -> int:
    """How many matrices a parameter of a transformer is: of a block's linear layers and 1x1 convolutions; 0 of any other.

    Embeddings, the output layer, modulation tables and depthwise kernels are no maps from one hidden vector to another.
    """
    hidden = "blocks." in name and name.endswith(".weight")
    if not (hidden and is_matrix(parameter)):
        return 0
    return next((count for end, count in _FUSED.items() if name.endswith(end)), 1)


class Muon(torch.optim.AdamW):
    """Steps of one length in every direction for matrices (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon).

    A matrix's step is its Nesterov momentum with all singular values made about 1, times 0.2 sqrt(max(rows, columns)):
    the root mean square of AdamW's steps, so that `lr` and `weight_decay` are AdamW's (Liu et al. 2025, arXiv
    2502.16982). Several processes, all of which must step, share the work.

    Args:
        params: groups; `matrices` of a group says how many matrices each of its parameters is (`count_matrices`).
        momentum: decay of the matrices' momentum.
        settings: AdamW's, for the other groups; `lr` and `weight_decay` for all.
    """

    def __init__(self, params: list[dict[str, Any]], momentum: float = 0.95, **settings: Any) -> None:
        super().__init__(params, **settings)
        for group in self.param_groups:
            group.setdefault("matrices", 0)
            group["momentum"] = momentum

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step; `closure` is there for torch's signature only."""
        assert closure is None
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["matrices"]]
        super().step()
        self.param_groups = groups
        for group in groups:
            if group["matrices"]:
                self._step_matrices(group)

    def _step_matrices(self, group: dict[str, Any]) -> None:
        by_shape: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {}
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state, gradient = self.state[parameter], parameter.grad.float()
            if not state:
                state["orthogonal_momentum"] = torch.zeros_like(gradient)
            momentum = state["orthogonal_momentum"].mul_(group["momentum"]).add_(gradient)
            direction = gradient.add(momentum, alpha=group["momentum"])
            parts = (value.flatten(1).chunk(group["matrices"]) for value in (parameter, direction))
            for weight, update in zip(*parts, strict=True):
                by_shape.setdefault(weight.shape, []).append((weight, update))
        for shape, pairs in by_shape.items():
            step = 0.2 * math.sqrt(max(shape)) * group["lr"]
            directions = _orthogonal_of_all(torch.stack([update for _, update in pairs]))
            for (weight, _), direction in zip(pairs, directions, strict=True):
                weight.mul_(1 - group["lr"] * group["weight_decay"]).sub_(direction * step)


def _orthogonal_of_all(matrices: Tensor) -> Tensor:
    """`orthogonal`, of which each process works out its share."""
    world = distributed.get_world_size() if distributed.is_initialized() else 1
    if world == 1:
        return orthogonal(matrices)
    share = -(-len(matrices) // world)
    padded = torch.cat([matrices, matrices.new_zeros(share * world - len(matrices), *matrices.shape[1:])])
    mine = orthogonal(padded[share * distributed.get_rank() :][:share]).contiguous()
    shares = [torch.empty_like(mine) for _ in range(world)]
    distributed.all_gather(shares, mine)
    return torch.cat(shares)[: len(matrices)]


def orthogonal(matrices: Tensor) -> Tensor:
    """The singular vectors with singular values between about 0.7 and 1.2, by five Newton-Schulz iterations.

    Args:
        matrices: (N, rows, columns).

    Returns:
        (N, rows, columns), bfloat16: what rounding does to it is far below how loosely the iteration converges.
    """
    a, b, c = _QUINTIC
    x = matrices.bfloat16()
    upright = x.shape[-2] > x.shape[-1]  # the Gram matrix of the shorter side is the cheaper one
    x = x.mT if upright else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if upright else x
