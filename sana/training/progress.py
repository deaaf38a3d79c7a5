"""How a run gets on: the line in the log, and the arithmetic behind its share of the machine's peak."""

from __future__ import annotations

import math
import re
from collections import deque

from sana.models.transformer import TransformerConfig
from sana.training.stats import StepStats

# Dense 16-bit matrix products a second, without sparsity, from the makers' data sheets; the first name that fits counts.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "A10": 125e12,
    "V100": 125e12,
}


def peak_flops(device_name: str) -> float | None:
    """Peak of a GPU by its name, in operations a second; None where it is not known."""
    # Whole words: an A10G is no A10, and an RTX A1000 no A100.
    return next((peak for name, peak in PEAK_FLOPS.items() if re.search(rf"\b{name}\b", device_name)), None)


def forward_flops(config: TransformerConfig, tokens: int, text_tokens: int) -> float:
    """Floating-point operations (a product and a sum are two) of the network on one image.

    Matrix products and convolutions only, as usual for a model's utilisation; `tokens` image and `text_tokens` text tokens.
    """
    dim, inner = config.hidden_size, int(config.mlp_ratio * config.hidden_size)
    patch = config.patch_size**2
    token = 2 * dim * patch * (config.in_channels + config.out_channels)
    token += config.depth * (
        2 * dim * 4 * dim  # linear attention: qkv and projection
        + 4 * dim * (config.linear_head_dim + 1)  # its sums over tokens
        + 2 * dim * 2 * dim  # cross attention: query and projection
        + 4 * dim * text_tokens
        + 2 * dim * 2 * inner + 2 * 9 * 2 * inner + 2 * inner * dim  # Mix-FFN
    )  # fmt: skip
    text = 2 * config.caption_channels * dim + 2 * dim * dim + config.depth * 2 * dim * 2 * dim
    time = 2 * 256 * dim + 2 * dim * dim + 2 * dim * 6 * dim
    return float(tokens * token + text_tokens * text + time)


class Progress:
    """Averages over the last `interval` steps."""

    def __init__(self, interval: int, batch_size: int, device_name: str) -> None:
        self.batch_size, self.peak = batch_size, peak_flops(device_name)
        self._recent: deque[tuple[StepStats, float, float]] = deque(maxlen=interval)

    def add(self, stats: StepStats, seconds: float, waited: float) -> None:
        """A step that took `seconds`, of which it `waited` for data."""
        self._recent.append((stats, seconds, waited))

    def line(self, epoch: int, step: int, total: int) -> str:
        """The line of the log after `step` of `total` steps."""
        stats = [entry[0] for entry in self._recent]
        seconds = sum(entry[1] for entry in self._recent)
        waited = sum(entry[2] for entry in self._recent)
        finite = [entry for entry in stats if entry.finite] or stats
        loss = sum(entry.loss for entry in finite) / len(finite)
        norm = sum(entry.grad_norm for entry in finite) / len(finite)
        parts = [
            f"epoch {epoch}  step {step} / {total}  loss {loss:.4f}  grad_norm {norm:.3f}  lr {stats[-1].lr:.2e}",
            f"{len(stats) * self.batch_size / seconds:.3g} images/s",
        ]
        if self.peak:
            parts.append(f"mfu {sum(entry.flops for entry in stats) / seconds / self.peak:.1%}")
        parts.append(f"data wait {waited / seconds:.0%}")
        parts.append(f"eta {duration(seconds / len(stats) * (total - step))}")
        return "  ".join(parts)


def duration(seconds: float) -> str:
    """Days, hours, minutes and seconds: 1d 02:03:04."""
    seconds = math.ceil(seconds)
    days, rest = divmod(seconds, 86400)
    clock = f"{rest // 3600:02}:{rest // 60 % 60:02}:{rest % 60:02}"
    return f"{days}d {clock}" if days else clock
