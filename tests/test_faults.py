"""Memory that runs out, at every stage: the picture or its latents are there afterwards, and one line says what happened."""

import errno
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sana.data.prompts import Prompt
from sana.generation import IncompleteError, Settings, generate
from sana.models.autoencoder import Autoencoder
from sana.models.text_encoder import TextEncoder
from sana.models.transformer import SanaTransformer
from sana.pipeline import SanaPipeline
from sana.runtime.latents import load_latents
from sana.utils import images
from sana.utils.cli import Parser
from sana.utils.manifest import Manifest
from tests.factories import write_model

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = [Prompt(text=f"{count} red circles", index=count) for count in range(2)]
SETTINGS = Settings(num_inference_steps=3)
NO_MEMORY = "[enforce fail at alloc_cpu.cpp:127] data. DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes."


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pipeline(config):
    return SanaPipeline(config, device="cpu")


def failing(monkeypatch, owner, name: str, fails, error=None) -> list[int]:
    """Let calls of `owner.name` raise for which `fails(number of the call, arguments)`; the list counts them."""
    usual, calls = getattr(owner, name), []

    def call(*args, **kwargs):
        calls.append(len(calls))
        if fails(calls[-1], args):
            raise error or RuntimeError(NO_MEMORY)
        return usual(*args, **kwargs)

    monkeypatch.setattr(owner, name, call)
    return calls


STAGES = {
    "text": (TextEncoder, "encode", "encoding the text", False),
    "first step": (SanaTransformer, "forward", "drawing 1 at 256 x 256", False),
    "decode": (Autoencoder, "decode", "out of memory while decoding 256 x 256", True),
    "save": (images, "save_png", "cannot be saved: MemoryError", True),
}


@pytest.mark.parametrize("stage", STAGES)
def test_memory_that_never_suffices(pipeline, monkeypatch, tmp_path, caplog, stage):
    """Both pictures fail; what is there of them stays, and the line says where."""
    owner, name, line, leaves_latents = STAGES[stage]
    failing(monkeypatch, owner, name, lambda number, args: True, MemoryError() if stage == "save" else None)
    with pytest.raises(
        IncompleteError, match="2 of 2 images failed, see .*manifest.jsonl; 00000_0-red-circles.png: "
    ):
        generate(pipeline, PROMPTS, tmp_path, SETTINGS, batch_size=2)
    assert line in caplog.text
    files = sorted(tmp_path.glob("*.latents.safetensors"))
    rows = [json.loads(row) for row in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and all(line in row["error"] for row in rows)
    if leaves_latents:
        assert [row["latents"] for row in rows] == [file.name for file in files]
        for file, prompt in zip(files, PROMPTS, strict=True):
            latents, picture = load_latents(file)
            seed = rows[prompt.index]["seed"]
            again = {"seed": [seed], "num_inference_steps": 3, "output_type": "latent"}
            torch.testing.assert_close(latents, pipeline(prompt.text, **again), rtol=0, atol=1e-4)
            assert picture.file == rows[prompt.index]["file"] and picture.size == (256, 256)
    else:
        assert not files and "nothing is left of it" in caplog.text


def test_memory_that_suffices_for_one_at_a_time(pipeline, monkeypatch, tmp_path, caplog):
    steps = failing(monkeypatch, SanaTransformer, "forward", lambda number, args: len(args[1]) > 2)
    rows = generate(pipeline, PROMPTS, tmp_path, SETTINGS, batch_size=2)
    assert len(steps) == 1 + 2 * 3
    assert all((tmp_path / row["file"]).is_file() and "error" not in row for row in rows)
    assert (
        "2 images at once failed, now one by one: out of memory while drawing 2 at 256 x 256" in caplog.text
    )


def test_the_manifest_says_which_picture_was_decoded_otherwise(pipeline, monkeypatch, tmp_path):
    failing(monkeypatch, Autoencoder, "decode", lambda number, args: number == 0)
    rows = generate(pipeline, PROMPTS, tmp_path, SETTINGS)
    assert [row.get("decoded") for row in rows] == ["one image, strips of 1024 MiB", None]


def test_a_later_step_leaves_how_far_it_got(pipeline, monkeypatch, tmp_path):
    failing(monkeypatch, SanaTransformer, "forward", lambda number, args: number == 2)
    with pytest.raises(IncompleteError, match="1 of 1 images failed"):
        generate(pipeline, PROMPTS[:1], tmp_path, SETTINGS)
    seen = []
    monkeypatch.undo()
    seed = json.loads((tmp_path / "manifest.jsonl").read_text())["seed"]
    pipeline(
        PROMPTS[0].text,
        seed=[seed],
        num_inference_steps=3,
        callback=lambda step, total, x, x0: seen.append(x0),
    )
    latents, _ = load_latents(tmp_path / "00000_0-red-circles.latents.safetensors")
    assert torch.equal(latents, seen[1])


def test_a_second_run_makes_what_failed(pipeline, monkeypatch, tmp_path):
    full = OSError(errno.ENOSPC, "No space left on device")
    failing(monkeypatch, images, "save_png", lambda number, args: number == 1, full)
    with pytest.raises(
        IncompleteError, match=r"1 of 2 images failed.*cannot be saved: .*No space left on device"
    ):
        generate(pipeline, PROMPTS, tmp_path, SETTINGS)
    kept = (tmp_path / "00000_0-red-circles.png").read_bytes()
    rows = generate(pipeline, PROMPTS, tmp_path, SETTINGS)
    assert not any("error" in row for row in rows)
    assert (tmp_path / "00000_0-red-circles.png").read_bytes() == kept
    assert (tmp_path / rows[1]["file"]).is_file() and not list(tmp_path.glob("*.safetensors"))


def test_the_command_says_it_in_a_line_with_status_1(config, monkeypatch, tmp_path, capsys):
    failing(monkeypatch, Autoencoder, "decode", lambda number, args: True)
    script = runpy.run_path(str(ROOT / "scripts/inference.py"))
    words = [
        "--prompt=a red circle",
        f"--config={config}",
        f"--work_dir={tmp_path}",
        "--step=2",
        "--device=cpu",
    ]
    parser = script["make_parser"]()
    with pytest.raises(SystemExit) as left:
        parser.run(script["run"], *parser.parse_known_args(words))
    assert left.value.code == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "1 of 1 images failed" in last and "out of memory while decoding 256 x 256" in last
    assert len(list(tmp_path.glob("*/*.latents.safetensors"))) == 1


@pytest.mark.parametrize(
    "where", ["sana.models.autoencoder.AutoencoderDC", "sana.models.text_encoder.AutoModel"]
)
def test_memory_that_runs_out_in_loading_is_a_line(config, monkeypatch, tmp_path, capsys, where):
    monkeypatch.setattr(
        f"{where}.from_pretrained", lambda *_, **__: (_ for _ in ()).throw(RuntimeError(NO_MEMORY))
    )
    script = runpy.run_path(str(ROOT / "scripts/inference.py"))
    parser = script["make_parser"]()
    words = ["--prompt=a", f"--config={config}", f"--work_dir={tmp_path}", "--device=cpu"]
    with pytest.raises(SystemExit) as left:
        parser.run(script["run"], *parser.parse_known_args(words))
    assert left.value.code == 1
    assert "error: out of memory while reading weights: " in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RuntimeError(NO_MEMORY), f"out of memory: {NO_MEMORY}"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out of memory: CUDA out of"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "out of memory: [Errno 12] Cannot allocate"),
        (MemoryError(), "out of memory\n"),
        (MemoryError("out of memory while drawing"), "out of memory while drawing"),
        (IncompleteError("1 of 1 images failed: out of memory"), "1 of 1 images failed: out of memory"),
    ],
)
def test_any_command_says_in_a_line_that_memory_ran_out(capsys, error, line):
    with pytest.raises(SystemExit) as left:
        Parser(prog="it").run(lambda: (_ for _ in ()).throw(error))
    assert left.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith(f"it: error: {line}") and said.count("\n") == 1
    with pytest.raises(RuntimeError, match="ours"):
        Parser(prog="it").run(lambda: (_ for _ in ()).throw(RuntimeError("ours")))


def test_a_batch_whose_pictures_cannot_be_had_is_drawn_once(pipeline, monkeypatch, tmp_path):
    """What fails in decoding is decoded again one by one, not drawn again."""
    steps = failing(monkeypatch, SanaTransformer, "forward", lambda number, args: False)
    usual = SanaPipeline.decode

    def decode(self, latents, *rest):
        if len(latents) > 1:
            raise MemoryError("out of memory while decoding")
        return usual(self, latents, *rest)

    monkeypatch.setattr(SanaPipeline, "decode", decode)
    rows = generate(pipeline, PROMPTS, tmp_path, SETTINGS, batch_size=2)
    assert len(steps) == 3 and all((tmp_path / row["file"]).is_file() for row in rows)


def test_latents_know_how_their_jpeg_is_to_be_written(pipeline, monkeypatch, tmp_path):
    failing(monkeypatch, Autoencoder, "decode", lambda number, args: True)
    settings = replace(SETTINGS, image_format="jpg", jpeg_quality=80, jpeg_subsampling="4:2:0")
    with pytest.raises(IncompleteError):
        generate(pipeline, PROMPTS[:1], tmp_path, settings)
    [file] = tmp_path.glob("*.latents.safetensors")
    picture = load_latents(file)[1]
    assert (picture.file, picture.jpeg_quality, picture.jpeg_subsampling) == (
        "00000_0-red-circles.jpg",
        80,
        "4:2:0",
    )


LITTLE = [Prompt(text="a red circle --hw 256:256", index=0), Prompt(text="a red circle", index=1)]
LITTLE_SETTINGS = Settings(num_inference_steps=2, height=1024, width=1024, use_resolution_binning=False)


def draw_with_little(config: str, folder: str, stage: str, spare: int) -> None:
    """In a process of its own: 256 x 256, then 1024 x 1024 with `spare` bytes of address space more than before its stage."""
    import resource

    pipeline = SanaPipeline(config, device="cpu")
    usual, calls = getattr(pipeline, stage), []

    def limited(*args, **kwargs):
        calls.append(stage)
        if len(calls) == 2:
            while not Manifest(folder).rows():  # the first picture is written in the background
                time.sleep(0.01)
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() + spare
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        return usual(*args, **kwargs)

    setattr(pipeline, stage, limited)
    try:
        generate(pipeline, LITTLE, folder, LITTLE_SETTINGS)
    except IncompleteError as error:
        sys.exit(str(error))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "mebibytes", "leaves"),
    [("encode", 8, "a line"), ("decode", 8, "latents"), ("decode", 1024, "picture")],
)
def test_address_space_that_runs_out(config, tmp_path, stage, mebibytes, leaves):
    """For real: the allocator raises.

    Before and while drawing, where a small allocation of oneDNN or of the tokenizer is the one that fails, these end the
    process, by a signal. That may happen, twice running at most; it leaves what was there, and the next run goes on.
    """
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "262144", "OMP_NUM_THREADS": "1"}
    for attempt in range(3):
        folder = tmp_path / str(attempt)
        arguments = f"{str(config)!r}, {str(folder)!r}, {stage!r}, {mebibytes << 20}"
        code = f"from tests.test_faults import draw_with_little as draw; draw({arguments})"
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        [drawn] = folder.glob("00000_*.png")
        kept = drawn.read_bytes()
        crashed = stage == "encode" and -done.returncode in (signal.SIGSEGV, signal.SIGABRT)
        pictures, latents = list(folder.glob("*.png")), list(folder.glob("*.latents.safetensors"))
        found = (len(pictures), len(latents), done.returncode)
        if crashed:
            assert found[:2] == (1, 0), done.stderr
        else:
            expected = {"a line": (1, 0, 1), "latents": (1, 1, 1), "picture": (2, 0, 0)}
            assert found == expected[leaves], done.stderr
            assert "Traceback" not in done.stderr
            if leaves != "picture":
                assert "1 of 2 images failed" in done.stderr.splitlines()[-1]
            if latents:
                assert load_latents(latents[0])[0].shape == (1, 32, 32, 32)
        rows = generate(SanaPipeline(config, device="cpu"), LITTLE, folder, LITTLE_SETTINGS)
        assert [images.load(folder / row["file"]).size for row in rows] == [(256, 256), (1024, 1024)]
        assert drawn.read_bytes() == kept
        if not crashed:
            return
    pytest.fail(f"never a line in three runs, at last: {done.stderr}")
