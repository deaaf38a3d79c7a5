"""GenEval's verdicts against its published logic, written a second time from its description, on drawn detections."""

import random
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest

from sana.metrics.geneval import TAGS, GenEvalOptions, GenEvalPrompt, score_image

NAMES, COLOURS = ("cat", "dog", "bus"), ("red", "blue")


@dataclass(frozen=True)
class Thing:
    box: tuple[float, float, float, float]
    score: float
    mask: str
    """Its colour, which the classifier below reads."""


def overlap(a, b):
    """IoU where a box from x1 to x2 covers x2 - x1 + 1 pixels."""
    sides = [max(0.0, min(a[i + 2], b[i + 2]) - max(a[i], b[i]) + 1) for i in (0, 1)]
    areas = [(box[2] - box[0] + 1) * (box[3] - box[1] + 1) for box in (a, b)]
    return sides[0] * sides[1] / (sum(areas) - sides[0] * sides[1])


def chosen(things, tag, options):
    """The detections of one class that count, best first."""
    limit = options.counting_threshold if tag == "counting" else options.threshold
    order = np.argsort([-thing.score for thing in things], kind="stable")
    things = [things[i] for i in order if things[i].score > limit][: options.max_objects]
    if options.max_overlap == 1:
        return things
    kept = []
    while things:
        best, *things = things
        kept.append(best)
        things = [thing for thing in things if overlap(best.box, thing.box) < options.max_overlap]
    return kept


def relations(a, b, threshold):
    boxes = np.array([a, b]).reshape(2, 2, 2)  # object, corner, axis
    offset = boxes.mean(1)[0] - boxes.mean(1)[1]
    extents = np.abs(boxes[:, 1] - boxes[:, 0]).sum(0)
    moved = np.maximum(np.abs(offset) - threshold * extents, 0) * np.sign(offset)
    if np.all(np.abs(moved) < 1e-3):
        return set()
    dx, dy = moved / np.linalg.norm(offset)
    return {
        name
        for name, value in (("left of", -dx), ("right of", dx), ("above", -dy), ("below", dy))
        if value > 0.5
    }


def published_verdict(record, found, options):
    correct, groups = True, []
    by_class = {name: chosen(things, record["tag"], options) for name, things in found.items()}
    for clause in record["include"]:
        mine = by_class.get(clause["class"], [])[: clause["count"]]
        matched = len(mine) >= clause["count"]
        if matched and "color" in clause:
            matched = sum(thing.mask == clause["color"] for thing in mine) >= clause["count"]
        if matched and "position" in clause:
            relation, place = clause["position"]
            target = groups[place]
            matched = target is not None and all(
                relation in relations(a.box, b.box, options.position_threshold) for a in mine for b in target
            )
        groups.append(mine if matched else None)
        correct = correct and matched
    for clause in record.get("exclude", []):
        correct = correct and len(by_class.get(clause["class"], [])) < clause["count"]
    return correct


def drawn_record(tag, rng):
    first, second = rng.sample(NAMES, 2)
    include = [{"class": first, "count": 1}]
    record = {"tag": tag, "include": include, "prompt": "p"}
    if tag in ("two_object", "position", "color_attr"):
        include.append({"class": second, "count": 1})
    if tag == "position":
        include[1]["position"] = [rng.choice(["left of", "right of", "above", "below"]), 0]
    if tag in ("colors", "color_attr"):
        for clause in include:
            clause["color"] = rng.choice(COLOURS)
    if tag == "counting":
        include[0]["count"] = rng.randint(2, 4)
        record["exclude"] = [{"class": first, "count": include[0]["count"] + 1}]
    return record


def drawn_thing(tag, rng):
    x, y = rng.randint(0, 30), rng.randint(0, 30)
    box = (x, y, x + rng.randint(1, 30), y + rng.randint(1, 30))
    # Thresholds themselves are hit, and so are equal scores.
    score = rng.choice(
        [0.1, 0.3, 0.31, 0.6, 0.9, 0.91, 0.95] if tag != "counting" else [0.9, 0.91, 0.91, 0.95, 0.99]
    )
    return Thing(box, score, rng.choice(COLOURS))


@pytest.mark.parametrize("max_overlap", [1.0, 0.5])
@pytest.mark.parametrize("tag", TAGS)
def test_equals_the_published_logic(tag, max_overlap):
    rng, options = random.Random(f"{tag} {max_overlap}"), GenEvalOptions(max_overlap=max_overlap)
    outcomes = Counter()
    for _ in range(400):
        record = drawn_record(tag, rng)
        found = {name: [drawn_thing(tag, rng) for _ in range(rng.randint(0, 5))] for name in NAMES}
        if tag == "counting":  # about as many as asked for
            wanted = record["include"][0]
            number = max(0, wanted["count"] + rng.randint(-1, 1))
            found[wanted["class"]] = [drawn_thing(tag, rng) for _ in range(number)]
        ours = score_image(
            GenEvalPrompt.from_record(record),
            None,
            filename="x.png",
            detector=lambda image, found=found: found,
            classify_colours=lambda image, things, name: [thing.mask for thing in things],
            options=options,
        )
        assert ours["correct"] == published_verdict(record, found, options), (record, found, ours["reason"])
        outcomes[ours["correct"]] += 1
    assert min(outcomes[True], outcomes[False]) > 20, f"both verdicts must occur: {outcomes}"
