"""Names, shapes and counts of parameters are contracts with the published checkpoints."""

import pytest
import torch

from sana.models.transformer import TransformerConfig
from sana.models.zoo import TRANSFORMERS, build_transformer
from tests.models.twin import SMALL

# Trainable parameters as published; the second number: with both q/k norms. Sprint always has them.
COUNTS = {
    "SanaMS_600M_P1_D28": (591_747_872, 591_876_896),
    "SanaMS_600M_P2_D28": (591_969_152, None),
    "SanaMS_600M_P4_D28": (592_854_272, None),
    "SanaMS_1600M_P1_D20": (1_604_462_752, 1_604_641_952),
    "SanaMS_1600M_P2_D20": (1_604_892_928, None),
    "SanaMS_2400M_P1_D30": (2_383_669_152, 2_383_937_952),
    "SanaMS_3200M_P1_D40": (3_162_875_552, 3_163_233_952),
    "SanaMS_4800M_P1_D60": (4_721_288_352, 4_721_825_952),
    "SanaMSCM_600M_P1_D28": (593_501_216, None),
    "SanaMSCM_1600M_P1_D20": (1_610_237_472, None),
    "SanaMSCM_2400M_P1_D30": (2_389_533_472, None),
    "SanaMS_Tiny_P1_D8": (6_845_024, None),
}


def published_shapes(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """The table of the published `.pth` files: key -> shape, without `pos_embed`."""
    d, h, p, c = config.hidden_size, int(2.5 * config.hidden_size), config.patch_size, config.caption_channels
    shapes: dict[str, tuple[int, ...]] = {
        "x_embedder.proj.weight": (d, 32, p, p),
        "y_embedder.y_embedding": (config.model_max_length, c),
        "final_layer.scale_shift_table": (2, d),
    }

    def linear(name, rows, columns, bias=True):
        shapes[f"{name}.weight"] = (rows, columns)
        if bias:
            shapes[f"{name}.bias"] = (rows,)

    shapes["x_embedder.proj.bias"] = (d,)
    linear("t_embedder.mlp.0", d, 256)
    linear("t_embedder.mlp.2", d, d)
    if config.cfg_embed:
        linear("cfg_embedder.mlp.0", d, 256)
        linear("cfg_embedder.mlp.2", d, d)
    linear("t_block.1", 6 * d, d)
    linear("y_embedder.y_proj.fc1", d, c)
    linear("y_embedder.y_proj.fc2", d, d)
    linear("final_layer.linear", 32 * p * p, d)
    if config.y_norm:
        shapes["attention_y_norm.weight"] = (d,)
    for i in range(config.depth):
        block = f"blocks.{i}"
        shapes[f"{block}.scale_shift_table"] = (6, d)
        linear(f"{block}.attn.qkv", 3 * d, d, bias=False)
        linear(f"{block}.attn.proj", d, d)
        linear(f"{block}.cross_attn.q_linear", d, d)
        linear(f"{block}.cross_attn.kv_linear", 2 * d, d)
        linear(f"{block}.cross_attn.proj", d, d)
        shapes[f"{block}.mlp.inverted_conv.conv.weight"] = (2 * h, d, 1, 1)
        shapes[f"{block}.mlp.inverted_conv.conv.bias"] = (2 * h,)
        shapes[f"{block}.mlp.depth_conv.conv.weight"] = (2 * h, 1, 3, 3)
        shapes[f"{block}.mlp.depth_conv.conv.bias"] = (2 * h,)
        shapes[f"{block}.mlp.point_conv.conv.weight"] = (d, h, 1, 1)
        for attention, present in (("attn", config.qk_norm), ("cross_attn", config.cross_norm)):
            if present:
                shapes[f"{block}.{attention}.q_norm.weight"] = (d,)
                shapes[f"{block}.{attention}.k_norm.weight"] = (d,)
    return shapes


def on_meta(name: str, **overrides):
    with torch.device("meta"):
        return build_transformer(name, **overrides)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        *((name, {}) for name in TRANSFORMERS),
        ("SanaMS_1600M_P1_D20", {"qk_norm": True, "cross_norm": True}),
        ("SanaMS_600M_P2_D28", {"qk_norm": True, "use_pe": True}),
        ("SanaMS_600M_P1_D28", {"cross_norm": True, "y_norm": False}),
    ],
    ids=lambda value: value if isinstance(value, str) else "+".join(value) or "default",
)
def test_names_and_shapes_are_published(name, overrides):
    model = on_meta(name, **overrides)
    actual = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert actual == published_shapes(model.config)
    assert [key for key, _ in model.named_buffers()] == ["y_embedder.y_embedding"]


def test_parameter_counts_are_published():
    assert COUNTS.keys() == TRANSFORMERS.keys()
    for name, (plain, normed) in COUNTS.items():
        assert sum(p.numel() for p in on_meta(name).parameters()) == plain, name
        if normed is not None:
            model = on_meta(name, qk_norm=True, cross_norm=True)
            assert sum(p.numel() for p in model.parameters()) == normed, name


def test_released_settings():
    for name, config in TRANSFORMERS.items():
        size, patch, depth = name.split("_")[1:]
        assert (config.patch_size, config.depth) == (int(patch[1:]), int(depth[1:])), name
        expected = {"600M": (1152, 16, 2304, 300), "Tiny": (224, 7, 128, 64)}.get(size, (2240, 20, 2304, 300))
        assert (
            config.hidden_size,
            config.num_heads,
            config.caption_channels,
            config.model_max_length,
        ) == expected
        assert (config.mlp_ratio, config.linear_head_dim, config.in_channels, config.out_channels) == (
            2.5,
            32,
            32,
            32,
        )
        assert config.y_norm and not (config.use_pe or config.clamp_attention)
        sprint = name.startswith("SanaMSCM")
        assert (config.qk_norm, config.cross_norm, config.cfg_embed) == (sprint, sprint, sprint)
        assert (config.cfg_embed_scale, config.timestep_norm_scale_factor) == (0.1, 1000 if sprint else 1)


def test_unknown_names_are_refused():
    with pytest.raises(
        ValueError, match="'SanaMS_600M_P1_D82': did you mean 'SanaMS_600M_P1_D28'.*SanaMS_4800M_P1_D60"
    ):
        build_transformer("SanaMS_600M_P1_D82")
    with pytest.raises(ValueError, match="'qknorm': did you mean 'qk_norm'.*pe_interpolation"):
        build_transformer("SanaMS_Tiny_P1_D8", qknorm=True)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_heads": 5}, "hidden_size 64 is not a multiple of num_heads 5"),
        ({"linear_head_dim": 48}, "hidden_size 64 is not a multiple of linear_head_dim 48"),
        ({"class_dropout_prob": 1.5}, r"class_dropout_prob 1.5 is not in \[0, 1\]"),
        ({"timestep_norm_scale_factor": 0.0}, "timestep_norm_scale_factor must be above 0, got 0.0"),
        (
            {"hidden_size": 66, "num_heads": 2, "linear_head_dim": 33, "use_pe": True},
            "66 is not a multiple of 4",
        ),
    ],
)
def test_impossible_configs_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**{**SMALL, **overrides})


@pytest.fixture(scope="module")
def model():
    """A fresh model, wide enough for four standard errors to be a few percent."""
    torch.manual_seed(0)
    return build_transformer(
        "SanaMS_Tiny_P1_D8",
        depth=2,
        hidden_size=256,
        num_heads=8,
        caption_channels=192,
        patch_size=2,
        qk_norm=True,
        cross_norm=True,
    ).requires_grad_(False)


def check_uniform(name, tensor, bound, rel=0.03):
    assert tensor.abs().max() <= bound * (1 + 1e-6), name
    assert tensor.abs().max() > bound * (1 - rel), name
    assert tensor.std() == pytest.approx(bound / 3**0.5, rel=rel), name


def test_initial_linear_weights_are_xavier_uniform_with_zero_bias(model):
    special = {
        "t_embedder.mlp.0",
        "t_embedder.mlp.2",
        "t_block.1",
        "y_embedder.y_proj.fc1",
        "y_embedder.y_proj.fc2",
    }
    checked = 0
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert module.bias is None or not module.bias.any(), name
            if name in special:
                assert module.weight.std() == pytest.approx(0.02, rel=0.03), name
                assert module.weight.abs().max() > 0.06, name  # normal, not uniform
            else:
                check_uniform(name, module.weight, (6 / sum(module.weight.shape)) ** 0.5)
                checked += 1
    assert checked == 2 * 5 + 1


def test_initial_patch_embedding_is_xavier_uniform_on_patches(model):
    proj = model.x_embedder.proj
    check_uniform("weight", proj.weight, (6 / (256 + 32 * 4)) ** 0.5)
    check_uniform("bias", proj.bias, (32 * 4) ** -0.5, rel=0.2)


def test_initial_ffn_convolutions_keep_the_default(model):
    for block in model.blocks:
        for conv, fan_in in (
            (block.mlp.inverted_conv.conv, 256),
            (block.mlp.depth_conv.conv, 9),
            (block.mlp.point_conv.conv, 640),
        ):
            check_uniform("weight", conv.weight, fan_in**-0.5)
            if conv.bias is not None:
                check_uniform("bias", conv.bias, fan_in**-0.5, rel=0.1)


def test_initial_tables_norms_and_null_caption(model):
    for module in (*model.blocks, model.final_layer):
        assert module.scale_shift_table.std() == pytest.approx(256**-0.5, rel=0.15)
    assert model.y_embedder.y_embedding.std() == pytest.approx(192**-0.5, rel=0.05)
    assert torch.equal(model.attention_y_norm.weight, torch.full((256,), 0.01))
    for block in model.blocks:
        for norm in (
            block.attn.q_norm,
            block.attn.k_norm,
            block.cross_attn.q_norm,
            block.cross_attn.k_norm,
        ):
            assert torch.equal(norm.weight, torch.ones(256))
