"""Which pictures a metric measures: names, manifests, and nothing forgotten."""

import json
import logging

import pytest
from PIL import Image

from sana.metrics.image_set import (
    PromptEntry,
    described,
    open_image,
    read_image_set,
    read_prompts,
    require_prompts,
)
from sana.utils.manifest import Manifest
from tests.scorers import prompts_path, truncate, write_pictures


def draw(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), "red").save(folder / name)


def write_manifest(folder, rows):
    with Manifest(folder).part(0) as part:
        for index, (file, prompt, sample) in enumerate(rows):
            row = {"file": file, "index": index // 2, "key": None, "prompt": prompt, "sample": sample}
            part.add(row | {"settings": {"seed": 3}})


def placed(items):
    return [(item.name, item.prompt, item.prompt_index, item.sample_index) for item in items]


def test_without_prompts_by_name(tmp_path):
    draw(tmp_path, "b.png", "a/z.jpg", "a/y.JPEG", "c.webp", ".hidden.png", ".tmp/d.png")
    (tmp_path / "notes.txt").write_text("no picture")
    items = read_image_set(tmp_path)
    assert [item.name for item in items] == ["a/y.JPEG", "a/z.jpg", "b.png", "c.webp"]
    assert [item.prompt_index for item in items] == [0, 1, 2, 3]
    assert [item.name for item in read_image_set(tmp_path, limit=2)] == ["a/y.JPEG", "a/z.jpg"]
    assert described(items) == {"formats": {"jpeg": 1, "jpg": 1, "png": 1, "webp": 1}}
    with pytest.raises(ValueError, match="4 of 4 pictures have no prompt, a/y.JPEG the first"):
        require_prompts(items)


def test_ids_in_subfolders_and_samples(tmp_path):
    """MJHQ's reference lies in a folder for each category; ImageReward's pictures are ID_SAMPLE."""
    folder = write_pictures(tmp_path / "set", 3)
    (folder / "a").mkdir()
    (folder / "id0.png").rename(folder / "a/id0.png")
    items = read_image_set(folder, prompts_path(folder))
    assert placed(items) == [
        ("a/id0.png", "picture 0", 0, 0),
        ("id1.png", "picture 1", 1, 0),
        ("id2.png", "picture 2", 2, 0),
    ]
    assert [item.category for item in items] == ["a", "b", "a"]
    assert placed(read_image_set(folder, prompts_path(folder), limit=2)) == placed(items)[:2]
    samples = tmp_path / "samples"
    draw(samples, "a_1_0.jpg", "a_1_1.jpg", "a_0.jpg", "a-s1.jpg")
    entries = [PromptEntry("one", "a_1"), PromptEntry("two", "a")]
    assert placed(read_image_set(samples, entries)) == [
        ("a_1_0.jpg", "one", 0, 0),
        ("a_1_1.jpg", "one", 0, 1),
        ("a_0.jpg", "two", 1, 0),
        ("a-s1.jpg", "two", 1, 1),
    ]


def test_prompt_lines(tmp_path):
    draw(tmp_path / "set", "00001_a-dog.png", "00000_a-cat.png", "00000_a-cat-s1.png", "00001_a-dog-s1.png")
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n\n")
    items = read_image_set(tmp_path / "set", tmp_path / "prompts.txt")
    assert [(item.prompt, item.sample_index) for item in items] == [
        ("a cat", 0),
        ("a cat", 1),
        ("a dog", 0),
        ("a dog", 1),
    ]


def test_manifest(tmp_path):
    folder = tmp_path / "set"
    draw(folder, "x.png", "x-s1.png", "y.png", "y-s1.png")
    write_manifest(
        folder, [("x.png", "one", 0), ("x-s1.png", "one", 1), ("y.png", "two", 0), ("y-s1.png", "two", 1)]
    )
    items = read_image_set(folder)
    assert placed(items)[1:3] == [("x-s1.png", "one", 0, 1), ("y.png", "two", 1, 0)]
    assert described(items)["generation"] == {"seed": 3}
    assert placed(read_image_set(folder, [PromptEntry("one"), PromptEntry("two")])) == placed(items)
    with pytest.raises(ValueError, match="y.png was drawn for 'two', not for 'three'"):
        read_image_set(folder, [PromptEntry("one"), PromptEntry("three")])
    draw(folder, "z.png")
    with pytest.raises(ValueError, match="1 of 5 pictures without a prompt, the first: z.png"):
        read_image_set(folder)
    (folder / "z.png").unlink()
    (folder / "y.png").unlink()
    with pytest.raises(ValueError, match="1 of 4 pictures of the manifest are not there, the first: y.png"):
        read_image_set(folder)


def test_coverage_is_strict(tmp_path, caplog):
    folder = write_pictures(tmp_path / "set", 4)
    prompts = prompts_path(folder)
    with pytest.raises(ValueError, match="no such folder"):
        read_image_set(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: no picture in it; expected files that end in \.png"):
        read_image_set(tmp_path / "empty", prompts)
    (folder / "id1.png").rename(tmp_path / "kept.png")
    with pytest.raises(
        ValueError, match="1 of 4 prompts without their picture, the first: id1; --allow_missing"
    ):
        read_image_set(folder, prompts)
    draw(folder, "other.png")
    with pytest.raises(ValueError, match="1 of 4 pictures without a prompt, the first: other.png"):
        read_image_set(folder, prompts)
    with caplog.at_level(logging.WARNING):
        items = read_image_set(folder, prompts, allow_missing=True)
    assert [item.name for item in items] == ["id0.png", "id2.png", "id3.png"]
    assert "the first: id1" in caplog.text and "the first: other.png" in caplog.text
    (folder / "other.png").unlink()
    (tmp_path / "kept.png").rename(folder / "id1.png")
    draw(folder, "id2_1.png")
    with pytest.raises(ValueError, match=r"3 of 4 prompts with fewer than 2 pictures, the first: id0 \(1\)"):
        read_image_set(folder, prompts)
    (folder / "id2_1.png").rename(folder / "id2.jpg")
    with pytest.raises(ValueError, match="two pictures are of one prompt and sample, id2.jpg and id2.png"):
        read_image_set(folder, prompts)
    with pytest.raises(ValueError, match="none of its 5 pictures belongs to a prompt"):
        read_image_set(folder, [PromptEntry("text", "elsewhere")], allow_missing=True)


def test_prompt_files(tmp_path):
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps([{"id": "a", "prompt": " x "}, {"id": 7, "prompt": "y", "category": "c"}]))
    assert read_prompts(path) == [PromptEntry("x", "a"), PromptEntry("y", "7", "c")]
    for text, message in {
        "{}": "holds no prompt",
        "[1]": "not of the form",
        '{"a": "text"}': "not of the form",
        '{"a": {"prompt": 3}}': "a prompt is a text, got 3",
        '{"a": {"prompt": "x", "category": ["y"]}}': "a category is a text, got",
        '{"a": {"prompt": "x"}, "a": {"prompt": "y"}}': "the id 'a' is there twice",
        '{"a": ': "line 1: not valid JSON",
    }.items():
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_prompts(path)
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(ValueError, match="holds no prompt"):
        read_prompts(tmp_path / "empty.txt")
    with pytest.raises(ValueError, match="cannot read the prompts"):
        read_prompts(tmp_path / "nowhere.txt")


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_broken_pictures_are_named(tmp_path, suffix):
    path = tmp_path / f"half.{suffix}"
    Image.effect_noise((64, 64), 50).save(path)
    truncate(path)
    with pytest.raises(ValueError, match=f"half.{suffix}: cannot be read as a picture"):
        open_image(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=f"half.{suffix}: cannot be read as a picture"):
        open_image(path)
    with pytest.raises(ValueError, match="No such file"):
        open_image(tmp_path / "nowhere.png")


def test_turned_where_the_protocol_says_so(tmp_path):
    picture = Image.new("L", (6, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    picture.save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg").size == (6, 4)
    assert open_image(tmp_path / "turned.jpg").mode == "RGB"
    assert open_image(tmp_path / "turned.jpg", exif=True).size == (4, 6)
