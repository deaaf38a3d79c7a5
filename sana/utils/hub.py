"""Where weights and configs come from: a path, a path in this repository, or `hf://owner/repo/path`."""

import hashlib
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The repository: holds `configs/` and `asset/`."""

# "owner/name", unless it looks like a path of this repository that is missing.
_HUB_NAME = re.compile(r"(?!(?:asset|configs|output)/)[A-Za-z0-9][\w-]*/[A-Za-z0-9][\w.-]*")


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
    local = Path(text).expanduser()
    for candidate in (local, ROOT / local):
        if text and candidate.exists():
            return candidate
    raise ValueError(
        f"no such file or folder: {text!r}; give a path (also taken from {ROOT}) or hf://owner/repo/path"
    )


def resolve_model(path: str | Path) -> Path:
    """As `resolve`, for the folder of one model, which a config may also name as the hub does: "owner/name"."""
    try:
        return resolve(path)
    except ValueError:
        if not _HUB_NAME.fullmatch(str(path)):
            raise
        return _download(f"hf://{path}")


def _download(name: str) -> Path:
    """Fetch `hf://owner/repo[/path]`, a file or a folder, and return where it lies."""
    owner, _, rest = name.removeprefix("hf://").rstrip("/").partition("/")
    repo, _, inner = rest.partition("/")
    if not owner or not repo or ".." in inner.split("/"):
        raise ValueError(
            f"malformed hub name {name!r}; expected hf://owner/repo or hf://owner/repo/path/in/it"
        )
    from huggingface_hub import snapshot_download  # lazy: local paths need neither the package nor a network

    try:
        folder = snapshot_download(
            f"{owner}/{repo}", allow_patterns=[inner, f"{inner}/**"] if inner else None
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"could not fetch {name}: {reason}; without a network, give a local path") from error
    found = Path(folder, inner)
    if not found.exists():
        raise ValueError(f"{name}: the repository {owner}/{repo} exists but holds no {inner!r}")
    return found


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
    """The hash of a file's bytes, or of a folder: of its sorted (relative path, hash) lines. 64 hex digits."""
    path = Path(path)
    if path.is_dir():
        lines = [
            f"{file.relative_to(path).as_posix()} {sha256(file)}"
            for file in path.rglob("*")
            if file.is_file()
        ]
        return hashlib.sha256("\n".join(sorted(lines)).encode("utf-8")).hexdigest()
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
