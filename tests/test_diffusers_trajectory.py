"""Whole runs against diffusers' own pipelines: same latents, prompt features, masks and weights; final latents compared.

diffusers attends to the negative prompt through that prompt's own mask, the reference through the prompt's. Equal masks are
passed here. It applies PAG at any scale above 0, the reference above 1 only: scales above 1 are compared.
"""

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, SanaPAGPipeline
from diffusers import SanaPipeline as DiffusersPipeline

from sana.pipeline import SanaPipeline
from tests.factories import write_model
from tests.models.twin import build_twin, make_generic
from tests.numerics import assert_close

STEPS, SHIFT = 20, 3.0
BOUND = 2e-6  # relative RMS of the final latents; measured: at most 4e-7
PAG_BLOCKS = (3, 6)
PROMPTS = ["a red circle", "three blue stars and two green squares"]

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"  # diffusers' scheduler under numpy 2
)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A small model whose transformer has no weight at its initial value."""
    model = write_model(tmp_path_factory.mktemp("model"), model={"pag_applied_layers": list(PAG_BLOCKS)})
    pipeline = SanaPipeline(model, device="cpu")
    make_generic(pipeline.transformer)
    return pipeline


@pytest.fixture(scope="module")
def twin(pipeline):
    return build_twin(pipeline.transformer)


@pytest.fixture(scope="module")
def noise():
    return torch.randn(len(PROMPTS), 32, 2, 3, generator=torch.Generator().manual_seed(0))


def ours(pipeline, noise, *, cfg, pag, steps=STEPS):
    """Final latents of our pipeline."""
    states = []
    pipeline(
        PROMPTS,
        32 * noise.shape[-2],
        32 * noise.shape[-1],
        num_inference_steps=steps,
        guidance_scale=cfg,
        pag_guidance_scale=pag,
        latents=noise,
        use_resolution_binning=False,
        callback=lambda step, total, x, x0: states.append(x),
    )
    assert len(states) == steps
    return states[-1]


def theirs(pipeline, twin, noise, *, cfg, pag=None):
    """Final latents of diffusers' pipeline; that of perturbed-attention guidance where `pag` is given."""
    scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=SHIFT
    )
    parts = {"tokenizer": None, "text_encoder": None, "vae": pipeline.autoencoder.model}
    parts |= {"transformer": twin, "scheduler": scheduler}
    settings = {}
    if pag is None:
        diffusers = DiffusersPipeline(**parts)
    else:
        layers = [f"transformer_blocks.{index}" for index in PAG_BLOCKS]
        diffusers, settings = SanaPAGPipeline(**parts, pag_applied_layers=layers), {"pag_scale": pag}
    diffusers.set_progress_bar_config(disable=True)
    text = pipeline.text_encoder.encode(PROMPTS)
    null = pipeline.text_encoder.encode_unconditional([""] * len(PROMPTS))
    return diffusers(
        prompt_embeds=text.embeds,
        prompt_attention_mask=text.mask,
        negative_prompt=None,
        negative_prompt_embeds=null.embeds,
        negative_prompt_attention_mask=text.mask,
        height=32 * noise.shape[-2],
        width=32 * noise.shape[-1],
        num_inference_steps=STEPS,
        guidance_scale=cfg,
        latents=noise,
        use_resolution_binning=False,
        output_type="latent",
        **settings,
    ).images


@pytest.mark.parametrize("cfg", [4.5, 1.0], ids=["cfg", "no-cfg"])
def test_latents_end_where_diffusers_ends(pipeline, twin, noise, cfg):
    reference = theirs(pipeline, twin, noise, cfg=cfg)
    assert_close("latents", ours(pipeline, noise, cfg=cfg, pag=1.0), reference, rel_rms=BOUND)
    with pytest.raises(AssertionError, match="relative RMS error"):
        assert_close("changed", ours(pipeline, noise, cfg=cfg + 0.1, pag=1.0), reference, rel_rms=BOUND)


@pytest.mark.parametrize("cfg", [4.5, 1.0], ids=["cfg", "no-cfg"])
def test_perturbed_attention_guidance_ends_where_diffusers_ends(pipeline, twin, noise, cfg):
    reference = theirs(pipeline, twin, noise, cfg=cfg, pag=2.0)
    assert_close("latents", ours(pipeline, noise, cfg=cfg, pag=2.0), reference, rel_rms=BOUND)
    with pytest.raises(AssertionError, match="relative RMS error"):
        assert_close("changed", ours(pipeline, noise, cfg=cfg, pag=2.1), reference, rel_rms=BOUND)
