"""The first-block cache: when it runs everything, when it does not, and that runs do not share it."""

import pytest
import torch

from sana.diffusion.guidance import Guidance, guided
from sana.diffusion.solvers import SOLVERS
from sana.models.text_encoder import TextFeatures
from sana.runtime.step_cache import StepCachedTransformer
from tests.models.twin import LENGTH, build, inputs
from tests.numerics import assert_close


def sample(network, seed=1, guidance=None, steps=8):
    embeds = inputs(build().config, seed=seed)["text_embeds"]
    text = TextFeatures(embeds, torch.ones(3, LENGTH, dtype=torch.long))
    schedule, solver = SOLVERS["flow_dpm-solver"]
    sigmas = schedule(steps, 3.0)
    velocity = guided(
        network, text, TextFeatures(-embeds, text.mask), guidance or Guidance(3.0), sigmas[:-1].tolist()
    )
    return solver(velocity, inputs(build().config, seed=9)["latents"], sigmas)


@pytest.fixture
def counted():
    """A model, and the number of calls of each of its blocks."""
    model = build(depth=3).eval()
    calls = [0] * 3
    for index, block in enumerate(model.blocks):

        def hook(*_, index=index):
            calls[index] += 1

        block.register_forward_hook(hook)
    return model, calls


@torch.no_grad()
def test_without_agreement_every_block_runs(counted):
    model, calls = counted
    cached = StepCachedTransformer(model, 1e-9)
    exact = sample(model)
    calls[:] = [0, 0, 0]
    assert_close("latents", sample(cached), exact, rel_rms=1e-6)
    assert calls == [8, 8, 8] and cached.reused == 0


@torch.no_grad()
def test_the_others_residual_is_used_again(counted):
    model, calls = counted
    cached = StepCachedTransformer(model, 1e9)
    sample(cached)
    assert calls == [8, 1, 1] and cached.reused == 7
    arguments = inputs(model.config)
    cache = model.encode_text(arguments["text_embeds"])
    first, second = model.encode_time(torch.tensor([900.0, 850.0]))
    x = arguments["latents"]
    tokens = {}
    model.blocks[0].register_forward_hook(lambda module, given, output: tokens.update(first=output))
    model.blocks[2].register_forward_hook(lambda module, given, output: tokens.update(last=output))
    model.final_layer.register_forward_hook(lambda module, given, output: tokens.update(final=given[0]))
    cached(x, first, None, text_cache=cache)
    rest = tokens["last"] - tokens["first"]
    cached(x, second, None, text_cache=cache)
    assert torch.equal(tokens["final"], tokens["first"] + rest)


@torch.no_grad()
def test_between_the_extremes_some_steps_are_spared_and_the_result_is_near(counted):
    model, calls = counted
    exact = sample(model, steps=20)
    calls[:] = [0, 0, 0]
    cached = StepCachedTransformer(model, 0.17)
    near = sample(cached, steps=20)
    assert calls[0] == 20 and 1 < calls[1] == calls[2] < 20
    assert (near - exact).norm() < 0.1 * exact.norm()  # measured: 0.02 to 0.06
    assert not torch.equal(near, exact)


@torch.no_grad()
def test_runs_and_branches_do_not_share_a_cache(counted):
    model, calls = counted
    cached = StepCachedTransformer(model, 1e9)
    pag = Guidance(3.0, pag_scale=2.0, pag_blocks=(1,))
    first = sample(cached, guidance=pag)
    assert calls == [16, 2, 2]  # both branches together, and the perturbed one
    sample(cached, seed=2)
    assert torch.equal(sample(cached, guidance=pag), first)


@torch.no_grad()
def test_earlier_sizes_are_not_kept(counted):
    model, _ = counted
    cached = StepCachedTransformer(model, 1e9)
    text = model.encode_text(inputs(model.config)["text_embeds"])
    time = model.encode_time(torch.tensor([900.0]))[0]
    for width in range(1, 8):
        cached(inputs(model.config, (1, width))["latents"], time, None, text_cache=text)
    assert [form[0][-1] for form in cached._caches] == [5, 6, 7]


def test_a_threshold_must_be_positive():
    with pytest.raises(ValueError, match="above 0, got 0"):
        StepCachedTransformer(build(), 0)
