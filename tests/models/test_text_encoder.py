"""The arithmetic of the instruction (CHI) around a prompt, against the long way round."""

import pytest
import torch

from sana.models.text_encoder import TextEncoder, TextFeatures
from tests.factories import (
    CHI_PROMPT,
    TEXT_LENGTH,
    TEXT_WIDTH,
    make_language_model,
    make_tokenizer,
    write_text_encoder,
)
from tests.numerics import assert_close

PROMPTS = ["a red circle on a gray background", "star", "", "été 😀 — " + "very " * 60 + "long"]


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    tokenizer = make_tokenizer()
    model = make_language_model(len(tokenizer)).model
    return TextEncoder(model, tokenizer, max_length=TEXT_LENGTH, chi_prompt=CHI_PROMPT).eval()


def by_hand(encoder: TextEncoder, prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad everything to the full length, run all of it, then select BOS and the last L - 1 positions."""
    chi = "\n".join(CHI_PROMPT)
    tokenizer = encoder.tokenizer
    length = len(tokenizer.encode(chi)) + TEXT_LENGTH - 2
    ids = tokenizer.encode(chi + prompt)[:length]
    mask = torch.tensor([[1] * len(ids) + [0] * (length - len(ids))])
    ids = torch.tensor([ids + [tokenizer.pad_token_id] * (length - len(ids))])
    with torch.no_grad():
        hidden = encoder.model(input_ids=ids, attention_mask=mask)[0]
    select = [0] + list(range(-(TEXT_LENGTH - 1), 0))
    return hidden[:, select], mask[:, select]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_encode_is_the_published_selection(encoder, prompt):
    features = encoder.encode([prompt])
    embeds, mask = by_hand(encoder, prompt)
    assert features.embeds.shape == (1, TEXT_LENGTH, TEXT_WIDTH)
    assert torch.equal(features.mask, mask)
    valid = mask.bool()[..., None]
    assert_close("embeds", features.embeds * valid, embeds * valid, rel_rms=1e-5)


def test_window_begins_with_the_prompt_s_first_word(encoder):
    """The instruction's trailing space merges with it; without that, BOS would be followed by a lone space."""
    tokenizer = encoder.tokenizer
    chi = "\n".join(CHI_PROMPT)
    n = len(tokenizer.encode(chi))
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode(chi))[-1] == "▁"
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode(chi + "red circle"))[n - 1] == "▁red"
    count = int(encoder.encode(["red circle"]).mask.sum())
    assert count == 1 + len(tokenizer.encode(" red circle", add_special_tokens=False))


def test_batch_mates_do_not_matter(encoder):
    together = encoder.encode(PROMPTS)
    for i, prompt in enumerate(PROMPTS):
        alone = encoder.encode([prompt])
        assert torch.equal(together.mask[i : i + 1], alone.mask)
        valid = alone.mask.bool()[..., None]
        assert_close("embeds", together.embeds[i : i + 1] * valid, alone.embeds * valid, rel_rms=1e-5)


def test_instruction_changes_the_features(encoder):
    plain = TextEncoder(encoder.model, encoder.tokenizer, max_length=TEXT_LENGTH)
    with_chi, without = encoder.encode(["star"]).embeds[0, 1], plain.encode([" star"]).embeds[0, 1]
    assert (with_chi - without).norm() > 0.1 * without.norm()


def test_null_caption_has_the_states_of_its_padding(encoder):
    """Training with a dropped caption keeps the prompt's mask, so these states are seen."""
    features = encoder.encode_unconditional([""])
    assert features.embeds.shape == (1, TEXT_LENGTH, TEXT_WIDTH)
    assert features.mask.sum() == 1
    assert (features.embeds[0, -1].abs() > 0).any()
    with torch.no_grad():
        ids = torch.full((1, TEXT_LENGTH), encoder.tokenizer.pad_token_id)
        ids[0, 0] = encoder.tokenizer.bos_token_id
        expected = encoder.model(input_ids=ids, attention_mask=features.mask)[0]
    assert_close("null", features.embeds, expected, rel_rms=1e-5)


def test_negative_prompt_is_without_the_instruction(encoder):
    plain = TextEncoder(encoder.model, encoder.tokenizer, max_length=TEXT_LENGTH)
    a, b = encoder.encode_unconditional(["blue stars"]), plain.encode_unconditional(["blue stars"])
    assert torch.equal(a.embeds, b.embeds) and torch.equal(a.mask, b.mask)


def test_trimmed_drops_only_padding():
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 0, 0]])
    features = TextFeatures(torch.arange(20.0).view(2, 5, 2), mask).trimmed()
    assert features.embeds.shape == (2, 3, 2) and torch.equal(features.mask, mask[:, :3])


def test_loads_a_folder_and_pads_to_the_right(tmp_path, encoder):
    write_text_encoder(tmp_path)
    loaded = TextEncoder.from_pretrained(
        tmp_path, max_length=TEXT_LENGTH, chi_prompt=CHI_PROMPT, dtype=torch.float32
    )
    assert loaded.tokenizer.padding_side == "right" and loaded.hidden_size == TEXT_WIDTH
    assert not any(p.requires_grad for p in loaded.parameters())
    assert torch.equal(loaded.encode(PROMPTS).embeds, encoder.encode(PROMPTS).embeds)


def test_nothing_there_is_one_clear_error(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="cannot load a text encoder from"):
        TextEncoder.from_pretrained(tmp_path / "empty")
    with pytest.raises(ValueError, match="at least 2, got 1"):
        TextEncoder(make_language_model(8).model, make_tokenizer(), max_length=1)
