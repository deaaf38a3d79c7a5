"""Writing the sidecars that `sana.data.captions` reads: captions or their scores beside pictures and shards.

A picture of a folder has its own, `NAME<suffix>.json`; the samples of a shard share `SHARD<suffix>.json`. Both hold
`{"NAME": {"KIND": "text"}}`. A file is complete at any time. For a shard each process first appends to a journal,
`SHARD<suffix>.json.<rank>.part`, which `merge_journals` turns into the sidecar, also one that a killed run has left.
"""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from sana.data.captions import parsed
from sana.data.image_folder import ImageFolder
from sana.data.tar_shards import TarShards, split_member
from sana.utils import distributed
from sana.utils.files import write_atomic

PictureFiles = ImageFolder | TarShards
"""The data sets whose labels lie in sidecars."""

SCORE_END = "_clip_score"
"""What the suffixes of score files end in."""

_JOURNAL = re.compile(r"(.+)\.json\.\d+\.part")


def caption_suffix(kind: str) -> str:
    """The suffix under which captions of a kind are written."""
    return f"_{kind}"


def score_suffix(kind: str) -> str:
    """The suffix under which the CLIP scores of the captions of a kind are written.

    Raises:
        ValueError: the kind comes from a file and cannot be part of the name of one.
    """
    if re.search(r"[/\\\0]", kind):
        raise ValueError(f"no file can be named after captions of the kind {kind!r}")
    return f"_{kind}{SCORE_END}"


def place(samples: PictureFiles, index: int) -> tuple[Path, str]:
    """(what the paths of the sidecars of a sample begin with, its name in them)."""
    if isinstance(samples, TarShards):
        shard = samples.shards[samples.shard_of[index]]
        return shard.with_name(shard.stem), split_member(samples.members[index])[0]
    path = samples.paths[index]
    return path.with_name(path.stem), path.stem


def suffixes_beside(samples: PictureFiles) -> tuple[list[str], list[str]]:
    """The suffixes of captions and of scores that lie beside some samples, as far as they begin with "_"."""
    stems = defaultdict(set)
    for base in {place(samples, index)[0] for index in range(len(samples))}:
        stems[base.parent].add(base.name)
    found = set()
    for folder, known in stems.items():
        for name in os.listdir(folder):
            stem = name.removesuffix(".json")
            # From the right: with pictures a and a_b, the sidecar a_b_KIND.json is the latter's.
            cuts = [i for i in reversed(range(len(stem))) if stem[i] == "_" and stem[:i] in known]
            if stem != name and cuts:
                found.add(stem[cuts[0] :])
    scores = {suffix for suffix in found if suffix.endswith(SCORE_END)}
    return sorted(found - scores), sorted(scores)


def write_entry(samples: PictureFiles, index: int, suffix: str, entry: Mapping[str, str]) -> None:
    """Keep the new entry of a sample. When a caption is written, its score goes: it was that of another caption.

    Raises:
        ValueError: the file that is there is no such JSON; it is left as it is.
    """
    base, key = place(samples, index)
    path = base.with_name(f"{base.name}{suffix}.json")
    if isinstance(samples, TarShards):
        line = json.dumps({key: entry}, ensure_ascii=False) + "\n"
        with open(path.with_name(f"{path.name}.{distributed.rank()}.part"), "ab") as journal:
            journal.write(line.encode())
    else:
        _update(path, {key: entry})


def merge_journals(samples: PictureFiles, ends: Sequence[str]) -> None:
    """Turn the journals of sidecars whose suffix has one of these ends into these sidecars. For one process alone.

    Raises:
        ValueError: a sidecar that is there is no such JSON.
    """
    if isinstance(samples, ImageFolder):
        return
    journals = defaultdict(list)
    for folder in {shard.parent for shard in samples.shards}:
        for path in folder.glob("*.part"):
            match = _JOURNAL.fullmatch(path.name)
            if match and match[1].endswith(tuple(ends)):
                journals[path.with_name(f"{match[1]}.json")].append(path)
    for sidecar, paths in journals.items():
        entries: dict[str, Any] = {}
        for path in paths:
            for line in path.read_bytes().splitlines():
                try:
                    entries |= json.loads(line)
                except ValueError:  # the last line of a killed process: its sample counts as not done
                    continue
        _update(sidecar, entries)
        for path in paths:
            path.unlink()


def _update(sidecar: Path, entries: Mapping[str, Mapping[str, str]]) -> None:
    """Put entries into a sidecar, and void the scores of these captions first: no old score stays with a new caption."""
    if not sidecar.stem.endswith(SCORE_END):
        _forget(sidecar.with_name(f"{sidecar.stem}{SCORE_END}.json"), entries.keys())
    stored = _stored(sidecar)
    _store(sidecar, stored | {key: stored.get(key, {}) | entry for key, entry in entries.items()})


def _forget(sidecar: Path, keys: Collection[str]) -> None:
    stored = _stored(sidecar)
    kept = {key: entry for key, entry in stored.items() if key not in keys}
    if stored and not kept:
        sidecar.unlink()
    elif len(kept) < len(stored):
        _store(sidecar, kept)


def _stored(sidecar: Path) -> dict[str, Any]:
    return dict(parsed(sidecar.read_bytes(), None, str(sidecar))) if sidecar.is_file() else {}


def _store(sidecar: Path, entries: Mapping[str, Any]) -> None:
    write_atomic(sidecar, (json.dumps(entries, indent=1, ensure_ascii=False) + "\n").encode("utf-8"))
