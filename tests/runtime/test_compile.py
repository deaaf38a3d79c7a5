"""Compiled blocks: the same numbers, one compilation for all blocks and sizes, no graph break."""

import copy

import pytest
import torch
from torch._dynamo.utils import counters

from sana.ops.linear import onednn
from sana.pipeline import SanaPipeline
from sana.runtime.compile import compile_blocks, compile_decoder, compile_networks
from tests.models.twin import build, inputs
from tests.numerics import assert_close

BUCKETS = [(4, 4), (2, 6), (6, 2), (3, 5), (5, 3)]


@pytest.fixture
def fresh():
    """Nothing that an earlier test compiled, and no count of it."""
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


@pytest.mark.slow
def test_compiled_blocks_give_the_same_output_and_compile_no_more_after_warming_up(fresh):
    model = build(depth=3).requires_grad_(False)
    compiled = copy.deepcopy(model)
    compile_blocks(compiled, rows=32)
    packed = len(onednn._packed)
    assert packed >= 3 * 6  # of each block: qkv, proj, q, kv, proj, and both 1x1 convolutions

    def both(grid, seed, perturbed=()):
        arguments = inputs(model.config, grid, seed=seed)
        cache = model.encode_text(arguments["text_embeds"], arguments["text_mask"])
        time = model.encode_time(torch.tensor([431.0]))[0]
        call = {"text_cache": cache, "perturbed_blocks": perturbed}
        actual = compiled(arguments["latents"], time, None, **call)
        assert_close(str(grid), actual, model(arguments["latents"], time, None, **call), rel_rms=2e-6)

    with torch.inference_mode():
        for grid in BUCKETS[:3]:
            both(grid, seed=0)
            both(grid, seed=0, perturbed=(1,))
        warm = counters["stats"]["unique_graphs"]
        assert warm <= 4, "each block or each size was compiled on its own"
        for seed in (1, 2):
            for grid in BUCKETS:
                both(grid, seed)
                both(grid, seed, perturbed=(1,))
    assert counters["stats"]["unique_graphs"] == warm, counters
    assert not counters["graph_break"], counters["graph_break"]


@pytest.mark.slow
def test_a_compiled_decoder_gives_the_same_pixels(fresh):
    model = SanaPipeline(device="cpu").autoencoder.model
    latents = torch.randn(2, 32, 2, 3, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model.decode(latents).sample
        compile_decoder(model.decoder)
        actual = model.decode(latents).sample
    assert counters["stats"]["unique_graphs"] == 1
    assert torch.allclose(actual, expected, atol=1e-4)


def test_on_a_cpu_the_decoder_keeps_its_own_arithmetic(monkeypatch):
    transformer, decoder = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    monkeypatch.setattr("sana.runtime.compile.compile_blocks", lambda network, rows: None)
    compile_networks(transformer, decoder, rows=1)
    assert decoder._compiled_call_impl is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_decoder_is_compiled(fresh):
    pipeline = SanaPipeline(device="cuda")
    latents = torch.randn(1, 32, 8, 8, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    with torch.inference_mode():
        expected = pipeline.autoencoder.decode(latents)
        decoder = pipeline.compile().autoencoder.model.decoder
        actual = pipeline.autoencoder.decode(latents)
    assert decoder._compiled_call_impl is not None
    assert torch.allclose(actual, expected, atol=5e-3)
