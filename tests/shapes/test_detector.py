"""The detector against scenes whose truth is known, whole and degraded, and against pictures with nothing to
find."""

from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageDraw
from scipy import ndimage

from sana.shapes import detector
from sana.shapes.palette import BACKGROUNDS, COLOURS
from sana.shapes.render import coverage, render
from sana.shapes.scene import SHAPES, Object, Scene
from sana.shapes.splits import training_scene, validation_scene

SIDE = 256


def counted(image):
    """The detections above the threshold."""
    return [d for found in detector.detect(image).values() for d in found if d.score > detector.MIN_SCORE]


def seen(image):
    return sorted((d.shape, d.colour) for d in counted(image))


def contents(scene):
    return sorted((item.shape, item.colour) for item in scene.objects)


def scenes(number):
    """Scenes of every kind, half of them with held-out combinations."""
    return [scene(index) for index in range(number // 2) for scene in (training_scene, validation_scene)]


def degrade(image, *, seed, blur=0.0, noise=0.0, shift=0.0):
    """Gaussian blur (sigma in pixels), then per-pixel noise (sigma) and a colour shift (maximum) in 8-bit
    levels."""
    rng = np.random.default_rng(seed)
    pixels = ndimage.gaussian_filter(image.astype(np.float32), (blur, blur, 0))
    pixels += rng.normal(0, noise, pixels.shape) + rng.uniform(-shift, shift, 3)
    return np.clip(pixels + 0.5, 0, 255).astype(np.uint8)


def true_box(item, size=SIDE):
    alpha, top, left = coverage(item, size)
    rows, columns = np.nonzero(alpha > 0.5)
    return left + columns.min(), top + rows.min(), left + columns.max() + 1, top + rows.max() + 1


# --- scenes ---


def test_drawn_scenes_are_read_exactly():
    """Count, shape, colour and box of every object, in at least 99 % of 400 scenes."""
    wrong = []
    for index, scene in enumerate(scenes(400)):
        found = counted(render(scene, SIDE))
        boxes = [
            np.abs(np.subtract(d.box, true_box(item))).max()
            for item in scene.objects
            for d in found
            if (d.shape, d.colour) == (item.shape, item.colour)
            and np.hypot((d.box[0] + d.box[2]) / 2 - item.x * SIDE, (d.box[1] + d.box[3]) / 2 - item.y * SIDE)
            < 8
        ]
        right = sorted((d.shape, d.colour) for d in found) == contents(scene)
        if not right or len(boxes) != len(scene.objects) or max(boxes) > 1:
            wrong.append(index)
    assert len(wrong) <= 4, wrong


@pytest.mark.parametrize("size", [128, 512])
def test_other_image_sizes(size):
    assert all(seen(render(scene, size)) == contents(scene) for scene in scenes(20))


@pytest.mark.parametrize(
    "damage",
    [
        {"blur": 1.5},
        {"noise": 6.0},
        {"shift": 12.0},
        {"blur": 1.5, "noise": 6.0, "shift": 8.0},
        {"blur": 2.5, "noise": 8.0, "shift": 12.0},  # worse than any autoencoder that would be used
    ],
    ids=str,
)
def test_degraded_scenes(damage):
    """At least 95 % of 100 scenes entirely right."""
    chosen = scenes(100)
    right = [
        seen(degrade(render(scene, SIDE), seed=i, **damage)) == contents(scene)
        for i, scene in enumerate(chosen)
    ]
    assert sum(right) >= 95


def test_small_objects_with_rounded_corners():
    """An autoencoder rounds what is small: 3 pixels of blur on a radius of 23."""
    for shape in SHAPES:
        item = Object(shape=shape, colour="red", size="small", x=0.5, y=0.5, radius=0.09)
        image = render(Scene(background="gray", objects=(item,), groups=()), SIDE)
        assert seen(degrade(image, seed=0, blur=3.0)) == [(shape, "red")]


def test_jpeg_ringing():
    def compressed(image):
        buffer = BytesIO()
        Image.fromarray(image).save(buffer, format="JPEG", quality=40)
        return np.asarray(Image.open(buffer))

    assert all(seen(compressed(render(scene, SIDE))) == contents(scene) for scene in scenes(20))


def test_every_shape_in_every_colour_on_every_background():
    for background in BACKGROUNDS:
        for colour in COLOURS:
            for row in range(2):
                items = tuple(
                    Object(
                        shape=shape,
                        colour=colour,
                        size="small",
                        x=0.25 + 0.5 * (i % 2),
                        y=0.25 + 0.5 * (i // 2),
                        radius=0.1,
                    )
                    for i, shape in enumerate(SHAPES[4 * row : 4 * row + 4])
                )
                scene = Scene(background=background, objects=items, groups=())
                assert seen(render(scene, SIDE)) == contents(scene), (background, colour)


def test_scores_separate_drawings_from_confusions():
    """The threshold has room on both sides: drawings score above it, the second-best shape stays below."""
    chosen = [render(scene, SIDE) for scene in scenes(100)]
    clean = [d.score for image in chosen for d in counted(image)]
    assert 0.93 < min(clean) <= max(clean) <= 1
    blurred = [d.score for i, image in enumerate(chosen) for d in counted(degrade(image, seed=i, blur=1.5))]
    assert min(blurred) > 0.91
    templates = detector._templates()[: len(SHAPES)]
    overlaps = [
        np.minimum(a, b).sum() / np.maximum(a, b).sum()
        for i, a in enumerate(templates)
        for b in templates[i + 1 :]
    ]
    assert max(overlaps) < detector.MIN_SCORE


# --- hand-made pictures ---


def draw(*figures, background="gray"):
    """Figures (PIL method, box or corners, colour name) on a plain background."""
    image = Image.new("RGB", (SIDE, SIDE), BACKGROUNDS[background])
    canvas = ImageDraw.Draw(image)
    for method, corners, colour in figures:
        getattr(canvas, method)(corners, fill=(COLOURS | BACKGROUNDS)[colour])
    return np.asarray(image)


def test_box_mask_and_keys():
    found = detector.detect(draw(("rectangle", (60, 80, 119, 139), "red")))
    assert tuple(found) == SHAPES
    (square,) = found["square"]
    assert square.box == (60, 80, 120, 140)
    assert square.mask.shape == (SIDE, SIDE)
    assert square.mask.sum() == 3600
    assert square.mask[80:140, 60:120].all()
    assert sum(map(len, found.values())) == 1


def test_colours_of_touching_objects_are_told_apart():
    image = draw(("ellipse", (40, 80, 110, 150), "red"), ("rectangle", (105, 80, 175, 150), "blue"))
    assert seen(image) == [("circle", "red"), ("square", "blue")]


def test_a_thin_object_that_touches_a_thick_one():
    outer = ("ellipse", (60, 60, 103, 103), "blue")
    image = draw(outer, ("ellipse", (70, 70, 93, 93), "gray"), ("rectangle", (102, 50, 170, 118), "red"))
    assert seen(image) == [("ring", "blue"), ("square", "red")]


@pytest.mark.parametrize("colour", ["red", "blue"])
def test_an_object_inside_a_ring(colour):
    image = draw(
        ("ellipse", (60, 60, 190, 190), "red"),
        ("ellipse", (89, 89, 161, 161), "gray"),
        ("rectangle", (110, 110, 139, 139), colour),
    )
    assert seen(image) == [("ring", "red"), ("square", colour)]


def test_a_colour_outside_the_ten_is_named_as_what_it_is():
    image = draw(("rectangle", (60, 80, 119, 139), "teal"))
    (square,) = detector.detect(image)["square"]
    assert detector.classify_colours(image, [square], "square") == ["teal"]


def soft_disc(sigma):
    y, x = np.mgrid[:SIDE, :SIDE] - 128
    alpha = np.exp(-(x**2 + y**2) / (2 * sigma**2))[..., None]
    return (BACKGROUNDS["gray"] + alpha * np.subtract(COLOURS["red"], BACKGROUNDS["gray"])).astype(np.uint8)


def noise(low, high):
    return np.random.default_rng(0).integers(low, high, (SIDE, SIDE, 3), dtype=np.uint8)


def checkerboard():
    board = np.indices((8, 8)).sum(0) % 2 * 255
    return np.kron(board, np.ones((32, 32)))[..., None].repeat(3, 2).astype(np.uint8)


def dither():
    """A patch of two colours around the background, whose mean is the background itself."""
    image = draw().copy()
    image[80:160, 80:160, 0] += (
        np.where(np.indices((80, 80)).sum(0) % 2, 36, -36).astype(np.int8).view(np.uint8)
    )
    return image


def ramp():
    return np.repeat(np.linspace(0, 255, SIDE).astype(np.uint8)[None, :, None], SIDE, 0).repeat(3, 2)


@pytest.mark.parametrize(
    "image",
    [
        pytest.param(draw(), id="blank"),
        pytest.param(np.zeros((SIDE, SIDE, 3), np.uint8), id="black"),
        pytest.param(noise(0, 256), id="noise"),
        pytest.param(noise(120, 150), id="grain"),
        pytest.param(ramp(), id="ramp"),
        pytest.param(checkerboard(), id="checkerboard"),
        pytest.param(dither(), id="dither"),
        pytest.param(draw(("rectangle", (128, 0, 255, 255), "red")), id="half"),
        pytest.param(soft_disc(10), id="soft disc"),
        pytest.param(soft_disc(25), id="wide soft disc"),
        pytest.param(draw(("ellipse", (80, 110, 160, 150), "red")), id="flat ellipse"),
        pytest.param(draw(("rectangle", (60, 100, 180, 140), "red")), id="bar"),
        pytest.param(draw(("polygon", [(60, 60), (180, 60), (60, 180)], "red")), id="corner"),
        pytest.param(draw(("polygon", [(60, 60), (150, 70), (170, 120), (90, 180)], "red")), id="shard"),
        pytest.param(draw(("ellipse", (120, 120, 131, 131), "red")), id="speck"),
        pytest.param(draw(*(("ellipse", (x, 80, x + 60, 140), "red") for x in (60, 105))), id="merged discs"),
        pytest.param(draw(("rectangle", (-30, 60, 40, 200), "red")), id="cut off"),
    ],
)  # fmt: skip
def test_nothing_is_counted(image):
    assert seen(image) == []


def test_half_a_shape_is_not_counted():
    for shape in SHAPES:
        item = Object(shape=shape, colour="red", size="large", x=0.5, y=0.5, radius=0.18)
        image = render(Scene(background="gray", objects=(item,), groups=()), SIDE).copy()
        image[:, 128:] = BACKGROUNDS["gray"]
        assert (shape, "red") not in seen(image)


@pytest.mark.parametrize(
    "image", [np.zeros((8, 8, 3)), np.zeros((8, 8), np.uint8), np.zeros((8, 8, 4), np.uint8)]
)
def test_other_arrays_are_refused(image):
    with pytest.raises(ValueError, match="uint8"):
        detector.detect(image)
