"""Which samples a step sees: a pure function of (seed, step), the same on any number of processes.

Each epoch is one permutation of all samples, dealt into global batches of one bucket (one picture size) each. A bucket's
samples keep the permutation's order, and batches come in the order of their first samples, so that with one bucket the
permutation is simply cut into batches. No tail is dropped: a bucket's last batch of an epoch is filled up from the bucket's
own beginning, and a bucket smaller than a batch repeats. Every global batch has the same number of samples, so each process
has the same number of batches, whatever the buckets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from sana.data.pictures import Samples
from sana.utils.seeding import generator


class GlobalBatch(NamedTuple):
    """The samples of one step, all processes and accumulation together."""

    epoch: int
    """Counted from 0."""
    bucket: int
    """Number of its bucket: its place in `Order.bucket_sizes`."""
    indices: list[int]
    """Sample numbers."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Order:
    """The shuffled order of `num_samples` in global batches of `batch_size` (all processes and accumulation together).

    Raises:
        ValueError: there is no sample, or a batch of none.
    """

    num_samples: int
    batch_size: int
    seed: int
    buckets: Tensor | None = None
    """(num_samples,) integers from 0: the bucket of each sample, none empty; None: all are in one."""
    bucket_sizes: Sequence[tuple[int, int]] = ()
    """(height, width) of the pictures of each bucket, where known."""
    members: list[int] = field(init=False, repr=False)
    """Samples in each bucket."""
    _epochs: dict[int, _Epoch] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        if self.num_samples < 1 or self.batch_size < 1:
            raise ValueError(
                f"an order needs a sample and a batch size of at least 1, got {self.num_samples} and {self.batch_size}"
            )
        members = [self.num_samples] if self.buckets is None else self.buckets.bincount().tolist()
        assert sum(members) == self.num_samples and min(members) > 0
        object.__setattr__(self, "members", members)

    @classmethod
    def of(cls, samples: Samples, *, batch_size: int, seed: int) -> Order:
        """The order of a data set, its buckets the sizes of its pictures, small heights first."""
        sizes = [samples.size(index) for index in range(len(samples))]
        number = {size: place for place, size in enumerate(sorted(set(sizes)))}
        buckets = torch.tensor([number[size] for size in sizes], dtype=torch.long)
        return cls(
            num_samples=len(samples),
            batch_size=batch_size,
            seed=seed,
            buckets=buckets,
            bucket_sizes=tuple(number),
        )

    @property
    def batches_per_epoch(self) -> list[int]:
        """Global batches of each bucket in an epoch: the last one, if it is not full, is filled up."""
        return [-(-count // self.batch_size) for count in self.members]

    @property
    def steps_per_epoch(self) -> int:
        """Global batches in an epoch."""
        return sum(self.batches_per_epoch)

    def batch(self, step: int) -> GlobalBatch:
        """The global batch of a step, counted from 0."""
        epoch, bucket, places, indices = self._at(step)
        return GlobalBatch(epoch, bucket, indices[places % len(indices)].tolist())

    def keys(self, step: int) -> list[tuple[int, int]]:
        """(pass, sample number) of each sample of a step's global batch; no pair comes twice in a run.

        A pass is one walk through a bucket. Where the last batch of an epoch is filled up, the samples that come again
        are on the next pass, so that what is drawn for them (noise, timestep, caption) is drawn anew. In a bucket that
        fills its batches the pass is the epoch.
        """
        epoch, bucket, places, indices = self._at(step)
        walks = -(-self.batches_per_epoch[bucket] * self.batch_size // len(indices))
        passes = epoch * walks + places // len(indices)
        return list(zip(passes.tolist(), indices[places % len(indices)].tolist(), strict=True))

    def _at(self, step: int) -> tuple[int, int, Tensor, Tensor]:
        """(epoch, bucket, places in the bucket's list, running on past its end, the bucket's list) of a step."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch not in self._epochs:
            while len(self._epochs) > 1:  # a loader that reads ahead is at most an epoch apart from the step
                del self._epochs[next(iter(self._epochs))]
            self._epochs[epoch] = self._dealt(epoch)
        dealt = self._epochs[epoch]
        bucket, start = int(dealt.bucket[position]), int(dealt.start[position])
        return epoch, bucket, torch.arange(start, start + self.batch_size), dealt.indices[bucket]

    def _dealt(self, epoch: int) -> _Epoch:
        permutation = torch.randperm(self.num_samples, generator=generator("order", self.seed, epoch))
        if self.buckets is None:
            lists, places = [permutation], [torch.arange(self.num_samples)]
        else:
            grouped = self.buckets[permutation].sort(stable=True).indices  # places, bucket after bucket
            places = list(grouped.split(self.members))
            lists = [permutation[place] for place in places]
        starts = [torch.arange(0, count, self.batch_size) for count in self.members]
        firsts = torch.cat([place[start] for place, start in zip(places, starts, strict=True)])
        turn = firsts.argsort()
        bucket = torch.arange(len(lists)).repeat_interleave(torch.tensor(self.batches_per_epoch))
        return _Epoch(lists, bucket[turn], torch.cat(starts)[turn])


class _Epoch(NamedTuple):
    indices: list[Tensor]
    """Sample numbers of each bucket, shuffled."""
    bucket: Tensor
    """(steps,) the bucket of each batch."""
    start: Tensor
    """(steps,) the place in its bucket's list at which each batch starts."""
