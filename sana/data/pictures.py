"""What a data set answers, and what all sets of picture files share: cutting, choosing a caption, naming the bad ones."""

from __future__ import annotations

import hashlib
import json
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from sana.data.buckets import Frame, header_size, load_picture
from sana.data.captions import Caption, CaptionChoice, assembled
from sana.data.quarantine import UNREADABLE, Quarantine, allowed
from sana.utils.files import write_atomic
from sana.utils.logging import get_logger
from sana.utils.seeding import derive_seed

log = get_logger(__name__)


class Samples(Protocol):
    """What a data set must answer. A sample that cannot be read raises `sana.data.quarantine.UNREADABLE`."""

    name: str
    """Says what the pictures are, as far as the sizes and times of files do: equal names, equal pictures."""
    quarantine: Quarantine | None
    """Where samples that cannot be read are named; None: the first one is an error."""

    def __len__(self) -> int: ...

    def label(self, index: int) -> str:
        """Where sample `index` comes from, for people."""

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) of training picture `index`, without reading it."""

    def image(self, index: int) -> Tensor:
        """(3, height, width) in [-1, 1]."""

    def captions(self, index: int) -> list[Caption]:
        """All captions of picture `index`, at least one."""

    def caption(self, index: int, epoch: int) -> str:
        """One of them, drawn from (seed, epoch, index)."""


class Encodable(Samples, Protocol):
    """Samples whose features can be kept."""

    captions_vary: bool
    """Whether `caption` may give what is not among `captions`: another text in each epoch."""

    def digest(self, index: int) -> bytes:
        """16 bytes that say what `image` gives: a hash of what that is made from."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How files become samples; the fields after `frame` are those of `sana.config.schema.DataConfig`."""

    frame: Frame
    choice: CaptionChoice = field(default_factory=CaptionChoice)
    seed: int = 0
    caption_suffixes: tuple[str, ...] = ()
    score_suffixes: tuple[str, ...] = ()
    minimal_score: float = 0.0
    """`del_img_clip_thr`: pictures whose own caption (kind `prompt`) scores below it are no samples."""
    hq_only: bool = False
    index_dir: Path | None = None
    """Folder for what is found out about files and cannot be kept beside them, so that the next start is quick; None:
    nowhere."""
    bad_limit: float = 0.01
    """Largest share of bad samples, of which one is always allowed above 0."""
    bad_file: Path | None = None

    @classmethod
    def of(cls, reading: Reading | int) -> Reading:
        """Itself; of a number: squares of that side."""
        return cls(frame=Frame(size=reading)) if isinstance(reading, int) else reading


class Pictures(ABC):
    """Samples that are picture files, or parts of files. A subclass lists them, then calls `_complete`."""

    caption_hint: str
    """What to do when there is no caption."""
    captions_vary = False

    def __init__(self, reading: Reading) -> None:
        self.reading = reading
        self.frame = reading.frame
        self._sizes: np.ndarray | None = None
        self.quarantine: Quarantine

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def label(self, index: int) -> str:
        """Path of picture `index`, or path of its shard and name in it."""

    @abstractmethod
    def content(self, index: int) -> Path | bytes:
        """The picture's file, or its bytes."""

    @abstractmethod
    def described(self, index: int) -> tuple[Mapping[str, str], Mapping[str, float]]:
        """Captions and their scores, each by kind."""

    def _headers(self, state: object) -> list[tuple[int, int] | str]:
        """(height, width) of each picture, or why it has none; kept in `index_dir` for files in this `state`."""

        def read(index: int) -> tuple[int, int] | str:
            try:
                return header_size(self.content(index))
            except UNREADABLE as error:
                return f"cannot read the picture: {error}"

        folder = self.reading.index_dir
        places = [] if folder is None else [folder / f"{derive_seed(state):016x}.json"]
        return indexed(places, state, lambda: [read(index) for index in range(len(self))])

    def _complete(
        self,
        kind: str,
        state: object,
        bad: Iterable[tuple[str, str]],
        sizes: Sequence[tuple[int, int]] | None,
    ) -> None:
        """Take what the subclass has found.

        Args:
            state: equal when the files are.
            bad: (label, reason) of what cannot be a sample; it is named, counted, and has no number.
            sizes: (height, width) of each picture; None without a table.
        """
        bad = list(bad)
        if len(self) == 0:
            reasons = "".join(f"; {label}: {reason}" for label, reason in bad[:3])
            raise ValueError(
                f"no sample is left after {len(bad)} that cannot be read and the filters data.del_img_clip_thr and "
                f"data.hq_only{reasons}"
            )
        limit = allowed(self.reading.bad_limit, len(self) + len(bad))
        self.quarantine = Quarantine(self.reading.bad_file, limit)
        for label, reason in bad:
            self.quarantine.add(label, reason)
        if sizes is not None:
            buckets = {size: self.frame.bucket(*size) for size in set(sizes)}
            self._sizes = np.array([buckets[size] for size in sizes], dtype=np.int32)
        self.name = f"{kind}-{self.frame.name}-{derive_seed(state):016x}"

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) of training picture `index`: its bucket."""
        if self._sizes is None:
            return self.frame.size, self.frame.size
        height, width = self._sizes[index].tolist()
        return height, width

    def digest(self, index: int) -> bytes:
        """16 bytes that say what picture `index` is: a hash of its file, its size and the filter of the resize.

        Raises:
            ValueError: the file cannot be read.
        """
        content = self.content(index)
        cut = repr((self.size(index), self.frame.resample.name)).encode()
        return hashlib.sha256(
            cut + (content if isinstance(content, bytes) else content.read_bytes())
        ).digest()[:16]

    def image(self, index: int) -> Tensor:
        """Picture `index`: (3, height, width) in [-1, 1].

        Raises:
            ValueError: it cannot be read.
        """
        return load_picture(self.content(index), self.size(index), self.frame.resample, self.label(index))

    def captions(self, index: int) -> list[Caption]:
        """The captions of picture `index`, with their scores where these are known.

        Raises:
            ValueError: there is none, or a file that should hold one cannot be read.
        """
        try:
            texts, scores = self.described(index)
        except UNREADABLE as error:
            raise ValueError(f"{self.label(index)}: {error}") from error
        try:
            return assembled(texts, scores)
        except ValueError as error:
            raise ValueError(f"{self.label(index)} {error}; {self.caption_hint}") from error

    def caption(self, index: int, epoch: int = 0) -> str:
        """One of the captions, drawn by the rule of `CaptionChoice` from (seed, epoch, index).

        Raises:
            ValueError: there is none.
        """
        captions = self.captions(index)
        source = random.Random(derive_seed("caption", self.reading.seed, epoch, index))
        try:
            return self.reading.choice.draw(captions, source).text
        except ValueError as error:
            raise ValueError(f"{self.label(index)} {error}") from error


def state_of(path: Path) -> tuple[str, int, int]:
    """What is on disk at a path: changes when the file is replaced by another of its name."""
    status = path.stat()
    return str(path.resolve()), status.st_size, status.st_mtime_ns


def indexed(places: Sequence[Path], state: object, build: Callable[[], Any]) -> Any:
    """What `build` finds out about files, kept as JSON in the first of `places` that can be written.

    A file that was written for another state, or that cannot be read, is built and written anew.
    """
    key = f"{derive_seed(state):016x}"
    for place in places:
        try:
            kept = json.loads(place.read_text(encoding="utf-8"))
            if kept["state"] == key:
                return kept["found"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
    # Through JSON also when it is fresh: what comes back is the same the first time and later.
    content = json.dumps({"state": key, "found": build()})
    for place in places:
        try:
            write_atomic(place, content.encode("utf-8"))
            break
        except OSError as error:
            log.info("no index at %s: %s", place, error)
    return json.loads(content)["found"]
