"""Samples that cannot be read: named in a file, counted over all processes, fatal beyond a limit.

What a bad sample does to the order: nothing. Its place in a batch is taken by the next readable sample of the same size,
in the order of sample numbers, from the first again after the last. That is a function of what is on disk alone, so every
process, on any number of them and after a resume, puts the same sample there.
"""

import json
import os
import struct
import tarfile
import zlib
from pathlib import Path

from PIL import Image
from safetensors import SafetensorError

from sana.utils.logging import get_logger

log = get_logger(__name__)

UNREADABLE = (
    OSError,
    ValueError,
    EOFError,
    SyntaxError,  # PIL, for a broken PNG chunk
    struct.error,
    zlib.error,
    tarfile.TarError,
    SafetensorError,
    Image.DecompressionBombError,
)
"""What readers of pictures, captions, shards and caches raise for broken content. Anything else is our own mistake."""


class DataError(ValueError):
    """The data as a whole is wrong, not one sample: the run ends."""

    def __str__(self) -> str:
        # A loader's worker hands it on with the worker's traceback before the message, which is for people.
        return super().__str__().rpartition(f"{type(self).__name__}: ")[2].strip()


class TooManyBadSamples(DataError):
    """More samples cannot be read than `data.bad_sample_limit` allows."""


def allowed(share: float, samples: int) -> int:
    """How many of `samples` may be bad under `data.bad_sample_limit`: that share, but one where it is above 0."""
    return max(int(share * samples), 1) if share > 0 else 0


class Quarantine:
    """The bad samples of a run.

    Args:
        path: a JSON-lines file, `{"sample": ..., "reason": ...}`, to which every process appends; None: remembered only.
        limit: how many different samples may be bad.
    """

    def __init__(self, path: Path | None, limit: int) -> None:
        self.path, self.limit = path, limit
        self.reasons: dict[str, str] = {}

    def add(self, sample: str, reason: object) -> None:
        """Name a bad sample once in this process: in the log and, unless it is there, in the file.

        Raises:
            TooManyBadSamples: with it there are more than the limit, those that other processes found included.
        """
        if sample in self.reasons:
            return
        known = self._in_file() | set(self.reasons)
        self.reasons[sample] = " ".join(str(reason).split())
        if sample not in known:
            log.warning("left out %s: %s", sample, self.reasons[sample])
            self._append(sample)
            known.add(sample)
        if len(known) > self.limit:
            where = f", named in {self.path}" if self.path else f": {', '.join(sorted(known))}"
            raise TooManyBadSamples(
                f"{len(known)} samples cannot be read, more than the {self.limit} that data.bad_sample_limit allows{where}"
                f"{' (delete it once they are mended)' if self.path else ''}; the last one is {sample}: {self.reasons[sample]}"
            )

    def _in_file(self) -> set[str]:
        """The samples that any process has named so far."""
        if self.path is None or not self.path.is_file():
            return set()
        return {_name(line) for line in self.path.read_text(encoding="utf-8").splitlines()}

    def _append(self, sample: str) -> None:
        if self.path is None:
            return
        line = (
            json.dumps({"sample": sample, "reason": self.reasons[sample][:1000]}, ensure_ascii=False) + "\n"
        )
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # One write to a file opened for appending: lines of several processes do not mix.
            handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(handle, line.encode("utf-8", "replace"))
            finally:
                os.close(handle)
        except OSError as error:  # a full disk must not end the run over a sample; the log has named it
            log.warning("cannot write %s: %s", self.path, error)


def _name(line: str) -> str:
    try:
        return json.loads(line)["sample"]
    except (ValueError, KeyError, TypeError):  # a line cut by a full disk still counts
        return line
