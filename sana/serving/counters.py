"""What a server has done since it started, in the text format of Prometheus.

Format: https://prometheus.io/docs/instrumenting/exposition_formats/, version 0.0.4.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sana.serving.ticket import Ticket

OUTCOMES = ("ok", "failed", "cancelled", "expired", "rejected")
"""How a request can end; `rejected` found the queue full."""

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Counters:
    """Numbers that only grow; every method may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[str] = Counter()
        self._sums: Counter[str] = Counter()

    def count(self, outcome: str) -> None:
        """A request has ended so."""
        assert outcome in OUTCOMES
        with self._lock:
            self._requests[outcome] += 1

    def finished(self, ticket: Ticket) -> None:
        """A request that was taken has ended."""
        future = ticket.future
        if future.cancelled():
            self.count("cancelled")
            return
        error = future.exception()
        self.count("ok" if error is None else "expired" if isinstance(error, TimeoutError) else "failed")
        with self._lock:
            self._sums["requests"] += 1
            self._sums["request_seconds"] += time.monotonic() - ticket.submitted

    def batch(self, size: int, seconds: float) -> None:
        """A batch of `size` images was drawn in `seconds`."""
        with self._lock:
            self._sums.update({"batches": 1, "images": size, "batch_seconds": seconds})

    @property
    def seconds_per_image(self) -> float:
        """Mean so far; 1 before the first image."""
        with self._lock:
            images = self._sums["images"]
            return self._sums["batch_seconds"] / images if images else 1.0

    def text(self, gauges: Mapping[str, tuple[float, str]]) -> str:
        """All of it; `gauges`: name -> (value now, what it is)."""
        with self._lock:
            requests, sums = Counter(self._requests), Counter(self._sums)
        lines = _head("sana_requests_total", "counter", "Requests that ended, by outcome.")
        lines += [f'sana_requests_total{{outcome="{name}"}} {requests[name]}' for name in OUTCOMES]
        lines += _head("sana_images_total", "counter", "Images drawn.")
        lines += [f"sana_images_total {sums['images']}"]
        lines += _head("sana_batch_seconds", "summary", "Seconds that a batch took.")
        lines += [f"sana_batch_seconds_sum {sums['batch_seconds']:.6f}"]
        lines += [f"sana_batch_seconds_count {sums['batches']}"]
        lines += _head(
            "sana_request_seconds", "summary", "Seconds from a request to its end, if it was not cancelled."
        )
        lines += [f"sana_request_seconds_sum {sums['request_seconds']:.6f}"]
        lines += [f"sana_request_seconds_count {sums['requests']}"]
        for name, (value, help_text) in gauges.items():
            lines += [*_head(name, "gauge", help_text), f"{name} {value:g}"]
        return "\n".join(lines) + "\n"


def _head(name: str, kind: str, help_text: str) -> list[str]:
    return [f"# HELP {name} {help_text}", f"# TYPE {name} {kind}"]
