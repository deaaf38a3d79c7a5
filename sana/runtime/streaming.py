"""Many pictures, one batch after the other, with no more in memory than for a few.

Prompts that were encoded before wait on the disk; a background thread writes files; a picture that fails costs no other.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from sana.runtime.decoding import shortages
from sana.runtime.stages import PromptFeatures
from sana.utils.logging import get_logger
from sana.utils.oom import free_memory

logger = get_logger(__name__)


class Background:
    """Runs jobs one after the other in a thread of its own, beside the block that it is entered for.

    The block's end waits for all of them. The first exception of a job is raised in the block, by the next `submit` or at its
    end; the jobs after it are not run.
    """

    def __init__(self, waiting: int = 2) -> None:
        """`waiting`: jobs that may be submitted and not finished; `submit` then waits for one."""
        self._room = threading.Semaphore(waiting)
        self._failed: BaseException | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="background")

    def __enter__(self) -> Background:
        # Now, while there is memory for it: Python waits for ever for a thread that finds none to begin with, and the C
        # library ends the process if a library's data of a thread find none.
        self.submit(_use_libraries)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown()  # waits
        if kind is None:
            self._raise()

    def submit(self, job: Callable[[], object]) -> None:
        """Run `job` after those before it."""
        self._room.acquire()
        self._raise()
        try:
            self._thread.submit(self._run, job).add_done_callback(self._done)
        except RuntimeError:  # no memory for a thread: the system has the last word
            self._room.release()
            job()

    def _run(self, job: Callable[[], object]) -> None:
        if self._failed is None:
            job()

    def _done(self, future: Future) -> None:
        self._failed = self._failed or future.exception()
        self._room.release()

    def _raise(self) -> None:
        if self._failed is not None:
            raise self._failed


def _use_libraries() -> None:
    """What a job begins with: PyTorch takes memory for each thread that uses it."""
    torch.zeros(1).isfinite().all()


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What became of a task."""

    task: Any
    picture: Image | None
    latents: Tensor | None
    """(1, C, h, w): what the picture was decoded from, or, where there is none, how far it got."""
    error: str = ""
    decoded: str = ""
    """How, where memory did not suffice for the way asked for."""


def stream(
    batches: Sequence[Sequence[Any]],
    *,
    encode: Callable[[Sequence[Any]], PromptFeatures] | None,
    draw: Callable[..., Tensor],
    decode: Callable[[Sequence[Any], Tensor], list[Image]],
    callback: Callable[[int, int, Tensor, Tensor], None],
    device: torch.device,
    folder: Path,
) -> Iterator[Drawn]:
    """All tasks, batch by batch.

    Args:
        encode: the features of a batch's prompts; then all prompts are encoded before the first picture is drawn, so that
            the text encoder comes and goes once. None leaves that to `draw`.
        draw: called as draw(batch, features=..., callback=...) -> latents (n, C, h, w).
        decode: called with a batch and its latents.
        callback: see `sana.diffusion.solvers.Callback`.
        device: of the features.
        folder: where features wait on the disk, in a folder that is removed; the system's own for such things may be memory.
    """
    if encode is None:
        for batch in batches:
            yield from _safely(batch, None, draw, decode, callback)
        return
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".prompts-", dir=folder) as waiting:
        files = [Path(waiting, f"{number}.pt") for number in range(len(batches))]
        for batch, file in zip(batches, files, strict=True):
            try:
                encode(batch).save(file)
            except (MemoryError, OSError) as error:
                logger.warning("%s", error)  # again when the batch's turn comes, one by one in the end
                file.unlink(missing_ok=True)
        for batch, file in zip(batches, files, strict=True):
            features = PromptFeatures.load(file, device) if file.exists() else None
            file.unlink(missing_ok=True)
            yield from _safely(batch, features, draw, decode, callback)


def _safely(
    batch: Sequence[Any],
    features: PromptFeatures | None,
    draw: Callable[..., Tensor],
    decode: Callable[[Sequence[Any], Tensor], list[Image]],
    callback: Callable[[int, int, Tensor, Tensor], None],
) -> Iterator[Drawn]:
    """A batch at once; one by one where that fails."""
    latents: Tensor | None = None

    def watch(step: int, total: int, x: Tensor, x0: Tensor) -> None:
        nonlocal latents
        latents = x0
        callback(step, total, x, x0)

    try:
        latents = draw(batch, features=features, callback=watch)
    except (ArithmeticError, MemoryError) as error:
        reason = str(error)
    else:
        yield from _decoded(batch, latents, decode)
        return
    if len(batch) == 1:
        yield Drawn(task=batch[0], picture=None, latents=latents, error=reason)
        return
    latents = None
    free_memory()
    logger.warning("%d images at once failed, now one by one: %s", len(batch), reason)
    for row, task in enumerate(batch):
        yield from _safely([task], features and features.row(row), draw, decode, callback)


def _decoded(
    batch: Sequence[Any], latents: Tensor, decode: Callable[[Sequence[Any], Tensor], list[Image]]
) -> Iterator[Drawn]:
    """The pictures of a batch; what was drawn stays where they cannot be had."""
    try:
        with shortages() as ways:
            pictures, reason = decode(batch, latents), ""
    except (ArithmeticError, MemoryError) as error:
        pictures, reason = [None] * len(batch), str(error)
    for row, (task, picture) in enumerate(zip(batch, pictures, strict=True)):
        own = latents[row : row + 1]
        if picture is None and len(batch) > 1:  # another of them may be at fault
            yield from _decoded([task], own, decode)
        else:
            yield Drawn(
                task=task, picture=picture, latents=own, error=reason, decoded=", ".join(map(str, ways))
            )
