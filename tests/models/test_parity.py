"""SanaTransformer against diffusers' SanaTransformer2DModel, and code mutations that must break it.

Two independent implementations that agree prove the equations; the mutations prove that a change is noticed.
"""

import inspect
import textwrap

import pytest
import torch
from diffusers.models.attention_processor import PAGIdentitySanaLinearAttnProcessor2_0

import sana.models.attention as attention
import sana.models.layers as layers
import sana.ops.linear_attention as linear_attention
import sana.ops.mix_ffn as mix_ffn_op
import sana.ops.norm_modulate as norm_modulate
import sana.ops.rms_norm as rms_norm
from sana.models import transformer
from sana.models.mix_ffn import MixFFN
from sana.models.state_dict import from_diffusers
from tests.models.twin import build, build_twin, inputs, relative_rms, run_twin
from tests.numerics import assert_close

BOUND = 1e-6  # relative RMS in float32; measured: at most 2e-7

NORMS = {"qk_norm": True, "cross_norm": True}
POSITIONS = {"use_pe": True, "pe_base_size": 3, "pe_interpolation": 2.0}
CASES = {
    "plain": ({}, (4, 4)),
    "wide": ({}, (3, 7)),
    "tall-patch2": ({"patch_size": 2}, (5, 2)),
    "qk-norm": (NORMS, (4, 3)),
    "positions": (POSITIONS, (3, 5)),
    "everything": ({"patch_size": 2, **NORMS, **POSITIONS}, (3, 5)),
}


@pytest.mark.parametrize(("overrides", "grid"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("masked", [True, False], ids=["mask", "no-mask"])
def test_forward_equals_diffusers(overrides, grid, masked):
    model = build(**overrides)
    arguments = inputs(model.config, grid)
    if not masked:
        arguments["text_mask"] = None
    with torch.no_grad():
        assert_close("velocity", model(**arguments), run_twin(build_twin(model), arguments), rel_rms=BOUND)


def test_gradients_equal_diffusers():
    model = build(patch_size=2, **NORMS, **POSITIONS)
    twin, arguments = build_twin(model), inputs(model.config, (3, 5))
    cotangent = torch.randn_like(arguments["latents"])
    (model(**arguments) * cotangent).sum().backward()
    (run_twin(twin, arguments) * cotangent).sum().backward()
    theirs = from_diffusers({name: parameter.grad for name, parameter in twin.named_parameters()})
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        assert_close(name, gradient, theirs[name], rel_rms=5e-6)  # measured: at most 1e-6


def test_perturbed_block_equals_diffusers():
    model = build()
    twin, arguments = build_twin(model), inputs(model.config)

    class Perturbed(PAGIdentitySanaLinearAttnProcessor2_0):
        """The second half of that processor's batch is the perturbed one: feed the batch twice."""

        def __call__(self, attn, hidden_states, **kwargs):
            return super().__call__(attn, torch.cat([hidden_states] * 2), **kwargs).chunk(2)[1]

    twin.transformer_blocks[1].attn1.set_processor(Perturbed())
    with torch.no_grad():
        reference = run_twin(twin, arguments)
        assert_close("perturbed", model(**arguments, perturbed_blocks=[1]), reference, rel_rms=BOUND)
        assert relative_rms(model(**arguments), reference) > 1e-2
        assert relative_rms(model(**arguments, perturbed_blocks=[0]), reference) > 1e-2


# name: (owner, function or method, code to replace, replacement)
MUTATIONS = {
    "mask ignored": (attention, "softmax_attention", "attn_mask=mask", "attn_mask=None"),
    "mask inverted": (attention, "softmax_attention", "attn_mask=mask", "attn_mask=~mask"),
    "value and gate swapped": (mix_ffn_op, "depthwise_glu_reference", "value, gate =", "gate, value ="),
    "first SiLU dropped": (MixFFN, "forward", "silu=True", "silu=False"),
    "second SiLU dropped": (mix_ffn_op, "depthwise_glu_reference", "F.silu(gate)", "gate"),
    "depthwise filter flipped": (
        mix_ffn_op,
        "depthwise_glu_reference",
        "weight, bias,",
        "weight.flip(-1), bias,",
    ),
    "FFN grid transposed": (MixFFN, "forward", "unflatten(1, grid)", "unflatten(1, grid[::-1])"),
    "attention shift and scale swapped": (
        transformer.SanaBlock,
        "forward",
        "shift_attn, scale_attn, gate_attn,",
        "scale_attn, shift_attn, gate_attn,",
    ),
    "FFN gate and scale swapped": (
        transformer.SanaBlock,
        "forward",
        "shift_mlp, scale_mlp, gate_mlp =",
        "shift_mlp, gate_mlp, scale_mlp =",
    ),
    "attention gate dropped": (
        transformer.SanaBlock,
        "forward",
        "gate_attn, self.attn",
        "0 * gate_attn + 1, self.attn",
    ),
    "cross attention after a norm": (
        transformer.SanaBlock,
        "forward",
        "self._read_text(x,",
        "self._read_text(norm_modulate(x, 0 * gate_attn, 0 * gate_attn, eps=NORM_EPS),",
    ),
    "scale without one": (norm_modulate, "norm_modulate_reference", "(1 + scale)", "scale"),
    "final shift and scale swapped": (layers.FinalLayer, "forward", "shift, scale =", "scale, shift ="),
    "final layer takes t0": (
        transformer.SanaTransformer,
        "forward",
        "self.final_layer(x, t)",
        "self.final_layer(x, modulations[0][:, 0])",
    ),
    "cross keys and values swapped": (attention.CrossAttention, "keys_values", "k, v =", "v, k ="),
    "qkv read as kqv": (
        attention.LinearSelfAttention,
        "forward",
        "q, k, v = qkv.chunk",
        "k, q, v = qkv.chunk",
    ),
    "heads interleaved": (
        attention,
        "split_heads",
        "unflatten(-1, (num_heads, -1)).transpose(1, 2)",
        "unflatten(-1, (-1, num_heads)).permute(0, 3, 1, 2)",
    ),
    "ReLU of k dropped": (linear_attention, "linear_attention_reference", "k.relu()", "k"),
    "normaliser dropped": (
        linear_attention,
        "linear_attention_reference",
        "numerator / (normaliser + eps)",
        "numerator",
    ),
    "caption norm dropped": (
        transformer.SanaTransformer,
        "_text_tokens",
        "self.attention_y_norm(self.y_embedder(text_embeds.to(self.dtype)))",
        "self.y_embedder(text_embeds.to(self.dtype))",
    ),
    "norm weight dropped": (rms_norm, "rms_norm_reference", " * weight.to(wide.dtype)", ""),
    "GELU exact": (layers.CaptionProjection, "forward", 'approximate="tanh"', 'approximate="none"'),
    "sine before cosine in time": (
        layers,
        "timestep_features",
        "angles.cos(), angles.sin()",
        "angles.sin(), angles.cos()",
    ),
    "SiLU before t_block dropped": (
        transformer.SanaTransformer,
        "forward",
        "self.t_block(t)",
        "self.t_block[1](t)",
    ),
    "rows before columns in positions": (
        transformer,
        "position_embedding",
        "columns[None].expand(height, -1, -1), rows[:, None].expand(-1, width, -1)",
        "rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)",
    ),
    "cosine before sine in positions": (
        layers,
        "_axis_embedding",
        "angles.sin(), angles.cos()",
        "angles.cos(), angles.sin()",
    ),
    "interpolation ignored": (layers, "_axis_embedding", " / interpolation", ""),
    "base size ignored": (layers, "_axis_embedding", "(size / base_size)", "1"),
    "patch tokens column by column": (
        layers.PatchEmbed,
        "forward",
        "self.proj(latents).flatten(2)",
        "self.proj(latents).transpose(2, 3).flatten(2)",
    ),
    "channels before patch in unpatchify": (
        transformer,
        "unpatchify",
        "unflatten(-1, (p, p, -1))",
        "unflatten(-1, (-1, p, p)).permute(0, 1, 2, 4, 5, 3)",
    ),
    "patch transposed in unpatchify": (
        transformer,
        "unpatchify",
        "permute(0, 5, 1, 3, 2, 4)",
        "permute(0, 5, 1, 4, 2, 3)",
    ),
}


def mutate(monkeypatch, owner, name: str, old: str, new: str) -> None:
    """Replace `owner.name` by itself with `old` written as `new`, until the test ends."""
    function = getattr(owner, name)
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(old) == 1, f"{name} has {source.count(old)} of {old!r}: the mutation needs an update"
    scope: dict = {}
    exec(source.replace(old, new), function.__globals__, scope)  # noqa: S102 (our own source)
    monkeypatch.setattr(owner, name, scope[name])


@pytest.fixture(scope="module")
def everything():
    overrides, grid = CASES["everything"]
    model = build(**overrides)
    arguments = inputs(model.config, grid)
    with torch.no_grad():
        reference = run_twin(build_twin(model), arguments)
        assert relative_rms(model(**arguments), reference) <= BOUND
    return model, arguments, reference


@pytest.mark.parametrize("mutation", MUTATIONS.values(), ids=MUTATIONS)
def test_mutated_code_is_noticed(mutation, everything, monkeypatch):
    model, arguments, reference = everything
    monkeypatch.setattr(model, "_axes", {})  # of before the mutation
    mutate(monkeypatch, *mutation)
    with torch.no_grad():
        assert relative_rms(model(**arguments), reference) > 10 * BOUND
