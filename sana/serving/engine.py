"""One model for many requests: a bounded queue, and batches put together as requests come.

Requests of any prompts and seeds are drawn in one batch if their size and the rest of their settings are the same. The oldest
image that waits decides what is drawn next, so that no size starves another. An image does not depend on the others of
its batch but for the last bits of float arithmetic: its noise is that of its own seed, and where one of a batch fails
they are all drawn again, each alone.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from sana import generation
from sana.serving.counters import Counters
from sana.serving.limits import Limits
from sana.serving.ticket import Closed, Drawn, QueueFull, Ticket
from sana.utils.logging import get_logger
from sana.utils.oom import is_out_of_memory

if TYPE_CHECKING:
    from PIL.Image import Image

    from sana.generation import Settings, Task
    from sana.pipeline import SanaPipeline
    from sana.serving.safety import Safety

logger = get_logger(__name__)

PREVIEW_PIXELS = 512 * 512
"""Images that are drawn at up to this size can be looked at before they are done; decoding larger ones takes too long."""


class _Abandoned(Exception):  # noqa: N818 it is no error: nobody waits for the batch any more
    """Ends the sampling of a batch of which every request is over."""


@dataclass(frozen=True)
class _Shot:
    """One image that waits: number `index` of a request."""

    ticket: Ticket
    index: int

    @property
    def task(self) -> Task:
        return self.ticket.tasks[self.index]


class Engine:
    """Draws on a thread of its own until `close`. Every method may be called from any thread.

    Attributes:
        pipeline: the model; nobody else should call it meanwhile.
        limits: what one request may ask for.
        max_batch: images drawn at once.
        counters: what has happened so far.
    """

    def __init__(
        self,
        pipeline: SanaPipeline,
        *,
        max_batch: int = 8,
        max_wait: float = 0.02,
        queue: int = 64,
        timeout: float = 300.0,
        limits: Limits | None = None,
        safety: Safety | None = None,
    ) -> None:
        """Start.

        Args:
            max_batch: images drawn at once.
            max_wait: seconds that a request waits for others to join its batch, from when it came.
            queue: images that may wait; those that are being drawn do not count.
            timeout: seconds that a request has from when it came.
            safety: looks at prompts and pictures; None is nobody.

        Raises:
            ValueError: a number out of range.
        """
        for name, value, lowest in (
            ("max_batch", max_batch, 1),
            ("queue", queue, 1),
            ("max_wait", max_wait, 0),
        ):
            if not (math.isfinite(value) and value >= lowest):
                raise ValueError(f"{name} must be at least {lowest}, got {value}")
        if not timeout > 0:
            raise ValueError(f"timeout must be positive, got {timeout}")
        self.pipeline, self.limits, self.safety = pipeline, limits or Limits(), safety
        self.counters = Counters()
        self.max_batch, self._max_wait, self._room, self._timeout = max_batch, max_wait, queue, timeout
        self._waiting: deque[_Shot] = deque()
        self._drawing: list[_Shot] = []
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="sana-engine", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Images in the queue."""
        with self._changed:
            return self._drop_what_is_over()

    @property
    def drawing(self) -> int:
        """Images in the batch that is being drawn."""
        return len(self._drawing)

    @property
    def alive(self) -> bool:
        """It draws, and takes requests."""
        return self._thread.is_alive() and not self._closed

    def submit(
        self,
        prompt: str,
        settings: Settings,
        count: int = 1,
        *,
        previews: int = 0,
        timeout: float | None = None,
    ) -> Ticket:
        """Ask for `count` images of a prompt.

        Args:
            settings: their seed and the number of the image decide the noise, as `scripts/inference.py --prompt` does.
            previews: how often, at most, the ticket's `previews` are made. The autoencoder decodes them between the
                steps, which the whole batch waits for, so there are none above PREVIEW_PIXELS; nor where a safety model
                looks at pictures, which does not see them.
            timeout: seconds, if less than the engine's.

        Raises:
            ValueError: something that cannot be drawn or is not allowed, by limits or by the safety model; one line.
            QueueFull, Closed: not now; not any more.
        """
        if count > self._room:
            raise ValueError(
                f"{count} images were asked for, and the queue holds {self._room}: ask for fewer at once"
            )
        tasks, settings = self.limits.tasks(self.pipeline, prompt, settings, count)
        if self.safety is not None:
            self.safety.require_harmless(tasks[0].prompt.text)
        ticket = Ticket(
            tasks=tasks,
            settings=settings,
            record=settings.record(self.pipeline),
            timeout=min(self._timeout, timeout or self._timeout),
            preview_every=self._preview_interval(tasks[0], settings, previews),
        )
        with self._changed:
            waiting = self._drop_what_is_over()
            if self._closed:
                raise Closed("shutting down: no more requests are taken")
            if waiting + count > self._room:
                self.counters.count("rejected")
                raise QueueFull(waiting, self._seconds_until_room(count))
            ticket.future.add_done_callback(lambda future: self.counters.finished(ticket))
            self._waiting.extend(_Shot(ticket, index) for index in range(count))
            self._changed.notify_all()
        return ticket

    def close(self, *, drain: bool = True) -> None:
        """Take no more requests, finish those that were taken (or only the batch that runs, without `drain`), and stop."""
        with self._changed:
            self._closed = True
            if not drain:
                for shot in self._waiting:
                    shot.ticket.settle(Closed("shut down before it was drawn"))
            self._changed.notify_all()
        self._thread.join()

    def _preview_interval(self, task: Task, settings: Settings, previews: int) -> int:
        """Every how many steps there is one; 0 is never, nor where the autoencoder would have to be brought each time."""
        height, width = self.pipeline.sizes(*task.size, settings.use_resolution_binning)[1]
        looked_at = self.safety is not None and self.safety.of_pictures
        if not previews or height * width > PREVIEW_PIXELS or self.pipeline.offload != "none" or looked_at:
            return 0
        assert settings.num_inference_steps, "resolved settings have a number of steps"
        return math.ceil(settings.num_inference_steps / (previews + 1))

    # What follows runs on the engine's thread, but for _drop_what_is_over and _seconds_until_room, which need the lock.

    def _drop_what_is_over(self) -> int:
        """Forget images that nobody waits for; how many are left."""
        if any(shot.ticket.over for shot in self._waiting):
            self._waiting = deque(shot for shot in self._waiting if not shot.ticket.over)
        return len(self._waiting)

    def _seconds_until_room(self, count: int) -> int:
        ahead = len(self._waiting) + count - self._room + len(self._drawing)
        return max(1, math.ceil(ahead * self.counters.seconds_per_image))

    def _work(self) -> None:
        while batch := self._next_batch():
            self._draw(batch)
            self._drawing = []

    def _next_batch(self) -> list[_Shot]:
        """Wait for requests, then a short while for others like the oldest; nothing when all is done."""
        with self._changed:
            while True:
                if not self._drop_what_is_over():
                    if self._closed:
                        return []
                    self._changed.wait()
                    continue
                oldest = self._waiting[0]
                alike = [shot for shot in self._waiting if shot.ticket.kind == oldest.ticket.kind][
                    : self.max_batch
                ]
                patience = oldest.ticket.submitted + self._max_wait - time.monotonic()
                if len(alike) == self.max_batch or patience <= 0 or self._closed:
                    self._waiting = deque(shot for shot in self._waiting if shot not in alike)
                    self._drawing = alike
                    return alike
                self._changed.wait(patience)

    def _draw(self, batch: list[_Shot]) -> None:
        """Draw a batch and give its images to their requests."""
        start = time.monotonic()
        try:
            pictures = self._call(batch)
        except _Abandoned:
            return
        except Exception as error:  # noqa: BLE001 whatever it is, the requests hear of it and the engine goes on
            if len(batch) == 1:
                # A value that cannot be, or memory that is not there, is no mistake of ours and needs no traceback.
                known = isinstance(error, ValueError | ArithmeticError | OSError) or is_out_of_memory(error)
                height, width = batch[0].task.size
                logger.warning(
                    "an image of %d x %d failed: %s", width, height, error, exc_info=None if known else error
                )
                batch[0].ticket.settle(error)
            for shot in batch if len(batch) > 1 else ():
                if not shot.ticket.over:
                    self._draw([shot])
            return
        self.counters.batch(len(batch), time.monotonic() - start)
        for shot, picture in zip(batch, pictures, strict=True):
            self._deliver(shot, picture)

    def _call(self, batch: list[_Shot]) -> list[Image]:
        tickets = {id(shot.ticket): shot.ticket for shot in batch}.values()
        for ticket in tickets:
            ticket.step, ticket.drawing = 0, sum(shot.ticket is ticket for shot in batch)

        def after_step(step: int, total: int, x: Tensor, x0: Tensor) -> None:
            if all(ticket.over for ticket in tickets):
                raise _Abandoned
            for ticket in tickets:
                ticket.step = step
            if step < total:
                self._preview(batch, step, x0)

        return generation.draw(
            self.pipeline,
            [shot.task for shot in batch],
            batch[0].ticket.settings,
            negative_prompts=[shot.ticket.settings.negative_prompt for shot in batch],
            callback=after_step,
        )

    def _preview(self, batch: list[_Shot], step: int, x0: Tensor) -> None:
        """Decode what the solver predicts, for those who asked for it."""
        for shot, latents in zip(batch, x0, strict=True):
            every = shot.ticket.preview_every
            if every and step % every == 0 and not shot.ticket.over:
                (shot.ticket.previews[shot.index],) = self.pipeline.decode(
                    latents[None], shot.task.size, "pil"
                )

    def _deliver(self, shot: _Shot, picture: Image) -> None:
        ticket = shot.ticket
        if ticket.over:
            return
        try:
            reason = self.safety.objection(picture) if self.safety is not None else ""
        except Exception as error:  # noqa: BLE001 as in _draw; a picture that nobody looked at is not given out
            ticket.settle(error)
            return
        ticket.drawn[shot.index] = Drawn(task=shot.task, picture=None if reason else picture, withheld=reason)
        ticket.drawing -= 1
        if len(ticket.drawn) == len(ticket.tasks):
            ticket.settle([ticket.drawn[index] for index in range(len(ticket.tasks))])
