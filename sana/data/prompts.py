"""Prompt files: one prompt a line (txt), `{"id": {"prompt": "..."}}` (json), or a picture that holds its own (png)."""

import json
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One prompt of a file.

    Raises:
        ValueError: the text is no valid Unicode (json can spell half a character).
    """

    text: str
    """Stripped; may be empty, and may hold a size option (see `sana.resolution.parse_prompt_size`)."""
    index: int = 0
    """Position in the file, from 0; stays the same when only a part of the file is used."""
    key: str | None = None
    """The id in a json file."""
    seed: int | None = None
    """Of the noise of its first image; None is drawn from the run's seed and the index."""

    def __post_init__(self) -> None:
        for part in (self.text, self.key or ""):
            try:
                part.encode("utf-8")
            except UnicodeEncodeError as error:
                raise ValueError(f"half of a character ({error.reason}) in {part[:60]!a}") from error


def read_txt(path: str | Path) -> list[Prompt]:
    """Read a text file with one prompt a line. A blank line is an empty prompt (blank lines at the end are not).

    Raises:
        ValueError: no such file, not UTF-8, or no prompt in it.
    """
    lines = _read(path).rstrip().split("\n")
    if lines == [""]:
        raise ValueError(f"{path} holds no prompt; write one a line")
    return [Prompt(text=line.strip(), index=index) for index, line in enumerate(lines)]


def read_json(path: str | Path) -> list[Prompt]:
    """Read `{"id": {"prompt": "...", ...}, ...}`, in the order of the file; other fields are ignored.

    Raises:
        ValueError: no such file, not JSON (the message names the line), another form, or an id given twice.
    """
    try:
        entries = json.loads(_read(path), object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}, line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}"
        ) from error
    except _RepeatedId as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(entries, dict) or not entries:
        raise ValueError(f'{path} is not of the form {{"id": {{"prompt": "..."}}}}, or holds no prompt')
    prompts = []
    for index, (key, entry) in enumerate(entries.items()):
        if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
            raise ValueError(
                f'{path}: the entry {key!a} is not of the form {{"prompt": "..."}}: {str(entry)[:60]}'
            )
        try:
            prompts.append(Prompt(text=entry["prompt"].strip(), index=index, key=key))
        except ValueError as error:
            raise ValueError(f"{path}, entry {key!a}: {error}") from error
    return prompts


def read_picture(path: str | Path, *, with_seed: bool = True) -> tuple[Prompt, dict[str, Any]]:
    """What a PNG of `sana.generation` or of the server says of itself: its prompt, and the record of its settings.

    Args:
        with_seed: the prompt has the seed of the picture's noise.

    Raises:
        ValueError: no such file, or no PNG with these texts in it.
    """
    from PIL import Image  # lazy: command-line help needs no pictures

    try:
        with Image.open(path) as picture:
            text = picture.text
            record = json.loads(text["settings"])
            # The prompt may have had a size option.
            record |= {"height": picture.height, "width": picture.width}
        for key in ("interval_guidance", "timesteps"):
            record[key] = record[key] and tuple(record[key])
        return Prompt(text=text["prompt"], seed=int(text["seed"]) if with_seed else None), record
    except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f"no {error} in it" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} is no PNG that holds prompt, seed and settings: {reason}") from error


class _RepeatedId(Exception):
    """A JSON object has a key twice."""


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object; the later of two equal keys would silently replace the prompt of the first."""
    result: dict[str, object] = {}
    for key, value in pairs:
        if key in result:
            raise _RepeatedId(f"the id {key!a} is there twice")
        result[key] = value
    return result


def _read(path: str | Path) -> str:
    """The text of a UTF-8 file, with or without a byte-order mark, its line ends made "\\n"."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}): {error.reason}") from error
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error


# A key is a safe file name, and can be neither a name made from an index nor that of a further sample.
_SAFE_KEY = re.compile(r"(?!\d{5,}_)(?!.*-s\d+$)[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")


def file_stem(prompt: Prompt) -> str:
    """File name without extension: the key where it is safe, else index and a slug of the text ("00003_a-red-circle")."""
    if prompt.key is not None and _SAFE_KEY.fullmatch(prompt.key):
        return prompt.key
    ascii_text = unicodedata.normalize("NFKD", prompt.text[:1000]).encode("ascii", "ignore").decode()
    slug = re.sub(r"[^a-z0-9]+", "-", ascii_text.lower())[:60].strip("-")
    return f"{prompt.index:05d}_{slug or 'image'}"


def sample_stem(prompt: Prompt, sample: int) -> str:
    """`file_stem`, with the number of a further sample."""
    return f"{file_stem(prompt)}-s{sample}" if sample else file_stem(prompt)
