"""The prompts of the shapes benchmark: GenEval's six tags over combinations that training never sees.

Each prompt is a short caption in the words of `captions`, and its record has the schema of GenEval's
`evaluation_metadata.jsonl`. As there, a tag judges only what it is named after: the sizes and backgrounds
that make a `single_object` prompt unseen, or the colour of a `counting` prompt, are not checked.
"""

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sana.shapes.captions import noun_phrase, with_article
from sana.shapes.palette import BACKGROUNDS
from sana.shapes.scene import OPPOSITE, Group, Scene
from sana.shapes.splits import TAGS, held_out, scene_showing

PROMPTS_FILE = "asset/shapes_benchmark/evaluation_metadata.jsonl"
IMAGES_PER_PROMPT = 4


@dataclass(frozen=True, slots=True)
class BenchmarkPrompt:
    """One prompt: its GenEval `record` and the held-out `combination` (see `splits`) that it asks for."""

    record: Mapping[str, Any]
    combination: tuple

    def scene(self, rng: random.Random) -> Scene:
        """A scene that fulfils the record, for controls with drawn images."""
        return scene_showing(self.combination, rng)


def benchmark_prompts() -> list[BenchmarkPrompt]:
    """All prompts in the order of the committed file, at least 40 for each tag; a pure function."""
    return [
        BenchmarkPrompt({"tag": tag, **record}, combination)
        for tag in TAGS
        for combination in held_out()[tag]
        for record in _RECORDS[tag](*combination[1:])
    ]


def to_jsonl(prompts: list[BenchmarkPrompt]) -> str:
    """The text of `evaluation_metadata.jsonl`."""
    return "".join(json.dumps(prompt.record) + "\n" for prompt in prompts)


def _phrase(shape: str, *, colour: str | None = None, size: str | None = None, count: int = 1) -> str:
    group = Group(count=count, shape=shape, colour=colour or "", size=size or "")
    return noun_phrase(group, colour=colour is not None, size=size is not None)


def _on(background: str) -> str:
    return f"on {with_article(background)} background"


def _single_object(shape: str, size: str, background: str) -> list[dict]:
    prompt = f"{_phrase(shape, size=size)} {_on(background)}"
    return [{"include": [{"class": shape, "count": 1}], "prompt": prompt}]


def _two_object(a: str, b: str, background: str) -> list[dict]:
    prompt = f"{_phrase(a)} and {_phrase(b)} {_on(background)}"
    return [{"include": [{"class": a, "count": 1}, {"class": b, "count": 1}], "prompt": prompt}]


def _counting(count: int, colour: str, shape: str) -> list[dict]:
    include, exclude = [{"class": shape, "count": count}], [{"class": shape, "count": count + 1}]
    return [{"include": include, "exclude": exclude, "prompt": _phrase(shape, colour=colour, count=count)}]


def _colors(colour: str, shape: str) -> list[dict]:
    # So few objects are unseen everywhere that each is asked for on every background.
    include = [{"class": shape, "count": 1, "color": colour}]
    phrase = _phrase(shape, colour=colour)
    return [{"include": include, "prompt": f"{phrase} {_on(background)}"} for background in BACKGROUNDS]


def _position(a: str, relation: str, b: str) -> list[dict]:
    # The scene has two names: "a left of b" and "b right of a".
    return [
        {
            "include": [{"class": target, "count": 1}, {"class": subject, "count": 1, "position": [name, 0]}],
            "prompt": f"{_phrase(subject)} {name} {_phrase(target)}",
        }
        for subject, name, target in ((a, relation, b), (b, OPPOSITE[relation], a))
    ]


def _color_attr(a: tuple[str, str], b: tuple[str, str]) -> list[dict]:
    include = [{"class": shape, "count": 1, "color": colour} for colour, shape in (a, b)]
    prompt = " and ".join(_phrase(shape, colour=colour) for colour, shape in (a, b))
    return [{"include": include, "prompt": prompt}]


_RECORDS = {
    "single_object": _single_object,
    "two_object": _two_object,
    "counting": _counting,
    "colors": _colors,
    "position": _position,
    "color_attr": _color_attr,
}
