"""One request on its way through the engine: what it asks for, how far it is, and what came of it."""

from __future__ import annotations

import functools
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from sana.generation import Settings, Task
from sana.runtime.keeping import png_text
from sana.utils.images import encode_png

if TYPE_CHECKING:
    from PIL.Image import Image

    from sana.utils.manifest import Row


class QueueFull(RuntimeError):
    """No place for another request; `retry_after` seconds from now there should be."""

    def __init__(self, waiting: int, retry_after: int) -> None:
        super().__init__(
            f"the queue is full: {waiting} images are waiting; try again in about {retry_after} s"
        )
        self.retry_after = retry_after


class Closed(RuntimeError):
    """The engine takes no more requests."""


class Expired(TimeoutError):
    """A request was not finished in its time."""


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """One image of a request."""

    task: Task
    picture: Image | None
    """None if the safety model withheld it."""
    withheld: str = ""
    """Why it was."""


@dataclass(eq=False, kw_only=True)
class Ticket:
    """A request of one prompt. `future` becomes the list of its `Drawn`, in order, or an error."""

    tasks: tuple[Task, ...]
    settings: Settings
    """Resolved."""
    record: Row
    """Of the settings and the model, as PNGs hold it."""
    timeout: float
    """Seconds from `submitted`."""
    preview_every: int = 0
    """Every so many steps `previews` are made; 0 is never."""
    future: Future[list[Drawn]] = field(default_factory=Future)
    submitted: float = field(default_factory=time.monotonic)
    drawing: int = 0
    """How many of its images are in the batch that is being drawn."""
    step: int = 0
    """Of that batch."""
    drawn: dict[int, Drawn] = field(default_factory=dict)
    """Number of the image -> the finished ones."""
    previews: dict[int, Image] = field(default_factory=dict)
    """Number of the image -> its prediction in the step before."""
    _settling: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @functools.cached_property
    def kind(self) -> tuple[object, ...]:
        """What all images of one batch share."""
        own = {"seed": 0, "negative_prompt": "", "height": None, "width": None}
        return self.tasks[0].size, replace(self.settings, **own)

    @property
    def total(self) -> int:
        """Steps of one batch."""
        steps = self.settings.num_inference_steps
        assert steps is not None, "resolved settings have a number of steps"
        return steps

    @property
    def progress(self) -> float:
        """From 0 to 1."""
        return (len(self.drawn) + self.drawing * self.step / self.total) / len(self.tasks)

    @property
    def remaining(self) -> float:
        """Seconds until it expires; not below 0."""
        return max(0.0, self.submitted + self.timeout - time.monotonic())

    @property
    def over(self) -> bool:
        """Finished, failed, cancelled or out of time: nothing more need be drawn for it."""
        if not self.future.done() and self.remaining == 0:
            self.settle(Expired(f"not finished within {self.timeout:g} s"))
        return self.future.done()

    def png(self, drawn: Drawn) -> bytes:
        """The file of one of its images, which says what it takes to draw it again."""
        assert drawn.picture is not None, "a picture that was withheld is not given out"
        return encode_png(drawn.picture, png_text(drawn.task.row() | {"settings": self.record}))

    def cancel(self) -> None:
        """Nobody wants it any more. Others of its batch go on; a batch of which all are cancelled stops."""
        self.future.cancel()

    def settle(self, outcome: list[Drawn] | BaseException) -> None:
        """Give the future its end, if it has none yet."""
        with self._settling:
            if not self.future.done() and self.future.set_running_or_notify_cancel():
                if isinstance(outcome, BaseException):
                    self.future.set_exception(outcome)
                else:
                    self.future.set_result(outcome)

    def result(self) -> list[Drawn]:
        """Wait for the end, as long as the request has time.

        Raises:
            Expired: it was not enough. Also what the engine met, and CancelledError.
        """
        try:
            return self.future.result(self.remaining)
        except TimeoutError:
            assert self.over, "its time has passed"
            return self.future.result()
