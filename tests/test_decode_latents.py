"""scripts/decode_latents.py: from the file of latents to the picture that would have been, and scripts/bench_decode.py."""

import json
import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sana.models.autoencoder import Autoencoder
from sana.runtime.latents import Picture, latents_path, load_latents, save_latents
from sana.utils import images
from sana.utils.manifest import Manifest
from tests.factories import make_autoencoder

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a script in this process, where the libraries are loaded; returns (stdout, stderr)."""

    def call(script, *arguments, status=0):
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        ended, message = 0, ""
        try:
            runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")
        except SystemExit as end:  # with a text the interpreter prints it and ends with status 1
            ended, message = (1, end.code) if isinstance(end.code, str) else (end.code or 0, "")
        output = capsys.readouterr()
        assert ended == status, output.err + message
        return SimpleNamespace(out=output.out, err=output.err + message)

    return call


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("autoencoder")
    Autoencoder(make_autoencoder()).save_pretrained(folder)
    return folder


def save(path, autoencoder, **changes):
    """A file of latents beside the image file `path`; returns the latents."""
    latents = torch.randn(1, 32, 2, 3, generator=torch.Generator().manual_seed(0))
    values = {
        "size": (60, 90),
        "autoencoder": str(autoencoder),
        "dtype": "float32",
        "text": {"prompt": "ein Bär"},
    }
    save_latents(latents_path(path), latents, Picture(file=path.name, **values | changes))
    return latents


def test_a_picture_is_finished(run, autoencoder, tmp_path):
    png, jpg = tmp_path / "run" / "a.png", tmp_path / "run" / "part" / "b.jpg"
    latents = save(png, autoencoder)
    save(jpg, autoencoder, row={"file": "part/b.jpg", "seed": 3}, jpeg_quality=90)
    with Manifest(tmp_path / "run").part(0) as part:
        part.add({"file": "part/b.jpg", "seed": 3, "error": "out of memory"})
    answer = run("decode_latents.py", latents_path(png), latents_path(jpg))
    assert answer.out.splitlines() == [str(png), str(jpg)]
    with torch.no_grad():
        pixels = Autoencoder.from_pretrained(autoencoder).decode(latents)
    [expected] = images.to_pil(images.cover(pixels, 60, 90))
    picture = images.load(png)
    assert picture.size == (90, 60) and picture.text == {"prompt": "ein Bär"}
    difference = np.asarray(picture).astype(int) - np.asarray(
        expected
    )  # another number of threads, another sum
    assert abs(difference).max() <= 1
    assert jpg.read_bytes().startswith(b"\xff\xd8\xff")
    assert Manifest(tmp_path / "run").rows() == {"part/b.jpg": {"file": "part/b.jpg", "seed": 3}}
    assert not list(tmp_path.rglob("*.safetensors"))


def test_other_settings_come_before_the_file_s(run, autoencoder, tmp_path):
    latents = save(tmp_path / "a.png", tmp_path / "lost", dtype="bfloat16")
    path = latents_path(tmp_path / "a.png")
    answer = run("decode_latents.py", path, status=2)
    assert "lost" in answer.err and len(answer.err.splitlines()) == 1
    run("decode_latents.py", path, "--autoencoder", autoencoder, "--dtype=fp32", "--tile=64", "--keep")
    assert torch.equal(load_latents(path)[0], latents)
    assert images.load(tmp_path / "a.png").size == (90, 60)


def test_a_bad_file_stops_before_anything_is_decoded(run, autoencoder, tmp_path):
    save(tmp_path / "a.png", autoencoder)
    (tmp_path / "b").write_bytes(b"no")
    answer = run("decode_latents.py", latents_path(tmp_path / "a.png"), tmp_path / "b", status=2)
    assert "b is no file of latents" in answer.err and len(answer.err.splitlines()) == 1
    assert not (tmp_path / "a.png").exists()


def test_bench_refuses_what_it_cannot_measure(run):
    assert "multiples of 32, got 100 x 100" in run("bench_decode.py", "--size=100", status=2).err
    assert "such as 12GiB" in run("bench_decode.py", "--max_rss=12MB", status=2).err


@pytest.mark.slow
def test_bench_measures(run, tmp_path):
    speed, memory = tmp_path / "speed.json", tmp_path / "memory.json"
    run("bench_decode.py", "--size=32", "--width=64", "--dtype=bf16", "--repeats=1", f"--output={speed}")
    values = json.loads(speed.read_text())["values"]
    assert values["ratio"] == pytest.approx(values["diffusers_seconds"] / values["sana_seconds"])
    answer = run("bench_decode.py", "--size=32", "--max_rss=0.1GiB", f"--output={memory}", status=1)
    assert "more than 0.10 GiB" in answer.err
    assert json.loads(memory.read_text())["values"]["peak_bytes"] > 0.3 * 2**30  # the weights alone
    assert re.search(r"peak_bytes +\d\.\d\d GiB", answer.out)
