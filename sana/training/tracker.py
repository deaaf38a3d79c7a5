"""Where the numbers of a run go: `history.jsonl`, and TensorBoard or Weights & Biases."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL.Image import Image

from sana.config import SanaConfig
from sana.utils.files import write_atomic
from sana.utils.logging import get_logger

log = get_logger(__name__)

HISTORY = "history.jsonl"


class Tracker:
    """Records of one process, the main one; none in the others.

    `history.jsonl` has one object a step. What a run that is continued had recorded beyond the step at which it goes on
    is dropped, so that a curve never has two values for a step. A full disk delays records, it does not end the run.

    Args:
        config: names the tracker and the run.
        step: steps done so far.
        active: whether this process records anything.
    """

    def __init__(self, config: SanaConfig, step: int, *, active: bool) -> None:
        self.path, self.active, self._waiting = Path(config.work_dir) / HISTORY, active, []
        self._warned = False
        self._writer: Any = None
        self._wandb: Any = None
        if not active:
            return
        kept = [row for row in read_history(self.path) if row["step"] <= step]
        write_atomic(self.path, "".join(f"{json.dumps(row)}\n" for row in kept).encode())
        if config.report_to == "wandb":
            self._wandb = _start_wandb(config)
        if config.report_to == "tensorboard" or (config.report_to == "wandb" and self._wandb is None):
            from torch.utils.tensorboard import SummaryWriter  # lazy: slow to import

            self._writer = SummaryWriter(Path(config.work_dir) / "logs", purge_step=step + 1)

    def step(self, values: dict[str, Any], step: int) -> None:
        """Record a training step: numbers go everywhere, texts to the history only."""
        if not self.active:
            return
        self._waiting.append(f"{json.dumps({'step': step} | values)}\n")
        self._safely(self._append)
        self.scalars({name: value for name, value in values.items() if isinstance(value, float)}, step)

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Record numbers beside the history."""
        if self._writer is not None:
            for name, value in values.items():
                self._safely(lambda name=name, value=value: self._writer.add_scalar(name, value, step))
        if self._wandb is not None:
            self._safely(lambda: self._wandb.log(values, step=step))

    def images(self, prompts: Sequence[str], pictures: Sequence[Image], step: int) -> None:
        """Record a picture for each prompt."""
        for prompt, picture in zip(prompts, pictures, strict=True):
            if self._writer is not None:
                self._writer.add_image(prompt, np.asarray(picture), step, dataformats="HWC")
        if self._wandb is not None:
            images = [
                self._wandb.Image(picture, caption=prompt)
                for prompt, picture in zip(prompts, pictures, strict=True)
            ]
            self._wandb.log({"validation": images}, step=step)

    def close(self) -> None:
        """Write what is waiting."""
        if self._writer is not None:
            self._safely(self._writer.close)
        if self._wandb is not None:
            self._safely(self._wandb.finish)

    def _append(self) -> None:
        size = self.path.stat().st_size
        try:
            with open(self.path, "a", encoding="utf-8") as handle:
                handle.writelines(self._waiting)
        except OSError:
            with open(self.path, "r+b") as handle:
                handle.truncate(size)  # half a line would spoil the next
            raise
        self._waiting.clear()

    def _safely(self, write: Any) -> None:
        try:
            write()
        except Exception as error:  # noqa: BLE001 a full disk, a service that is down: records are not worth a run
            if not self._warned:
                log.warning("cannot record: %s; training goes on", error)
            self._warned = True


def read_history(path: Path) -> list[dict[str, Any]]:
    """The rows of a `history.jsonl`; a line that a kill cut short is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def _start_wandb(config: SanaConfig) -> Any:
    """The running wandb, or None where it is not installed or does not start."""
    try:
        wandb = importlib.import_module("wandb")
    except ImportError:
        log.warning("report_to: wandb is not installed (pip install wandb): recording to TensorBoard instead")
        return None
    try:
        name = config.name
        wandb.init(
            project=config.tracker_project_name, name=name, id=name, resume="allow", dir=config.work_dir
        )
    except Exception as error:  # noqa: BLE001 whatever a tracker lacks (a key, a network), training does not need it
        log.warning("report_to: wandb does not start (%s): recording to TensorBoard instead", error)
        return None
    return wandb
