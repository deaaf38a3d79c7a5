"""The published import path of the pipeline: `from app.sana_pipeline import SanaPipeline`."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from sana import pipeline

__all__ = ["SanaPipeline"]


class SanaPipeline(pipeline.SanaPipeline):
    """`sana.SanaPipeline` with the published way to show progress: `register_progress_bar(fn)`, fn(done, desc=...).

    `done` goes from 0 to 1; a callback given to a call is asked instead.
    """

    _progress: Callable[..., object] | None = None

    def register_progress_bar(self, progress_fn: Callable[..., object] | None = None) -> None:
        """Call `progress_fn` after every step of every call; None stops that."""
        self._progress = progress_fn

    @wraps(pipeline.SanaPipeline.__call__)
    def __call__(self, *args: Any, **settings: Any) -> Any:
        if self._progress is not None and settings.get("callback") is None:
            show = self._progress
            settings["callback"] = lambda step, total, x, x0: show(step / total, desc=f"step {step}/{total}")
        return super().__call__(*args, **settings)
