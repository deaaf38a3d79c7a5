"""The kernels under torch.compile without a graph break, in a whole model, and in training."""

import pytest
import torch

from sana.models.transformer import SanaTransformer, TransformerConfig
from sana.ops.linear_attention import linear_attention_qkv
from tests.numerics import assert_close
from tests.ops.cases import DEVICE

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []

TINY = {
    "hidden_size": 64,
    "num_heads": 2,
    "mlp_ratio": 0.5,
    "depth": 1,
    "in_channels": 4,
    "out_channels": 4,
    "caption_channels": 16,
    "model_max_length": 4,
    "y_norm_scale_factor": 1.0,
    "class_dropout_prob": 0.0,
}


def build(kernels, **overrides):
    torch.manual_seed(0)
    return SanaTransformer(TransformerConfig(**(TINY | overrides), kernels=kernels)).to(DEVICE)


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    latents, text = torch.randn(2, 4, 2, 3, generator=generator), torch.randn(2, 4, 16, generator=generator)
    return latents.to(DEVICE), torch.tensor([300.0, 700.0], device=DEVICE), text.to(DEVICE)


def gradients(model, arguments):
    output = model(*arguments)
    return output, torch.autograd.grad(output.square().mean(), list(model.parameters()))


@pytest.fixture
def compiler():
    """Nothing that an earlier test compiled."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def test_one_operation_compiles_whole(compiler):
    def attend(qkv):
        return linear_attention_qkv(qkv, 1, eps=1e-6, backend="triton") * 2

    qkv = torch.randn(1, 9, 96, device=DEVICE, requires_grad=True)
    compiled = torch.compile(attend, fullgraph=True, backend="inductor")
    actual, expected = compiled(qkv), attend(qkv)
    assert_close("o", actual, expected, rel_rms=1e-6)
    assert_close(
        "dqkv", *(torch.autograd.grad(x.sin().sum(), qkv)[0] for x in (actual, expected)), rel_rms=1e-6
    )


@pytest.mark.parametrize(
    "norms", [pytest.param(False, id="plain", marks=pytest.mark.slow), pytest.param(True, id="qk-norm")]
)
def test_whole_transformer_compiles_without_a_graph_break(norms, compiler):
    settings = {"qk_norm": norms, "cross_norm": norms}
    reference, model = build("torch", **settings), build("triton", **settings)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    output, found = gradients(compiled, batch())
    expected, wanted = gradients(reference, batch())
    assert_close("velocity", output, expected, rel_rms=1e-5)
    for (name, _), ours, theirs in zip(model.named_parameters(), found, wanted, strict=True):
        assert_close(name, ours, theirs, rel_rms=2e-5)


def test_autocast_and_half_precision_run():
    """float32 parameters under autocast, as in training, and bfloat16 parameters, as in inference."""
    reference = build("torch")(*batch())
    with torch.autocast(DEVICE, torch.bfloat16):
        output = build("triton")(*batch())
    assert_close("autocast", output, reference, rel_rms=5e-2)
    assert_close("bfloat16", build("triton").bfloat16()(*batch()), reference, rel_rms=5e-2)


@pytest.mark.slow
def test_training_with_and_without_kernels_ends_at_the_same_loss():
    """20 steps of AdamW towards a fixed target."""
    losses = {}
    for kernels in ("torch", "triton"):
        model = build(kernels)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses[kernels] = []
        for step in range(20):
            latents, timestep, text = batch(step)
            loss = (model(latents, timestep, text) - latents.flip(-1)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[kernels].append(loss.item())
    assert losses["torch"][-1] < 0.8 * losses["torch"][0]
    assert losses["triton"] == pytest.approx(losses["torch"], rel=1e-4)
