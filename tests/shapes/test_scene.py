"""Scenes: what is promised of every one of them, on a few thousand."""

import hashlib
import math
import random
from collections import Counter

import pytest

from sana.shapes.palette import BACKGROUNDS, COLOURS
from sana.shapes.scene import (
    OPPOSITE,
    SHAPES,
    SIZES,
    Group,
    Object,
    compose,
    relation_between,
    sample_scene,
)

SCENES = [sample_scene(random.Random(f"test {i}")) for i in range(2000)]


def test_objects_lie_inside_and_apart():
    for scene in SCENES:
        for i, a in enumerate(scene.objects):
            assert a.radius < a.x < 1 - a.radius and a.radius < a.y < 1 - a.radius
            assert a.radius == SIZES[a.size]
            assert (16 * a.x).is_integer() and (16 * a.y).is_integer()
            for b in scene.objects[:i]:
                assert math.hypot(a.x - b.x, a.y - b.y) > a.radius + b.radius


def test_groups_are_the_objects():
    for scene in SCENES:
        looks = Counter((item.shape, item.colour, item.size) for item in scene.objects)
        assert looks == Counter({(g.shape, g.colour, g.size): g.count for g in scene.groups})
        assert 1 <= len(scene.objects) <= 4


def test_a_pair_stands_in_its_relation():
    pairs = [scene for scene in SCENES if scene.relation]
    assert len(pairs) > 800
    for scene in pairs:
        a, b = scene.objects
        assert relation_between(a, b) == scene.relation
        assert relation_between(b, a) == OPPOSITE[scene.relation]


DIRECTIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}


@pytest.mark.parametrize("relation", DIRECTIONS)
def test_relations_point_the_right_way(relation):
    groups = tuple(Group(count=1, shape=shape, colour="red", size="small") for shape in ("star", "ring"))
    scene = compose(random.Random(0), groups, "gray", relation)
    a, b = scene.objects
    dx, dy = DIRECTIONS[relation]
    assert (a.x - b.x) * dx + (a.y - b.y) * dy > 0.15


def test_a_diagonal_is_no_relation():
    a, b = (Object(shape="star", colour="red", size="small", radius=0.1, x=x, y=x) for x in (0.2, 0.8))
    assert relation_between(a, b) is None


def test_everything_occurs():
    objects = [item for scene in SCENES for item in scene.objects]
    assert {item.shape for item in objects} == set(SHAPES)
    assert {item.colour for item in objects} == set(COLOURS)
    assert {scene.background for scene in SCENES} == set(BACKGROUNDS)
    assert {len(scene.objects) for scene in SCENES} == {1, 2, 3, 4}


def test_too_much_for_the_picture_is_none():
    crowd = (Group(count=12, shape="star", colour="red", size="large"),)
    assert compose(random.Random(0), crowd, "gray") is None


def test_scenes_never_change():
    """The shipped model's data set and the benchmark's prompts rest on these draws."""
    digest = hashlib.sha256("\n".join(map(repr, SCENES[:200])).encode()).hexdigest()
    assert digest == "152c62c6dd5e56f5f9d3c647e1c96cfb260f4425976526e5e91f9972b05bc490"
