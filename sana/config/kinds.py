"""Whether a value of a YAML file is of a field's type, strictly, and how to say what it is instead.

An integer is a number, but `true` is neither and 2.0 is no integer.
"""

import types
from typing import Any, Union, get_args, get_origin

from sana.config.yaml_io import ConfigError

_NAMES = {str: "a text", int: "an integer", float: "a number", bool: "true or false", type(None): "null"}
_NAMES_OF_VALUES = {**_NAMES, bool: "a boolean", list: "a list", tuple: "a list", dict: "a mapping"}
_LISTS = {
    str: 'a list of texts like "[a,b]"',
    int: 'a list of integers like "[1,2]"',
    float: "a list of numbers",
}


def options(annotation: Any) -> tuple[Any, ...]:
    """The members of a union; an annotation that is none, alone."""
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def check_type(value: Any, annotation: Any, key: str, source: str) -> None:
    """Raise the ConfigError of a value that is not of the annotated type."""
    if not _fits(value, annotation):
        expected = " or ".join(_describe(kind) for kind in options(annotation))
        raise ConfigError(f"{source}: {key}: expected {expected}, got {got(value)}")


def got(value: Any) -> str:
    """A value and its kind, in a few words."""
    kind = _NAMES_OF_VALUES.get(type(value), type(value).__name__)
    return kind if value is None else f"{short(value)} ({kind})"


def short(value: Any) -> str:
    """A value on part of a line."""
    text = repr(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _fits(value: Any, annotation: Any) -> bool:
    return any(_is(value, kind) for kind in options(annotation))


def _is(value: Any, kind: Any) -> bool:
    if kind is Any:
        return True
    if kind in (int, float):
        return isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
    if get_origin(kind) is tuple:
        return isinstance(value, list) and all(_fits(item, get_args(kind)[0]) for item in value)
    if get_origin(kind) is dict:
        inner = get_args(kind)[1]
        return isinstance(value, dict) and all(
            isinstance(k, str) and _fits(v, inner) for k, v in value.items()
        )
    return isinstance(value, kind)


def _describe(kind: Any) -> str:
    if get_origin(kind) is tuple:
        return _LISTS[options(get_args(kind)[0])[0]]
    if get_origin(kind) is dict:
        inner = get_args(kind)[1]
        return f"a mapping of {_NAMES[inner].split()[-1]}s" if inner in _NAMES else "a mapping"
    return _NAMES[kind]
