"""Optimizers, their state by parameter names, and learning-rate schedules, from their settings."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from sana.config import ConfigError, TrainConfig
from sana.training.came import CAME, CAME8Bit
from sana.training.muon import Muon, count_matrices
from sana.training.parallel import gathered

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW": torch.optim.AdamW,
    "Adam": torch.optim.Adam,
    "SGD": torch.optim.SGD,
    "CAMEWrapper": CAME,
    "CAME8BitWrapper": CAME8Bit,
    "Muon": Muon,
}
"""Under the published configs' names, which have no Muon; `AdamW8bit` is of the library bitsandbytes."""

SHARDABLE = ("AdamW", "Adam", "SGD")
"""Those whose arithmetic is by single values, so that a shard of a parameter is stepped as the whole would be."""

_MATRIX = {"exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_res_row", "exp_avg_res_col", "orthogonal_momentum"}
STATE_FIELDS: dict[str, tuple[str | None, set[str]]] = {
    "AdamW": ("exp_avg_sq", _MATRIX),
    "Adam": ("exp_avg_sq", _MATRIX),
    "SGD": (None, {"exp_avg", "state1"}),
    "CAMEWrapper": ("exp_avg_sq_row", {"exp_avg_low"}),
    "CAME8BitWrapper": ("exp_avg_sq_row", set()),
    "AdamW8bit": ("state1", set()),
    "Muon": ("orthogonal_momentum", set()),
}
"""(a field that its state has, fields that it never has): what tells an optimizer's state from another's."""


def build_optimizer(model: nn.Module, train: TrainConfig, batch_size: int) -> torch.optim.Optimizer:
    """The optimizer of `train.optimizer`, its rate scaled for the global `batch_size` by `train.auto_lr`.

    Raises:
        ConfigError: an unknown type, one that is not installed, or arguments that the optimizer refuses.
    """
    settings = dict(train.optimizer)
    name = settings.pop("type", "AdamW")
    settings["lr"] = scaled_lr(settings.get("lr", 1e-4), train, batch_size)
    optimizer = _adamw_8bit() if name == "AdamW8bit" else OPTIMIZERS.get(name)
    if optimizer is None:
        available = ", ".join([*OPTIMIZERS, "AdamW8bit"])
        raise ConfigError(f"train.optimizer.type: {name} is not available; one of {available}")
    if train.use_fsdp and name not in SHARDABLE:
        raise ConfigError(
            f"train.optimizer.type: {name} cannot be sharded; with use_fsdp: {', '.join(SHARDABLE)}"
        )
    try:
        return optimizer(_groups(model, train, settings, matrices=name == "Muon"), **settings)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"train.optimizer: {name}: {error}") from error


def _adamw_8bit() -> Callable[..., torch.optim.Optimizer]:
    try:
        return importlib.import_module("bitsandbytes").optim.AdamW8bit
    except ImportError as error:
        raise ConfigError(
            "train.optimizer.type: AdamW8bit needs bitsandbytes: pip install bitsandbytes, or use CAME8BitWrapper"
        ) from error


def _groups(
    model: nn.Module, train: TrainConfig, settings: dict[str, Any], *, matrices: bool
) -> list[dict[str, Any]]:
    """Parameters, in groups of one weight decay each and, if `matrices`, one number of matrices (see `sana.training.muon`).

    Biases, norms and tables are those that decay may spare.
    """
    groups: dict[tuple[bool, int], list[Tensor]] = {}
    spare = train.weight_decay_on != "all" and settings.get("weight_decay")
    for name, value in model.named_parameters():
        if value.requires_grad:
            spared = bool(spare) and (value.ndim < 2 or name.endswith("scale_shift_table"))
            groups.setdefault((spared, count_matrices(name, value) if matrices else 0), []).append(value)
    return [
        {"params": values}
        | ({"weight_decay": 0.0} if spared else {})
        | ({"matrices": count} if matrices else {})
        for (spared, count), values in sorted(groups.items())
    ]


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    """Parameter name -> field -> tensor (whole, on the CPU) or number. With sharded parameters every rank must call it."""
    return {
        name: {
            field: gathered(value).detach().cpu() if isinstance(value, Tensor) else value
            for field, value in optimizer.state[parameter].items()
        }
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
    }


def restore_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, dict[str, Any]], kind: str
) -> None:
    """Go on from what `optimizer_state` gave. Rates and the like are the present config's, not the checkpoint's.

    Raises:
        ValueError: it is the state of another optimizer (than `kind`) or of another model.
    """
    fields = {field for entries in state.values() for field in entries}
    advice = "; to start it anew: model.resume_from.resume_optimizer=false"
    present, absent = STATE_FIELDS[kind]
    if fields and (present not in fields | {None} or absent & fields):
        raise ValueError(
            f"the checkpoint's optimizer is no {kind}: its state is {', '.join(sorted(fields))}{advice}"
        )
    parameters = dict(model.named_parameters())
    if unknown := sorted(state.keys() - parameters.keys()):
        raise ValueError(
            f"the checkpoint's optimizer has a state for {unknown[0]}, which the model lacks{advice}"
        )
    for name, entries in state.items():
        parameter = parameters[name]
        for field, value in entries.items():
            if not _usable(value, parameter, eight_bit="exp_avg_low" in entries):
                raise ValueError(
                    f"the checkpoint's optimizer keeps {field} of {name} in another form than {kind} does here{advice}"
                )
        optimizer.state[parameter] = {
            field: _placed(value, field, parameter) if isinstance(value, Tensor) else value
            for field, value in entries.items()
        }


def _usable(value: Any, parameter: Tensor, *, eight_bit: bool) -> bool:
    """Whether a state has a form that is known here: other programs' CAME keeps rows of 1x1 convolutions, or 8 bits, otherwise."""
    if not isinstance(value, Tensor):
        return value is None or isinstance(value, int | float)
    return value.ndim < 2 or value.shape == parameter.shape or eight_bit


def _placed(value: Tensor, field: str, parameter: Tensor) -> Tensor:
    """Beside the parameter, sharded as it is; torch's optimizers keep their step count on the CPU."""
    if field == "step":
        return value.clone()
    if isinstance(parameter, DTensor) and value.shape == parameter.shape:
        value = value.to(parameter.device)
        return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return value.to(parameter.device, copy=True)


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


def lr_factor(train: TrainConfig, total_steps: int, batch_size: int | None = None) -> Callable[[int], float]:
    """Step (from 0) -> what the learning rate is multiplied by: linear warm-up, then the schedule of `train.lr_schedule`.

    `cosine_decay_to_constant` falls in the first `num_decay` of the run to the rate before `train.auto_lr` raised it for
    the global `batch_size`, as in the reference; where it did not, to a tenth.
    """
    warmup = train.lr_schedule_args.get("num_warmup_steps", 500)
    decay_steps = total_steps * train.lr_schedule_args.get("num_decay", 0.667)
    raised = scaled_lr(1.0, train, batch_size) if batch_size else 1.0
    final = 1 / raised if raised > 1 else 0.1

    def cosine(progress: float) -> float:
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    def factor(step: int) -> float:
        warm, since = min(1.0, (step + 1) / max(1, warmup)), max(0, step - warmup)
        if train.lr_schedule == "constant":
            return warm
        if train.lr_schedule == "cosine":
            return warm * cosine(since / max(1, total_steps - warmup))
        return warm * (final + (1 - final) * cosine(since / max(1, decay_steps - warmup)))

    if train.lr_schedule not in ("constant", "cosine", "cosine_decay_to_constant"):
        raise ConfigError(f"train.lr_schedule: unknown schedule {train.lr_schedule!r}")
    return factor


class Schedule:
    """Sets the rate of every group before a step: its own rate times `lr_factor`, a function of the step alone.

    Args:
        start: step at which the warm-up begins.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, factor: Callable[[int], float], start: int = 0
    ) -> None:
        self.optimizer, self.factor, self.start = optimizer, factor, start
        self.peaks = [group["lr"] for group in optimizer.param_groups]

    def set(self, step: int) -> float:
        """Set the rates of `step`, counted from 0; returns the first."""
        rates = [peak * self.factor(max(0, step - self.start)) for peak in self.peaks]
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        return rates[0]
