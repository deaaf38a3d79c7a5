"""What GenEval (arXiv 2310.11513) sees with on photographs: objects by Mask2Former, their colours by CLIP.

The published evaluator runs Mask2Former (Swin-S, COCO instances) by mmdet 2. Here the same network runs by transformers; picture
in and detections out are computed as mmdet does, and not by transformers' own processor, which squashes pictures to 384 x 384,
binarises masks at that size and rounds scores. Facts of mmdet 2.28: its test pipeline and Mask2Former's instance
post-processing. Weights on the hub are Meta's own, of the same architecture and accuracy (mask AP 46.3 against 46.1): scores
near a threshold differ, most of all in the tag `counting`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import Mask2FormerForUniversalSegmentation

from sana.metrics.clip_score import CLIP_NAME, ClipScore
from sana.metrics.geneval import COLOURS, Box, Detection, GenEvalOptions
from sana.metrics.geneval_folder import Eyes
from sana.metrics.weights import fetched_by, folder_sha256, hub_command
from sana.utils.pretrained import load_pretrained

DETECTOR_NAME = "facebook/mask2former-swin-small-coco-instance"

# COCO's 80 in its order. GenEval names three of them otherwise: COCO's are "mouse", "remote" and "keyboard". Labels of a model
# are mapped by their index, as their spelling differs between libraries.
CLASS_NAMES = (
    *("person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light"),
    *("fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow"),
    *("elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase"),
    *("frisbee", "skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard"),
    *("surfboard", "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl"),
    *("banana", "apple", "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake"),
    *("chair", "couch", "potted plant", "bed", "dining table", "toilet", "tv", "laptop"),
    *("computer mouse", "tv remote", "computer keyboard", "cell phone", "microwave", "oven", "toaster"),
    *("sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush"),
)

SHORT_SIDE, LONG_SIDE = 800, 1333  # a picture is resized until it just fits
_MEAN, _STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # RGB, of 255
_PADDING = 128.0  # before normalisation
_DIVISOR = 32
_DETECTIONS = 100  # (query, class) pairs with the highest probability


@dataclass(frozen=True, slots=True)
class FoundObject:
    """`box` (x1, y1, x2, y2) tight around `mask` (H, W) bool, right and bottom exclusive."""

    box: Box
    score: float
    mask: np.ndarray


class Mask2FormerDetector:
    """`sana.metrics.geneval.Detector`: (H, W, 3) uint8 -> class name -> objects, with any score and with duplicates.

    Args:
        model: of COCO's 80 classes; computes in its own dtype, what follows is float32.
        names: of the classes, by their index.

    Raises:
        ValueError: the model has another number of classes.
    """

    def __init__(
        self, model: Mask2FormerForUniversalSegmentation, names: Sequence[str] = CLASS_NAMES
    ) -> None:
        if model.config.num_labels != len(names):
            raise ValueError(
                f"the detector has {model.config.num_labels} classes, GenEval needs COCO's {len(names)}: "
                f"take an instance segmentation model of COCO, such as {DETECTOR_NAME}"
            )
        self.model, self.names = model, tuple(names)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path = DETECTOR_NAME,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Mask2FormerDetector:
        """Load a transformers folder or a hub name.

        Raises:
            ValueError: nothing loadable is there, it is no Mask2Former of COCO, or weights are missing.
        """
        (model,) = load_pretrained(
            "a detector", name_or_path, Mask2FormerForUniversalSegmentation, dtype=dtype, device=device
        )
        return cls(model)

    @torch.inference_mode()
    def __call__(self, image: np.ndarray) -> dict[str, list[FoundObject]]:
        """Every class is a key; (query, class) pairs whose mask is empty are left out."""
        pixels, inner = prepare(image)
        output = self.model(pixel_values=pixels[None].to(self.model.device, self.model.dtype))
        found: dict[str, list[FoundObject]] = {name: [] for name in self.names}
        for label, thing in detections(
            output.class_queries_logits[0].float(),
            output.masks_queries_logits[0].float(),
            padded=tuple(pixels.shape[1:]),
            inner=inner,
            size=image.shape[:2],
        ):
            found[self.names[label]].append(thing)
        return found


def prepare(image: np.ndarray) -> tuple[Tensor, tuple[int, int]]:
    """(H, W, 3) uint8 RGB -> normalised pixels (3, h, w), sides divisible by 32; and the (height, width) that is not padding.

    The ratio is kept; bilinear without antialias, rounded to 8 bits (OpenCV's resize).
    """
    height, width = image.shape[:2]
    scale = min(LONG_SIDE / max(height, width), SHORT_SIDE / min(height, width))
    inner = (int(height * scale + 0.5), int(width * scale + 0.5))
    pixels = torch.tensor(image).permute(2, 0, 1).float()
    pixels = _resize(pixels, inner).round().clamp(0, 255)
    missing = [-side % _DIVISOR for side in inner]
    pixels = F.pad(pixels, (0, missing[1], 0, missing[0]), value=_PADDING)
    mean, std = (torch.tensor(values)[:, None, None] for values in (_MEAN, _STD))
    return (pixels - mean) / std, inner


def detections(
    class_logits: Tensor,
    mask_logits: Tensor,
    *,
    padded: tuple[int, int],
    inner: tuple[int, int],
    size: tuple[int, int],
) -> list[tuple[int, FoundObject]]:
    """(label, object), the most probable class first, from the network's raw output for one picture.

    A score is the probability of the class times the mean of the mask's sigmoid within the mask.

    Args:
        class_logits: (Q, C + 1), the last for "no object".
        mask_logits: (Q, h, w).
        padded: (height, width) that the network saw.
        inner: the part of it, from the upper left corner, that is picture.
        size: of the picture before it was resized.
    """
    probabilities = class_logits.softmax(-1)[:, :-1]
    classes = probabilities.shape[1]
    best = probabilities.flatten().topk(min(_DETECTIONS, probabilities.numel()))
    by_query: dict[int, list[int]] = defaultdict(list)
    for place, index in enumerate(best.indices.tolist()):
        by_query[index // classes].append(place)

    found: dict[int, FoundObject] = {}
    for query, places in by_query.items():  # one at a time: all masks of a large picture would take gigabytes
        logits = _resize(mask_logits[query][None], padded)[:, : inner[0], : inner[1]]
        logits = _resize(logits, size)[0]
        mask = logits > 0
        area = int(mask.sum())
        if not area:
            continue
        certainty = float(logits.sigmoid()[mask].sum() / (area + 1e-6))
        mask = mask.cpu().numpy()
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        box = tuple(map(float, (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)))
        for place in places:
            found[place] = FoundObject(box, float(best.values[place]) * certainty, mask)
    return [(int(best.indices[place]) % classes, found[place]) for place in sorted(found)]


def _resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """(C, h, w) -> (C, *size): bilinear, no antialias."""
    return F.interpolate(maps[None], size=size, mode="bilinear", align_corners=False)[0]


class ClipColours:
    """`sana.metrics.geneval.ColourClassifier`: the colour whose three sentences are nearest to the object, by CLIP.

    The object is cut out by its mask and box. The published one runs under CUDA autocast, this in the dtype of `clip`.

    Args:
        background: an RGB colour ("#999") for what is not the object; "original" leaves the picture as it is.
        crop: to the object's box.
    """

    TEMPLATES = (
        "a photo of a {colour} {name}",
        "a photo of a {colour}-colored {name}",
        "a photo of a {colour} object",
    )

    def __init__(self, clip: ClipScore, *, background: str = "#999", crop: bool = True) -> None:
        self.clip, self.background, self.crop = clip, background, crop
        if background != "original":
            Image.new("RGB", (1, 1), background)  # a colour that Pillow does not know is a ValueError
        self._texts: dict[str, Tensor] = {}

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path = CLIP_NAME,
        *,
        background: str = "#999",
        crop: bool = True,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> ClipColours:
        """Load a CLIP as `ClipScore.from_pretrained`."""
        clip = ClipScore.from_pretrained(name_or_path, dtype=dtype, device=device)
        return cls(clip, background=background, crop=crop)

    def __call__(self, image: np.ndarray, detections: Sequence[Detection], class_name: str) -> list[str]:
        """One of GenEval's ten colours for each detection in `image` (H, W, 3) uint8."""
        if not detections:
            return []
        features = self.clip.images([self.cut_out(image, detection) for detection in detections])
        return [COLOURS[index] for index in (features @ self._sentences(class_name).T).argmax(-1).tolist()]

    def cut_out(self, image: np.ndarray, detection: Detection) -> Image.Image:
        """What CLIP is shown of an object."""
        picture = Image.fromarray(image)
        if self.background != "original":
            canvas = Image.new("RGB", picture.size, self.background)
            picture = Image.composite(picture, canvas, Image.fromarray(detection.mask))
        return picture.crop(detection.box) if self.crop else picture

    def _sentences(self, class_name: str) -> Tensor:
        """(10, D) of norm 1: for each colour the mean of its sentences."""
        if class_name not in self._texts:
            sentences = [
                template.format(colour=colour, name=class_name)
                for colour in COLOURS
                for template in self.TEMPLATES
            ]
            features = self.clip.texts(sentences).unflatten(0, (len(COLOURS), -1)).mean(1)
            self._texts[class_name] = F.normalize(features, dim=-1)
        return self._texts[class_name]


def mask2former_eyes(
    detector: str | Path = DETECTOR_NAME,
    clip: str | Path = CLIP_NAME,
    *,
    options: GenEvalOptions | None = None,
    background: str = "#999",
    crop: bool = True,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Eyes:
    """The detector and the colour classifier of GenEval, loaded from transformers folders or hub names.

    Raises:
        ValueError: one of them cannot be loaded, or an option is wrong.
    """
    with fetched_by(hub_command(detector), detector):
        network = Mask2FormerDetector.from_pretrained(detector, dtype=dtype, device=device)
    with fetched_by(hub_command(clip), clip):
        colours = ClipColours.from_pretrained(
            clip, background=background, crop=crop, dtype=dtype, device=device
        )
    return Eyes(
        detector=network,
        classify_colours=colours,
        options=options or GenEvalOptions(),
        facts={
            "detector": f"Mask2Former by transformers ({detector})",
            "colours": f"CLIP ({clip})",
            "background": background,
            "crop": crop,
            "detector_dtype": str(dtype).removeprefix("torch."),
        },
        weights={"detector": folder_sha256(detector), "clip": folder_sha256(clip)},
    )
