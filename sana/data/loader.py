"""The loading of batches: what each process reads for each step, and what takes the place of a sample that cannot be read."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sana.data.order import Order
from sana.data.pictures import Samples
from sana.data.quarantine import UNREADABLE, DataError


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What one process trains on in one forward pass."""

    pixels: Tensor
    """Images (B, 3, H, W) in [-1, 1], or scaled latents (B, C, h, w) in the dtype that the cache stores."""
    captions: list[str]
    samples: list[tuple[int, int]]
    """(pass, sample number) of each place: what its noise, timestep, caption and caption dropout are drawn from. The pass
    is the epoch, but for repeats within an epoch (`Order.keys`)."""
    replaced: dict[int, int]
    """Sample number -> the one loaded in its place, for those that cannot be read."""
    texts: list[Tensor] | None = None
    """Hidden states (tokens, C) of each caption, in the dtype that the cache stores; None where there are none."""


# pixels, caption, its hidden states, key of the place, number of the sample loaded
Item = tuple[Tensor, str, Tensor | None, tuple[int, int], int]


class _Items(Dataset):
    """(pass, index) -> the sample, or the one that takes its place."""

    def __init__(self, samples: Samples, text: Callable[[str], Tensor] | None) -> None:
        self.samples, self.text = samples, text
        self.bad: set[int] = set()

    def __getitem__(self, key: tuple[int, int]) -> Item:
        try:
            return self._readable(*key)
        except DataError:
            raise
        except Exception as error:
            # Some exceptions (SafetensorError) cannot be sent from a worker to the main process, which then waits for ever.
            text = "".join(traceback.format_exception(error))
            raise RuntimeError(f"reading sample {key[1]} failed:\n{text}") from error

    def _readable(self, epoch: int, index: int) -> Item:
        samples, count = self.samples, len(self.samples)
        size = samples.size(index)
        for step in range(count):
            other = (index + step) % count
            if other in self.bad or samples.size(other) != size:
                continue
            try:
                caption = samples.caption(other, epoch)
                text = self.text(caption) if self.text else None
                return samples.image(other), caption, text, (epoch, index), other
            except DataError:  # no fault of the sample
                raise
            except UNREADABLE as error:
                if samples.quarantine is None:
                    raise
                self.bad.add(other)
                samples.quarantine.add(samples.label(other), error)
        raise ValueError(f"no sample of {size[0]} x {size[1]} pixels can be read")


def _collate(items: list[Item]) -> Batch:
    pixels, captions, texts, keys, loaded = zip(*items, strict=True)
    return Batch(
        pixels=torch.stack(pixels),
        captions=list(captions),
        samples=list(keys),
        replaced={index: other for (_, index), other in zip(keys, loaded, strict=True) if index != other},
        texts=None if texts[0] is None else list(texts),
    )


def batches(
    samples: Samples,
    order: Order,
    *,
    first_step: int,
    accumulation: int,
    rank: int,
    world_size: int,
    num_workers: int,
    text: Callable[[str], Tensor] | None = None,
) -> Iterator[Batch]:
    """Without end, the batches of one process from `first_step` on, `accumulation` of them for each step.

    Args:
        text: caption -> its hidden states (tokens, C), where these are cached.

    Raises:
        ValueError: the global batch cannot be shared out evenly.
    """
    parts = world_size * accumulation
    if order.batch_size % parts:
        raise ValueError(
            f"a global batch of {order.batch_size} samples is not a multiple of {world_size} processes times "
            f"{accumulation} batches in a step"
        )

    def keys() -> Iterator[list[tuple[int, int]]]:
        step, share = first_step, order.batch_size // parts
        while True:
            whole = order.keys(step)
            for part in range(accumulation):
                start = (part * world_size + rank) * share
                yield whole[start : start + share]
            step += 1

    items = _Items(samples, text)
    workers = {"num_workers": num_workers, "persistent_workers": num_workers > 0}
    return iter(DataLoader(items, batch_sampler=keys(), collate_fn=_collate, **workers))
