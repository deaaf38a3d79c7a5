"""The captioner against transformers used by hand."""

import logging

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from sana.models.captioner import Captioner
from sana.utils.hub import ROOT
from tests.labellers import write_captioner, write_qwen

PROMPT = "What is this?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_captioner(tmp_path_factory.mktemp("vlm"))


@pytest.fixture(scope="module")
def pictures():
    return [Image.open(ROOT / f"asset/example_data/0000000{name}") for name in ("0.jpg", "2.png", "3.jpg")]


def load(folder, **settings):
    return Captioner.from_pretrained(folder, prompt=PROMPT, dtype=torch.float32, **settings)


def by_hand(folder, picture, length):
    """Greedy decoding token by token, without a cache, a batch or generate()."""
    processor = AutoProcessor.from_pretrained(folder)
    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    text = f"<bos>user: <image>{PROMPT} assistant:"
    inputs = processor(images=picture, text=text, return_tensors="pt", add_special_tokens=False)
    ids, found = inputs["input_ids"], []
    for _ in range(length):
        with torch.no_grad():
            logits = model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits
        found.append(int(logits[0, -1].argmax()))
        if found[-1] == processor.tokenizer.eos_token_id:
            break
        ids = torch.cat([ids, torch.tensor([found[-1:]])], dim=1)
    return " ".join(processor.tokenizer.decode(found, skip_special_tokens=True).split())


def test_equals_greedy_decoding_by_hand(folder, pictures):
    found = load(folder, max_new_tokens=9).describe(pictures)
    assert found == [by_hand(folder, picture, 9) for picture in pictures]
    assert len(set(found)) == len(pictures), "the answers depend on the pictures"
    assert all(found)


def test_a_padded_batch_answers_as_one_by_one(tmp_path):
    captioner = load(write_qwen(tmp_path), max_new_tokens=6)
    pictures = [Image.effect_noise(size, 80).convert("RGB") for size in ((16, 16), (40, 24), (48, 48))]
    found = captioner.describe(pictures)
    assert found == [captioner.describe([picture])[0] for picture in pictures]
    assert len(set(found)) == 3


def test_a_refusal_is_a_value_error(tmp_path):
    with pytest.raises(ValueError, match="aspect ratio"):
        load(write_qwen(tmp_path)).describe([Image.new("RGB", (1000, 4))])


def test_a_cut_answer_is_said_once(folder, pictures, caplog):
    captioner = load(folder, max_new_tokens=2)
    with caplog.at_level(logging.WARNING, logger="sana"):
        captioner.describe(pictures)
        captioner.describe(pictures)
    assert caplog.text.count("an answer was cut at 2 tokens") == 1


def test_what_is_no_vision_language_model(folder, tmp_path):
    with pytest.raises(ValueError, match="cannot load a vision-language model from .*text_encoder"):
        load(ROOT / "asset/sana_tiny/text_encoder")
    with pytest.raises(ValueError, match="no such file or folder"):
        load(tmp_path / "nowhere")
    captioner = load(folder)
    captioner.processor.chat_template = None
    with pytest.raises(ValueError, match="has no chat template"):
        Captioner(captioner.model, captioner.processor, prompt=PROMPT)
    with pytest.raises(ValueError, match="takes no pictures"):
        Captioner(captioner.model, captioner.processor.tokenizer, prompt=PROMPT)
