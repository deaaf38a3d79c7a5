"""Replayed steps: what is copied into a graph, and when. Without a GPU, a graph is a call on the same tensors."""

import pytest
import torch

from sana.diffusion.guidance import Guidance, guided
from sana.diffusion.solvers import SOLVERS
from sana.models.text_encoder import TextFeatures
from sana.runtime import capture
from tests.models.twin import LENGTH, build, inputs
from tests.numerics import assert_close

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
# What is captured has padded texts: the same sums in another order, which a GPU's convolutions then round to TF32.
BOUND = 5e-5 if CUDA else 2e-6


@pytest.fixture(params=["fake", pytest.param("real", marks=pytest.mark.gpu)])
def captures(request, monkeypatch):
    """How often something was captured and replayed."""
    if request.param == "real" and not CUDA:
        pytest.skip("needs a CUDA device")
    counts = {"captured": 0, "replayed": 0}

    class Fake:
        def __init__(self, device):
            pass

        def capture(self, run):
            output = run()
            return lambda: output.copy_(run()), output

    class Recorder(capture.Recorder if request.param == "real" else Fake):
        def capture(self, run):
            counts["captured"] += 1
            replay, output = super().capture(run)

            def counted():
                counts["replayed"] += 1
                replay()

            return counted, output

    monkeypatch.setattr(capture, "Recorder", Recorder)
    return counts


def sample(network, seed, *, grid=(4, 4), guidance=None, batch=2, length=LENGTH, mask=None):
    """Four steps of guided sampling from the text of `seed`, so many tokens of it, all valid if there is no mask."""
    arguments = inputs(
        network.config if hasattr(network, "config") else network.transformer.config, grid, seed=seed
    )
    embeds = arguments["text_embeds"][:batch, :length].to(DEVICE)
    ones = torch.ones(batch, length, dtype=torch.long, device=DEVICE)
    text = TextFeatures(embeds, ones if mask is None else mask.to(DEVICE))
    null = TextFeatures(-embeds, text.mask)
    schedule, solver = SOLVERS["flow_dpm-solver"]
    sigmas = schedule(4, 3.0)
    velocity = guided(network, text, null, guidance or Guidance(3.0), sigmas[:-1].tolist())
    return solver(velocity, arguments["latents"][:batch].to(DEVICE), sigmas)


@torch.no_grad()
def test_replayed_steps_are_those_of_the_network(captures):
    model = build().to(DEVICE)
    captured = capture.CapturedTransformer(model)
    pag = Guidance(3.0, pag_scale=2.0, pag_blocks=(1,))
    for seed in (1, 2, 1):
        assert_close(f"text {seed}", sample(captured, seed), sample(model, seed), rel_rms=BOUND)
    assert captures == {"captured": 1, "replayed": 12}
    half = Guidance(3.0, interval=(0.4, 0.9))
    for guidance, settings in (
        (pag, {}),
        (half, {}),
        (Guidance(3.0), {"grid": (2, 6)}),
        (Guidance(3.0), {"batch": 1}),
    ):
        actual, expected = (
            sample(network, 3, guidance=guidance, **settings) for network in (captured, model)
        )
        assert_close(f"{guidance} {settings}", actual, expected, rel_rms=BOUND)
    assert (
        captures["captured"] == 4
    )  # besides: PAG, one branch alone (as large as both of one image), another size


@torch.no_grad()
def test_lengths_of_texts_share_a_graph(captures):
    """Padded to a multiple of 16 tokens, which nothing attends to; fewer tokens than channels in a head are folded."""
    for heads, grid in ((4, (4, 4)), (2, (3, 5))):
        model = build(num_heads=heads).to(DEVICE)
        captured, before = capture.CapturedTransformer(model), captures["captured"]
        for length in (7, 5, 1):
            actual, expected = (sample(network, 1, grid=grid, length=length) for network in (captured, model))
            assert_close(f"{heads} heads, {length} tokens", actual, expected, rel_rms=BOUND)
        assert captures["captured"] == before + 1
    mask = torch.tensor([[1, 1, 0, 0, 0, 0, 0], [0] * 7])  # the second one attends to all seven
    actual, expected = (sample(network, 1, grid=grid, mask=mask) for network in (captured, model))
    assert_close("masked", actual, expected, rel_rms=BOUND)


def test_a_graph_of_inference_mode_serves_outside_of_it(captures):
    model = build().to(DEVICE)
    captured = capture.CapturedTransformer(model)
    with torch.inference_mode():
        inside = sample(captured, 1)
    with torch.no_grad():
        assert torch.equal(sample(captured, 1), inside)
    assert captures["captured"] == 1


@torch.no_grad()
def test_the_number_of_graphs_is_bounded(captures, monkeypatch):
    monkeypatch.setattr(capture, "FORMS", 2)
    model = build().to(DEVICE)
    captured = capture.CapturedTransformer(model)
    for grid in ((4, 4), (2, 6), (4, 4), (3, 3), (4, 4), (2, 6)):
        assert_close(str(grid), sample(captured, 1, grid=grid), sample(model, 1, grid=grid), rel_rms=BOUND)
    assert captures["captured"] == 4  # the third size put out the second, the latest used ones stay
    assert len(captured._graphs) == 2


@torch.no_grad()
def test_a_call_without_caches_is_not_captured(captures):
    model = build().to(DEVICE)
    arguments = {name: value.to(DEVICE) for name, value in inputs(model.config).items()}
    output = capture.CapturedTransformer(model)(**arguments)
    assert torch.equal(output, model(**arguments))
    assert captures["captured"] == 0


@torch.no_grad()
def test_an_output_outlives_the_next_call(captures):
    model = build().to(DEVICE)
    captured = capture.CapturedTransformer(model)
    first = sample(captured, 1)
    kept = first.clone()
    sample(captured, 2)
    assert torch.equal(first, kept)
