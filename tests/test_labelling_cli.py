"""From a folder of pictures to training: scripts/caption_images.py, scripts/score_captions.py, the draw by score."""

import io
import json
import logging
import os
import runpy
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image
from safetensors.torch import load_file, save_file

from sana.config import load_config
from sana.data.build import build_dataset
from sana.metrics.clip_score import ClipScore
from sana.models.captioner import Captioner
from tests.labellers import write_captioner, write_clip

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("Kind.A-1B", "Kind.B-2B")):
        write_captioner(folder / name, seed)
    write_clip(folder / "clip")
    return folder


@pytest.fixture
def call(monkeypatch, capsys):
    """(exit status, output, errors) of a script, run in this process: loading torch anew for each takes seconds."""

    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        monkeypatch.chdir(ROOT)
        capsys.readouterr()  # only what the script says
        logger, status = logging.getLogger("sana"), 0
        try:
            runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")
        except SystemExit as end:
            status = end.code
        logger.handlers.clear()  # this one writes to what stderr is now
        output = capsys.readouterr()
        return status, output.out, output.err

    return run


def write_pictures(folder, count=6):
    """Noise in several shapes, with own captions; one picture is broken."""
    folder.mkdir(exist_ok=True)
    for number in range(count):
        noise = np.random.default_rng(number).normal(128, 60 + 20 * number, (48, 40 + 8 * number))
        Image.fromarray(noise.clip(0, 255).astype(np.uint8)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(
            f"noise {number}" if number else "noise of the smallest picture"
        )
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / "broken.txt").write_text("nothing")


def pasted(output, tmp_path):
    """The config of a training, with the lines that a script has printed."""
    (tmp_path / "run.yaml").write_text(
        f"base: {ROOT}/configs/sana_config/base.yaml\n{output[output.index('data:') :]}"
    )
    return [f"--work_dir={tmp_path / 'run'}", "--model.multi_scale=false", "--data.bad_sample_limit=0.5"]


def test_from_pictures_to_the_draw_by_score(models, call, tmp_path):
    folder = tmp_path / "pictures"
    write_pictures(folder)
    two = ("--model", models / "Kind.A-1B", "--model", models / "Kind.B-2B")
    arguments = (*two, "--max_new_tokens=6", "--batch_size=4", "--prompt=What?")
    status, output, errors = call("caption_images.py", folder, *arguments)
    assert status == 0, errors
    assert "Kind.A-1B: 6 written, 0 kept, 1 pictures left out" in output
    assert errors.count("broken.png: cannot read the picture") == 2

    status, output, errors = call("score_captions.py", folder, "--model", models / "clip")
    assert status == 0 and "18 written, 0 kept, 1 pictures left out" in output, errors
    assert "1 captions are longer than the 16 tokens that count" in errors

    overrides = pasted(output, tmp_path)
    config = load_config(tmp_path / "run.yaml", [*overrides, "--data.clip_thr=-100"])
    samples = build_dataset(config)
    captioner = Captioner.from_pretrained(
        models / "Kind.B-2B", prompt="What?", max_new_tokens=6, dtype=torch.float32
    )
    clip = ClipScore.from_pretrained(models / "clip")
    for index in range(6):
        picture = Image.open(folder / f"{index}.png")
        found = {caption.kind: caption for caption in samples.captions(index)}
        assert set(found) == {"prompt", "Kind.A-1B", "Kind.B-2B"}
        assert found["Kind.B-2B"].text == captioner.describe([picture.convert("RGB")])[0]
        for caption in found.values():
            assert caption.score == pytest.approx(float(clip.score([picture], [caption.text])), abs=2e-3)

    # exp(s / T) of the scores as they were written, over 2000 epochs.
    overrides += [
        "--data.caption_selection_type=softmax",
        "--data.clip_thr=-100",
        "--data.clip_thr_temperature=60",
    ]
    samples = build_dataset(load_config(tmp_path / "run.yaml", overrides))
    captions = samples.captions(0)
    weights = torch.tensor([caption.score / 60 for caption in captions]).double().softmax(0).tolist()
    drawn = Counter(samples.caption(0, epoch) for epoch in range(2000))
    square = sum((drawn[c.text] - 2000 * w) ** 2 / (2000 * w) for c, w in zip(captions, weights, strict=True))
    # 2 degrees of freedom: one in 1000 is larger than 13.8; seeds are fixed.
    assert min(weights) > 0.02 and square < 13.8

    (folder / "broken.png").unlink()
    status, output, errors = call("caption_images.py", folder, *two)
    assert status == 0 and output.count("0 written, 6 kept") == 2
    assert "Loading weights" not in errors, "no model is needed where nothing is missing"


def test_wrong_input_is_one_line(models, call, tmp_path):
    folder, empty = tmp_path / "pictures", tmp_path / "empty"
    write_pictures(folder, 2)
    empty.mkdir()
    model, clip = models / "Kind.A-1B", models / "clip"
    broken = tmp_path / "broken"
    write_captioner(broken)
    state = load_file(broken / "model.safetensors")
    state.popitem()
    save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
    for path in folder.glob("*.txt"):
        path.unlink()
    cases = (
        ("caption_images.py", (empty, "--model", model), "no picture"),
        ("caption_images.py", (folder / "no", "--model", model), "no such folder"),
        ("caption_images.py", (folder, "--model", tmp_path / "no"), "no such file or folder"),
        ("caption_images.py", (folder, "--model", ROOT / "asset/sana_tiny/text_encoder"), "vision-language"),
        ("caption_images.py", (folder, "--model", broken), "lacks 1 weights"),
        ("caption_images.py", (folder, "--model", model, "--kind", "a", "b"), "one name for each --model"),
        ("caption_images.py", (folder, "--model", model, "--kind", "prompt"), "is no name for a kind"),
        ("caption_images.py", (folder, "--model", model, "--dtype", "int8"), "unknown dtype"),
        ("score_captions.py", (folder, "--model", clip), "no picture has a caption"),
        ("score_captions.py", (empty, "--model", clip), "no picture"),
    )
    for script, arguments, message in cases:
        status, output, errors = call(script, *arguments)
        lines = [line for line in errors.splitlines() if "error:" in line]
        assert (status, output) == (2, ""), (arguments, errors)
        assert len(lines) == 1 and message in lines[0], (arguments, errors)
    assert not list(folder.glob("*.json"))


@pytest.mark.slow
def test_two_processes_share_the_shards(models, call, tmp_path):
    """Each labels every other sample, also of one shard; the sidecars are those of one process."""
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        with webdataset.TarWriter(str(folder / "0.tar")) as writer:
            for number in range(7):
                content = io.BytesIO()
                image = Image.radial_gradient("L").point(lambda value, n=number: value * n // 7)
                image.resize((32, 32)).save(content, "PNG")
                writer.write({"__key__": f"{number}", "png": content.getvalue(), "txt": f"picture {number}"})
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    for script, *arguments in (
        ("caption_images.py", "--model", models / "Kind.A-1B", "--max_new_tokens=6", "--batch_size=1"),
        ("score_captions.py", "--model", models / "clip", "--batch_size=1"),
    ):
        status, expected, errors = call(script, tmp_path / "one", *arguments)
        assert status == 0, errors
        words = [*torchrun, f"scripts/{script}", tmp_path / "two", *arguments]
        result = subprocess.run(
            list(map(str, words)),
            cwd=ROOT,
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert result.returncode == 0, result.stderr
        assert result.stdout == expected.replace(str(tmp_path / "one"), str(tmp_path / "two")), "printed once"
    for suffix in ("_Kind.A-1B", "_prompt_clip_score", "_Kind.A-1B_clip_score"):
        one, two = (json.loads((tmp_path / name / f"0{suffix}.json").read_text()) for name in ("one", "two"))
        assert one == two and len(one) == 7
    assert not list(tmp_path.rglob("*.part"))
