"""Pictures: the right colours at the right places, smooth edges, any size."""

import numpy as np
import pytest

from sana.shapes.palette import BACKGROUNDS, COLOURS
from sana.shapes.render import coverage, render
from sana.shapes.scene import SHAPES, Group, Object, Scene
from sana.shapes.splits import training_scene

# Share of the circumscribed circle that each shape covers, from its geometry.
AREAS = {
    "circle": 1.0, "ring": 1 - 0.55**2, "square": 1.56**2 / np.pi, "diamond": 1.44 / np.pi,
    "triangle": 0.75 * 3**0.5 * 1.05**2 / np.pi, "star": 10 * 0.5 * 0.42 * np.sin(np.pi / 5) / np.pi,
    "cross": (2 * 0.6 * 1.9 - 0.36) / np.pi, "heart": 180 / 17.5**2,
}  # fmt: skip


def one(shape: str, **changes) -> Object:
    return Object(
        **{"shape": shape, "colour": "red", "size": "large", "x": 0.5, "y": 0.5, "radius": 0.2} | changes
    )


def scene_of(item: Object, background: str = "gray") -> Scene:
    group = Group(count=1, shape=item.shape, colour=item.colour, size=item.size)
    return Scene(background=background, objects=(item,), groups=(group,))


@pytest.mark.parametrize("shape", SHAPES)
def test_area_of_each_shape(shape):
    alpha, _, _ = coverage(one(shape), 512)
    assert alpha.sum() / (np.pi * (0.2 * 512) ** 2) == pytest.approx(AREAS[shape], rel=0.02)


@pytest.mark.parametrize("shape", SHAPES)
def test_place_does_not_change_the_shape(shape):
    (a, top, left), (b, top2, left2) = coverage(one(shape), 256), coverage(one(shape, x=0.25, y=0.75), 256)
    assert (top2 - top, left2 - left) == (64, -64)
    assert np.abs(a - b).max() < 1e-6


@pytest.mark.parametrize("colour", COLOURS)
def test_colours_are_exact(colour):
    picture = render(scene_of(one("square", colour=colour)), 128)
    assert tuple(picture[64, 64]) == COLOURS[colour]
    assert tuple(picture[2, 2]) == BACKGROUNDS["gray"]


def test_edges_are_smooth():
    alpha, _, _ = coverage(one("circle"), 256)
    assert ((alpha > 0.1) & (alpha < 0.9)).sum() > 100


def test_ring_has_a_hole_and_triangle_points_up():
    assert tuple(render(scene_of(one("ring")), 128)[64, 64]) == BACKGROUNDS["gray"]
    alpha, _, _ = coverage(one("triangle"), 256)
    rows = alpha.sum(axis=1)
    assert rows[: len(rows) // 3].sum() < rows[len(rows) // 2 :].sum() / 2


@pytest.mark.parametrize("size", [64, 100, 256])
def test_any_size_shows_the_same_scene(size):
    scene = training_scene(3)
    small, large = render(scene, size), render(scene, 4 * size)
    assert small.shape == (size, size, 3) and small.dtype == np.uint8
    pooled = large.reshape(size, 4, size, 4, 3).mean(axis=(1, 3))
    assert np.abs(pooled - small).mean() < 1.5


def test_colours_are_told_apart():
    """CIE Lab distances of all colours and backgrounds; 24 is ten times what an eye just notices."""

    def lab(rgb):
        linear = np.array(rgb) / 255
        linear = np.where(linear > 0.04045, ((linear + 0.055) / 1.055) ** 2.4, linear / 12.92)
        to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
        xyz = to_xyz @ linear / np.array([0.9505, 1, 1.089])
        f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
        return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])

    points = {name: lab(rgb) for name, rgb in {**COLOURS, **BACKGROUNDS}.items()}
    assert len(points) == len(COLOURS) + len(BACKGROUNDS)
    closest = min((np.linalg.norm(points[a] - points[b]), a, b) for a in points for b in points if a < b)
    assert closest[0] > 24, closest
