"""The two sets of pictures: a folder, and the shapes."""

import numpy as np
import pytest
import torch
from PIL import Image

from sana.data.image_folder import ImageFolder, load_square
from sana.data.shapes import ShapesDataset
from sana.shapes.render import render
from sana.shapes.splits import is_training_scene, training_scene


def write(folder, name, size=(80, 60), caption="a cat", colour=(255, 0, 0)):
    Image.new("RGB", size, colour).save(folder / name)
    if caption is not None:
        (folder / name).with_suffix(".txt").write_text(caption + "\nsecond line", encoding="utf-8")


def test_folder_in_the_order_of_names_with_captions(tmp_path):
    for name in ("b.jpg", "a.png", "c.WEBP"):
        write(tmp_path, name, caption=name)
    (tmp_path / "notes.md").write_text("no picture")
    folder = ImageFolder([tmp_path], 32)
    assert [folder.caption(i) for i in range(len(folder))] == ["a.png", "b.jpg", "c.WEBP"]
    assert folder.image(0).shape == (3, 32, 32)
    assert torch.allclose(folder.image(0)[:, 5, 5], torch.tensor([1.0, -1.0, -1.0]))


def test_crop_is_central_and_range_is_unit(tmp_path):
    pixels = np.zeros((64, 128, 3), np.uint8)
    pixels[:, 32:96] = 255  # the middle square
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    image = load_square(tmp_path / "wide.png", 64)
    assert image.min() == image.max() == 1.0


def test_other_modes_become_rgb(tmp_path):
    Image.new("RGBA", (40, 40), (0, 255, 0, 128)).save(tmp_path / "alpha.png")
    Image.new("L", (40, 40), 128).save(tmp_path / "gray.png")
    assert load_square(tmp_path / "alpha.png", 32).shape == (3, 32, 32)
    assert load_square(tmp_path / "gray.png", 32).shape == (3, 32, 32)


def test_broken_pictures_and_missing_captions_are_named(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG not really")
    write(tmp_path, "fine.png", caption=None)
    (tmp_path / "empty.txt").write_text("\n")
    folder = ImageFolder([tmp_path], 32)
    with pytest.raises(ValueError, match="cannot read the picture .*broken.png"):
        folder.image(0)
    with pytest.raises(ValueError, match="fine.png has no caption"):
        folder.caption(1)
    with pytest.raises(ValueError, match="no such folder of pictures: .*nowhere"):
        ImageFolder([tmp_path / "nowhere"], 32)


def test_name_changes_with_the_pictures(tmp_path):
    write(tmp_path, "a.png")
    before = ImageFolder([tmp_path], 32).name
    assert ImageFolder([tmp_path], 32).name == before
    write(tmp_path, "b.png")
    assert ImageFolder([tmp_path], 32).name != before
    assert ImageFolder([tmp_path], 64).name != ImageFolder([tmp_path], 32).name


def test_shapes_are_the_training_scenes():
    shapes = ShapesDataset(64, 5)
    picture = ((shapes.image(3) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
    assert np.array_equal(picture, render(training_scene(3), 64))
    assert len({shapes.caption(3, epoch) for epoch in range(20)}) > 3
    assert shapes.caption(3, 1) == ShapesDataset(64, 9).caption(3, 1)


def test_validation_shapes_are_held_out():
    shapes = ShapesDataset(64, 30, split="validation")
    assert not any(is_training_scene(shapes.scene(i)) for i in range(30))
    with pytest.raises(ValueError, match="unknown split 'test'"):
        ShapesDataset(64, 5, split="test")
    with pytest.raises(ValueError, match="num_scenes=0"):
        ShapesDataset(64, 0)
