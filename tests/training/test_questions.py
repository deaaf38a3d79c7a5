"""Questions about captions: asked only where a caption tells, answered truly, and learnt by one attention."""

import random

import pytest
import torch

from sana.shapes.palette import COLOURS
from sana.shapes.scene import OPPOSITE, SHAPES, Group, compose
from sana.training.questions import ASPECTS, QUESTIONS, UNASKED, Reader, answers, share_right

RED_CIRCLE = Group(count=1, shape="circle", colour="red", size="small")
BLUE_STARS = Group(count=3, shape="star", colour="blue", size="small")
CIRCLE, STARS = (SHAPES.index(name) for name in ("circle", "star"))
RED, BLUE = (list(COLOURS).index(name) for name in ("red", "blue"))


def scene(*groups, relation=None):
    return compose(random.Random(0), groups, "white", relation)


def asked(found):
    return {question: row for question, row in zip(QUESTIONS, found, strict=True) if set(row) != {UNASKED}}


@pytest.mark.parametrize("relation", OPPOSITE)
def test_sides_shapes_and_colours_name_their_object(relation):
    other = Group(count=1, shape="star", colour="blue", size="large")
    told = f"a red circle {relation} a blue star"
    circle, star = (CIRCLE, RED, 0), (STARS, BLUE, 0)
    assert asked(answers(scene(RED_CIRCLE, other, relation=relation), told)) == {
        relation: circle, OPPOSITE[relation]: star, "circle": circle, "star": star, "red": circle, "blue": star,
    }  # fmt: skip


def test_only_what_the_caption_says_is_asked():
    both = scene(RED_CIRCLE, BLUE_STARS)
    circle, stars = (CIRCLE, UNASKED, 0), (STARS, UNASKED, 2)
    assert asked(answers(both, "a circle and three stars")) == {"circle": circle, "star": stars}
    alike = Group(count=1, shape="circle", colour="blue", size="small")
    found = asked(answers(scene(RED_CIRCLE, alike), "a red circle and a blue circle"))
    assert found == {"red": (CIRCLE, RED, 0), "blue": (CIRCLE, BLUE, 0)}  # "the circle" is either


def test_one_attention_learns_what_lies_open_and_nothing_else():
    """Each token of `hidden` holds one object: side, shape and colour; spoilt, both sides."""
    torch.manual_seed(0)
    rng, hidden, expected = random.Random(0), [], []
    for _ in range(400):
        a, b = (
            Group(count=1, shape=shape, colour=colour, size="small")
            for shape, colour in zip(rng.sample(SHAPES, 2), rng.sample(list(COLOURS), 2), strict=True)
        )
        relation = rng.choice(list(OPPOSITE))
        tokens = torch.zeros(2, len(QUESTIONS))
        for token, group, side in ((0, a, relation), (1, b, OPPOSITE[relation])):
            tokens[token, [QUESTIONS.index(name) for name in (side, group.shape, group.colour)]] = 2
        told = f"a {a.colour} {a.shape} {relation} a {b.colour} {b.shape}"
        hidden.append(tokens)
        expected.append(answers(scene(a, b, relation=relation), told))
    hidden, expected = torch.stack(hidden), torch.tensor(expected)
    spoilt = hidden.clone()
    spoilt[..., :4] = hidden[..., :4].mean(1, keepdim=True)
    mask = torch.ones(400, 2, dtype=torch.bool)

    def learn(states):
        reader = Reader(len(QUESTIONS))
        optimizer = torch.optim.Adam(reader.parameters(), lr=0.03)
        for _ in range(150):
            optimizer.zero_grad()
            loss = reader.loss(states[:300], mask[:300], expected[:300])
            loss.backward()
            optimizer.step()
        sides = expected.clone()
        sides[:, 4:] = UNASKED
        return share_right(reader(states[300:], mask[300:]), sides[300:])

    assert learn(hidden) == dict.fromkeys(ASPECTS, 1.0)
    assert learn(spoilt)["shape"] < 0.75


def test_a_masked_token_is_not_read():
    reader, hidden = Reader(8), torch.randn(1, 3, 8)
    mask = torch.tensor([[True, True, False]])
    other = hidden.clone()
    other[:, 2] = 7
    for aspect, scores in reader(hidden, mask).items():
        assert torch.equal(scores, reader(other, mask)[aspect])
        assert scores.shape == (1, len(QUESTIONS), ASPECTS[aspect])


def test_where_nothing_is_asked_nothing_is_lost():
    reader, hidden = Reader(8), torch.randn(2, 3, 8, requires_grad=True)
    mask = torch.ones(2, 3, dtype=torch.bool)
    nothing = torch.full((2, len(QUESTIONS), len(ASPECTS)), UNASKED)
    loss = reader.loss(hidden, mask, nothing)
    loss.backward()
    assert loss.item() == 0 and not hidden.grad.any()
