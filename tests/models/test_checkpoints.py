"""Every published checkpoint: its tensors fit the model of its config, its precision is kept, its line is in the docs.

The files themselves are not downloaded. Their names and shapes are written down here from what is known of them,
independently of the models: a table of tensors, counts of parameters, sizes of files, and diffusers' own class.
"""

import functools
import logging
import re
from dataclasses import replace

import pytest
import torch
from diffusers import SanaTransformer2DModel

from sana.config import load_config, transformer_overrides
from sana.models.checkpoints import AUTOENCODERS, PUBLISHED, SEE_HUB_PAGE, choose_dtype, find_published
from sana.models.key_names import to_diffusers, to_published
from sana.models.state_dict import load_into, load_transformer_state, resolve_transformer
from sana.models.text_encoder import HUB_NAMES
from sana.models.transformer import SanaTransformer, TransformerConfig
from sana.models.zoo import TRANSFORMERS, build_transformer, recognise
from sana.utils.hub import ROOT

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
NORMS = {"qk_norm": True, "cross_norm": True}
SMALL, LARGE = {"width": 1152, "depth": 28}, {"width": 2240, "depth": 20}
HUGE = {"width": 2240, "depth": 60, "norms": True}

# Name: (tensors, trainable parameters without logvar_linear, side in pixels, GB of the file where it is known).
TENSORS = {
    "Sana_600M_512px": (SMALL, 591_747_872, 512, 2.37),
    "Sana_600M_1024px": (SMALL, 591_747_872, 1024, None),
    "Sana_1600M_512px": (LARGE, 1_604_462_752, 512, 6.42),
    "Sana_1600M_512px_MultiLing": (LARGE, 1_604_462_752, 512, None),
    "Sana_1600M_1024px": (LARGE, 1_604_462_752, 1024, 6.43),
    "Sana_1600M_1024px_MultiLing": (LARGE, 1_604_462_752, 1024, None),
    "Sana_1600M_1024px_BF16": (LARGE, 1_604_462_752, 1024, None),
    "Sana_1600M_2Kpx_BF16": (LARGE, 1_604_462_752, 2048, 6.46),
    "Sana_1600M_4Kpx_BF16": (LARGE, 1_604_462_752, 4096, 6.57),
    "SANA1.5_1.6B_1024px": (LARGE | {"norms": True}, 1_604_641_952, 1024, None),
    "SANA1.5_4.8B_1024px": (HUGE, 4_721_825_952, 1024, None),
    "Sana_Sprint_0.6B_1024px": (SMALL | {"norms": True, "guidance": True}, 593_501_216, 1024, None),
    "Sana_Sprint_1.6B_1024px": (LARGE | {"norms": True, "guidance": True}, 1_610_237_472, 1024, None),
    "Sana_Sprint_0.6B_1024px_teacher": (SMALL | {"norms": True}, 591_876_896, 1024, None),
    "Sana_Sprint_1.6B_1024px_teacher": (LARGE | {"norms": True}, 1_604_641_952, 1024, None),
}
NOT_COUNTED = ("pos_embed", "y_embedder.y_embedding", "logvar_linear.weight", "logvar_linear.bias")


def published_tensors(
    side: int,
    *,
    width: int,
    depth: int,
    norms: bool = False,
    guidance: bool = False,
    caption=(300, 2304),
    channels=32,
) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a released .pth, row for row of the table of the format; `side` in latents."""
    d, h = width, width * 5 // 2
    shapes: dict[str, tuple[int, ...]] = {
        "pos_embed": (1, side * side, d),
        "x_embedder.proj.weight": (d, channels, 1, 1),
        "x_embedder.proj.bias": (d,),
        "y_embedder.y_embedding": caption,
        "attention_y_norm.weight": (d,),
        "final_layer.scale_shift_table": (2, d),
        "final_layer.linear.weight": (channels, d),
        "final_layer.linear.bias": (channels,),
    }
    matrices = {
        "t_embedder.mlp.0": (d, 256),
        "t_embedder.mlp.2": (d, d),
        "t_block.1": (6 * d, d),
        "y_embedder.y_proj.fc1": (d, caption[1]),
        "y_embedder.y_proj.fc2": (d, d),
    }
    if guidance:
        matrices |= {"cfg_embedder.mlp.0": (d, 256), "cfg_embedder.mlp.2": (d, d), "logvar_linear": (1, d)}
    for i in range(depth):
        matrices |= {
            f"blocks.{i}.attn.proj": (d, d),
            f"blocks.{i}.cross_attn.q_linear": (d, d),
            f"blocks.{i}.cross_attn.kv_linear": (2 * d, d),
            f"blocks.{i}.cross_attn.proj": (d, d),
            f"blocks.{i}.mlp.inverted_conv.conv": (2 * h, d, 1, 1),
            f"blocks.{i}.mlp.depth_conv.conv": (2 * h, 1, 3, 3),
        }
        shapes |= {
            f"blocks.{i}.scale_shift_table": (6, d),
            f"blocks.{i}.attn.qkv.weight": (3 * d, d),
            f"blocks.{i}.mlp.point_conv.conv.weight": (d, h, 1, 1),
        }
        if norms:
            attentions = ("attn", "cross_attn")
            shapes |= {f"blocks.{i}.{name}.{x}_norm.weight": (d,) for name in attentions for x in "qk"}
    for name, shape in matrices.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


def on_meta(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


@functools.cache
def model_of_config(config: str, overrides: tuple[str, ...]) -> SanaTransformer:
    """What the YAML file describes, without memory."""
    config = load_config(ROOT / config, list(overrides))
    with torch.device("meta"):
        return build_transformer(config.model.model, **transformer_overrides(config))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_checkpoint_fits_its_config(name):
    entry = PUBLISHED[name]
    tensors, parameters, pixels, gigabytes = TENSORS[name]
    shapes = published_tensors(pixels // 32, **tensors)
    file = on_meta(shapes)
    if gigabytes is not None:  # fp32: four bytes each
        assert 4e-9 * sum(tensor.numel() for tensor in file.values()) == pytest.approx(gigabytes, rel=0.005)
    state = to_published(file)
    trained = (tensor.numel() for key, tensor in state.items() if key not in NOT_COUNTED)
    assert sum(trained) == parameters

    model = model_of_config(entry.config, entry.config_overrides)
    load_into(model, state)  # strict
    expected = replace(TRANSFORMERS[entry.architecture], **entry.overrides)
    settings = (
        "depth",
        "hidden_size",
        "use_pe",
        "pe_base_size",
        "pe_interpolation",
        *NORMS,
        "cfg_embed",
        "patch_size",
    )
    for setting in (*settings, "timestep_norm_scale_factor"):
        assert getattr(model.config, setting) == getattr(expected, setting), setting

    # A teacher of Sprint has the tensors of a SANA-1.5: only its scale of time differs.
    teacher = name.endswith("_teacher")
    architecture = entry.architecture.replace("SanaMSCM", "SanaMS") if teacher else entry.architecture
    visible = NORMS if teacher or entry.overrides == NORMS else {}
    assert recognise(state) == (architecture, visible)


@pytest.mark.parametrize(
    "name", ["Sana_600M_512px", "Sana_1600M_4Kpx_BF16", "SANA1.5_1.6B_1024px", "Sana_Sprint_1.6B_1024px"]
)
def test_diffusers_twin_fits_its_config(name):
    """The transformer folder of diffusers, by diffusers' own class."""
    tensors, parameters, pixels, _ = TENSORS[name]
    width, heads = tensors["width"], {1152: 16, 2240: 20}[tensors["width"]]
    with torch.device("meta"):
        twin = SanaTransformer2DModel(
            num_attention_heads=width // 32,
            num_layers=tensors["depth"],
            num_cross_attention_heads=heads,
            cross_attention_head_dim=width // heads,
            cross_attention_dim=width,
            sample_size=pixels // 32,
            qk_norm="rms_norm_across_heads" if "norms" in tensors else None,
            guidance_embeds="guidance" in tensors,
        )
    file = {key: tensor for key, tensor in twin.state_dict().items() if key != "patch_embed.pos_embed"}
    state = to_published(file)
    assert sum(tensor.numel() for tensor in state.values()) == parameters
    entry = PUBLISHED[name]
    load_into(model_of_config(entry.config, entry.config_overrides), state)
    back = to_diffusers(on_meta(published_tensors(pixels // 32, **tensors)))
    assert {key: tensor.shape for key, tensor in back.items()} == {key: t.shape for key, t in file.items()}


@pytest.mark.parametrize("norms", [False, True], ids=["plain", "norms"])
@pytest.mark.parametrize("guidance", [False, True], ids=["sana", "sprint"])
def test_a_small_file_of_exactly_these_tensors_loads(norms, guidance, tmp_path):
    """The same table at two blocks, as a real .pth with one key `state_dict`."""
    small = {"width": 64, "depth": 2, "caption": (9, 24), "channels": 8}
    shapes = published_tensors(4, norms=norms, guidance=guidance, **small)
    file = {key: torch.randn(shape) for key, shape in shapes.items()}
    torch.save({"state_dict": file}, tmp_path / "small.pth")
    config = TransformerConfig(
        depth=2, hidden_size=64, num_heads=4, in_channels=8, out_channels=8, caption_channels=24, model_max_length=9,
        qk_norm=norms, cross_norm=norms, cfg_embed=guidance,
    )  # fmt: skip
    model = SanaTransformer(config)
    load_into(model, load_transformer_state(tmp_path / "small.pth"))
    left_out = {"pos_embed", "logvar_linear.weight", "logvar_linear.bias"}
    assert model.state_dict().keys() == file.keys() - left_out
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, file[key]), key


def test_entries_agree_with_their_configs():
    assert PUBLISHED.keys() == TENSORS.keys()
    for name, entry in PUBLISHED.items():
        config = load_config(ROOT / entry.config, list(entry.config_overrides))
        assert entry.resolution == config.model.image_size == TENSORS[name][2], name
        assert entry.architecture == config.model.model, name
        assert entry.flow_shift == config.scheduler.sampling_shift, name
        assert entry.sampler == config.scheduler.vis_sampler, name
        assert entry.pag_layers in ((), tuple(config.model.pag_applied_layers)), name
        assert entry.autoencoder == config.vae.vae_pretrained in AUTOENCODERS, name
        assert entry.text_encoder == HUB_NAMES[config.text_encoder.text_encoder_name], name
        assert all(0 <= block < TRANSFORMERS[entry.architecture].depth for block in entry.pag_layers), name


def test_precision_is_that_of_the_release():
    """Clipping goes with float16: activations that it clipped in training must be clipped in every dtype."""
    for name, entry in PUBLISHED.items():
        brain = "BF16" in name or not name.startswith("Sana_") or "Sprint" in name
        assert entry.dtypes == ((BF16, FP32) if brain else (FP16, FP32)), name
        assert entry.clamp != brain, name
        assert FP16 not in entry.autoencoder_dtypes + entry.text_encoder_dtypes, name


def test_a_checkpoint_is_found_by_its_names():
    for name, entry in PUBLISHED.items():
        file = entry.pth.rpartition("/")[2]
        for alias in (
            entry.pth,
            entry.repo,
            f"hf://{entry.repo}",
            entry.diffusers,
            f"hf://{entry.diffusers}/transformer",
            file,
            f"output/weights/{file}",
            f"output/{name}_diffusers/transformer/diffusion_pytorch_model.safetensors",
            f"hub/models--{entry.diffusers.replace('/', '--')}/snapshots/0123abc/transformer",
        ):
            assert find_published(alias) is entry, alias
    for other in (
        "Efficient-Large-Model/Sana_1600M_1024px_BF16_ControlNet_HED",
        "somebody/Sana_1600M_1024px",
        "asset/sana_tiny/transformer.safetensors",
        "output/Sana_1600M_1024px_2/model.pth",
        "",
    ):
        assert find_published(other) is None, other


def test_a_published_repository_stands_for_its_file(monkeypatch, tmp_path):
    fetched = []

    def snapshot_download(repo, allow_patterns=None):
        fetched.append((repo, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    file = tmp_path / "checkpoints" / "Sana_600M_512px_MultiLing.pth"
    file.parent.mkdir()
    torch.save({"state_dict": {"a": torch.ones(1)}}, file)
    for name in ("Efficient-Large-Model/Sana_600M_512px", "hf://Efficient-Large-Model/Sana_600M_512px/"):
        assert resolve_transformer(name) == file
        inner = "checkpoints/Sana_600M_512px_MultiLing.pth"
        assert fetched.pop() == ("Efficient-Large-Model/Sana_600M_512px", [inner, f"{inner}/**"])


@pytest.mark.parametrize(
    ("allowed", "wanted", "device", "result"),
    [
        ((FP16, FP32), FP16, "cuda", FP16),
        ((FP16, FP32), FP32, "cuda", FP32),
        ((FP16, FP32), BF16, "cuda", "float16 instead of the config's bfloat16"),
        ((FP16,), BF16, "cpu", "float32 instead of the config's bfloat16"),
        ((FP16,), FP32, "cpu", FP32),
        ((FP16,), FP32, "cuda", "float16 instead of the config's float32"),
        ((BF16, FP32), FP16, "cuda", "bfloat16 instead of the config's float16.*65504"),
        ((BF16, FP32), FP16, "cpu", "float32 instead of the config's float16.*65504"),
        ((BF16, FP32), BF16, "cpu", BF16),
    ],
)
def test_precision_contract(allowed, wanted, device, result, caplog):
    if isinstance(result, torch.dtype):
        for explicit in (False, True):
            assert choose_dtype(allowed, wanted, explicit=explicit, device=device) is result
        assert not caplog.records
        return
    with caplog.at_level(logging.WARNING, logger="sana"):
        chosen = choose_dtype(allowed, wanted, explicit=False, device=torch.device(device))
    assert str(chosen) == f"torch.{result.split()[0]}"
    (record,) = caplog.records
    assert re.search(result, record.getMessage())
    name = str(wanted).removeprefix("torch.")
    with pytest.raises(ValueError, match=f"do not run in {name}: .*; use {result.split()[0]}") as caught:
        choose_dtype(allowed, wanted, explicit=True, device=device)
    assert "\n" not in str(caught.value)


def names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join({FP16: "fp16", BF16: "bf16", FP32: "fp32"}[dtype] for dtype in dtypes)


def table_rows() -> list[str]:
    """The lines of the document's tables, from the data."""
    rows = []
    for name, entry in PUBLISHED.items():
        words = " ".join(f"`{word}`" for word in entry.config_overrides)
        test = f"`tests/models/test_checkpoints.py` [{name}]"
        files = f"`{entry.pth}` | `{entry.diffusers}`"
        rows.append(f"| {name} | {files} | `{entry.config}` {words}".rstrip() + f" | {test} |")
        overrides = ", ".join(f"{key}={value}" for key, value in entry.overrides.items())
        pag = f"{entry.pag:g} (blocks {', '.join(map(str, entry.pag_layers))})" if entry.pag_layers else "no"
        cells = (
            f"{entry.architecture}{overrides and f' ({overrides})'}",
            entry.resolution,
            names(entry.dtypes) + (", clipped" if entry.clamp else ""),
            f"{entry.sampler}, {entry.steps} steps, shift {entry.flow_shift:g}",
            f"{entry.cfg:g}",
            pag,
            f"`{entry.text_encoder}` ({names(entry.text_encoder_dtypes)})",
            f"`{entry.autoencoder}` ({names(entry.autoencoder_dtypes)})",
            entry.languages,
            entry.licence,
        )
        rows.append(f"| {name} | {' | '.join(str(cell) for cell in cells)} |")
    return rows


def test_document_is_the_data():
    lines = (ROOT / "asset/docs/model_zoo.md").read_text(encoding="utf-8").splitlines()
    rows = table_rows()
    for row in rows:
        assert row in lines
    first_cells = [line.split("|")[1].strip() for line in lines if line.startswith("| ")]
    assert sum(cell.startswith(("Sana_", "SANA1")) for cell in first_cells) == len(rows)
    for hub_id in AUTOENCODERS:
        assert any(line.startswith(f"| `{hub_id}` |") for line in lines), hub_id
    assert any(SEE_HUB_PAGE in line for line in lines)
