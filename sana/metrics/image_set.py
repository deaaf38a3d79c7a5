"""The pictures that a metric measures: which files, of which prompts, none forgotten and none too many."""

import json
import re
import struct
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from sana.utils.logging import get_logger
from sana.utils.manifest import Manifest, Row

log = get_logger(__name__)

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
"""What a picture's file ends in, in small letters."""

_BROKEN = (
    *(OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error),
    Image.DecompressionBombError,
)
"""What Pillow raises for a file that is no picture, or half of one."""


@dataclass(frozen=True, slots=True)
class ScoredImage:
    """One picture of a set."""

    path: Path
    name: str
    """Path in the folder, with "/": the same on every machine, and no two are equal."""
    prompt: str | None = None
    category: str | None = None
    prompt_index: int = 0
    """Place of the prompt in its file or manifest, from 0; of the picture in the folder where there are no prompts."""
    sample_index: int = 0
    """Which of the pictures of one prompt."""


@dataclass(frozen=True, slots=True)
class PromptEntry:
    """One prompt of a file; its index is its place."""

    text: str
    key: str | None = None
    """The id in a JSON file: the stem of the picture's name."""
    category: str | None = None


def open_image(path: str | Path, *, exif: bool = False) -> Image.Image:
    """A picture in RGB, read whole.

    Args:
        exif: turn it as its EXIF data say. The protocols of FID, CLIP score and the preference models do not.

    Raises:
        ValueError: the file is missing, truncated, or no picture; the message names it.
    """
    try:
        with Image.open(path) as picture:
            return (ImageOps.exif_transpose(picture) if exif else picture).convert("RGB")
    except _BROKEN as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ValueError(f"{path}: cannot be read as a picture, truncated or damaged ({reason})") from error


def read_prompts(path: str | Path) -> list[PromptEntry]:
    """Prompts of a .txt (one a line) or a .json: `{id: {"prompt": ..., "category": ...}}` as MJHQ-30K's meta_data.json,
    or `[{"id": ..., "prompt": ...}]` as ImageReward's.

    Raises:
        ValueError: no such file, another form, no prompt in it, or an id twice.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the prompts {path}: {error}") from error
    if path.suffix.lower() != ".json":
        entries = [PromptEntry(line.strip()) for line in text.rstrip().split("\n")] if text.strip() else []
    else:
        entries = _entries(path, text)
    if not entries:
        raise ValueError(f"{path} holds no prompt")
    return entries


def _entries(path: Path, text: str) -> list[PromptEntry]:
    """The prompts of a JSON text."""
    form = '{"id": {"prompt": "..."}} or [{"id": "...", "prompt": "..."}]'
    try:
        content = json.loads(text, object_pairs_hook=list)  # pairs, so that an id that is there twice is seen
        if content and isinstance(content[0], tuple):
            pairs = [(key, dict(entry)) for key, entry in content]
        else:
            pairs = [(entry["id"], entry) for entry in map(dict, content)]
        entries = [PromptEntry(_text(entry), str(key), _category(entry)) for key, entry in pairs]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not valid JSON: {error.msg}") from error
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ValueError(f"{path} is not of the form {form}: {error}") from error
    twice = [key for key, count in Counter(entry.key for entry in entries).items() if count > 1]
    if twice:
        raise ValueError(f"{path}: the id {twice[0]!a} is there twice")
    return entries


def _text(entry: dict[str, Any]) -> str:
    if not isinstance(entry["prompt"], str):
        raise ValueError(f"a prompt is a text, got {str(entry['prompt'])[:60]}")
    return entry["prompt"].strip()


def _category(entry: dict[str, Any]) -> str | None:
    category = entry.get("category")
    if not isinstance(category, str | None):
        raise ValueError(f"a category is a text, got {str(category)[:60]}")
    return category


def read_image_set(
    folder: str | Path,
    prompts: str | Path | Sequence[PromptEntry] | None = None,
    *,
    limit: int | None = None,
    allow_missing: bool = False,
) -> list[ScoredImage]:
    """The pictures of `folder` and its subfolders, each with its prompt, by prompt and sample.

    Which prompt a picture has is said by the manifest that scripts/inference.py writes; else by `prompts` and the file's
    name: `ID.jpg` or `ID_SAMPLE.jpg` for a prompt with an id, `00003_....png` and `00003_...-s1.png` for prompt 3.
    With neither, pictures have no prompt and are sorted by name.

    Args:
        prompts: a file for `read_prompts`, or the prompts.
        limit: only this many prompts (without prompts: pictures) from the first on; pictures of later ones are left out.
        allow_missing: log what is missing or too much, and go on with the rest.

    Raises:
        ValueError: no such folder, no picture in it, a prompt without its picture or with fewer than others have, a
            picture without a prompt or of another one; the message names the first and the count.
    """
    folder = Path(folder)
    files = _image_files(folder)
    rows = Manifest(folder).rows()
    if not isinstance(prompts, list | tuple):
        prompts = read_prompts(prompts) if prompts else None
    entries = prompts
    if entries is None and not rows:
        return [
            ScoredImage(path, name, prompt_index=place)
            for place, (name, path) in enumerate(list(files.items())[:limit])
        ]
    if entries is None:
        known = {row["index"]: PromptEntry(row["prompt"], row.get("key")) for row in rows.values()}
        owners = {name: (row["index"], row.get("sample", 0)) for name, row in rows.items()}
    else:
        known = dict(enumerate(entries))
        owners = _owners(files, rows, entries)
    wanted = sorted(known)[:limit]
    problems = [_listed("pictures without a prompt", sorted(files.keys() - owners.keys()), len(files))]
    chosen = set(wanted)
    owners = {name: owner for name, owner in owners.items() if owner[0] in chosen}
    lost = [name for name in owners if name not in files]
    problems.append(_listed("pictures of the manifest are not there", lost, len(owners)))
    found = sorted((*owner, name) for name, owner in owners.items() if name in files)
    problems += _uncovered(found, wanted, known)
    for problem in filter(None, problems):
        if not allow_missing:
            raise ValueError(f"{folder}: {problem}; --allow_missing measures the rest")
        log.warning("%s: %s; left out", folder, problem)
    if not found:
        raise ValueError(f"{folder}: none of its {len(files)} pictures belongs to a prompt")
    return [
        ScoredImage(files[name], name, known[index].text, known[index].category, index, sample)
        for index, sample, name in found
    ]


def require_prompts(items: Sequence[ScoredImage]) -> list[str]:
    """The prompts of all pictures.

    Raises:
        ValueError: one has none.
    """
    without = [item.name for item in items if item.prompt is None]
    if without:
        raise ValueError(
            f"{len(without)} of {len(items)} pictures have no prompt, {without[0]} the first: "
            "give a file of prompts (--prompts), or a folder with its manifest"
        )
    return [item.prompt or "" for item in items]


def described(items: Sequence[ScoredImage]) -> dict[str, Any]:
    """What a report says of the pictures: file formats with counts, and how they were made where a manifest says so."""
    formats = Counter(item.path.suffix.lower().lstrip(".") for item in items)
    folder = items[0].path.parents[items[0].name.count("/")]
    row = Manifest(folder).rows().get(items[0].name, {})
    generation = {"generation": row["settings"]} if "settings" in row else {}
    return {"formats": dict(sorted(formats.items()))} | generation


def _image_files(folder: Path) -> dict[str, Path]:
    """Name -> path of the pictures of a folder, sorted by name; what is hidden is left out."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder of pictures")
    paths = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    files = {path.relative_to(folder).as_posix(): path for path in paths}
    files = {name: files[name] for name in sorted(files) if not re.search(r"(^|/)\.", name)}
    if not files:
        raise ValueError(f"{folder}: no picture in it; expected files that end in {', '.join(SUFFIXES)}")
    return files


def _owners(
    files: dict[str, Path], rows: dict[str, Row], entries: Sequence[PromptEntry]
) -> dict[str, tuple[int, int]]:
    """Name -> (prompt, sample), of the pictures that have one among `entries`."""
    by_key = {entry.key: place for place, entry in enumerate(entries) if entry.key is not None}
    owners: dict[str, tuple[int, int]] = {}
    for name in rows or files:
        row = rows.get(name)
        if row is None:
            owner = _owner_by_name(Path(name).stem, by_key, len(entries))
        elif row.get("key") is not None and by_key:
            owner = (by_key[row["key"]], row["sample"]) if row["key"] in by_key else None
        else:
            owner = (row["index"], row["sample"]) if row["index"] < len(entries) else None
        if owner is None:
            continue
        text = entries[owner[0]].text
        # The manifest's text is without the options of size.
        if row is not None and row["prompt"] != text and "--" not in text:
            raise ValueError(f"{name} was drawn for {row['prompt'][:60]!r}, not for {text[:60]!r}")
        owners[name] = owner
    return owners


def _owner_by_name(stem: str, by_key: dict[str, int], count: int) -> tuple[int, int] | None:
    """(prompt, sample) that the name of a file says."""
    if stem in by_key:
        return by_key[stem], 0
    if (match := re.fullmatch(r"(.+?)(?:_|-s)(\d+)", stem)) and match[1] in by_key:
        return by_key[match[1]], int(match[2])
    match = re.fullmatch(r"(\d+)(?:_.*?)?(?:-s(\d+))?", stem)
    if match and not by_key and int(match[1]) < count:
        return int(match[1]), int(match[2] or 0)
    return None


def _uncovered(
    found: Sequence[tuple[int, int, str]], wanted: Sequence[int], known: dict[int, PromptEntry]
) -> list[str]:
    """What is wrong with the numbers of pictures."""
    samples = [(index, sample) for index, sample, _ in found]
    twice = [
        f"{first[2]} and {second[2]}"
        for first, second in zip(found, found[1:], strict=False)
        if first[:2] == second[:2]
    ]
    if twice:
        raise ValueError(f"two pictures are of one prompt and sample, {twice[0]}: remove one")
    counts = Counter(index for index, _ in samples)
    most = max(counts.values(), default=0)
    label = {index: known[index].key or f"number {index} ({known[index].text[:40]!r})" for index in wanted}
    none = [label[index] for index in wanted if not counts[index]]
    fewer = [f"{label[index]} ({counts[index]})" for index in wanted if 0 < counts[index] < most]
    return [
        _listed("prompts without their picture", none, len(wanted)),
        _listed(f"prompts with fewer than {most} pictures", fewer, len(wanted)),
    ]


def _listed(what: str, names: Sequence[str], total: int) -> str:
    """ "3 of 10 prompts without their picture, the first: NAME"; empty where there is none."""
    return f"{len(names)} of {total} {what}, the first: {names[0]}" if names else ""
