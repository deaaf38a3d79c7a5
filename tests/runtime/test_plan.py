"""The memory plan of drawing against what a process really takes, and what it chooses."""

import gc
import json
import os
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from sana.config import load_config
from sana.data.prompts import Prompt
from sana.inference import make_memory_plan, make_outline
from sana.models import random_model
from sana.pipeline import SanaPipeline
from sana.runtime import plan
from sana.runtime.memory import GIB
from sana.runtime.plan import Setting, fit, make_plan
from tests.factories import write_model

ROOT = Path(__file__).resolve().parents[2]
MIB = 2**20
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def outline(config):
    return make_outline(load_config(config), CPU, None)


def peak() -> int:
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def measure(config: str, words: dict) -> None:
    """Write (planned, measured) bytes of each stage, drawn once after a first small picture has loaded the libraries."""
    setting = Setting(**words)
    draw = {"num_inference_steps": 2, "use_resolution_binning": False}
    how = {"device": "cpu", "quantize": setting.quantize, "offload": setting.offload}
    pipeline = SanaPipeline(config, **how)
    pipeline("a red circle", 256, 256, **draw)
    del pipeline
    gc.collect()
    before = plan.held()
    with torch.no_grad():
        planned = make_plan(make_outline(load_config(config), CPU, None), setting)
    gc.collect()
    measured = {}
    Path("/proc/self/clear_refs").write_text(
        "5"
    )  # the peak from here on: reading the weights belongs to the first stage
    pipeline = SanaPipeline(config, **how)
    pipeline.decode_bytes, pipeline.decode_tile = setting.max_bytes, setting.tile
    prompts = ["a red circle"] * setting.batch
    latents = None

    def stage(name, run):
        result = run()
        measured[name] = peak() - before
        Path("/proc/self/clear_refs").write_text("5")
        return result

    features = stage("encoding the text", lambda: pipeline.encode(prompts, [""] * setting.batch))
    settings = {"features": features, "output_type": "latent"} | draw
    latents = stage("denoising", lambda: pipeline(prompts, *setting.size, **settings))
    stage("decoding", lambda: pipeline.decode(latents, setting.size, "pil"))
    found = {name: (sum(planned.stages[name]), measured[name]) for name in measured}
    sys.stdout.write(json.dumps(found))


def planned_and_measured(config, **words) -> dict[str, tuple[int, int]]:
    code = f"from tests.runtime.test_plan import measure; measure({str(config)!r}, {words!r})"
    # Freed tensors go back to the system at once, so that its figure is that of the live ones.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "262144", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        {"size": (512, 512)},
        {"size": (2048, 2048), "batch": 6},
        {"size": (2048, 2048), "offload": "model", "max_bytes": 2**28},
        {"size": (1024, 1024), "quantize": {"transformer": "int8", "text_encoder": "int8"}},
    ],
    ids=["small", "large", "strips", "int8"],
)
def test_a_plan_is_what_is_taken(config, words):
    found = planned_and_measured(config, **words)
    for planned, measured in found.values():
        if measured >= GIB:
            assert planned == pytest.approx(measured, rel=0.15), found
        else:
            assert planned == pytest.approx(measured, abs=150 * MIB), found
    if words.get("batch", 1) > 1:
        assert max(measured for _, measured in found.values()) > GIB


@pytest.mark.slow
def test_the_plan_of_a_gemma_and_a_600m_is_what_loading_takes(tmp_path):
    """Widths as published, fewer layers; more than 1 GiB, and most of it weights."""
    random_model.TEXT_SIZES["short"] = {"num_hidden_layers": 4, "vocab_size": 32000}
    try:
        settings = {"transformer": "SanaMS_Tiny_P1_D8", "autoencoder": "tiny", "text_encoder": "short"}
        random_model.write(tmp_path, **settings, dtype=torch.bfloat16, texts=["a red circle", "a blue star"])
    finally:
        del random_model.TEXT_SIZES["short"]
    overrides = {
        "load_from": tmp_path / "transformer",
        "vae": tmp_path / "autoencoder",
        "text": tmp_path / "text_encoder",
    }
    config = tmp_path / "config.yaml"
    config.write_text(
        f"model: {{model: SanaMS_Tiny_P1_D8, image_size: 256, mixed_precision: bf16, load_from: {overrides['load_from']}}}\n"
        f"vae: {{vae_pretrained: {overrides['vae']}}}\n"
        f"text_encoder: {{text_encoder_name: {overrides['text']}, caption_channels: 2304, model_max_length: 64, chi_prompt: []}}\n"
    )
    found = planned_and_measured(config, size=(256, 256), offload="model")
    planned, measured = found["encoding the text"]
    assert measured > GIB
    assert planned == pytest.approx(measured, rel=0.15), found


def test_quantised_and_offloaded_networks_take_less(outline):
    with torch.no_grad():
        whole = make_plan(outline, Setting(size=(1024, 1024)))
        small = make_plan(outline, Setting(size=(1024, 1024), quantize={"transformer": "int8"}))
        alone = make_plan(outline, Setting(size=(1024, 1024), offload="model"))
    assert small.stages["decoding"][0] < 0.6 * whole.stages["decoding"][0]
    assert sum(alone.stages[name][0] for name in alone.stages) == whole.stages["decoding"][0]
    assert "denoising" in str(whole) and "GiB at most: planned" in str(whole)


@torch.no_grad()
def test_what_is_given_up_first(outline):
    """Nothing where all fits; then strips, the text encoder's place, images at once; a refusal names what would fit."""
    wanted = Setting(size=(2048, 2048), batch=4)
    whole = make_plan(outline, wanted)
    assert fit(outline, wanted, whole.peak).setting == wanted
    less = fit(outline, wanted, whole.peak - 1)
    assert less.peak < whole.peak and less.setting.batch == 4 and less.setting.max_bytes is not None
    few = fit(outline, wanted, whole.peak // 3)
    assert few.peak <= whole.peak // 3 and few.setting.batch < 4
    assert fit(outline, wanted, whole.peak, modes=("model",)).setting.offload == "model"
    with pytest.raises(
        ValueError,
        match=r"2048 x 2048, 4 at once.* does not fit into 0.17 GiB: with .* it takes .*; what fits: \d+ x \d+",
    ):
        fit(outline, wanted, int(0.17 * GIB))
    with pytest.raises(ValueError, match="nothing does, down to 256 pixels"):
        fit(outline, wanted, MIB)


def test_the_largest_of_the_prompts_counts(config, monkeypatch):
    flags = dict(
        device="cpu",
        dtype=None,
        bs=2,
        quantize=None,
        offload=None,
        max_memory_gb=None,
        compile=False,
        lora=[],
    )
    prompts = [Prompt(text="a red circle --ar 1:2"), Prompt(text="a star --hw 512:512", index=1)]
    loaded = load_config(config)
    chosen = make_memory_plan(loaded, Namespace(**flags, height=None, width=None), prompts)
    assert chosen.setting == Setting(size=(256, 256), batch=2)
    with pytest.raises(ValueError, match="GiB are taken before anything is loaded"):
        make_memory_plan(
            loaded, Namespace(**flags | {"max_memory_gb": 0.1}, height=None, width=None), prompts
        )
    monkeypatch.setattr(plan, "available", lambda device: 2**26)
    with pytest.raises(ValueError, match="does not fit into 0.06 GiB"):
        make_memory_plan(loaded, Namespace(**flags, height=256, width=256), prompts)
