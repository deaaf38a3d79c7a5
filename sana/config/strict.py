"""The strict check of a layer (one file, one override): every key is known, every value has its field's type.

pyrallis takes 1.7 for an integer and "nope" for a boolean, and does not name an unknown key; this does.
"""

import dataclasses
import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args, get_origin

from sana.config.kinds import check_type, got, options
from sana.config.published import INERT, RENAMED, RENAMED_VALUES
from sana.config.schema import SanaConfig
from sana.config.yaml_io import ConfigError

Tree = dict[str, Any]
COMMAND_LINE = "command line"


@dataclass(frozen=True, slots=True)
class Setting:
    """What a dotted key stands for."""

    annotation: Any
    """Type of its value."""
    path: tuple[str, ...]
    """The field: names from the top."""
    entry: str
    """Key in the field's mapping; empty when the field itself is meant."""


def find(key: str, source: str) -> Setting:
    """The setting of a dotted key, old names too.

    Raises:
        ConfigError: there is none.
    """
    parts = tuple((RENAMED[key].new if key in RENAMED else key).split("."))
    cls: type = SanaConfig
    for depth, part in enumerate(parts, start=1):
        field = {field.name: field for field in dataclasses.fields(cls)}.get(part)
        if field is None:
            raise _unknown(key, source)
        if dataclasses.is_dataclass(field.type):
            cls = field.type
            continue
        entry = ".".join(parts[depth:])
        annotation = _entry_type(field, entry) if entry else field.type
        if annotation is None:
            raise _unknown(key, source)
        return Setting(annotation, parts[:depth], entry)
    return Setting(cls, parts, "")


def checked_layer(layer: Tree, source: str, ignored: Tree) -> Tree:
    """`layer` under today's names, every key and type checked; keys without effect move to `ignored`.

    Raises:
        ConfigError: the first fault, naming `source`.
    """
    moved: Tree = {}
    checked = _checked_section(SanaConfig, layer, "", source, ignored, moved)
    for old, value in moved.items():
        rename = RENAMED[old]
        *sections, name = rename.new.split(".")
        place = checked
        for section in sections:
            place = place.setdefault(section, {})
        if rename.wins or place.get(name) is None:
            place[name] = value
    return checked


def _checked_section(cls: type, section: Any, prefix: str, source: str, ignored: Tree, moved: Tree) -> Tree:
    """The keys of one section (`prefix` empty: of a whole file) that have a field in `cls`."""
    if section is None:
        return {}
    if not isinstance(section, dict):
        raise ConfigError(
            f"{source}: {prefix.rstrip('.')}: expected a section of settings, got {got(section)}"
        )
    fields = {field.name: field for field in dataclasses.fields(cls)}
    result: Tree = {}
    for name, value in section.items():
        key = f"{prefix}{name}"
        if key in INERT:
            if value != INERT[key].default:
                ignored[key] = value
        elif key in RENAMED:
            # A file that the reference dumped has null where nobody set such a key.
            if value is not None or source == COMMAND_LINE:
                check_type(value, find(key, source).annotation, key, source)
                moved[key] = value
        elif name not in fields:
            raise _unknown(key, source)
        elif dataclasses.is_dataclass(fields[name].type):
            if key == "model.resume_from" and not isinstance(value, dict):
                value = {"checkpoint": value}  # published files write a path, or nothing
            result[name] = _checked_section(fields[name].type, value, f"{key}.", source, ignored, moved)
        else:
            _check_field(value, fields[name], key, source)
            result[name] = RENAMED_VALUES.get(key, {}).get(value, value) if isinstance(value, str) else value
    return result


def _check_field(value: Any, field: dataclasses.Field, key: str, source: str) -> None:
    check_type(value, field.type, key, source)
    for name, entry in value.items() if isinstance(value, dict) else ():
        annotation = _entry_type(field, name)
        if annotation is None:
            raise _unknown(f"{key}.{name}", source)
        check_type(entry, annotation, f"{key}.{name}", source)


def _entry_type(field: dataclasses.Field, entry: str) -> Any:
    """Type of one entry of a mapping field; None where the field takes no such entry."""
    if "entries" in field.metadata:
        return field.metadata["entries"].get(entry)
    mappings = [kind for kind in options(field.type) if get_origin(kind) is dict]
    return get_args(mappings[0])[1] if mappings else None


def _valid_keys(cls: type = SanaConfig, prefix: str = "") -> Iterator[str]:
    for field in dataclasses.fields(cls):
        yield f"{prefix}{field.name}"
        if dataclasses.is_dataclass(field.type):
            yield from _valid_keys(field.type, f"{prefix}{field.name}.")
        for entry in field.metadata.get("entries", ()):
            yield f"{prefix}{field.name}.{entry}"


def _unknown(key: str, source: str) -> ConfigError:
    """The error for an unknown key. Nearest is the same name in another section, else what is spelled most alike."""
    valid = ["base", *_valid_keys()]
    section, _, name = key.rpartition(".")
    same_name = [other for other in valid if other.rpartition(".")[2] == name]
    siblings = [other for other in valid if other.rpartition(".")[0] == section]
    near = difflib.get_close_matches(key, siblings, n=1, cutoff=0.6)
    nearest = (same_name or near or difflib.get_close_matches(key, valid, n=1, cutoff=0.0))[0]
    return ConfigError(f"{source}: unknown key {key}; did you mean {nearest}?")
