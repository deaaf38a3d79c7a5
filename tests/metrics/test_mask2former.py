"""GenEval's eyes: Mask2Former's pre- and post-processing against the published steps, and colours by CLIP."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import CLIPModel

from sana.metrics.clip_score import ClipScore
from sana.metrics.geneval import COLOURS, load_prompts
from sana.metrics.mask2former import (
    CLASS_NAMES,
    ClipColours,
    FoundObject,
    Mask2FormerDetector,
    detections,
    prepare,
)
from tests.labellers import SIDE, write_clip
from tests.metrics.detectors import write_mask2former
from tests.metrics.test_geneval import PUBLISHED


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    return Mask2FormerDetector.from_pretrained(write_mask2former(tmp_path_factory.mktemp("detector")))


def picture(height, width, seed=0):
    small = np.random.default_rng(seed).integers(0, 255, (6, 9, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.BICUBIC))


# Classes


def test_names_are_cocos_with_three_of_genevals():
    assert len(CLASS_NAMES) == len(set(CLASS_NAMES)) == 80
    places = {
        0: "person",
        9: "traffic light",
        39: "bottle",
        57: "couch",
        58: "potted plant",
        60: "dining table",
    }
    places |= {62: "tv", 64: "computer mouse", 65: "tv remote", 66: "computer keyboard", 79: "toothbrush"}
    assert {index: CLASS_NAMES[index] for index in places} == places


def test_published_prompts_name_only_these():
    if not PUBLISHED.is_file():
        pytest.skip("the published prompt file is not here (github.com/djghosh13/geneval, prompts/)")
    clauses = [clause for prompt in load_prompts(PUBLISHED) for clause in (*prompt.include, *prompt.exclude)]
    assert {clause.class_name for clause in clauses} == set(CLASS_NAMES)
    assert {clause.colour for clause in clauses} - {None} == set(COLOURS)


def test_a_model_of_other_classes_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has 3 classes, GenEval needs COCO's 80"):
        Mask2FormerDetector.from_pretrained(write_mask2former(tmp_path, labels=3))
    with pytest.raises(ValueError, match="it is a clip, not a mask2former"):
        Mask2FormerDetector.from_pretrained(write_clip(tmp_path / "clip"))


# Pixels


@pytest.mark.parametrize(
    ("size", "inner"),
    [
        ((512, 512), (800, 800)),
        ((1024, 1024), (800, 800)),
        ((300, 200), (1200, 800)),
        ((200, 500), (533, 1333)),  # the long side decides
        ((1000, 1001), (800, 801)),  # 800.8 is rounded
    ],
)
def test_size_fits_800_and_1333(size, inner):
    pixels, found = prepare(np.zeros((*size, 3), np.uint8))
    assert found == inner
    assert pixels.shape == (3, *(-(-side // 32) * 32 for side in inner))


def test_padding_is_gray_before_normalisation():
    pixels, inner = prepare(np.zeros((200, 500, 3), np.uint8))
    mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
    assert torch.allclose(pixels[:, -1, -1], (128 - mean) / std)
    assert torch.allclose(pixels[:, inner[0] - 1, inner[1] - 1], -mean / std)


def test_resize_does_not_average():
    """OpenCV's bilinear reads four pixels, however much smaller the result is; and gives whole levels."""
    image = np.zeros((1600, 1600, 3), np.uint8)
    image[::4] = 200  # rows 0, 4, 8, ...: a result row is the mean of rows 2k and 2k + 1
    pixels, _ = prepare(image)
    levels = (pixels[0] * 58.395 + 123.675)[:, 5]
    assert torch.allclose(levels[:4], torch.tensor([100.0, 0.0, 100.0, 0.0]), atol=1e-3)
    odd, _ = prepare(picture(300, 400))
    levels = odd[1, :800, :1067] * 57.12 + 116.28
    assert torch.allclose(levels, levels.round(), atol=1e-3) and levels.std() > 10


# Detections


def test_score_is_probability_times_certainty_and_box_is_tight():
    """One query, written out: a mask of two rows, half of it padding."""
    class_logits = torch.full((2, 81), -20.0)
    class_logits[0, 3], class_logits[0, 5], class_logits[1, 80] = 2.0, 1.0, 5.0
    masks = torch.full((2, 8, 8), -3.0)
    masks[0, 2:4, 1:6] = 1.5
    found = detections(class_logits, masks, padded=(8, 8), inner=(8, 4), size=(8, 4))
    label, best = found[0]
    probability = float(np.exp(2) / (np.exp(2) + np.exp(1)))
    assert (label, best.box) == (3, (1.0, 2.0, 4.0, 4.0)), (
        "right and bottom are exclusive, padding is cut off"
    )
    assert best.score == pytest.approx(probability / (1 + np.exp(-1.5)), rel=1e-4)
    assert best.mask.sum() == 6 and best.mask.shape == (8, 4) and best.mask.dtype == bool
    second_label, second = found[1]
    assert second_label == 5 and second.mask is best.mask, "a query counts once for each class"
    assert second.score == pytest.approx(best.score * np.exp(-1.0), rel=1e-3)
    assert all(label != 80 for label, _ in found), "no object is no class"
    assert len(found) <= 100 and [thing.score for _, thing in found[:2]] == sorted(
        (thing.score for _, thing in found[:2]), reverse=True
    )


def test_an_empty_mask_is_no_object():
    class_logits, masks = torch.zeros(1, 81), torch.full((1, 4, 4), -0.1)
    assert detections(class_logits, masks, padded=(4, 4), inner=(4, 4), size=(4, 4)) == []


def test_at_most_a_hundred_pairs():
    class_logits, masks = torch.randn(3, 81, generator=torch.Generator().manual_seed(0)), torch.ones(3, 4, 4)
    found = detections(class_logits, masks, padded=(4, 4), inner=(4, 4), size=(4, 4))
    probabilities = class_logits.softmax(-1)[:, :80].flatten()
    wanted = probabilities.topk(100).values / (1 + np.exp(-1.0))
    assert [thing.score for _, thing in found] == pytest.approx(wanted.tolist(), rel=1e-5)


def test_the_network_runs_as_published(detector):
    """Every step of the published post-processing, all queries at once, on the random network."""
    image = picture(96, 150)
    found = detector(image)
    assert list(found) == list(CLASS_NAMES)

    scaled = F.interpolate(
        torch.tensor(image).permute(2, 0, 1)[None].float(), size=(800, 1250), mode="bilinear"
    )
    pixels = F.pad(scaled.round(), (0, 1280 - 1250), value=128.0)
    mean, std = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
    pixels = (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    with torch.no_grad():
        output = detector.model(pixel_values=pixels)
    probabilities = output.class_queries_logits[0].softmax(-1)[:, :80].flatten()
    order = probabilities.topk(100)
    masks = F.interpolate(output.masks_queries_logits, size=(800, 1280), mode="bilinear")[..., :1250]
    masks = F.interpolate(masks, size=(96, 150), mode="bilinear")[0][order.indices // 80]
    inside = (masks > 0).float()
    scores = order.values * (masks.sigmoid() * inside).sum((1, 2)) / (inside.sum((1, 2)) + 1e-6)
    wanted = {}
    for label, score, mask in zip((order.indices % 80).tolist(), scores.tolist(), inside, strict=True):
        if mask.any():
            ys, xs = mask.nonzero(as_tuple=True)
            box = (xs.min().item(), ys.min().item(), xs.max().item() + 1, ys.max().item() + 1)
            wanted.setdefault(CLASS_NAMES[label], []).append((score, box, mask))
    found = {name: things for name, things in found.items() if things}
    assert found.keys() == wanted.keys()
    for name, things in found.items():
        for thing, (score, box, mask) in zip(things, wanted[name], strict=True):
            assert thing.score == pytest.approx(score, rel=1e-3)
            assert thing.box == box
            assert (thing.mask != mask.numpy().astype(bool)).mean() < 1e-3
    kept = [thing for things in found.values() for thing in things]
    assert len(kept) > 20 and max(thing.score for thing in kept) > 0.3
    areas = {thing.mask.mean().round(3) for thing in kept}
    assert len(areas) > 5 and min(areas) > 0.05 and max(areas) < 0.95, areas


# Colours


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip"))


def test_colours_are_nearest_sentences(clip_folder):
    image, mask = picture(40, 60), np.zeros((40, 60), bool)
    mask[5:25, 10:30] = True
    mask[5:15, 10:20] = False
    thing = FoundObject((10.0, 5.0, 30.0, 25.0), 0.9, mask)
    clip = ClipScore.from_pretrained(clip_folder)
    whole = FoundObject((0.0, 0.0, 60.0, 40.0), 0.9, np.ones((40, 60), bool))
    answers = ClipColours(clip)(image, [thing, whole], "dog")

    model = CLIPModel.from_pretrained(clip_folder).eval()
    shown = np.where(mask[..., None], image, 153).astype(np.uint8)[5:25, 10:30]
    wanted = []
    for pixels in (shown, image):
        vector = clip.images([Image.fromarray(pixels)])[0]
        scores = []
        for colour in COLOURS:
            texts = [
                f"a photo of a {colour} dog",
                f"a photo of a {colour}-colored dog",
                f"a photo of a {colour} object",
            ]
            sentences = []
            for text in texts:
                ids = clip.tokenizer(text, truncation=True, max_length=clip.context, return_tensors="pt")
                with torch.no_grad():
                    sentences.append(model.get_text_features(**ids).pooler_output[0])
            mean = sum(sentence / sentence.norm() for sentence in sentences)
            scores.append(float(vector @ mean / mean.norm()))
        wanted.append(COLOURS[int(np.argmax(scores))])
    assert answers == wanted
    assert ClipColours(clip)(image, [], "dog") == []


def test_what_is_shown(clip_folder):
    image = picture(SIDE, SIDE)
    mask = np.zeros((SIDE, SIDE), bool)
    mask[4:8, 2:12] = True
    mask[4, 2] = False
    thing = FoundObject((2.0, 4.0, 12.0, 8.0), 0.9, mask)
    clip = ClipScore.from_pretrained(clip_folder)
    cut = np.asarray(ClipColours(clip).cut_out(image, thing))
    assert cut.shape == (4, 10, 3) and cut[0, 0].tolist() == [153] * 3
    assert (cut[1:] == image[5:8, 2:12]).all()
    whole = np.asarray(ClipColours(clip, background="original", crop=False).cut_out(image, thing))
    assert (whole == image).all()
    with pytest.raises(ValueError, match="nonsense"):
        ClipColours(clip, background="nonsense")


def test_the_record_of_a_real_detector_is_json(detector, clip_folder, tmp_path):
    from sana.metrics.geneval import GenEvalOptions, GenEvalPrompt, score_image

    image = picture(64, 64)
    name = max(detector(image).items(), key=lambda pair: max((t.score for t in pair[1]), default=0))[0]
    record = score_image(
        GenEvalPrompt.from_record(
            {"tag": "colors", "include": [{"class": name, "count": 1, "color": "red"}], "prompt": name}
        ),
        image,
        filename="x.png",
        detector=detector,
        classify_colours=ClipColours.from_pretrained(clip_folder),
        options=GenEvalOptions(threshold=0.01),
    )
    boxes = json.loads(json.loads(json.dumps(record))["details"])
    assert name in boxes and all(len(box) == 5 and box[4] > 0.01 for found in boxes.values() for box in found)
    assert record["correct"] == (record["reason"] == ""), record
