"""GenEval (arXiv 2310.11513): from detections to per-image verdicts and per-tag scores.

Only the decision is here. What finds objects and what names their colour are two callables (`Detector`,
`ColourClassifier`), so that Mask2Former with CLIP on photographs and the exact detector of `sana.shapes` on
drawn scenes are judged alike. The rules, thresholds, folder layout and record schema are those of the
published evaluator (github.com/djghosh13/geneval).

Boxes are (x1, y1, x2, y2) in pixels, y down. A prompt is one line of a JSONL file, with the keys "tag",
"include", "exclude" (only where needed) and "prompt"; a clause of the two lists has "class", "count" and,
where needed, "color" and "position": [relation, index of the clause that is its target].
"""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from sana.utils.files import write_atomic

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
RELATIONS = ("left of", "right of", "above", "below")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
KEY_OVERALL = "overall"
KEY_IMAGES = "correct_images"
KEY_PROMPTS = "correct_prompts"
KEY_TAGS = "tags"

Box = tuple[float, float, float, float]


class Detection(Protocol):
    """One found object; `mask` is an (H, W) boolean array or None, used by colour classifiers only."""

    @property
    def box(self) -> Box: ...
    @property
    def score(self) -> float: ...
    @property
    def mask(self) -> Any: ...


class Detector(Protocol):
    """All objects of an image by class name, in any order and with any score: selection is done here."""

    def __call__(self, image: Any) -> Mapping[str, Sequence[Detection]]: ...


class ColourClassifier(Protocol):
    """One colour name for each detection, all of class `class_name` (CLIP's templates contain it)."""

    def __call__(self, image: Any, detections: Sequence[Detection], class_name: str) -> Sequence[str]: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class GenEvalOptions:
    """Selection thresholds; the defaults are the published ones, meant for Mask2Former's scores."""

    threshold: float = 0.3
    """Detections count when their score is above this, in every tag but `counting`."""
    counting_threshold: float = 0.9
    """The same for the tag `counting`, where a duplicate would change the verdict."""
    max_objects: int = 16
    """At most this many detections of a class are kept, best first."""
    max_overlap: float = 1.0
    """A detection is dropped when its IoU with a better one of its class reaches this; 1 keeps all."""
    position_threshold: float = 0.1
    """Centres closer along an axis than this times the sum of both extents are level on that axis."""


@dataclass(frozen=True, slots=True)
class Clause:
    """`count` objects of `class_name`, all of `colour`, all in `relation` to those of clause `target`."""

    class_name: str
    count: int
    colour: str | None = None
    relation: str | None = None
    target: int | None = None

    @classmethod
    def from_record(cls, record: Mapping[str, Any], *, index: int) -> "Clause":
        """The clause at place `index` of its list; ValueError for anything outside the published schema."""
        unknown = set(record) - {"class", "count", "color", "position"}
        if unknown or not {"class", "count"} <= set(record):
            raise ValueError(
                f"a GenEval clause has class, count, color and position; got the keys {sorted(record)}"
            )
        count = record["count"]
        if type(count) is not int or count < 1:
            raise ValueError(f"a GenEval count is a positive integer; got {count!r} for {record['class']!r}")
        relation, target = record.get("position", (None, None))
        if relation is not None and relation not in RELATIONS:
            raise ValueError(f"unknown relation {relation!r}; choose from {RELATIONS}")
        if relation is not None and (type(target) is not int or not 0 <= target < index):
            raise ValueError(
                f"clause {index} is placed against clause {target!r}; only an earlier one can be its target"
            )
        return cls(record["class"], count, record.get("color"), relation, target)

    def to_record(self) -> dict[str, Any]:
        """The clause in the published schema and key order."""
        record: dict[str, Any] = {"class": self.class_name, "count": self.count}
        if self.colour is not None:
            record["color"] = self.colour
        if self.relation is not None:
            record["position"] = [self.relation, self.target]
        return record


@dataclass(frozen=True, slots=True)
class GenEvalPrompt:
    """One line of the prompt file: what the image must show (`include`) and must not reach (`exclude`)."""

    tag: str
    include: tuple[Clause, ...]
    prompt: str
    exclude: tuple[Clause, ...] = ()

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "GenEvalPrompt":
        """Parse one record; ValueError names the offending value."""
        unknown = set(record) - {"tag", "include", "exclude", "prompt"}
        if unknown or not {"tag", "include", "prompt"} <= set(record):
            raise ValueError(
                f"a GenEval record has tag, include, exclude and prompt; got the keys {sorted(record)}"
            )
        if record["tag"] not in TAGS:
            raise ValueError(f"unknown GenEval tag {record['tag']!r}; choose from {TAGS}")
        include, exclude = (
            tuple(Clause.from_record(clause, index=i) for i, clause in enumerate(record.get(key, ())))
            for key in ("include", "exclude")
        )
        if not include:
            raise ValueError(f"the GenEval record of {record['prompt']!r} includes nothing")
        return cls(record["tag"], include, record["prompt"], exclude)

    def to_record(self) -> dict[str, Any]:
        """The prompt in the published schema and key order."""
        record: dict[str, Any] = {"tag": self.tag, "include": [clause.to_record() for clause in self.include]}
        if self.exclude:
            record["exclude"] = [clause.to_record() for clause in self.exclude]
        return record | {"prompt": self.prompt}


def load_prompts(path: str | Path) -> list[GenEvalPrompt]:
    """Every record of an `evaluation_metadata.jsonl`; ValueError names the file and line of a bad one."""
    prompts = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        try:
            prompts.append(GenEvalPrompt.from_record(json.loads(line)))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    return prompts


def iou(a: Box, b: Box) -> float:
    """Intersection over union; a side from x1 to x2 is x2 - x1 + 1 pixels long (the published convention)."""

    def area(x1: float, y1: float, x2: float, y2: float) -> float:
        return max(x2 - x1 + 1, 0.0) * max(y2 - y1 + 1, 0.0)

    intersection = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    union = area(*a) + area(*b) - intersection
    return intersection / union if union else 0.0


def select(detections: Sequence[Detection], *, threshold: float, options: GenEvalOptions) -> list[Detection]:
    """Detections of one class: above `threshold` (strictly), best first, capped, without near-duplicates.

    Suppression is greedy: a detection goes when a kept one overlaps it by `max_overlap` or more.
    """
    confident = sorted((d for d in detections if d.score > threshold), key=lambda d: d.score, reverse=True)
    kept: list[Detection] = []
    for candidate in confident[: options.max_objects]:
        if options.max_overlap == 1 or all(iou(candidate.box, d.box) < options.max_overlap for d in kept):
            kept.append(candidate)
    return kept


def relative_position(a: Box, b: Box, *, position_threshold: float) -> set[str]:
    """Where `a` lies as seen from `b`: of RELATIONS two on a diagonal, one, or none where they are too close.

    The offset of the centres shrinks along each axis by `position_threshold` times the sum of both extents;
    its direction is taken against the length of the offset before shrinking.
    """
    offset = [(a[i] + a[i + 2] - b[i] - b[i + 2]) / 2 for i in (0, 1)]
    slack = [position_threshold * (abs(a[i + 2] - a[i]) + abs(b[i + 2] - b[i])) for i in (0, 1)]
    shrunk = [math.copysign(max(abs(o) - s, 0.0), o) for o, s in zip(offset, slack, strict=True)]
    if max(abs(shrunk[0]), abs(shrunk[1])) < 1e-3:
        return set()
    x, y = (component / math.hypot(*offset) for component in shrunk)
    holds = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {relation for relation in RELATIONS if holds[relation]}


def judge(
    prompt: GenEvalPrompt,
    found: Mapping[str, Sequence[Detection]],
    *,
    image: Any,
    classify_colours: ColourClassifier,
    options: GenEvalOptions,
) -> tuple[bool, str]:
    """(correct, reasons joined by newlines) for one image, given its selected detections by class.

    Each include clause takes the best `count` objects of its class; every failed clause is reported, and a
    clause whose target failed fails too. Objects beyond those asked for never hurt, except through an exclude
    clause.
    """
    reasons: list[str] = []
    groups: list[Sequence[Detection] | None] = []  # the objects of each clause, None where it failed

    for clause in prompt.include:
        objects = found.get(clause.class_name, ())[: clause.count]
        failure = _clause_failure(clause, objects, groups, image, classify_colours, options)
        groups.append(None if failure else objects)
        if failure:
            reasons.append(failure)

    for clause in prompt.exclude:
        number = len(found.get(clause.class_name, ()))
        if number >= clause.count:
            reasons.append(f"expected fewer than {clause.count} {clause.class_name}, found {number}")
    return not reasons, "\n".join(reasons)


def _clause_failure(
    clause: Clause,
    objects: Sequence[Detection],
    groups: Sequence[Sequence[Detection] | None],
    image: Any,
    classify_colours: ColourClassifier,
    options: GenEvalOptions,
) -> str | None:
    """Why an include clause does not hold; None when it does."""
    name = clause.class_name
    if len(objects) < clause.count:
        return f"expected {clause.count} {name}, found {len(objects)}"

    if clause.colour is not None:
        colours = list(classify_colours(image, objects, name))
        if colours.count(clause.colour) < clause.count:
            return f"expected {clause.count} {clause.colour} {name}, found {', '.join(colours)}"

    if clause.relation is not None:
        targets = groups[clause.target]
        if targets is None:
            return f"expected {name} {clause.relation} its target, but the target's clause failed"
        for a in objects:
            for b in targets:
                relations = relative_position(a.box, b.box, position_threshold=options.position_threshold)
                if clause.relation not in relations:
                    seen = " and ".join(sorted(relations)) or "level with"
                    return f"expected {name} {clause.relation} its target, found it {seen} the target"
    return None


def score_image(
    prompt: GenEvalPrompt,
    image: Any,
    *,
    filename: str,
    detector: Detector,
    classify_colours: ColourClassifier,
    options: GenEvalOptions,
) -> dict[str, Any]:
    """One line of the published result file: verdict, reasons and selected boxes of one image.

    `metadata` (the prompt's record) and `details` (class -> [[x1, y1, x2, y2, score], ...]) are JSON texts.
    """
    threshold = options.counting_threshold if prompt.tag == "counting" else options.threshold
    detected = detector(image)
    selected = {name: select(detected[name], threshold=threshold, options=options) for name in detected}
    found = {name: objects for name, objects in selected.items() if objects}
    correct, reason = judge(prompt, found, image=image, classify_colours=classify_colours, options=options)
    boxes = {name: [[*map(float, d.box), float(d.score)] for d in objects] for name, objects in found.items()}
    return {
        "filename": filename,
        "tag": prompt.tag,
        "prompt": prompt.prompt,
        "correct": correct,
        "reason": reason,
        "metadata": json.dumps(prompt.to_record()),
        "details": json.dumps(boxes),
    }


def summarise(records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Scores in [0, 1] from per-image records: mean of `correct` per tag, and three totals.

    `overall` is the unweighted mean of the six tag means (not the image accuracy), `correct_images` the image
    accuracy, `correct_prompts` the share of prompts with at least one correct image. ValueError when a tag
    has no image: an overall score over fewer tags would not be comparable.
    """
    by_tag: dict[str, list[bool]] = defaultdict(list)
    by_prompt: dict[str, list[bool]] = defaultdict(list)
    for record in records:
        by_tag[record["tag"]].append(record["correct"])
        by_prompt[record["metadata"]].append(record["correct"])
    if set(by_tag) != set(TAGS):
        raise ValueError(
            f"GenEval's overall score needs images of the tags {TAGS}; got {tuple(sorted(by_tag))}"
        )

    means = {tag: sum(by_tag[tag]) / len(by_tag[tag]) for tag in TAGS}
    verdicts = [correct for tag in TAGS for correct in by_tag[tag]]
    return {
        KEY_OVERALL: sum(means.values()) / len(means),
        KEY_IMAGES: sum(verdicts) / len(verdicts),
        KEY_PROMPTS: sum(map(any, by_prompt.values())) / len(by_prompt),
        KEY_TAGS: means,
    }


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """One line for each tag with its score and number of images, then the totals."""
    scores, number = summarise(records), Counter(record["tag"] for record in records)
    lines = [f"{'tag':<16}{'score':>7}{'images':>8}"]
    lines += [f"{tag:<16}{scores[KEY_TAGS][tag]:>7.3f}{number[tag]:>8}" for tag in TAGS]
    lines.append(f"{KEY_OVERALL:<16}{scores[KEY_OVERALL]:>7.3f}{len(records):>8}")
    lines.append(f"correct images {scores[KEY_IMAGES]:.1%}, correct prompts {scores[KEY_PROMPTS]:.1%}")
    return "\n".join(lines)


def sample_stem(prompt_index: int, sample_index: int) -> str:
    """Where in its folder the published layout keeps an image, without ".png"."""
    return f"{prompt_index:05d}/samples/{sample_index:05d}"


def write_metadata(root: str | Path, prompts: Mapping[int, GenEvalPrompt]) -> None:
    """Put the record of each prompt, by its index, beside its images as the published layout has it."""
    for index, prompt in prompts.items():
        content = json.dumps(prompt.to_record()) + "\n"
        write_atomic(Path(root) / f"{index:05d}" / "metadata.jsonl", content.encode())


def find_samples(root: str | Path, *, allow_missing: bool = False) -> Iterator[tuple[Path, GenEvalPrompt]]:
    """(image file, its prompt) of a folder in the published layout, in numerical order.

    `<root>/<digits>/{metadata.jsonl, samples/<digits>.png}`; other names are ignored, as the published
    evaluator does. ValueError when nothing is found or a prompt folder lacks its metadata or, unless
    `allow_missing`, its images.
    """
    root = Path(root)
    folders = sorted(
        (p for p in root.glob("*") if p.is_dir() and p.name.isdecimal()), key=lambda p: int(p.name)
    )
    if not folders:
        raise ValueError(
            f"{root} holds no numbered prompt folder; expected {root}/00000/samples/00000.png and so on"
        )
    for folder in folders:
        prompts = load_prompts(folder / "metadata.jsonl") if (folder / "metadata.jsonl").is_file() else []
        images = sorted(
            (p for p in folder.glob("samples/*.png") if p.stem.isdecimal()), key=lambda p: int(p.stem)
        )
        if len(prompts) != 1 or not (images or allow_missing):
            raise ValueError(
                f"{folder} needs one record in metadata.jsonl and images in samples/: "
                f"found {len(prompts)} and {len(images)}"
            )
        yield from ((image, prompts[0]) for image in images)
