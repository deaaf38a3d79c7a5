"""DPG-Bench over a folder: pictures of prompts, cut out of grids where they are, judged and reported."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL.Image import Image

from sana.metrics.dpg import (
    Answers,
    Item,
    Judge,
    crop_boxes,
    detail_line,
    entries,
    is_yes,
    summarise,
)
from sana.metrics.image_set import ScoredImage, read_image_set
from sana.metrics.report import Report, make_report
from sana.metrics.scoring import score_images
from sana.utils.files import write_atomic
from sana.utils.logging import get_logger

log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Protocol:
    """How the pictures are read and the answers counted."""

    compat: str = "fixed"
    """See `sana.metrics.dpg`."""
    padding: int | None = None
    """Of the 2 x 2 grid that each file is; None: each file is one picture."""

    def boxes(self, picture: Image) -> list[tuple[int, int, int, int]]:
        """Where the pictures are in a file, as (left, top, right, bottom)."""
        if self.padding is None:
            return [(0, 0, *picture.size)]
        return crop_boxes(picture.size, padding=self.padding, compat=self.compat)


def read_pictures(
    folder: str | Path,
    items: Mapping[str, Item],
    protocol: Protocol,
    *,
    limit: int | None = None,
    allow_missing: bool = False,
) -> list[ScoredImage]:
    """The files of a folder, named by the ids of their prompts; `limit` and the rest as of `read_image_set`.

    Raises:
        ValueError: as `read_image_set`.
    """
    found = read_image_set(folder, entries(items), limit=limit, allow_missing=allow_missing)
    if protocol.padding is None and all(item.sample_index == 0 for item in found):
        log.warning(
            "%s has one picture of each prompt and the protocol has four; if each is a grid of four, give --grid",
            folder,
        )
    return found


@dataclass(frozen=True, slots=True)
class Judgement:
    """All that was answered."""

    answers: Answers
    details: Sequence[str]
    """Lines for the file of answers."""
    pictures: int


def judge_pictures(
    pictures: Sequence[ScoredImage],
    items: Mapping[str, Item],
    judge: Judge,
    protocol: Protocol,
    work_folder: str | Path,
    facts: Mapping[str, Any],
) -> Judgement:
    """Ask every question of every picture; what was answered is kept in `work_folder`, and a second run goes on there.

    Args:
        facts: what decides the answers beside judge and protocol: hash of the weights, dtype.

    Raises:
        ValueError: a picture cannot be read or is no grid, or the folder has answers of other settings.
    """
    keys = list(items)

    def ask(batch: Sequence[ScoredImage], opened: list[Image]) -> list[dict[str, Any]]:
        rows = []
        for scored, picture in zip(batch, opened, strict=True):
            questions = [question.text for question in items[keys[scored.prompt_index]].questions]
            try:
                boxes = protocol.boxes(picture)
            except ValueError as error:
                raise ValueError(f"{scored.path}: {error}") from error
            answers = [list(judge(picture.crop(box), questions)) for box in boxes]
            rows.append({"boxes": boxes, "answers": answers})
        return rows

    settings = {
        "metric": "DPG-Bench",
        "judge": judge.name,
        "compat": protocol.compat,
        "grid": protocol.padding,
    }
    rows = score_images(pictures, ask, work_folder, {**settings, **facts}, batch_size=1)
    answers: dict[str, list[dict[int, bool]]] = defaultdict(list)
    details: list[str] = []
    said: list[str] = []
    for scored, row in zip(pictures, rows, strict=True):
        item = items[keys[scored.prompt_index]]
        for box, own in zip(row["boxes"], row["answers"], strict=True):
            pairs = list(zip(item.questions, own, strict=True))
            answers[item.key].append({question.number: is_yes(answer) for question, answer in pairs})
            details += [detail_line(scored.path, tuple(box), *pair) for pair in pairs]
            said += own
    understood = sum(is_yes(text) or text.lower().startswith("no") for text in said)
    if understood < 0.9 * len(said):
        log.warning(
            "the judge %s said neither yes nor no to %d of %d questions, such as %r: it does not suit",
            *(judge.name, len(said) - understood, len(said)),
            next(text for text in said if not is_yes(text) and not text.lower().startswith("no")),
        )
    return Judgement(answers, details, sum(map(len, answers.values())))


def write_details(judgement: Judgement, path: str | Path) -> Path:
    """The answers as the published evaluator writes them (`_detail.txt`); `dpg.read_answers` reads it."""
    return write_atomic(path, "".join(judgement.details).encode("utf-8"))


def report(
    items: Mapping[str, Item],
    answers: Answers,
    protocol: Protocol,
    judge: str,
    *,
    settings: Mapping[str, Any],
    weights: Mapping[str, str] | None = None,
) -> Report:
    """The report of answers.

    Args:
        items: the prompts that count; all have answers.
        judge: is part of the metric's name, for numbers of two judges do not compare.
        settings: what else the report is to say; of the pictures, `sana.metrics.image_set.described`.
    """
    number = sum(len(answers.get(key, ())) for key in items)
    return make_report(
        metric=f"DPG-Bench ({judge})",
        values=summarise(items, answers, compat=protocol.compat),
        n=number,
        protocol=f"DPG-Bench, {protocol.compat}; judge {judge}",
        settings={
            "prompts": len(items),
            "questions": sum(len(item.questions) for item in items.values()),
            "pictures_per_prompt": number / len(items),
            "grid_padding": protocol.padding,
            **settings,
        },
        weights=weights,
    )
