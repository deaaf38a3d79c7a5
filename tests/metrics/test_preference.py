"""ImageReward, PickScore and HPSv2.1 on random weights under the published names, each against a computation of its own."""

import dataclasses
import json
import math

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoTokenizer, CLIPModel

from sana.metrics import alignment, preference
from sana.metrics.clip_score import ClipScore, ClipScorer
from sana.metrics.image_reward import ImageReward, RewardConfig, RewardNetwork
from sana.metrics.image_set import open_image, read_image_set
from sana.metrics.preference import HPSv2, load_scorer
from tests.labellers import write_clip
from tests.scorers import TINY_REWARD, prompts_path, published_reward_state, write_pictures

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
PROMPTS = ["a red dot", "", "a text of more than the thirty-five tokens that count, one for each letter"]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def set_folder(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures") / "set", 3)


@pytest.fixture(scope="module")
def images(set_folder):
    return [open_image(item.path) for item in read_image_set(set_folder)]


@pytest.fixture(scope="module")
def reward_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("reward") / "ImageReward.pt"
    torch.save(published_reward_state(), path)
    return path


def attend(query, key, value, heads, mask=None):
    """(L, C), (M, C), (M, C) -> (L, C); mask (M,) bool."""
    split = (part.unflatten(-1, (heads, -1)).transpose(0, 1) for part in (query, key, value))
    query, key, value = split
    logits = query @ key.transpose(1, 2) / query.shape[-1] ** 0.5
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    return (logits.softmax(-1) @ value).transpose(0, 1).flatten(1)


def blip_reward(state, pixels, tokens):
    """The reward of one picture (3, H, W) and the tokens of its text (without padding), from the published tensors alone."""

    def linear(name, x):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(name, x, eps):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    vit = "blip.visual_encoder"
    x = F.conv2d(
        pixels[None], *(state[f"{vit}.patch_embed.proj.{end}"] for end in ("weight", "bias")), stride=16
    )
    x = torch.cat([state[f"{vit}.cls_token"][0], x[0].flatten(1).T]) + state[f"{vit}.pos_embed"][0]
    for layer in range(2):
        block = f"{vit}.blocks.{layer}"
        qkv = linear(f"{block}.attn.qkv", norm(f"{block}.norm1", x, 1e-6)).chunk(3, dim=-1)
        x = x + linear(f"{block}.attn.proj", attend(*qkv, 2))
        x = x + linear(
            f"{block}.mlp.fc2", F.gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", x, 1e-6)))
        )
    seen = norm(f"{vit}.norm", x, 1e-6)
    bert = "blip.text_encoder"
    y = state[f"{bert}.embeddings.word_embeddings.weight"][tokens]
    y = y + state[f"{bert}.embeddings.position_embeddings.weight"][: len(tokens)]
    y = norm(f"{bert}.embeddings.LayerNorm", y, 1e-12)
    for layer in range(2):
        for attention, source in (("attention", None), ("crossattention", seen)):
            name = f"{bert}.encoder.layer.{layer}.{attention}"
            other = y if source is None else source
            inner = attend(
                linear(f"{name}.self.query", y),
                *(linear(f"{name}.self.{part}", other) for part in ("key", "value")),
                2,
            )
            y = norm(f"{name}.output.LayerNorm", linear(f"{name}.output.dense", inner) + y, 1e-12)
        name = f"{bert}.encoder.layer.{layer}"
        inner = linear(f"{name}.output.dense", F.gelu(linear(f"{name}.intermediate.dense", y)))
        y = norm(f"{name}.output.LayerNorm", inner + y, 1e-12)
    reward = y[0]
    for place in (0, 2, 4, 6, 7):
        reward = linear(f"mlp.layers.{place}", reward)
    return (float(reward) - 0.16717362830052426) / 1.0333394966054072


def test_image_reward_equals_blip(reward_file, clip_folder, images):
    """The published names, 35 tokens with the end token kept, padding that does not count, mean and deviation."""
    scorer = ImageReward.from_file(reward_file, tokenizer=clip_folder, config=TINY_REWARD)
    found = scorer.score(images, PROMPTS)
    state, tokenizer = published_reward_state(), AutoTokenizer.from_pretrained(clip_folder)
    expected = []
    for image, prompt in zip(images, PROMPTS, strict=True):
        tokens = tokenizer(prompt).input_ids
        tokens = tokens if len(tokens) <= 35 else [*tokens[:34], tokens[-1]]
        expected.append(blip_reward(state, scorer.prepare(image), torch.tensor(tokens)))
    assert found == pytest.approx(expected, abs=1e-4)
    assert np.std(found) > 0.1, "scores that depend on nothing would agree too"
    assert scorer.score(images[:1], PROMPTS[:1])[0] == pytest.approx(found[0], abs=1e-5)
    assert [scorer.is_cut(prompt) for prompt in PROMPTS] == [False, False, True]


def test_image_reward_pixels(reward_file, clip_folder):
    """Shorter side by Pillow's bicubic filter, middle square, CLIP's constants."""
    scorer = ImageReward.from_file(reward_file, tokenizer=clip_folder, config=TINY_REWARD)
    picture = Image.effect_noise((64, 96), 90).convert("RGB")
    middle = np.asarray(picture.resize((32, 48), Image.Resampling.BICUBIC).crop((0, 8, 32, 40)))
    expected = torch.from_numpy((middle / 255 - MEAN) / STD).permute(2, 0, 1).float()
    torch.testing.assert_close(scorer.prepare(picture), expected, atol=1e-6, rtol=1e-6)


def test_published_shapes():
    """BLIP-large: the counts that the published configuration has."""
    with torch.device("meta"):
        network = RewardNetwork(RewardConfig())
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in network.named_children()}
    assert count["vision"] == 303_301_632
    assert network.text.encoder.layer[0].crossattention.self.key.weight.shape == (768, 1024)
    assert network.text.embeddings.word_embeddings.weight.shape == (30524, 768)
    assert count["mlp"] == 768 * 1024 + 1024 * 128 + 128 * 64 + 64 * 16 + 16 + 1024 + 128 + 64 + 16 + 1


def test_other_files_are_refused(clip_folder, tmp_path):
    state = published_reward_state()
    for change, message in (
        ({"mlp.layers.9.weight": torch.zeros(1)}, "has unknown 1 tensors, mlp.9.weight among them"),
        ({"mlp.layers.7.bias": torch.zeros(2)}, "size mismatch for mlp.7.bias"),
    ):
        torch.save(state | change, tmp_path / "other.pt")
        with pytest.raises(ValueError, match=f"other.pt is not ImageReward: .*{message}"):
            ImageReward.from_file(tmp_path / "other.pt", tokenizer=clip_folder, config=TINY_REWARD)
    (tmp_path / "text.pt").write_text("no weights")
    with pytest.raises(ValueError, match="text.pt: cannot be read as the weights of ImageReward"):
        ImageReward.from_file(tmp_path / "text.pt", tokenizer=clip_folder, config=TINY_REWARD)


def test_pick_score_and_clip_score(clip_folder, images):
    """The same cosine; PickScore times the network's own scale."""
    cosine = ClipScore.from_pretrained(clip_folder).score(images, PROMPTS) / 100
    scale = float(CLIPModel.from_pretrained(clip_folder).logit_scale.detach().exp())
    pick = load_scorer("PickScore", clip_folder, tokenizer=clip_folder)
    assert pick.score(images, PROMPTS) == pytest.approx((scale * cosine).tolist(), rel=1e-5)
    assert math.isclose(scale, math.exp(2.6592), rel_tol=1e-4), "not 100, so that the two differ"
    clip = load_scorer("CLIP score", clip_folder)
    assert clip.score(images, PROMPTS) == pytest.approx((100 * cosine).tolist(), rel=1e-5)
    with pytest.raises(ValueError, match="got 1 for 3"):
        clip.score(images, PROMPTS[:1])


@pytest.fixture(scope="module")
def hps(tmp_path_factory):
    """A small OpenCLIP, in a file like the published one."""
    folder = tmp_path_factory.mktemp("hps")
    config = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    }
    (folder / "tiny-hps.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = open_clip.create_model("tiny-hps").eval()
    torch.save({"epoch": 1, "state_dict": model.state_dict()}, folder / "HPS_v2.1_compressed.pt")
    return folder, model


def test_hps(hps, images):
    folder, model = hps
    scorer = HPSv2.from_file(folder, architecture="tiny-hps")
    found = scorer.score(images, PROMPTS)
    tokens = open_clip.get_tokenizer("tiny-hps")(PROMPTS)
    with torch.no_grad():
        pixels = torch.stack([scorer.prepare(image) for image in images])
        visual, text, _ = model(pixels, tokens)
    assert found == pytest.approx((100 * (visual * text).sum(1)).tolist(), abs=1e-4)
    assert np.std(found) > 0.1
    assert [scorer.is_cut(prompt) for prompt in (*PROMPTS, "word " * 76)] == [False, False, False, True]
    assert tokens[2][-1] == 0 and open_clip.get_tokenizer("tiny-hps")("word " * 90)[0, -1] == 49407, (
        "the end is kept"
    )
    with pytest.raises(ValueError, match="HPSv2.1 comes with its tokenizer"):
        load_scorer("HPSv2.1", folder, tokenizer=folder)


def test_hps_pixels(hps):
    """The longer side decides and black fills the rest, so that nothing is cut off."""
    scorer = HPSv2.from_file(hps[0], architecture="tiny-hps")
    picture = Image.effect_noise((96, 48), 90).convert("RGB")
    small = np.asarray(picture.resize((32, 16), Image.Resampling.BICUBIC))
    padded = np.pad(small, ((8, 8), (0, 0), (0, 0)))
    expected = torch.from_numpy((padded / 255 - MEAN) / STD).permute(2, 0, 1).float()
    torch.testing.assert_close(scorer.prepare(picture), expected, atol=1e-6, rtol=1e-6)
    square = Image.effect_noise((32, 32), 90).convert("RGB")
    assert scorer.prepare(square).shape == (3, 32, 32)


def test_missing_weights_say_how_to_get_them(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name, command in {
        "CLIP score": "hf download openai/clip-vit-large-patch14",
        "ImageReward": "hf download THUDM/ImageReward ImageReward.pt",
        "PickScore": "hf download yuvalkirstain/PickScore_v1",
        "HPSv2.1": "hf download xswu/HPSv2 HPS_v2.1_compressed.pt",
    }.items():
        with pytest.raises(ValueError, match=f"; to fetch it: {command}$") as error:
            load_scorer(name)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="unknown model 'HPSv3'; choose from CLIP score, ImageReward"):
        load_scorer("HPSv3")
    with pytest.raises(ValueError, match="to fetch it: hf download google-bert/bert-base-uncased --include"):
        preference.load_tokenizer("google-bert/bert-base-uncased")


def test_report(clip_folder, set_folder, tmp_path):
    items = read_image_set(set_folder, prompts_path(set_folder))
    scorer = ClipScorer.from_pretrained(clip_folder)
    report = alignment.measure(scorer, items, tmp_path / "work", batch_size=2, settings={"images": "set"})
    scores = scorer.score([open_image(item.path) for item in items], [item.prompt for item in items])
    assert report.values["CLIP score"] == pytest.approx(np.mean(scores), abs=1e-4)
    assert report.values["categories"] == pytest.approx({"a": np.mean(scores[::2]), "b": scores[1]}, abs=1e-4)
    assert report.settings["prompts"] == 3 and report.settings["images"] == "set"
    assert report.settings["formats"] == {"png": 3}
    assert report.weights["scorer"] == scorer.sha256 and report.n == 3
    assert (report.settings["scorer_dtype"], report.dtype) == ("float32", None), "nothing says who drew them"
    same = [dataclasses.replace(item, prompt="one text", prompt_index=0) for item in items]
    mean = np.mean(scorer.score([open_image(item.path) for item in items], ["one text"] * 3))
    report = alignment.measure(scorer, same, tmp_path / "same")
    assert report.values["CLIP score"] == pytest.approx(mean, abs=1e-4), "the mean is over pictures"
    with pytest.raises(ValueError, match="3 of 3 pictures have no prompt"):
        alignment.measure(scorer, read_image_set(set_folder), tmp_path / "other")
