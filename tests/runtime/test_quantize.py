"""Quantised weights: what becomes smaller, how far results move, what is refused, and what loading takes."""

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sana.models.layers import Linear
from sana.models.mix_ffn import PointwiseConv
from sana.models.zoo import TRANSFORMERS as TRANSFORMERS
from sana.models.zoo import build_transformer
from sana.pipeline import SanaPipeline
from sana.runtime import quantize
from tests.factories import TEXT_LENGTH, TEXT_WIDTH, make_transformer, write_model

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
# Kind -> largest relative error of the velocity of a random network; four bits cost what they cost.
ERRORS = {"int8": 0.02, "int8-dynamic": 0.03, "fp8": 0.06, "nf4": 0.25}

pytestmark = [
    pytest.mark.filterwarnings("ignore:::torchao"),
    pytest.mark.filterwarnings("ignore:::bitsandbytes"),
]


def inputs() -> tuple:
    generator = torch.Generator().manual_seed(0)
    latents, text = (
        torch.randn(shape, generator=generator) for shape in ((2, 32, 4, 6), (2, TEXT_LENGTH, TEXT_WIDTH))
    )
    return latents, torch.tensor([200.0, 800.0]), text, torch.ones(2, TEXT_LENGTH, dtype=torch.long)


def real_bytes(model: nn.Module) -> int:
    total = 0
    for value in (*model.parameters(), *model.buffers()):
        if hasattr(value, "qdata"):
            total += value.qdata.nbytes + value.scale.nbytes
        elif hasattr(value, "quant_state"):
            state = value.quant_state
            total += value.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
        else:
            total += value.nbytes
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ERRORS)
@torch.no_grad()
def test_the_transformer_is_near_and_small(kind, dtype):
    plain = make_transformer().to(dtype).requires_grad_(False)
    exact = plain(*inputs()).float()
    model = quantize.quantize_(copy.deepcopy(plain), kind)
    near = model(*inputs()).float()
    error = (near - exact).norm() / exact.norm()
    assert 0 < error < ERRORS[kind]
    assert real_bytes(model) == pytest.approx(quantize.weight_bytes(plain, kind), rel=0.01)
    assert real_bytes(model) < 0.65 * quantize.weight_bytes(plain, None)
    latents, times, text, mask = inputs()
    cache = model.encode_text(text, mask)
    assert all(type(block) is tuple for block in cache.blocks)  # not folded: the products need plain weights
    torch.testing.assert_close(model(latents, times, None, text_cache=cache).float(), near)


def test_what_is_quantised_and_what_is_not():
    model = quantize.quantize_(make_transformer().requires_grad_(False), "int8-dynamic")
    plain = [type(p) is nn.Parameter for p in model.parameters()]
    names = [
        name for (name, _), is_plain in zip(model.named_parameters(), plain, strict=True) if not is_plain
    ]
    assert len(names) == 6 * len(model.blocks)
    parts = (
        "attn.qkv",
        "attn.proj",
        "cross_attn.q_linear",
        "cross_attn.proj",
        "mlp.inverted_conv.conv",
        "mlp.point_conv.conv",
    )
    assert {name.removesuffix(".weight").split(".", 2)[2] for name in names} == set(parts)


@torch.no_grad()
def test_a_pointwise_convolution_is_its_linear_view():
    torch.manual_seed(0)
    conv = PointwiseConv(64, 96, bias=True)
    linear = Linear(64, 96)
    linear.weight, linear.bias = nn.Parameter(conv.weight.flatten(1)), conv.bias
    x = torch.randn(2, 5, 64)
    for kind in ERRORS:
        torch.testing.assert_close(quantize.quantized(conv, kind)(x), quantize.quantized(linear, kind)(x))


def test_settings():
    assert quantize.parse("transformer=int8, text_encoder=nf4") == {
        "transformer": "int8",
        "text_encoder": "nf4",
    }
    assert quantize.parse(None) == quantize.parse("") == {}
    for wrong in ("vae=int8", "transformer=int3", "int8", "transformer=int8,transformer=fp8"):
        with pytest.raises(ValueError, match=r"PART=KIND|twice"):
            quantize.parse(wrong)
    with pytest.raises(ValueError, match="needs a GPU of compute capability 8.9 or more, not cpu: use fp8"):
        quantize.check({"transformer": "fp8-dynamic"}, CPU)


def test_a_missing_library_is_one_line(monkeypatch):
    monkeypatch.setattr(quantize.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match="needs bitsandbytes, which is not installed: pip install bitsandbytes"
    ):
        quantize.check({"text_encoder": "nf4"}, CPU)


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def test_a_pipeline_of_quantised_networks(config):
    draw = {"num_inference_steps": 2, "seed": 1, "output_type": "latent"}
    exact = SanaPipeline(config, device="cpu")("a red circle", **draw)
    pipeline = SanaPipeline(config, device="cpu", quantize="transformer=int8,text_encoder=int8")
    near = pipeline("a red circle", **draw)
    assert 0 < (near - exact).norm() / exact.norm() < 0.1
    kinds = {
        type(layer.weight).__name__
        for layer in pipeline.text_encoder.model.modules()
        if isinstance(layer, nn.Linear)
    }
    assert kinds == {"Int8Tensor"}
    with pytest.raises(ValueError, match="an adapter is added into the weights, which must not be quantised"):
        pipeline.load_lora(config)


def measure(folder: str, kind: str) -> None:
    """Print the bytes of the weights in full, and by how much loading them raised this process's peak."""
    from sana.config import load_config
    from sana.loading import load_transformer
    from sana.models.filling import BYTES_AT_ONCE

    finish = quantize.finisher(kind, "transformer") if kind else None
    config = load_config(
        f"{folder}/config.yaml", [f"model.load_from={folder}/big.safetensors", "model.model=SanaMS_Big"]
    )
    load = {"dtype": torch.bfloat16, "device": CPU, "finish": finish}
    tiny = torch.nn.Linear(64, 64).to(torch.bfloat16)
    if kind:
        quantize.quantized(tiny, kind)(torch.ones(1, 64, dtype=torch.bfloat16))  # libraries are loaded
    before = peak()
    model = load_transformer(config, config.model.load_from, **load)
    full = quantize.weight_bytes(model, None) if not kind else 0
    sys.stdout.write(json.dumps([peak() - before, full, BYTES_AT_ONCE]))


def peak() -> int:
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


@pytest.mark.slow
def test_loading_never_holds_the_full_model(config, tmp_path):
    """A network of 0.5 GiB in bfloat16 on disk, read as it is and as int8."""
    settings = {
        "depth": 6,
        "hidden_size": 1792,
        "num_heads": 14,
        "caption_channels": TEXT_WIDTH,
        "model_max_length": TEXT_LENGTH,
    }
    with torch.device("meta"):
        model = build_transformer("SanaMS_Tiny_P1_D8", **settings).to(torch.bfloat16)
    state = {name: torch.zeros(value.shape, dtype=value.dtype) for name, value in model.state_dict().items()}
    full = sum(value.nbytes for value in state.values())
    assert full > 0.45 * 2**30
    save_file(state, tmp_path / "big.safetensors")
    (tmp_path / "config.yaml").write_text(config.read_text())
    code = (
        "from dataclasses import replace; import tests.runtime.test_quantize as t; "
        f"t.TRANSFORMERS['SanaMS_Big'] = replace(t.TRANSFORMERS['SanaMS_Tiny_P1_D8'], **{settings!r}); "
        f"t.measure({str(tmp_path)!r}, KIND)"
    )
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "262144", "OMP_NUM_THREADS": "1"}
    rise = {}
    for kind in ("", "int8"):
        command = [sys.executable, "-c", code.replace("KIND", repr(kind))]
        output = subprocess.run(
            command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True
        ).stdout
        rise[kind], _, slack = json.loads(output.splitlines()[-1])
    assert rise[""] < full + slack + 2**26  # and not the file's pages beside it
    assert rise["int8"] < 0.5 * full + slack + 2**27
