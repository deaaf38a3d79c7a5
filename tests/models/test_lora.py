"""LoRA files of every style of names against the unfused computation: W x + (alpha / r) B (A x)."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from sana.models.key_names import from_diffusers
from sana.models.lora import load_lora, unload_lora
from tests.models.twin import build, build_twin, inputs, relative_rms, run_twin
from tests.numerics import assert_close

RANK = 4
BOUND = 1e-5  # relative RMS in float32; measured: at most 4e-7
BLOCK = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_q", "attn2.to_k", "attn2.to_v")
MODULES = [  # names of diffusers: every kind of matrix
    *(f"transformer_blocks.{i}.{name}" for i in (0, 1) for name in BLOCK),
    "transformer_blocks.1.attn2.to_out.0",
    "transformer_blocks.0.ff.conv_inverted",
    "transformer_blocks.1.ff.conv_point",
    "patch_embed.proj",
    "time_embed.linear",
    "time_embed.emb.timestep_embedder.linear_1",
    "caption_projection.linear_2",
    "proj_out",
]
Q, K, QKV = "transformer_blocks.0.attn1.to_q", "transformer_blocks.0.attn1.to_k", "blocks.0.attn.qkv"


@pytest.fixture
def model():
    return build(patch_size=2, qk_norm=True, cross_norm=True)


def factors(weights: dict[str, torch.Tensor], rank: int = RANK, seed: int = 0) -> dict:
    """Module -> (A, B), random, for weights of linear layers and convolutions."""
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for name, weight in weights.items():
        down = torch.randn(rank, *weight.shape[1:], generator=generator) * weight[0].numel() ** -0.5
        up = torch.randn(len(weight), rank, *(1 for _ in weight.shape[2:]), generator=generator)
        pairs[name] = (down, 0.5 * up)
    return pairs


def twin_factors(model, names=MODULES, **settings) -> dict:
    twin = build_twin(model)
    return factors({name: twin.get_submodule(name).weight for name in names}, **settings)


def tensors(pairs: dict, name="transformer.{}", down="lora_A", up="lora_B") -> dict[str, torch.Tensor]:
    """The pairs under a style of keys."""
    found = {}
    for module, (a, b) in pairs.items():
        found |= {f"{name.format(module)}.{down}.weight": a, f"{name.format(module)}.{up}.weight": b}
    return found


def save(folder, content: dict, name="lora.safetensors", metadata=None):
    folder.mkdir(exist_ok=True)
    save_file({key: value.clone() for key, value in content.items()}, folder / name, metadata)
    return folder / name


def product(pair) -> torch.Tensor:
    a, b = pair
    return (b.flatten(1) @ a.flatten(1)).view(len(b), *a.shape[1:])


def bits(model) -> dict:
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_same(state: dict, expected: dict) -> None:
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        assert state[key].dtype == value.dtype and torch.equal(state[key], value), key


def add_unfused(twin: nn.Module, pairs: dict, scale: float) -> None:
    """Each layer of the twin adds scale B(A(x)) to its output: no weight is touched."""

    def adds(a, b):
        def hook(module, args, output):
            if isinstance(module, nn.Linear):
                return output + scale * F.linear(F.linear(args[0], a), b)
            return output + scale * F.conv2d(F.conv2d(args[0], a, stride=module.stride), b)

        return hook

    for name, pair in pairs.items():
        twin.get_submodule(name).register_forward_hook(adds(*pair))


@pytest.mark.parametrize("weight", [1.0, -0.5])
def test_fused_equals_unfused_diffusers(model, tmp_path, weight):
    pairs, arguments = twin_factors(model), inputs(model.config, (3, 5))
    alpha, twin = 2.0, build_twin(model)
    add_unfused(twin, pairs, weight * alpha / RANK)
    settings = {"transformer.r": RANK, "transformer.lora_alpha": alpha}
    file = save(tmp_path, tensors(pairs), metadata={"lora_adapter_metadata": json.dumps(settings)})
    with torch.no_grad():
        plain = model(**arguments)
        load_lora(model, file, weight)
        fused = model(**arguments)
        assert_close("velocity", fused, run_twin(twin, arguments), rel_rms=BOUND)
    assert relative_rms(fused, plain) > 0.05


def test_fused_equals_peft(model, tmp_path):
    """The library that writes such files, where it is installed: its settings, its file, its own forward."""
    peft = pytest.importorskip("peft")
    twin, arguments = build_twin(model), inputs(model.config, (3, 5))
    targets = ["to_q", "to_k", "to_v", "to_out.0", "conv_inverted", "conv_point", "linear_2"]
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=6,
        target_modules=targets,
        rank_pattern={"to_k": 2},
        alpha_pattern={"attn2.to_v": 1},
    )
    twin.add_adapter(config)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in twin.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.2, generator=generator)
    twin.save_lora_adapter(tmp_path)
    with torch.no_grad():
        load_lora(model, tmp_path)
        assert_close("velocity", model(**arguments), run_twin(twin, arguments), rel_rms=BOUND)


STYLES = {
    "diffusers": {},
    "bare": {"name": "{}"},
    "peft": {"name": "base_model.model.{}"},
    "peft in memory": {"name": "base_model.model.{}", "down": "lora_A.default", "up": "lora_B.default"},
    "older": {"down": "lora.down", "up": "lora.up"},
    "kohya": {"name": "lora_unet_{}", "down": "lora_down", "up": "lora_up"},
}


@pytest.mark.parametrize("style", STYLES)
def test_every_style_of_names(model, tmp_path, style):
    pairs = twin_factors(model)
    twin = build_twin(model).state_dict()
    for name, pair in pairs.items():
        twin[f"{name}.weight"] = twin[f"{name}.weight"] + product(pair)
    expected = from_diffusers(twin)
    written = {name.replace(".", "_"): pair for name, pair in pairs.items()} if style == "kohya" else pairs
    load_lora(model, save(tmp_path, tensors(written, **STYLES[style])))
    for key, value in expected.items():
        assert_close(key, model.state_dict()[key], value, rel_rms=1e-6)


@pytest.mark.parametrize("name", ["base_model.model.{}", "diffusion_model.{}"])
def test_published_names(model, tmp_path, name):
    names = [QKV, "blocks.1.cross_attn.kv_linear", "blocks.1.mlp.point_conv.conv", "final_layer.linear"]
    before = bits(model)
    pairs = factors({module: before[f"{module}.weight"] for module in names})
    load_lora(model, save(tmp_path, tensors(pairs, name)))
    expected = {f"{module}.weight": before[f"{module}.weight"] + product(pairs[module]) for module in names}
    for key, value in model.state_dict().items():
        assert_close(key, value, expected.get(key, before[key]), rel_rms=1e-6)


def test_a_guidance_embedding_has_its_own_names(tmp_path):
    model = build(cfg_embed=True)
    names = {  # of diffusers' guidance_embeds
        "time_embed.guidance_embedder.linear_1": "cfg_embedder.mlp.0.weight",
        "time_embed.timestep_embedder.linear_2": "t_embedder.mlp.2.weight",
    }
    before = bits(model)
    pairs = factors({name: before[key] for name, key in names.items()})
    load_lora(model, save(tmp_path, tensors(pairs)))
    for name, key in names.items():
        assert_close(key, model.state_dict()[key], before[key] + product(pairs[name]), rel_rms=1e-6)


def test_only_the_rows_of_its_part_change(model, tmp_path):
    before = bits(model)[f"{QKV}.weight"]
    load_lora(model, save(tmp_path, tensors(twin_factors(model, [K]))))
    changed = (model.state_dict()[f"{QKV}.weight"] != before).any(dim=1)
    width = model.config.hidden_size
    assert changed.nonzero().flatten().tolist() == list(range(width, 2 * width))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_several_add_up_and_unload_restores_every_bit(model, tmp_path, dtype):
    model.to(dtype)
    before = bits(model)
    first, second = twin_factors(model, seed=1), twin_factors(model, [Q, "proj_out"], rank=2, seed=2)
    first_file, second_file = save(tmp_path, tensors(first), "1.safetensors"), save(tmp_path, tensors(second))
    load_lora(model, first_file)
    load_lora(model, second_file, 0.25)
    wide = before[f"{QKV}.weight"].to(torch.float32, copy=True)
    width = model.config.hidden_size
    for part, name in enumerate(name for name in MODULES[:3]):
        wide[part * width : (part + 1) * width] += product(first[name])
    wide[:width] += 0.25 * product(second[Q])
    # Rounded once to the weights' dtype, however many files: up to a last bit of the float32 sum.
    assert_close(
        "qkv",
        model.state_dict()[f"{QKV}.weight"],
        wide.to(dtype),
        rel_rms=1e-4 if dtype != torch.float32 else 1e-6,
    )
    twin = copy.deepcopy(model)
    unload_lora(model)
    assert_same(bits(model), before)
    unload_lora(model)  # a second time: nothing happens
    assert_same(bits(model), before)
    unload_lora(twin)  # a copy has its own record
    assert_same(bits(twin), before)


def test_many_files_are_rounded_once(tmp_path):
    """In bfloat16, 64 changes that are each too small to move a weight still add up."""
    model = build().to(torch.bfloat16)
    key = f"{QKV}.weight"
    before = model.state_dict()[key].clone()
    pairs = {name: (a, b * 1e-3) for name, (a, b) in twin_factors(build(), [Q]).items()}
    file = save(tmp_path, tensors(pairs))
    for _ in range(64):
        load_lora(model, file)
    rows = slice(model.config.hidden_size)
    expected = (before[rows].float() + 64 * product(pairs[Q])).bfloat16()
    assert_close("sum", model.state_dict()[key][rows], expected, rel_rms=5e-4)  # measured: 1.3e-4
    assert relative_rms(expected, before[rows]) > 1e-2


def test_other_weights_forget_the_lora(model, tmp_path):
    file = save(tmp_path, tensors(twin_factors(model, [Q])))
    load_lora(model, file)
    other = bits(build(seed=7, patch_size=2, qk_norm=True, cross_norm=True))
    model.load_state_dict(other)
    unload_lora(model)
    assert_same(bits(model), other)
    load_lora(model, file)
    unload_lora(model)
    assert_same(bits(model), other)


ALPHAS = {
    # name: (settings of peft, alpha tensor, expected scale)
    "nothing said": ({}, None, 1.0),
    "settings": ({"r": RANK, "lora_alpha": 8}, None, 2.0),
    "tensor first": ({"lora_alpha": 8}, torch.tensor(1.0), 0.25),
    "pattern": ({"lora_alpha": 8, "alpha_pattern": {"attn1.to_q": 2}}, None, 0.5),
    "pattern of another module": ({"lora_alpha": 8, "alpha_pattern": {"to_k": 2, "o_q": 2}}, None, 2.0),
    "rank pattern": ({"r": 16, "rank_pattern": {r"0\.attn1\.to_[qk]": RANK}, "lora_alpha": 8}, None, 2.0),
    "stabilised": ({"lora_alpha": 8, "use_rslora": True}, None, 4.0),
}


@pytest.mark.parametrize("place", ["adapter_config.json", "header"])
@pytest.mark.parametrize("case", ALPHAS)
def test_alpha(model, tmp_path, case, place):
    settings, alpha, scale = ALPHAS[case]
    pairs, before = twin_factors(model, [Q]), bits(model)[f"{QKV}.weight"]
    content = tensors(pairs, "base_model.model.{}" if place != "header" else "transformer.{}")
    if alpha is not None:
        content[next(iter(content)).replace("lora_A.weight", "alpha")] = alpha
    if place == "header":
        packed = json.dumps({f"transformer.{key}": value for key, value in settings.items()})
        path = save(tmp_path, content, metadata={"lora_adapter_metadata": packed})
    else:
        save(tmp_path, content, "adapter_model.safetensors")
        save(tmp_path, {"x": alpha if alpha is not None else torch.ones(1)}, "training_args.safetensors")
        (tmp_path / place).write_text(json.dumps({"peft_type": "LORA", "use_dora": False, **settings}))
        path = tmp_path  # the folder, as peft and diffusers write it
    load_lora(model, path)
    width = model.config.hidden_size
    change = (model.state_dict()[f"{QKV}.weight"] - before)[:width]
    assert_close("change", change, scale * product(pairs[Q]), rel_rms=1e-5)


ONE = {
    f"transformer.{Q}.lora_A.weight": torch.ones(4, 64),
    f"transformer.{Q}.lora_B.weight": torch.ones(64, 4),
}
OTHER = "transformer_blocks.0.attn3.to_q"
DEPTHWISE = "transformer_blocks.0.ff.conv_depth"
BAD = {
    # name: (what the file has instead of or beside ONE, settings, what the error says)
    "unknown module": (
        {key.replace(Q, OTHER): value for key, value in ONE.items()},
        {},
        f"no matrix for .*{OTHER}",
    ),
    "depthwise": (
        {
            f"{DEPTHWISE}.lora_A.weight": torch.ones(4, 1, 3, 3),
            f"{DEPTHWISE}.lora_B.weight": torch.ones(320, 4, 1, 1),
        },
        {},
        f"no matrix for {DEPTHWISE}",
    ),
    "DoRA": (
        {f"transformer.{Q}.lora_magnitude_vector": torch.ones(64)},
        {},
        "no DoRA.*it has .*lora_magnitude_vector",
    ),
    "bias": ({f"transformer.{Q}.lora_B.bias": torch.ones(64)}, {}, "it has .*lora_B.bias"),
    "text encoder": (
        {"text_encoder.layers.0.q_proj.lora_A.weight": torch.ones(4, 8)},
        {},
        "no matrix for text_encoder",
    ),
    "whole layer": (
        {"transformer.proj_out.weight": torch.ones(4, 4)},
        {},
        "it has transformer.proj_out.weight",
    ),
    "half a pair": ({f"{K}.lora_A.weight": torch.ones(4, 64)}, {}, rf"{K} lacks its lora_B \(up\)"),
    "only the other half": ({f"{K}.lora_B.weight": torch.ones(64, 4)}, {}, rf"{K} lacks its lora_A \(down\)"),
    "ranks differ": (
        {f"transformer.{Q}.lora_B.weight": torch.ones(64, 3)},
        {},
        r"\(4, 64\) and .*\(64, 3\) differ in",
    ),
    "rank 0": (
        {
            f"transformer.{Q}.lora_A.weight": torch.ones(0, 64),
            f"transformer.{Q}.lora_B.weight": torch.ones(64, 0),
        },
        {},
        "differ in their rank",
    ),
    "no matrices": ({f"transformer.{Q}.lora_A.weight": torch.ones(4)}, {}, "differ in their rank"),
    "other width": (
        {f"transformer.{Q}.lora_B.weight": torch.ones(96, 4)},
        {},
        r"make no \(64, 64\), the shape in",
    ),
    "other input": ({f"transformer.{Q}.lora_A.weight": torch.ones(4, 60)}, {}, r"make no \(64, 64\)"),
    "rank is not that of the settings": ({}, {"r": 8}, f"{Q} has rank 4, but the settings say 8"),
    "alpha is no number": ({}, {"lora_alpha": "8"}, "alpha of .* is '8', not a finite number"),
    "alpha is not finite": (
        {f"transformer.{Q}.alpha": torch.tensor(float("nan"))},
        {},
        "is nan, not a finite",
    ),
    "settings of another method": ({}, {"peft_type": "LOKR"}, "name LOKR; only LoRA"),
    "settings of DoRA": ({}, {"use_dora": True}, "name DoRA; only LoRA"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_one_line_and_leave_the_model_alone(tmp_path, case):
    content, settings, message = BAD[case]
    model = build()
    before = bits(model)
    file = save(tmp_path, ONE | content)
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=message) as caught:
        load_lora(model, file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)
    assert_same(bits(model), before)
    unload_lora(model)
    assert_same(bits(model), before)


def test_unreadable_files_are_one_line(model, tmp_path):
    file = save(tmp_path, ONE)
    content = file.read_bytes()
    for length in (0, 5, 60, len(content) - 1):
        file.write_bytes(content[:length])
        with pytest.raises(ValueError, match="truncated or corrupt") as caught:
            load_lora(model, file)
        assert str(file) in str(caught.value) and "\n" not in str(caught.value)
    file.write_bytes(content)
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(ValueError, match="adapter_config.json are no JSON object"):
        load_lora(model, file)
    with pytest.raises(ValueError, match="absent.safetensors"):
        load_lora(model, tmp_path / "absent.safetensors")
    with pytest.raises(ValueError, match="must be finite, got nan"):
        load_lora(model, file, float("nan"))
    (tmp_path / "lora.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"lora.bin: a LoRA is read from a .safetensors file"):
        load_lora(model, tmp_path / "lora.bin")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"the folder holds no .safetensors file"):
        load_lora(model, tmp_path / "empty")
    save(tmp_path, ONE, "other.safetensors")
    with pytest.raises(
        ValueError, match=r"name the LoRA's file; the folder holds lora.safetensors, other.safe"
    ):
        load_lora(model, tmp_path)
    with pytest.raises(ValueError, match="it is empty"):
        load_lora(model, save(tmp_path / "nothing", {}))
