"""Frechet distance between two sets of pictures: of Inception features FID (arXiv 1706.08500), of others its kin.

    d^2 = |mu1 - mu2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^(1/2)),  mu and S: mean and covariance of the features

A set's size shows in its distance, the smaller the set the larger: never compare distances of different numbers of pictures.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sana.metrics.features import FeatureNetwork
from sana.metrics.image_set import ScoredImage, described, open_image
from sana.metrics.report import Report, make_report
from sana.metrics.scoring import score_images
from sana.utils.files import write_atomic
from sana.utils.logging import get_logger

log = get_logger(__name__)


@dataclass(frozen=True)
class Statistics:
    """What the distance knows of a set."""

    mu: np.ndarray
    """(D,) float64."""
    sigma: np.ndarray
    """(D, D) float64, divided by n - 1."""
    n: int | None = None
    """How many pictures; None where a file does not say."""
    features: str | None = None
    """Name of the features, as `FeatureNetwork.name`; None where a file does not say."""

    def save(self, path: str | Path) -> Path:
        """Write an .npz with `mu` and `sigma`, where pytorch-fid reads them, and `n` and `features` beside them."""
        fields = {"mu": self.mu, "sigma": self.sigma}
        fields |= {} if self.n is None else {"n": np.array(self.n)}
        fields |= {} if self.features is None else {"features": np.array(self.features)}
        return write_atomic(path, lambda handle: np.savez_compressed(handle, **fields))

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """Read an .npz with `mu` and `sigma`, ours or pytorch-fid's.

        Raises:
            ValueError: it cannot be read, or is no such file.
        """
        try:
            content = io.BytesIO(Path(path).read_bytes())  # numpy leaves a damaged file open
            with np.load(content) as file:
                values = {name: file[name] for name in ("mu", "sigma", "n", "features") if name in file}
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"{path}: cannot be read as statistics (.npz): {error}") from error
        if not {"mu", "sigma"} <= values.keys():
            raise ValueError(
                f"{path}: holds no statistics: mu and sigma are wanted, as pytorch-fid writes them"
            )
        mu, sigma = (np.asarray(values[name], dtype=np.float64) for name in ("mu", "sigma"))
        if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
            raise ValueError(f"{path}: mu {mu.shape} and sigma {sigma.shape} do not fit together")
        if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
            raise ValueError(f"{path}: holds values that are not finite")
        n = int(values["n"]) if "n" in values else None
        return cls(mu, sigma, n, str(values["features"]) if "features" in values else None)


class Moments:
    """Mean and covariance of features that come in parts, in float64.

    Kept as the mean and the scatter about it, so that features far from 0 lose no digits; parts are joined by the rule
    of Chan, Golub and LeVeque (1983), exact but for rounding (1e-15 relative).
    """

    def __init__(self, dims: int) -> None:
        self.n = 0
        self._mean = np.zeros(dims)
        self._scatter = np.zeros((dims, dims))

    def add(self, features: np.ndarray) -> None:
        """Features (B, D) of B pictures."""
        if len(features):
            part = Moments(len(self._mean))
            features = np.asarray(features, dtype=np.float64)
            part.n, part._mean = len(features), features.mean(axis=0)
            centred = features - part._mean
            part._scatter = centred.T @ centred
            self.merge(part)

    def merge(self, other: Moments) -> None:
        """What another process or shard has collected."""
        total = self.n + other.n
        if other.n:
            offset = other._mean - self._mean
            self._scatter += other._scatter + np.outer(offset, offset) * (self.n * other.n / total)
            self._mean += offset * (other.n / total)
            self.n = total

    def statistics(self, features: str | None = None) -> Statistics:
        """Of all that was added.

        Raises:
            ValueError: fewer than two pictures have no covariance.
        """
        if self.n < 2:
            raise ValueError(f"a covariance needs at least two pictures, got {self.n}")
        return Statistics(self._mean.copy(), self._scatter / (self.n - 1), self.n, features)


def frechet_distance(first: Statistics, second: Statistics) -> float:
    """d^2 of the module's formula, in float64.

    tr((S1 S2)^(1/2)) is the sum of the singular values of R1' R2, where S = R R' and R comes from the eigenvalues of S.
    That loses no digits where covariances are singular, as those of fewer pictures than dimensions are; the root of a
    product, which other implementations take, turns rounding of 1e-16 into 1e-8. Eigenvalues below D * 2.2e-16 of the
    largest are rounding and count as 0: at worst this adds 2 (D * D * 2.2e-16 * w * min(tr S1, tr S2))^(1/2), w the largest
    eigenvalue; on sets whose distance is known 1e-13 relative was measured.

    Raises:
        ValueError: statistics of other features.
    """
    if first.mu.shape != second.mu.shape:
        raise ValueError(f"statistics of {len(first.mu)} and of {len(second.mu)} dimensions do not compare")
    _require_same(first.features, second.features)
    offset = first.mu - second.mu
    shared = np.linalg.svd(_root(first.sigma).T @ _root(second.sigma), compute_uv=False).sum()
    squared = offset @ offset + np.trace(first.sigma) + np.trace(second.sigma) - 2 * shared
    return max(0.0, float(squared))


def _require_same(first: str | None, second: str | None) -> None:
    if first and second and first != second:
        raise ValueError(f"statistics of {first!r} and of {second!r} do not compare")


def _root(sigma: np.ndarray) -> np.ndarray:
    """R (D, rank) with R R' = sigma."""
    values, vectors = np.linalg.eigh(sigma)
    kept = values > len(sigma) * np.finfo(np.float64).eps * max(values[-1], 0.0)
    return vectors[:, kept] * np.sqrt(values[kept])


def set_statistics(
    items: Sequence[ScoredImage],
    network: FeatureNetwork,
    work_folder: str | Path,
    *,
    batch_size: int = 50,
    threads: int = 4,
) -> Statistics:
    """Mean and covariance of the features of a set; processes share the work, see `score_images`."""

    def embed(batch: Sequence[ScoredImage], pixels: list[torch.Tensor]) -> list[dict[str, np.ndarray]]:
        return [{"features": row} for row in network.embed(torch.stack(pixels)).numpy()]

    rows = score_images(
        items,
        embed,
        work_folder,
        {"features": network.name, "weights": network.sha256},
        batch_size=batch_size,
        load=lambda path: network.prepare(open_image(path)),
        threads=threads,
    )
    moments = Moments(len(rows[0]["features"]))
    for start in range(0, len(rows), 1024):
        moments.add(np.stack([row["features"] for row in rows[start : start + 1024]]))
    return moments.statistics(network.name)


def measure(
    items: Sequence[ScoredImage],
    reference: Statistics | Sequence[ScoredImage],
    network: FeatureNetwork,
    work_folder: str | Path,
    *,
    batch_size: int = 50,
    threads: int = 4,
    settings: Mapping[str, Any] | None = None,
) -> tuple[Report, Statistics, Statistics]:
    """The distance of a set from a reference set, or from its statistics, and the statistics of both.

    Args:
        work_folder: for the features of each picture.
        settings: what else the report is to say.

    Raises:
        ValueError: as `score_images` and `frechet_distance`.
    """
    work, loop = Path(work_folder), {"batch_size": batch_size, "threads": threads}
    if len(items) < 2:
        raise ValueError(f"a covariance needs at least two pictures, got {len(items)}")
    if isinstance(reference, Statistics):
        _require_same(network.name, reference.features)
    else:
        reference = set_statistics(reference, network, work / "reference", **loop)
    statistics = set_statistics(items, network, work / "images", **loop)
    dims = len(statistics.mu)
    if len(items) <= dims:
        log.warning("%d pictures for %d dimensions: the distance is far too large", len(items), dims)
    report = make_report(
        metric=network.metric,
        values={network.metric: frechet_distance(statistics, reference)},
        n=len(items),
        protocol=f"{network.name}; {reference.n or 'an unknown number of'} reference pictures",
        settings={"batch_size": batch_size, "features_dtype": "float32"}
        | described(items)
        | dict(settings or {}),
        weights={"features": network.sha256},
    )
    return report, statistics, reference
