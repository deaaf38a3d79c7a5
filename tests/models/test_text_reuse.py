"""What the text encoder runs once: the instruction, the empty prompt; and what no network needs to see: padding."""

import pytest
import torch

from sana.models.text_encoder import TextEncoder, TextFeatures, trim_together
from tests.factories import CHI_PROMPT, TEXT_LENGTH, make_language_model, make_tokenizer
from tests.models.test_text_encoder import by_hand
from tests.numerics import assert_close

PROMPTS = ["a red circle", "star", ""]


def make_encoder(chi: tuple[str, ...] = CHI_PROMPT) -> TextEncoder:
    tokenizer = make_tokenizer()
    return TextEncoder(
        make_language_model(len(tokenizer)).model, tokenizer, max_length=TEXT_LENGTH, chi_prompt=chi
    ).eval()


@pytest.fixture
def counted():
    """An encoder, and the shapes of the token batches that its model was run on."""
    encoder, shapes = make_encoder(), []
    run = encoder.model.forward

    def counting(*, input_ids, **others):
        shapes.append(tuple(input_ids.shape))
        return run(input_ids=input_ids, **others)

    encoder.model.forward = counting
    return encoder, shapes


def test_the_instruction_is_run_once(counted):
    encoder, shapes = counted
    instruction = len(encoder.tokenizer.encode("\n".join(CHI_PROMPT))) - 1
    longest = max(int(encoder.encode([prompt]).mask.sum()) - 1 for prompt in PROMPTS)
    shapes.clear()
    encoder.encode(PROMPTS)
    assert shapes == [(len(PROMPTS), longest)]
    encoder.double()
    shapes.clear()
    encoder.encode(PROMPTS)
    assert shapes == [(1, instruction), (len(PROMPTS), longest)], "kept keys of another dtype"


def test_kept_keys_are_not_written_to():
    encoder = make_encoder()
    first = encoder.encode(PROMPTS).embeds
    encoder.encode(["something else, and longer"])
    assert torch.equal(first, encoder.encode(PROMPTS).embeds)


@pytest.mark.parametrize(("end", "prompt"), [("re", "d circle"), ("circ", "le")])
def test_an_instruction_that_merges_with_the_prompt_by_more_than_a_token(end, prompt):
    encoder = make_encoder(("\n".join(CHI_PROMPT) + end,))
    start = len(encoder.tokenizer.encode(encoder.chi)) - 1
    ids = encoder.tokenizer.encode(encoder.chi + prompt)
    assert ids[:start] != encoder.tokenizer.encode(encoder.chi)[:start], "the kept keys would serve"
    hidden = encoder.model(input_ids=torch.tensor([ids]))[0]
    window = [0, *range(start, len(ids))]
    features = encoder.encode([prompt])
    assert int(features.mask.sum()) == len(window)
    assert_close("embeds", features.embeds[:, : len(window)], hidden[:, window], rel_rms=1e-6)


def test_the_empty_prompt_is_run_once(counted):
    encoder, shapes = counted
    null = encoder.encode_unconditional(["", ""])
    again = encoder.encode_unconditional([""])
    assert shapes == [(1, TEXT_LENGTH)]
    assert null.embeds.shape[0] == 2 and torch.equal(null.embeds[1:], again.embeds)
    assert_close("null", encoder.encode_unconditional(["", "x"]).embeds[:1], again.embeds, rel_rms=1e-6)


def test_trim_together_keeps_what_either_sees():
    embeds = torch.arange(24.0).view(2, 6, 2)
    text = TextFeatures(embeds, torch.tensor([[1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0]]))
    null = TextFeatures(-embeds[:1], torch.tensor([[1, 1, 1, 1, 0, 0]]))
    text, null = trim_together(text, null)
    assert text.embeds.shape == (2, 4, 2) and null.embeds.shape == (1, 4, 2)
    assert torch.equal(text.embeds, embeds[:, :4]) and torch.equal(null.embeds, -embeds[:1, :4])
    assert text.mask.sum() == 5 and null.mask.sum() == 4


def test_by_hand_is_still_what_comes_out():
    encoder = make_encoder()
    for prompt in PROMPTS:
        features, (embeds, mask) = encoder.encode([prompt]), by_hand(encoder, prompt)
        valid = mask.bool()[..., None]
        assert_close("embeds", features.embeds * valid, embeds * valid, rel_rms=1e-5)
