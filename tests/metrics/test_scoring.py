"""The loop of all metrics: what it keeps, what it refuses, and that the division of the work does not show."""

import json
import os

import numpy as np
import pytest

from sana.metrics.image_set import ScoredImage, open_image, read_image_set
from sana.metrics.scoring import mean_by_category, score_images
from sana.utils import distributed
from tests.scorers import truncate, write_pictures

SETTINGS = {"metric": "brightness", "weights": "abc"}


class Brightness:
    """Scores with the mean of a picture; counts what it was asked for, and answers wrongly for one if told to."""

    def __init__(self, broken=None, value=float("nan")):
        self.seen, self.batches, self.broken, self.value = [], [], broken, value

    def __call__(self, items, pictures):
        self.seen += [item.name for item in items]
        self.batches.append(len(items))
        rows = []
        for item, picture in zip(items, pictures, strict=True):
            pixels = np.asarray(picture, dtype=np.float64)
            mean = self.value if item.name == self.broken else pixels.mean()
            rows.append({"mean": mean, "feature": pixels.mean((0, 1)), "size": list(picture.size)})
        return rows


@pytest.fixture
def items(tmp_path):
    return read_image_set(write_pictures(tmp_path / "set", 7))


def values(rows):
    return [(row["mean"], row["feature"].tolist(), row["size"]) for row in rows]


def test_rows_in_order_and_kept(items, tmp_path):
    scorer, again = Brightness(), Brightness()
    rows = score_images(items, scorer, tmp_path / "work", SETTINGS, batch_size=3)
    assert scorer.batches == [3, 3, 1]
    direct = Brightness()(items, [open_image(item.path) for item in items])
    assert [row["mean"] for row in rows] == [row["mean"] for row in direct]
    assert rows[0]["feature"].dtype == np.float32
    assert np.allclose(rows[3]["feature"], direct[3]["feature"], rtol=1e-6)
    kept = score_images(items, again, tmp_path / "work", SETTINGS, batch_size=3)
    assert again.seen == [] and values(kept) == values(rows)
    back = score_images(items[::-1][:4], again, tmp_path / "work", SETTINGS, batch_size=3)
    assert values(back) == values(rows)[::-1][:4], "rows belong to names, not to places"


def test_a_changed_picture_is_scored_again(items, tmp_path):
    score_images(items, Brightness(), tmp_path / "work", SETTINGS, batch_size=2)
    stat = items[4].path.stat()
    os.utime(items[4].path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    scorer = Brightness()
    score_images(items, scorer, tmp_path / "work", SETTINGS, batch_size=2)
    assert scorer.seen == [items[4].name, items[5].name], "its batch as a whole"
    changed = [*items[:6], ScoredImage(items[6].path, items[6].name, prompt="another", prompt_index=6)]
    scorer = Brightness()
    score_images(changed, scorer, tmp_path / "work", SETTINGS, batch_size=2)
    assert scorer.seen == [items[6].name], "a score belongs to a picture with its prompt"


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), {"deep": [1.0, float("nan")]}, np.array([0, np.nan])]
)
def test_what_is_not_finite_is_named_and_the_rest_kept(items, tmp_path, value):
    scorer = Brightness(broken="id4.png", value=value)
    with pytest.raises(ValueError, match=r"id4\.png: its mean is not finite"):
        score_images(items, scorer, tmp_path / "work", SETTINGS, batch_size=3)
    scorer = Brightness()
    rows = score_images(items, scorer, tmp_path / "work", SETTINGS, batch_size=3)
    assert scorer.batches == [3, 1] and "id0.png" not in scorer.seen
    assert values(rows) == values(score_images(items, Brightness(), tmp_path / "new", SETTINGS, batch_size=3))


def test_a_broken_picture_is_named_and_the_rest_kept(items, tmp_path):
    whole = items[5].path.read_bytes()
    truncate(items[5].path)
    with pytest.raises(ValueError, match=r"id5\.png: cannot be read as a picture"):
        score_images(items, Brightness(), tmp_path / "work", SETTINGS, batch_size=2)
    items[5].path.write_bytes(whole)
    scorer = Brightness()
    score_images(items, scorer, tmp_path / "work", SETTINGS, batch_size=2)
    assert scorer.seen == ["id4.png", "id5.png", "id6.png"]


def test_other_settings_are_refused(items, tmp_path):
    score_images(items, Brightness(), tmp_path / "work", SETTINGS, batch_size=2)
    with pytest.raises(ValueError, match=r"other settings: weights 'abc' \(now 'def'\)"):
        score_images(items, Brightness(), tmp_path / "work", SETTINGS | {"weights": "def"}, batch_size=2)
    scorer = Brightness()
    score_images(items, scorer, tmp_path / "work", SETTINGS, batch_size=3)
    assert scorer.seen == [], "after a lack of memory a run may go on with smaller batches"
    (tmp_path / "work/settings.json").unlink()
    with pytest.raises(ValueError, match="a manifest that is not of scores"):
        score_images(items, Brightness(), tmp_path / "work", SETTINGS, batch_size=2)


def test_a_line_cut_short_is_scored_again(items, tmp_path):
    """What a kill leaves behind."""
    rows = score_images(items, Brightness(), tmp_path / "work", SETTINGS, batch_size=1)
    path = tmp_path / "work/manifest.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    scorer = Brightness()
    assert values(score_images(items, scorer, tmp_path / "work", SETTINGS, batch_size=1)) == values(rows)
    assert scorer.seen == ["id6.png"]


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_divide_the_work(items, tmp_path, monkeypatch, processes):
    """Without starting them: each does its share of the batches, and the last to come finds all rows."""
    alone = score_images(items, Brightness(), tmp_path / "alone", SETTINGS, batch_size=2)
    monkeypatch.setattr(distributed, "world_size", lambda: processes)
    monkeypatch.setattr(distributed, "barrier", lambda: None)
    seen = []
    for rank in reversed(range(processes)):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        scorer = Brightness()
        try:
            rows = score_images(items, scorer, tmp_path / "work", SETTINGS, batch_size=2)
        except KeyError:
            assert rank > 0, "rows of processes that were not yet there"
        seen.append(scorer.seen)
    assert values(rows) == values(alone)
    batches = [[item.name for item in items[start : start + 2]] for start in range(0, 7, 2)]
    assert seen[::-1] == [sum(batches[rank::processes], []) for rank in range(processes)]
    lines = (tmp_path / "work/manifest.jsonl").read_text().splitlines()
    assert [json.loads(line)["file"] for line in lines] == [item.name for item in items]


def test_mean_by_category(items):
    named = [ScoredImage(item.path, item.name, category="ba"[place % 2]) for place, item in enumerate(items)]
    assert list(mean_by_category(named, [1, 2, 3, 4, 5, 6, 7.5]).items()) == [("a", 4.0), ("b", 4.125)]
    assert mean_by_category(items, [0.0] * 7) == {}
