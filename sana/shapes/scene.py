"""What can stand in a scene, and the sampler that composes one.

Coordinates are fractions of the image side: x to the right, y down, origin at the top left. A scene holds one to four
objects that never touch. Two single objects always stand in one clear relation, so that a caption can name it.
"""

import itertools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass

from sana.shapes.palette import BACKGROUNDS, COLOURS

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "diamond", "heart")
SIZES = {"small": 0.12, "large": 0.19}  # radius of the circumscribed circle
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
"""Relation -> its mirror image."""

_LATTICE = 16  # centres lie on multiples of 1/16: at 256 pixels, half the side of a latent
_MARGIN = 0.025  # from the image border
_GAP = 0.04  # between the circumscribed circles of two objects
_SLANT = 0.35  # most that a clear relation may lean: |minor offset| <= _SLANT * |major offset|
_ATTEMPTS = 20
_KINDS = {"single": 0.18, "count": 0.24, "pair": 0.48, "mixed": 0.10}


@dataclass(frozen=True, kw_only=True, slots=True)
class Object:
    """One shape: `x`, `y` of its centre and `radius` of its circumscribed circle, as fractions of the image side."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """`count` objects alike in shape, colour and size: what one noun phrase of a caption speaks of."""

    count: int
    shape: str
    colour: str
    size: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """A plain background with objects; `groups` keeps them as a caption names them, `relation` is that of a pair."""

    background: str
    objects: tuple[Object, ...]
    groups: tuple[Group, ...]
    relation: str | None = None


def relation_between(a: Object, b: Object) -> str | None:
    """The clear relation in which `a` stands to `b` ("left of": a is left of b), or None on a diagonal."""
    dx, dy = a.x - b.x, a.y - b.y
    if abs(dy) <= _SLANT * abs(dx):
        return "left of" if dx < 0 else "right of"
    if abs(dx) <= _SLANT * abs(dy):
        return "above" if dy < 0 else "below"
    return None


def compose(
    rng: random.Random, groups: tuple[Group, ...], background: str, relation: str | None = None
) -> Scene | None:
    """Place the objects of `groups` at random, the first of two in `relation` to the second; None if they find no room."""
    kinds = [group for group in groups for _ in range(group.count)]
    for _ in range(_ATTEMPTS):
        objects: list[Object] = []
        for kind in kinds:
            placed = _place(rng, kind, objects, relation)
            if placed is None:  # the ones before leave it no room: start anew
                break
            objects.append(placed)
        else:
            return Scene(background=background, objects=tuple(objects), groups=groups, relation=relation)
    return None


def _place(rng: random.Random, kind: Group, others: list[Object], relation: str | None) -> Object | None:
    """A new object apart from `others`, the first of which stands in `relation` to it; None after a few draws."""
    for _ in range(_ATTEMPTS):
        radius = SIZES[kind.size]
        first = math.ceil((radius + _MARGIN) * _LATTICE)  # symmetric: the last is _LATTICE - first
        x, y = (rng.randint(first, _LATTICE - first) / _LATTICE for _ in range(2))
        new = Object(shape=kind.shape, colour=kind.colour, size=kind.size, x=x, y=y, radius=radius)
        apart = all(math.hypot(x - other.x, y - other.y) >= radius + other.radius + _GAP for other in others)
        if apart and (relation is None or not others or relation_between(others[0], new) == relation):
            return new
    return None


def sample_scene(rng: random.Random, *, allowed: Callable[[Scene], bool] = lambda scene: True) -> Scene:
    """Draw a scene: one object, two to four alike, a pair in a relation, or a few alike and another; redrawn until `allowed`."""
    # Kept on a redraw, or hard kinds would be rare.
    kind = rng.choices(list(_KINDS), weights=list(_KINDS.values()))[0]
    while True:
        groups = _sample_groups(rng, kind)
        relation = rng.choice(list(OPPOSITE)) if kind == "pair" else None
        scene = compose(rng, groups, rng.choice(list(BACKGROUNDS)), relation)
        if scene is not None and allowed(scene):
            return scene


def _sample_groups(rng: random.Random, kind: str) -> tuple[Group, ...]:
    counts = {
        "single": (1,),
        "count": (rng.choice((2, 3, 4)),),
        "pair": (1, 1),
        "mixed": rng.choice(((2, 1), (1, 2), (2, 2), (3, 1))),
    }[kind]
    if len(counts) == 1:
        looks = [(rng.choice(SHAPES), rng.choice(list(COLOURS)))]
    elif kind == "pair" and rng.random() < 0.1:  # alike in shape, told apart by colour
        looks = list(zip([rng.choice(SHAPES)] * 2, rng.sample(list(COLOURS), 2), strict=True))
    else:
        looks = list(
            zip(rng.sample(SHAPES, len(counts)), rng.choices(list(COLOURS), k=len(counts)), strict=True)
        )
    # Four large objects rarely find room, so crowded scenes are small.
    sizes = ["small" if sum(counts) > 3 or rng.random() < 0.5 else "large" for _ in counts]
    return tuple(
        Group(count=count, shape=shape, colour=colour, size=size)
        for count, (shape, colour), size in zip(counts, looks, sizes, strict=True)
    )


def pairs_of_shapes() -> list[tuple[str, str]]:
    """All 28 unordered pairs of different shapes, in the order of `SHAPES`."""
    return list(itertools.combinations(SHAPES, 2))
