"""Which samples a step sees, and their loading.

The order is a pure function of (seed, step): shuffled in each epoch, without replacement, the same global batch on any
number of processes. So a run resumes at a step without replaying anything, and an epoch loses no tail: its last batch is
filled up from the epoch's beginning, and a set smaller than a batch repeats.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sana.config import ConfigError, SanaConfig
from sana.data.image_folder import ImageFolder
from sana.data.shapes import ShapesDataset
from sana.utils.seeding import generator


class Samples(Protocol):
    """What a data set must answer."""

    name: str
    """Says what the pictures are: equal names, equal pictures. Keys the latent cache."""

    def __len__(self) -> int: ...

    def image(self, index: int) -> Tensor:
        """(3, size, size) in [-1, 1]."""

    def caption(self, index: int, epoch: int) -> str:
        """One caption of picture `index`."""


def build_dataset(config: SanaConfig) -> Samples:
    """The data set that a config names.

    Raises:
        ConfigError: it cannot be trained on.
        ValueError: its folders hold no pictures.
    """
    data, size = config.data, config.model.image_size
    if config.model.multi_scale:
        raise ConfigError(
            f"model.multi_scale: {data.type} gives square images so far; set --model.multi_scale=false"
        )
    if data.type == "SanaShapes":
        return ShapesDataset(size, data.num_scenes)
    if data.type == "SanaImgDataset":
        return ImageFolder(data.data_dir, size)
    raise ConfigError(f"data.type: {data.type} cannot be trained on so far; use SanaShapes or SanaImgDataset")


@dataclass(frozen=True, kw_only=True)
class Order:
    """The shuffled order of `num_samples` in global batches of `batch_size` (all processes and accumulation together)."""

    num_samples: int
    batch_size: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Global batches in an epoch."""
        return -(-self.num_samples // self.batch_size)

    def batch(self, step: int) -> tuple[int, list[int]]:
        """(epoch, sample numbers) of the global batch of a step, both counted from 0."""
        epoch, position = divmod(step, self.steps_per_epoch)
        permutation = _permutation(self.num_samples, self.seed, epoch)
        places = torch.arange(position * self.batch_size, (position + 1) * self.batch_size) % self.num_samples
        return epoch, permutation[places].tolist()


@functools.lru_cache(maxsize=2)
def _permutation(num_samples: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(num_samples, generator=generator("order", seed, epoch))


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What one process trains on in one forward pass."""

    pixels: Tensor
    """Images (B, 3, H, W) in [-1, 1], or scaled latents (B, C, h, w) from the cache."""
    captions: list[str]
    samples: list[tuple[int, int]]
    """(epoch, sample number) of each: what its noise, timestep and caption dropout are drawn from."""


class _Items(Dataset):
    """(epoch, index) -> (pixels, caption, (epoch, index))."""

    def __init__(self, samples: Samples, pixels: Callable[[int], Tensor]) -> None:
        self.samples, self.pixels = samples, pixels

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, str, tuple[int, int]]:
        epoch, index = key
        return self.pixels(index), self.samples.caption(index, epoch), key


def _collate(items: list[tuple[Tensor, str, tuple[int, int]]]) -> Batch:
    pixels, captions, samples = zip(*items, strict=True)
    return Batch(pixels=torch.stack(pixels), captions=list(captions), samples=list(samples))


def batches(
    samples: Samples,
    order: Order,
    *,
    first_step: int,
    accumulation: int,
    rank: int,
    world_size: int,
    num_workers: int,
    pixels: Callable[[int], Tensor] | None = None,
) -> Iterator[Batch]:
    """Without end, the batches of one process from `first_step` on, `accumulation` of them for each step.

    Args:
        pixels: index -> what to train on; None takes `samples.image`.
    """

    def keys() -> Iterator[list[tuple[int, int]]]:
        step, share = first_step, order.batch_size // (world_size * accumulation)
        while True:
            epoch, indices = order.batch(step)
            for part in range(accumulation):
                start = (part * world_size + rank) * share
                yield [(epoch, index) for index in indices[start : start + share]]
            step += 1

    items = _Items(samples, pixels or samples.image)
    workers = {"num_workers": num_workers, "persistent_workers": num_workers > 0}
    return iter(DataLoader(items, batch_sampler=keys(), collate_fn=_collate, **workers))
