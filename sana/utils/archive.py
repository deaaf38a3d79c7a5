"""A folder as one .tar, and back."""

import shutil
import tarfile
from pathlib import Path


def pack(folder: str | Path) -> Path:
    """Put a folder into `<folder>.tar`, in one step, and remove it."""
    folder = Path(folder)
    target, temporary = Path(f"{folder}.tar"), Path(f"{folder}.tar.tmp")
    with tarfile.open(temporary, "w") as archive:
        archive.add(folder, arcname=folder.name)
    temporary.replace(target)
    shutil.rmtree(folder)
    return target


def unpack(folder: str | Path) -> None:
    """Bring back the folder that `pack` removed, to go on with it; does nothing where there is no archive."""
    folder = Path(folder)
    archive_path = Path(f"{folder}.tar")
    if archive_path.exists():
        with tarfile.open(archive_path) as archive:
            archive.extractall(folder.parent, filter="data")
