"""The one JSON format in which this project reports numbers, with all that it takes to measure them again."""

import importlib.metadata
import json
import math
import os
import platform
import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sana import __version__
from sana.utils.files import write_atomic

PACKAGES = (
    "torch",
    "torchvision",
    "triton",
    "diffusers",
    "transformers",
    "torchao",
    "numpy",
    "scipy",
    "torch-fidelity",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """One measurement; fields in the order in which they are written."""

    metric: str
    """What was measured: "GenEval", "FID", "throughput", ..."""
    values: Mapping[str, Any]
    """The numbers by name; may be nested; finite."""
    n: int
    """How many images (or runs, or requests) the numbers stand on."""
    protocol: str
    """The procedure: prompt set, reference set, detector or judge. Two protocols do not compare."""
    settings: Mapping[str, Any]
    """Everything chosen for this run: sampler, steps, guidance, thresholds, seeds, batch size."""
    weights: Mapping[str, str]
    """sha256 of the weights of each part by name ("transformer", "autoencoder", ...); may be empty."""
    dtype: str | None
    """Compute type of the measured model, "float32" for instance: of pictures, of what drew them. None where none ran, or
    nothing says it. That of a network that measures is among the settings, as its `..._dtype`."""
    command: str
    """The command line that produced the report."""
    hardware: str
    """Processor with its usable cores, and accelerators."""
    versions: Mapping[str, str]
    """Of Python, this package and the libraries present."""
    date: str
    """When it was made: ISO 8601, UTC."""

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"a report of {self.metric} stands on at least one sample, got n={self.n}")
        broken = [name for name, value in _numbers(self.values) if not math.isfinite(value)]
        if broken:
            raise ValueError(
                f"a report of {self.metric} needs finite numbers; these are not: {', '.join(broken)}"
            )

    def to_json(self) -> str:
        """The report as indented JSON text, ending in a line feed."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def save(self, path: str | Path) -> Path:
        """Write the JSON text to `path` in one step."""
        return write_atomic(path, self.to_json().encode("utf-8"))


def make_report(
    *,
    metric: str,
    values: Mapping[str, Any],
    n: int,
    protocol: str,
    settings: Mapping[str, Any],
    weights: Mapping[str, str] | None = None,
    dtype: str | None = None,
) -> Report:
    """A report of this process: command, hardware, versions and date are filled in.

    Args:
        dtype: None: what `settings["generation"]` says (`image_set.described`).
    """
    return Report(
        metric=metric,
        values=values,
        n=n,
        protocol=protocol,
        settings=settings,
        weights=weights or {},
        dtype=dtype or settings.get("generation", {}).get("dtype"),
        command=shlex.join(["python", *sys.argv]),
        hardware=hardware(),
        versions=versions(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def hardware() -> str:
    """For instance "AMD EPYC 7B13, 8 cores; 2 x NVIDIA H100"; GPUs only where torch is loaded."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        models = [
            line.partition(":")[2].strip()
            for line in cpuinfo.read_text().splitlines()
            if line.startswith("model name")
        ]
        cpu = models[0] if models else cpu
    parts = [f"{cpu}, {len(os.sched_getaffinity(0))} cores"]
    torch = sys.modules.get("torch")  # a report of pure arithmetic need not load it
    if torch is not None and torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        parts += [f"{names.count(name)} x {name}" for name in dict.fromkeys(names)]
    return "; ".join(parts)


def versions() -> dict[str, str]:
    """Version by name: python, sana, and those of PACKAGES that are installed."""
    installed = {}
    for name in PACKAGES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"python": platform.python_version(), "sana": __version__, **installed}


def _numbers(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    """Every float of a nested mapping with its dotted name."""
    found = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            found += _numbers(value, f"{prefix}{name}.")
        elif isinstance(value, float):
            found.append((prefix + name, value))
    return found
