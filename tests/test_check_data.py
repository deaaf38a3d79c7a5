"""scripts/check_data.py says what a folder holds, before a GPU is used."""

import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
import webdataset
from PIL import Image

from sana.config import load_config
from sana.data.build import BAD_SAMPLES, build_dataset, detected_type
from sana.data.captions import CaptionChoice
from sana.data.check import inspect
from sana.data.order import Order

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "asset/example_data"


def check(tmp_path, *arguments):
    """(exit status, output, errors) of the script."""
    command = [
        sys.executable,
        "scripts/check_data.py",
        *map(str, arguments),
        f"--work_dir={tmp_path / 'run'}",
    ]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return result.returncode, result.stdout, result.stderr


def rows(output):
    """Size -> (samples, batches, repeats)."""
    found = re.findall(r"^ *(\d+) x (\d+) +(\d+) +(\d+) +(\d+)$", output, re.MULTILINE)
    return {(int(h), int(w)): tuple(map(int, rest)) for h, w, *rest in found}


def test_the_example_data(tmp_path):
    status, output, errors = check(
        tmp_path, EXAMPLE, "--model.image_size=512", "--train.train_batch_size=2", "--np=2"
    )
    assert status == 0, errors
    assert "SanaImgDataset, 10 samples, 0 bad" in output
    assert rows(output) == {
        (416, 608): (4, 1, 0),
        (480, 544): (1, 1, 3),
        (512, 512): (4, 1, 0),
        (608, 416): (1, 1, 3),
    }
    assert "an epoch: 4 steps; on each of 2 processes 4 batches of 2; 6 of 16 places are repeats" in output
    drawn = dict(re.findall(r"^ +(\S+) +10 .* ([\d.]+)%$", output, re.MULTILINE))
    assert set(drawn) == {"prompt", "InternVL2-26B", "VILA1-5-13B"}
    assert sum(map(float, drawn.values())) == pytest.approx(100, abs=0.2)
    assert not list((tmp_path / "run").glob(BAD_SAMPLES))


def damaged(folder):
    """Ten pictures in two sizes: one cut, one no picture, one without a caption."""
    for number in range(10):
        size = (64, 32) if number < 5 else (32, 32)
        Image.effect_noise(size, 50).convert("RGB").save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"noise number {number}")
    whole = (folder / "1.png").read_bytes()
    (folder / "1.png").write_bytes(whole[: len(whole) // 2])
    (folder / "6.png").write_bytes(b"no picture")
    (folder / "7.txt").write_text("\n")


def test_what_cannot_be_read_is_named(tmp_path):
    damaged(tmp_path)
    settings = ("--model.image_size=256", "--train.train_batch_size=3")
    status, output, errors = check(tmp_path, tmp_path, *settings)
    assert status == 1 and "3 samples cannot be read; data.bad_sample_limit=0.01 allows 1" in errors
    assert "9 samples, 3 bad" in output and rows(output) == {(192, 352): (5, 2, 1), (256, 256): (4, 2, 2)}
    for name, reason in (("1.png", "cannot read"), ("6.png", "cannot read"), ("7.png", "has only empty")):
        assert re.search(rf"^  .*{name}: .*{reason}", output, re.MULTILINE), output
    status, output, _ = check(
        tmp_path, tmp_path, *settings, "--data.bad_sample_limit=0.3", "--quick", "--show=1"
    )
    assert status == 0 and "2 bad" in output and "and 1 more" in output, "--quick reads headers and captions"


def test_the_same_samples_are_bad_in_training(tmp_path):
    damaged(tmp_path)
    overrides = ["--data.type=SanaImgDataset", f"--data.data_dir=[{tmp_path}]", "--model.multi_scale=false"]
    overrides += ["--data.bad_sample_limit=0.5", f"--work_dir={tmp_path / 'run'}"]
    samples = build_dataset(load_config("configs/sana_config/tiny/Sana_tiny_img256.yaml", overrides))
    order = Order.of(samples, batch_size=4, seed=0)
    report = inspect(samples, order, CaptionChoice())
    assert {Path(label).name for label in report.bad} == {"1.png", "6.png", "7.png"}
    assert report.steps == order.steps_per_epoch == 3


def test_the_kind_of_data_is_seen_from_the_folder(tmp_path):
    assert detected_type(EXAMPLE) == "SanaImgDataset"
    picture = io.BytesIO()
    Image.new("RGB", (64, 64)).save(picture, "PNG")
    with webdataset.TarWriter(str(tmp_path / "0.tar")) as writer:
        writer.write({"__key__": "a", "png": picture.getvalue(), "txt": "a black square"})
    assert detected_type(tmp_path) == "SanaWebDatasetMS"
    status, output, errors = check(tmp_path, tmp_path, "--model.image_size=256", "--train.train_batch_size=1")
    assert status == 0 and "SanaWebDatasetMS, 1 samples, 0 bad" in output, errors


def test_wrong_folders_are_one_line(tmp_path):
    status, output, errors = check(tmp_path, tmp_path / "nowhere")
    assert (status, output) == (2, "") and len(errors.splitlines()) == 1 and "no such folder" in errors
