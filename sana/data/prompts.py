"""Prompt files: one prompt a line (txt), or `{"id": {"prompt": "..."}}` (json)."""

import json
from dataclasses import dataclass
from pathlib import Path


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
