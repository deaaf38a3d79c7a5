"""Training checkpoints: one file with everything a run needs to go on, and a pointer to the newest."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch

from sana.utils.files import write_atomic
from sana.utils.logging import get_logger

log = get_logger(__name__)

LATEST = "latest.pth"


def save_checkpoint(folder: Path, state: dict[str, Any], epoch: int, step: int) -> Path:
    """Write `epoch_E_step_S.pth` in one step, then point `latest.pth` at it."""
    path = write_atomic(folder / f"epoch_{epoch}_step_{step}.pth", lambda handle: torch.save(state, handle))
    link = folder / f".{LATEST}.new"
    link.unlink(missing_ok=True)
    link.symlink_to(path.name)
    os.replace(link, folder / LATEST)
    log.info("saved %s", path)
    return path


def find_checkpoint(name: str, folder: Path) -> Path | None:
    """The checkpoint that `--resume_from=NAME` means: a path, or "latest" of `folder`; None if there is none yet.

    Raises:
        ValueError: a path that does not exist.
    """
    if name != "latest":
        if not Path(name).is_file():
            raise ValueError(f"no such checkpoint to resume from: {name}")
        return Path(name)
    if (folder / LATEST).is_file():
        return (folder / LATEST).resolve()
    found = {
        path: re.fullmatch(r"epoch_\d+_step_(\d+)", path.stem) for path in folder.glob("epoch_*_step_*.pth")
    }
    numbered = {path: int(match[1]) for path, match in found.items() if match}
    return max(numbered, key=numbered.__getitem__, default=None)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a training checkpoint on to the CPU.

    Raises:
        ValueError: it is no training checkpoint, or broken.
    """
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # noqa: BLE001 torch raises many kinds for a broken file
        raise ValueError(f"cannot read the checkpoint {path}: {str(error).splitlines()[0]}") from error
    missing = {"state_dict", "optimizer", "scheduler", "step"} - set(state)
    if missing:
        raise ValueError(
            f"{path} is no training checkpoint: it lacks {', '.join(sorted(missing))}; use model.load_from"
        )
    return state
