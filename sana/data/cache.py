"""Features on disk: latents of pictures and hidden states of captions, each under a hash of what it was made from.

    about.json                   what the features are of, and what made them; `sana/training/features.py` compares it
    latents/<hash>.safetensors   chunks of features
    texts/<hash>.safetensors
    samples/<set>/000012.safetensors   keys of the 13th thousand of a data set's samples, and of their captions
    index.safetensors            where each feature lies; written last, so without it the cache is not complete

A feature is (h, w, C): a latent with its channels last, or a text as (1, tokens, C), without padding. A chunk holds "rows"
(all rows of all features, C), "shapes" (features, 2) and "keys" (features, 16). Files are written whole or not at all, and
never changed. A key says what a feature was made from, so equal pictures and equal captions have one feature.

This file alone knows the format. It reads without any model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sana.data.captions import Caption
from sana.data.pictures import Samples
from sana.data.quarantine import DataError
from sana.utils.files import write_atomic

FORMAT = 1
ABOUT, INDEX = "about.json", "index.safetensors"
LATENTS, TEXTS, SAMPLES = "latents", "texts", "samples"
KEY = 16  # bytes
NO_KEY = bytes(KEY)
"""In place of the key of a sample that cannot be read."""
NULL_KEY = hashlib.sha256(b"null caption").digest()[:KEY]
_OPEN_CHUNKS = 256  # mapped at once by a process
Keys = np.ndarray
"""(n,) of dtype S16."""


class StaleCache(DataError):
    """The cache does not hold the features that this run needs."""


def caption_key(caption: str) -> bytes:
    """The key of a caption's features."""
    return hashlib.sha256(b"caption " + caption.encode("utf-8", "surrogatepass")).digest()[:KEY]


def as_keys(found: Iterable[bytes]) -> Keys:
    """Keys as an array."""
    return np.frombuffer(b"".join(found), dtype=f"S{KEY}")


# Writing


def write_chunk(folder: Path, features: dict[bytes, Tensor]) -> Path:
    """Write features (h, w, C) of one dtype, by their keys, as one file."""
    shapes = torch.tensor([feature.shape[:2] for feature in features.values()], dtype=torch.int32)
    rows = torch.cat([feature.flatten(0, 1) for feature in features.values()]).contiguous()
    content = {"rows": rows, "shapes": shapes, "keys": _tensor(as_keys(features))}
    name = hashlib.sha256(b"".join(features)).hexdigest()[:KEY]
    return write_atomic(folder / f"{name}.safetensors", save(content))


def write_samples(path: Path, pictures: Sequence[bytes], captions: Sequence[Sequence[bytes]]) -> None:
    """Write the keys of some samples and of the captions of each."""
    owners = [place for place, keys in enumerate(captions) for _ in keys]
    numbers = [number for keys in captions for number in range(len(keys))]
    content = {
        "pictures": _tensor(as_keys(pictures)),
        "captions": _tensor(as_keys(key for keys in captions for key in keys)),
        "places": torch.tensor([owners, numbers], dtype=torch.int32).T.contiguous(),
    }
    write_atomic(path, save(content))


def read_samples(path: Path) -> tuple[Keys, Keys, np.ndarray]:
    """(pictures, captions, places (captions, 2): the sample among these, and which of its captions)."""
    found = _opened(path)
    pictures, captions = (_keys(found.get_tensor(name)) for name in ("pictures", "captions"))
    return pictures, captions, found.get_tensor("places").numpy()


def chunk_files(folder: Path, kind: str) -> list[Path]:
    """The chunks of a kind, `LATENTS` or `TEXTS`."""
    return sorted((folder / kind).glob("*.safetensors"))


def read_keys(path: Path) -> Keys:
    """The keys in a chunk.

    Raises:
        ValueError: it is broken.
    """
    return _keys(_opened(path).get_tensor("keys"))


def known_keys(folder: Path, kind: str) -> Keys:
    """The keys of all features of a kind, sorted."""
    return np.unique(np.concatenate([as_keys([]), *map(read_keys, chunk_files(folder, kind))]))


def contained(keys: Keys, known: Keys) -> np.ndarray:
    """(n,) bool: which of `keys` are in the sorted `known`."""
    return _positions(keys, known) >= 0


def write_index(folder: Path, sets: dict[str, Keys]) -> None:
    """Complete the cache: write down where each feature lies, and which picture each sample of each set is."""
    files = chunk_files(folder, LATENTS) + chunk_files(folder, TEXTS)
    found = [read_keys(file) for file in files]
    places = [
        np.stack([np.full(len(keys), number), np.arange(len(keys))], axis=1)
        for number, keys in enumerate(found)
    ]
    keys, first = np.unique(np.concatenate([as_keys([]), *found]), return_index=True)
    where = np.concatenate([np.zeros((0, 2), int), *places])[first].astype(np.int32)
    content = {"keys": _tensor(keys), "places": torch.from_numpy(where)}
    for name, pictures in sets.items():
        positions = _positions(pictures, keys)
        assert ((positions >= 0) | (pictures == NO_KEY)).all(), f"features of {name} are missing"
        content[f"set {name}"] = torch.from_numpy(positions)
    listed = [[file.relative_to(folder).as_posix(), file.stat().st_size] for file in files]
    write_atomic(folder / INDEX, save(content, {"files": json.dumps(listed)}))


# Reading


class FeatureCache:
    """A complete cache, read by place: chunks are mapped into memory when they are first needed.

    Raises:
        ValueError: there is no index, or it is broken.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        index = _opened(self.folder / INDEX)
        self.files = [(self.folder / name, size) for name, size in json.loads(index.metadata()["files"])]
        self._keys = _keys(index.get_tensor("keys"))
        self._places = index.get_tensor("places").numpy()
        self._sets = {
            name.removeprefix("set "): index.get_tensor(name).numpy()
            for name in index.keys()  # noqa: SIM118 not a dict
            if name.startswith("set ")
        }
        self._chunk = lru_cache(maxsize=_OPEN_CHUNKS)(_Chunk)

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, key: bytes) -> bool:
        return self._find(key) >= 0

    @property
    def has_texts(self) -> bool:
        """Whether there are text features."""
        return NULL_KEY in self

    def broken(self) -> list[Path]:
        """The files that are not there, or not as long as when they were written."""
        return [path for path, size in self.files if not path.is_file() or path.stat().st_size != size]

    def pictures(self) -> dict[str, Keys]:
        """Set -> the keys of its samples."""
        return {
            name: np.where(positions >= 0, self._keys[positions], NO_KEY)
            for name, positions in self._sets.items()
        }

    def of(self, name: str, samples: Samples) -> CachedSamples:
        """The set `name`, which is `samples`, with latents in place of pictures."""
        assert len(samples) == len(self._sets[name])
        return CachedSamples(samples, self, name)

    def latent(self, name: str, index: int) -> Tensor:
        """The scaled latent (C, h, w) of a sample of a set, in the stored dtype.

        Raises:
            ValueError: the picture could not be read when the cache was made, or the cache's file cannot be.
        """
        position = int(self._sets[name][index])
        if position < 0:
            raise ValueError(
                "has no latent: it could not be read when the cache was made (scripts/extract_features.py --renew tries again)"
            )
        return self._feature(position).permute(2, 0, 1).contiguous()

    def text(self, caption: str) -> Tensor:
        """The hidden states (tokens, C) of a caption, in the stored dtype.

        Raises:
            StaleCache: it is not there.
            ValueError: the cache's file cannot be read.
        """
        position = self._find(caption_key(caption))
        if position < 0:
            raise StaleCache(
                f"{self.folder} has no features of the caption {caption[:60]!r}: captions have changed since it was made; "
                f"{how_to_renew()}"
            )
        return self._feature(position)[0]

    def null(self) -> Tensor:
        """The hidden states (max_length, C) of the null caption, those of its padding among them."""
        return self._feature(self._find(NULL_KEY))[0]

    def _find(self, key: bytes) -> int:
        return int(_positions(as_keys([key]), self._keys)[0])

    def _feature(self, position: int) -> Tensor:
        file, place = self._places[position].tolist()
        return self._chunk(self.files[file][0]).feature(place)


class CachedSamples:
    """A data set whose pictures are latents of a cache."""

    def __init__(self, samples: Samples, cache: FeatureCache, set_name: str) -> None:
        self.samples, self.cache, self.set_name = samples, cache, set_name
        self.name, self.quarantine = samples.name, samples.quarantine

    def __len__(self) -> int:
        return len(self.samples)

    def label(self, index: int) -> str:
        """Where picture `index` comes from."""
        return self.samples.label(index)

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) of picture `index`, in pixels."""
        return self.samples.size(index)

    def image(self, index: int) -> Tensor:
        """The scaled latent (C, h, w) of picture `index`. Raises as `FeatureCache.latent`."""
        try:
            return self.cache.latent(self.set_name, index)
        except ValueError as error:
            raise ValueError(f"{self.label(index)}: {error}") from error

    def captions(self, index: int) -> list[Caption]:
        """All captions of picture `index`."""
        return self.samples.captions(index)

    def caption(self, index: int, epoch: int) -> str:
        """One caption of picture `index`."""
        return self.samples.caption(index, epoch)


def how_to_renew() -> str:
    """What to do about a stale cache."""
    return (
        "make it anew: python scripts/extract_features.py --renew --config_path=CONFIG, with the keys of the training; "
        "or name another folder: --train.feature_cache_dir=DIR"
    )


class _Chunk:
    def __init__(self, path: Path) -> None:
        self.path, self._file = path, _opened(path)
        shapes = self._file.get_tensor("shapes").long()
        self.shapes, ends = shapes.tolist(), shapes.prod(dim=1).cumsum(0)
        self.starts = (ends - shapes.prod(dim=1)).tolist()

    def feature(self, place: int) -> Tensor:
        height, width = self.shapes[place]
        start = self.starts[place]
        # A copy: what is given away must not hold the file's memory.
        rows = self._file.get_slice("rows")[start : start + height * width].clone()
        return rows.view(height, width, -1)


def _opened(path: Path) -> safe_open:
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"the cache file {path} cannot be read: {error}; scripts/extract_features.py makes it anew"
        ) from error


def _positions(keys: Keys, known: Keys) -> np.ndarray:
    """(n,) the place of each key among the sorted `known`, -1 where it is not there."""
    if not len(known):
        return np.full(len(keys), -1)
    places = np.minimum(np.searchsorted(known, keys), len(known) - 1)
    return np.where(known[places] == keys, places, -1)


def _tensor(keys: Keys) -> Tensor:
    return torch.from_numpy(np.frombuffer(keys.tobytes(), dtype=np.uint8).reshape(-1, KEY).copy())


def _keys(tensor: Tensor) -> Keys:
    return as_keys([tensor.numpy().tobytes()])
