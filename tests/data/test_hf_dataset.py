"""Folders of the datasets library: save_to_disk, splits, and parquet."""

import io

import datasets
import numpy as np
import pytest
from PIL import Image

from sana.config import load_config
from sana.data.buckets import Frame, load_picture
from sana.data.build import build_dataset, detected_type
from sana.data.captions import CaptionChoice
from sana.data.hf_dataset import HFDataset
from sana.data.pictures import Reading
from sana.resolution import TABLES

BUCKETS = Frame(size=256, table=TABLES["ASPECT_RATIO_256"], table_name="ASPECT_RATIO_256", multiple=32)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf_cache")
    datasets.disable_progress_bars()


def png(seed, size=(64, 48)):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def table(count=4, first=0, **columns):
    pictures = [
        {"bytes": png(first + i, (64, 48) if i % 2 else (48, 64)), "path": None} for i in range(count)
    ]
    columns = {"text": [f"caption {first + i}" for i in range(count)]} | columns
    return datasets.Dataset.from_dict({"image": pictures, **columns}).cast_column("image", datasets.Image())


def test_what_save_to_disk_writes(tmp_path):
    table().save_to_disk(tmp_path / "one")
    rows = HFDataset([tmp_path / "one"], Reading(frame=BUCKETS))
    assert len(rows) == 4 and [rows.caption(i) for i in range(4)] == [f"caption {i}" for i in range(4)]
    assert [rows.size(i) for i in range(4)] == [(288, 224), (192, 288)] * 2
    assert (rows.image(1) == load_picture(png(1), (192, 288))).all()
    assert rows.label(2).endswith("one, row 2")
    assert HFDataset([tmp_path / "one"], Reading(frame=BUCKETS)).name == rows.name


def test_several_folders_and_splits(tmp_path):
    table().save_to_disk(tmp_path / "a")
    datasets.DatasetDict(train=table(2, 4), test=table(1, 9)).save_to_disk(tmp_path / "b")
    rows = HFDataset([tmp_path / "a", tmp_path / "b"], 32)
    assert [rows.caption(i) for i in range(len(rows))] == [f"caption {i}" for i in range(6)]
    datasets.DatasetDict(first=table(2), second=table(1)).save_to_disk(tmp_path / "c")
    with pytest.raises(ValueError, match="has the splits first, second and no train"):
        HFDataset([tmp_path / "c"], 32)


def test_parquet_through_the_config(tmp_path):
    (tmp_path / "data").mkdir()
    table().to_parquet(str(tmp_path / "data" / "train-0.parquet"))
    table(2, 4).to_parquet(str(tmp_path / "data" / "train-1.parquet"))
    assert detected_type(tmp_path) == "SanaHFDataset"
    overrides = [
        "--data.type=SanaHFDataset",
        f"--data.data_dir=[{tmp_path}]",
        f"--work_dir={tmp_path / 'run'}",
    ]
    rows = build_dataset(load_config("configs/sana_config/tiny/Sana_tiny_img256.yaml", overrides))
    assert [rows.caption(i) for i in range(len(rows))] == [f"caption {i}" for i in range(6)]
    assert (rows.image(5) == load_picture(png(5), (256, 256))).all()


def test_score_columns(tmp_path):
    columns = {
        "VILA": ["v0", "v1"],
        "VILA_clip_score": [30.0, None],
        "prompt_clip_score": [20.0, 26.0],
        "source": ["x", "y"],
    }
    table(2, **columns).save_to_disk(tmp_path / "a")
    rows = HFDataset([tmp_path / "a"], Reading(frame=Frame(size=32), choice=CaptionChoice(threshold=25.0)))
    found = {(caption.kind, caption.text, caption.score) for caption in rows.captions(0)}
    assert found == {("prompt", "caption 0", 20.0), ("VILA", "v0", 30.0)}
    assert rows.caption(0) == "v0" and rows.caption(1) == "caption 1"
    good = HFDataset([tmp_path / "a"], Reading(frame=Frame(size=32), minimal_score=22.0))
    assert len(good) == 1 and good.captions(0)[0].text == "caption 1"


def test_captions_are_in_the_columns_order(tmp_path):
    """A set's order differs between processes: the same seed would draw another caption."""
    kinds = ["VILA", "b", "InternVL", "x", "a", "m", "k"]
    columns = {kind: [f"by {kind}"] for kind in kinds} | {f"{kind}_clip_score": [30.0] for kind in kinds}
    table(1, **columns).save_to_disk(tmp_path / "a")
    rows = HFDataset([tmp_path / "a"], 32)
    assert [caption.kind for caption in rows.captions(0)] == ["prompt", *kinds]


def test_bad_rows(tmp_path):
    rows = table(5).to_dict()
    rows["image"][1] = {"bytes": png(1)[:200], "path": None}  # the header is whole
    rows["image"][2] = {"bytes": b"nothing", "path": None}
    rows["image"][3] = None
    rows["text"][4] = " "
    broken = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image(decode=False))
    broken.cast_column("image", datasets.Image()).save_to_disk(tmp_path / "a")
    found = HFDataset([tmp_path / "a"], Reading(frame=BUCKETS, bad_limit=0.9))
    assert len(found) == 3
    assert [name.rpartition(" ")[2] for name in found.quarantine.reasons] == ["2", "3"]
    assert found.label(2).endswith("row 4")
    with pytest.raises(ValueError, match="cannot read the picture .*row 1"):
        found.image(1)
    with pytest.raises(ValueError, match="row 4 has only empty captions"):
        found.caption(2)


def test_columns_that_are_not_clear(tmp_path):
    table(2).rename_column("text", "words").save_to_disk(tmp_path / "a")
    with pytest.raises(ValueError, match="data.caption_column: .* It has image, words; got nothing"):
        HFDataset([tmp_path / "a"], 32)
    assert HFDataset([tmp_path / "a"], 32, caption_column="words").caption(1) == "caption 1"
    with pytest.raises(ValueError, match="data.image_column: .*got picture"):
        HFDataset([tmp_path / "a"], 32, image_column="picture", caption_column="words")
