"""Training checkpoints: one folder with everything that a run needs to go on, published in one step.

    epoch_3_step_1200/
        model.safetensors       weights, under the published names; of a LoRA its factors alone
        ema.safetensors         their average, where there is one
        optimizer.safetensors   "parameter/field" -> tensor of the optimizer's state
        rng.safetensors         "rank/kind" -> state of a random generator
        config.yaml             the resolved config
        checkpoint.json         step, epoch, and the rest; SHA-256 of the other files and of itself

The folder is written under a hidden name, flushed to the disk and then renamed. So a process that is killed at any moment
leaves a whole checkpoint or a hidden folder that nothing reads. The step is the one inside, never one in a name.
The `.pth` training checkpoints of the reference, and of earlier versions of this code, are read as well.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sana.config import SanaConfig, dump_config
from sana.models.key_names import IGNORED, NULL_CAPTION
from sana.models.state_dict import AVERAGED_FILE
from sana.training.lora import header
from sana.utils.logging import first_line, get_logger

log = get_logger(__name__)

ABOUT = "checkpoint.json"
HIDDEN = ".incomplete-"
REPLACED = ".replaced"
FORMAT = 1
OptimizerState = dict[str, dict[str, Any]]
"""Parameter -> field -> tensor or number."""


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """What a checkpoint holds; tensors are on the CPU."""

    step: int
    """Optimizer steps done."""
    epoch: int
    """Epoch of the next step, from 1."""
    weights: dict[str, Tensor]
    """State dict of the transformer; of a LoRA its factors alone."""
    ema: dict[str, Tensor] | None = None
    """The same of the averaged transformer."""
    ema_updates: int = 0
    """Updates of the average so far."""
    optimizer: OptimizerState = field(default_factory=dict)
    """The optimizer's state, by the parameters' names."""
    schedule_start: int = 0
    """Step at which the warm-up of the learning rate began."""
    scaler: dict[str, float] = field(default_factory=dict)
    """State of the gradient scaler; empty without fp16."""
    rng: list[dict[str, Tensor]] = field(default_factory=list)
    """For each rank: kind of generator -> its state."""
    data: dict[str, Any] = field(default_factory=dict)
    """What the order of samples depends on: name and number of the samples, global batch, seed."""


def write_checkpoint(folder: Path, state: TrainingState, config: SanaConfig) -> Path:
    """Write `folder/epoch_E_step_S`, all of it or nothing; one of the same name is replaced.

    Raises:
        OSError: the disk is full, or refuses for another reason; nothing half-written is left behind.
    """
    path = folder / f"epoch_{state.epoch}_step_{state.step}"
    hidden = folder / f"{HIDDEN}{secrets.token_hex(8)}"
    hidden.mkdir(parents=True)
    try:
        architecture = {"architecture": config.model.model, "format": "pt"} | header(config.train.lora)
        save_file(_storable(state.weights), hidden / "model.safetensors", architecture)
        if state.ema is not None:
            save_file(_storable(state.ema), hidden / AVERAGED_FILE, architecture)
        tensors, numbers = _split(state.optimizer)
        save_file(tensors, hidden / "optimizer.safetensors")
        rng = {
            f"{rank}/{kind}": value for rank, kinds in enumerate(state.rng) for kind, value in kinds.items()
        }
        save_file(rng, hidden / "rng.safetensors")
        dump_config(config, hidden / "config.yaml")
        about = {
            "format": FORMAT,
            "step": state.step,
            "epoch": state.epoch,
            # A run that goes back to an earlier checkpoint writes smaller steps again: this says what is newest.
            "number": 1 + max((_age(other)[0] for other in _folders(folder)), default=0),
            "ema_updates": state.ema_updates,
            "schedule_start": state.schedule_start,
            "scaler": state.scaler,
            "data": state.data,
            "optimizer_numbers": numbers,
            "files": {file.name: _digest(file) for file in sorted(hidden.iterdir())},
        }
        (hidden / ABOUT).write_text(json.dumps(about | {"sha256": _seal(about)}, indent=1), encoding="utf-8")
        for file in hidden.iterdir():
            _flush(file)
        _flush(hidden)
        replaced = path.with_name(f"{path.name}{REPLACED}")
        if path.exists():
            os.rename(path, replaced)  # not hidden: until the new one is there, it may be the newest
        os.rename(hidden, path)
        _flush(folder)
    except SafetensorError as error:  # its message ends in "... No space left on device (os error 28)"
        number = re.search(r"\(os error (\d+)\)", str(error))
        raise OSError(int(number[1]) if number else 0, str(error)) from error
    finally:
        remove_leftovers(folder)
    log.info("saved %s", path)
    return path


def remove_leftovers(folder: Path) -> None:
    """Delete what saves that were cut short left in `folder`; to be called by one process, while none writes."""
    for replaced in folder.glob(f"*{REPLACED}"):
        if replaced.with_name(replaced.name.removesuffix(REPLACED)).exists():
            os.rename(replaced, folder / f"{HIDDEN}{secrets.token_hex(8)}")
    for hidden in folder.glob(f"{HIDDEN}*"):
        shutil.rmtree(hidden, ignore_errors=True)


def retain(folder: Path, keep: int) -> None:
    """Delete all checkpoint folders but the `keep` newest, by what is recorded in them; `.pth` files stay."""
    for path in sorted(_folders(folder), key=_age)[:-keep]:
        hidden = folder / f"{HIDDEN}{secrets.token_hex(8)}"
        try:
            os.rename(path, hidden)  # so that a half-deleted one is never chosen
        except OSError as error:  # what was to be saved is saved
            log.warning("cannot delete %s: %s", path, error)
            continue
        shutil.rmtree(hidden, ignore_errors=True)
        log.info("deleted %s (train.keep_checkpoints: %d)", path, keep)


def find_checkpoint(name: str, folder: Path) -> Path | None:
    """The checkpoint that `--resume_from=NAME` means: a path, or the newest whole one of `folder` for "latest".

    Returns:
        Its path, its files verified; None for "latest" where `folder` has none yet.

    Raises:
        ValueError: the path is no whole checkpoint, or `folder` has some but none is whole.
    """
    if name != "latest":
        path = Path(name)
        if not path.exists():
            raise ValueError(f"no such checkpoint to resume from: {name}")
        verify(path)
        return path
    files = (path for path in folder.glob("epoch_*_step_*.pth") if re.fullmatch(_NAME, path.stem))
    # A folder that lost its record must not make the run begin at step 0 as if there were nothing.
    lost = (path for path in folder.glob("epoch_*_step_*/") if not (path / ABOUT).is_file())
    candidates = [
        *sorted(_folders(folder), key=_age, reverse=True),
        *sorted(files, key=_age, reverse=True),
        *lost,
    ]
    for path in candidates:
        try:
            verify(path)
        except ValueError as error:
            log.warning("skipped: %s", error)
        else:
            return path
    if candidates:
        raise ValueError(
            f"{folder}: none of its {len(candidates)} checkpoints can be resumed from; move them away to start anew"
        )
    return None


def verify(path: Path) -> None:
    """Read a checkpoint through once.

    Raises:
        ValueError: it is no training checkpoint, or a file of it is missing, cut short or changed.
    """
    if path.is_file():
        _read_pth(path)
        return
    for name, digest in _about(path)["files"].items():
        file = path / name
        if not file.is_file():
            raise ValueError(f"the checkpoint {path} is damaged: {name} is missing")
        if _digest(file) != digest:
            raise ValueError(f"the checkpoint {path} is damaged: {name} is not what was written")


def read_checkpoint(path: Path) -> TrainingState:
    """Read a training checkpoint on to the CPU; what `verify` checks is not checked again.

    Raises:
        ValueError: it is no training checkpoint, or broken.
    """
    if path.is_file():
        return _read_pth(path)
    about = _about(path)
    optimizer: OptimizerState = {}
    for key, value in load_file(path / "optimizer.safetensors").items():
        parameter, _, entry = key.rpartition("/")
        optimizer.setdefault(parameter, {})[entry] = value
    for parameter, entries in about["optimizer_numbers"].items():
        optimizer.setdefault(parameter, {}).update(entries)
    rng: dict[int, dict[str, Tensor]] = {}
    for key, value in load_file(path / "rng.safetensors").items():
        rank, _, kind = key.partition("/")
        rng.setdefault(int(rank), {})[kind] = value
    return TrainingState(
        step=about["step"],
        epoch=about["epoch"],
        weights=load_file(path / "model.safetensors"),
        ema=load_file(path / AVERAGED_FILE) if AVERAGED_FILE in about["files"] else None,
        ema_updates=about["ema_updates"],
        optimizer=optimizer,
        schedule_start=about["schedule_start"],
        scaler=about["scaler"],
        rng=[rng[rank] for rank in sorted(rng)],
        data=about["data"],
    )


_NAME = r"epoch_\d+_step_(\d+)"


def _folders(folder: Path) -> Iterator[Path]:
    """The published checkpoint folders in `folder`."""
    return (path.parent for path in folder.glob(f"[!.]*/{ABOUT}"))


def _age(path: Path) -> tuple[int, int]:
    """Sorts checkpoints from the oldest to the newest."""
    if path.is_file():  # a .pth of the reference may hold its step in its name only
        return 0, int(re.fullmatch(_NAME, path.stem)[1])
    try:
        about = _about(path)
    except ValueError:
        return -1, 0
    return about["number"], about["step"]


def _about(path: Path) -> dict[str, Any]:
    try:
        about = json.loads((path / ABOUT).read_text(encoding="utf-8"))
        seal = about.pop("sha256", None)
        fits = about["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: no training checkpoint: it has no {ABOUT} of format {FORMAT}") from error
    if not fits:
        raise ValueError(f"{path}: no training checkpoint of format {FORMAT} but of {about['format']!r}")
    if seal not in (None, _seal(about)):  # None: of an earlier version of this code
        raise ValueError(f"the checkpoint {path} is damaged: {ABOUT} is not what was written")
    return {"number": 0} | about


def _seal(about: dict[str, Any]) -> str:
    """What a change of any value in it changes."""
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()


def _storable(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.contiguous() for name, value in state.items()}


def _split(state: OptimizerState) -> tuple[dict[str, Tensor], OptimizerState]:
    """Tensors for safetensors, numbers for JSON."""
    tensors: dict[str, Tensor] = {}
    numbers: OptimizerState = {}
    places = set()
    for parameter, entries in state.items():
        for entry, value in entries.items():
            if isinstance(value, Tensor):
                # bitsandbytes has all parameters share one table, which safetensors refuses.
                shared = value.data_ptr() in places
                places.add(value.data_ptr())
                tensors[f"{parameter}/{entry}"] = value.clone() if shared else value.contiguous()
            else:
                numbers.setdefault(parameter, {})[entry] = value
    return tensors, numbers


def _digest(file: Path) -> str:
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_pth(path: Path) -> TrainingState:
    """A training checkpoint of the reference (any version) or an earlier one of this code.

    Its generators' states are left aside: nothing here draws from them.
    """
    build = np._core.multiarray._reconstruct  # of what the state of NumPy's generator in it is made
    named = (build, "numpy.core.multiarray._reconstruct")
    arrays = [build, named, np.ndarray, np.dtype, np.dtypes.UInt32DType]
    try:
        with torch.serialization.safe_globals(arrays):
            state = torch.load(path, weights_only=True, map_location="cpu", mmap=zipfile.is_zipfile(path))
    except Exception as error:  # noqa: BLE001 torch raises many kinds for a broken file
        raise ValueError(f"cannot read the checkpoint {path}: {first_line(error)}") from error
    missing = {"state_dict", "optimizer"} - set(state if isinstance(state, dict) else ())
    if missing:
        raise ValueError(
            f"{path} is no training checkpoint: it lacks {', '.join(sorted(missing))}; use model.load_from"
        )
    named = re.fullmatch(_NAME, path.resolve().stem)
    step = state.get("step", int(named[1]) if named else None)
    if step is None:
        raise ValueError(f"{path}: the step is neither in it nor in its name (epoch_E_step_S.pth)")
    return TrainingState(
        step=step,
        epoch=state.get("epoch", 1),
        weights=state["state_dict"],
        ema=state.get("state_dict_ema"),
        ema_updates=state.get("ema_updates", step),
        optimizer=_by_name(path, state["state_dict"], state["optimizer"]),
    )


def _by_name(path: Path, weights: dict[str, Tensor], optimizer: dict[str, Any]) -> OptimizerState:
    """torch's numbered optimizer state, by name: the numbers follow the order of the weights, buffers left out."""
    names = [name for name in weights if name not in (*IGNORED, NULL_CAPTION)]
    numbers = [number for group in optimizer["param_groups"] for number in group["params"]]
    if len(names) != len(numbers):
        raise ValueError(
            f"{path}: the optimizer has {len(numbers)} parameters and the model {len(names)}; "
            "to resume without its state: model.resume_from.resume_optimizer=false"
        )
    pairs = zip(names, numbers, strict=True)
    return {name: dict(optimizer["state"][number]) for name, number in pairs if number in optimizer["state"]}
