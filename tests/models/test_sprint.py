"""SANA-Sprint against diffusers: its transformer, and the wrapper arithmetic of its own SanaSprintPipeline."""

import math
from dataclasses import replace

import pytest
import torch
from diffusers import SanaSprintPipeline, SanaTransformer2DModel, SCMScheduler

from sana.diffusion.scm import scm, scm_schedule
from sana.models import layers, sprint, transformer
from sana.models.sprint import TrigFlow
from sana.models.state_dict import to_diffusers
from sana.models.transformer import SanaTransformer
from sana.models.zoo import build_transformer
from tests.models.test_parity import mutate
from tests.models.twin import BATCH, SMALL, build, build_twin, inputs, make_generic, relative_rms
from tests.numerics import assert_close

BOUND = 1e-6  # relative RMS in float32; measured: at most 3e-7
SPRINT = {"qk_norm": True, "cross_norm": True, "cfg_embed": True, "timestep_norm_scale_factor": 1000.0}
SCALE = 4.5
EMBEDDERS = {
    "t_embedder.mlp.0": "time_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_embed.timestep_embedder.linear_2",
    "cfg_embedder.mlp.0": "time_embed.guidance_embedder.linear_1",
    "cfg_embedder.mlp.2": "time_embed.guidance_embedder.linear_2",
}


def sprint_twin(model: SanaTransformer) -> SanaTransformer2DModel:
    """diffusers' guidance-embedding model with the same weights, and with the reference's eps in the cross q/k norms."""
    plain = build_twin(SanaTransformer(replace(model.config, cfg_embed=False)).eval())
    settings = {name: value for name, value in plain.config.items() if not name.startswith("_")}
    settings |= {"guidance_embeds": True, "guidance_embeds_scale": model.config.cfg_embed_scale}
    twin = SanaTransformer2DModel(**settings).eval()
    state = model.state_dict()
    renamed = {
        f"{theirs}.{leaf}": state.pop(f"{ours}.{leaf}")
        for ours, theirs in EMBEDDERS.items()
        for leaf in ("weight", "bias")
    }
    twin.load_state_dict(renamed | to_diffusers(state), strict=True)
    for block in twin.transformer_blocks:
        for norm in (block.attn2.norm_q, block.attn2.norm_k):
            norm.eps = 1e-6
    return twin


class Pipeline:
    """diffusers' SanaSprintPipeline on features and noise of ours, without text encoder and autoencoder."""

    def __init__(self, twin: SanaTransformer2DModel) -> None:
        self.pipeline = SanaSprintPipeline(None, None, None, twin, SCMScheduler())
        self.pipeline.set_progress_bar_config(disable=True)

    def __call__(self, arguments, noise, steps=1, max_time=1.5708, generators=None):
        """Final latents, in units of sigma_data."""
        return self.pipeline(
            prompt=None,
            prompt_embeds=arguments["text_embeds"],
            prompt_attention_mask=arguments["text_mask"].float(),
            latents=noise,
            generator=generators,
            num_inference_steps=steps,
            max_timesteps=max_time,
            intermediate_timesteps=1.3 if steps == 2 else None,
            guidance_scale=SCALE,
            use_resolution_binning=False,
            output_type="latent",
        ).images


def wrap(model, arguments, guidance=SCALE):
    return TrigFlow(model, arguments["text_embeds"], arguments["text_mask"], guidance=guidance)


@pytest.fixture(scope="module")
def case():
    """Model, pipeline of diffusers around its twin, arguments."""
    model = build(**SPRINT)
    return model, Pipeline(sprint_twin(model)), inputs(model.config, (3, 5))


def reference(case, tau):
    """F(x, tau), solved from the one step x0 = cos(tau) x - sin(tau) F of diffusers' pipeline."""
    _, pipeline, arguments = case
    x = arguments["latents"]
    x0 = pipeline(arguments, x, max_time=tau)
    return (math.cos(tau) * x - x0) / math.sin(tau)


def test_transformer_equals_diffusers(case):
    """The network alone, at times and guidance scales that differ between the images."""
    model, pipeline, arguments = case
    t, guidance = torch.tensor([0.999, 0.2, 0.5]), torch.tensor([4.5, 1.0, 12.0])
    with torch.no_grad():
        actual = model(**{**arguments, "timestep": 1000 * t}, guidance=guidance)
        expected = pipeline.pipeline.transformer(
            arguments["latents"],
            encoder_hidden_states=arguments["text_embeds"],
            encoder_attention_mask=arguments["text_mask"].float(),
            timestep=t,
            guidance=0.1 * guidance,
            return_dict=False,
        )[0]
        assert_close("velocity", actual, expected, rel_rms=BOUND)


@pytest.mark.parametrize("tau", [1.5708, 1.3, 0.7, 0.2])
def test_wrapped_network_equals_diffusers_pipeline(case, tau):
    model, _, arguments = case
    with torch.no_grad():
        actual = wrap(model, arguments)(arguments["latents"], tau)
    assert_close(f"F at {tau}", actual, reference(case, tau), rel_rms=BOUND)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_whole_run_equals_diffusers_pipeline(case, steps):
    """The fresh noise of each image comes from its own generator, so an image alone is the same image."""
    model, pipeline, arguments = case
    noise = arguments["latents"]

    def generators(images=range(BATCH)):
        return [torch.Generator().manual_seed(seed) for seed in images]

    def ours(images):
        sources, rows = generators(images), list(images)
        network = wrap(model, {name: value[rows] for name, value in arguments.items()})

        def noise_like(step):
            return torch.cat([torch.randn(1, *noise.shape[1:], generator=source) for source in sources])

        with torch.no_grad():
            return scm(network, noise[rows], scm_schedule(steps), noise_like)

    together = ours(range(BATCH))
    assert_close(
        "latents", together, pipeline(arguments, noise, steps, generators=generators()), rel_rms=BOUND
    )
    assert_close("image 1 alone", ours([1]), together[1:2], rel_rms=1e-6)


# name: (owner, function or method, code to replace, replacement)
FORWARD = (transformer.SanaTransformer, "_embed_time")
CALL = (sprint.TrigFlow, "__call__")
MUTATIONS = {
    "guidance dropped": (*FORWARD, "t + self.cfg_embedder", "t + 0 * self.cfg_embedder"),
    "guidance unscaled": (*FORWARD, "guidance.float() * self.config.cfg_embed_scale", "guidance.float()"),
    "guidance through the time's layers": (*FORWARD, "self.cfg_embedder(", "self.t_embedder("),
    "time not normalised": (
        *FORWARD,
        "timestep.float() / self.config.timestep_norm_scale_factor",
        "timestep",
    ),
    "time truncated": (*FORWARD, "timestep.float()", "timestep.trunc()"),
    "sines before cosines": (
        layers,
        "timestep_features",
        "angles.cos(), angles.sin()",
        "angles.sin(), angles.cos()",
    ),
    "flow time reversed": (*CALL, "math.sin(tau) / (", "math.cos(tau) / ("),
    "network input not rescaled": (*CALL, "x = r * x", "x = x"),
    "input term dropped": (*CALL, "(1 - 2 * t) * x +", ""),
    "input term of the other sign": (*CALL, "(1 - 2 * t) * x +", "(2 * t - 1) * x +"),
    "velocity unscaled": (*CALL, "(1 - 2 * t + 2 * t * t) * velocity", "velocity"),
    "result not rescaled": (*CALL, ") / r", ")"),
}


@pytest.mark.parametrize("mutation", MUTATIONS.values(), ids=MUTATIONS)
def test_mutated_code_is_noticed(case, mutation, monkeypatch):
    model, _, arguments = case
    expected = reference(case, 1.3)
    mutate(monkeypatch, *mutation)
    with torch.no_grad():
        assert relative_rms(wrap(model, arguments)(arguments["latents"], 1.3), expected) > 10 * BOUND


def test_wrapper_keeps_the_state_in_float32():
    model = build(**SPRINT)
    arguments = inputs(model.config)
    with torch.no_grad():
        exact = wrap(model, arguments)(arguments["latents"], 1.3)
        half = wrap(model.bfloat16(), arguments)(arguments["latents"], 1.3)
    assert half.dtype == torch.float32
    assert_close("bfloat16", half, exact, rel_rms=2e-2)  # measured 6e-3


def test_guidance_is_an_input_of_networks_that_embed_it_only(case):
    model, _, arguments = case
    with pytest.raises(ValueError, match=r"takes a guidance scale as its input \(cfg_embed\), got none"):
        model(**arguments)
    with pytest.raises(ValueError, match=r"guidance has shape \(1,\), but timesteps have \(3,\)"):
        model(**arguments, guidance=torch.ones(1))
    with pytest.raises(ValueError, match=r"takes no guidance scale as its input \(cfg_embed\), got one"):
        build()(**arguments, guidance=torch.ones(3))
    plain = build(timestep_norm_scale_factor=1000.0)
    with torch.no_grad():
        assert wrap(plain, arguments, guidance=None)(arguments["latents"], 1.3).isfinite().all()


def test_guidance_has_no_effect_at_first():
    """The last layer of its embedder starts at zero; Sprint starts from a teacher that has none."""
    torch.manual_seed(0)
    model = build_transformer(
        "SanaMSCM_600M_P1_D28", **{**SMALL, "hidden_size": 128, "linear_head_dim": 32}
    ).eval()
    first, last = model.cfg_embedder.mlp[0], model.cfg_embedder.mlp[2]
    assert first.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert not any(tensor.any() for tensor in (first.bias, last.weight, last.bias))
    arguments = inputs(model.config)

    def effect():
        low, high = (model(**arguments, guidance=torch.full((BATCH,), scale)) for scale in (1.0, 5.0))
        return relative_rms(low, high)

    with torch.no_grad():
        assert effect() == 0
        make_generic(model)
        assert effect() > 1e-2
