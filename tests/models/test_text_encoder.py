"""The arithmetic of the instruction (CHI) around a prompt, against the long way round."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import processors
from transformers import T5Config, T5Model

from sana.models.text_encoder import T5_NAMES, TextEncoder, TextFeatures, unconditional_mask
from sana.utils import hub
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
    """The instruction's trailing space merges with it; else BOS would be followed by a lone space."""
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


def test_equal_prompts_are_encoded_once(encoder):
    sizes = []
    handle = encoder.model.register_forward_pre_hook(
        lambda model, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    try:
        features = encoder.encode(["star", "red", "star", "star"])
        null = encoder.encode_unconditional(["", "", "blue"])
    finally:
        handle.remove()
    assert sizes == [2, 2]
    assert torch.equal(features.embeds[[0, 0]], features.embeds[[2, 3]])
    assert torch.equal(features.mask, encoder.encode(["star", "red", "star", "star"]).mask)
    assert_close("order", features.embeds[1, :3], encoder.encode(["red"]).embeds[0, :3], rel_rms=1e-5)
    assert torch.equal(null.embeds[0], null.embeds[1]) and null.mask.sum(dim=1).tolist()[:2] == [1, 1]
    assert not torch.equal(null.embeds[0], null.embeds[2])


def test_lower_case_is_an_option(encoder):
    lower = TextEncoder(
        encoder.model, encoder.tokenizer, max_length=TEXT_LENGTH, chi_prompt=CHI_PROMPT, lowercase=True
    )
    shout, plain = [" Red STAR\n"], ["red star"]
    for given in ("encode", "encode_unconditional"):
        assert torch.equal(getattr(lower, given)(shout).embeds, getattr(encoder, given)(plain).embeds), given
        assert not torch.equal(getattr(encoder, given)(shout).embeds, getattr(encoder, given)(plain).embeds)


@pytest.mark.parametrize("negative", ["", "blue", "a very long negative prompt"])
def test_unconditional_branch_is_seen_through_the_prompts_mask(encoder, negative):
    """The reference repeats the prompt's mask, whatever the negative prompt; diffusers takes its own."""
    text, null = encoder.encode(["red star"]).mask, encoder.encode_unconditional([negative]).mask
    assert not torch.equal(text, null)
    assert torch.equal(unconditional_mask(text, null), text)
    assert torch.equal(unconditional_mask(text, null, "prompt"), text)
    assert torch.equal(unconditional_mask(text, null, "own"), null)
    with pytest.raises(ValueError, match="mask of the negative prompts 'both'; choose from prompt, own"):
        unconditional_mask(text, null, "both")


def test_a_tokenizer_without_bos_may_leave_nothing_of_an_empty_prompt():
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.Sequence([])
    plain = TextEncoder(make_language_model(len(tokenizer)).model, tokenizer, max_length=TEXT_LENGTH).eval()
    for features in (plain.encode([""]), plain.encode_unconditional([""])):
        assert features.mask.sum() == 0
        assert features.embeds.shape == (1, TEXT_LENGTH, TEXT_WIDTH) and features.embeds.isfinite().all()


def test_loads_a_diffusers_pipeline_folder(tmp_path, encoder):
    """The decoder without a head in text_encoder/, its tokenizer beside it."""
    encoder.model.save_pretrained(tmp_path / "text_encoder")
    encoder.tokenizer.save_pretrained(tmp_path / "tokenizer")
    settings = dict(max_length=TEXT_LENGTH, chi_prompt=CHI_PROMPT, dtype=torch.float32)
    expected = encoder.encode(PROMPTS).embeds
    for folder in (tmp_path, tmp_path / "text_encoder"):
        assert torch.equal(TextEncoder.from_pretrained(folder, **settings).encode(PROMPTS).embeds, expected)


def test_nothing_there_is_one_clear_error(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="cannot load a text encoder from"):
        TextEncoder.from_pretrained(tmp_path / "empty")
    with pytest.raises(ValueError, match="at least 2, got 1"):
        TextEncoder(make_language_model(8).model, make_tokenizer(), max_length=1)


def one_line(match: str, path) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        TextEncoder.from_pretrained(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_incomplete_weights_are_one_clear_error(tmp_path):
    """transformers would fill in random numbers."""
    file = write_text_encoder(tmp_path) / "model.safetensors"
    state = load_file(file)
    state.pop("model.layers.1.mlp.up_proj.weight")
    save_file(state, file, {"format": "pt"})
    one_line("lacks 1 weights, .*layers.1.mlp.up_proj.weight among them", tmp_path)
    file.write_bytes(file.read_bytes()[:5000])
    one_line("cannot load a text encoder from", tmp_path)
    file.unlink()
    one_line("cannot load a text encoder from", tmp_path)
    write_text_encoder(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    one_line("cannot load a text encoder from", tmp_path)


@pytest.mark.parametrize("name", T5_NAMES)
def test_t5_is_one_clear_error(name):
    one_line("T5 is not supported; the published weights need gemma-2-2b-it", name)


def test_encoder_decoders_are_refused(tmp_path):
    config = T5Config(vocab_size=400, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    T5Model(config).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    one_line("is a t5 encoder-decoder: Sana needs a decoder-only model", tmp_path)


def test_unknown_and_gated_names_are_one_clear_error(monkeypatch):
    one_line("'gemma-2-2b-tt': no such file.*did you mean 'gemma-2-2b-it'", "gemma-2-2b-tt")
    one_line("no such file or folder", "no/such/folder")

    def refuse(name):
        raise ValueError(f"could not fetch hf://{name}: {name} is gated: accept its terms")

    monkeypatch.setattr(hub, "resolve_model", refuse)
    one_line("'gemma-2-9b-it': could not fetch hf://google/gemma-2-9b-it: .* is gated", "gemma-2-9b-it")
