"""Tar shards in webdataset's layout: `KEY.json` + `KEY.{png,jpg,jpeg,webp}` (+ `KEY.txt`), read anywhere by offset.

A shard is walked once; where its members lie is kept as JSON beside it. `wids-meta.json` is read when a folder has one
(it lists the shards), and not needed. Nothing is unpacked, mapped or shared between processes.
"""

from __future__ import annotations

import json
import re
import tarfile
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sana.data.buckets import header_size
from sana.data.captions import parsed, scores_of, texts_of
from sana.data.image_folder import EXTENSIONS
from sana.data.pictures import Pictures, Reading, indexed, state_of
from sana.data.quarantine import UNREADABLE
from sana.utils.logging import get_logger
from sana.utils.seeding import derive_seed

log = get_logger(__name__)

META = "wids-meta.json"
INDEX_VERSION = 1
# Columns of the index of a shard: where the parts of a sample lie, its picture's size, whether it is marked high_quality.
PICTURE, JSON, TEXT, HEIGHT, WIDTH, HIGH_QUALITY, COLUMNS = 0, 2, 4, 6, 7, 8, 9


class TarShards(Pictures):
    """The samples of the shards in some folders, shard after shard.

    Args:
        sort_shards: by the numbers in their names, instead of in the order of wids-meta.json.

    Raises:
        ValueError: no such folder, no shard in it, one that wids-meta.json names is not there, or a sidecar is broken.
    """

    caption_hint = (
        'write {"prompt": ...} in KEY.json of the shard, or name the suffixes of SHARD<suffix>.json'
    )

    def __init__(
        self, folders: Sequence[str | Path], reading: Reading | int, *, sort_shards: bool = False
    ) -> None:
        super().__init__(Reading.of(reading))
        found = [shard for folder in folders for shard in _shards(Path(folder), sort_shards)]
        self.shards = [path for path, _ in found]
        self.members: list[str] = []
        self._texts = [_Ranges(suffix) for suffix in self.reading.caption_suffixes]
        self._scores = [_Ranges(suffix) for suffix in self.reading.score_suffixes]
        bad: list[tuple[str, str]] = []
        columns, shard_of = [], []
        for number, (path, promised) in enumerate(found):
            members, table, faults = self._shard(path)
            bad += faults
            if promised is not None and len(members) + len(faults) < promised:
                bad.append((str(path), f"{META} promises {promised} samples, {len(members)} are there"))
            kept = self._wanted(path, members, table)
            self.members += [members[place] for place in kept]
            columns.append(table[kept])
            shard_of += [number] * len(kept)
            keys = [split_member(members[place])[0] for place in kept]
            for ranges in (*self._texts, *self._scores):
                ranges.add(path, keys)
        self._columns = np.concatenate(columns) if columns else np.zeros((0, COLUMNS), np.int64)
        self.shard_of = np.array(shard_of, dtype=np.int32)
        sizes = None
        if self.frame.table is not None:
            sizes = [tuple(size) for size in self._columns[:, [HEIGHT, WIDTH]].tolist()]
        settings = (self.reading.hq_only, self.reading.minimal_score)
        self._complete("shards", ([state_of(path) for path in self.shards], settings), bad, sizes)

    def __len__(self) -> int:
        return len(self.members)

    def label(self, index: int) -> str:
        """Path of the shard and, behind a "/", the picture's name in it."""
        return f"{self.shards[self.shard_of[index]]}/{self.members[index]}"

    def content(self, index: int) -> bytes:
        return self._part(index, PICTURE)

    def _part(self, index: int, column: int) -> bytes:
        start, length = self._columns[index, column : column + 2].tolist()
        return _read(self.shards[self.shard_of[index]], start, length)

    def described(self, index: int) -> tuple[Mapping[str, str], Mapping[str, float]]:
        name = self.label(index)
        texts: dict[str, str] = {}
        if self._columns[index, TEXT]:
            lines = self._part(index, TEXT).decode("utf-8-sig").strip().splitlines()
            texts["prompt"] = lines[0] if lines else ""
        own = (
            parsed(self._part(index, JSON), None, f"the JSON of {name}") if self._columns[index, JSON] else {}
        )
        shard = self.shards[self.shard_of[index]]
        scores: dict[str, float] = {}
        for ranges in self._scores:
            scores |= scores_of(ranges.read(index, shard), f"{shard.stem}{ranges.suffix}.json")
        # Of the other fields of KEY.json only those are captions that have a score or a weight.
        kinds = {"prompt", *scores, *self.reading.choice.proportion}
        texts |= {kind: text for kind, text in texts_of(own).items() if kind in kinds}
        for ranges in self._texts:
            texts |= texts_of(ranges.read(index, shard))
        return texts, scores

    def _shard(self, path: Path) -> tuple[list[str], np.ndarray, list[tuple[str, str]]]:
        """(names of the pictures, their columns, what is bad) of a shard, from its index where there is one."""
        state = (INDEX_VERSION, state_of(path)[1:])
        places = [path.with_name(f"{path.name}.index.json")]
        if self.reading.index_dir is not None:
            spare = f"{path.stem}-{derive_seed(str(path.resolve())):016x}.index.json"
            places.append(self.reading.index_dir / spare)
        found = indexed(places, state, lambda: _walked(path))
        table = np.array(found["columns"], dtype=np.int64).reshape(-1, COLUMNS)
        return (
            found["members"],
            table,
            [(f"{path}/{member}".rstrip("/"), reason) for member, reason in found["bad"]],
        )

    def _wanted(self, path: Path, members: Sequence[str], table: np.ndarray) -> list[int]:
        """Places of the samples of a shard that `hq_only` and `del_img_clip_thr` leave."""
        kept = range(len(members))
        if self.reading.hq_only:
            kept = [place for place in kept if table[place, HIGH_QUALITY]]
        sidecar = path.with_name(f"{path.stem}_prompt_clip_score.json")
        if self.reading.minimal_score > 0 and sidecar.is_file():
            entries = parsed(sidecar.read_bytes(), None, str(sidecar))
            own = {key: scores_of(entry, str(sidecar)).get("prompt", 100.0) for key, entry in entries.items()}
            least = self.reading.minimal_score
            kept = [place for place in kept if own.get(split_member(members[place])[0], 100.0) >= least]
        return list(kept)


@dataclass
class _Ranges:
    """Where in the sidecars `SHARD<suffix>.json` the entry of each sample lies: start, length; 0, 0 where it has none."""

    suffix: str
    ranges: array = field(default_factory=lambda: array("q"))

    def add(self, shard: Path, keys: Sequence[str]) -> None:
        """Take the sidecar of the next shard, whose samples have these keys."""
        sidecar = self._path(shard)
        found = {}
        if sidecar.is_file():
            try:
                found = entry_ranges(sidecar.read_bytes())
            except ValueError as error:
                raise ValueError(f"{sidecar} is not a JSON object: {error}") from error
        for key in keys:
            self.ranges.extend(found.get(key, (0, 0)))

    def read(self, index: int, shard: Path) -> Mapping[str, Any]:
        """The entry of a sample, {} where it has none."""
        start, length = self.ranges[2 * index : 2 * index + 2]
        if not length:
            return {}
        return parsed(_read(self._path(shard), start, length), None, f"an entry of {self._path(shard)}")

    def _path(self, shard: Path) -> Path:
        return shard.with_name(f"{shard.stem}{self.suffix}.json")


def entry_ranges(content: bytes) -> dict[str, tuple[int, int]]:
    """Key -> (start, length) in bytes of the values of a JSON object, so that one can be read without the others.

    Raises:
        ValueError: it is no JSON object.
    """
    # One character a byte, so that places in the text are places in the file; the structure of JSON is ASCII.
    text = content.decode("latin-1")
    decoder = json.JSONDecoder()

    def after_space(position: int) -> int:
        return _SPACE.match(text, position).end()

    def expect(character: str, position: int) -> int:
        if text[position : position + 1] != character:
            raise ValueError(f"{character!r} is missing at byte {position}")
        return after_space(position + 1)

    ranges: dict[str, tuple[int, int]] = {}
    position = expect("{", after_space(3 if content.startswith(b"\xef\xbb\xbf") else 0))
    while text[position : position + 1] != "}":
        if ranges:
            position = expect(",", position)
        end = decoder.raw_decode(text, position)[1]
        key = json.loads(content[position:end])
        position = expect(":", after_space(end))
        end = decoder.raw_decode(text, position)[1]
        ranges[key] = position, end - position
        position = after_space(end)
    return ranges


_SPACE = re.compile(r"[ \t\r\n]*")


def _read(path: Path, start: int, length: int) -> bytes:
    with open(path, "rb") as handle:
        handle.seek(start)
        content = handle.read(length)
    if len(content) < length:
        raise ValueError(f"{path} ends {length - len(content)} bytes early")
    return content


def _shards(folder: Path, in_order_of_numbers: bool) -> list[tuple[Path, int | None]]:
    """The shards of a folder and how many samples wids-meta.json promises of each, where it does."""
    if not folder.is_dir():
        raise ValueError(f"no such folder of tar shards: {folder}")
    shards: list[tuple[Path, int | None]] = [(path, None) for path in sorted(folder.glob("*.tar"))]
    meta = folder / META
    if meta.is_file():
        listed = parsed(meta.read_bytes(), None, str(meta)).get("shardlist")
        if not isinstance(listed, list) or not all(
            isinstance(shard, dict) and isinstance(shard.get("url"), str) for shard in listed
        ):
            raise ValueError(f'{meta} has no "shardlist" of {{"url": ..., "nsamples": ...}}')
        shards = [(folder / shard["url"], shard.get("nsamples")) for shard in listed]
        for path, _ in shards:
            if not path.is_file():
                raise ValueError(f"{meta} names {path.name}, and there is no such file: {path}")
    if not shards:
        raise ValueError(f"no tar shard in {folder}; for a folder of pictures set --data.type=SanaImgDataset")
    if in_order_of_numbers:
        shards.sort(key=lambda shard: [int(number) for number in re.findall(r"\d+", shard[0].stem)])
    return shards


def _walked(path: Path) -> dict[str, list]:
    """The index of a shard: members (names of pictures), columns, and bad ([name, reason])."""
    log.info("indexing %s", path)
    members, columns, bad = [], [], []
    length = path.stat().st_size
    for key, parts in _grouped(path, bad):
        picture = next((part for end, part in parts.items() if f".{end.lower()}" in EXTENSIONS), None)
        if picture is None:
            bad.append([key, f"has no picture ({', '.join(EXTENSIONS)}), only {', '.join(parts)}"])
            continue
        try:
            for part in parts.values():
                if part.offset_data + part.size > length:
                    raise ValueError(f"the shard ends inside {part.name}")
            columns.append(_row(path, picture, parts))
            members.append(picture.name)
        except UNREADABLE as error:
            bad.append([picture.name, str(error)])
    return {"members": members, "columns": columns, "bad": bad}


def _row(path: Path, picture: tarfile.TarInfo, parts: Mapping[str, tarfile.TarInfo]) -> list[int]:
    """The columns of one sample; its size is that of KEY.json where it is there, else of the picture's header."""
    empty = tarfile.TarInfo()
    described, text = parts.get("json", empty), parts.get("txt", empty)
    own: Mapping[str, Any] = {}
    if described.size:
        own = parsed(_read(path, described.offset_data, described.size), None, described.name)
    size = own.get("height"), own.get("width")
    if not all(isinstance(side, int) and side > 0 for side in size):
        size = header_size(_read(path, picture.offset_data, picture.size))
    row = [0] * COLUMNS
    for column, part in ((PICTURE, picture), (JSON, described), (TEXT, text)):
        row[column : column + 2] = part.offset_data, part.size
    row[HEIGHT], row[WIDTH] = size
    row[HIGH_QUALITY] = int(own.get("version") == "high_quality")
    return row


def _grouped(path: Path, bad: list[list[str]]) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """(key, extension -> member) of each sample: neighbours with one key. What cannot be walked goes to `bad`."""
    key, parts = "", {}
    for member in _members(path, bad):
        found, extension = split_member(member.name)
        if not (member.isfile() and extension) or found.startswith("__"):  # "__": webdataset's own remarks
            continue
        if found != key and parts:
            yield key, parts
            parts = {}
        key = found
        parts[extension.lower()] = member
    if parts:
        yield key, parts


def _members(path: Path, bad: list[list[str]]) -> Iterator[tarfile.TarInfo]:
    """The members of a tar up to its end, or to where it breaks off; tarfile itself stops at a broken header in silence."""
    try:
        with tarfile.open(path, "r:") as archive:
            while (member := archive.next()) is not None:
                archive.members.clear()  # it would keep all of them
                yield member
            archive.fileobj.seek(archive.offset)
            if archive.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
                bad.append([f"@{archive.offset}", "no tar header here; what follows cannot be read"])
    except tarfile.TarError as error:
        bad.append(["", f"the shard cannot be read to its end: {error}"])


def split_member(member: str) -> tuple[str, str]:
    """(key, extension) of a member as webdataset has it: the base name is cut at its first dot."""
    folder, slash, base = member.rpartition("/")
    stem, _, extension = base.partition(".")
    return (folder + slash + stem, extension) if stem else (member, "")
