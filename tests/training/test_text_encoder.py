"""Training of the text encoder: its texts and questions, its tokenizer, and that it learns them."""

import re

import pytest
import torch

from sana.models.text_encoder import TextEncoder
from sana.shapes.palette import COLOURS
from sana.shapes.scene import SHAPES
from sana.training import text_encoder
from sana.training.questions import NOTHING_ASKED
from sana.training.text_encoder import Text

RELATED = r"({0}) (left|right) of an? (?:\w+ )*?({0})".format("|".join(SHAPES))
CHI = "Describe the scene. Prompt: "
TEXTS = [text_encoder.training_text(i, CHI) for i in range(500)]


@pytest.fixture(scope="module")
def tokenizer():
    return text_encoder.train_tokenizer([text.given + text.follows for text in TEXTS], vocabulary=640)


def test_tokenizer_treats_spaces_as_gemma_does(tokenizer):
    def tokens(text):
        return tokenizer.convert_ids_to_tokens(tokenizer.encode(text))

    assert tokens(" red circle") == ["<bos>", "▁red", "▁circle"]
    assert tokens(CHI)[-1] == "▁" and tokens(CHI + "red")[-1] == "▁red"  # what the window's "- 2" rests on
    assert len(tokens(CHI + "red")) == len(tokens(CHI))
    assert tokens("A Red CIRCLE") == tokens("a red circle")


@pytest.mark.parametrize("text", ["a red circle, 3 stars.", "été 😀 漢字", "<0x41> <eos>x", "", "\n\t "])
def test_every_string_has_tokens_and_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids[0] == tokenizer.bos_token_id and tokenizer.unk_token_id not in ids
    if "<" not in text:
        assert tokenizer.decode(ids[1:], clean_up_tokenization_spaces=False) == text.lower()


def test_words_of_the_language_are_single_tokens(tokenizer):
    for word in ("red", "circle", "stars", "background", "left"):
        assert len(tokenizer.encode(" " + word)) == 2, word


def test_language_model_learns_and_loads_as_a_text_encoder(tokenizer, tmp_path):
    torch.manual_seed(0)
    model = text_encoder.build_language_model(tokenizer, hidden_size=32, layers=1, heads=2)
    losses = text_encoder.train_language_model(model, tokenizer, CHI, steps=40, batch_size=8, lr=1e-2)
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    text_encoder.save(model, tokenizer, tmp_path, torch.float16)
    encoder = TextEncoder.from_pretrained(tmp_path, max_length=16, chi_prompt=[CHI], dtype=torch.float32)
    features = encoder.encode(["a red circle", "two stars"])
    assert features.embeds.shape == (2, 16, 32)
    assert features.mask.sum(dim=1).tolist() == [4, 3]  # BOS and the words


def test_what_is_given_is_not_learnt(tokenizer):
    rows = [
        text_encoder.row_of(tokenizer, Text(CHI + "red star", "\nred", NOTHING_ASKED)),
        text_encoder.row_of(tokenizer, Text("", " red", NOTHING_ASKED)),
    ]
    given = len(tokenizer.encode(CHI + "red star"))
    assert [row.given for row in rows] == [given, 0]
    assert tokenizer.decode(rows[0].tokens[given:]) == "\nred<eos>"
    batch = text_encoder._batch(tokenizer, rows, CHI)
    ids, labels = batch.ids, batch.labels
    assert (labels[0, :given] == -100).all() and torch.equal(labels[0, given:], ids[0, given:])
    assert ids[1, 0] == tokenizer.bos_token_id and labels[1, :3].tolist() == ids[1, :3].tolist()
    assert (labels[1, 3:] == -100).all() and batch.valid.sum(1).tolist() == [len(row.tokens) for row in rows]


def test_questions_see_the_tokens_that_the_transformer_sees(tokenizer, tmp_path):
    model = text_encoder.build_language_model(tokenizer, hidden_size=32, layers=1, heads=2).eval()
    text_encoder.save(model, tokenizer, tmp_path, torch.float32)
    encoder = TextEncoder.from_pretrained(tmp_path, max_length=16, chi_prompt=[CHI], dtype=torch.float32)
    prompts = ["a red circle left of a star", "two stars"]
    rows = [text_encoder.row_of(tokenizer, Text(CHI + text, "\nred", NOTHING_ASKED)) for text in prompts]
    batch, features = text_encoder._batch(tokenizer, rows, CHI), encoder.encode(prompts)
    with torch.no_grad():
        hidden = model.model(input_ids=batch.ids, attention_mask=batch.valid).last_hidden_state
    torch.testing.assert_close(hidden[batch.caption], features.embeds[features.mask.bool()])


def test_retellings_say_what_the_caption_says_in_either_order():
    relations, pairs, colours = set(), 0, set(COLOURS)
    for i in range(200):
        given, follows, _ = text_encoder.training_text(i, CHI)
        if not given:
            continue
        assert given.startswith(CHI)
        retellings = follows.removeprefix("\n").split("\n")
        assert len(retellings) == 3
        for retold in retellings:
            assert colours & set(retold.split()) <= colours & set(re.split(r"[ ,.]", given))
            said, plain = (re.search(RELATED, text) for text in (retold, given))
            pairs += bool(said)
            if plain:
                same = said[2] == plain[2]
                assert (said[1], said[3]) == ((plain[1], plain[3]) if same else (plain[3], plain[1]))
                relations.add(same)
    assert relations == {True, False} and pairs > 150


def test_batches_hold_each_text_once_and_little_padding(tokenizer):
    batches = list(text_encoder._similar_batches(tokenizer, CHI, seed=3, steps=20, batch_size=8))
    assert [len(rows) for rows in batches] == [8] * 20
    texts = [text_encoder.training_text(3 * 20 * 8 + i, CHI) for i in range(160)]
    expected = sorted(text_encoder.row_of(tokenizer, text) for text in texts)
    assert sorted(row for rows in batches for row in rows) == expected
    length, longest = (sum(of(len(row.tokens) for row in rows) for rows in batches) for of in (sum, max))
    assert length > 0.8 * 8 * longest


def test_the_log_says_what_share_is_answered(tokenizer, caplog):
    model = text_encoder.build_language_model(tokenizer, hidden_size=32, layers=1, heads=2)
    with caplog.at_level("INFO"):
        text_encoder.train_language_model(model, tokenizer, CHI, steps=20, batch_size=8, log_every=1)
    shares = [
        tuple(map(float, re.findall(r"\d\.\d\d", text))) for text in caplog.messages if "answered" in text
    ]
    assert len(shares) == 2 and all(len(found) == 3 and max(found) <= 1 for found in shares)


def test_a_folder_without_a_text_encoder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no text encoder in"):
        text_encoder.load(tmp_path)
