"""What keeps hours of work when something goes wrong: stop signals, hangs, full disks."""

from __future__ import annotations

import contextlib
import faulthandler
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from sana.utils.logging import get_logger

log = get_logger(__name__)


class StopRequest:
    """Whether this process was asked to stop, by SIGTERM, by Ctrl-C or because its hours are over; as a context, it listens.

    Further signals change nothing: torchrun passes on what a terminal has sent to all already.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self, hours: float) -> None:
        self.signalled = False
        self._ends = time.monotonic() + hours * 3600
        self._before: list[Any] = []

    @property
    def wanted(self) -> bool:
        """Whether to save and stop at the end of this step."""
        return self.signalled or time.monotonic() > self._ends

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # Python hands signals to no other
            self._before = [signal.signal(number, self._note) for number in self.SIGNALS]
        return self

    def __exit__(self, *_: object) -> None:
        for number, before in zip(self.SIGNALS, self._before, strict=False):
            signal.signal(number, before)
        self._before = []

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self.signalled = True


@contextlib.contextmanager
def shielded() -> Iterator[None]:
    """Processes started here never see the signals to stop: schedulers and terminals send them to the whole group, and a
    loader's worker that died of one would end the step that is about to be saved. They end with the process that started
    them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, StopRequest.SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Watchdog:
    """Ends a process that hangs, say in a collective that another rank never joins, and first writes down where.

    As a context, it is on; once `minutes` pass without `beat`, the stacks of all threads go to `path`. That is done outside Python's lock, so that
    nothing can hold it up; then one line says where they are and the process ends. Every rank has its own watchdog, and as
    all of them wait for the one that hangs, each leaves its stacks.
    """

    GRACE_SECONDS = 5.0
    """Between the stacks and the end: time for the ranks that began the step a little later."""

    def __init__(self, path: Path, minutes: float) -> None:
        self.path, self.seconds = path, minutes * 60
        self._file: Any = None
        self._timer: threading.Timer | None = None

    def __enter__(self) -> Watchdog:
        if math.isfinite(self.seconds):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "w")  # noqa: SIM115 open while the watchdog is on
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self.rest()
            self._file.close()
            self._file = None
            self.path.unlink()
            with contextlib.suppress(OSError):  # another rank's file is in it
                self.path.parent.rmdir()

    def beat(self) -> None:
        """The process is alive: the time begins anew. Without effect outside the watchdog's `with`."""
        if self._file is None:
            return
        self.rest()
        faulthandler.dump_traceback_later(self.seconds, file=self._file)
        self._timer = threading.Timer(self.seconds + self.GRACE_SECONDS, self._end)
        self._timer.daemon = True
        self._timer.start()

    def rest(self) -> None:
        """No limit until the next beat."""
        if self._timer is not None:
            self._timer.cancel()
            faulthandler.cancel_dump_traceback_later()

    def _end(self) -> None:
        log.error(
            "nothing has happened for %.3g minutes (train.hang_minutes): this process ends; what each thread was doing "
            "is in %s",
            self.seconds / 60,
            self.path,
        )
        sys.stderr.flush()
        os._exit(1)


def patiently(
    write: Callable[[], object],
    accelerator: Accelerator,
    stop: StopRequest,
    watchdog: Watchdog,
    seconds: float,
) -> bool:
    """Call `write` in the main process until the disk takes it; every process waits. Returns whether it did.

    It gives up, in every process alike, only when the run is asked to stop. What was saved before stays as it was.
    """
    failures = 0
    while True:
        outcome = ["done"]
        if accelerator.is_main_process:
            try:
                write()
            except OSError as error:
                outcome = ["stop" if stop.signalled else "wait"]
                if failures % 10 == 0:
                    log.error(
                        "cannot save: %s; the checkpoints before are whole. Training waits and tries again every %g s: "
                        "make room, or stop it",
                        error,
                        seconds,
                    )
        watchdog.beat()
        broadcast_object_list(outcome)
        if outcome[0] != "wait":
            return outcome[0] == "done"
        failures += 1
        until = time.monotonic() + seconds
        while time.monotonic() < until and not stop.signalled:
            time.sleep(0.2)
