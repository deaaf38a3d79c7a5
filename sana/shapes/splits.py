"""Which combinations training never sees, per GenEval tag, and the scenes of each split.

A combination is a tuple that begins with its tag:

    single_object  (tag, shape, size, background)          a lone object
    two_object     (tag, shape, shape, background)         shapes in the order of SHAPES
    counting       (tag, count, colour, shape)             two to four alike
    colors         (tag, colour, shape)                    in any scene: such an object never occurs in training
    position       (tag, shape, relation, shape)           relation "left of" or "above"; its mirror image is the same scene
    color_attr     (tag, (colour, shape), (colour, shape)) shapes in the order of SHAPES
"""

import functools
import itertools
import random

from sana.shapes.palette import BACKGROUNDS, COLOURS
from sana.shapes.scene import OPPOSITE, SHAPES, SIZES, Group, Scene, compose, pairs_of_shapes, sample_scene

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")

_HELD_OUT = {"single_object": 42, "two_object": 42, "counting": 42, "position": 22, "color_attr": 42}


def combinations_of(scene: Scene) -> set[tuple]:
    """Every combination that `scene` shows."""
    found: set[tuple] = set()
    objects = scene.objects
    for item in objects:
        found.add(("colors", item.colour, item.shape))
    if len(objects) == 1:
        found.add(("single_object", objects[0].shape, objects[0].size, scene.background))
    for group in scene.groups:
        if group.count > 1:
            found.add(("counting", group.count, group.colour, group.shape))
    for a, b in itertools.combinations(scene.groups, 2):
        if a.shape != b.shape:
            a, b = sorted((a, b), key=lambda group: SHAPES.index(group.shape))
            found.add(("two_object", a.shape, b.shape, scene.background))
            found.add(("color_attr", (a.colour, a.shape), (b.colour, b.shape)))
    if scene.relation is not None:
        a, b = (group.shape for group in scene.groups)
        found.add(position_combination(a, scene.relation, b))
    return found


def position_combination(a: str, relation: str, b: str) -> tuple:
    """The one name of "a RELATION b" and of its mirror image "b OPPOSITE a"."""
    return (
        ("position", a, relation, b)
        if relation in ("left of", "above")
        else ("position", b, OPPOSITE[relation], a)
    )


@functools.cache
def held_out() -> dict[str, tuple[tuple, ...]]:
    """The combinations that no training scene shows, by tag; a pure function, the same on every machine."""
    colours = list(COLOURS)
    order = random.Random("held-out colors").sample(colours, len(SHAPES))
    colors = tuple(("colors", colour, shape) for colour, shape in zip(order, SHAPES, strict=True))
    looks = [
        (colour, shape) for colour in colours for shape in SHAPES if ("colors", colour, shape) not in colors
    ]
    backgrounds = list(BACKGROUNDS)
    everything = {
        "single_object": [("single_object", *rest) for rest in itertools.product(SHAPES, SIZES, backgrounds)],
        "two_object": [("two_object", a, b, ground) for a, b in pairs_of_shapes() for ground in backgrounds],
        "counting": [("counting", count, *look) for count in (2, 3, 4) for look in looks],
        "position": [
            ("position", a, relation, b)
            for a, b in itertools.permutations(SHAPES, 2)
            for relation in ("left of", "above")
        ],
        "color_attr": [
            ("color_attr", a, b)
            for a, b in itertools.product(looks, looks)
            if SHAPES.index(a[1]) < SHAPES.index(b[1]) and a[0] != b[0]
        ],
    }
    chosen = {
        tag: tuple(random.Random(f"held-out {tag}").sample(options, _HELD_OUT[tag]))
        for tag, options in everything.items()
    }
    return {tag: colors if tag == "colors" else chosen[tag] for tag in TAGS}


@functools.cache
def _held_out_set() -> frozenset[tuple]:
    return frozenset(itertools.chain.from_iterable(held_out().values()))


def is_training_scene(scene: Scene) -> bool:
    """Whether `scene` shows no held-out combination."""
    return _held_out_set().isdisjoint(combinations_of(scene))


def training_scene(index: int) -> Scene:
    """Training scene number `index`: the same on every machine, with no held-out combination in it."""
    return sample_scene(random.Random(f"train {index}"), allowed=is_training_scene)


def validation_scene(index: int) -> Scene:
    """Held-out scene number `index`, for reconstruction and loss: each shows at least one held-out combination."""
    return sample_scene(
        random.Random(f"validation {index}"), allowed=lambda scene: not is_training_scene(scene)
    )


def scene_showing(combination: tuple, rng: random.Random) -> Scene:
    """A scene made to show `combination` (see the module's table), everything that it leaves open drawn at random."""
    tag, *rest = combination
    colours, sizes = list(COLOURS), list(SIZES)
    background, relation = rng.choice(list(BACKGROUNDS)), None
    while True:
        if tag == "single_object":
            shape, size, background = rest
            groups = (Group(count=1, shape=shape, colour=rng.choice(colours), size=size),)
        elif tag == "colors":
            groups = (Group(count=1, shape=rest[1], colour=rest[0], size=rng.choice(sizes)),)
        elif tag == "counting":
            groups = (Group(count=rest[0], shape=rest[2], colour=rest[1], size=rng.choice(sizes)),)
        else:
            relation = rng.choice(list(OPPOSITE))
            looks = [(rng.choice(colours), rest[0]), (rng.choice(colours), rest[1])]
            if tag == "two_object":
                background = rest[2]
            elif tag == "position":
                looks[1] = (looks[1][0], rest[2])
                relation = rest[1]
            else:
                looks = rest
            groups = tuple(Group(count=1, shape=s, colour=c, size=rng.choice(sizes)) for c, s in looks)
        scene = compose(rng, groups, background, relation)
        if scene is not None:
            return scene
