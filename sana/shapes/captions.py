"""What people say of a scene: short, paraphrased and long captions, and the one full description of it.

Attributes are left out at random, as in a user's prompt; a caption is always true of its scene.
"""

import itertools
import random

from sana.shapes.scene import OPPOSITE, Group, Scene

KINDS = ("short", "paraphrase", "long")

_NUMBERS = {2: ("two", "2"), 3: ("three", "3"), 4: ("four", "4")}
_PLURALS = {"cross": "crosses"}
_OPENINGS = (
    "a picture of {}",
    "a photo of {}",
    "an image of {}",
    "a drawing of {}",
    "show {}",
    "draw {}",
    "{}",
    "{}.",
)
_GROUNDS = (" on {a} background", " on {a} background", " on {}", ", {} background", " against {a} backdrop")
_RELATIONS = {
    "left of": ("left of", "to the left of", "on the left side of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right side of", "on the right of"),
    "above": ("above", "over", "higher than"),
    "below": ("below", "under", "beneath"),
}
_JOINTS = ("{} and {}", "{} and {}", "{} with {}", "{}, {}", "{} together with {}")


def with_article(words: str) -> str:
    """`words` behind their indefinite article: "a red circle", "an orange circle"."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def noun_phrase(group: Group, *, colour: bool = True, size: bool = False, number: str | None = None) -> str:
    """ "a small red circle", "three blue stars": what `group` is, with the attributes asked for."""
    words = [group.size] * size + [group.colour] * colour
    if group.count == 1:
        return with_article(" ".join([*words, group.shape]))
    return " ".join(
        [number or _NUMBERS[group.count][0], *words, _PLURALS.get(group.shape, group.shape + "s")]
    )


def place(x: float, y: float) -> str:
    """The third of the image in which a point lies: "upper left", "center", "right", ..."""
    column = ("left", "", "right")[min(2, int(3 * x))]
    row = ("upper", "", "lower")[min(2, int(3 * y))]
    if row and column:
        return f"{row} {column}"
    return {"upper": "top", "lower": "bottom"}.get(row, "") or column or "center"


def caption(scene: Scene, rng: random.Random, kind: str | None = None) -> str:
    """One true sentence about `scene`, of `kind` "short", "paraphrase" or "long" (drawn when None)."""
    kind = kind or rng.choices(KINDS, weights=(0.45, 0.4, 0.15))[0]
    if kind == "long":
        return describe(scene)
    if kind not in KINDS:
        raise ValueError(f"unknown kind of caption {kind!r}; one of {', '.join(KINDS)}")
    varied = kind == "paraphrase"
    with_colour = rng.random() < 0.75
    # What tells two groups of one shape apart must be said.
    told_apart = with_colour or len({group.shape for group in scene.groups}) < len(scene.groups)
    with_size = rng.random() < 0.25
    phrases = [
        noun_phrase(
            group,
            colour=told_apart,
            size=with_size,
            number=rng.choice(_NUMBERS[group.count]) if varied and group.count > 1 else None,
        )
        for group in scene.groups
    ]
    text = _join(scene, phrases, rng, varied)
    if rng.random() < 0.4:
        text += (rng.choice(_GROUNDS) if varied else _GROUNDS[0]).format(
            scene.background, a=with_article(scene.background)
        )
    if not varied:
        return text
    # Words without a meaning here, so that one in a user's prompt does no harm.
    if rng.random() < 0.12:
        text = f"{text}, {_babble(rng)}" if rng.random() < 0.5 else f"{_babble(rng)}, {text}"
    return rng.choice(_OPENINGS).format(text)


def _babble(rng: random.Random) -> str:
    return " ".join(
        "".join(rng.choices("aabcdeefghiijklmnoopqrstuuvwxyz", k=rng.randint(3, 9)))
        for _ in range(rng.randint(1, 2))
    )


def _join(scene: Scene, phrases: list[str], rng: random.Random, varied: bool) -> str:
    if len(phrases) == 1:
        return phrases[0]
    relation = scene.relation
    if rng.random() < 0.5:  # the order of naming carries no meaning
        phrases = phrases[::-1]
        relation = OPPOSITE[relation] if relation else None
    if relation and rng.random() < 0.5:
        words = rng.choice(_RELATIONS[relation]) if varied else relation
        return f"{phrases[0]} {words} {phrases[1]}"
    return (rng.choice(_JOINTS) if varied else _JOINTS[0]).format(*phrases)


def says(scene: Scene, text: str) -> tuple[bool, bool]:
    """Whether `text`, a caption of `scene`, names (the colours of the objects, how the two of a pair stand to each other).

    The full description tells the places of both, and so the relation, without a word for it.
    """
    colours = all(f"{group.colour} {group.shape}" in text for group in scene.groups)
    words = itertools.chain.from_iterable(_RELATIONS.values())
    related = text == describe(scene) or any(f" {word} " in text for word in words)
    return colours, scene.relation is not None and related


def describe(scene: Scene) -> str:
    """All that is to be seen: every object with size, colour and place, then the background."""
    items = [
        f"a {item.size} {item.colour} {item.shape} {'in the ' if place(item.x, item.y) == 'center' else 'at the '}"
        f"{place(item.x, item.y)}"
        for item in scene.objects
    ]
    listed = items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]
    return f"{listed}, on {with_article(scene.background)} background"
