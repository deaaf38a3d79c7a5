"""The choice of a caption: its probabilities, and that draws follow them."""

import math
import random
from collections import Counter

import pytest

from sana.data.captions import Caption, CaptionChoice, assembled, parsed, scores_of
from sana.utils.seeding import derive_seed


def captions(**scores):
    return [Caption(text=f"by {kind}", kind=kind, score=score) for kind, score in scores.items()]


def test_power_law_of_the_reference():
    # T = 0.1: s^10. (30 / 27)^10 = 2.8679719907924413, by hand.
    found = CaptionChoice(threshold=25.0, temperature=0.1).probabilities(captions(a=27.0, b=30.0, c=24.9))
    assert found == pytest.approx([1 / 3.8679719907924413, 2.8679719907924413 / 3.8679719907924413, 0.0])


def test_softmax_of_the_paper():
    found = CaptionChoice(selection="softmax", temperature=2.0).probabilities(captions(a=27.0, b=30.0))
    assert found[1] / found[0] == pytest.approx(math.exp(1.5)) and sum(found) == pytest.approx(1)


@pytest.mark.parametrize("selection", ["clipscore", "softmax"])
def test_below_the_threshold_the_best_alone(selection):
    choice = CaptionChoice(selection=selection, threshold=25.0)
    assert choice.probabilities(captions(a=20.0, b=24.0, c=3.0)) == [0, 1, 0]
    assert choice.probabilities(captions(a=25.0, b=24.0, c=25.0)) == [0.5, 0, 0.5], "the threshold is enough"


def test_without_scores_the_own_caption():
    choice = CaptionChoice(threshold=25.0)
    assert choice.probabilities(captions(VILA=None, prompt=None)) == [0, 1]
    assert choice.probabilities(captions(VILA=None, InternVL2=None)) == [1, 0]
    assert choice.probabilities(captions(prompt=None, VILA=26.0)) == [0, 1], (
        "a caption with a score comes first"
    )


@pytest.mark.parametrize("selection", ["clipscore", "softmax"])
@pytest.mark.parametrize("temperature", [1e-9, 1.0, 1e9])
def test_extreme_temperatures_and_scores(selection, temperature):
    choice = CaptionChoice(selection=selection, threshold=-100.0, temperature=temperature)
    for scores in (
        {"a": 40.0, "b": 39.0},
        {"a": 0.0, "b": 0.0},
        {"a": -3.0, "b": 1e-300},
        {"a": 1e308, "b": 1.0},
    ):
        found = choice.probabilities(captions(**scores))
        assert sum(found) == pytest.approx(1) and min(found) >= 0
    # The floor of T: at 0.01 the exponent is 100.
    cold = CaptionChoice(temperature=1e-9).probabilities(captions(a=30.0, b=29.0))
    assert cold[1] / cold[0] == pytest.approx((29 / 30) ** 100)


def test_proportion():
    choice = CaptionChoice(selection="proportion", proportion={"prompt": 1, "VILA": 3, "absent": 9})
    assert choice.probabilities(captions(prompt=10.0, VILA=30.0, other=40.0)) == [0.25, 0.75, 0]
    with pytest.raises(ValueError, match="other, none of which has a weight"):
        choice.probabilities(captions(other=1.0))


def power_law(scores, temperature):
    return {kind: score ** (1 / temperature) for kind, score in scores.items()}


def softmax(scores, temperature):
    return {kind: math.exp(score / temperature) for kind, score in scores.items()}


SCORES = {"prompt": 25.5, "VILA1-5-13B": 28.0, "InternVL2-26B": 27.1}  # and "low", below the threshold
LAWS = {
    "clipscore": (CaptionChoice(threshold=25.0, temperature=0.1), power_law(SCORES, 0.1)),
    "softmax": (CaptionChoice(selection="softmax", threshold=25.0, temperature=2.0), softmax(SCORES, 2.0)),
    "proportion": (
        CaptionChoice(selection="proportion", proportion={"prompt": 1, "VILA1-5-13B": 2, "InternVL2-26B": 5}),
        {"prompt": 1, "VILA1-5-13B": 2, "InternVL2-26B": 5},
    ),
}
NEAR = (
    power_law(SCORES, 0.13),
    softmax(SCORES, 5.0),
    dict.fromkeys(SCORES, 1),
    {kind: 1 + (kind == "VILA1-5-13B") for kind in SCORES},
)


def chi_square(drawn, weights):
    count, total = sum(drawn.values()), sum(weights.values())
    return sum((drawn[kind] - count * w / total) ** 2 / (count * w / total) for kind, w in weights.items())


@pytest.mark.parametrize(("choice", "law"), LAWS.values(), ids=LAWS)
def test_draws_follow_the_law(choice, law):
    """Laws written out here, not taken from the code; and the test tells each from others that are near."""
    found = [Caption(text=kind, kind=kind, score=score) for kind, score in {**SCORES, "low": 20.0}.items()]
    sources = (random.Random(derive_seed("caption", 0, 0, index)) for index in range(20_000))
    drawn = Counter(choice.draw(found, source).kind for source in sources)
    assert drawn["low"] == 0
    # 2 degrees of freedom: one in 1000 is larger than 13.8; seeds are fixed.
    assert chi_square(drawn, law) < 13.8
    others = [other for _, other in LAWS.values() if other is not law]
    assert min(chi_square(drawn, other) for other in (*others, *NEAR)) > 50


def test_captions_from_files():
    found = assembled({"prompt": " a cat ", "VILA": "", "other": "x"}, {"prompt": 27.0, "nobody": 3.0})
    assert found == [Caption(text="a cat", score=27.0), Caption(text="x", kind="other")]
    with pytest.raises(ValueError, match="has only empty captions .prompt"):
        assembled({"prompt": "  "}, {})
    with pytest.raises(ValueError, match="has no caption"):
        assembled({}, {"prompt": 27.0})
    assert scores_of({"prompt": "27.1", "VILA": 3}, "x.json") == {"prompt": 27.1, "VILA": 3.0}
    for value in ("high", None, "nan", float("inf"), [1]):
        with pytest.raises(ValueError, match="x.json: the CLIP score of prompt is n"):
            scores_of({"prompt": value}, "x.json")
    assert parsed('{"k": {"prompt": "a"}}', "k", "x.json") == {"prompt": "a"}
    assert parsed('{"k": {"prompt": "a"}}', "other", "x.json") == {}
    for content in ("[1]", '{"k": 3}', "{", b"\xff\xfe\x00"):
        with pytest.raises(ValueError, match="^x.json is not"):
            parsed(content, "k", "x.json")
