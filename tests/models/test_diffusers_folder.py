"""What diffusers loads of ours, and what we load of diffusers, ends in the same latents."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderDC, SanaPipeline, SanaTransformer2DModel
from safetensors.torch import load_file

from sana.diffusion.flow import euler_schedule, sigma_schedule
from sana.diffusion.guidance import Guidance, guided
from sana.diffusion.solvers import flow_dpm_solver
from sana.models.autoencoder import Autoencoder
from sana.models.diffusers_folder import (
    build_scheduler,
    build_transformer_twin,
    new_folder,
    transformer_arguments,
    write_pipeline_folder,
)
from sana.models.state_dict import load_into, load_transformer_state, to_diffusers
from sana.models.text_encoder import TextEncoder, TextFeatures
from sana.models.zoo import TRANSFORMERS, build_transformer
from tests.factories import TEXT_WIDTH, make_autoencoder, make_language_model, make_tokenizer
from tests.models.twin import build
from tests.numerics import assert_close

# diffusers' DPM scheduler gives a tensor to numpy 2 in the way of numpy 1.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)

SIZES = dict(in_channels=32, out_channels=32, caption_channels=TEXT_WIDTH)
VARIANTS = {
    "1.0": {},
    "1.5": dict(qk_norm=True, cross_norm=True),
    "4K": dict(use_pe=True, pe_interpolation=2.0, pe_base_size=8),
}
TEXT_TOKENS = 9
# Measured 2.7e-7; a flow shift of 4.05 in place of 4 is 0.07 away.
TRAJECTORY = 1e-6


def make_text_encoder() -> TextEncoder:
    tokenizer = make_tokenizer()
    return TextEncoder(make_language_model(len(tokenizer)).model, tokenizer)


def prompts() -> dict[str, torch.Tensor]:
    """Embeddings and masks of two prompts and of their negative prompts, as diffusers' pipeline names them."""
    generator = torch.Generator().manual_seed(3)
    shape = (2, TEXT_TOKENS, TEXT_WIDTH)
    count = torch.arange(TEXT_TOKENS)[None]
    return {
        "prompt_embeds": torch.randn(shape, generator=generator),
        "negative_prompt_embeds": torch.randn(shape, generator=generator),
        "prompt_attention_mask": (count < torch.tensor([[5], [9]])).long(),
        "negative_prompt_attention_mask": (count < torch.tensor([[1], [4]])).long(),
    }


def noise() -> torch.Tensor:
    return torch.randn(2, 32, 3, 4, generator=torch.Generator().manual_seed(4))


def draw_ours(model, shift: float) -> torch.Tensor:
    """Final latents of our solver and guidance around our transformer."""
    given = prompts()
    text = TextFeatures(given["prompt_embeds"], given["prompt_attention_mask"])
    null = TextFeatures(given["negative_prompt_embeds"], given["negative_prompt_attention_mask"])
    with torch.no_grad():
        return flow_dpm_solver(guided(model, text, null, Guidance(4.5)), noise(), sigma_schedule(20, shift))


def draw_theirs(pipeline: SanaPipeline) -> torch.Tensor:
    """Final latents of diffusers' pipeline on the same embeddings, masks and noise."""
    pipeline.set_progress_bar_config(disable=True)
    for block in pipeline.transformer.transformer_blocks:
        for norm in (block.attn2.norm_q, block.attn2.norm_k):
            if norm is not None:
                norm.eps = 1e-6  # as in the reference; diffusers has 1e-5
    size = dict(height=96, width=128, use_resolution_binning=False)
    settings = dict(num_inference_steps=20, guidance_scale=4.5, latents=noise(), output_type="latent")
    return pipeline(negative_prompt=None, **prompts(), **size, **settings).images


@pytest.mark.parametrize("variant", VARIANTS)
def test_diffusers_pipeline_draws_our_latents(variant, tmp_path):
    model = build(**SIZES, **VARIANTS[variant])
    text_encoder, autoencoder = make_text_encoder(), Autoencoder(make_autoencoder())
    twin = build_transformer_twin(model.state_dict(), model.config, image_size=256)
    write_pipeline_folder(
        tmp_path,
        twin,
        autoencoder=autoencoder,
        text_encoder=text_encoder,
        sampler="flow_dpm-solver",
        flow_shift=4.0,
    )
    pipeline = SanaPipeline.from_pretrained(tmp_path)
    assert_close("latents", draw_theirs(pipeline), draw_ours(model, shift=4.0), rel_rms=TRAJECTORY)
    for name, value in autoencoder.model.state_dict().items():
        assert torch.equal(pipeline.vae.state_dict()[name], value), name
    for name, value in text_encoder.model.state_dict().items():
        assert torch.equal(pipeline.text_encoder.state_dict()[name], value), name
    assert pipeline.tokenizer("a red circle").input_ids == text_encoder.tokenizer("a red circle").input_ids


@pytest.mark.parametrize("variant", VARIANTS)
def test_we_draw_the_latents_of_a_diffusers_pipeline(variant, tmp_path):
    """A folder that diffusers saved; its arguments are written down here, not taken from our code."""
    model = build(**SIZES, **VARIANTS[variant], seed=1)
    theirs = SanaPipeline(
        tokenizer=make_tokenizer(),
        text_encoder=make_language_model(400).model,
        vae=make_autoencoder(),
        transformer=SanaTransformer2DModel(
            num_attention_heads=2,
            num_layers=2,
            num_cross_attention_heads=4,
            cross_attention_head_dim=16,
            cross_attention_dim=64,
            caption_channels=TEXT_WIDTH,
            sample_size=8,
            interpolation_scale=2.0 if variant == "4K" else None,
            qk_norm="rms_norm_across_heads" if variant == "1.5" else None,
        ),
        scheduler=build_scheduler("flow_dpm-solver", 3.0),
    )
    theirs.transformer.load_state_dict(to_diffusers(model.state_dict()))
    theirs.save_pretrained(tmp_path)
    ours = build(**SIZES, **VARIANTS[variant], seed=2)
    load_into(ours, load_transformer_state(tmp_path))
    assert_close("latents", draw_ours(ours, shift=3.0), draw_theirs(theirs), rel_rms=TRAJECTORY)
    images = torch.rand(1, 3, 64, 64)
    loaded = Autoencoder.from_pretrained(tmp_path / "vae")
    reference = AutoencoderDC.from_pretrained(tmp_path / "vae").requires_grad_(False)
    assert torch.equal(loaded.encode(images), 0.5 * reference.encode(images).latent)


# What is written


@pytest.mark.parametrize(
    ("name", "image_size", "overrides", "expected"),
    [
        (
            "SanaMS_600M_P1_D28",
            512,
            {},
            dict(
                num_attention_heads=36,
                num_layers=28,
                num_cross_attention_heads=16,
                cross_attention_head_dim=72,
                cross_attention_dim=1152,
                sample_size=16,
            ),
        ),
        (
            "SanaMS_1600M_P1_D20",
            4096,
            dict(use_pe=True, pe_interpolation=2.0, pe_base_size=128),
            dict(
                num_attention_heads=70,
                num_layers=20,
                num_cross_attention_heads=20,
                cross_attention_head_dim=112,
                cross_attention_dim=2240,
                sample_size=128,
                interpolation_scale=2.0,
            ),
        ),
        (
            "SanaMSCM_600M_P1_D28",
            1024,
            {},
            dict(
                num_attention_heads=36,
                num_layers=28,
                num_cross_attention_heads=16,
                cross_attention_head_dim=72,
                cross_attention_dim=1152,
                sample_size=32,
                qk_norm="rms_norm_across_heads",
                guidance_embeds=True,
            ),
        ),
    ],
)
def test_published_configs(name, image_size, overrides, expected):
    """The settings of the published folders, and a network of diffusers that has exactly our tensors."""
    with torch.device("meta"):
        model = build_transformer(name, **overrides)
    usual = dict(
        in_channels=32,
        out_channels=32,
        attention_head_dim=32,
        caption_channels=2304,
        mlp_ratio=2.5,
        patch_size=1,
        interpolation_scale=None,
        qk_norm=None,
        guidance_embeds=False,
        guidance_embeds_scale=0.1,
        timestep_scale=1.0,
    )
    assert transformer_arguments(model.config, image_size) == usual | expected
    twin = build_transformer_twin(model.state_dict(), model.config, image_size)
    count = sum(value.numel() for key, value in model.state_dict().items() if "y_embedding" not in key)
    assert sum(value.numel() for value in twin.parameters()) == count
    assert twin.config.norm_eps == 1e-6 and not twin.config.attention_bias


def test_networks_without_a_twin_are_refused():
    config = TRANSFORMERS["SanaMS_600M_P1_D28"]
    for change in ({"y_norm": False}, {"qk_norm": True}, {"cross_norm": True}):
        with pytest.raises(ValueError, match="diffusers has no Sana with y_norm"):
            transformer_arguments(replace(config, **change), 512)
    teacher = replace(config, qk_norm=True, cross_norm=True, timestep_norm_scale_factor=1000.0)
    assert transformer_arguments(teacher, 1024)["timestep_scale"] == 0.001


def test_schedulers_have_our_grids():
    dpm, euler, scm = (
        build_scheduler(name, shift)
        for name, shift in (("flow_dpm-solver", 6.0), ("flow_euler", 3.0), ("scm", 3.0))
    )
    dpm.set_timesteps(20)
    assert_close("dpm", dpm.sigmas, sigma_schedule(20, 6.0), rel_rms=1e-7)
    published = {"algorithm_type": "dpmsolver++", "solver_type": "midpoint", "final_sigmas_type": "zero"}
    published |= {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "lower_order_final": True}
    assert published.items() <= dict(dpm.config).items()
    euler.set_timesteps(28)
    assert_close("euler", euler.sigmas, euler_schedule(28, 3.0), rel_rms=1e-6)
    assert (scm.config.prediction_type, scm.config.sigma_data) == ("trigflow", 0.5)
    with pytest.raises(
        ValueError, match="no scheduler for 'ddim'; choose from flow_dpm-solver, flow_euler, scm"
    ):
        build_scheduler("ddim", 3.0)


def test_parts_that_do_not_fit_are_named(tmp_path):
    model = build(**SIZES | {"caption_channels": 48})
    twin = build_transformer_twin(model.state_dict(), model.config, image_size=256)
    with pytest.raises(
        ValueError, match="32 latent channels and captions of width 48.*32 and the text encoder 32"
    ):
        write_pipeline_folder(
            tmp_path,
            twin,
            autoencoder=Autoencoder(make_autoencoder()),
            text_encoder=make_text_encoder(),
            sampler="scm",
            flow_shift=1.0,
        )
    assert not list(tmp_path.iterdir())


def test_sprint_becomes_a_sprint_pipeline(tmp_path):
    model = build(**SIZES, qk_norm=True, cross_norm=True, cfg_embed=True, timestep_norm_scale_factor=1000.0)
    twin = build_transformer_twin(model.state_dict(), model.config, image_size=1024)
    parts = dict(autoencoder=Autoencoder(make_autoencoder()), text_encoder=make_text_encoder())
    write_pipeline_folder(tmp_path, twin, **parts, sampler="scm", flow_shift=3.0)
    index = (tmp_path / "model_index.json").read_text()
    assert '"SanaSprintPipeline"' in index and '"SCMScheduler"' in index
    stored = load_file(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
    for part, name in (("timestep", "t_embedder"), ("guidance", "cfg_embedder")):
        weight = stored[f"time_embed.{part}_embedder.linear_1.weight"]
        assert torch.equal(weight, model.state_dict()[f"{name}.mlp.0.weight"])


# Folders that are whole or not there


def test_a_folder_is_whole_or_not_there(tmp_path):
    target = tmp_path / "a" / "model"
    with pytest.raises(KeyError), new_folder(target, overwrite=False) as folder:
        (folder / "config.json").write_text("half")
        raise KeyError
    assert list(target.parent.iterdir()) == []
    target.mkdir()  # an empty folder is nothing
    with new_folder(target, overwrite=False) as folder:
        (folder / "config.json").write_text("first")
    with pytest.raises(ValueError, match="model exists: name another target, or give --overwrite"):
        new_folder(target, overwrite=False).__enter__()
    with pytest.raises(KeyError), new_folder(target, overwrite=True) as folder:
        raise KeyError
    assert (target / "config.json").read_text() == "first"
    with new_folder(target, overwrite=True) as folder:
        (folder / "config.json").write_text("second")
    assert [path.name for path in target.parent.iterdir()] == ["model"]
    assert (target / "config.json").read_text() == "second"


def test_the_old_folder_comes_back(tmp_path, monkeypatch):
    """The disk fails between the two renames."""
    target = tmp_path / "model"
    target.mkdir()
    (target / "config.json").write_text("first")
    rename = os.replace

    def fail(source, destination):
        if Path(destination) == target and Path(source).suffix == ".tmp":
            raise OSError("no space")
        rename(source, destination)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space"), new_folder(target, overwrite=True) as folder:
        (folder / "config.json").write_text("second")
    assert (target / "config.json").read_text() == "first"
    assert list(tmp_path.iterdir()) == [target]


def test_only_models_are_replaced(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("years")
    for target in (home, home / "thesis.txt"):
        with pytest.raises(ValueError, match="is no folder of a model that could be replaced"):
            new_folder(target, overwrite=True).__enter__()
    assert (home / "thesis.txt").read_text() == "years"


def test_a_twin_with_position_embedding_computes_the_same():
    model = build_transformer(
        "SanaMS_Tiny_P1_D8", use_pe=True, pe_base_size=8, caption_channels=TEXT_WIDTH, model_max_length=7
    ).eval()
    twin = build_transformer_twin(model.state_dict(), model.config, image_size=256)
    latents, text = torch.randn(1, 32, 8, 8), torch.randn(1, 7, TEXT_WIDTH)
    with torch.no_grad():
        ours = model(latents, torch.tensor([500.0]), text)
        theirs = twin(latents, encoder_hidden_states=text, timestep=torch.tensor([500.0]), return_dict=False)[
            0
        ]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
