"""The published weights that metrics stand on: where they are, whether they are the right ones, how to get them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sana.utils import hub
from sana.utils.logging import first_line, get_logger

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

log = get_logger(__name__)


@dataclass(frozen=True)
class Published:
    """One published file of weights."""

    what: str
    """For messages: "the FID Inception"."""
    place: str
    """A name on the hub, hf://owner/repo/file, or a local path."""
    fetch: str
    """The command that fetches it to `place`."""
    sha256: str = ""
    """How its hash begins, where it is published."""

    def find(self, weights: str | Path | None = None) -> Path:
        """The local file: `weights` where given (a file, a folder with it, a name on the hub), else the published one.

        Raises:
            ValueError: it is not there; or it bears the published name and is damaged.
        """
        name = self.place.rpartition("/")[2]
        place = self.place if weights is None else str(weights)
        address = hub.hub_address(place)
        if address is not None and not address.endswith(hub.WEIGHT_SUFFIXES):
            address = f"{address}/{name}"
        with fetched_by(self.fetch, place):
            path = hub.resolve(address or place)
            if path.is_dir() and not (path / name).is_file():
                raise ValueError(f"{path} holds no {name}; to fetch it: {self.fetch}")
        path = path / name if path.is_dir() else path
        if self.sha256 and not hub.sha256(path).startswith(self.sha256):
            reason = f"{path} is not {self.what}: its sha256 does not begin with {self.sha256}"
            if path.name == name:
                raise ValueError(f"{reason}; a damaged download? Remove it; to fetch it: {self.fetch}")
            log.warning("%s; its numbers compare with no published ones", reason)
        return path


@contextmanager
def fetched_by(command: str, name: str | Path) -> Iterator[None]:
    """Adds to an error of loading `name` the command that fetches it, unless it is a local path that exists."""
    try:
        yield
    except ValueError as error:
        if Path(name).expanduser().exists():
            raise
        raise ValueError(f"{error}; to fetch it: {command}") from error


def hub_command(name: str | Path) -> str:
    """The command that brings a hub repository, or a file of one, into the local cache."""
    owner, _, rest = str(name).removeprefix("hf://").partition("/")
    repo, _, file = rest.partition("/")
    return f"hf download {owner}/{repo} {file}".rstrip()


def folder_sha256(name_or_path: str | Path) -> str:
    """The hash of the weights of a transformers folder or hub name that was loaded before."""
    folder = hub.resolve_model(name_or_path)
    return hub.sha256(hub.resolve_weights(folder) if folder.is_dir() else folder)


def labelled(name_or_path: str | Path, sha256: str) -> str:
    """Which weights, for a protocol: the hub's name or the last part of a path, and how their hash begins."""
    local = hub.hub_address(name_or_path) is None
    return f"{Path(name_or_path).resolve().name if local else name_or_path} {sha256[:8]}"


def load_tokenizer(name_or_path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub name; of the hub nothing else is fetched.

    Raises:
        ValueError: there is none; the message has the command that fetches it.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(name_or_path))
    except (OSError, ValueError) as error:
        reason = first_line(error)
        fetch = f"{hub_command(name_or_path)} --include 'token*' '*.txt' config.json"
        raise ValueError(f"no tokenizer in {str(name_or_path)!r}: {reason}; to fetch it: {fetch}") from error


def read_state(path: Path, what: str) -> dict[str, Tensor]:
    """The tensors of a .pth, .pt or .safetensors file, on the CPU; of a checkpoint, those under "state_dict".

    Raises:
        ValueError: truncated, or no file of tensors; nothing in it is executed.
    """
    import pickle

    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError, SafetensorError) as error:
        reason = first_line(error)[:200]
        raise ValueError(f"{path}: cannot be read as the weights of {what}: {reason}") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{path}: holds no tensors by name, so not the weights of {what}")
    return state


def load_state(
    network: nn.Module, state: Mapping[str, Tensor], path: Path, what: str, *, assign: bool = False
) -> None:
    """Put the tensors of a file into the network they are of; with `assign` in place of its own.

    Raises:
        ValueError: their names or shapes are not the network's; the message has the first.
    """
    own, given = network.state_dict().keys(), state.keys()
    for names, verb in ((own - given, "lacks"), (given - own, "has unknown")):
        if names:
            raise ValueError(f"{path} is not {what}: it {verb} {len(names)} tensors, {min(names)} among them")
    try:
        network.load_state_dict(state, assign=assign)
    except RuntimeError as error:
        raise ValueError(f"{path} is not {what}: {str(error).splitlines()[1].strip()}") from error
