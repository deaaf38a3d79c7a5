"""Optimizers and learning-rate schedules, from their settings."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import nn

from sana.config import ConfigError, TrainConfig

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "AdamW": torch.optim.AdamW,
    "Adam": torch.optim.Adam,
    "SGD": torch.optim.SGD,
}


def build_optimizer(
    parameters: Iterable[nn.Parameter], train: TrainConfig, batch_size: int
) -> torch.optim.Optimizer:
    """The optimizer of `train.optimizer`, its rate scaled for the global `batch_size` by `train.auto_lr`.

    Raises:
        ConfigError: an unknown type, or arguments that the optimizer refuses.
    """
    settings = dict(train.optimizer)
    name = settings.pop("type", "AdamW")
    if name not in OPTIMIZERS:
        raise ConfigError(f"train.optimizer.type: {name} is not available; one of {', '.join(OPTIMIZERS)}")
    settings["lr"] = scaled_lr(settings.get("lr", 1e-4), train, batch_size)
    try:
        return OPTIMIZERS[name](parameters, **settings)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"train.optimizer: {name}: {error}") from error


def scaled_lr(lr: float, train: TrainConfig, batch_size: int) -> float:
    """`lr` for a batch of 256, scaled to `batch_size` by the rule of `train.auto_lr`; `lr` itself without one."""
    rules = {"sqrt": math.sqrt(batch_size / 256), "linear": batch_size / 256}
    if not train.auto_lr:
        return lr
    rule = train.auto_lr.get("rule", "sqrt")
    if rule not in rules:
        raise ConfigError(
            f"train.auto_lr.rule: unknown rule {rule!r}; one of {', '.join(rules)}, or auto_lr: null"
        )
    return lr * rules[rule]


def lr_factor(train: TrainConfig, total_steps: int) -> Callable[[int], float]:
    """Step (from 0) -> what the learning rate is multiplied by: linear warm-up, then the schedule of `train.lr_schedule`."""
    warmup = train.lr_schedule_args.get("num_warmup_steps", 500)
    decay_part = train.lr_schedule_args.get("num_decay", 0.667)

    def cosine(progress: float) -> float:
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    def factor(step: int) -> float:
        warm = min(1.0, (step + 1) / max(1, warmup))
        progress = max(0, step - warmup) / max(1, total_steps - warmup)
        if train.lr_schedule == "constant":
            return warm
        if train.lr_schedule == "cosine":
            return warm * cosine(progress)
        return warm * (0.1 + 0.9 * cosine(progress / decay_part))  # cosine_decay_to_constant

    if train.lr_schedule not in ("constant", "cosine", "cosine_decay_to_constant"):
        raise ConfigError(f"train.lr_schedule: unknown schedule {train.lr_schedule!r}")
    return factor
