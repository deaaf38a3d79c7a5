import inspect
from dataclasses import replace
from functools import partial

import pytest
import torch

import sana
from app.sana_pipeline import SanaPipeline as PublishedPipeline
from sana import pipeline as module
from sana.config import load_config
from sana.diffusion.guidance import Guidance, guided
from sana.diffusion.noise import starting_noise
from sana.diffusion.scm import scm, scm_schedule
from sana.diffusion.solvers import SOLVERS
from sana.models.sprint import TrigFlow
from sana.models.text_encoder import TextFeatures
from sana.pipeline import NonFiniteError, SanaPipeline, image_seed
from sana.utils import images
from tests.factories import TEXT_LENGTH, make_transformer, write_model
from tests.numerics import assert_close

# Batch mates change the last bit of matrix products; measured 4e-6 at 2 steps and 3e-6 at 20.
BATCH_TOLERANCE = 1e-5
PROMPTS = ["a red circle", "three blue stars", "", "a green square to the left of a yellow heart, " * 250]


@pytest.fixture(scope="module")
def config_path(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pipeline(config_path):
    return SanaPipeline(config_path)


@pytest.fixture
def draw(pipeline):
    """The pipeline at 64 x 64 (2 x 2 latents) and two steps."""
    return partial(pipeline, height=64, width=64, use_resolution_binning=False, num_inference_steps=2)


def noise_of(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# What comes out


def test_draws_every_prompt_at_the_models_own_size(pipeline):
    pictures = pipeline(PROMPTS, num_inference_steps=2)
    assert pictures.shape == (4, 3, 256, 256)
    assert pictures.dtype == torch.float32
    assert pictures.isfinite().all()
    for i in range(4):
        for j in range(i):
            assert (pictures[i] - pictures[j]).std() > 0.05, (i, j)


def test_the_prompt_matters_beside_the_noise(draw):
    pictures = draw(PROMPTS, seed=[5] * 4)
    for i in range(4):
        for j in range(i):
            assert (pictures[i] - pictures[j]).std() > 0.05, (i, j)


def test_is_the_composition_of_its_parts(pipeline, draw):
    prompts = ["a red circle", "a blue star"]
    text = pipeline.text_encoder.encode(prompts)
    null = pipeline.text_encoder.encode_unconditional(["", ""])
    noise = noise_of(1, 2, 32, 2, 2)
    velocity = guided(pipeline.transformer, text, TextFeatures(null.embeds, text.mask), Guidance(4.5))
    schedule, solver = SOLVERS["flow_dpm-solver"]
    expected = pipeline.autoencoder.decode(solver(velocity, noise, schedule(2, shift=3.0)))
    assert_close("images", draw(prompts, latents=noise), expected, rel_rms=BATCH_TOLERANCE)


def test_pictures(draw):
    tensors, pictures = draw(PROMPTS[:2]), draw(PROMPTS[:2], output_type="pil")
    assert [picture.size for picture in pictures] == [(64, 64)] * 2
    again = images.to_pil(tensors)
    assert [picture.tobytes() for picture in pictures] == [picture.tobytes() for picture in again]


def test_latents_out_and_in(pipeline):
    settings = {"num_inference_steps": 2, "seed": 3}
    latents = pipeline("a red circle", 100, 160, output_type="latent", **settings)
    assert latents.shape == (1, 32, 6, 10)  # 192 x 320 pixels, the nearest of the table; nothing is cut
    assert latents.dtype == torch.float32
    with torch.no_grad():  # as the pipeline: with gradients the decoder is another
        pixels = images.cover(pipeline.autoencoder.decode(latents), 100, 160)
    assert torch.equal(pipeline("a red circle", 100, 160, **settings), pixels)
    assert torch.equal(latents, pipeline("a red circle", 192, 320, output_type="latent", **settings))


def test_a_batch_of_seven_is_seven_single_calls(draw):
    prompts = [*PROMPTS, "чёрное кольцо и 三颗蓝色的星星", "🟥 next to 🔵!", " two\ttabs\nand a line "]
    negatives = ["", "a blue star", "x", "", "a ring, a cross", "", "🟥"]
    settings = {"num_inference_steps": 4, "pag_guidance_scale": 1.5}
    together = draw(prompts, negative_prompt=negatives, seed=9, **settings)
    for i, (prompt, negative) in enumerate(zip(prompts, negatives, strict=True)):
        alone = draw(prompt, negative_prompt=negative, seed=[image_seed(9, i, 0)], **settings)
        assert_close(f"image {i}", alone[0], together[i], rel_rms=1e-4)  # measured 4e-6


# Noise


def test_an_image_depends_on_its_prompt_and_seed_only(draw):
    together = draw(PROMPTS, seed=3)
    for i, prompt in enumerate(PROMPTS):
        alone = draw(prompt, seed=[image_seed(3, i, 0)])
        assert_close(f"image {i}", alone[0], together[i], rel_rms=BATCH_TOLERANCE)
    pairs = draw(PROMPTS[:2], seed=3, num_images_per_prompt=2)
    seeds = [image_seed(3, i, j) for i in (0, 1) for j in (0, 1)]
    assert_close(
        "pairs", pairs, draw([PROMPTS[0]] * 2 + [PROMPTS[1]] * 2, seed=seeds), rel_rms=BATCH_TOLERANCE
    )
    assert_close("first of a pair", pairs[2], together[1], rel_rms=BATCH_TOLERANCE)
    assert (pairs[0] - pairs[1]).std() > 0.05


def test_a_generator_is_drawn_from_prompt_by_prompt(draw):
    generator = torch.Generator().manual_seed(7)
    noise = torch.cat([torch.randn((2, 32, 2, 2), generator=generator) for _ in range(2)])
    pictures = draw(PROMPTS[:2], generator=torch.Generator().manual_seed(7), num_images_per_prompt=2)
    assert torch.equal(pictures, draw(PROMPTS[:2], latents=noise, num_images_per_prompt=2))


def test_equal_calls_give_equal_images(draw):
    first = draw("a red circle")
    torch.manual_seed(1)
    assert torch.equal(first, draw("a red circle"))
    assert torch.equal(first, draw("a red circle", seed=0))
    assert not torch.equal(first, draw("a red circle", seed=1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": 1, "latents": torch.zeros(1, 32, 2, 2)}, "give one of them"),
        ({"seed": 1, "generator": torch.Generator()}, "give one of them"),
        ({"seed": [1, 2]}, "2 seeds for 1 images"),
        ({"latents": torch.zeros(1, 32, 4, 2)}, r"latents have shape \(1, 32, 4, 2\).*\(1, 32, 2, 2\)"),
        ({"num_images_per_prompt": 0}, "at least 1, got 0"),
        ({"sampler": "ddim"}, "unknown sampler 'ddim'; choose from flow_dpm-solver, flow_euler"),
        (
            {"sampler": "scm"},
            r"sampler 'scm' does not fit SanaMS_Tiny_P1_D8: scm is for networks that take the guidance",
        ),
        ({"output_type": "jpeg"}, "unknown output_type 'jpeg'; choose from tensor, pil, latent"),
        ({"null_mask": "mine"}, "unknown null_mask 'mine'; choose from prompt, own"),
        (
            {"prompt": ["a --ar 1:2", "b"]},
            "one size, but these prompts ask for 160 x 384, 64 x 64: call once",
        ),
        ({"prompt": "a --ar wide"}, "expected --ar height:width"),
        ({"num_inference_steps": -3}, "at least 1, got -3"),
        ({"guidance_scale": -1.0}, "guidance scale must be"),
        ({"interval_guidance": (0.8, 0.2)}, "guidance interval"),
        ({"negative_prompt": ["a", "b"]}, "2 negative prompts for 1 prompts"),
        ({"prompt": []}, "empty list of prompts"),
    ],
)
def test_wrong_settings_are_refused(draw, settings, message):
    with pytest.raises(ValueError, match=message):
        draw(**({"prompt": "a red circle"} | settings))


# Guidance


@pytest.fixture
def text_seen(monkeypatch):
    """What `guided` is given: one (text, null, guidance) for each call."""
    seen = []

    def recorded(model, text, null, guidance, times):
        seen.append((text, null, guidance))
        return guided(model, text, null, guidance, times)

    monkeypatch.setattr(module, "guided", recorded)
    return seen


def test_negative_prompts_are_seen_through_the_prompts_mask_or_their_own(pipeline, draw, text_seen):
    prompts, negatives = ["a red circle", "three blue stars and a heart"], ["", "a large black ring"]
    own = pipeline.text_encoder.encode_unconditional(negatives)
    first = draw(prompts, negative_prompt=negatives)
    second = draw(prompts, negative_prompt=negatives, null_mask="own")
    for (text, null, _), expected in zip(text_seen, (text_seen[0][0].mask, own.mask), strict=True):
        width = null.mask.shape[1]
        assert width == max(int(text.mask.sum(1).max()), int(null.mask.sum(1).max())), "work on padding"
        assert torch.equal(null.mask, expected[:, :width])
        assert not torch.equal(own.mask[:, :width], text.mask)
        assert_close("null features", null.embeds, own.embeds[:, :width], rel_rms=BATCH_TOLERANCE)
    assert ((first - second).flatten(1).std(1) > 1e-3).all()


def test_negative_prompts(draw):
    plain = draw("a red circle")
    negative = draw("a red circle", negative_prompt="a blue star")
    assert (plain - negative).std() > 0.02
    assert torch.equal(plain, draw("a red circle")), "the negative prompt stuck"
    both = draw(["a red circle"] * 2, negative_prompt=["", "a blue star"], seed=[image_seed(0, 0, 0)] * 2)
    assert_close("without", both[0], plain[0], rel_rms=BATCH_TOLERANCE)
    assert_close("with", both[1], negative[0], rel_rms=BATCH_TOLERANCE)


def test_guidance_settings_take_effect_and_do_not_stick(draw, text_seen):
    plain = draw("a red circle")
    for settings in (
        {"guidance_scale": 1.0},
        {"guidance_scale": 7.0},
        {"pag_guidance_scale": 2.0},
        {"interval_guidance": (0.0, 0.9)},
        {"sampler": "flow_euler"},
        {"num_inference_steps": 3},
    ):
        assert (draw("a red circle", **settings) - plain).std() > 1e-3, settings
    assert torch.equal(plain, draw("a red circle"))
    assert text_seen[3][2] == Guidance(4.5, pag_scale=2.0, pag_blocks=(3,))


def test_perturbed_attention_is_off_at_one(pipeline, draw, monkeypatch):
    perturbed = []
    forward = pipeline.transformer.forward

    def recorded(*args, perturbed_blocks=(), **kwargs):
        perturbed.append(perturbed_blocks)
        return forward(*args, perturbed_blocks=perturbed_blocks, **kwargs)

    monkeypatch.setattr(pipeline.transformer, "forward", recorded)
    draw("a red circle", pag_guidance_scale=1.0)
    assert perturbed == [(), ()]
    perturbed.clear()
    draw("a red circle", pag_guidance_scale=1.5)
    assert perturbed == [(), (3,)] * 2


def test_none_is_the_samplers_usual_number_of_steps(draw):
    steps = []
    for sampler in (None, "flow_dpm-solver", "flow_euler"):
        draw(
            "",
            num_inference_steps=None,
            guidance_scale=1.0,
            sampler=sampler,
            callback=lambda step, total, x, x0: steps.append(total),
        )
    assert steps == [20] * 40 + [28] * 28


def test_a_cancelled_call_leaves_nothing_behind(draw):
    expected = draw("a red circle")

    def cancel(step, total, x, x0):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw("three blue stars", callback=cancel, negative_prompt="x", pag_guidance_scale=3.0)
    assert torch.equal(expected, draw("a red circle"))


# Sprint


@pytest.fixture(scope="module")
def sprint(pipeline):
    """The pipeline with a Sprint network, and its call at 64 x 64."""
    network = make_transformer(
        qk_norm=True, cross_norm=True, cfg_embed=True, cfg_embed_scale=0.1, timestep_norm_scale_factor=1000.0
    )
    torch.nn.init.normal_(network.cfg_embedder.mlp[2].weight, std=0.2)  # zero at first
    config = replace(
        pipeline.config,
        model=replace(pipeline.config.model, model="SanaMSCM_1600M_P1_D20"),
        scheduler=replace(pipeline.config.scheduler, vis_sampler="scm"),
    )
    made = SanaPipeline.from_components(config, network, pipeline.autoencoder, pipeline.text_encoder)
    return partial(made, height=64, width=64, use_resolution_binning=False)


def test_sprint_is_the_composition_of_its_parts(sprint):
    generators = [torch.Generator().manual_seed(image_seed(4, i, 0)) for i in (0, 1)]

    def noise_like(step=0):
        return torch.cat([torch.randn((1, 32, 2, 2), generator=own) for own in generators])

    prompts = ["a red circle", "a blue star"]
    text = sprint.func.text_encoder.encode(prompts)
    network = TrigFlow(sprint.func.transformer, text.embeds, text.mask, guidance=3.0)
    expected = scm(network, noise_like(), scm_schedule(2), noise_like)
    latents = sprint(prompts, guidance_scale=3.0, seed=4, output_type="latent")
    assert_close("latents", latents, expected, rel_rms=BATCH_TOLERANCE)


def test_a_sprint_image_depends_on_its_prompt_and_seed_only(sprint):
    together = sprint(PROMPTS, seed=3, num_inference_steps=3)
    for i, prompt in enumerate(PROMPTS):
        alone = sprint(prompt, seed=[image_seed(3, i, 0)], num_inference_steps=3)
        assert_close(f"image {i}", alone[0], together[i], rel_rms=BATCH_TOLERANCE)
    assert torch.equal(together, sprint(PROMPTS, seed=3, num_inference_steps=3))


def test_sprint_draws_on_from_a_generator_and_follows_given_noise_with_that_of_seed_0(sprint):
    generator = torch.Generator().manual_seed(7)
    first, fresh = (torch.randn((2, 32, 2, 2), generator=generator) for _ in range(2))
    seen = []
    pictures = sprint(
        "a red circle",
        num_images_per_prompt=2,
        generator=torch.Generator().manual_seed(7),
        output_type="latent",
        callback=lambda step, total, x, x0: seen.append((x, x0)),
    )
    angle = scm_schedule(2)[1]
    assert_close("fresh noise", (seen[0][0] - angle.cos() * seen[0][1]) / angle.sin(), fresh, rel_rms=1e-5)
    assert torch.equal(seen[1][1], pictures)
    assert not torch.equal(pictures, sprint("a red circle", latents=first, num_images_per_prompt=2))
    noise = noise_of(image_seed(0, 0, 0), 1, 32, 2, 2)
    assert torch.equal(sprint("a heart", latents=noise), sprint("a heart"))


def test_sprint_takes_guidance_as_an_input(sprint):
    steps = []
    plain = sprint("a red circle", callback=lambda step, total, x, x0: steps.append(total))
    assert steps == [2, 2]
    assert (sprint("a red circle", guidance_scale=1.0) - plain).std() > 1e-3
    assert torch.equal(plain, sprint("a red circle"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"negative_prompt": "blue"}, "scm has no unconditional branch"),
        ({"pag_guidance_scale": 2.0}, "scm has no unconditional branch"),
        ({"interval_guidance": (0.1, 0.9)}, "scm has no unconditional branch"),
        ({"sampler": "flow_euler"}, "'flow_euler' does not fit SanaMSCM_1600M_P1_D20"),
        ({"num_inference_steps": 0}, "at least 1, got 0"),
    ],
)
def test_sprint_refuses_what_would_have_no_effect(sprint, settings, message):
    with pytest.raises(ValueError, match=message):
        sprint("a red circle", **settings)


# Defects of the reference, each with its name


def test_defect_only_the_first_prompt_of_a_list_was_returned(draw):
    pictures = draw(["a red circle", "three blue stars"], num_images_per_prompt=2, seed=1)
    assert len(pictures) == 4
    assert torch.equal(
        pictures[2:],
        draw("three blue stars", seed=[image_seed(1, 1, j) for j in (0, 1)], num_images_per_prompt=2),
    )


def test_defect_a_negative_prompt_stayed_for_later_calls(pipeline, draw, text_seen):
    draw("a red circle")
    draw("a red circle", negative_prompt="a blue star")
    draw("a red circle")
    before, during, after = (null.embeds for _, null, _ in text_seen)
    assert torch.equal(before, after)
    assert not torch.equal(before, during)


def test_defect_perturbed_attention_stayed_off_after_a_call_without_it(draw, text_seen):
    with_it = draw("a red circle", pag_guidance_scale=2.0)
    draw("a red circle", pag_guidance_scale=1.0)
    assert torch.equal(with_it, draw("a red circle", pag_guidance_scale=2.0))
    assert [guidance.uses_pag for _, _, guidance in text_seen] == [True, False, True]


def test_defect_the_default_generator_was_shared_between_calls(draw):
    state = torch.get_rng_state()
    assert torch.equal(draw("a red circle"), draw("a red circle"))
    assert torch.equal(state, torch.get_rng_state())


def test_defect_the_default_generator_was_on_the_wrong_device(pipeline, monkeypatch):
    """Noise is drawn where its generator is, and then brought to the networks; here to a device without memory."""
    monkeypatch.setattr(SanaPipeline, "device", torch.device("meta"))
    for generator in (None, torch.Generator("cpu")):
        noise, noise_like = starting_noise(2, 1, (32, 2, 3), pipeline.device, generator=generator)
        assert noise.device.type == noise_like(1).device.type == "meta"
        assert noise.shape == noise_like(1).shape == (2, 32, 2, 3)


def test_defect_noise_was_square_whatever_the_size(pipeline):
    settings = {"num_inference_steps": 2, "output_type": "latent", "use_resolution_binning": False}
    assert pipeline("a red circle", height=64, width=160, **settings).shape == (1, 32, 2, 5)
    assert pipeline("a red circle --hw 160:64", **settings).shape == (1, 32, 5, 2)


# Failures


def test_latents_that_are_not_finite_are_an_error(draw):
    noise = torch.zeros(2, 32, 2, 2)
    noise[1, 0, 0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match=r"the latents of image\(s\) 1 are not finite.*torch.float32"):
        draw(["a red circle"] * 2, latents=noise)


def test_pixels_that_are_not_finite_are_an_error(pipeline, draw, monkeypatch):
    monkeypatch.setattr(
        pipeline.autoencoder, "decode", lambda latents, **_: torch.full((1, 3, 64, 64), float("nan"))
    )
    with pytest.raises(NonFiniteError, match=r"the pixels of image\(s\) 0"):
        draw("a red circle")


# Making one


def test_from_components(pipeline):
    other = make_transformer(seed=1)
    made = SanaPipeline.from_components(pipeline.config, other, pipeline.autoencoder, pipeline.text_encoder)
    assert made.weights_sha256 is None
    assert (
        made("a red circle", num_inference_steps=2) - pipeline("a red circle", num_inference_steps=2)
    ).std() > 0.05
    assert other.config.model_max_length == TEXT_LENGTH
    wide = make_transformer(caption_channels=48)
    with pytest.raises(ValueError, match="text encoder's width 32 is not the 48"):
        SanaPipeline.from_components(pipeline.config, wide, pipeline.autoencoder, pipeline.text_encoder)
    with pytest.raises(ValueError, match="number of latent channels 32 is not the 16"):
        SanaPipeline.from_components(
            pipeline.config,
            make_transformer(in_channels=16, out_channels=16),
            pipeline.autoencoder,
            pipeline.text_encoder,
        )


def test_parts_that_do_not_fit_each_other_are_refused(config_path):
    config = load_config(config_path, ["text_encoder.caption_channels=48", "model.load_from="])
    with pytest.raises(ValueError, match="text encoder's width 32 is not the 48 that the transformer reads"):
        SanaPipeline(config)


def test_the_shift_of_inference_comes_first(config_path, draw):
    config = load_config(config_path, ["scheduler.inference_flow_shift=5.5"])
    assert SanaPipeline(config).flow_shift == 5.5
    assert draw.func.flow_shift == 3.0


def test_public_names(config_path):
    assert sana.SanaPipeline is SanaPipeline
    names = list(inspect.signature(PublishedPipeline.__call__).parameters)
    assert names[1:12] == [
        *("prompt", "height", "width", "negative_prompt", "num_inference_steps", "guidance_scale"),
        *("pag_guidance_scale", "num_images_per_prompt", "generator", "latents", "use_resolution_binning"),
    ]
    published = PublishedPipeline(str(config_path))
    published.from_pretrained(str(config_path.parent / "transformer.safetensors"))
    seen = []
    published.register_progress_bar(lambda done, desc: seen.append((done, desc)))
    settings = {
        "height": 256,
        "width": 256,
        "guidance_scale": 5.0,
        "pag_guidance_scale": 2.0,
        "num_inference_steps": 2,
    }
    first = published(prompt="a red circle", **settings, generator=torch.Generator().manual_seed(42))
    assert seen == [(0.5, "step 1/2"), (1.0, "step 2/2")]
    published.register_progress_bar()
    again = published(prompt="a red circle", **settings, generator=torch.Generator().manual_seed(42))
    assert torch.equal(first, again)
    assert len(seen) == 2


def test_prompts_can_be_lower_cased(config_path, pipeline):
    settings = {"num_inference_steps": 2, "output_type": "latent"}
    lower = SanaPipeline(config_path, lowercase=True)
    plain = pipeline("a red circle", **settings)
    assert torch.equal(lower(" A Red CIRCLE\n", **settings), plain)
    assert not torch.equal(pipeline("A Red CIRCLE", **settings), plain)


def test_equal_prompts_are_encoded_once(pipeline, draw):
    draw("the instruction and the empty prompt are kept from here on")
    rows = []
    hook = pipeline.text_encoder.model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    with hook:
        draw(["a red circle", "a blue star", "a red circle"], num_images_per_prompt=2)
    assert rows == [2]


# Compiled


@pytest.mark.slow
def test_a_compiled_pipeline_draws_the_same(config_path, draw, tmp_path):
    compiled = SanaPipeline(config_path, compile=True)
    assert all(block._compiled_call_impl is not None for block in compiled.transformer.blocks)
    settings = {"height": 64, "width": 64, "use_resolution_binning": False, "num_inference_steps": 2}
    for prompts in (["a red circle"], PROMPTS[:2]):
        assert_close("pixels", compiled(prompts, **settings), draw(prompts), rel_rms=1e-5)
    compiled.from_pretrained(compiled.weights)
    assert all(block._compiled_call_impl is not None for block in compiled.transformer.blocks)


def test_a_step_cache_is_set_and_taken_away(config_path, draw, pipeline):
    cached = SanaPipeline(config_path).cache_steps(1e-9)
    settings = {"height": 64, "width": 64, "use_resolution_binning": False, "num_inference_steps": 2}
    assert_close("pixels", cached("a red circle", **settings), draw("a red circle"), rel_rms=1e-6)
    coarse = cached.cache_steps(1e9)("a red circle", **settings)
    assert not torch.equal(coarse, draw("a red circle"))
    assert torch.equal(cached.from_pretrained(cached.weights)("a red circle", **settings), coarse)
    assert_close(
        "exact again",
        cached.cache_steps(None)("a red circle", **settings),
        draw("a red circle"),
        rel_rms=1e-6,
    )
    with pytest.raises(ValueError, match="above 0, got -1"):
        cached.cache_steps(-1)
