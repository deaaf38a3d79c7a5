"""Captions are true of their scene, vary, and speak the language of a user's plain prompts."""

import itertools
import random
import re

import pytest

from sana.shapes.captions import KINDS, caption, describe, noun_phrase, place, says, with_article
from sana.shapes.palette import COLOURS
from sana.shapes.scene import OPPOSITE, SHAPES, Group
from sana.shapes.splits import training_scene

SCENES = [training_scene(i) for i in range(600)]
ALL = [
    (scene, kind, caption(scene, random.Random(i), kind)) for i, scene in enumerate(SCENES) for kind in KINDS
]
NUMBERS = {"a": 1, "an": 1, "two": 2, "2": 2, "three": 3, "3": 3, "four": 4, "4": 4}
PHRASE = re.compile(
    rf"\b({'|'.join(NUMBERS)})((?: (?:small|large|{'|'.join(COLOURS)}))*) ({'|'.join(SHAPES)})(?:e?s)?\b"
)
WORDS = {
    "left of": ("left",), "right of": ("right",), "above": ("above", "over", "higher"),
    "below": ("below", "under", "beneath"),
}  # fmt: skip


def phrases(text: str) -> list[tuple[int, list[str], str]]:
    return [(NUMBERS[number], words.split(), shape) for number, words, shape in PHRASE.findall(text)]


def test_short_and_paraphrased_captions_name_the_groups():
    for scene, kind, text in ALL:
        if kind == "long":
            continue
        found = phrases(text)
        assert len(found) == len(scene.groups), text
        for group in scene.groups:
            assert any(
                (number, shape) == (group.count, group.shape) and set(words) <= {group.colour, group.size}
                for number, words, shape in found
            ), (text, group)


def test_long_captions_name_every_object():
    for scene, kind, text in ALL:
        if kind == "long":
            assert len(phrases(text)) == len(scene.objects), text
            assert text.endswith(f"{scene.background} background")
            for item in scene.objects:
                assert f"{item.size} {item.colour} {item.shape}" in text and place(item.x, item.y) in text


def test_relations_are_true_in_the_order_of_naming():
    checked = 0
    for scene, kind, text in ALL:
        if kind == "long" or scene.relation is None:
            continue
        said = [r for r, words in WORDS.items() if any(re.search(rf"\b{word}\b", text) for word in words)]
        if not said:
            continue
        (_, words, first), *_ = phrases(text)
        a, b = scene.groups
        is_first = a.colour in words if a.shape == b.shape else first == a.shape
        assert said == [scene.relation if is_first else OPPOSITE[scene.relation]], text
        checked += 1
    assert checked > 200


def test_says_knows_what_a_caption_tells():
    told = set()
    for scene, kind, text in ALL:
        words = [word for _, found, _ in phrases(text) for word in found]
        coloured = all(group.colour in words for group in scene.groups)
        related = any(re.search(rf"\b{word}\b", text) for word in itertools.chain(*WORDS.values()))
        found = says(scene, text)
        assert found == (coloured, scene.relation is not None and (kind == "long" or related)), text
        told.add(found)
    assert len(told) == 4


def test_a_background_that_is_named_is_the_scene_s():
    named = [(scene, text) for scene, _, text in ALL if re.search(r"background|backdrop", text)]
    assert len(named) > 300
    assert all(scene.background in text for scene, text in named)


def test_two_of_one_shape_are_told_apart_by_colour():
    alike = [s for s in SCENES if len(s.groups) == 2 and s.groups[0].shape == s.groups[1].shape]
    assert alike
    for scene in alike:
        for seed in range(20):
            text = caption(scene, random.Random(seed))
            assert all(group.colour in text for group in scene.groups), text


@pytest.mark.parametrize(
    "prompt",
    [
        "a red circle",
        "three blue stars",
        "two crosses",
        "a star left of a ring",
        "an orange heart",
        "a square and a circle",
    ],
)
def test_plain_prompts_lie_inside_the_language(prompt):
    """Each is what some scene's short caption can be."""
    pattern = re.compile(r"\b(red|blue|orange|green|yellow|purple|pink|brown|black|white)\b|\b[a-z]+(?=s?\b)")
    spoken = {word for _, _, text in ALL for word in re.findall(r"[a-z]+", text)}
    assert set(re.findall(r"[a-z]+", prompt)) <= spoken, pattern


def test_kinds_and_seeds_vary_the_wording():
    scene = next(s for s in SCENES if s.relation)
    assert len({caption(scene, random.Random(i)) for i in range(60)}) > 20
    assert caption(scene, random.Random(7)) == caption(scene, random.Random(7))
    assert caption(scene, random.Random(0), "long") == describe(scene)


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="'epic'.*short, paraphrase, long"):
        caption(SCENES[0], random.Random(0), "epic")


def test_grammar():
    assert with_article("orange star") == "an orange star"
    assert noun_phrase(Group(count=3, shape="cross", colour="red", size="small")) == "three red crosses"
    assert (
        noun_phrase(Group(count=1, shape="star", colour="red", size="large"), size=True) == "a large red star"
    )
    assert [place(x, y) for x, y in [(0.1, 0.1), (0.5, 0.5), (0.9, 0.5), (0.5, 0.9)]] == [
        "upper left", "center", "right", "bottom",
    ]  # fmt: skip
