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


@pytest.fixture(params=["fake", pytest.param("real", marks=pytest.mark.gpu)])
def captures(request, monkeypatch):
    """How often something was captured and replayed."""
    if request.param == "real" and not CUDA:
        pytest.skip("needs a CUDA device")
    counts = {"captured": 0, "replayed": 0}
    real = capture.capture

    def recorded(run):
        counts["captured"] += 1
        if request.param == "real":
            replay, output = real(run)
        else:
            output = run()

            def replay():
                output.copy_(run())

        def counted():
            counts["replayed"] += 1
            replay()

        return counted, output

    monkeypatch.setattr(capture, "capture", recorded)
    return counts


def sample(network, seed, *, grid=(4, 4), guidance=None, batch=2):
    """Four steps of guided sampling from the text of `seed`."""
    arguments = inputs(
        network.config if hasattr(network, "config") else network.transformer.config, grid, seed=seed
    )
    embeds = arguments["text_embeds"][:batch].to(DEVICE)
    text = TextFeatures(embeds, torch.ones(batch, LENGTH, dtype=torch.long, device=DEVICE))
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
        assert_close(f"text {seed}", sample(captured, seed), sample(model, seed), rel_rms=1e-6)
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
        assert_close(f"{guidance} {settings}", actual, expected, rel_rms=1e-6)
    assert (
        captures["captured"] == 4
    )  # besides: PAG, one branch alone (as large as both of one image), another size


@torch.no_grad()
def test_the_number_of_graphs_is_bounded(captures, monkeypatch):
    monkeypatch.setattr(capture, "FORMS", 2)
    model = build().to(DEVICE)
    captured = capture.CapturedTransformer(model)
    for grid in ((4, 4), (2, 6), (4, 4), (3, 3), (4, 4), (2, 6)):
        assert_close(str(grid), sample(captured, 1, grid=grid), sample(model, 1, grid=grid), rel_rms=1e-6)
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
