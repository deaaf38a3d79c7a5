"""Finds the shapes of a picture from its pixels alone, for GenEval's decision logic (`sana.metrics.geneval`).

A picture of the shapes world is a plain background with plain objects, so no network is needed. What differs
clearly from the border's colour falls into connected regions. A region has a colour, the name nearest to that
of its inner half, and a shape: the renderer's own mask that overlaps it best once both have the same centroid
and area. The score of a detection is that overlap (intersection over union), lowered where the outline is a
wide gradient instead of an edge.

Measured on rendered scenes: at least 0.94 for clean drawings, 0.92 after a Gaussian blur of 1.5 pixels with
noise of 6 and colour shifts of 8 (8 bit, 256 x 256), while the overlap of two different shapes is at most
0.85. Needs numpy and scipy.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from sana.shapes.palette import BACKGROUNDS, COLOURS
from sana.shapes.render import coverage
from sana.shapes.scene import SHAPES, Object

MIN_SCORE = 0.86
"""A detection with a higher score counts: above every confusion of two shapes, below degraded drawings."""

# Distances are Euclidean in 8-bit RGB. The palette keeps objects at least 82 from every background, and noise
# of 6 per channel stays within 32.
_CONTRAST = 32.0  # from the background: an object
_FOREIGN = 60.0  # from every mixture of background and object colour: another object
_PLAIN_BORDER = 0.75  # least share of the border within _CONTRAST of its median: else there is no background
# Lengths are fractions of the shorter side of the image.
_BORDER = 1 / 64
_MIN_RADIUS = 0.05  # a region with less area than its square is a speck; the smallest radius drawn is 0.12
_MAX_EDGE = 1 / 32  # an outline wider than this lowers the score
# The frame in which regions and templates are compared.
_GRID = 80  # samples a side
_REACH = 1.25  # half a side, in square roots of the area; the star's tips reach 0.9
_STEEPNESS = 3.0  # coverage from 1/3 to 2/3 is stretched to 0..1, so that a slight blur costs little
_BLURS = (0.0, 0.05, 0.1)  # sigmas of the templates, in square roots of the area: autoencoders round corners


@dataclass(frozen=True, slots=True)
class DetectedShape:
    """One object: `box` (x1, y1, x2, y2) in pixels, right and bottom exclusive; `mask` (H, W) bool."""

    shape: str
    colour: str
    box: tuple[float, float, float, float]
    score: float
    mask: np.ndarray


def detect(image: np.ndarray) -> dict[str, list[DetectedShape]]:
    """The objects of `image` (H, W, 3) uint8, by shape: every one of SHAPES is a key.

    Regions that resemble no shape are listed under the best one with their low score: the caller's threshold
    decides. Two objects of one colour that touch are one region, and so match nothing.
    """
    pixels = np.asarray(image)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"expected an (H, W, 3) uint8 image, got {pixels.dtype} of shape {pixels.shape}")
    found: dict[str, list[DetectedShape]] = {shape: [] for shape in SHAPES}
    for detection in _detections(pixels.astype(np.float32)):
        found[detection.shape].append(detection)
    return found


def classify_colours(image: np.ndarray, detections: Sequence[DetectedShape], class_name: str) -> list[str]:
    """The colour name of each detection: one of COLOURS, or of BACKGROUNDS where that is nearer."""
    return [detection.colour for detection in detections]


def _detections(pixels: np.ndarray) -> Iterator[DetectedShape]:
    """Every region of one colour that stands out from a plain background and is no speck."""
    from scipy import ndimage

    background = _background(pixels)
    if background is None:
        return
    min_area = (_MIN_RADIUS * min(pixels.shape[:2])) ** 2
    pending = [np.linalg.norm(pixels - background, axis=2) > _CONTRAST]
    while pending:
        labels, _ = ndimage.label(pending.pop())
        areas = np.bincount(labels.ravel())
        for index, window in enumerate(ndimage.find_objects(labels), start=1):
            if areas[index] < min_area:
                continue
            inside = labels[window] == index
            colour = _core_colour(pixels[window], inside)
            if np.linalg.norm(colour - background) < _CONTRAST:
                continue
            alpha, foreign = _unmix(pixels[window], background, colour)
            # Opening drops the thin seams that blur and ringing leave; what remains is another object.
            foreign = ndimage.binary_opening(foreign & inside, iterations=2)
            alpha[~inside | ndimage.binary_dilation(foreign, iterations=2)] = 0
            if (alpha > 0.5).sum() < min_area:
                continue
            if foreign.any():
                rest = np.zeros(pixels.shape[:2], dtype=bool)
                rest[window] = foreign
                pending.append(rest)
            yield _match(alpha, window, colour, pixels.shape[:2])


def _background(pixels: np.ndarray) -> np.ndarray | None:
    """The median colour of the border, or None where the border is not plain."""
    width = max(1, round(_BORDER * min(pixels.shape[:2])))
    edges = (pixels[:width], pixels[-width:], pixels[:, :width], pixels[:, -width:])
    border = np.concatenate([edge.reshape(-1, 3) for edge in edges])
    background = np.median(border, axis=0)
    plain = np.linalg.norm(border - background, axis=1) < _CONTRAST
    return background if plain.mean() >= _PLAIN_BORDER else None


def _core_colour(pixels: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """The median colour of a region's inner half, over the pixels of its most frequent colour name."""
    from scipy import ndimage

    depth = ndimage.distance_transform_cdt(np.pad(inside, 1))[1:-1, 1:-1]
    samples = pixels[depth > depth.max() / 2]
    names = ((samples[:, None] - _named_colours()) ** 2).sum(2).argmin(1)
    return np.median(samples[names == np.bincount(names).argmax()], axis=0)


def _unmix(pixels: np.ndarray, background: np.ndarray, colour: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How much of each pixel `colour` covers, in [0, 1], and which are no mixture with `background`."""
    axis = colour - background
    offset = pixels - background
    alpha = np.clip(offset @ axis / (axis @ axis), 0, 1)
    return alpha, np.linalg.norm(offset - alpha[..., None] * axis, axis=2) > _FOREIGN


def _match(
    alpha: np.ndarray, window: tuple[slice, slice], colour: np.ndarray, size: tuple[int, int]
) -> DetectedShape:
    """Name the region whose coverage within `window` of an image of `size` (H, W) is `alpha`."""
    templates, sample = _templates(), _normalise(alpha)
    overlaps = np.minimum(templates, sample).sum((1, 2)) / np.maximum(templates, sample).sum((1, 2))
    best = int(overlaps.argmax())
    score = overlaps[best] / max(1.0, _edge_width(alpha) / (_MAX_EDGE * min(size)))

    mask = np.zeros(size, dtype=bool)
    mask[window] = alpha > 0.5
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = tuple(map(float, (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)))
    name = (*COLOURS, *BACKGROUNDS)[int(((_named_colours() - colour) ** 2).sum(1).argmin())]
    return DetectedShape(SHAPES[best % len(SHAPES)], name, box, float(score), mask)


def _normalise(alpha: np.ndarray) -> np.ndarray:
    """Coverage `alpha` (h, w), sampled around its centroid in units of the square root of its area.

    Returns (_GRID, _GRID) in [0, 1].
    """
    from scipy import ndimage

    area = alpha.sum()
    centre = [alpha.sum(1 - axis) @ np.arange(alpha.shape[axis]) / area for axis in (0, 1)]
    step = 2 * _REACH / _GRID * np.sqrt(area)
    corner = [c - step * (_GRID - 1) / 2 for c in centre]
    sample = ndimage.affine_transform(alpha, [step, step], corner, output_shape=(_GRID, _GRID), order=1)
    return np.clip(_STEEPNESS * (sample - 0.5) + 0.5, 0, 1)


def _edge_width(alpha: np.ndarray) -> float:
    """The mean width in pixels of the seam in which `alpha` goes from 0.2 to 0.8."""
    from scipy import ndimage

    mask = np.pad(alpha > 0.5, 1)
    outline = mask & ~ndimage.binary_erosion(mask)
    return float(((alpha > 0.2) & (alpha < 0.8)).sum() / outline.sum())


@functools.cache
def _templates() -> np.ndarray:
    """The renderer's masks of SHAPES, blurred by each of _BLURS and normalised: (24, _GRID, _GRID)."""
    from scipy import ndimage

    objects = [Object(shape=shape, colour="red", size="large", x=0.5, y=0.5, radius=0.19) for shape in SHAPES]
    masks = [np.pad(coverage(item, 256)[0], 32) for item in objects]
    return np.stack(
        [_normalise(ndimage.gaussian_filter(m, blur * np.sqrt(m.sum()))) for blur in _BLURS for m in masks]
    )


@functools.cache
def _named_colours() -> np.ndarray:
    """The RGB values of COLOURS, then BACKGROUNDS: (16, 3)."""
    return np.array([*COLOURS.values(), *BACKGROUNDS.values()], dtype=np.float32)
