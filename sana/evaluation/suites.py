"""From a model to numbers: each suite draws the pictures of a prompt set and measures them.

A suite is what to draw and which metrics to take. Pictures lie in a folder named after the settings, a second run draws and
scores what is missing. A metric that fails (weights that are not there, a disk that is full) costs no other one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sana.evaluation.shapes_benchmark import subset
from sana.generation import Prompt, Settings, folder_name, generate
from sana.metrics import alignment, dpg, dpg_folder, fid, geneval, geneval_folder
from sana.metrics.image_set import (
    PromptEntry,
    ScoredImage,
    described,
    open_image,
    read_image_set,
    read_prompts,
)
from sana.metrics.report import Report
from sana.metrics.weights import fetched_by, folder_sha256
from sana.pipeline import SanaPipeline
from sana.shapes.benchmark import IMAGES_PER_PROMPT, PROMPTS_FILE
from sana.utils import distributed, hub, images
from sana.utils.logging import first_line, get_logger

log = get_logger(__name__)

_RAW = "https://raw.githubusercontent.com"
_FETCH = {
    "mjhq": "hf download playgroundai/MJHQ-30K meta_data.json mjhq30k_imgs.zip --repo-type dataset --local-dir {folder}, "
    "then unzip the pictures to {folder}/imgs",
    "geneval": f"curl --create-dirs -Lo {{}} {_RAW}/djghosh13/geneval/main/prompts/evaluation_metadata.jsonl",
    "image_reward": f"curl --create-dirs -Lo {{}} {_RAW}/THUDM/ImageReward/main/benchmark/benchmark-prompts.json",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Sources:
    """Where prompts, reference pictures and the networks of the metrics are; None: the published ones, on the hub."""

    mjhq: str = "data/test/PG-eval-data/MJHQ-30K"
    """Folder with `meta_data.json` and `imgs`."""
    reference: str | None = None
    """Reference of FID: folder of pictures or .npz (None: `imgs` of `mjhq`)."""
    geneval_prompts: str = "data/test/geneval/evaluation_metadata.jsonl"
    dpg_csv: str = "data/test/dpg_bench/dpg_bench.csv"
    image_reward_prompts: str = "data/test/image_reward/benchmark-prompts.json"
    inception: str | None = None
    clip: str | None = None
    detector: str | None = None
    """Of GenEval: folder or hub name, or "shapes" for the exact detector of drawn shapes."""
    judge: str | None = None
    reward: str | None = None
    reward_tokenizer: str | None = None
    device: str | torch.device = "cpu"
    dpg_grids: bool = False
    """Also write 2 x 2 grids of DPG-Bench's pictures, for the published evaluator."""
    limit: int | None = None
    """For a quick look: only this many prompts, of GenEval of each tag."""


Metric = Callable[[Path, Path], Report]
"""`(folder of pictures, folder for partial results) -> report`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Suite:
    """What to draw and what to measure on it."""

    name: str
    prompts: Sequence[Prompt]
    images_per_prompt: int
    metrics: Mapping[str, Metric]
    lossless: bool = False
    """PNG, whatever is asked for: the published protocol of GenEval."""
    stem: Callable[[Prompt, int], str] | None = None
    """See `sana.generation.generate`."""


def _prompts(entries: Sequence[PromptEntry]) -> list[Prompt]:
    return [Prompt(text=entry.text, index=index, key=entry.key) for index, entry in enumerate(entries)]


def _mjhq(sources: Sources) -> Suite:
    """FID and CLIP score."""
    meta = f"{sources.mjhq}/meta_data.json"
    with fetched_by(_FETCH["mjhq"].format(folder=sources.mjhq), meta):
        entries = read_prompts(hub.resolve(meta))

    def frechet(folder: Path, work: Path) -> Report:
        from sana.metrics.features import feature_network

        place = sources.reference or f"{sources.mjhq}/imgs"
        network = feature_network(weights=sources.inception, device=sources.device)
        if place.endswith(".npz"):
            reference = fid.Statistics.load(hub.resolve(place))
        else:
            with fetched_by(_FETCH["mjhq"].format(folder=sources.mjhq), place):
                pictures = read_image_set(hub.resolve(place), entries, limit=sources.limit)
            # Not in `work`: the next checkpoint has the same.
            kept = work.with_name(f"reference.{network.sha256[:8]}.work")
            reference = fid.set_statistics(pictures, network, kept)
        drawn = read_image_set(folder, entries, limit=sources.limit)
        return fid.measure(drawn, reference, network, work, settings={"reference": place})[0]

    def clip_score(folder: Path, work: Path) -> Report:
        from sana.metrics.clip_score import ClipScorer

        scorer = ClipScorer.from_pretrained(sources.clip, device=sources.device)
        return alignment.measure(scorer, read_image_set(folder, entries, limit=sources.limit), work)

    return Suite(
        name="MJHQ-30K",
        prompts=_prompts(entries)[: sources.limit],
        images_per_prompt=1,
        metrics={"fid": frechet, "clip_score": clip_score},
    )


def _geneval(sources: Sources) -> Suite:
    with fetched_by(_FETCH["geneval"].format(sources.geneval_prompts), sources.geneval_prompts):
        prompts = geneval.load_prompts(hub.resolve(sources.geneval_prompts))
    return _geneval_suite("GenEval", prompts, sources)


def _shapes(sources: Sources) -> Suite:
    """The shapes benchmark: GenEval of Sana-tiny. Needs nothing that is not in the repository."""
    prompts = geneval.load_prompts(hub.resolve(PROMPTS_FILE))
    return _geneval_suite("shapes", prompts, replace(sources, detector="shapes"))


def _geneval_suite(name: str, prompts: Sequence[geneval.GenEvalPrompt], sources: Sources) -> Suite:
    chosen = subset(prompts, sources.limit)

    def score(folder: Path, work: Path) -> Report:
        if sources.detector == "shapes":
            eyes = geneval_folder.shapes_eyes()
        else:
            from sana.metrics.mask2former import CLIP_NAME, DETECTOR_NAME, mask2former_eyes

            networks = sources.detector or DETECTOR_NAME, sources.clip or CLIP_NAME
            eyes = mask2former_eyes(*networks, device=sources.device)
        if distributed.is_main():
            geneval.write_metadata(folder, chosen)
        distributed.barrier()
        samples = geneval_folder.read_samples(folder, chosen)
        records = geneval_folder.score(samples, eyes, work)
        if distributed.is_main():
            geneval_folder.write_records(records, work.with_suffix(".jsonl"))
        return geneval_folder.report(samples, records, eyes)

    return Suite(
        name=name,
        prompts=[Prompt(text=prompt.prompt, index=index) for index, prompt in chosen.items()],
        images_per_prompt=IMAGES_PER_PROMPT,
        metrics={"geneval": score},
        lossless=True,
        stem=lambda prompt, sample: geneval.sample_stem(prompt.index, sample),
    )


def _dpg(sources: Sources) -> Suite:
    """Four pictures of each prompt, in files of their own: what is judged has no border and no loss."""
    with fetched_by(dpg.FETCH, sources.dpg_csv):
        file = hub.resolve(sources.dpg_csv)
        items = dpg.read_items(file)

    def score(folder: Path, work: Path) -> Report:
        from sana.metrics.vqa import JUDGE_NAME, load_judge

        name, protocol = sources.judge or JUDGE_NAME, dpg_folder.Protocol()
        pictures = dpg_folder.read_pictures(folder, items, protocol, limit=sources.limit)
        if sources.dpg_grids and distributed.is_main():
            write_grids(pictures, folder.with_name(f"{folder.name}.grids"))
        judge = load_judge(name, device=sources.device)
        weights = {"judge": folder_sha256(name)}
        facts = {"judge_path": name, "questions_sha256": hub.sha256(file)}
        found = dpg_folder.judge_pictures(
            pictures, items, judge, protocol, work, facts | {"weights": weights}
        )
        if distributed.is_main():
            dpg_folder.write_details(found, work.with_name(f"{work.stem}_detail.txt"))
        settings = facts | described(pictures)
        counted = {key: items[key] for key in found.answers}
        return dpg_folder.report(
            counted, found.answers, protocol, judge.name, settings=settings, weights=weights
        )

    return Suite(
        name="DPG",
        prompts=_prompts(dpg.entries(items))[: sources.limit],
        images_per_prompt=4,
        metrics={"dpg": score},
    )


def write_grids(pictures: Sequence[ScoredImage], folder: Path) -> None:
    """The pictures of each prompt as one PNG without padding, named by the first: what the published evaluator cuts apart."""
    groups: dict[int, list[ScoredImage]] = {}
    for picture in pictures:
        groups.setdefault(picture.prompt_index, []).append(picture)
    for group in groups.values():
        sheet = images.grid([open_image(picture.path) for picture in group], columns=2)
        images.save_png(sheet, folder / f"{group[0].path.stem}.png")


def _image_reward(sources: Sources) -> Suite:
    place = sources.image_reward_prompts
    with fetched_by(_FETCH["image_reward"].format(place), place):
        entries = read_prompts(hub.resolve(place))

    def score(folder: Path, work: Path) -> Report:
        from sana.metrics.image_reward import ImageReward

        scorer = ImageReward.from_file(
            sources.reward, tokenizer=sources.reward_tokenizer, device=sources.device
        )
        return alignment.measure(scorer, read_image_set(folder, entries, limit=sources.limit), work)

    return Suite(
        name="ImageReward",
        prompts=_prompts(entries)[: sources.limit],
        images_per_prompt=10,
        metrics={"image_reward": score},
    )


SUITES: Mapping[str, Callable[[Sources], Suite]] = {
    "mjhq": _mjhq,
    "geneval": _geneval,
    "dpg": _dpg,
    "image_reward": _image_reward,
    "shapes": _shapes,
}


def require_known(names: Sequence[str]) -> None:
    """Refuse what is no suite.

    Raises:
        ValueError: with the names of all.
    """
    if unknown := [name for name in names if name not in SUITES]:
        raise ValueError(f"unknown suite {unknown[0]!r}; choose from {', '.join(SUITES)}")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of some suites."""

    reports: Sequence[Report]
    failures: Mapping[str, str]
    """Suite or metric -> why, in one line."""


def evaluate(
    pipeline: SanaPipeline,
    names: Sequence[str],
    sources: Sources,
    settings: Settings,
    work_dir: str | Path,
    *,
    batch_size: int = 1,
    label: str = "",
    weights: Mapping[str, str] | None = None,
    publish: Callable[[Report], None] = lambda report: None,
    progress: bool = False,
) -> Outcome:
    """Draw and measure the suites `names`, one after the other; every process of a run takes its share.

    What fails is logged in one line and the rest goes on; but not where several processes share the work, which would wait
    for each other: there the first failure is raised.

    Args:
        settings: format and quality are those of the files, where a suite does not want them lossless.
        work_dir: gets a folder of pictures for each suite, and beside it the partial results.
        label: end of the folders' names.
        weights: part of the model -> sha256, for the reports.
        publish: gets each report as soon as it is there, in the main process.

    Raises:
        ValueError: an unknown suite.
    """
    require_known(names)
    reports: list[Report] = []
    failures: dict[str, str] = {}

    def attempt(what: str, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except Exception as error:
            if distributed.world_size() > 1:
                raise
            failures[what] = first_line(error)
            # What is not the user's or the machine's is our own mistake, and keeps its traceback.
            mistake = not isinstance(error, ValueError | ArithmeticError | OSError)
            log.error("%s: %s: %s", what, type(error).__name__, failures[what], exc_info=mistake)
            return None

    # Prompt files are read before anything is drawn: what is missing is said at once.
    suites = {name: attempt(name, partial(SUITES[name], sources)) for name in dict.fromkeys(names)}
    for name, suite in suites.items():
        folder = suite and attempt(
            name,
            partial(_draw, pipeline, suite, settings, Path(work_dir), batch_size, label, progress),
        )
        if folder is None:
            continue
        for metric, measure in suite.metrics.items():
            work = folder.with_name(f"{folder.name}.{metric}.work")
            report = attempt(f"{name} ({metric})", partial(measure, folder, work))
            if report is not None:
                report = replace(report, weights={**report.weights, **(weights or {})})
                reports.append(report)
                if distributed.is_main():
                    publish(report)
    return Outcome(reports, failures)


def _draw(
    pipeline: SanaPipeline,
    suite: Suite,
    settings: Settings,
    work_dir: Path,
    batch_size: int,
    label: str,
    progress: bool,
) -> Path:
    """The folder with the pictures of a suite."""
    if suite.lossless:
        settings = replace(settings, image_format="png")
    folder = work_dir / folder_name(pipeline, settings, suite.name, label)
    generate(
        pipeline,
        suite.prompts,
        folder,
        settings,
        batch_size=batch_size,
        num_images_per_prompt=suite.images_per_prompt,
        progress=progress,
        stem=suite.stem,
    )
    return folder


def append_result(report: Report, path: str | Path) -> str:
    """One line more in a `results.jsonl`, on the disk when this returns; the line."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(asdict(report), ensure_ascii=False, allow_nan=False)
    with open(path, "a", encoding="utf-8") as handle:
        handle.write(f"{line}\n")
        handle.flush()
        os.fsync(handle.fileno())
    return line


def scalars(report: Report) -> dict[str, float]:
    """ "metric/number" -> value, for a tracker; nested names joined by "/"."""

    def walk(values: Mapping[str, Any], prefix: str) -> dict[str, float]:
        found: dict[str, float] = {}
        for name, value in values.items():
            if isinstance(value, Mapping):
                found |= walk(value, f"{prefix}/{name}")
            elif isinstance(value, int | float):
                found[f"{prefix}/{name}"] = float(value)
        return found

    return walk(report.values, f"metrics/{report.metric}")
