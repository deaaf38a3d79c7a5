"""Between the live parts of a run and its checkpoints: what a run starts from, and what it saves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from sana.config import SanaConfig
from sana.models.state_dict import NULL_CAPTION, load_into, load_transformer_state
from sana.training.checkpoint import TrainingState, find_checkpoint, read_checkpoint
from sana.training.ema import EMA
from sana.training.lora import LoraSettings, add_lora, load_trained, trained_state
from sana.training.optim import optimizer_state, restore_optimizer
from sana.training.parallel import together
from sana.training.rng import rng_state, set_rng_state
from sana.utils import hub
from sana.utils.logging import get_logger

log = get_logger(__name__)


class Resume:
    """What a run starts from: a training checkpoint, else the weights of `model.load_from`, else nothing.

    Args:
        config: its `model.resume_from`, `model.load_from` and `train`.
        name: a checkpoint's path, or "latest"; wins over the config's.
        accelerator: the main process chooses the checkpoint for all; they must see the same folder.

    Raises:
        ValueError: the checkpoint is not there, or not whole.
    """

    def __init__(self, config: SanaConfig, name: str | None, accelerator: Accelerator) -> None:
        self.config, self.accelerator = config, accelerator
        self.path = self._choose(name or config.model.resume_from.checkpoint)
        self.state = read_checkpoint(self.path) if self.path else None
        self.step = self.state.step if self.state else 0
        self.schedule_start = 0
        resume = config.model.resume_from
        if self.state is not None:
            keep = resume.resume_lr_scheduler and config.train.resume_lr_scheduler
            self.schedule_start = self.state.schedule_start if keep else self.step
            self._optimizer = self.state.optimizer if resume.resume_optimizer else {}
        else:
            self._optimizer = self._of_the_stage_before()

    def _choose(self, name: str | None) -> Path | None:
        folder = Path(self.config.work_dir) / "checkpoints"
        return together(self.accelerator, lambda: find_checkpoint(name, folder)) if name else None

    def _of_the_stage_before(self) -> dict[str, dict[str, Any]]:
        """Optimizer state, and position of the schedule, of the training checkpoint in `model.load_from`, if wanted."""
        train, source = self.config.train, self.config.model.load_from
        if not source or not (train.load_from_optimizer or train.load_from_lr_scheduler):
            return {}
        before = read_checkpoint(hub.resolve(source))
        if train.load_from_lr_scheduler:
            self.schedule_start = before.schedule_start - before.step
        return before.optimizer if train.load_from_optimizer else {}

    def weights(self, transformer: nn.Module) -> bool:
        """Load the weights, strictly, and add the LoRA that `train.lora` asks for.

        Returns:
            Whether the null caption was among them: weights that come from diffusers have none.
        """
        known = False
        source, lora = self.config.model.load_from, self.config.train.lora
        if source and (self.state is None or lora):
            weights = load_transformer_state(source)
            load_into(transformer, weights)
            known = NULL_CAPTION in weights
            log.info("starting from the weights in %s", source)
        if lora:
            add_lora(transformer, LoraSettings.of(lora))
        if self.state is not None:
            load_trained(transformer, self.state.weights)
            known = known or NULL_CAPTION in self.state.weights
            log.info("resumed at step %d from %s", self.step, self.path)
        elif not source:
            log.info("starting from random weights: model.load_from is empty")
        return known

    def average(self, ema: EMA | None) -> None:
        """Load the average, where the checkpoint has one."""
        if ema is not None and self.state is not None and self.state.ema is not None:
            ema.restore(self.state.ema, self.state.ema_updates)

    def optimizer(self, transformer: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Load the optimizer's state and the gradient scaler's."""
        restore_optimizer(transformer, optimizer, self._optimizer, self.config.train.optimizer["type"])
        if self.state is not None and self.state.scaler and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(self.state.scaler)

    def generators(self, data: dict[str, Any]) -> None:
        """Put this rank's random generators where they were; say so if `data` is not what the checkpoint's run saw."""
        rank = self.accelerator.process_index
        if self.state is None:
            return
        if rank < len(self.state.rng):
            set_rng_state(self.state.rng[rank])
        changed = [
            f"{key} {self.state.data[key]} -> {data[key]}"
            for key in data
            if key in self.state.data and self.state.data[key] != data[key]
        ]
        if changed:
            log.warning("another order of samples from step %d on: %s", self.step, ", ".join(changed))


def training_state(
    *,
    transformer: nn.Module,
    ema: EMA | None,
    optimizer: torch.optim.Optimizer,
    schedule_start: int,
    accelerator: Accelerator,
    step: int,
    epoch: int,
    data: dict[str, Any],
) -> TrainingState:
    """Everything that a run needs to go on; every process must call it."""
    scaler = accelerator.scaler
    return TrainingState(
        step=step,
        epoch=epoch,
        weights=trained_state(transformer),
        ema=trained_state(ema.model) if ema is not None else None,
        ema_updates=ema.updates if ema is not None else 0,
        optimizer=optimizer_state(transformer, optimizer),
        schedule_start=schedule_start,
        scaler=scaler.state_dict() if scaler is not None else {},
        rng=gather_object([rng_state()]),
        data=data,
    )
