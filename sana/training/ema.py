"""An exponential moving average of weights."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from sana.training.lora import load_trained


class EMA:
    """ema = rate * ema + (1 - rate) * weights, in float32; `model` is the averaged copy, in eval mode.

    Weights that are frozen when it is made are shared, not copied.
    For the first steps the rate is capped at (1 + n) / (10 + n), so that the average forgets the initial weights.
    """

    def __init__(self, model: nn.Module, rate: float) -> None:
        if not 0 <= rate < 1:
            raise ValueError(f"the EMA rate must lie in [0, 1), got {rate}")
        self.rate, self.updates = rate, 0
        frozen = {id(value): value for value in model.parameters() if not value.requires_grad}
        self.model = copy.deepcopy(model, frozen).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the weights of `model`."""
        rate = min(self.rate, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        pairs = zip(self.model.parameters(), model.parameters(), strict=True)
        averages, weights = zip(*(pair for pair in pairs if pair[0] is not pair[1]), strict=True)
        torch._foreach_lerp_(list(averages), list(weights), 1 - rate)
        for average, buffer in zip(self.model.buffers(), model.buffers(), strict=True):
            average.copy_(buffer)

    def restore(self, state: dict[str, Tensor], updates: int) -> None:
        """Go on from the averaged weights `state` (`trained_state(model)`, also a published one) after so many updates."""
        load_trained(self.model, state)
        self.updates = updates
