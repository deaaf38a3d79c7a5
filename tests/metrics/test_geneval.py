"""GenEval's decision logic, rule by rule, and on the published prompt file."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from sana.metrics import geneval
from sana.metrics.geneval import GenEvalOptions, GenEvalPrompt

PUBLISHED = Path(__file__).resolve().parents[3] / "shared" / "data" / "geneval_evaluation_metadata.jsonl"


@dataclass(frozen=True)
class Found:
    """A detection whose `mask` slot carries its colour, for the classifier below."""

    box: tuple[float, float, float, float] = (0, 0, 10, 10)
    score: float = 0.95
    mask: str | None = None


def colours_of(image, detections, class_name):
    return [d.mask for d in detections]


def prompt(tag, *include, exclude=()):
    return GenEvalPrompt.from_record({"tag": tag, "include": include, "exclude": exclude, "prompt": "p"})


def verdict(tag, include, found, *, exclude=(), **options):
    """Score one image in which the detector sees `found`."""
    record = geneval.score_image(
        prompt(tag, *include, exclude=exclude),
        None,
        filename="f.png",
        detector=lambda image: found,
        classify_colours=colours_of,
        options=GenEvalOptions(**options),
    )
    return record["correct"]


CAT = {"class": "cat", "count": 1}
DOG = {"class": "dog", "count": 1}


# --- selection ---


def test_defaults_are_the_published_ones():
    assert GenEvalOptions() == GenEvalOptions(
        threshold=0.3, counting_threshold=0.9, max_objects=16, max_overlap=1.0, position_threshold=0.1
    )


@pytest.mark.parametrize(("tag", "limit"), [("single_object", 0.3), ("colors", 0.3), ("counting", 0.9)])
def test_score_must_exceed_the_threshold_of_its_tag(tag, limit):
    assert not verdict(tag, [CAT], {"cat": [Found(score=limit)]}), "the limit itself is not enough"
    assert verdict(tag, [CAT], {"cat": [Found(score=limit + 1e-6)]})


def test_at_most_max_objects_are_kept_best_first():
    detections = [Found(score=0.5 + i / 100) for i in range(20)]
    kept = geneval.select(detections, threshold=0.3, options=GenEvalOptions())
    assert [d.score for d in kept] == sorted((d.score for d in detections), reverse=True)[:16]
    assert verdict("counting", [CAT | {"count": 16}], {"cat": [Found()] * 20})
    assert not verdict("counting", [CAT | {"count": 17}], {"cat": [Found()] * 20})


def test_overlapping_detections_are_kept_unless_asked():
    near = [Found((0, 0, 9, 9), 0.9), Found((0, 0, 9, 8), 0.95), Found((50, 50, 59, 59), 0.5)]  # IoU 0.9
    assert len(geneval.select(near, threshold=0.3, options=GenEvalOptions())) == 3
    suppressed = geneval.select(near, threshold=0.3, options=GenEvalOptions(max_overlap=0.9))
    assert suppressed == [near[1], near[2]], "the better of the two stays; reaching the limit suppresses"
    assert len(geneval.select(near, threshold=0.3, options=GenEvalOptions(max_overlap=0.91))) == 3
    same = [Found(), Found()]
    assert len(geneval.select(same, threshold=0.3, options=GenEvalOptions())) == 2, (
        "1 means off, also at IoU 1"
    )


def test_a_suppressed_detection_suppresses_nothing():
    # a overlaps b, b overlaps c, a does not overlap c: greedy suppression keeps a and c.
    chain = [Found((0, 0, 9, 9), 0.9), Found((0, 4, 9, 13), 0.8), Found((0, 8, 9, 17), 0.7)]
    kept = geneval.select(chain, threshold=0.3, options=GenEvalOptions(max_overlap=0.4))
    assert [d.score for d in kept] == [0.9, 0.7]


def test_iou_counts_both_end_pixels():
    assert geneval.iou((0, 0, 9, 9), (0, 0, 9, 9)) == 1
    assert geneval.iou((0, 0, 9, 9), (9, 0, 18, 9)) == pytest.approx(10 / 190)  # one shared column
    assert geneval.iou((0, 0, 9, 9), (10, 0, 19, 9)) == 0
    assert geneval.iou((0, 0, 0, 0), (0, 0, 0, 0)) == 1  # one pixel


# --- include: count, colour ---


def test_count_is_a_minimum():
    two = [CAT | {"count": 2}]
    assert not verdict("counting", two, {"cat": [Found()]})
    assert verdict("counting", two, {"cat": [Found()] * 2})
    assert verdict("counting", two, {"cat": [Found()] * 3, "dog": [Found()]}), "extra objects never hurt"


def test_every_clause_must_hold():
    assert verdict("two_object", [CAT, DOG], {"cat": [Found()], "dog": [Found()]})
    assert not verdict("two_object", [CAT, DOG], {"cat": [Found()] * 2})
    assert not verdict("two_object", [CAT, DOG], {})


def test_colour_is_that_of_the_best_detections_only():
    red = [CAT | {"color": "red"}]
    assert verdict("colors", red, {"cat": [Found(mask="red", score=0.9), Found(mask="blue", score=0.8)]})
    assert not verdict("colors", red, {"cat": [Found(mask="red", score=0.8), Found(mask="blue", score=0.9)]})
    pair = [CAT | {"color": "red", "count": 2}]
    assert not verdict("colors", pair, {"cat": [Found(mask="red"), Found(mask="blue")]})
    assert verdict("colors", pair, {"cat": [Found(mask="red"), Found(mask="red")]})


def test_colours_are_bound_to_their_objects():
    include = [CAT | {"color": "red"}, DOG | {"color": "blue"}]
    assert verdict("color_attr", include, {"cat": [Found(mask="red")], "dog": [Found(mask="blue")]})
    assert not verdict("color_attr", include, {"cat": [Found(mask="blue")], "dog": [Found(mask="red")]})


def test_classifier_gets_image_class_and_only_the_needed_detections():
    calls = []

    def classify(image, detections, class_name):
        calls.append((image, [d.score for d in detections], class_name))
        return ["red"] * len(detections)

    geneval.score_image(
        prompt("colors", CAT | {"color": "red"}),
        "pixels",
        filename="f",
        detector=lambda image: {"cat": [Found(score=0.5), Found(score=0.8)], "dog": [Found()]},
        classify_colours=classify,
        options=GenEvalOptions(),
    )
    assert calls == [("pixels", [0.8], "cat")]


# --- position ---


def box(x, y, w=10, h=10):
    """A box centred on (x, y)."""
    return (x - w / 2, y - h / 2, x + w / 2, y + h / 2)


@pytest.mark.parametrize(
    ("centre", "expected"),
    [
        ((-50, 0), {"left of"}),
        ((50, 0), {"right of"}),
        ((0, -50), {"above"}),  # y points down
        ((0, 50), {"below"}),
        ((50, 50), {"right of", "below"}),
        ((-50, -50), {"left of", "above"}),
        ((50, 20), {"right of"}),
        ((0, 0), set()),
        ((2, 2), set()),  # within 0.1 * (10 + 10) on both axes
        ((2.0009, 0), set()),
        ((2.0011, 0), set()),  # past the slack, but 0.0011 of 2.0011 is no direction
        ((5, 0), {"right of"}),  # (5 - 2) / 5 = 0.6: the length before shrinking divides
        ((4, 0), set()),  # (4 - 2) / 4 = 0.5: must exceed
        ((4.1, 0), {"right of"}),
        ((-4, 0), set()),
        ((-4.1, 0), {"left of"}),
        ((0, -4), set()),
        ((0, -4.1), {"above"}),
        ((0, 4), set()),
        ((0, 4.1), {"below"}),
        ((50, 30), {"right of"}),  # y: (30 - 2) / 58.3 = 0.48
        ((50, 33), {"right of", "below"}),  # y: (33 - 2) / 59.9 = 0.52
    ],
)
def test_relative_position(centre, expected):
    assert geneval.relative_position(box(*centre), box(0, 0), position_threshold=0.1) == expected


def test_slack_is_the_sum_of_both_extents_of_that_axis():
    wide, small = box(0, 0, w=80, h=10), box(16, 0)
    # x slack 0.1 * (80 + 10) = 9: (16 - 9) / 16 = 0.44; with the smaller object's extent alone it would hold.
    assert geneval.relative_position(small, wide, position_threshold=0.1) == set()
    assert geneval.relative_position(small, wide, position_threshold=0.05) == {"right of"}
    assert geneval.relative_position(box(0, 16), wide, position_threshold=0.1) == {"below"}  # y slack is 2


def test_position_is_checked_for_every_pair():
    include = [DOG, CAT | {"position": ["left of", 0]}]
    left, right = Found(box(0, 0), 0.9), Found(box(100, 0), 0.8)
    dog = {"dog": [Found(box(50, 0))]}
    assert verdict("position", include, dog | {"cat": [left]})
    assert not verdict("position", include, dog | {"cat": [right]})
    assert verdict("position", include, dog | {"cat": [left, right]}), "only the best one is asked for"
    two_cats = [DOG, CAT | {"count": 2, "position": ["left of", 0]}]
    assert not verdict("position", two_cats, dog | {"cat": [left, right]})
    two_dogs = [DOG | {"count": 2}, CAT | {"position": ["left of", 0]}]
    dogs = {"dog": [Found(box(50, 0)), Found(box(-50, 0), 0.5)]}
    assert not verdict("position", two_dogs, dogs | {"cat": [left]})


def test_position_needs_its_target_and_its_colour():
    include = [DOG | {"color": "red"}, CAT | {"color": "blue", "position": ["left of", 0]}]

    def found(dog, cat):
        return {"dog": [Found(box(50, 0), mask=dog)], "cat": [Found(box(0, 0), mask=cat)]}

    assert verdict("position", include, found("red", "blue"))
    assert not verdict("position", include, found("red", "green"))
    correct, reason = geneval.judge(
        prompt("position", *include),
        found("pink", "blue"),
        image=None,
        classify_colours=colours_of,
        options=GenEvalOptions(),
    )
    assert not correct
    assert len(reason.splitlines()) == 2, "the failed target and the clause that needed it"


# --- exclude ---


def test_exclude_is_reached_at_its_count():
    rule = {"include": [CAT | {"count": 2}], "exclude": [CAT | {"count": 3}]}
    assert verdict("counting", found={"cat": [Found()] * 2}, **rule)
    assert not verdict("counting", found={"cat": [Found()] * 3}, **rule)
    assert verdict("counting", found={"cat": [Found()] * 2 + [Found(score=0.9)]}, **rule), "not above 0.9"
    assert not verdict("counting", found={"cat": [Found()] * 4}, **rule)


# --- records and scores ---


def test_record_has_the_published_schema():
    record = geneval.score_image(
        prompt("two_object", CAT, DOG),
        None,
        filename="out/00000/samples/00001.png",
        detector=lambda image: {
            "cat": [Found((1, 2, 3, 4), 0.5), Found(score=0.1)],
            "tie": [Found(score=0.2)],
        },
        classify_colours=colours_of,
        options=GenEvalOptions(),
    )
    assert list(record) == ["filename", "tag", "prompt", "correct", "reason", "metadata", "details"]
    assert (record["filename"], record["tag"], record["prompt"]) == (
        "out/00000/samples/00001.png",
        "two_object",
        "p",
    )
    assert record["correct"] is False
    assert "dog" in record["reason"] and "\n" not in record["reason"]
    assert json.loads(record["metadata"]) == {"tag": "two_object", "include": [CAT, DOG], "prompt": "p"}
    assert json.loads(record["details"]) == {"cat": [[1, 2, 3, 4, 0.5]]}, "selected detections only"
    json.dumps(record)


def records(**images):
    """Per-image records: tag -> list of (prompt name, correct)."""
    return [
        {"tag": tag, "metadata": f"{tag} {name}", "correct": correct}
        for tag, entries in images.items()
        for name, correct in entries
    ]


def test_overall_is_the_unweighted_mean_of_the_tags():
    perfect = {tag: [("a", True)] for tag in geneval.TAGS}
    counting = [("a", True), ("a", False)] + [("b", False)] * 8
    scores = geneval.summarise(records(**perfect | {"counting": counting}))
    assert scores["tags"] == dict.fromkeys(geneval.TAGS, 1.0) | {"counting": 0.1}
    assert scores["overall"] == pytest.approx((5 + 0.1) / 6)
    assert scores["correct_images"] == pytest.approx(6 / 15)
    assert scores["correct_prompts"] == pytest.approx(6 / 7), "a prompt needs one correct image"


@pytest.mark.parametrize("tags", [geneval.TAGS[:5], (*geneval.TAGS, "other")])
def test_overall_needs_exactly_the_six_tags(tags):
    with pytest.raises(ValueError, match="position"):
        geneval.summarise(records(**{tag: [("a", True)] for tag in tags}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tag": "colours"}, "colours"),
        ({"include": []}, "includes nothing"),
        ({"include": [{"class": "cat"}]}, "class"),
        ({"include": [{"class": "cat", "count": 0}]}, "0"),
        ({"include": [{"class": "cat", "count": True}]}, "True"),
        ({"include": [CAT | {"colour": "red"}]}, "colour"),
        ({"include": [DOG, CAT | {"position": ["near", 0]}]}, "near"),
        ({"include": [DOG, CAT | {"position": ["above", 1]}]}, "clause 1"),
        ({"include": [CAT | {"position": ["above", -1]}]}, "-1"),
        ({"note": 1}, "note"),
    ],
)
def test_malformed_records_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        GenEvalPrompt.from_record({"tag": "position", "include": [CAT], "prompt": "p"} | change)


def test_a_bad_line_is_named(tmp_path):
    file = tmp_path / "metadata.jsonl"
    good = json.dumps(prompt("single_object", CAT).to_record())
    for bad in ("{", "[]", '{"tag": "x", "include": [], "prompt": ""}'):
        file.write_text(f"{good}\n{bad}\n")
        with pytest.raises(ValueError, match=r"metadata\.jsonl, line 2"):
            geneval.load_prompts(file)


# --- folders ---


def test_samples_are_found_in_numerical_order_and_other_names_ignored(tmp_path):
    for index in (2, 10, 1):
        for sample in (0, 1):
            path = tmp_path / f"{geneval.sample_stem(index, sample)}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        record = prompt("single_object", CAT | {"count": index}).to_record()
        (tmp_path / f"{index:05d}" / "metadata.jsonl").write_text(json.dumps(record) + "\n")
    (tmp_path / "00001" / "samples" / "grid.png").touch()
    (tmp_path / "00001" / "samples" / "00000.jpg").touch()
    (tmp_path / "notes").mkdir()
    found = [
        (path.relative_to(tmp_path).as_posix(), p.include[0].count)
        for path, p in geneval.find_samples(tmp_path)
    ]
    assert found == [(f"{i:05d}/samples/{k:05d}.png", i) for i in (1, 2, 10) for k in (0, 1)]


def test_folders_without_images_or_metadata_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no numbered prompt folder"):
        list(geneval.find_samples(tmp_path))
    (tmp_path / "00000" / "samples").mkdir(parents=True)
    (tmp_path / "00000" / "samples" / "00000.png").touch()
    with pytest.raises(ValueError, match="found 0 and 1"):
        list(geneval.find_samples(tmp_path))
    (tmp_path / "00000" / "metadata.jsonl").write_text(json.dumps(prompt("colors", CAT).to_record()))
    (tmp_path / "00000" / "samples" / "00000.png").unlink()
    with pytest.raises(ValueError, match="found 1 and 0"):
        list(geneval.find_samples(tmp_path))


# --- the published prompts ---


@pytest.fixture(scope="module")
def published():
    if not PUBLISHED.is_file():
        pytest.skip("the published prompt file is not here (github.com/djghosh13/geneval, prompts/)")
    return geneval.load_prompts(PUBLISHED)


def test_published_prompts_survive_a_round_trip(published):
    lines = PUBLISHED.read_text(encoding="utf-8").splitlines()
    assert [json.dumps(p.to_record()) for p in published] == lines
    counts = {tag: sum(p.tag == tag for p in published) for tag in geneval.TAGS}
    assert counts == dict(zip(geneval.TAGS, (80, 99, 80, 94, 100, 94 + 6), strict=True))


def perfect_detections(p):
    """What a flawless detector would see in a flawless image of `p`."""
    steps = {"left of": (-100, 0), "right of": (100, 0), "above": (0, -100), "below": (0, 100)}
    found = {}
    for clause in p.include:
        centre = steps.get(clause.relation, (0, 0))
        found[clause.class_name] = [Found(box(*centre), mask=clause.colour)] * clause.count
    return found


@pytest.mark.parametrize(
    ("detector", "score"), [(perfect_detections, 1.0), (lambda p: {}, 0.0)], ids=["all", "nothing"]
)
def test_published_prompts_with_a_perfect_and_an_empty_detector(published, detector, score):
    options = GenEvalOptions()
    scored = [
        geneval.score_image(
            p, p, filename="", detector=detector, classify_colours=colours_of, options=options
        )
        for p in published
    ]
    scores = geneval.summarise(scored)
    assert set(scores["tags"].values()) == {score}
    assert (scores["overall"], scores["correct_images"], scores["correct_prompts"]) == (score,) * 3
