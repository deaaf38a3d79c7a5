"""What SanaTransformer promises beside equations (test_parity.py): arguments, dtypes, caches, gradients."""

import copy
from dataclasses import FrozenInstanceError

import pytest
import torch

from sana.models import layers
from sana.models.attention import FoldedText
from sana.models.layers import position_embedding, timestep_features
from sana.models.transformer import SanaTransformer, TransformerConfig
from tests.models.twin import LENGTH, SMALL, build, build_twin, inputs, make_generic, relative_rms, run_twin
from tests.numerics import assert_close

NORMS = {"qk_norm": True, "cross_norm": True}


@pytest.fixture
def model():
    return build()


def test_position_embedding_vector():
    """The reference's table for D 8, h 2, w 3, base 4, interpolation 1."""
    row = [[0, 0, 1, 1], [0.97194, 0.01333, 0.23524, 0.99991], [0.45727, 0.02666, -0.88933, 0.99964]]
    column = [[0, 0, 1, 1], [0.9093, 0.02, -0.41615, 0.9998]]
    expected = torch.tensor([width + height for height in column for width in row], dtype=torch.float64)
    actual = position_embedding(8, (2, 3), base_size=4, interpolation=1.0)
    torch.testing.assert_close(actual, expected, atol=6e-6, rtol=0)
    # Interpolation divides the positions: twice the base at half the scale is the same table.
    torch.testing.assert_close(position_embedding(8, (2, 3), base_size=8, interpolation=2.0), actual)


def test_position_embedding_without_base_counts_tokens():
    """Each side is its own base: coordinates 0, 1, 2, ... whatever the grid."""
    table = position_embedding(8, (3, 5), base_size=None, interpolation=1.0).unflatten(0, (3, 5))
    torch.testing.assert_close(table[0, :, 0], torch.arange(5.0, dtype=torch.float64).sin())
    torch.testing.assert_close(table[:, 0, 4], torch.arange(3.0, dtype=torch.float64).sin())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_positions_are_computed_once_for_each_length(dtype, monkeypatch):
    """To the bit the table that is computed anew; in no checkpoint, and of use to training after inference."""
    model, made, axis = build(use_pe=True, pe_base_size=4).to(dtype), [], layers._axis_embedding
    monkeypatch.setattr(layers, "_axis_embedding", lambda *given: made.append(given[1]) or axis(*given))
    grids = ((4, 6), (6, 4), (4, 6), (5, 4))
    latents = [inputs(model.config, grid)["latents"].to(dtype) for grid in grids]
    with torch.inference_mode():
        tokens = list(map(model._embed_latents, latents, grids))
    assert made == [4, 6, 5]
    for grid, given, embedded in zip(grids, latents, tokens, strict=True):
        table = position_embedding(SMALL["hidden_size"], grid, base_size=4, interpolation=1.0).to(dtype)
        assert torch.equal(embedded, model.x_embedder(given) + table)
    model._embed_latents(latents[0], grids[0]).sum().backward()
    assert not any("axes" in key for key in model.state_dict())


def test_a_compiled_network_computes_positions_itself():
    model = build(use_pe=True, pe_base_size=4)
    arguments = inputs(model.config, (4, 6))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert_close("compiled", compiled(**arguments), model(**arguments), rel_rms=1e-6)
        model._axes.clear()
        compiled(**arguments)
    assert not model._axes


def test_timestep_features_are_float32_under_autocast():
    """In bfloat16 the neighbours 999 and 1000 would be one."""
    with torch.autocast("cpu", torch.bfloat16):
        features = timestep_features(torch.tensor([999.0, 1000.0], dtype=torch.float32))
    assert features.dtype == torch.float32
    assert features[0, 0] == pytest.approx(torch.tensor(999.0, dtype=torch.float64).cos().item(), abs=1e-4)
    assert features[0, 128] == pytest.approx(torch.tensor(999.0, dtype=torch.float64).sin().item(), abs=1e-4)


@pytest.mark.parametrize("overrides", [{}, NORMS], ids=["plain", "qk-norm"])
@pytest.mark.parametrize(
    ("dtype", "bound"),
    [(torch.bfloat16, 2e-2), (torch.float16, 2.5e-3)],  # measured: at most 8e-3 and 1e-3
    ids=["bfloat16", "float16"],
)
def test_half_precision_is_close_to_float32(overrides, dtype, bound):
    model = build(**overrides)
    arguments = inputs(model.config)
    with torch.no_grad():
        reference = model(**arguments)
        with torch.autocast("cpu", dtype):
            assert_close("autocast", model(**arguments), reference, rel_rms=bound)
        half = copy.deepcopy(model).to(dtype)(**arguments)
    assert half.dtype == dtype
    assert_close("half weights", half, reference, rel_rms=bound)


def test_linear_attention_stays_float32_under_autocast_unless_told():
    """fp32_attention decides whether the state of the attention is rounded to the autocast dtype."""
    errors = {}
    for fp32 in (True, False):
        attention = build(fp32_attention=fp32).blocks[0].attn
        x = torch.randn(1, 512, 64, generator=torch.Generator().manual_seed(0))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            q, k, v = (
                part.double().unflatten(-1, (2, -1)).transpose(1, 2) for part in attention.qkv(x).chunk(3, -1)
            )
            weights = q.relu() @ k.relu().transpose(-1, -2)
            exact = (weights / weights.sum(-1, keepdim=True)) @ v
            hidden = exact.transpose(1, 2).flatten(2).bfloat16()
            errors[fp32] = relative_rms(attention(x), attention.proj(hidden))
    assert errors[True] < 1e-4 < 1e-3 < errors[False]  # measured: 0 and 1.7e-3


FP16_MAX = 65504


@pytest.mark.parametrize("perturbed", [False, True], ids=["attention", "perturbed"])
def test_clamp_clips_the_projected_attention(perturbed):
    """Exactly, in any dtype, as diffusers' processor does in float16; a value that fits stays as it is."""
    free, clamped = (build(clamp_attention=clamp).blocks[0].attn for clamp in (False, True))
    x = torch.randn(2, 12, 64, generator=torch.Generator().manual_seed(0))
    for attention in (free, clamped):
        attention.qkv.weight.data *= 4
        attention.proj.weight.data *= 5e4
    with torch.no_grad():
        expected = free(x, perturbed=perturbed)
        share = (expected.abs() > FP16_MAX).double().mean()
        assert 0.05 < share < 0.95
        actual = clamped(x, perturbed=perturbed)
        assert torch.equal(actual, expected.clip(-FP16_MAX, FP16_MAX))
        half = clamped.half()(x.half(), perturbed=perturbed)
    assert half.isfinite().all() and half.dtype == torch.float16
    assert_close("float16", half, actual, rel_rms=2e-3)


def test_clamped_float32_equals_clipping_float16_of_diffusers():
    """Weights that overflow float16 give the same image in float32, and another one without the clamp."""
    clamped, free = (build(clamp_attention=clamp) for clamp in (True, False))
    for model in (clamped, free):
        block = model.blocks[0]
        block.attn.qkv.weight.data *= 4
        block.attn.proj.weight.data *= 5e4
        block.scale_shift_table.data[2] *= 1e-4  # the gate of the attention
        model.t_block[1].weight.data[2 * 64 : 3 * 64] *= 1e-4
        model.t_block[1].bias.data[2 * 64 : 3 * 64] *= 1e-4
    arguments = inputs(clamped.config)
    twin = build_twin(clamped).half()
    halves = {name: value.half() if value.is_floating_point() else value for name, value in arguments.items()}
    with torch.no_grad():
        expected = run_twin(twin, {**halves, "timestep": arguments["timestep"]})
        assert_close("clamped", clamped(**arguments), expected, rel_rms=4e-3)  # measured 1.2e-3
        assert relative_rms(free(**arguments), expected) > 0.1


def test_masked_tokens_are_not_read(model):
    """Whatever they hold; the mask may be bool or integer, and no mask means every token."""
    arguments = inputs(model.config)
    with torch.no_grad():
        reference = model(**arguments)
        hidden = ~arguments["text_mask"][..., None]
        changed = {**arguments, "text_embeds": arguments["text_embeds"].masked_fill(hidden, 1e3)}
        assert torch.equal(model(**changed), reference)
        assert torch.equal(model(**{**arguments, "text_mask": arguments["text_mask"].long()}), reference)
        full = {**arguments, "text_mask": torch.ones_like(arguments["text_mask"])}
        assert_close("no mask", model(**{**arguments, "text_mask": None}), model(**full), rel_rms=1e-6)
        assert relative_rms(model(**full), reference) > 1e-2


def test_row_without_valid_token_attends_to_all(model):
    arguments = inputs(model.config)
    empty, full = arguments["text_mask"].clone(), arguments["text_mask"].clone()
    empty[1], full[1] = False, True
    with torch.no_grad():
        assert torch.equal(
            model(**{**arguments, "text_mask": empty}), model(**{**arguments, "text_mask": full})
        )


def test_images_do_not_depend_on_their_neighbours(model):
    arguments = inputs(model.config)
    with torch.no_grad():
        together = model(**arguments)
        for i in range(3):
            alone = model(**{name: value[i : i + 1] for name, value in arguments.items()})
            assert_close(f"image {i}", together[i : i + 1], alone, rel_rms=1e-6)  # measured: at most 3.6e-7


def test_equal_calls_are_equal(model):
    """Nothing is kept between calls, not even from a call on another grid."""
    first = inputs(model.config)
    with torch.no_grad():
        reference = model(**first)
        model(**inputs(model.config, (2, 6), seed=2))
        assert torch.equal(model(**first), reference)


@pytest.mark.parametrize("tokens", [LENGTH, 16], ids=["folded", "keys and values"])
def test_text_cache_gives_the_same_output(tokens):
    model = build()
    arguments = inputs(model.config)
    wider = torch.randn(
        3, tokens - LENGTH, model.config.caption_channels, generator=torch.Generator().manual_seed(5)
    )
    arguments["text_embeds"] = torch.cat([arguments["text_embeds"], wider], dim=1)
    arguments["text_mask"] = torch.cat([arguments["text_mask"], wider[..., 0] > 0], dim=1)
    call = (arguments["latents"], arguments["timestep"], None)
    with torch.no_grad():
        cache = model.encode_text(arguments["text_embeds"], arguments["text_mask"])
        assert all(
            isinstance(block, FoldedText) == (tokens < 16) for block in cache.blocks
        )  # heads of 16 channels
        assert_close(
            "cached", model(*call, text_cache=cache), model(**arguments), rel_rms=1e-6
        )  # measured: 2.2e-7
        part = model(*(x[-2:] for x in call[:2]), None, text_cache=cache.last(2))
        assert_close("last two", part, model(**arguments)[-2:], rel_rms=1e-6)
        unmasked = model.encode_text(arguments["text_embeds"])
        without = model(*call, text_cache=unmasked, perturbed_blocks=[0])
        reference = model(**{**arguments, "text_mask": None}, perturbed_blocks=[0])
        assert_close("unmasked", without, reference, rel_rms=1e-6)
        everything = model.encode_text(arguments["text_embeds"], torch.ones_like(arguments["text_mask"]))
        assert everything.mask is None
    with pytest.raises(FrozenInstanceError):
        cache.mask = None


def test_folded_text_is_for_plain_layers_without_gradients(model):
    """What does not hold its own weights, or has a norm between, keeps its keys and values."""
    text = inputs(model.config)["text_embeds"]
    assert not any(isinstance(block, FoldedText) for block in model.encode_text(text).blocks), (
        "with gradients"
    )
    with torch.no_grad():
        normed = build(cross_norm=True).encode_text(text)
        assert not any(isinstance(block, FoldedText) for block in normed.blocks)
        replaced = copy.deepcopy(model)
        replaced.blocks[1].cross_attn.proj = torch.nn.Sequential(replaced.blocks[1].cross_attn.proj)
        assert [isinstance(block, FoldedText) for block in replaced.encode_text(text).blocks] == [True, False]


def test_time_cache_gives_the_same_output(model):
    arguments = inputs(model.config)
    times = torch.tensor([7.0, 431.0, 999.0])
    with torch.no_grad():
        steps = model.encode_time(times)
        assert len(steps) == 3
        for time, step in zip(times, steps, strict=True):
            expected = model(**{**arguments, "timestep": time.expand(3)})
            actual = model(**{**arguments, "timestep": step})
            assert_close(f"time {time:g}", actual, expected, rel_rms=1e-6)  # measured: at most 1.3e-7


def test_text_cache_refuses_what_it_cannot_do(model):
    with pytest.raises(ValueError, match=r"text_embeds has shape \(3, 24\)"):
        model.encode_text(torch.zeros(3, 24))
    arguments = inputs(model.config)
    cache = model.encode_text(arguments["text_embeds"], arguments["text_mask"])
    call = (arguments["latents"], arguments["timestep"], None)
    with pytest.raises(ValueError, match="captions cannot be dropped"):
        model(*call, text_cache=cache, drop_caption=torch.zeros(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="captions cannot be dropped.*eval"):
        copy.deepcopy(model).train()(*call, text_cache=cache)
    with pytest.raises(ValueError, match="text_cache is of 2 blocks, but the model has 3"):
        build(depth=3)(*call, text_cache=cache)


def test_perturbed_attention_by_hand(model):
    """In the listed blocks, and only there, the self-attention is proj(V x)."""
    arguments = inputs(model.config)
    by_hand = copy.deepcopy(model)
    attention = by_hand.blocks[1].attn
    value = attention.qkv.weight[2 * 64 :]
    attention.forward = lambda x, perturbed: x @ value.T @ attention.proj.weight.T + attention.proj.bias
    with torch.no_grad():
        assert_close(
            "perturbed", model(**arguments, perturbed_blocks=[1]), by_hand(**arguments), rel_rms=1e-6
        )
        assert relative_rms(model(**arguments), by_hand(**arguments)) > 1e-2
        assert torch.equal(
            model(**arguments, perturbed_blocks=(1, 1)), model(**arguments, perturbed_blocks={1})
        )
        assert torch.equal(model(**arguments, perturbed_blocks=()), model(**arguments))


def test_dropped_captions_become_the_null_caption(model):
    """The features are replaced before the projection; the mask stays the prompt's."""
    arguments = inputs(model.config)
    dropped = torch.tensor([True, False, True])
    replaced = arguments["text_embeds"].clone()
    replaced[dropped] = model.y_embedder.y_embedding[:LENGTH]
    with torch.no_grad():
        expected = model(**{**arguments, "text_embeds": replaced})
        assert torch.equal(model(**arguments, drop_caption=dropped), expected)
        assert torch.equal(model.train()(**arguments, drop_caption=dropped), expected)


def test_captions_are_dropped_in_training_only():
    model = build(class_dropout_prob=0.5)
    arguments = inputs(model.config, batch=12)
    with torch.no_grad():
        assert torch.equal(
            model(**arguments), model(**arguments, drop_caption=torch.zeros(12, dtype=torch.bool))
        )
        torch.manual_seed(0)
        drawn = torch.rand(12) < 0.5
        assert 0 < drawn.sum() < 12
        torch.manual_seed(0)
        assert torch.equal(model.train()(**arguments), model(**arguments, drop_caption=drawn))
        never = build(class_dropout_prob=0.0)
        assert torch.equal(never.train()(**arguments), never.eval()(**arguments))


def test_gradients_reach_every_parameter():
    """In training mode, with all captions kept, from the initialisation of a fresh model."""
    torch.manual_seed(0)
    model = SanaTransformer(TransformerConfig(**SMALL, **NORMS, class_dropout_prob=0.0)).train()
    model(**inputs(model.config)).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("blocks", [None, 1])
def test_gradient_checkpointing_changes_no_gradient(autocast, blocks):
    gradients = []
    for checkpointing in (False, True):
        settings = {"gradient_checkpointing": checkpointing, "checkpointed_blocks": blocks}
        model = build(**settings, class_dropout_prob=0.5).train()
        torch.manual_seed(0)
        calls, last_calls = [], []
        model.blocks[0].register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        model.blocks[-1].register_forward_pre_hook(lambda *_, calls=last_calls: calls.append(1))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(**inputs(model.config)).float().square().mean()
        loss.backward()
        assert len(calls) == 1 + checkpointing  # the block ran again in the backward pass
        assert len(last_calls) == 1 + (checkpointing and blocks is None)
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_forward_hooks_fire_on_every_module(model):
    """Modules are called, never bypassed, so that hooks, adapters and quantisers see them.

    The depthwise convolution alone is not: the operation that fuses it with the gate reads its weights. (Nor are norms
    that are none.)
    """
    fired = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Identity)}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: fired.add(name))
    with torch.no_grad():
        model(**inputs(model.config))
    silent = {name for name, _ in model.named_modules()} - fired
    fused = {f"blocks.{i}.mlp.depth_conv{conv}" for i in range(2) for conv in ("", ".conv")}
    assert silent == fused | {"blocks"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latents": torch.zeros(3, 4, 8, 8)}, r"latents have shape \(3, 4, 8, 8\); expected \(B, 8, H, W\)"),
        ({"latents": torch.zeros(3, 8, 5, 8)}, "multiples of 2"),
        ({"latents": torch.zeros(2, 8, 8, 8)}, "there are 2 latents, 3 texts and timesteps of shape .3,."),
        ({"timestep": torch.zeros(2)}, r"timesteps of shape \(2,\)"),
        ({"timestep": torch.zeros(3, 1)}, r"timesteps of shape \(3, 1\)"),
        ({"text_embeds": torch.zeros(3, 7, 8)}, r"text_embeds has shape \(3, 7, 8\); expected \(B, L, 24\)"),
        ({"text_embeds": None}, "text_embeds is None"),
        ({"text_embeds": torch.zeros(6, 7, 24), "text_mask": None}, "there are 3 latents, 6 texts"),
        ({"text_mask": torch.ones(1, 7)}, r"text_mask has shape \(1, 7\), but text_embeds is \(3, 7\)"),
        ({"text_mask": torch.ones(3, 6)}, r"text_mask has shape \(3, 6\), but text_embeds is \(3, 7\)"),
        ({"perturbed_blocks": [1, 2]}, r"perturbed_blocks \[2\] out of range: the model has blocks 0 to 1"),
        ({"perturbed_blocks": [-1]}, r"perturbed_blocks \[-1\] out of range"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change, message):
    model = build(patch_size=2)
    for mode in (model.eval(), model.train()):
        with pytest.raises(ValueError, match=message):
            mode(**{**inputs(model.config), **change})


def test_prompt_longer_than_the_null_caption_cannot_be_dropped(model):
    arguments = inputs(model.config)
    long = {**arguments, "text_embeds": torch.zeros(3, 10, 24), "text_mask": None}
    with torch.no_grad():
        assert model(**long).shape == arguments["latents"].shape
    with pytest.raises(ValueError, match="10 tokens, but the null caption only 9.*model_max_length"):
        model(**long, drop_caption=torch.ones(3, dtype=torch.bool))


def test_meta_device_computes_shapes():
    """So that sizes and operations of the large models can be counted without memory."""
    with torch.device("meta"):
        model = make_generic(SanaTransformer(TransformerConfig(**SMALL, patch_size=2, use_pe=True)))
    arguments = {name: value.to("meta") for name, value in inputs(model.config, (3, 5)).items()}
    assert model.eval()(**arguments).shape == (3, 8, 6, 10)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)], ids=str
)
def test_cuda_equals_cpu(dtype, bound, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # of the patch embedding, a convolution
    model = build(use_pe=True, pe_base_size=4, **NORMS)
    arguments = inputs(model.config, (3, 5))
    with torch.no_grad():
        reference = model(**arguments)
        on_gpu = {name: value.cuda() for name, value in arguments.items()}
        assert_close("cuda", model.to("cuda", dtype)(**on_gpu), reference, rel_rms=bound)
