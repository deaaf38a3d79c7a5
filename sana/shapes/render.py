"""Draw a scene: exact anti-aliased shapes on a plain background."""

import math

import numpy as np
from PIL import Image, ImageDraw

from sana.shapes.palette import BACKGROUNDS, COLOURS
from sana.shapes.scene import Object, Scene

_SUPERSAMPLE = 4
_RING_HOLE = 0.55  # inner radius of the ring, of the outer
_STAR_INNER = 0.42  # radius of the star's inner corners, of the outer
_CROSS_ARM = 0.3  # half width of the cross's arms


def _regular(corners: int, inner: float | None = None) -> list[tuple[float, float]]:
    """A regular polygon with one corner up; with `inner`, a star whose inner corners lie at that radius."""
    radii = [1.0] if inner is None else [1.0, inner]
    total = corners * len(radii)
    angles = [2 * math.pi * i / total for i in range(total)]
    return [
        (radii[i % len(radii)] * math.sin(a), -radii[i % len(radii)] * math.cos(a))
        for i, a in enumerate(angles)
    ]


def _heart() -> list[tuple[float, float]]:
    """The curve (16 sin^3 t, 13 cos t - 5 cos 2t - 2 cos 3t - cos 4t), scaled into the unit circle."""
    steps = [2 * math.pi * i / 96 for i in range(96)]
    curve = [
        (
            16 * math.sin(t) ** 3,
            -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)),
        )
        for t in steps
    ]
    return [(x / 17.5, (y - 2.5) / 17.5) for x, y in curve]


def _outlines() -> dict[str, list[tuple[float, float]]]:
    w, d = _CROSS_ARM, 0.95
    return {
        "square": [(-0.78, -0.78), (0.78, -0.78), (0.78, 0.78), (-0.78, 0.78)],
        "triangle": [(x * 1.05, y * 1.05 + 0.18) for x, y in _regular(3)],
        "star": _regular(5, _STAR_INNER),
        "cross": [
            (-w, -d),
            (w, -d),
            (w, -w),
            (d, -w),
            (d, w),
            (w, w),
            (w, d),
            (-w, d),
            (-w, w),
            (-d, w),
            (-d, -w),
            (-w, -w),
        ],
        "diamond": [(0, -1.0), (0.72, 0), (0, 1.0), (-0.72, 0)],
        "heart": _heart(),
    }


_OUTLINES = _outlines()  # corners in units of the radius, y down; circle and ring are drawn as ellipses


def coverage(item: Object, size: int) -> tuple[np.ndarray, int, int]:
    """How much of each pixel `item` covers in an image of `size` pixels a side.

    Returns (alpha, top, left): alpha (h, w) float32 in [0, 1] is the patch that holds the object, clipped to the image.
    """
    radius, cx, cy = (value * size for value in (item.radius * 1.1, item.x, item.y))
    left, top = max(0, math.floor(cx - radius)), max(0, math.floor(cy - radius))
    right, bottom = min(size, math.ceil(cx + radius)), min(size, math.ceil(cy + radius))
    s = _SUPERSAMPLE
    canvas = Image.new("L", ((right - left) * s, (bottom - top) * s), 0)
    draw = ImageDraw.Draw(canvas)
    x0, y0, r = (cx - left) * s, (cy - top) * s, item.radius * size * s
    if item.shape in _OUTLINES:
        draw.polygon([(x0 + r * x - 0.5, y0 + r * y - 0.5) for x, y in _OUTLINES[item.shape]], fill=255)
    else:
        draw.ellipse([x0 - r, y0 - r, x0 + r - 1, y0 + r - 1], fill=255)
        if item.shape == "ring":
            r *= _RING_HOLE
            draw.ellipse([x0 - r, y0 - r, x0 + r - 1, y0 + r - 1], fill=0)
    return np.asarray(canvas.reduce(s), dtype=np.float32) / 255, top, left


def render(scene: Scene, size: int = 256) -> np.ndarray:
    """The picture of `scene`: (size, size, 3) uint8."""
    image = np.empty((size, size, 3), dtype=np.float32)
    image[:] = BACKGROUNDS[scene.background]
    for item in scene.objects:
        alpha, top, left = coverage(item, size)
        patch = image[top : top + alpha.shape[0], left : left + alpha.shape[1]]
        patch += alpha[..., None] * (np.array(COLOURS[item.colour], dtype=np.float32) - patch)
    return (image + 0.5).astype(np.uint8)
