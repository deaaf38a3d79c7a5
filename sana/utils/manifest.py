"""The list of files in a folder: one JSON object a line, only ever added to, safe against kills and parallel writers.

While a process works it writes a part of its own (`manifest.rank0-....jsonl`, locked as long as the process lives);
`Manifest.merge` moves finished parts into `manifest.jsonl`. A line cut short by a kill is the last of its file and is
ignored. Every object has a key "file"; of two objects for one file the later counts.
"""

import fcntl
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

Row = dict[str, Any]


class Part:
    """What one process adds to a manifest; its file is made with the first line."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._folder, self._rank = folder, rank
        self._handle: BinaryIO | None = None

    def add(self, row: Row) -> None:
        """Write one line, at once."""
        self._handle = self._handle or self._open()
        self._handle.write(_line(row))
        self._handle.flush()

    def close(self) -> None:
        """Leave the part to the next merge."""
        if self._handle is not None:
            self._handle.close()

    def _open(self) -> BinaryIO:
        self._folder.mkdir(parents=True, exist_ok=True)
        while True:
            handle = open(self._folder / f"manifest.rank{self._rank}-{secrets.token_hex(4)}.jsonl", "xb")  # noqa: SIM115
            fcntl.flock(handle, fcntl.LOCK_EX)
            if os.fstat(handle.fileno()).st_nlink:
                return handle
            handle.close()  # a merge in another process took the file away before it was locked


class Manifest:
    """`manifest.jsonl` of `folder`, which need not exist yet."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.path = self.folder / "manifest.jsonl"

    def rows(self) -> dict[str, Row]:
        """File name -> its line, from the manifest and all parts.

        Raises:
            ValueError: a line is not what this class writes.
        """
        # Parts are read first: what a merge takes out of them meanwhile is in the manifest by then.
        parts = [row for path in self._parts() for row in _read(path)]
        return {row["file"]: row for row in [*_read(self.path), *parts]}

    @contextmanager
    def part(self, rank: int) -> Iterator[Part]:
        """A part to add lines to, of this process alone; without a line nothing is written."""
        part = Part(self.folder, rank)
        try:
            yield part
        finally:
            part.close()

    def merge(self) -> None:
        """Add the lines of all parts to the manifest, but of those whose process is still at work."""
        if not self._parts():
            return
        with open(self.path, "a+b") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)  # one merge at a time
            handle.seek(0)
            handle.truncate(handle.read().rfind(b"\n") + 1)  # a merge was killed: its part is still there
            finished = []
            for path in self._parts():
                part = open(path, "rb")  # noqa: SIM115 closed below: closing gives the lock back
                try:
                    fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    finished.append(part)
                except BlockingIOError:
                    part.close()
            rows = [row for part in finished for row in _read(Path(part.name))]
            rows.sort(key=lambda row: (row.get("index", 0), row.get("sample", 0)))
            handle.writelines(_line(row) for row in rows)
            handle.flush()
            os.fsync(handle.fileno())
            for part in finished:
                os.unlink(part.name)
                part.close()

    def _parts(self) -> list[Path]:
        return sorted(self.folder.glob("manifest.rank*.jsonl"))


def _line(row: Row) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode("utf-8") + b"\n"


def _read(path: Path) -> list[Row]:
    """The complete lines of a file, none where it does not exist."""
    try:
        *lines, _ = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}; mend or remove it") from error
        if not isinstance(row, dict) or "file" not in row:
            raise ValueError(f'{path}, line {number} is not an object with a "file"; mend or remove it')
        rows.append(row)
    return rows
