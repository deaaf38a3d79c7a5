"""The memory plan of drawing against what a process really takes, and what it chooses."""

import gc
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sana.config import load_config
from sana.inference import make_outline
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
    layered = planned_and_measured(config, size=(256, 256), offload="sequential")
    assert layered["encoding the text"][1] < 0.5 * measured
    for planned, measured in layered.values():
        assert planned == pytest.approx(measured, abs=150 * MIB), layered


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_plan_is_what_a_gpu_takes(config):
    device, setting = torch.device("cuda"), Setting(size=(2048, 2048), batch=4, device="cuda")
    before = torch.cuda.memory_allocated(device)
    pipeline, prompts = SanaPipeline(config, device=device), ["a red circle"] * setting.batch
    with torch.no_grad():
        planned = make_plan(make_outline(load_config(config), device, None), setting, reading=0)
    draw = {"num_inference_steps": 2, "use_resolution_binning": False, "output_type": "latent"}
    pipeline("a red circle", 256, 256, **draw)  # libraries are loaded
    found = {}

    def stage(name, run):
        torch.cuda.reset_peak_memory_stats(device)
        result = run()
        found[name] = (sum(planned.stages[name]), torch.cuda.max_memory_allocated(device) - before)
        return result

    features = stage("encoding the text", lambda: pipeline.encode(prompts, [""] * setting.batch))
    latents = stage("denoising", lambda: pipeline(prompts, *setting.size, features=features, **draw))
    stage("decoding", lambda: pipeline.decode(latents, setting.size))
    for planned_bytes, measured in found.values():
        allowed = {"rel": 0.15} if measured >= GIB else {"abs": 150 * MIB}
        assert planned_bytes == pytest.approx(measured, **allowed), found


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


def test_what_a_flag_says_is_not_changed(outline):
    """A mode that is asked for stays, with all images at once and exact decoding where there is room."""
    for mode in ("model", "sequential"):
        wanted = Setting(size=(2048, 2048), batch=2, offload=mode)
        with torch.no_grad():
            whole = make_plan(outline, wanted)
            assert fit(outline, wanted, whole.peak, modes=(mode,)).setting == wanted
            less = fit(outline, wanted, whole.peak - 1, modes=(mode,)).setting
        assert less.offload == mode and less.tile is None and less.max_bytes is not None
    fixed = Setting(size=(2048, 2048), batch=2)
    with torch.no_grad():
        less = fit(outline, fixed, make_plan(outline, replace(fixed, batch=1)).peak, modes=("none",)).setting
    assert (less.offload, less.tile) == ("none", None)
    both = [way for way in plan._candidates(fixed, ()) if way.tile and way.offload == "sequential"]
    assert both and all(way.batch == 1 for way in both)  # the last resorts go together


def test_what_a_container_has_left(monkeypatch, tmp_path):
    """Of its limit and the machine's memory the smaller; files that it has read are no use of memory."""
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9000 kB\nMemAvailable:    8000 kB\n")
    monkeypatch.setattr(plan, "_MEMINFO", meminfo)
    monkeypatch.setattr(plan, "_CGROUP", tmp_path)
    assert plan.available(CPU) == 8000 * 1024
    (tmp_path / "memory.current").write_text("5000000\n")
    (tmp_path / "memory.stat").write_text("anon 1\nactive_file 1000000\ninactive_file 2000000\n")
    for limit, expected in (("max", 8000 * 1024), ("6000000", 4000000), ("90000000", 8000 * 1024)):
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        assert plan.available(CPU) == expected
    old = tmp_path / "memory"
    old.mkdir()
    (old / "memory.usage_in_bytes").write_text("5000000\n")
    own = "active_file 1\ninactive_file 1\n"
    (old / "memory.stat").write_text(f"{own}total_active_file 1000000\ntotal_inactive_file 2000000\n")
    for limit, expected in ((2**63 - 4096, 8000 * 1024), (6000000, 4000000)):  # the first is none
        (old / "memory.limit_in_bytes").write_text(f"{limit}\n")
        assert plan.available(CPU) == expected
    monkeypatch.setattr(plan, "_MEMINFO", tmp_path / "nowhere")
    monkeypatch.setattr(plan, "_STATM", tmp_path / "nowhere")
    assert plan.available(CPU) > 2**28 and plan.held() == 0


def test_an_outline_of_networks_that_are_there(config, outline):
    pipeline = SanaPipeline(config, device="cpu")
    own = plan.Outline.of(pipeline.transformer, pipeline.autoencoder, pipeline.text_encoder)
    setting = Setting(size=(512, 512), batch=2)
    with torch.no_grad():
        made = [make_plan(one, setting, reading=0).stages for one in (own, outline)]
    assert made[0] == made[1]
