"""CLIP score against a computation with transformers and Pillow alone."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPModel

from sana.metrics.clip_score import ClipScore
from sana.utils.hub import ROOT
from tests.labellers import CONTEXT, SIDE, write_clip

EXAMPLE = ROOT / "asset/example_data"
TEXTS = ["a red dot", "a pagoda by a lake", "", "rock", "a cat that looks at you", "ünïcode"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def clip(folder):
    return ClipScore.from_pretrained(folder)


@pytest.fixture(scope="module")
def pictures():
    paths = sorted(path for path in EXAMPLE.iterdir() if path.suffix in (".jpg", ".png"))[: len(TEXTS)]
    return [Image.open(path) for path in paths]  # of other shapes than a square, one of them gray


def expected(folder, picture, text):
    """100 * cosine as the reference has it, one pair at a time, without padding."""
    model = CLIPModel.from_pretrained(folder).eval()
    rgb = picture.convert("RGB")
    scale = SIDE / min(rgb.size)
    rgb = rgb.resize(
        [SIDE if side == min(rgb.size) else int(side * scale) for side in rgb.size], Image.BICUBIC
    )
    left, top = (round((side - SIDE) / 2) for side in rgb.size)
    pixels = np.asarray(rgb.crop((left, top, left + SIDE, top + SIDE)), dtype=np.float32) / 255
    pixels = (pixels - [0.48145466, 0.4578275, 0.40821073]) / [0.26862954, 0.26130258, 0.27577711]
    ids = AutoTokenizer.from_pretrained(folder)(text).input_ids
    if len(ids) > CONTEXT:
        ids = ids[: CONTEXT - 1] + ids[-1:]  # the end token stays
    with torch.no_grad():
        output = model(
            input_ids=torch.tensor([ids]),
            pixel_values=torch.from_numpy(pixels).permute(2, 0, 1)[None].float(),
        )
    return float(output.logits_per_image) / float(model.logit_scale.detach().exp()) * 100


def test_equals_transformers_alone(folder, clip, pictures):
    found = clip.score(pictures, TEXTS)
    wanted = [expected(folder, *pair) for pair in zip(pictures, TEXTS, strict=True)]
    assert found.tolist() == pytest.approx(wanted, abs=2e-4)  # measured: 6e-5
    assert found.std() > 10 and found.min() < 0, "scores of 0 and below are not clamped"
    assert found.dtype == torch.float32


def test_batches_do_not_matter(clip, pictures):
    together = clip.score(pictures, TEXTS)
    alone = torch.cat([clip.score([picture], [text]) for picture, text in zip(pictures, TEXTS, strict=True)])
    assert together.tolist() == pytest.approx(alone.tolist(), abs=2e-4)
    assert clip.images(pictures).norm(dim=1).tolist() == pytest.approx([1] * len(pictures))


def test_long_texts_keep_their_end_token(folder, clip, pictures):
    """Cut without it, all long texts have one embedding: that of another token."""
    long = [word * 40 for word in ("ab", "xy")]
    first, second = clip.score(pictures[:1] * 2, long).tolist()
    assert abs(first - second) > 1
    assert first == pytest.approx(expected(folder, pictures[0], long[0]), abs=2e-4)
    fits = "x" * (CONTEXT - 2)
    assert [clip.is_cut(text) for text in (*long, fits, fits + "x")] == [True, True, False, True]
    same = clip.score(pictures[:1] * 2, [fits + "a", fits + "b"])
    assert same[0] == same[1], "what is cut off does not count"


def test_half_precision_is_near(folder, clip, pictures):
    half = ClipScore.from_pretrained(folder, dtype=torch.bfloat16).score(pictures, TEXTS)
    assert half.tolist() == pytest.approx(clip.score(pictures, TEXTS).tolist(), abs=6)  # measured: 2.8


def test_wrong_input(folder, clip, pictures, tmp_path):
    with pytest.raises(ValueError, match="got 1 for 2"):
        clip.score(pictures[:2], ["one"])
    with pytest.raises(ValueError, match="no such file or folder"):
        ClipScore.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="it is a gemma2, not a clip"):
        ClipScore.from_pretrained(ROOT / "asset/sana_tiny/text_encoder")
    shutil.copytree(folder, tmp_path / "clip")
    from safetensors.torch import load_file, save_file

    state = load_file(tmp_path / "clip/model.safetensors")
    del state["visual_projection.weight"]
    save_file(state, tmp_path / "clip/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 weights, visual_projection.weight"):
        ClipScore.from_pretrained(tmp_path / "clip")
