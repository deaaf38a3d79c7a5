"""Writing files so that a reader never sees half of one."""

import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def write_atomic(path: str | Path, content: bytes | Callable[[BinaryIO], object]) -> Path:
    """Write `content` to `path`: afterwards the file is complete or as it was before, also if the process is killed.

    Args:
        path: the file; its folder is made where it does not exist.
        content: the bytes, or a function that writes them to an open binary file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Same folder, hence same file system: os.replace is atomic only there. The name is short, as `path.name` may have
    # the longest length that the file system takes.
    temporary = path.parent / f".{secrets.token_hex(8)}.tmp"
    try:
        with open(temporary, "wb") as handle:
            if callable(content):
                content(handle)
            else:
                handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
