"""What the checks of `sana.evaluation.verify` are made of: one result, the ranges of layers, errors, the report."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sana.metrics.report import Report, make_report

PASS, FAIL, SKIP = "PASS", "FAIL", "SKIP"
PROTOCOL = "verify 1: recomputation by diffusers and transformers, published trajectories, goldens"

REINSTALL = "Compare the installed packages with constraints.txt and install those; then report it."
DAMAGED = (
    "Fetch the file again and compare its sha256 with its source; then check --config names the right model."
)
WRONG_DTYPE = "Use --dtype with the type that the weights were trained in, or fp32."

_BLOCK = re.compile(r"([a-z]+\.)*([a-z]+_)?(blocks|layers)\.\d+")
"""Names of blocks, whose ranges the report lists."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One line of the table."""

    part: str
    name: str
    where: str
    """Compute type and device."""
    status: str
    found: str
    """What was measured, and the bound; for SKIP, why."""
    advice: str = ""
    """What to do about a FAIL."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """Numbers for the report."""


def layer_ranges(module: nn.Module, call: Callable[[], Any]) -> tuple[dict[str, float], Any]:
    """max |x| of every layer's output while `call` runs, in the order in which layers finish, and what it returns.

    Not finite where one value is not.
    """
    seen: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, given: object, output: object) -> None:
            for tensor in output if isinstance(output, tuple) else (output,):
                if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.numel():
                    largest = tensor.detach().abs().amax().float()
                    seen[name] = torch.maximum(seen[name], largest) if name in seen else largest

        return hook

    handles = [layer.register_forward_hook(watch(name)) for name, layer in module.named_modules() if name]
    try:
        result = call()
    finally:
        for handle in handles:
            handle.remove()
    return {name: value.item() for name, value in seen.items()}, result


def relative_rms(actual: Tensor, reference: Tensor) -> float:
    """rms(actual - reference) / rms(reference), in float64."""
    actual, reference = actual.double(), reference.double()
    return (
        (actual - reference).square().mean().sqrt() / reference.square().mean().sqrt().clamp_min(1e-12)
    ).item()


def check_layers(ranges: Mapping[str, float], dtype: torch.dtype, **part: str) -> Check:
    """A check of `layer_ranges`: names the first layer that is not finite, or the largest and its headroom in `dtype`."""
    broken = next((name for name, largest in ranges.items() if not math.isfinite(largest)), None)
    blocks = {name: finite(value) for name, value in ranges.items() if _BLOCK.fullmatch(name)}
    limit = torch.finfo(dtype).max
    if broken is not None:
        found, values = f"not finite, first in {broken}", {}
    else:
        name, peak = max(ranges.items(), key=lambda pair: pair[1])
        found = f"max |x| {peak:.3g} in {name}, headroom {limit / max(peak, 1e-12):.1e}x"
        values = {"largest": peak}
    return Check(
        name="layers",
        status=PASS if broken is None else FAIL,
        found=found,
        advice=f"{WRONG_DTYPE} If float32 is not finite either: {DAMAGED}",
        values=values | {"max_abs": blocks, "limit": limit},
        **part,
    )


def bounded(name: str, error: float, bound: float, *, advice: str, note: str = "", **part: str) -> Check:
    """A check of an error against its bound; NaN fails."""
    fits = error <= bound
    return Check(
        name=name,
        status=PASS if fits else FAIL,
        found=f"error {error:.1e} {'<=' if fits else '>'} {bound:.1e}{note}",
        advice=advice,
        values={"error": finite(error), "bound": bound},
        **part,
    )


def worst(*errors: float) -> float:
    """The largest, infinite where one is NaN: `max` drops a NaN that is not its first argument."""
    return math.inf if any(map(math.isnan, errors)) else max(errors)


def short(dtype: torch.dtype) -> str:
    """Its name without "torch."."""
    return str(dtype).removeprefix("torch.")


def finite(value: float) -> float | None:
    """None for what JSON has no number for."""
    return value if math.isfinite(value) else None


def line(part: str, name: str, where: str, status: str, found: str) -> str:
    """One line of the table."""
    return f"{part:<14}{name:<14}{where:<18}{status:<6}{found}".rstrip()


def summary(checks: Sequence[Check]) -> str:
    """How many checks ended how."""
    return ", ".join(f"{sum(check.status == name for check in checks)} {name}" for name in (PASS, FAIL, SKIP))


def report(checks: Sequence[Check], settings: Mapping[str, Any], weights: Mapping[str, str]) -> Report:
    """The report of a run."""
    counts = {name: sum(check.status == name for check in checks) for name in (PASS, FAIL, SKIP)}
    rows = {
        f"{check.part}: {check.name} ({check.where})": {
            "status": check.status,
            "found": check.found,
            **check.values,
        }
        for check in checks
    }
    values = {"passed": counts[PASS], "failed": counts[FAIL], "skipped": counts[SKIP], "checks": rows}
    return make_report(
        metric="verification",
        values=values,
        n=len(checks),
        protocol=PROTOCOL,
        settings=settings,
        weights=weights,
    )
