"""Questions that one step of attention must answer from the hidden states of a caption.

A cross attention of the transformer reads a caption in such steps. What the states hold only for a deeper network to work
out, the transformer hardly learns to use: so the text encoder learns, beside its language, to leave it where one look finds
it. "Left of" then names the object on the left, "circle" its colour and number.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from sana.shapes.captions import says
from sana.shapes.palette import COLOURS
from sana.shapes.scene import OPPOSITE, SHAPES, Scene

_SIDES, _COLOURS = tuple(OPPOSITE), tuple(COLOURS)
QUESTIONS = (*_SIDES, *SHAPES, *_COLOURS)
"""Each asks for an object: the one on a side of the other, of a shape, of a colour."""
ASPECTS = {"shape": len(SHAPES), "colour": len(_COLOURS), "count": 4}
"""What is asked of each object, and the number of possible answers."""
UNASKED = -1

Answers = list[tuple[int, ...]]
"""For each of `QUESTIONS` the index of each of `ASPECTS`, or `UNASKED` where the caption does not say."""
NOTHING_ASKED: Answers = [(UNASKED,) * len(ASPECTS)] * len(QUESTIONS)


def answers(scene: Scene, text: str) -> Answers:
    """What `text`, a caption of `scene`, answers."""
    colours, related = says(scene, text)
    found = list(NOTHING_ASKED)

    def answer(question: str, group: int) -> None:
        about = scene.groups[group]
        colour = _COLOURS.index(about.colour) if colours else UNASKED
        found[QUESTIONS.index(question)] = (SHAPES.index(about.shape), colour, about.count - 1)

    if related:
        answer(scene.relation, 0)
        answer(OPPOSITE[scene.relation], 1)
    numbers = range(len(scene.groups))
    for names, told in (
        ([group.shape for group in scene.groups], True),
        ([group.colour for group in scene.groups], colours),
    ):
        if told and len(set(names)) == len(names):  # else the question does not single out an object
            for number in numbers:
                answer(names[number], number)
    return found


class Reader(nn.Module):
    """One attention, one head: a learnt query for each question, and the answers read off the mean of the values.

    Args:
        hidden_size: D, of the hidden states.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(len(QUESTIONS), hidden_size) * hidden_size**-0.5)
        self.keys = nn.Linear(hidden_size, hidden_size, bias=False)
        self.values = nn.Linear(hidden_size, sum(ASPECTS.values()))

    def forward(self, hidden: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Scores (B, questions, answers) of each aspect; hidden: (B, L, D), mask: (B, L), True where a question may look."""
        scores = self.queries @ self.keys(hidden).mT
        weights = scores.masked_fill(~mask[:, None], float("-inf")).softmax(-1)
        read = weights @ self.values(hidden)
        return dict(zip(ASPECTS, read.split(list(ASPECTS.values()), dim=-1), strict=True))

    def loss(self, hidden: Tensor, mask: Tensor, expected: Tensor) -> Tensor:
        """Cross entropy of the answers, the mean of each aspect, summed; expected: (B, questions, aspects), `UNASKED` is free."""
        total = hidden.new_zeros(())
        for scores, right in zip(self(hidden, mask).values(), expected.unbind(-1), strict=True):
            losses = functional.cross_entropy(scores.mT, right, ignore_index=UNASKED, reduction="sum")
            total = total + losses / (right != UNASKED).sum().clamp(min=1)
        return total


def share_right(found: dict[str, Tensor], expected: Tensor) -> dict[str, float]:
    """Of all that is asked about each aspect, the share answered right; arguments as `Reader` gives and takes them."""
    shares = {}
    for (aspect, scores), right in zip(found.items(), expected.unbind(-1), strict=True):
        shares[aspect] = (scores.argmax(-1) == right)[right != UNASKED].float().mean().item()
    return shares
