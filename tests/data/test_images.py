"""The two sets of pictures: a folder, and the shapes."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from sana.data.buckets import Frame, load_picture
from sana.data.image_folder import ImageFolder
from sana.data.pictures import Reading
from sana.data.shapes import ShapesDataset
from sana.resolution import TABLES
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
    image = load_picture(tmp_path / "wide.png", (64, 64))
    assert image.min() == image.max() == 1.0


def test_other_modes_become_rgb(tmp_path):
    Image.new("RGBA", (40, 40), (0, 255, 0, 128)).save(tmp_path / "alpha.png")
    Image.new("L", (40, 40), 128).save(tmp_path / "gray.png")
    assert load_picture(tmp_path / "alpha.png", (32, 32)).shape == (3, 32, 32)
    assert load_picture(tmp_path / "gray.png", (32, 32)).shape == (3, 32, 32)


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


BUCKETS = Frame(size=256, table=TABLES["ASPECT_RATIO_256"], table_name="ASPECT_RATIO_256", multiple=32)


def test_meta_data_names_the_pictures_where_it_is_there(tmp_path):
    for name in ("a.png", "b.jpg", "c.png", "left_out.png"):
        write(tmp_path, name, caption=name)
    names = {"name": "x", "__kind__": "Sana-ImgDataset", "img_names": ["c", "b.jpg", "a", "gone"]}
    (tmp_path / "meta_data.json").write_text(json.dumps(names))
    folder = ImageFolder([tmp_path], 32)
    assert [folder.caption(i) for i in range(len(folder))] == ["c.png", "b.jpg", "a.png"]
    assert list(folder.quarantine.reasons) == [str(tmp_path / "gone.png")]
    (tmp_path / "meta_data.json").write_text('{"img_names": "c"}')
    with pytest.raises(ValueError, match='meta_data.json has no list of texts "img_names"'):
        ImageFolder([tmp_path], 32)


def test_sidecars_and_their_scores(tmp_path):
    write(tmp_path, "0001.png", caption="by hand")
    (tmp_path / "0001_VILA.json").write_text('{"0001": {"VILA": "by VILA"}}')
    (tmp_path / "0001.json").write_text('{"0001": {"Intern": "by Intern"}, "0002": {"x": "y"}}')
    (tmp_path / "0001_score.json").write_text('{"0001": {"VILA": "27.5", "Intern": 21}}')
    reading = Reading(
        frame=Frame(size=32), caption_suffixes=("", "_VILA", "_none"), score_suffixes=("_score", "_none")
    )
    folder = ImageFolder([tmp_path], reading)
    found = [(caption.kind, caption.text, caption.score) for caption in folder.captions(0)]
    assert found == [
        ("prompt", "by hand", None),
        ("Intern", "by Intern", 21.0),
        ("VILA", "by VILA", 27.5),
    ]
    assert len({folder.caption(0, epoch) for epoch in range(40)}) == 2, "those with a score"
    drawn = [folder.caption(0, epoch) for epoch in range(40)]
    assert drawn == [ImageFolder([tmp_path], reading).caption(0, epoch) for epoch in range(40)]
    other = ImageFolder([tmp_path], replace(reading, seed=1))
    assert drawn != [other.caption(0, epoch) for epoch in range(40)]
    (tmp_path / "0001_score.json").write_text('{"0001": {"VILA": ')
    with pytest.raises(ValueError, match="0001.png: 0001_score.json is not valid JSON"):
        folder.caption(0)


def test_pictures_whose_own_caption_scores_low_are_left_out(tmp_path):
    for name, score in (("a.png", "21.9"), ("b.png", "22"), ("c.png", None)):
        write(tmp_path, name, caption=name)
        if score:
            content = json.dumps({name[0]: {"prompt": score}})
            (tmp_path / f"{name[0]}_prompt_clip_score.json").write_text(content)
    folder = ImageFolder([tmp_path], Reading(frame=Frame(size=32), minimal_score=22.0))
    assert [folder.caption(i) for i in range(len(folder))] == ["b.png", "c.png"]
    with pytest.raises(ValueError, match="no sample is left after 0 that cannot be read and the filters"):
        ImageFolder([tmp_path], Reading(frame=Frame(size=32), minimal_score=100.5))


def test_buckets_of_a_folder(tmp_path):
    write(tmp_path, "a.png", size=(200, 100))
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (200, 100), (0, 255, 0)).save(tmp_path / "b.jpg", exif=turned)
    write(tmp_path, "c.png", size=(50, 50))
    (tmp_path / "d.png").write_bytes(b"\x89PNG not really")
    reading = Reading(frame=BUCKETS, index_dir=tmp_path / "index")
    folder = ImageFolder([tmp_path], reading)
    assert [folder.size(i) for i in range(3)] == [(192, 352), (352, 192), (256, 256)]
    assert [tuple(folder.image(i).shape[1:]) for i in range(3)] == [folder.size(i) for i in range(3)]
    assert "d.png" in next(iter(folder.quarantine.reasons)) and len(folder) == 3
    (kept,) = (tmp_path / "index").iterdir()
    before = kept.stat().st_mtime_ns
    again = ImageFolder([tmp_path], reading)
    assert again.name == folder.name and kept.stat().st_mtime_ns == before, "headers are read once"
    assert again.name != ImageFolder([tmp_path], 256).name


def test_the_crop_covers_the_bucket_without_distortion(tmp_path):
    pixels = np.zeros((300, 300, 3), np.uint8)
    pixels[100:200, 100:200] = 255  # a square stays one
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image = load_picture(tmp_path / "a.png", (192, 384))[0] > 0
    rows, columns = image.any(1).sum().item(), image.any(0).sum().item()
    assert rows == columns == 128  # scaled by 384 / 300


def test_every_side_is_a_multiple_of_the_autoencoders_factor():
    for h, w in TABLES["ASPECT_RATIO_256"].values():
        found = BUCKETS.bucket(h, w)
        assert all(side % 32 == 0 for side in found) and max(abs(found[0] - h), abs(found[1] - w)) <= 16
    exact = Frame(size=1024, table=TABLES["ASPECT_RATIO_1024"], table_name="ASPECT_RATIO_1024", multiple=32)
    assert [exact.bucket(*sides) for sides in exact.table.values()] == list(exact.table.values())
    assert exact.resample == Image.Resampling.BICUBIC
    large = Frame(size=2048, table=TABLES["ASPECT_RATIO_2048"], table_name="ASPECT_RATIO_2048", multiple=32)
    assert large.resample == Image.Resampling.LANCZOS
