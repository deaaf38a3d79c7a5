"""What a step saw and how it went, and the record of steps that were not taken."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from sana.data.loader import Batch
from sana.diffusion import flow
from sana.utils.files import write_atomic
from sana.utils.logging import get_logger

log = get_logger(__name__)


@dataclass(frozen=True)
class Seen:
    """What one forward pass was given, and how it went."""

    batch: Batch
    t: Tensor
    """(B,) times in [0, 1]."""
    dropped: Tensor
    """(B,) bool, captions that were replaced by the null caption."""
    losses: Tensor
    """(B,), of each sample."""
    flops: float
    """Operations, forward and backward."""

    def rows(self, label: Callable[[int], str]) -> list[dict[str, Any]]:
        """One for each sample, to read and to repeat the step by; `label`: sample number -> where its picture is."""
        loaded = [self.batch.replaced.get(sample, sample) for _, sample in self.batch.samples]
        drawn = zip(self.t.tolist(), self.dropped.tolist(), self.losses.tolist(), strict=True)
        network = flow.network_time(self.t).tolist()
        samples = zip(self.batch.samples, loaded, self.batch.captions, drawn, network, strict=True)
        return [
            {"epoch": epoch, "sample": sample, "picture": label(picture), "caption": caption}
            | {"caption_dropped": dropped, "t": t, "network_time": time, "loss": loss}
            for (epoch, sample), picture, caption, (t, dropped, loss), time in samples
        ]


@dataclass(frozen=True, kw_only=True)
class StepStats:
    """What a step reports; loss, norm and the wish to stop are those of all processes together."""

    loss: float
    grad_norm: float
    lr: float
    stopping: bool
    """Whether any process was asked to stop."""
    seen: list[Seen]
    """Of this process."""

    @property
    def finite(self) -> bool:
        """Whether the step may reach the weights."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)

    @property
    def flops(self) -> float:
        """Operations of this process."""
        return sum(each.flops for each in self.seen)

    def record(self, loss_name: str) -> dict[str, Any]:
        """The row of the history. `samples` is a digest of the samples of the main process, in their order."""
        order = repr([list(each.batch.samples) for each in self.seen])
        digest = hashlib.sha256(order.encode()).hexdigest()[:16]
        return {loss_name: self.loss, "grad_norm": self.grad_norm, "lr": self.lr, "samples": digest}


class SkippedSteps:
    """Counts steps that were not taken because their loss or gradient was not finite; each leaves a replay file.

    Args:
        folder: gets `step_S.json`, with the samples and times of all processes.
        limit: most of them in a row.
        label: sample number -> where its picture is.
        accelerator: all processes take part, as they skip alike.
    """

    def __init__(
        self, folder: Path, limit: int, label: Callable[[int], str], accelerator: Accelerator
    ) -> None:
        self.folder, self.limit, self.label, self.accelerator = folder, limit, label, accelerator
        self.in_a_row = 0

    def none(self) -> None:
        """A step was taken."""
        self.in_a_row = 0

    def add(self, step: int, stats: StepStats, seen: list[Seen]) -> None:
        """Step number `step`, counted from 0, was not taken.

        Raises:
            FloatingPointError: the limit is passed. The weights are still those of the last step that was taken.
        """
        self.in_a_row += 1
        path = self.folder / f"step_{step}.json"
        rows = gather_object([row for each in seen for row in each.rows(self.label)])
        if self.accelerator.is_main_process:
            facts = {
                "step": step,
                "loss": stats.loss,
                "grad_norm": stats.grad_norm,
                "lr": stats.lr,
                "samples": rows,
            }
            text = json.dumps(_speakable(facts), indent=1, ensure_ascii=False, allow_nan=False)
            try:
                write_atomic(path, text.encode("utf-8", "replace"))
            except OSError as error:
                log.warning("cannot write %s: %s", path, error)
        log.warning(
            "step %d was not taken: loss %s, gradient norm %s; its samples and times are in %s",
            step, stats.loss, stats.grad_norm, path,
        )  # fmt: skip
        if self.in_a_row > self.limit:
            raise FloatingPointError(
                f"{self.in_a_row} steps in a row had a loss or gradient that is not finite (train.nonfinite_limit: "
                f"{self.limit}); none of them reached the weights. Their samples and times are in {self.folder}; resume "
                "with a lower learning rate, in bf16, or without those samples"
            )


def _speakable(value: Any) -> Any:
    """With a text for each number that JSON has no word for."""
    if isinstance(value, dict):
        return {key: _speakable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_speakable(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
