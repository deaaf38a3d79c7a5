"""Training of the autoencoder and of the text encoder: each learns, stops and goes on, and leaves what can be loaded."""

import re
from types import SimpleNamespace

import pytest
import torch

from sana.data.shapes import ShapesDataset
from sana.models.autoencoder import Autoencoder
from sana.models.text_encoder import TextEncoder
from sana.shapes.captions import noun_phrase
from sana.shapes.palette import COLOURS
from sana.shapes.scene import OPPOSITE, SHAPES
from sana.shapes.splits import training_scene
from sana.training import text_encoder
from sana.training.autoencoder import AutoencoderTrainer, AutoencoderTraining
from tests.factories import make_autoencoder

RELATED = r"({0}) (left|right) of an? (?:\w+ )*?({0})".format("|".join(SHAPES))
CHI = "Describe the scene. Prompt: "
PICTURES = torch.stack([ShapesDataset(64, 8).image(i) for i in range(8)])


def autoencoder_trainer(work_dir, steps, **more):
    torch.manual_seed(0)
    settings = AutoencoderTraining(steps=steps, lr=3e-3, warmup=2, ema_rate=0.9, save_every=10, **more)
    return AutoencoderTrainer(Autoencoder(make_autoencoder()), settings, lambda step: PICTURES, work_dir)


def test_autoencoder_learns_and_leaves_unit_latents(tmp_path):
    trainer = autoencoder_trainer(tmp_path, steps=30)
    before = trainer.reconstruction_psnr(PICTURES)
    after = trainer.train(PICTURES)
    assert after > before + 4, (before, after)
    loaded = Autoencoder.from_pretrained(tmp_path / "autoencoder")
    with torch.no_grad():
        latents = loaded.encode(PICTURES)
    assert latents.std().item() == pytest.approx(1, abs=0.02)
    assert loaded.scaling_factor != 0.5  # the random one's
    assert next(iter(loaded.parameters())).dtype == torch.float32


def test_the_spread_term_gives_every_channel_mean_0_and_variance_1(tmp_path):
    def distance(weight):
        trainer = autoencoder_trainer(tmp_path / str(weight), steps=60, latent_spread=weight)
        for _ in range(60):
            trainer.train_step(PICTURES)
        with torch.no_grad():
            variance, mean = torch.var_mean(trainer.autoencoder.model.encode(PICTURES).latent, dim=(0, 2, 3))
        return max(mean.abs().max(), (variance - 1).abs().max())

    assert distance(1.0) < 0.2 < 0.5 < distance(0.0)


def test_a_frozen_encoder_keeps_its_latents_while_the_decoder_learns(tmp_path):
    trainer = autoencoder_trainer(tmp_path, steps=10, freeze_encoder=True)
    with torch.no_grad():
        before = trainer.ema.model.encode(PICTURES)
    first = trainer.reconstruction_psnr(PICTURES)
    assert trainer.train(PICTURES) > first + 1
    with torch.no_grad():
        after = trainer.ema.model.encode(PICTURES)
    assert torch.equal(before, after) and trainer.ema.model.scaling_factor == 0.5


def test_psnr_is_that_of_its_definition(tmp_path):
    trainer = autoencoder_trainer(tmp_path, steps=1)
    trainer.ema.model.encode, trainer.ema.model.decode = (lambda x: x), (lambda x: x + 0.02)
    images = torch.zeros(3, 3, 32, 32)
    assert trainer.reconstruction_psnr(images) == pytest.approx(40.0)  # 20 log10(2 / 0.02)


def test_autoencoder_goes_on_bit_for_bit(tmp_path):
    autoencoder_trainer(tmp_path / "whole", steps=6).train(PICTURES)
    stopped = autoencoder_trainer(tmp_path / "parts", steps=6)
    for step in range(3):
        stopped.train_step(PICTURES)
        assert stopped.step == step + 1
    stopped.save()
    resumed = autoencoder_trainer(tmp_path / "parts", steps=6)
    assert resumed.resume() and resumed.step == 3
    resumed.train(PICTURES)
    whole, parts = (
        Autoencoder.from_pretrained(tmp_path / name / "autoencoder") for name in ("whole", "parts")
    )
    for (name, a), b in zip(whole.state_dict().items(), parts.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert whole.scaling_factor == parts.scaling_factor


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(tmp_path):
    trainer = autoencoder_trainer(tmp_path, steps=2)
    before = {name: value.clone() for name, value in trainer.autoencoder.state_dict().items()}
    with pytest.raises(FloatingPointError, match="gradient norm nan at step 0"):
        trainer.train_step(PICTURES * float("nan"))
    assert all(torch.equal(value, before[name]) for name, value in trainer.autoencoder.state_dict().items())


@pytest.fixture(scope="module")
def tokenizer():
    return text_encoder.train_tokenizer(
        ["".join(text_encoder.training_text(i, CHI)) for i in range(500)], vocabulary=640
    )


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
        text_encoder.row_of(tokenizer, CHI + "red star", "\nred"),
        text_encoder.row_of(tokenizer, "", " red"),
    ]
    given = len(tokenizer.encode(CHI + "red star"))
    assert rows[0][1] == given and tokenizer.decode(rows[0][0][given:]) == "\nred" and rows[1][1] == 0
    ids, labels = text_encoder._batch(tokenizer, rows)
    assert (labels[0, :given] == -100).all() and torch.equal(labels[0, given:], ids[0, given:])
    assert ids[1, 0] == tokenizer.bos_token_id and labels[1, :2].tolist() == ids[1, :2].tolist()
    assert (labels[1, 2:] == -100).all()


def test_retellings_say_what_the_caption_says_in_either_order():
    relations, pairs, colours = set(), 0, set(COLOURS)
    for i in range(200):
        given, follows = text_encoder.training_text(i, CHI)
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
    expected = sorted(text_encoder.row_of(tokenizer, *text)[0] + [tokenizer.eos_token_id] for text in texts)
    assert sorted(row for rows in batches for row, _ in rows) == expected
    length, longest = (sum(of(len(row) for row, _ in rows) for rows in batches) for of in (sum, max))
    assert length > 0.8 * 8 * longest


class Memory(torch.nn.Module):
    """A language model that expects each of its texts, `weight` strong, and nothing else."""

    device = torch.device("cpu")

    def __init__(self, texts, weight, vocabulary):
        super().__init__()
        self.texts, self.weight, self.vocabulary = texts, weight, vocabulary

    def forward(self, input_ids, attention_mask):
        logits = torch.zeros(*input_ids.shape, self.vocabulary)
        for row, ids in zip(logits, input_ids.tolist(), strict=True):
            for text in self.texts:
                for i in range(len(text) - 1):
                    if ids[: i + 1] == text[: i + 1]:
                        row[i, text[i + 1]] = self.weight
        return SimpleNamespace(logits=logits)


@pytest.mark.parametrize(("weight", "share"), [(5.0, 1.0), (-5.0, 0.0)])
def test_binding_is_the_share_of_true_retellings(tokenizer, weight, share):
    told = []
    for i in range(100):
        scene = training_scene(text_encoder._SCENES + i)
        if scene.relation:
            one, other = (noun_phrase(group) for group in scene.groups)
            given = f"{CHI}{one} {scene.relation} {other}"
            retold = f"\n{other} {OPPOSITE[scene.relation]} {one}"
            told.append(text_encoder.row_of(tokenizer, given, retold)[0])
    found = text_encoder.binding(Memory(told, weight, len(tokenizer)), tokenizer, CHI, pairs=12)
    assert found == {"colours": share, "places": share}


def test_a_folder_without_a_text_encoder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no text encoder in"):
        text_encoder.load(tmp_path)
