"""Making the cache of latents and text features.

Samples are cut into units. A unit is read, encoded and written by one process, wholly or not at all, and how it is cut into
batches does not depend on the number of processes. So a kill costs the units in work alone, and the result is the same bit
for bit on a CPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from sana.config import SanaConfig
from sana.data import cache
from sana.data.cache import FeatureCache, Keys, StaleCache
from sana.data.pictures import Encodable
from sana.data.quarantine import UNREADABLE
from sana.loading import load_text_encoder
from sana.training.features import load_autoencoder

Processes = Accelerator | PartialState

DTYPES = {"half": (torch.float16, torch.bfloat16), "float32": (torch.float32, torch.float32)}
"""Name -> dtypes of latents and texts. A latent is about 1, so float16's finer steps are worth more than range; hidden
states can be large, and on a GPU the text encoder computes in bfloat16 anyway, so that nothing is lost."""

_CHUNK_BYTES = 128 * 2**20
_BATCH_PIXELS = 32 * 256 * 256
_BATCH_CAPTIONS = 16


class Read(NamedTuple):
    """A sample as the loader brings it."""

    key: bytes
    image: Tensor | None
    """None where its latent is known, or it cannot be read."""
    captions: list[str]
    fault: str


class Reader(Dataset):
    """Index -> sample; only pictures that are not among the `known` are decoded, none where that is None."""

    def __init__(self, samples: Encodable, known: Keys | None, with_captions: bool) -> None:
        self.samples, self.known, self.with_captions = samples, known, with_captions

    def __getitem__(self, index: int) -> Read:
        key, image, captions, faults = cache.NO_KEY, None, [], []
        try:
            if self.with_captions:
                captions = [caption.text for caption in self.samples.captions(index)]
        except UNREADABLE as error:
            faults.append(str(error))
        try:
            found = self.samples.digest(index)
            if self.known is not None and not cache.contained(cache.as_keys([found]), self.known)[0]:
                image = self.samples.image(index)
            key = found
        except UNREADABLE as error:
            faults.append(str(error))
        return Read(key, image, captions, "; ".join(faults))


class _Chunks:
    """Features on their way into chunks of about `_CHUNK_BYTES`."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self.folder, self.dtype = folder, dtype
        self.waiting: dict[bytes, Tensor] = {}
        self.bytes = 0

    def add(self, key: bytes, feature: Tensor) -> bool:
        """Take a feature (h, w, C), unless it is not finite in the dtype; whether it was."""
        feature = feature.to("cpu", self.dtype)
        if not feature.isfinite().all():
            return False
        self.waiting[key] = feature
        self.bytes += feature.nbytes
        if self.bytes >= _CHUNK_BYTES:
            self.flush()
        return True

    def flush(self) -> None:
        """Write what waits."""
        if self.waiting:
            cache.write_chunk(self.folder, self.waiting)
        self.waiting, self.bytes = {}, 0


def stream(
    samples: Encodable, indices: Sequence[int], known: Keys | None, *, captions: bool, num_workers: int
) -> Iterator[Read]:
    """Some samples in their order, read by workers.

    Args:
        known: keys, sorted; pictures that have another are decoded. None: none is.
        captions: whether to read these too.
    """
    loader = DataLoader(
        Reader(samples, known, captions),
        sampler=indices,
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=num_workers,
        generator=torch.Generator(),  # the global one decides on initial weights
    )
    return iter(loader)


class Extraction:
    """The work of all processes on a cache.

    Args:
        sets: name -> data set.
        unit: samples, or captions, in a unit; the same for a cache as long as it is not complete.
        dtype: one of `DTYPES`.
        texts: whether captions are encoded.
    """

    def __init__(
        self,
        config: SanaConfig,
        sets: dict[str, Encodable],
        processes: Processes,
        *,
        folder: Path,
        unit: int,
        dtype: str,
        texts: bool,
    ) -> None:
        self.config, self.sets, self.processes = config, sets, processes
        self.folder, self.unit, self.texts = folder, unit, texts
        self.latent_dtype, self.text_dtype = DTYPES[dtype]

    def run(self) -> None:
        """Make what is not there, and complete the cache.

        Raises:
            ValueError: an encoder cannot be loaded, or more samples cannot be read than is allowed.
        """
        others: dict[str, Keys] = {}
        with suppress(ValueError):  # there is no index yet, or it is broken
            others = FeatureCache(self.folder).pictures()
        for name, samples in self.sets.items():
            self._pictures(name, samples)
        self.processes.wait_for_everyone()
        if self.texts:
            self._captions()
            self.processes.wait_for_everyone()
        if self.processes.is_main_process:
            known = cache.known_keys(self.folder, cache.LATENTS)
            kept = {
                name: keys
                for name, keys in others.items()
                if cache.contained(keys[keys != cache.NO_KEY], known).all()
            }
            mine = {name: np.concatenate([unit[0] for unit in self._units(name)]) for name in self.sets}
            cache.write_index(self.folder, kept | mine)
        self.processes.wait_for_everyone()

    def _dealt(self, count: int, is_done: Callable[[int], bool]) -> list[range]:
        """The units of `count` things that this process makes."""
        size, rank, world = self.unit, self.processes.process_index, self.processes.num_processes
        mine = [unit for unit in range(rank, -(-count // size), world) if not is_done(unit)]
        # Before anything is written: what is done must not depend on how quick the others are.
        self.processes.wait_for_everyone()
        return [range(unit * size, min((unit + 1) * size, count)) for unit in mine]

    def _path(self, name: str, unit: int) -> Path:
        return self.folder / cache.SAMPLES / name / f"{unit:06}.safetensors"

    def _units(self, name: str) -> Iterator[tuple[Keys, Keys, np.ndarray]]:
        """What is written of each unit of a set."""
        for unit in range(-(-len(self.sets[name]) // self.unit)):
            yield cache.read_samples(self._path(name, unit))

    def _pictures(self, name: str, samples: Encodable) -> None:
        """Encode the pictures of a set, and note the keys of its samples and captions."""
        known = cache.known_keys(self.folder, cache.LATENTS)

        def is_done(unit: int) -> bool:
            with suppress(ValueError):
                keys, *_ = cache.read_samples(self._path(name, unit))
                return bool(cache.contained(keys[keys != cache.NO_KEY], known).all())
            return False

        mine = self._dealt(len(samples), is_done)
        indices = [index for unit in mine for index in unit]
        reads = stream(
            samples, indices, known, captions=self.texts, num_workers=self.config.train.num_workers
        )
        device = self.processes.device
        autoencoder = functools.cache(lambda: load_autoencoder(self.config, device))

        def encode(images: Tensor) -> Tensor:
            latents = autoencoder().encode(images.to(device))
            return latents.permute(0, 2, 3, 1).float()  # as a feature lies: channels last

        with self._progress(f"latents of {name}", mine) as bar:
            for unit in mine:
                keys, captions = self._picture_unit(samples, unit, reads, encode, bar)
                cache.write_samples(self._path(name, unit[0] // self.unit), keys, captions)

    @torch.no_grad()
    def _picture_unit(
        self,
        samples: Encodable,
        unit: range,
        reads: Iterator[Read],
        encode: Callable[[Tensor], Tensor],
        bar: tqdm,
    ) -> tuple[list[bytes], list[list[bytes]]]:
        """Write the latents of a unit that are not known; (the keys of its samples, those of the captions of each)."""
        chunks = _Chunks(self.folder / cache.LATENTS, self.latent_dtype)
        waiting: dict[torch.Size, dict[bytes, Tensor]] = {}
        keys, captions, not_finite = [], [], set()

        def encode_all(batch: dict[bytes, Tensor]) -> None:
            latents = encode(torch.stack(list(batch.values()))) if batch else ()
            not_finite.update(
                key for key, latent in zip(batch, latents, strict=True) if not chunks.add(key, latent)
            )
            batch.clear()

        for index, read in zip(unit, reads, strict=False):  # the reads go on with the next unit
            if read.fault:
                _leave_out(samples, index, read.fault)
            if read.image is not None and read.key not in keys:
                batch = waiting.setdefault(read.image.shape, {})
                batch[read.key] = read.image
                if len(batch) * read.image[0].numel() >= _BATCH_PIXELS:
                    encode_all(batch)
            keys.append(read.key)
            captions.append([cache.caption_key(text) for text in read.captions])
            bar.update()
        for batch in waiting.values():
            encode_all(batch)
        chunks.flush()
        for place, key in enumerate(keys):
            if key in not_finite:
                _leave_out(samples, unit[place], "its latent is not finite")
                keys[place] = cache.NO_KEY
        return keys, captions

    @torch.no_grad()
    def _captions(self) -> None:
        """Encode the null caption, the validation prompts, and every caption of the sets once."""
        device = self.processes.device
        encoder = functools.cache(lambda: load_text_encoder(self.config, device))

        def encode(texts: dict[bytes, str], chunks: _Chunks) -> None:
            ordered = sorted(texts, key=lambda key: (len(texts[key]), key))  # little padding
            for start in range(0, len(ordered), _BATCH_CAPTIONS):
                keys = ordered[start : start + _BATCH_CAPTIONS]
                found = encoder().encode([texts[key] for key in keys])
                for key, embeds, mask in zip(keys, found.embeds, found.mask, strict=True):
                    if not chunks.add(key, embeds[mask.bool()][None]):
                        raise ValueError(f"the features of the caption {texts[key][:60]!r} are not finite")

        if self.processes.is_main_process:
            known = cache.known_keys(self.folder, cache.TEXTS)
            chunks = _Chunks(self.folder / cache.TEXTS, self.text_dtype)
            prompts = {cache.caption_key(text): text for text in self.config.train.validation_prompts}
            encode({key: text for key, text in prompts.items() if not _is_in(key, known)}, chunks)
            if not _is_in(cache.NULL_KEY, known):
                chunks.add(cache.NULL_KEY, encoder().encode_unconditional([""]).embeds)
            chunks.flush()
        self.processes.wait_for_everyone()
        captions = _Captions(self.sets, {name: list(self._units(name)) for name in self.sets}, self.unit)
        known = cache.known_keys(self.folder, cache.TEXTS)
        mine = self._dealt(
            len(captions),
            lambda unit: bool(cache.contained(captions.unit(unit), known).all()),
        )
        with self._progress("captions", mine) as bar:
            for unit in mine:
                chunks = _Chunks(self.folder / cache.TEXTS, self.text_dtype)
                texts = dict(captions.read(place) for place in unit)
                encode({key: text for key, text in texts.items() if not _is_in(key, known)}, chunks)
                chunks.flush()
                bar.update(len(unit))

    def _progress(self, what: str, mine: Sequence[range]) -> tqdm:
        total = sum(map(len, mine))
        return tqdm(
            desc=what, total=total, disable=not (total and self.processes.is_main_process), mininterval=1
        )


class _Captions:
    """The distinct captions of some sets, in the order in which they first come."""

    def __init__(
        self, sets: dict[str, Encodable], units: dict[str, list[tuple[Keys, Keys, np.ndarray]]], size: int
    ) -> None:
        self.sets, self.size = list(sets.values()), size
        keys, places = [cache.as_keys([])], [np.zeros((0, 3), np.int64)]
        for number, name in enumerate(sets):
            for unit, (_, captions, within) in enumerate(units[name]):
                keys.append(captions)
                places.append(
                    np.stack([np.full(len(within), number), within[:, 0] + unit * size, within[:, 1]], axis=1)
                )
        all_keys = np.concatenate(keys)
        first = np.sort(np.unique(all_keys, return_index=True)[1])
        self.keys, self._places = all_keys[first], np.concatenate(places)[first]

    def __len__(self) -> int:
        return len(self.keys)

    def unit(self, number: int) -> Keys:
        """The keys of a unit of them."""
        return self.keys[number * self.size : (number + 1) * self.size]

    def read(self, place: int) -> tuple[bytes, str]:
        """(key, caption), read from its sample.

        Raises:
            StaleCache: the sample has another one by now.
        """
        number, index, which = self._places[place].tolist()
        samples = self.sets[number]
        found = samples.captions(index)
        key = cache.caption_key(found[which].text) if which < len(found) else cache.NO_KEY
        if not _is_in(key, self.keys[place : place + 1]):
            raise StaleCache(f"the captions of {samples.label(index)} have changed; {cache.how_to_renew()}")
        return key, found[which].text


def _leave_out(samples: Encodable, index: int, reason: str) -> None:
    """Name a sample that cannot be encoded."""
    if samples.quarantine is None:
        raise ValueError(f"{samples.label(index)}: {reason}")
    samples.quarantine.add(samples.label(index), reason)


def _is_in(key: bytes, known: Keys) -> bool:
    return bool(cache.contained(cache.as_keys([key]), known)[0])


def _as_it_is(read: Read) -> Read:
    return read
