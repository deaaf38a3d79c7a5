"""The shapes benchmark: how well a model follows prompts, measured exactly on drawn scenes.

GenEval's six tags and decision logic over held-out combinations, four images for each prompt. Images come
from `sana.generation`; any folder of them, or one in GenEval's layout, can be scored again without the model.
See asset/docs/shapes_benchmark.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sana.metrics.geneval import GenEvalPrompt, find_samples, summarise
from sana.metrics.geneval_folder import Record, read_pixels, shapes_eyes
from sana.metrics.report import Report, make_report
from sana.shapes.benchmark import IMAGES_PER_PROMPT
from sana.utils import distributed
from sana.utils.manifest import Manifest

if TYPE_CHECKING:
    from sana.generation import Settings
    from sana.pipeline import SanaPipeline

PROTOCOL = "shapes benchmark 1: GenEval's decision logic, held-out prompts, exact detector"

Samples = list[tuple[Path, GenEvalPrompt]]


def subset(prompts: Sequence[GenEvalPrompt], limit: int | None) -> dict[int, GenEvalPrompt]:
    """Index -> prompt of `limit` prompts of each tag, spread evenly over its list; of all when None."""
    if limit is not None and limit < 1:
        raise ValueError(f"the limit for each tag must be at least 1, got {limit}")
    chosen = []
    for tag in dict.fromkeys(prompt.tag for prompt in prompts):
        places = [index for index, prompt in enumerate(prompts) if prompt.tag == tag]
        number = min(limit or len(places), len(places))
        chosen += [places[i * len(places) // number] for i in range(number)]
    return {index: prompts[index] for index in sorted(chosen)}


def draw(
    pipeline: SanaPipeline,
    prompts: Mapping[int, GenEvalPrompt],
    folder: str | Path,
    settings: Settings,
    *,
    batch_size: int,
    progress: bool = False,
) -> None:
    """Draw IMAGES_PER_PROMPT images of each prompt into `folder`; what is there already is kept.

    Args:
        prompts: index in the prompt file -> prompt; the index decides the noise.
    """
    from sana.generation import Prompt, generate  # lazy: scoring a folder needs no torch

    tasks = [Prompt(index=index, text=prompt.prompt) for index, prompt in prompts.items()]
    generate(
        pipeline,
        tasks,
        folder,
        settings,
        batch_size=batch_size,
        num_images_per_prompt=IMAGES_PER_PROMPT,
        progress=progress,
    )


def find_images(folder: str | Path, prompts: Mapping[int, GenEvalPrompt]) -> Samples:
    """(file, prompt) of every image of `prompts` in a folder of `sana.generation` or in GenEval's layout.

    Raises:
        ValueError: a prompt without images, unequal numbers of images, or an image of another prompt.
    """
    folder = Path(folder)
    rows = Manifest(folder).rows().values()
    samples: Samples = []
    for row in sorted(rows, key=lambda row: (row["index"], row["sample"])):
        prompt = prompts.get(row["index"])
        if prompt is not None:
            if prompt.prompt != row["prompt"]:
                file, expected = folder / row["file"], prompt.prompt
                raise ValueError(f"{file} shows {row['prompt']!r}; prompt {row['index']} is {expected!r}")
            samples.append((folder / row["file"], prompt))
    if not rows:
        wanted = set(prompts.values())
        samples = [(path, prompt) for path, prompt in find_samples(folder) if prompt in wanted]

    number = Counter(prompt for _, prompt in samples)
    if missing := [prompt.prompt for prompt in prompts.values() if prompt not in number]:
        raise ValueError(
            f"{folder} has no image of {len(missing)} of {len(prompts)} prompts, such as {missing[0]!r}"
        )
    if len(set(number.values())) > 1:
        raise ValueError(
            f"{folder} has from {min(number.values())} to {max(number.values())} images a prompt"
        )
    return samples


def score(samples: Iterable[tuple[Path, GenEvalPrompt]]) -> list[Record]:
    """The record of every image (`geneval.score_image`); ValueError for a file that is no image."""
    eyes = shapes_eyes()
    return [eyes.look(prompt, read_pixels(path), str(path)) for path, prompt in samples]


def draw_and_score(
    pipeline: SanaPipeline,
    prompts: Mapping[int, GenEvalPrompt],
    folder: str | Path,
    settings: Settings,
    *,
    batch_size: int,
) -> dict[str, Any] | None:
    """`draw`, then `summarise` of the records: in the main process; None in the others."""
    draw(pipeline, prompts, folder, settings, batch_size=batch_size)
    return summarise(score(find_images(folder, prompts))) if distributed.is_main() else None


def report(
    records: Sequence[Mapping[str, Any]],
    folder: str | Path,
    *,
    weights: Mapping[str, str] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Report:
    """The report of scored images; how they were made is read from the folder's manifest, if it has one."""
    rows = list(Manifest(folder).rows().values())
    made = dict(rows[0]["settings"]) if rows else {}
    transformer, dtype = made.pop("weights_sha256", None), made.pop("dtype", None)
    prompts, eyes = {record["metadata"] for record in records}, shapes_eyes()
    return make_report(
        metric=eyes.metric,
        values=summarise(records),
        n=len(records),
        protocol=PROTOCOL,
        settings={
            "prompts": len(prompts),
            "images_per_prompt": len(records) // len(prompts),
            "options": asdict(eyes.options),
            "generation": made,
            **(extra or {}),
        },
        weights=weights or ({"transformer": transformer} if transformer else {}),
        dtype=dtype,
    )
