"""DPG-Bench (arXiv 2403.05135): from yes-or-no answers about pictures to scores.

Each of 1065 long prompts has a graph of questions; a question counts as answered with no where one that it depends on is. The
score of a picture is the share of yes, that of a prompt the mean over its pictures, the total the mean over prompts. What
answers is a `Judge` (`sana.metrics.vqa`), or a file of answers.

The published evaluator (github.com/TencentQQGYLab/ELLA) has two faults that its numbers depend on: it leaves out the first row
of the question file, whereby that row's prompt drops out of the total, and its categories count only the last picture of each
prompt. `compat="ella"` repeats both, `compat="fixed"` neither.
"""

import csv
import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL.Image import Image

from sana.metrics.image_set import PromptEntry

COMPAT = ("fixed", "ella")
KEY_OVERALL = "overall"
KEY_L1 = "l1"
KEY_L2 = "l2"
FETCH = (
    "curl --create-dirs -Lo data/test/dpg_bench/dpg_bench.csv "
    "https://raw.githubusercontent.com/TencentQQGYLab/ELLA/main/dpg_bench/dpg_bench.csv"
)
"""What brings the question file to its usual place."""
_COLUMNS = ("item_id", "text", "proposition_id", "dependency", "tuple", "question_natural_language")

Answers = Mapping[str, Sequence[Mapping[int, bool]]]
"""Prompt's id -> for each of its pictures: number of the question -> whether the answer is yes."""


class Judge(Protocol):
    """Answers questions about a picture."""

    @property
    def name(self) -> str: ...

    def __call__(self, image: Image, questions: Sequence[str]) -> Sequence[str]: ...


@dataclass(frozen=True, slots=True)
class Question:
    """One row of the file."""

    number: int
    """From 1 within its prompt."""
    text: str
    parents: tuple[int, ...]
    """Numbers of the questions that it depends on."""
    category: str
    """L2: "attribute - color", "relation - spatial", ...; its first word is the L1 category."""


@dataclass(frozen=True, slots=True)
class Item:
    """One prompt with its questions, in the order of the file."""

    key: str
    prompt: str
    questions: tuple[Question, ...]

    @property
    def lost_parents(self) -> list[int]:
        """Numbers that questions depend on and that are not there."""
        known = {question.number for question in self.questions}
        return [number for question in self.questions for number in question.parents if number not in known]


def read_items(path: str | Path, *, compat: str = "fixed") -> dict[str, Item]:
    """The prompts of a `dpg_bench.csv` by id, in its order.

    With `compat="ella"` the first row is left out, and so is a prompt without a question or with one that depends on a
    question that is not there: the published evaluator fails on its picture and goes on.

    Raises:
        ValueError: no such file, a column missing, or a value that cannot be; the message names the line.
    """
    if compat not in COMPAT:
        raise ValueError(f"unknown compat {compat!r}; choose from {', '.join(COMPAT)}")
    texts: dict[str, str] = {}
    questions: dict[str, dict[int, Question]] = {}
    try:
        with open(path, encoding="utf-8-sig", newline="") as handle:
            reader = csv.DictReader(handle)
            if missing := [name for name in _COLUMNS if name not in (reader.fieldnames or ())]:
                raise ValueError(f"{path} is no question file of DPG-Bench: it has no column {missing[0]}")
            for place, row in enumerate(reader):
                if place == 0 and compat == "ella":
                    continue
                try:
                    question = _question(row)
                except (ValueError, TypeError) as error:
                    raise ValueError(f"{path}, line {reader.line_num}: {error}") from error
                texts.setdefault(row["item_id"], row["text"])
                questions.setdefault(row["item_id"], {})[question.number] = question
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"cannot read the questions {path}: {error}") from error
    items = {key: Item(key, texts[key], tuple(own.values())) for key, own in questions.items()}
    if compat == "ella":
        items = {key: item for key, item in items.items() if not item.lost_parents}
    for item in items.values():
        if item.lost_parents:
            raise ValueError(
                f"{path}: {item.key} has questions that depend on question {item.lost_parents[0]}, which is not there; "
                "take the file of the publisher, or --compat ella, which leaves the prompt out"
            )
    if not items:
        raise ValueError(f"{path} holds no question")
    return items


def _question(row: Mapping[str, str]) -> Question:
    number = int(row["proposition_id"])
    parents = tuple(int(part) for part in row["dependency"].split(","))
    category = row["tuple"].partition("(")[0].strip()
    if not row["item_id"] or not row["question_natural_language"]:
        raise ValueError("a row without an item_id or a question")
    return Question(
        number,
        row["question_natural_language"],
        tuple(parent for parent in parents if parent != 0),
        category,
    )


def entries(items: Mapping[str, Item]) -> list[PromptEntry]:
    """The prompts as `sana.metrics.image_set` takes them."""
    return [PromptEntry(item.prompt, item.key) for item in items.values()]


def picture_score(questions: Sequence[Question], yes: Mapping[int, bool]) -> float:
    """The share of yes in [0, 1], after a question fell with one that it depends on.

    Questions are gone through once, in the order of the file, as published: a no spreads to what follows.
    """
    counts = {question.number: yes[question.number] for question in questions}
    for question in questions:
        counts[question.number] = counts[question.number] and all(
            counts[parent] for parent in question.parents
        )
    return sum(counts.values()) / len(counts)


def summarise(items: Mapping[str, Item], answers: Answers, *, compat: str = "fixed") -> dict[str, Any]:
    """Scores in [0, 100]: the total, and those of the categories of both levels, sorted by name.

    Those of categories are over questions, and take an answer as it was given, whatever it depends on: they are higher than
    the total.

    Raises:
        ValueError: a prompt without a picture, or a question without an answer.
    """
    for key, item in items.items():
        if not answers.get(key):
            raise ValueError(f"the prompt {key} has no picture with answers")
        for yes in answers[key]:
            if lost := [q for q in item.questions if q.number not in yes]:
                raise ValueError(f"the question {lost[0].number} of {key} has no answer: {lost[0].text!r}")
    prompts = [
        _mean(picture_score(item.questions, yes) for yes in answers[key]) for key, item in items.items()
    ]
    levels: dict[str, dict[str, list[float]]] = {KEY_L1: defaultdict(list), KEY_L2: defaultdict(list)}
    for key, item in items.items():
        for yes in answers[key][-1:] if compat == "ella" else answers[key]:
            for question in item.questions:
                first = question.category.partition("-")[0].strip()
                for level, name in ((KEY_L1, first), (KEY_L2, question.category)):
                    levels[level][name].append(float(yes[question.number]))
    categories = {
        level: {name: 100 * _mean(found[name]) for name in sorted(found)} for level, found in levels.items()
    }
    return {KEY_OVERALL: 100 * _mean(prompts), **categories}


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


def table(values: Mapping[str, Any]) -> str:
    """The total and one line for each category."""
    lines = [f"{'DPG-Bench':<32}{values[KEY_OVERALL]:>7.2f}"]
    for level in (KEY_L1, KEY_L2):
        lines += [f"  {name:<30}{value:>7.2f}" for name, value in values[level].items()]
    return "\n".join(lines)


def is_yes(answer: str) -> bool:
    """Whether an answer's first word is yes; of mPLUG's, exactly those that are "yes"."""
    return re.match(r"\W*yes\b", answer.lower()) is not None


def crop_boxes(
    size: tuple[int, int], *, padding: int, compat: str = "fixed"
) -> list[tuple[int, int, int, int]]:
    """Where the four pictures of a 2 x 2 grid are, row by row, in a file of `size` (width, height).

    Args:
        padding: of the grid, around and between the pictures: 0, or 2 where torchvision's `make_grid` made it.
        compat: "ella" cuts at multiples of a picture's side whatever the padding, as published: such pictures are shifted by
            it, and have a dark border.

    Raises:
        ValueError: there is no such grid.
    """
    inner = [length - 3 * padding for length in size]
    if padding < 0 or min(inner) < 2 or any(length % 2 for length in inner):
        hint = " (torchvision's make_grid has --grid 2)" if padding != 2 else ""
        raise ValueError(f"{size[0]} x {size[1]} pixels are no 2 x 2 grid with a padding of {padding}{hint}")
    width, height = (length // 2 for length in inner)
    between = 0 if compat == "ella" else padding
    corners = [
        (between + column * (width + between), between + row * (height + between))
        for row in (0, 1)
        for column in (0, 1)
    ]
    return [(x, y, x + width, y + height) for x, y in corners]


_DETAIL = re.compile(
    r"(?P<picture>(?P<path>.+?), \(\d+, \d+, \d+, \d+\)), (?P<question>.+), (?P<answer>[^,]*)"
)


def detail_line(path: Path, box: tuple[int, int, int, int], question: Question, answer: str) -> str:
    """One answer as the published evaluator writes it."""
    said = "yes" if is_yes(answer) else " ".join(answer.replace(",", " ").split())
    return f"{path}, {box}, {question.text}, {said}\n"


def read_answers(path: str | Path, items: Mapping[str, Item]) -> Answers:
    """The answers in a `..._detail.txt`, of the published evaluator or of ours: lines of path, crop, question, answer.

    An answer is a yes only if it is "yes". What is said of pictures without a prompt among `items` is left out.

    Raises:
        ValueError: no such file, or a line of another form; the message names it.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the answers {path}: {error}") from error
    given: dict[str, dict[str, dict[str, list[bool]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(list))
    )
    for number, line in enumerate(lines, 1):
        match = _DETAIL.fullmatch(line)
        if match is None:
            raise ValueError(
                f"{path}, line {number} is not of the form PATH, (CROP), QUESTION, ANSWER: {line[:80]!a}"
            )
        key = Path(match["path"]).name.partition(".")[0]
        key = key if key in items else re.sub(r"-s\d+$", "", key)  # further pictures in files of their own
        given[key][match["picture"]][match["question"]].append(match["answer"] == "yes")
    return {
        key: [_by_number(item.questions, said) for said in given[key].values()]
        for key, item in items.items()
        if key in given
    }


def _by_number(questions: Sequence[Question], said: Mapping[str, Sequence[bool]]) -> dict[int, bool]:
    """Number of the question -> its answer: of equal questions in their order, of one asked again the last."""
    numbers = defaultdict(list)
    for question in questions:
        numbers[question.text].append(question.number)
    pairs = (zip(own, said.get(text, ())[-len(own) :], strict=False) for text, own in numbers.items())
    return dict(itertools.chain.from_iterable(pairs))
