"""What one request may ask for: checked where the model is, whatever a form or a client let through."""

from __future__ import annotations

from dataclasses import dataclass

from sana.generation import Prompt, Settings, Task, plan
from sana.pipeline import SanaPipeline

SEEDS = 2**63
"""Seeds are from 0 to below this."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The most that one request may have."""

    prompt: int = 2000
    """Characters, of the prompt and of the negative prompt."""
    images: int = 8
    steps: int = 100
    guidance: float = 30.0
    """Both scales; they are at least 1."""
    pixels: int | None = None
    """Width times height; None is four times the model's own size."""

    def pixels_of(self, pipeline: SanaPipeline) -> int:
        """`pixels` for this model."""
        return self.pixels or 4 * pipeline.config.model.image_size**2

    def tasks(
        self, pipeline: SanaPipeline, prompt: str, settings: Settings, count: int
    ) -> tuple[tuple[Task, ...], Settings]:
        """The images of a request, and its settings without a None.

        Raises:
            ValueError: more than this allows, or what the model cannot draw; one line.
        """
        for what, text in (("prompt", prompt), ("negative prompt", settings.negative_prompt)):
            if len(text) > self.prompt:
                raise ValueError(f"the {what} has {len(text)} characters, at most {self.prompt} are allowed")
        Prompt(text=settings.negative_prompt)  # refuses what is no valid Unicode, as of the prompt
        settings = settings.resolved(pipeline)
        for what, value, lowest, highest in (
            ("number of images", count, 1, self.images),
            ("number of steps", settings.num_inference_steps, 1, self.steps),
            ("seed", settings.seed, 0, SEEDS - 1),
            ("guidance scale", settings.guidance_scale, 1, self.guidance),
            ("PAG scale", settings.pag_guidance_scale, 1, self.guidance),
        ):
            if not lowest <= value <= highest:  # NaN is not, either
                raise ValueError(f"the {what} must be from {lowest} to {highest}, got {value}")
        tasks = tuple(plan(pipeline, [Prompt(text=prompt.strip())], settings, count))
        height, width = tasks[0].size
        if height * width > self.pixels_of(pipeline):
            raise ValueError(
                f"{width} x {height} is {height * width} pixels, at most {self.pixels_of(pipeline)} are allowed"
            )
        return tasks, settings
