"""GenEval over a folder: which image is of which prompt, the scoring of all, the files that come of it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sana.metrics.geneval import (
    ColourClassifier,
    Detector,
    GenEvalOptions,
    GenEvalPrompt,
    find_samples,
    score_image,
    summarise,
)
from sana.metrics.image_set import PromptEntry, ScoredImage, described, open_image, read_image_set
from sana.metrics.report import Report, make_report
from sana.metrics.scoring import score_images
from sana.utils.files import write_atomic
from sana.utils.logging import get_logger
from sana.utils.manifest import Manifest

log = get_logger(__name__)

Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Sample:
    """One image and what it must show."""

    item: ScoredImage
    prompt: GenEvalPrompt


@dataclass(frozen=True, kw_only=True, slots=True)
class Eyes:
    """What looks at the images."""

    detector: Detector
    classify_colours: ColourClassifier
    options: GenEvalOptions
    facts: Mapping[str, Any]
    """What decides their answers: names of the models, background, crop, ... (JSON values)."""
    weights: Mapping[str, str]
    """Part -> sha256."""
    metric: str = "GenEval"
    """Name of the report."""

    def look(self, prompt: GenEvalPrompt, image: np.ndarray, filename: str) -> Record:
        """The record of one image, (H, W, 3) uint8."""
        seen = {"detector": self.detector, "classify_colours": self.classify_colours, "options": self.options}
        return score_image(prompt, image, filename=filename, **seen)


def read_samples(
    folder: str | Path, prompts: Mapping[int, GenEvalPrompt] | None = None, *, allow_missing: bool = False
) -> list[Sample]:
    """The images of a folder in the published layout, or of one that scripts/inference.py wrote, prompt by prompt.

    Args:
        prompts: place in the prompt file -> prompt, of all that must have images; those of others are left out. None: all
            that the published layout holds, whose records say the prompts.
        allow_missing: log what is missing and go on with the rest.

    Raises:
        ValueError: nothing there, a prompt without an image or with fewer than others, an image of another prompt.
    """
    folder = Path(folder)
    if Manifest(folder).rows() and not any(folder.glob("*/samples")):
        if prompts is None:
            raise ValueError(f"{folder} has no GenEval records: give the file of prompts (--prompts)")
        entries = [PromptEntry(prompts[index].prompt) for index in range(len(prompts))]
        images = read_image_set(folder, entries, allow_missing=allow_missing)
        return [Sample(item, prompts[item.prompt_index]) for item in images]

    samples = []
    for path, prompt in find_samples(folder, allow_missing=allow_missing):
        index, name = int(path.parents[1].name), path.relative_to(folder).as_posix()
        if prompts is not None and prompts.get(index, prompt) != prompt:
            raise ValueError(
                f"{path.parents[1]} is of {prompt.prompt!r}, prompt {index} is {prompts[index].prompt!r}"
            )
        if prompts is None or index in prompts:
            item = ScoredImage(path, name, prompt.prompt, prompt.tag, index, int(path.stem))
            samples.append(Sample(item, prompt))
    _require_even(folder, samples, prompts, allow_missing)
    return samples


def _require_even(
    folder: Path, samples: Sequence[Sample], prompts: Mapping[int, GenEvalPrompt] | None, allow_missing: bool
) -> None:
    """As many images of each prompt."""
    number = Counter(sample.item.prompt_index for sample in samples)
    wanted = sorted(number if prompts is None else prompts)
    most = max(number.values(), default=0)
    if not most:
        raise ValueError(f"{folder}: no image of any of {len(wanted)} prompts")
    if fewer := [index for index in wanted if number[index] < most]:
        first = f"the first {fewer[0]:05d} ({number[fewer[0]]} of {most})"
        problem = f"{folder}: {len(fewer)} of {len(wanted)} prompts lack images, {first}"
        if not allow_missing:
            raise ValueError(f"{problem}; --allow_missing measures the rest")
        log.warning("%s; left out", problem)


def read_pixels(path: str | Path) -> np.ndarray:
    """A picture upright, (H, W, 3) uint8. Raises as `open_image`."""
    return np.asarray(open_image(path, exif=True))


def score(samples: Sequence[Sample], eyes: Eyes, work_folder: str | Path) -> list[Record]:
    """The record of every image; done ones are kept in `work_folder`, and a second run goes on there.

    Raises:
        ValueError: an image cannot be read (the message names it), or the folder has records of other settings.
    """
    prompts = {sample.item.name: sample.prompt for sample in samples}

    def look(items: Sequence[ScoredImage], images: list[np.ndarray]) -> list[Record]:
        pairs = zip(items, images, strict=True)
        return [eyes.look(prompts[item.name], image, str(item.path)) for item, image in pairs]

    settings = {"metric": "GenEval", "options": asdict(eyes.options), **eyes.facts}
    settings["weights"] = dict(eyes.weights)
    records = score_images(
        [sample.item for sample in samples],
        look,
        work_folder,
        settings,
        batch_size=1,  # a detector takes one image, and an interruption costs one
        load=read_pixels,
    )
    if records and not any(json.loads(record["details"]) for record in records):
        log.warning(
            "no object was found in any of %d images: if they are not blank, the detector is broken, not the model",
            len(records),
        )
    return records


def shapes_eyes() -> Eyes:
    """Sana-tiny's: the exact detector of drawn shapes, which also knows their colours. Needs no network."""
    from sana.shapes.detector import MIN_SCORE, classify_colours, detect  # lazy: needs scipy

    # It reports no duplicates, so that counting needs no threshold of its own.
    options = GenEvalOptions(threshold=MIN_SCORE, counting_threshold=MIN_SCORE)
    facts = {"detector": "exact shapes detector", "colours": "exact shapes detector"}
    return Eyes(
        detector=detect,
        classify_colours=classify_colours,
        options=options,
        facts=facts,
        weights={},
        metric="GenEval (shapes)",
    )


def write_records(records: Sequence[Record], path: str | Path) -> Path:
    """The published result file, one JSON object a line, which the published summary script reads."""
    return write_atomic(path, "".join(f"{json.dumps(record)}\n" for record in records).encode("utf-8"))


def report(samples: Sequence[Sample], records: Sequence[Record], eyes: Eyes) -> Report:
    """The report of scored images; how they were made is read from the folder's manifest, where it has one."""
    about = described([sample.item for sample in samples])
    prompts = len({sample.item.prompt_index for sample in samples})
    return make_report(
        metric=eyes.metric,
        values=summarise(records),
        n=len(records),
        protocol=f"GenEval: published decision logic; {eyes.facts['detector']}; colours: {eyes.facts['colours']}",
        settings={
            "prompts": prompts,
            "images_per_prompt": len(records) / prompts,
            "options": asdict(eyes.options),
            **eyes.facts,
            **about,
        },
        weights=eyes.weights,
    )
