"""Compiled blocks: the same numbers, one compilation for all blocks and sizes, no graph break."""

import copy

import pytest
import torch
from torch._dynamo.utils import counters

from sana.ops.linear import onednn
from sana.runtime.compile import compile_blocks
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
