"""Transformer weights: read files of every published kind, load them strictly, write them."""

import pickle
import re
import struct
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import nn

from sana.models.checkpoints import find_published
from sana.models.key_names import (
    IGNORED,
    NULL_CAPTION,
    State,
    from_diffusers,
    misfits,
    shorten,
    to_diffusers,
    to_published,
)
from sana.models.zoo import recognise
from sana.utils import hub
from sana.utils.files import write_atomic
from sana.utils.logging import get_logger
from sana.utils.oom import is_out_of_memory

__all__ = [
    "NULL_CAPTION",
    "State",
    "from_diffusers",
    "load_into",
    "load_transformer_state",
    "read_metadata",
    "require_fit",
    "resolve_transformer",
    "save_transformer",
    "to_diffusers",
]

logger = get_logger(__name__)

AVERAGED_FILE = "ema.safetensors"
"""Name of the averaged weights in the folder of a training checkpoint (`sana.training.checkpoint`)."""


def load_transformer_state(path: str | Path, *, ema: bool = False) -> dict[str, torch.Tensor]:
    """Read the weights of a transformer, under the published names whatever the file's own.

    Most tensors are views of the mapped file, on the CPU: their memory is the system's cache of the file. What diffusers
    has no names for is read from the `hub.SIDE_FILE` of a pipeline folder that was written here.

    Args:
        path: given as for `sana.utils.hub.resolve_model`, so also `hf://owner/repo[/path]` and `owner/name`:

            * `.pth`, `.pt` or `.bin`: a pickle of a state dict, bare or under the key "state_dict";
            * `.safetensors`, or the index (`.safetensors.index.json`) of several of them;
            * a folder with one of these: of diffusers' transformer, or of a pipeline with a `transformer/` in it.
        ema: take the averaged weights of a training checkpoint: "state_dict_ema" of a `.pth`, or the `AVERAGED_FILE`
            beside the weights.

    Raises:
        ValueError: nothing is there, or it is corrupt, incomplete, of an unknown kind, or of something else.
    """
    file = resolve_transformer(path)
    if not (hub.is_index(file) or file.suffix in hub.WEIGHT_SUFFIXES):
        endings = ", ".join(hub.WEIGHT_SUFFIXES)
        raise ValueError(f"{file}: not a checkpoint file; expected one that ends in {endings}, or an index")
    if hub.is_index(file) or file.suffix == ".safetensors":
        if ema and not file.with_name(AVERAGED_FILE).is_file():
            raise ValueError(
                f"{file}: holds no averaged weights (EMA), and there is no {AVERAGED_FILE} beside it: only a training "
                "checkpoint has them"
            )
        file = file.with_name(AVERAGED_FILE) if ema else file
        state = _read_shards(file) if hub.is_index(file) else _read_safetensors(file)
    else:
        state = _read_pickle(file, ema=ema)
    wrong = [key for key, value in state.items() if not isinstance(value, torch.Tensor)]
    if wrong or not state:
        raise ValueError(
            f"{file}: not a state dict: {shorten(wrong) + ' no tensor' if wrong else 'it is empty'}"
        )
    try:
        state = to_published(state)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    side = _side_file(file)
    return _read_safetensors(side) | state if side else state


def read_metadata(file: Path) -> dict[str, str]:
    """What a .safetensors file says of itself, and the `hub.SIDE_FILE` of the pipeline folder that a file is part of.

    Raises:
        ValueError: truncated or corrupt.
    """
    found: dict[str, str] = {}
    for source in (file, _side_file(file)):
        if source is not None and source.suffix == ".safetensors":
            try:
                with safe_open(source, "pt") as content:
                    found |= content.metadata() or {}
            except (SafetensorError, OSError) as error:
                raise _unreadable(source, error) from error
    return found


def _side_file(file: Path) -> Path | None:
    """The `hub.SIDE_FILE` that belongs to the weights `file` of a pipeline's transformer."""
    side = file.absolute().parent.parent / hub.SIDE_FILE
    return side if file.absolute().parent.name == "transformer" and side.is_file() else None


def resolve_transformer(path: str | Path) -> Path:
    """The one file, or the index, that `load_transformer_state` reads for `path`; of the hub no more is downloaded.

    The repository of a published `.pth` stands for that file.

    Raises:
        ValueError: as `sana.utils.hub.resolve_weights`.
    """
    published = find_published(path)
    name = str(path).removeprefix("hf://").rstrip("/")
    if published is not None and name == published.repo and not Path(path).exists():
        path = published.pth
    return hub.resolve_weights(path, part="transformer")


# What torch.load was seen to raise on damaged files in its two formats.
_UNREADABLE = (
    *(RuntimeError, OSError, EOFError, ValueError, TypeError, LookupError, AttributeError, AssertionError),
    *(pickle.UnpicklingError, struct.error),
)


def _read_pickle(file: Path, *, ema: bool) -> dict[str, torch.Tensor]:
    try:
        with torch.serialization.safe_globals(_numpy_state()):
            # Only the newer of torch's two formats, a zip archive, can be mapped.
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except _UNREADABLE as error:
        if foreign := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise ValueError(
                f"{file}: refused, nothing of it was run: beside tensors it holds {foreign[1]}, and a pickle may run code"
            ) from error
        raise _unreadable(file, error) from error
    if ema and not (isinstance(content, dict) and "state_dict_ema" in content):
        raise ValueError(f'{file}: holds no averaged weights (EMA; key "state_dict_ema")')
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    state = content["state_dict_ema"] if ema else state
    if not isinstance(state, dict):
        raise ValueError(f"{file}: holds a {type(content).__name__}, not a state dict")
    return dict(state)


def _numpy_state() -> list:
    """What the state of NumPy's generator in the reference's training checkpoints is made of: plain arrays."""
    import numpy as np  # lazy: nothing else here needs it

    build = np._core.multiarray._reconstruct
    return [build, (build, "numpy.core.multiarray._reconstruct"), np.ndarray, np.dtype, np.dtypes.UInt32DType]


def _read_safetensors(file: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: Exception) -> ValueError | MemoryError:
    """What to tell of a file that a reader refused; the readers' own texts say nothing to a user."""
    if is_out_of_memory(error):
        return MemoryError(f"out of memory while reading {file}")
    if isinstance(error, OSError) and error.strerror:
        return ValueError(f"{file}: cannot be read: {error.strerror}")
    return ValueError(f"{file}: truncated or corrupt ({file.stat().st_size:,} bytes): fetch it again")


def _read_shards(index: Path) -> dict[str, torch.Tensor]:
    places = hub.read_index(index)
    shards = sorted(set(places.values()))
    if missing := [shard for shard in shards if not (index.parent / shard).is_file()]:
        raise ValueError(f"{index}: {len(missing)} of its {len(shards)} shards missing: {shorten(missing)}")
    state: dict[str, torch.Tensor] = {}
    for shard in shards:
        state |= _read_safetensors(index.parent / shard)
    if lost := places.keys() - state.keys():
        raise ValueError(f"{index}: its shards lack {shorten(lost)}")
    return state


def load_into(model: nn.Module, state: State) -> None:
    """Load a state with published names into `model`, strictly, in the dtype and on the device of the model.

    Two exceptions, and no other: what `IGNORED` names is left out; the null caption may be absent (a state that
    comes from diffusers has none), and the model then keeps its own.

    Raises:
        ValueError: as `require_fit`. The model is then unchanged.
    """
    own = model.state_dict()
    require_fit(own, state)
    state = {key: value for key, value in state.items() if key not in IGNORED}
    if NULL_CAPTION in own and NULL_CAPTION not in state:
        logger.info("the checkpoint has no %s: the model keeps its own", NULL_CAPTION)
        state[NULL_CAPTION] = own[NULL_CAPTION]
    model.load_state_dict(state)


def require_fit(
    own: State, state: State, *, file: str | Path = "the checkpoint", model: str = "this model"
) -> None:
    """Refuse a state that is not one of a model whose own state is `own`; published names, any device.

    Raises:
        ValueError: begins with the architecture that would fit, where one is known, and names every kind of missing,
            unexpected and misshapen tensor.
    """
    if not (problems := misfits(own, state)):
        return
    try:
        name, overrides = recognise(state)
    except ValueError:
        verdict = f"does not fit {model}"
    else:
        settings = ", ".join(f"{key}={value}" for key, value in overrides.items())
        verdict = f"fits {name}{settings and f' with {settings}'}, not {model}"
    raise ValueError(f"{file} {verdict}: {'; '.join(problems)}")


def save_transformer(
    state: State, path: str | Path, *, name: str, dtype: torch.dtype = torch.float32
) -> Path:
    """Write weights as one `.safetensors` file, in one step.

    Args:
        state: a transformer's state dict, with the published names.
        path: the file.
        name: architecture, a name in `sana.models.zoo.TRANSFORMERS`; kept in the file's metadata.
        dtype: what floating-point tensors are stored as.
    """
    stored = {key: value.to("cpu", dtype).contiguous() for key, value in state.items()}
    return write_atomic(path, save(stored, {"architecture": name, "format": "pt"}))
