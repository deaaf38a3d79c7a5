"""From YAML files and command-line overrides to a `SanaConfig`, and back.

A layer is one file or one override. Layers are checked one by one, so that an error names its source, then merged:
the defaults, the files from the lowest `base:` up, the overrides in their order. Sections merge key by key; a value
replaces the one before, also where it is a list or a mapping (`train.optimizer`).
"""

import dataclasses
import re
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

import pyrallis

from sana.config import yaml_io
from sana.config.checks import check
from sana.config.kinds import got, options, short
from sana.config.published import INERT, NOT_YET
from sana.config.schema import SanaConfig
from sana.config.strict import COMMAND_LINE, Tree, checked_layer, find
from sana.config.yaml_io import ConfigError
from sana.resolution import TABLES
from sana.utils.hub import resolve
from sana.utils.logging import get_logger

logger = get_logger(__name__)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> SanaConfig:
    """Load a config file, the files it names in `base:`, and overrides.

    Args:
        path: a YAML file: a path (also relative to the repository) or `hf://owner/repo/file`.
        overrides: command-line words, see `parse_overrides`: `--model.image_size=512`, `--work_dir out`.

    Raises:
        ConfigError: one line that names the key, the file, what it got and what it expected.
    """
    try:
        path = resolve(path)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    tree = dataclasses.asdict(SanaConfig())
    ignored: Tree = {}
    for source, layer in _file_layers(path):
        _merge(tree, checked_layer(layer, str(source), ignored))
    for key, text in parse_overrides(overrides):
        _merge(tree, _override_layer(key, text, tree, ignored))
    _complete(tree)
    config = pyrallis.decode(SanaConfig, tree)
    check(config, str(path))
    _report(config, str(path), ignored)
    return config


def dump_config(config: SanaConfig, path: str | Path) -> None:
    """Write the complete config as YAML; `load_config(path)` gives an equal one."""
    yaml_io.write(Path(path), dataclasses.asdict(config))


def parse_overrides(words: Sequence[str]) -> list[tuple[str, str]]:
    """Split command-line words into (dotted key, text of the value).

    Accepts `--a.b=c`, `a.b=c` and `--a.b c`. The text is read as YAML when its field is known: `"[a,b]"` is a list,
    nothing or `null` is null; a field that holds a text takes it as it stands.

    Raises:
        ConfigError: a word that is none of these.
    """
    pairs = []
    words = list(words)
    while words:
        word = words.pop(0)
        key, equals, text = word.removeprefix("--").partition("=")
        if not re.fullmatch(r"[A-Za-z_]\w*(\.[\w-]+)*", key) or not (equals or word.startswith("--")):
            raise ConfigError(f"{COMMAND_LINE}: expected --key=value, got {word!r}")
        if not equals:
            if not words or words[0].startswith("--"):
                raise ConfigError(f"{COMMAND_LINE}: {word} has no value; write {word}=VALUE")
            text = words.pop(0)
        pairs.append((key, text))
    return pairs


def _file_layers(path: Path) -> list[tuple[Path, Tree]]:
    """The file and the files below it by `base:`, the lowest first, each without that key."""
    layers: list[tuple[Path, Tree]] = []
    seen: list[Path] = []
    while True:
        if path.resolve() in seen:
            chain = " -> ".join(str(source) for source in [*(source for source, _ in reversed(layers)), path])
            raise ConfigError(f"{path}: base: files name each other in a circle: {chain}")
        seen.append(path.resolve())
        layer = yaml_io.read(path)
        base = layer.pop("base", None)
        layers.insert(0, (path, layer))
        if base is None:
            return layers
        if not isinstance(base, str):
            raise ConfigError(f"{path}: base: expected the path of a YAML file, got {got(base)}")
        if not (path.parent / base).is_file():
            raise ConfigError(f"{path}: base: no such file: {path.parent / base}")
        path = path.parent / base


def _override_layer(key: str, text: str, tree: Tree, ignored: Tree) -> Tree:
    """The layer that one override stands for; an entry of a mapping field keeps the other entries of `tree`."""
    parts = tuple(key.split("."))
    if parts[0] in INERT or ".".join(parts[:2]) in INERT:
        value = yaml_io.parse(text, f"{COMMAND_LINE}: {key}")
    else:
        setting = find(key, COMMAND_LINE)
        value = _from_text(text, setting.annotation, key)
        if setting.entry:
            field = tree
            for part in setting.path:
                field = field[part]
            value = {**(field or {}), setting.entry: value}
            parts = setting.path
    for part in reversed(parts):
        value = {part: value}
    return checked_layer(value, COMMAND_LINE, ignored)


def _from_text(text: str, annotation: Any, key: str) -> Any:
    """The value that the text of an override means for a field of the annotated type."""
    kinds = options(annotation)
    quoted = len(text) >= 2 and text[0] == text[-1] and text[0] in "'\""
    if str in kinds and not quoted:
        return None if type(None) in kinds and text in ("", "null", "~") else text
    return yaml_io.parse(text, f"{COMMAND_LINE}: {key}")


def _merge(tree: Tree, layer: Tree, cls: type = SanaConfig) -> None:
    """Put `layer` over `tree`, which has every key of `cls`: sections key by key, values as a whole."""
    for field in dataclasses.fields(cls):
        if field.name in layer:
            if dataclasses.is_dataclass(field.type):
                _merge(tree[field.name], layer[field.name], field.type)
            else:
                tree[field.name] = layer[field.name]


def _complete(tree: Tree) -> None:
    """Fill the settings that follow from others."""
    model, data = tree["model"], tree["data"]
    if data["image_size"] is None:
        data["image_size"] = model["image_size"]
    table = f"ASPECT_RATIO_{model['image_size']}"
    if model["aspect_ratio_type"] is None and table in TABLES:
        model["aspect_ratio_type"] = table


def _report(config: SanaConfig, source: str, ignored: Tree) -> None:
    """Name what was accepted and may not be what the user thinks."""
    default = SanaConfig()
    idle = {
        key: attrgetter(key)(config) for key in NOT_YET if attrgetter(key)(config) != attrgetter(key)(default)
    }
    if ignored or idle:
        listed = [f"{key}={short(value)} ({INERT[key].reason})" for key, value in ignored.items()]
        listed += [f"{key}={short(value)} (not available yet)" for key, value in idle.items()]
        logger.warning("%s: accepted, but without effect here: %s", source, ", ".join(listed))
    table, size = config.model.aspect_ratio_type, config.model.image_size
    if table is not None and table.split("_")[2] != str(size):
        logger.warning(
            "%s: model.aspect_ratio_type %s is not the table of model.image_size %d", source, table, size
        )
