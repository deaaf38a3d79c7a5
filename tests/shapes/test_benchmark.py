"""The committed prompts of the shapes benchmark: regenerable, unseen in training, and judged rightly end to
end."""

import random
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from sana.metrics.geneval import TAGS, GenEvalPrompt, judge, score_image, select, summarise
from sana.metrics.geneval_folder import shapes_eyes
from sana.shapes import benchmark, detector
from sana.shapes.captions import KINDS, caption
from sana.shapes.render import render
from sana.shapes.splits import combinations_of, is_training_scene, training_scene

OPTIONS = shapes_eyes().options

ROOT = Path(__file__).resolve().parents[2]
IMAGES = 2  # drawn for each prompt in these tests


@pytest.fixture(scope="module")
def prompts():
    return benchmark.benchmark_prompts()


@pytest.fixture(scope="module")
def truth(prompts):
    """(prompt, ground-truth image) for IMAGES scenes of every prompt."""
    return [
        (GenEvalPrompt.from_record(prompt.record), render(prompt.scene(random.Random(f"truth {i} {k}"))))
        for i, prompt in enumerate(prompts)
        for k in range(IMAGES)
    ]


@pytest.fixture(scope="module")
def found(truth):
    """What the detector sees in each of these images."""
    return [detector.detect(image) for _, image in truth]


def record(prompt, image, detect=detector.detect):
    """The verdict on one image."""
    return score_image(
        prompt,
        image,
        filename="",
        detector=detect,
        classify_colours=detector.classify_colours,
        options=OPTIONS,
    )


# --- the prompt file ---


def test_committed_file_is_what_the_code_makes(prompts):
    committed = (ROOT / benchmark.PROMPTS_FILE).read_bytes()
    assert committed == benchmark.to_jsonl(prompts).encode("utf-8"), "run scripts/make_shapes_prompts.py"


def test_at_least_forty_different_prompts_for_each_tag(prompts):
    texts = [prompt.record["prompt"] for prompt in prompts]
    assert len(set(texts)) == len(texts)
    for tag in TAGS:
        assert sum(prompt.record["tag"] == tag for prompt in prompts) >= 40


def test_records_are_geneval_records(prompts):
    for prompt in prompts:
        parsed = GenEvalPrompt.from_record(prompt.record)
        assert parsed.to_record() == prompt.record
        assert bool(parsed.exclude) == (parsed.tag == "counting")
        assert all(
            (clause.relation is not None) == (parsed.tag == "position") for clause in parsed.include[1:]
        )
        assert all(
            (clause.colour is not None) == (parsed.tag in ("colors", "color_attr"))
            for clause in parsed.include
        )
        for clause in parsed.include:
            assert clause.class_name in prompt.record["prompt"]
            assert clause.colour is None or f"{clause.colour} {clause.class_name}" in prompt.record["prompt"]


def test_position_prompts_name_subject_relation_and_target(prompts):
    for prompt in prompts:
        if prompt.record["tag"] == "position":
            target, subject = prompt.record["include"]
            relation, index = subject["position"]
            assert index == 0
            assert prompt.record["prompt"] == f"a {subject['class']} {relation} a {target['class']}"


def test_counting_prompts_name_their_number(prompts):
    words = {2: "two ", 3: "three ", 4: "four "}
    counting = [prompt.record for prompt in prompts if prompt.record["tag"] == "counting"]
    assert {record["include"][0]["count"] for record in counting} == set(words)
    for record in counting:
        (include,), (exclude,) = record["include"], record["exclude"]
        assert record["prompt"].startswith(words[include["count"]])
        assert exclude == {"class": include["class"], "count": include["count"] + 1}


def test_no_training_scene_fits_a_prompt(prompts):
    """What a prompt asks for is held out, and no training caption says the same."""
    for prompt in prompts:
        scene = prompt.scene(random.Random(0))
        assert prompt.combination in combinations_of(scene)
        assert not is_training_scene(scene)
    rng = random.Random(0)
    captions = {caption(training_scene(i), rng, kind) for i in range(1500) for kind in KINDS}
    assert captions.isdisjoint(prompt.record["prompt"] for prompt in prompts)


def test_prompts_speak_the_language_of_the_captions(prompts):
    words = {
        word for i in range(1500) for word in caption(training_scene(i), random.Random(i), "short").split()
    }
    assert words >= {word for prompt in prompts for word in prompt.record["prompt"].split()}


# --- controls of the whole metric ---


def test_true_images_score_one(truth, found):
    scores = summarise(
        record(prompt, image, lambda _, seen=seen: seen)
        for (prompt, image), seen in zip(truth, found, strict=True)
    )
    assert min(scores["tags"].values()) >= 0.99, scores


def test_degraded_images_still_score(truth):
    def degrade(image, seed):
        rng = np.random.default_rng(seed)
        pixels = ndimage.gaussian_filter(image.astype(np.float32), (1.5, 1.5, 0))
        return np.clip(pixels + rng.normal(0, 6, pixels.shape) + rng.uniform(-8, 8, 3), 0, 255).astype(
            np.uint8
        )

    scores = summarise(
        record(prompt, degrade(image, i)) for i, (prompt, image) in enumerate(truth[:: 2 * IMAGES])
    )
    assert min(scores["tags"].values()) >= 0.95, scores


@pytest.mark.parametrize("tag", TAGS)
def test_images_of_other_prompts_fail(truth, found, tag):
    """Every image against every other prompt of its tag: at most 0.15 pass."""
    rows = [(prompt, seen) for (prompt, _), seen in zip(truth, found, strict=True) if prompt.tag == tag]
    different = list(dict.fromkeys(prompt for prompt, _ in rows))
    verdicts = []
    for own, seen in rows:
        kept = {
            name: select(objects, threshold=OPTIONS.threshold, options=OPTIONS)
            for name, objects in seen.items()
        }
        verdicts += [
            judge(other, kept, image=None, classify_colours=detector.classify_colours, options=OPTIONS)[0]
            for other in different
            if other != own
        ]
    assert np.mean(verdicts) <= 0.15


@pytest.mark.parametrize("kind", ["blank", "noise"])
def test_images_of_nothing_score_zero(prompts, kind):
    blank = np.full((256, 256, 3), 144, np.uint8)
    noise = np.random.default_rng(0).integers(0, 256, blank.shape, dtype=np.uint8)
    image = {"blank": blank, "noise": noise}[kind]
    scores = summarise(record(GenEvalPrompt.from_record(prompt.record), image) for prompt in prompts)
    assert (scores["overall"], scores["correct_prompts"]) == (0, 0)


def test_exchanged_channels_are_seen(truth):
    """Red and blue exchanged in the picture: right shapes, wrong colours."""
    alike = {"black", "white", "green", "purple"}  # these stay what they are
    changed = [
        (prompt, image[..., ::-1])
        for prompt, image in truth
        if prompt.tag in ("colors", "color_attr")
        and not {clause.colour for clause in prompt.include} <= alike
    ]
    assert changed
    assert not any(record(prompt, image)["correct"] for prompt, image in changed)


def test_mirrored_positions_are_seen(truth):
    sideways = [(p, image) for p, image in truth if p.include[-1].relation in ("left of", "right of")]
    assert sideways
    assert not any(record(prompt, image[:, ::-1])["correct"] for prompt, image in sideways)
