"""Goldens: small fingerprints of what known weights compute, to tell later whether they still compute it.

A file of them is JSON: {"entries": [{"part", "weights", "fingerprints"}, ...], "versions": {...}}. An entry counts only for
the weights whose sha256 it names, so that it cannot be held against others.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sana.metrics.report import versions
from sana.utils import hub
from sana.utils.files import write_atomic

if TYPE_CHECKING:
    from sana.pipeline import SanaPipeline

SAMPLES = 24
"""Values of a tensor that are stored, evenly spaced over it."""


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """A few numbers of a tensor, in float64."""

    shape: tuple[int, ...]
    mean: float
    rms: float
    """Root of the mean square."""
    largest: float
    """max |x|"""
    samples: tuple[float, ...]
    """`SAMPLES` values, the first and the last among them."""

    @classmethod
    def of(cls, values: Tensor) -> Fingerprint:
        """Of any tensor."""
        flat = values.detach().flatten().double().cpu()
        places = torch.linspace(0, len(flat) - 1, min(SAMPLES, len(flat)), dtype=torch.float64).long()
        return cls(
            shape=tuple(values.shape),
            mean=flat.mean().item(),
            rms=flat.square().mean().sqrt().item(),
            largest=flat.abs().max().item(),
            samples=tuple(flat[places].tolist()),
        )

    def distance(self, golden: Fingerprint) -> float:
        """The largest difference from `golden` in any number, over its rms; infinity for another shape or NaN."""
        if self.shape != golden.shape or len(self.samples) != len(golden.samples):
            return math.inf
        ours, theirs = ((p.mean, p.rms, p.largest, *p.samples) for p in (self, golden))
        distances = [abs(a - b) / max(golden.rms, 1e-12) for a, b in zip(ours, theirs, strict=True)]
        return max(distances) if all(map(math.isfinite, distances)) else math.inf


@dataclass(frozen=True, slots=True)
class Entry:
    """What one part of a model computes on the inputs of `sana.evaluation.verify`."""

    part: str
    weights: Mapping[str, str]
    """Part -> sha256: of all the weights that the numbers come from."""
    fingerprints: Mapping[str, Fingerprint]


@dataclass(slots=True)
class Goldens:
    """What a run compares with."""

    entries: Sequence[Entry] | None
    """None: compare nothing, make new ones."""
    weights: Mapping[str, str] = field(default_factory=dict)
    """Part -> sha256, of the model under check."""

    def find(self, part: str, weights: Mapping[str, str]) -> Entry | None:
        """The golden of `part` for exactly these weights."""
        return next(
            (entry for entry in self.entries if entry.part == part and entry.weights == weights), None
        )


def read(folder: str | Path) -> list[Entry]:
    """The entries of every `.json` file in `folder`; none where it does not exist.

    Raises:
        ValueError: a file that is not of goldens.
    """
    entries = []
    for file in sorted(Path(folder).glob("*.json")):
        try:
            entries += [_entry(stored) for stored in json.loads(file.read_text(encoding="utf-8"))["entries"]]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{file} does not hold goldens ({error!r}); remove it, or rewrite it with --update"
            ) from error
    return entries


def write(path: str | Path, entries: Sequence[Entry]) -> Path:
    """Write a file of goldens in one step, replacing what was there."""
    content = {"entries": [asdict(entry) for entry in entries], "versions": versions()}
    return write_atomic(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode("utf-8"))


def _entry(stored: Mapping[str, Any]) -> Entry:
    fingerprints = {
        name: Fingerprint(**values | {key: tuple(values[key]) for key in ("shape", "samples")})
        for name, values in stored["fingerprints"].items()
    }
    return Entry(stored["part"], stored["weights"], fingerprints)


def weight_hashes(pipeline: SanaPipeline) -> dict[str, str]:
    """sha256 of the weights of each network that came from a file; a config may only have a name for the text encoder."""
    folders = {
        "autoencoder": hub.resolve_model(pipeline.config.vae.vae_pretrained),
        "text_encoder": pipeline.text_encoder.model.name_or_path,
    }
    hashes = {part: hub.sha256(path) for part, path in folders.items()}
    return ({"transformer": pipeline.weights_sha256} if pipeline.weights_sha256 else {}) | hashes
