"""The held-out combinations: enough of each, in no training scene, in every held-out one."""

import hashlib
import random

import pytest

from sana.shapes.palette import COLOURS
from sana.shapes.scene import OPPOSITE, SHAPES, Group, Object, Scene
from sana.shapes.splits import (
    TAGS,
    combinations_of,
    held_out,
    is_training_scene,
    position_combination,
    scene_showing,
    training_scene,
    validation_scene,
)

EVERYTHING = set().union(*held_out().values())


def test_no_training_scene_shows_a_held_out_combination():
    for index in range(4000):
        shown = combinations_of(training_scene(index)) & EVERYTHING
        assert not shown, f"training scene {index} shows {shown}"


def test_every_validation_scene_shows_one():
    for index in range(200):
        assert combinations_of(validation_scene(index)) & EVERYTHING


def test_training_covers_what_is_not_held_out():
    """Each shape, colour and relation is seen, in other company: what is tested is composition."""
    seen = set().union(*(combinations_of(training_scene(index)) for index in range(6000)))
    looks = {(colour, shape) for colour in COLOURS for shape in SHAPES}
    held = {combination[1:] for combination in held_out()["colors"]}
    assert {combination[1:] for combination in seen if combination[0] == "colors"} == looks - held
    positions = {c for c in seen if c[0] == "position"}
    possible = {position_combination(a, r, b) for a in SHAPES for b in SHAPES for r in OPPOSITE}
    assert possible - positions - {c for c in possible if c[1] == c[3]} == set(held_out()["position"])


@pytest.mark.parametrize("tag", TAGS)
def test_a_scene_made_for_a_combination_shows_it(tag):
    for index, combination in enumerate(held_out()[tag]):
        scene = scene_showing(combination, random.Random(index))
        assert combination in combinations_of(scene)
        assert not is_training_scene(scene)


def test_a_relation_and_its_mirror_image_are_one():
    for a, b in (("star", "ring"), ("ring", "star")):
        for relation, opposite in OPPOSITE.items():
            assert position_combination(a, relation, b) == position_combination(b, opposite, a)
    assert position_combination("star", "right of", "ring") == ("position", "ring", "left of", "star")


def test_combinations_of_a_known_scene():
    star = Object(shape="star", colour="red", size="small", x=0.2, y=0.5, radius=0.1)
    ring = Object(shape="ring", colour="blue", size="large", x=0.7, y=0.5, radius=0.18)
    groups = tuple(Group(count=1, shape=o.shape, colour=o.colour, size=o.size) for o in (ring, star))
    scene = Scene(background="gray", objects=(ring, star), groups=groups, relation="right of")
    assert combinations_of(scene) == {
        ("colors", "red", "star"),
        ("colors", "blue", "ring"),
        ("two_object", "star", "ring", "gray"),
        ("color_attr", ("red", "star"), ("blue", "ring")),
        ("position", "star", "left of", "ring"),
    }


def test_the_split_never_changes():
    """The shipped model was trained on this split: another one would make its score a training score."""
    assert (
        hashlib.sha256(repr(held_out()).encode()).hexdigest()
        == "2194d9c02c08a8e23d9e624f492e29cccd2b1c5176c8d6d02d5f805f677ffa73"
    )
