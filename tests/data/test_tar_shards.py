"""Tar shards as the webdataset library writes them, and as accidents leave them."""

import io
import json
import os
import pickle
import random
import shutil
import tarfile

import numpy as np
import pytest
import webdataset
from PIL import Image
from webdataset.tariterators import group_by_keys, tar_file_iterator

from sana.data.buckets import Frame, load_picture
from sana.data.pictures import Reading
from sana.data.tar_shards import TarShards, entry_ranges
from sana.resolution import TABLES

BUCKETS = Frame(size=256, table=TABLES["ASPECT_RATIO_256"], table_name="ASPECT_RATIO_256", multiple=32)


def picture(seed, size=(64, 48), kind="PNG", exif=None):
    """Bytes of a picture of noise, (width, height) `size`."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **({"exif": exif} if exif else {}))
    return buffer.getvalue()


def write(folder, name, samples):
    """A shard of webdataset samples."""
    with webdataset.TarWriter(str(folder / name)) as writer:
        for sample in samples:
            writer.write(sample)


def sample(key, seed=0, size=(64, 48), extension="png", prompt="a thing", **described):
    return {
        "__key__": key,
        extension: picture(seed, size, "JPEG" if extension == "jpg" else "PNG"),
        "json": {"prompt": prompt, "width": size[0], "height": size[1]} | described,
    }


def test_every_sample_of_every_shard_by_number(tmp_path):
    for shard in range(3):
        write(
            tmp_path,
            f"{shard:05d}.tar",
            [sample(f"{shard}{i}", 10 * shard + i, prompt=f"{shard}{i}") for i in range(4)],
        )
    shards = TarShards([tmp_path], 32)
    assert len(shards) == 12 and shards.label(5) == f"{tmp_path}/00001.tar/11.png"
    for index in random.Random(0).sample(range(12), 12):
        shard, number = divmod(index, 4)
        assert shards.caption(index) == f"{shard}{number}"
        expected = load_picture(picture(10 * shard + number), (32, 32))
        assert (shards.image(index) == expected).all()
    # What the library reads itself, in its order.
    read = []
    for path in shards.shards:
        with open(path, "rb") as handle:
            members = ({"__url__": "", **member} for member in tar_file_iterator(handle))
            read += [json.loads(found["json"])["prompt"] for found in group_by_keys(members)]
    assert read == [shards.caption(i) for i in range(12)]


def test_buckets_come_from_json_or_from_the_header(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6  # shown on its side
    samples = [
        sample("a", size=(64, 32)),
        {"__key__": "b", "jpg": picture(1, (32, 64), "JPEG"), "txt": "tall\nsecond line"},
        {"__key__": "c", "jpg": picture(1, (64, 32), "JPEG", turned), "json": {"prompt": "turned"}},
    ]
    write(tmp_path, "0.tar", samples)
    shards = TarShards([tmp_path], Reading(frame=BUCKETS))
    # 176 x 352 and 352 x 176 in the table, to multiples of 32: half of 11 rounds to the even 6, 11 stays.
    assert [shards.size(i) for i in range(3)] == [(192, 352), (352, 192), (352, 192)]
    assert [tuple(shards.image(i).shape[1:]) for i in range(3)] == [shards.size(i) for i in range(3)]
    assert shards.caption(1) == "tall"


def test_sidecars_beside_the_shard(tmp_path):
    write(
        tmp_path,
        "00000.tar",
        [sample(key, prompt=f"own {key}", VILA=f"VILA {key}", url="x") for key in "abc"],
    )
    (tmp_path / "00000_InternVL.json").write_text(
        json.dumps({"c": {"InternVL": "ü c"}, "a": {"InternVL": "a"}})
    )
    scores = {"a": {"InternVL": "30.0"}, "b": {"VILA": 28.5}}
    (tmp_path / "00000_score.json").write_text(json.dumps(scores))
    (tmp_path / "00000_prompt_clip_score.json").write_text(
        json.dumps({"a": {"prompt": "10"}, "c": {"prompt": 30}})
    )
    reading = Reading(
        frame=Frame(size=32),
        caption_suffixes=("_InternVL", "_nobody"),
        score_suffixes=("_score", "_prompt_clip_score"),
    )
    shards = TarShards([tmp_path], reading)
    found = [{(c.kind, c.text, c.score) for c in shards.captions(i)} for i in range(3)]
    assert found[0] == {("prompt", "own a", 10.0), ("InternVL", "a", 30.0)}
    assert found[1] == {("prompt", "own b", None), ("VILA", "VILA b", 28.5)}
    assert found[2] == {("prompt", "own c", 30.0), ("InternVL", "ü c", None)}
    assert {shards.caption(1, epoch) for epoch in range(9)} == {"VILA b"}
    good = TarShards([tmp_path], Reading(frame=Frame(size=32), minimal_score=22.0))
    assert [good.captions(i)[0].text for i in range(len(good))] == ["own b", "own c"], "no score: kept"
    assert good.name != TarShards([tmp_path], 32).name
    (tmp_path / "00000_InternVL.json").write_text('{"a": {"InternVL": "x"}')
    with pytest.raises(ValueError, match="00000_InternVL.json is not a JSON object"):
        TarShards([tmp_path], reading)


def test_high_quality_only(tmp_path):
    write(tmp_path, "0.tar", [sample("a", version="high_quality"), sample("b"), sample("c", version="low")])
    assert len(TarShards([tmp_path], Reading(frame=Frame(size=32), hq_only=True))) == 1


def test_wids_meta_lists_the_shards(tmp_path):
    for number in (2, 10, 1):
        write(tmp_path, f"{number}.tar", [sample("a", prompt=str(number))])
    listed = [{"url": f"{number}.tar", "nsamples": 1, "filesize": 1} for number in (10, 2)]
    meta = {"name": "x", "__kind__": "SANA-WebDataset", "wids_version": 1, "shardlist": listed}
    (tmp_path / "wids-meta.json").write_text(json.dumps(meta))
    shards = TarShards([tmp_path], 32)
    assert [shards.caption(i) for i in range(len(shards))] == ["10", "2"]
    shards = TarShards([tmp_path], 32, sort_shards=True)
    assert [shards.caption(i) for i in range(len(shards))] == ["2", "10"]
    meta["shardlist"] = [{"url": "2.tar", "nsamples": 7}]
    (tmp_path / "wids-meta.json").write_text(json.dumps(meta))
    assert list(TarShards([tmp_path], 32).quarantine.reasons.values()) == [
        "wids-meta.json promises 7 samples, 1 are there"
    ]
    meta["shardlist"] = [{"url": "3.tar", "nsamples": 1}]
    (tmp_path / "wids-meta.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match="names 3.tar, and there is no such file"):
        TarShards([tmp_path], 32)
    (tmp_path / "wids-meta.json").write_text("{}")
    with pytest.raises(ValueError, match='has no "shardlist"'):
        TarShards([tmp_path], 32)


def test_the_index_is_kept_and_renewed(tmp_path, caplog):
    caplog.set_level("INFO", "sana")
    write(tmp_path, "0.tar", [sample("a")])
    index, first = tmp_path / "0.tar.index.json", TarShards([tmp_path], 32)
    assert caplog.text.count("indexing") == 1 and index.is_file()
    again = TarShards([tmp_path], 32)
    assert caplog.text.count("indexing") == 1 and again.name == first.name
    index.write_text(index.read_text()[:40])
    TarShards([tmp_path], 32)
    assert caplog.text.count("indexing") == 2, "a broken index is built anew"
    write(tmp_path, "0.tar", [sample("a"), sample("b")])
    changed = TarShards([tmp_path], 32)
    assert len(changed) == 2 and changed.name != first.name


def test_a_folder_that_cannot_be_written_is_indexed_elsewhere(tmp_path, monkeypatch):
    data, elsewhere = tmp_path / "data", tmp_path / "index"
    data.mkdir()
    write(data, "0.tar", [sample("a")])
    from sana.data import pictures

    def refuse(path, content):
        if path.parent == data:
            raise PermissionError(f"cannot write {path}")
        return write_atomic(path, content)

    write_atomic = pictures.write_atomic
    monkeypatch.setattr(pictures, "write_atomic", refuse)
    assert len(TarShards([data], Reading(frame=Frame(size=32), index_dir=elsewhere))) == 1
    assert os.listdir(data) == ["0.tar"] and len(os.listdir(elsewhere)) == 1
    assert len(TarShards([data], 32)) == 1, "nowhere to write: built each time"


def broken_folder(tmp_path, keys="abcdef"):
    """Shard 0 whole, shard 1 for the test to damage."""
    for number in (0, 1):
        write(tmp_path, f"{number}.tar", [sample(key, seed, (256, 256)) for seed, key in enumerate(keys)])
    return tmp_path / "1.tar"


@pytest.mark.parametrize("frame", [Frame(size=32), BUCKETS], ids=["squares", "buckets"])
def test_a_truncated_shard_loses_what_is_cut(tmp_path, frame):
    path = broken_folder(tmp_path)
    with tarfile.open(path) as archive:
        cut = archive.getmember("e.png").offset_data + 1000
    os.truncate(path, cut)
    reading = Reading(frame=frame, bad_limit=0.5, bad_file=tmp_path / "bad.jsonl")
    shards = TarShards([tmp_path], reading)
    assert len(shards) == 10 and all(shards.image(i).isfinite().all() for i in range(10))
    named = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert {line["sample"] for line in named} == {str(path), f"{path}/e.png"}
    assert "the shard ends inside e.png" in (tmp_path / "bad.jsonl").read_text()
    with pytest.raises(ValueError, match="2 samples cannot be read, more than the 1 .*data.bad_sample_limit"):
        TarShards([tmp_path], Reading(frame=frame))


def test_a_broken_header_is_seen_though_tarfile_stops_in_silence(tmp_path):
    path = broken_folder(tmp_path)
    with tarfile.open(path) as archive:
        offset = archive.getmember("d.json").offset
    with open(path, "r+b") as handle:
        handle.seek(offset)
        handle.write(b"\x01" * 512)
    shards = TarShards([tmp_path], Reading(frame=Frame(size=32), bad_limit=0.5))
    assert len(shards) >= 9 and any(f"1.tar/@{offset}" in name for name in shards.quarantine.reasons)


@pytest.mark.parametrize("content", [b"", b"not a tar" * 200], ids=["empty", "other"])
def test_a_file_that_is_no_tar(tmp_path, content):
    broken_folder(tmp_path).write_bytes(content)
    shards = TarShards([tmp_path], Reading(frame=Frame(size=32), bad_limit=0.5))
    assert len(shards) == 6 and list(shards.quarantine.reasons) == [str(tmp_path / "1.tar")]


def test_bad_members_are_named(tmp_path):
    good = sample("a")
    samples = [
        good,
        {"__key__": "b", "png": picture(1)[:300], "json": {"prompt": "cut", "height": 48, "width": 64}},
        {"__key__": "c", "png": b"nothing", "json": {"prompt": "no picture"}},
        {"__key__": "d", "npy": np.zeros(3)},
        {"__key__": "e", "png": picture(1), "json": {"prompt": "", "height": 48, "width": 64}},
    ]
    write(tmp_path, "0.tar", samples)
    shards = TarShards([tmp_path], Reading(frame=Frame(size=32), bad_limit=0.9))
    assert [shards.label(i).rpartition("/")[2] for i in range(len(shards))] == ["a.png", "b.png", "e.png"]
    reasons = {name.rpartition("/")[2]: reason for name, reason in shards.quarantine.reasons.items()}
    assert set(reasons) == {"c.png", "d"} and reasons["d"].startswith("has no picture")
    with pytest.raises(ValueError, match="cannot read the picture .*0.tar/b.png"):
        shards.image(1)
    with pytest.raises(ValueError, match="e.png has only empty captions .prompt."):
        shards.caption(2)


def test_a_shard_cut_after_indexing_is_a_bad_sample_not_a_crash(tmp_path):
    path = broken_folder(tmp_path)
    shards = TarShards([tmp_path], 32)
    os.truncate(path, 2000)
    with pytest.raises(ValueError, match="1.tar ends .* bytes early"):
        shards.image(11)


def test_a_data_set_travels_to_spawned_workers(tmp_path):
    write(tmp_path, "0.tar", [sample("a"), sample("b", prompt="second")])
    (tmp_path / "0_x.json").write_text('{"b": {"x": "from x"}}')
    shards = TarShards([tmp_path], Reading(frame=BUCKETS, caption_suffixes=("_x",)))
    copy = pickle.loads(pickle.dumps(shards))  # noqa: S301 our own
    assert [c.text for c in copy.captions(1)] == ["second", "from x"] and copy.size(0) == shards.size(0)


def test_a_missing_folder_is_named(tmp_path):
    shutil.rmtree(tmp_path)
    with pytest.raises(ValueError, match="no such folder of tar shards"):
        TarShards([tmp_path], 32)


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        " {\n} ",
        '{"a": {"b": "}{"}, "ü\\u00e9\\"": [1, 2], "n": 3}',
        '\ufeff{ "x" :\t"\\\\" , "y": null}',
    ],
)
def test_entry_ranges_are_those_of_the_file(text):
    content = text.encode("utf-8")
    ranges = entry_ranges(content)
    values = {key: json.loads(content[start : start + length]) for key, (start, length) in ranges.items()}
    assert values == json.loads(text.removeprefix("\ufeff"))


@pytest.mark.parametrize("text", ["", "[]", '{"a": 1', '{"a" 1}', '{"a": 1 "b": 2}', '{"a": }'])
def test_entry_ranges_of_what_is_no_object(text):
    with pytest.raises(ValueError):
        entry_ranges(text.encode())
