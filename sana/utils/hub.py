"""Where weights and configs come from: a path, a path in this repository, or `hf://owner/repo/path`."""

import hashlib
import json
import re
from collections.abc import Iterable
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The repository: holds `configs/` and `asset/`."""

# "owner/name", unless it looks like a path of this repository that is missing.
_HUB_NAME = re.compile(r"(?!(?:asset|configs|output)/)[A-Za-z0-9][\w-]*/[A-Za-z0-9][\w.-]*")

WEIGHT_SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")
"""What a file of weights ends in."""

SIDE_FILE = "not_in_diffusers.safetensors"
"""In a pipeline folder that was written here: the transformer's tensors that diffusers has no names for, and in its metadata
the published checkpoint that they are."""

# The usual names of an index of shards and of a single file: of diffusers, then of the hub's mixin and transformers.
_INDEXES = ("diffusion_pytorch_model.safetensors.index.json", "model.safetensors.index.json")
_SINGLES = ("diffusion_pytorch_model.safetensors", "model.safetensors")
_INDEX = re.compile(r"\.safetensors\.index(\.\w+)?\.json$")
# What is no weights in the folder of a model, its tokenizer's files among them.
_SETTINGS = ("*.json", "*.txt", "*.model", "*.jinja")
_PIPELINE_SETTINGS = ("model_index.json", "config.yaml", SIDE_FILE, "scheduler/*.json")


def resolve(path: str | Path) -> Path:
    """The local file or folder that `path` names.

    An existing path wins; then the same path under the repository root; then `hf://owner/repo[/path]`, of which only
    the named file or folder is downloaded, into the cache of huggingface_hub.

    Raises:
        ValueError: nothing is there, the `hf://` name is malformed, or the download failed.
    """
    text = str(path)
    if text.startswith("hf://"):
        return _download(text)
    if found := _local(text):
        return found
    raise ValueError(
        f"no such file or folder: {text!r}; give a path (also taken from {ROOT}) or hf://owner/repo/path"
    )


def _local(text: str) -> Path | None:
    local = Path(text).expanduser()
    return next((file for file in (local, ROOT / local) if text and file.exists()), None)


def hub_address(path: str | Path) -> str | None:
    """`path` as hf://owner/repo[/path] where it names something on the hub, also as "owner/name"; None if it is local."""
    text = str(path)
    if not text.startswith("hf://"):
        if _local(text) or not _HUB_NAME.fullmatch(text) or _is_weights(text):
            return None
        text = f"hf://{text}"
    return text.rstrip("/")


def _is_weights(name: str) -> bool:
    return is_index(name) or Path(name).suffix in WEIGHT_SUFFIXES


def resolve_model(path: str | Path) -> Path:
    """As `resolve`, for the folder of one model, which a config may also name as the hub does: "owner/name".

    Of the hub, a model's settings and its weights under the usual name are fetched, and no variant of them; with the
    `text_encoder` of a pipeline its tokenizer. All that there is where no weights have a usual name.
    """
    name, folder = hub_address(path), resolve_settings(path)
    if name is None or _is_weights(name):
        return folder
    return folder if _fetch_weights(name, [f"{_split(name)[1]}/".lstrip("/")]) else _download(name)


def resolve_settings(path: str | Path) -> Path:
    """As `resolve_model`, but of the hub no weights are fetched."""
    name = hub_address(path)
    if name is None or _is_weights(name):
        return resolve(path)
    _, inner = _split(name)
    patterns = [f"{inner}/{pattern}".lstrip("/") for pattern in _SETTINGS]
    if Path(inner).name == "text_encoder":
        patterns.append(f"{inner.removesuffix('text_encoder')}tokenizer/*")
    return _snapshot(name, patterns) / inner


def pipeline_folder(path: str | Path) -> Path | None:
    """The folder of a diffusers pipeline, or of its transformer written here with a config; None for anything else.

    Of the hub no weights are fetched, only what says how they are used: config.yaml, the scheduler's settings.

    Raises:
        ValueError: as `resolve`.
    """
    name = hub_address(path)
    if name is None:
        folder = _local(str(path))
        return folder if folder and (folder / "transformer").is_dir() else None
    if _is_weights(name):
        return None
    _, inner = _split(name)
    place = f"{inner}/".lstrip("/")
    folder = _snapshot(name, [place + file for file in _PIPELINE_SETTINGS]) / inner
    known = ("model_index.json", "config.yaml")
    return folder if any((folder / file).is_file() for file in known) else None


def resolve_weights(path: str | Path, *, part: str = "transformer") -> Path:
    """The one file with a network's weights; if it is an index (`is_index`), its shards lie beside it.

    Of a hub repository no more is downloaded than that and the `config.json` beside it: not the other networks of a
    pipeline, and no variant of the weights (`fp16`) where there are weights under the usual name.

    Args:
        path: the file itself, the network's folder, or a folder with the network in its subfolder `part` (a diffusers
            pipeline); given as for `resolve_model`.

    Raises:
        ValueError: as `resolve`; or the folder holds no weights, or several without one of the usual names.
    """
    name = hub_address(path)
    if name is None:
        found = resolve(path)
        return _find_weights(found, part) if found.is_dir() else found
    if not _is_weights(name):
        return _download_folder(name, part)
    found = _download(name)
    if is_index(name):
        folder = name.rpartition("/")[0]
        _snapshot(
            name, [f"{_split(folder)[1]}/{shard}".lstrip("/") for shard in set(read_index(found).values())]
        )
    return found


def _find_weights(folder: Path, part: str) -> Path:
    """`resolve_weights` for a local folder."""
    places = (folder / part, folder)
    for place in places:
        for name in (*_INDEXES, *_SINGLES):
            if (place / name).is_file():
                return place / name
    for place in places:
        files = sorted(place.iterdir()) if place.is_dir() else []
        found = [file for file in files if is_index(file)] or [
            file for file in files if file.suffix in WEIGHT_SUFFIXES
        ]
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(file.name for file in found[:4])
            raise ValueError(f"{place}: holds {len(found)} files of weights ({names}): name the one to use")
    raise ValueError(
        f"{folder}: no weights in it or its {part}/; expected a file that ends in {', '.join(WEIGHT_SUFFIXES)}"
    )


def is_index(file: str | Path) -> bool:
    """Whether a file is, by its name, the index of sharded safetensors."""
    return _INDEX.search(Path(file).name) is not None


def read_index(file: Path) -> dict[str, str]:
    """Tensor name -> name of the shard, a file in the index's own folder, that holds it.

    Raises:
        ValueError: not such an index, or a shard that is not in that folder.
    """
    try:
        shards = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
        outside = [shard for shard in shards.values() if Path(shard).name != shard]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: truncated, corrupt, or not an index of shards (no weight_map)") from error
    if outside or not shards:
        raise ValueError(
            f"{file}: {f'names {outside[0]!r} outside its folder' if outside else 'an empty index'}"
        )
    return shards


def _download_folder(name: str, part: str) -> Path:
    """Fetch the weights of the network in the folder `name` (hf://owner/repo[/path]), or in its subfolder `part`."""
    top = _split(name)[1]
    places = [f"{top}/{part}/".lstrip("/"), f"{top}/".lstrip("/")]
    if found := _fetch_weights(name, places):
        return found
    # Other names; not at the root of a repository, where the pattern would match every network of a pipeline.
    folder = _snapshot(name, [f"{place}*.safetensors*" for place in places if place])
    try:
        return _find_weights(folder / (top or part), part)
    except ValueError as error:
        reason = f"no weights of a {part} under the usual names there{_offline()}"
        raise ValueError(f"{name}: {reason}; name the file: {name}/path/in/it") from error


def _fetch_weights(name: str, places: list[str]) -> Path | None:
    """Fetch the index with its shards, or the single file, that has a usual name in the first folder that holds one."""
    settings = [place + file for place in places for file in ("config.json", SIDE_FILE, *_INDEXES)]
    folder = _snapshot(name, settings)
    for place, index in product(places, _INDEXES):
        if (folder / place / index).is_file():
            shards = set(read_index(folder / place / index).values())
            return _snapshot(name, [place + file for file in (index, *shards)]) / place / index
    folder = _snapshot(name, [place + file for place in places for file in _SINGLES])
    files = (folder / place / single for place, single in product(places, _SINGLES))
    return next((file for file in files if file.is_file()), None)


def _download(name: str) -> Path:
    """Fetch `hf://owner/repo[/path]`, a file or a folder, and return where it lies."""
    repo, inner = _split(name)
    found = _snapshot(name, [inner, f"{inner}/**"] if inner else None) / inner
    if not found.exists():
        raise ValueError(f"{name}: the repository {repo} exists but holds no {inner!r}{_offline()}")
    return found


def _split(name: str) -> tuple[str, str]:
    """(owner/repo, path in it) of a hub name."""
    owner, _, rest = name.removeprefix("hf://").rstrip("/").partition("/")
    repo, _, inner = rest.partition("/")
    if not owner or not repo or ".." in inner.split("/"):
        raise ValueError(
            f"malformed hub name {name!r}; expected hf://owner/repo or hf://owner/repo/path/in/it"
        )
    return f"{owner}/{repo}", inner


def _snapshot(name: str, patterns: Iterable[str] | None) -> Path:
    """Fetch what matches `patterns` of the repository of `name`, and return the repository's folder in the cache.

    Where the hub cannot be reached, huggingface_hub answers from its cache.
    """
    repo, _ = _split(name)
    from huggingface_hub import snapshot_download  # lazy: local paths need neither the package nor a network
    from huggingface_hub.errors import HTTPError  # what its client raises: not always an OSError

    try:
        return Path(snapshot_download(repo, allow_patterns=None if patterns is None else list(patterns)))
    except (OSError, ValueError, HTTPError) as error:
        raise ValueError(f"could not fetch {name}: {_reason(error, repo)}") from error


def _reason(error: Exception, repo: str) -> str:
    """Why a download failed and what to do, in one line."""
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    log_in = 'log in with "hf auth login" (or set HF_TOKEN)'
    if isinstance(error, GatedRepoError):  # before its parent class
        return f"{repo} is gated: accept its terms on https://huggingface.co/{repo}, then {log_in}"
    if isinstance(error, RepositoryNotFoundError):
        return f"the hub has no repository {repo!r}, or it is private: check the spelling, or {log_in}"
    if isinstance(error, LocalEntryNotFoundError):
        why = _offline() or "; the hub cannot be reached, and it is not in the local cache"
        return f"{why.removeprefix('; ')}; give a local path, or fetch it once with a network"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"{lines[0]}; without a network, give a local path"


def _offline() -> str:
    from huggingface_hub import constants

    return "; it is not in the local cache, and HF_HUB_OFFLINE is set" if constants.is_offline_mode() else ""


def find_beside(path: str | Path, name: str) -> Path:
    """The file `name` in the folder of `path` or in the one above: a run's config stands beside its checkpoints so.

    Raises:
        ValueError: it is in neither.
    """
    folders = resolve(path).absolute().parents[:2]
    found = [folder / name for folder in folders if (folder / name).is_file()]
    if not found:
        raise ValueError(
            f"there is no {name} beside {path} or one folder above: name the config to use (--config)"
        )
    return found[0]


def sha256(path: str | Path) -> str:
    """The hash of a file's bytes, or of a folder: of its sorted (relative path, hash) lines. 64 hex digits.

    An index of shards counts as a folder that holds them.
    """
    path = Path(path)
    if path.is_dir() or is_index(path):
        folder = path if path.is_dir() else path.parent
        files = (
            path.rglob("*") if path.is_dir() else (folder / name for name in set(read_index(path).values()))
        )
        lines = [f"{file.relative_to(folder).as_posix()} {sha256(file)}" for file in files if file.is_file()]
        return hashlib.sha256("\n".join(sorted(lines)).encode("utf-8")).hexdigest()
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
