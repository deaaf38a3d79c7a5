"""Real files, broken in the ways that files break, read by two loader processes: each is named, none ends or hangs the run."""

import io
import json
import os
import signal
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from sana.data.buckets import Frame
from sana.data.image_folder import ImageFolder
from sana.data.loader import batches
from sana.data.order import Order
from sana.data.pictures import Pictures, Reading
from sana.data.tar_shards import TarShards

COUNT, BATCH = 16, 4


def picture(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (48, 48, 3), dtype=np.uint8)).save(
        buffer, "PNG"
    )
    return buffer.getvalue()


def reading(folder: Path) -> Reading:
    bad = {"bad_limit": 0.5, "bad_file": folder / "run" / "bad.jsonl"}
    return Reading(frame=Frame(size=32), score_suffixes=("_score",), **bad)


def broken_folder(folder: Path) -> tuple[Pictures, set[str]]:
    """Pictures, and the names of those of which something is broken."""
    for number in range(COUNT):
        (folder / f"{number:02}.png").write_bytes(picture(number))
        (folder / f"{number:02}.txt").write_text(f"picture {number}")
    (folder / "03.png").write_bytes(picture(3)[:400])
    (folder / "05.png").write_bytes(b"not a picture")
    (folder / "07.txt").write_text(" \n")
    (folder / "09.txt").write_bytes(b"\xff\xfe\xfa no text")
    (folder / "11_score.json").write_text('{"11": {"prompt": ')
    (folder / "13.txt").unlink()
    return ImageFolder([folder], reading(folder)), {f"{number:02}.png" for number in (3, 5, 7, 9, 11, 13)}


def broken_shard(folder: Path) -> tuple[Pictures, set[str]]:
    """The same of a shard, whose end is lost after it was indexed."""
    with webdataset.TarWriter(str(folder / "0.tar")) as writer:
        for number in range(COUNT):
            content = {3: picture(3)[:400]}.get(number, picture(number))
            text = {7: "", 9: b"\xff\xfe\xfa"}.get(number, f"picture {number}")
            writer.write({"__key__": f"{number:02}", "png": content, "txt": text})
    with tarfile.open(folder / "0.tar") as archive:
        end = archive.getmember("14.png").offset_data + 300
    shards = TarShards([folder], reading(folder))
    os.truncate(folder / "0.tar", end)
    return shards, {f"{number:02}.png" for number in (3, 7, 9, 14, 15)}


@pytest.fixture
def soon():
    """A hung worker is an error after a minute, not a hung test."""

    def late(*_):
        raise TimeoutError("a worker hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker")  # on a machine with one core
@pytest.mark.parametrize("build", [broken_folder, broken_shard])
def test_two_workers_go_on_and_name_what_is_broken(tmp_path, soon, build):
    samples, broken = build(tmp_path)
    order = Order.of(samples, batch_size=BATCH, seed=0)
    own = batches(samples, order, first_step=0, accumulation=1, rank=0, world_size=1, num_workers=2)
    shown, replaced = set(), {}
    for _ in range(2 * order.steps_per_epoch):
        batch = next(own)
        assert batch.pixels.isfinite().all() and all(batch.captions)
        shown.update(index for _, index in batch.samples)
        replaced |= batch.replaced
    assert shown == set(range(COUNT)), "every place of the order is filled"
    assert {samples.label(index).rpartition("/")[2] for index in replaced} == broken
    named = [json.loads(line)["sample"] for line in (tmp_path / "run" / "bad.jsonl").read_text().splitlines()]
    assert {name.rpartition("/")[2] for name in named} == broken
