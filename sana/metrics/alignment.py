"""How well pictures fit their prompts: what CLIP score, ImageReward, PickScore and HPSv2 share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from sana.metrics.image_set import ScoredImage, described, open_image, require_prompts
from sana.metrics.report import Report, make_report
from sana.metrics.scoring import mean_by_category, score_images
from sana.utils.logging import get_logger

log = get_logger(__name__)


class Scorer(ABC):
    """A network that gives a picture with its prompt a number."""

    metric: str
    """Name of the number."""
    protocol: str
    """What it is, in a few words."""
    sha256: str
    """Of the weights."""
    dtype: torch.dtype

    @abstractmethod
    def prepare(self, picture: Image) -> Tensor:
        """A picture in RGB -> (3, H, W) float32; may run in a thread."""

    @abstractmethod
    def score_pixels(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """What `prepare` gave, (B, 3, H, W), and a prompt for each -> (B,) float32 on the CPU."""

    @abstractmethod
    def is_cut(self, prompt: str) -> bool:
        """Whether only the beginning of a prompt counts."""

    def score(self, images: Sequence[Image], prompts: Sequence[str]) -> list[float]:
        """A number for each picture with the prompt at its place.

        Raises:
            ValueError: not as many prompts as pictures.
        """
        if len(images) != len(prompts):
            raise ValueError(f"a prompt for each picture is needed, got {len(prompts)} for {len(images)}")
        pixels = torch.stack([self.prepare(image.convert("RGB")) for image in images])
        return self.score_pixels(pixels, prompts).tolist()


def measure(
    scorer: Scorer,
    items: Sequence[ScoredImage],
    work_folder: str | Path,
    *,
    batch_size: int = 32,
    threads: int = 4,
    settings: Mapping[str, Any] | None = None,
) -> Report:
    """The mean over all pictures, and over those of each category; processes share the work, see `score_images`.

    Args:
        work_folder: for the number of each picture.
        settings: what else the report is to say.

    Raises:
        ValueError: a picture without a prompt, and as `score_images`.
    """
    prompts = require_prompts(items)

    def score(batch: Sequence[ScoredImage], pixels: list[Tensor]) -> list[dict[str, float]]:
        scores = scorer.score_pixels(torch.stack(pixels), [item.prompt or "" for item in batch])
        return [{scorer.metric: score} for score in scores.tolist()]

    dtype = str(scorer.dtype).removeprefix("torch.")
    rows = score_images(
        items,
        score,
        work_folder,
        {"metric": scorer.metric, "protocol": scorer.protocol, "weights": scorer.sha256, "dtype": dtype},
        batch_size=batch_size,
        load=lambda path: scorer.prepare(open_image(path)),
        threads=threads,
    )
    values = [row[scorer.metric] for row in rows]
    categories = mean_by_category(items, values)
    cut = sum(map(scorer.is_cut, dict.fromkeys(prompts)))
    if cut:
        log.warning("of %d prompts only the beginning counts: they are longer than the network reads", cut)
    return make_report(
        metric=scorer.metric,
        values={scorer.metric: math.fsum(values) / len(values)}
        | ({"categories": categories} if categories else {}),
        n=len(items),
        protocol=scorer.protocol,
        settings={"batch_size": batch_size, "prompts": len(set(prompts)), "prompts_cut": cut}
        | {"scorer_dtype": dtype}
        | described(items)
        | dict(settings or {}),
        weights={"scorer": scorer.sha256},
    )
