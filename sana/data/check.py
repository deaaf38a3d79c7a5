"""What a data set holds, before anything is trained on it."""

import statistics
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from tqdm import tqdm

from sana.data.captions import Caption, CaptionChoice
from sana.data.order import Order
from sana.data.pictures import Samples
from sana.data.quarantine import UNREADABLE


@dataclass(frozen=True, kw_only=True)
class BucketReport:
    """The samples of one size."""

    height: int
    width: int
    samples: int
    batches: int
    """Global batches in an epoch."""
    repeats: int
    """Places in these that samples fill again, so that the last batch is full."""


@dataclass(frozen=True, kw_only=True)
class CaptionReport:
    """The captions of one kind."""

    kind: str
    count: int
    words: tuple[int, float, int]
    """Least, median and most words of a caption."""
    scored: int
    """How many have a CLIP score."""
    drawn: float
    """Part of the training captions that will be of this kind, expected."""


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """What `inspect` found."""

    samples: int
    """Those with a number; some may be bad."""
    unlisted: int
    """Those that have none, because the data set found them bad itself."""
    bad: dict[str, str]
    """Where each sample that cannot be read comes from, and why it cannot."""
    buckets: list[BucketReport]
    captions: list[CaptionReport]

    @property
    def steps(self) -> int:
        """Global batches in an epoch: as many on every process."""
        return sum(bucket.batches for bucket in self.buckets)


def inspect(
    samples: Samples, order: Order, choice: CaptionChoice, *, decode: bool = True, threads: int = 4
) -> DataReport:
    """Read every sample once.

    Args:
        samples: those that it found bad itself are in its quarantine, which takes any number of them.
        decode: read whole pictures; else only what the data set has read of them.
    """

    def read(index: int) -> tuple[int, str, list[Caption], list[float]]:
        try:
            if decode:
                samples.image(index)
            captions = samples.captions(index)
            return index, "", captions, choice.probabilities(captions)
        except UNREADABLE as error:
            return index, " ".join(str(error).split()), [], []

    bad = dict(samples.quarantine.reasons) if samples.quarantine else {}
    unlisted = len(bad)
    words, scored, drawn = defaultdict(list), defaultdict(int), defaultdict(float)
    readable = 0
    with ThreadPoolExecutor(threads) as pool:
        for index, reason, captions, chances in tqdm(
            pool.map(read, range(len(samples))), total=len(samples), desc="samples", disable=None
        ):
            if reason:
                bad[samples.label(index)] = reason
                continue
            readable += 1
            for caption, chance in zip(captions, chances, strict=True):
                words[caption.kind].append(len(caption.text.split()))
                scored[caption.kind] += caption.score is not None
                drawn[caption.kind] += chance
    found = [
        CaptionReport(
            kind=kind,
            count=len(counts),
            words=(min(counts), statistics.median(counts), max(counts)),
            scored=scored[kind],
            drawn=drawn[kind] / readable,
        )
        for kind, counts in sorted(words.items())
    ]
    return DataReport(
        samples=len(samples), unlisted=unlisted, bad=bad, buckets=list(_buckets(order)), captions=found
    )


def _buckets(order: Order) -> Iterator[BucketReport]:
    for size, members, batches in zip(
        order.bucket_sizes, order.members, order.batches_per_epoch, strict=True
    ):
        repeats = batches * order.batch_size - members
        yield BucketReport(height=size[0], width=size[1], samples=members, batches=batches, repeats=repeats)
