"""CAME: confidence-guided, memory-efficient optimization (Luo et al. 2023, arXiv 2307.02047), also with an 8-bit momentum."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def is_matrix(value: Tensor) -> bool:
    """Whether it is the weight of a linear layer, or of a 1x1 convolution, which is one."""
    return value.ndim == 2 or (value.ndim == 4 and value.shape[2:] == (1, 1))


class CAME(torch.optim.Optimizer):
    """Adam-like steps whose second moments are kept as one row and one column for each matrix.

    As in the published runs: a 1x1 convolution is a matrix, and every other convolution, bias and norm keeps its whole
    second moment and has no confidence term. State fields carry the published checkpoints' names.

    Args:
        params: as for every torch optimizer.
        lr: learning rate.
        betas: decay of the update's mean, of the squared gradient's and of the squared instability's.
        eps: added to the squared gradient, and to the squared instability.
        clip_threshold: largest root mean square of an update before it enters its mean.
        weight_decay: decoupled, times the learning rate.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        eps: tuple[float, float] = (1e-30, 1e-16),
        clip_threshold: float = 1.0,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "betas": tuple(betas), "eps": tuple(eps)}
        super().__init__(params, defaults | {"clip_threshold": clip_threshold, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step; `closure` is there for torch's signature only."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, group)

    def _step(self, parameter: Tensor, group: dict[str, Any]) -> None:
        gradient, state = parameter.grad.float(), self.state[parameter]
        factored = is_matrix(gradient)
        gradient = gradient.flatten(1) if factored else gradient
        if not state:
            self._start(state, gradient, factored)
        (momentum, decay, trust), (eps_square, eps_instability) = group["betas"], group["eps"]
        state["step"] += 1

        square = gradient.square() + eps_square
        update = gradient * self._inverse_root(state, "exp_avg_sq", square, decay, factored)
        update /= (_rms(update) / group["clip_threshold"]).clamp_min(1.0)

        mean = self._read_mean(state, gradient).lerp(update, 1 - momentum)
        self._write_mean(state, mean, parameter.shape)
        if factored:  # trust the mean less where updates differ from it
            instability = (update - mean).square() + eps_instability
            mean = mean * self._inverse_root(state, "exp_avg_res", instability, trust, factored)

        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(mean.view_as(parameter), alpha=-group["lr"])

    def _start(self, state: dict[str, Any], gradient: Tensor, factored: bool) -> None:
        state["step"] = 0
        if factored:
            for name in ("exp_avg_sq", "exp_avg_res"):
                state[f"{name}_row"] = gradient.new_zeros(gradient.shape[0])
                state[f"{name}_col"] = gradient.new_zeros(gradient.shape[1])
        else:
            state["exp_avg_sq"] = torch.zeros_like(gradient)

    @staticmethod
    def _inverse_root(
        state: dict[str, Any], name: str, square: Tensor, beta: float, factored: bool
    ) -> Tensor:
        """1 / sqrt of the running mean of `square`, for a matrix of its rank-one approximation row x column / mean."""
        if not factored:
            return state[name].lerp_(square, 1 - beta).rsqrt()
        row = state[f"{name}_row"].lerp_(square.mean(1), 1 - beta)
        column = state[f"{name}_col"].lerp_(square.mean(0), 1 - beta)
        return torch.outer((row / row.mean()).rsqrt(), column.rsqrt())

    def _read_mean(self, state: dict[str, Any], like: Tensor) -> Tensor:
        return state["exp_avg"].view_as(like) if "exp_avg" in state else torch.zeros_like(like)

    def _write_mean(self, state: dict[str, Any], mean: Tensor, shape: torch.Size) -> None:
        state["exp_avg"] = mean.view(shape)


class CAME8Bit(CAME):
    """`CAME` with the mean of large matrices in 8 bits: 256 even levels between the extremes of each block.

    Args:
        block_size: values in a block.
        min_8bit_size: matrices with more values than this are stored so; everything else stays float32.
    """

    def __init__(
        self, params: Iterable[Any], *, block_size: int = 2048, min_8bit_size: int = 16384, **settings: Any
    ) -> None:
        super().__init__(params, **settings)
        self.block_size, self.min_8bit_size = block_size, min_8bit_size

    def _read_mean(self, state: dict[str, Any], like: Tensor) -> Tensor:
        if "exp_avg_low" not in state:
            return super()._read_mean(state, like)
        blocks = state["exp_avg"] * state["exp_avg_step"] + state["exp_avg_low"]
        return blocks.flatten()[: like.numel()].view_as(like)

    def _write_mean(self, state: dict[str, Any], mean: Tensor, shape: torch.Size) -> None:
        if mean.ndim != 2 or mean.numel() <= self.min_8bit_size:
            super()._write_mean(state, mean, shape)
            return
        flat = mean.flatten()
        rest = -flat.numel() % self.block_size
        blocks = torch.cat([flat, flat[-1:].expand(rest)]).view(-1, self.block_size)
        low, high = blocks.aminmax(dim=1, keepdim=True)
        step = ((high - low) / 255).clamp_min(torch.finfo(low.dtype).tiny)
        state["exp_avg"] = ((blocks - low) / step).round().to(torch.uint8)
        state["exp_avg_low"], state["exp_avg_step"] = low, step


def _rms(values: Tensor) -> Tensor:
    return values.square().mean().sqrt()
