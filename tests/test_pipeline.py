from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

import sana
from app.sana_pipeline import SanaPipeline as PublishedPipeline
from sana import pipeline as module
from sana.config import load_config
from sana.diffusion.guidance import Guidance, guided
from sana.diffusion.solvers import SOLVERS
from sana.models.text_encoder import TextFeatures
from sana.pipeline import NonFiniteError, SanaPipeline, image_seed
from sana.utils import hub, images
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
        ({"output_type": "jpeg"}, "unknown output_type 'jpeg'"),
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

    def recorded(model, text, null, guidance):
        seen.append((text, null, guidance))
        return guided(model, text, null, guidance)

    monkeypatch.setattr(module, "guided", recorded)
    return seen


def test_an_empty_negative_prompt_is_seen_through_the_prompts_mask(pipeline, draw, text_seen):
    draw(["a red circle", "three blue stars and a heart"], negative_prompt=["", "a large black ring"])
    (text, null, _) = text_seen[0]
    own = pipeline.text_encoder.encode_unconditional(["", "a large black ring"])
    assert torch.equal(null.mask[0], text.mask[0])
    assert torch.equal(null.mask[1], own.mask[1])
    assert not torch.equal(own.mask[0], text.mask[0])
    assert not torch.equal(own.mask[1], text.mask[1])
    assert_close("null features", null.embeds, own.embeds, rel_rms=BATCH_TOLERANCE)


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
    for sampler in ("flow_dpm-solver", "flow_euler"):
        draw(
            "",
            num_inference_steps=None,
            sampler=sampler,
            callback=lambda step, total, x, x0: steps.append(total),
        )
    assert steps == [20] * 20 + [28] * 28


def test_a_cancelled_call_leaves_nothing_behind(draw):
    expected = draw("a red circle")

    def cancel(step, total, x, x0):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw("three blue stars", callback=cancel, negative_prompt="x", pag_guidance_scale=3.0)
    assert torch.equal(expected, draw("a red circle"))


# Sizes


@pytest.mark.parametrize(
    ("asked", "drawn"),
    [
        ((256, 256), (256, 256)),
        ((100, 80), (288, 224)),
        ((128, 512), (128, 512)),
        ((90, 360), (128, 512)),
        ((300, 300), (256, 256)),
    ],
)
def test_sizes_are_drawn_at_the_nearest_of_the_table(pipeline, asked, drawn):
    assert pipeline.sizes(*asked, True) == (asked, drawn)


def test_binning_scales_and_crops(pipeline):
    noise = noise_of(2, 1, 32, 8, 8)
    full = pipeline("a red circle", latents=noise, num_inference_steps=2)
    smaller = pipeline("a red circle", 128, 120, latents=noise, num_inference_steps=2)
    halved = torch.nn.functional.interpolate(full, (128, 128), mode="bilinear", align_corners=False)
    assert torch.equal(smaller, halved[..., 4:124])
    assert pipeline("a red circle", 90, 150, num_inference_steps=2).shape == (1, 3, 90, 150)


def test_non_square_without_binning(pipeline):
    settings = {"use_resolution_binning": False, "num_inference_steps": 2}
    wide = pipeline("a red circle", 64, 160, **settings)
    assert wide.shape == (1, 3, 64, 160)
    assert pipeline("a red circle", 64, **settings).shape == (1, 3, 64, 256)


@pytest.mark.parametrize(
    ("size", "binning", "message"),
    [
        ((250, 70), False, "multiples of 32, got 250 x 70; the nearest size is 256 x 64"),
        ((0, 64), False, "multiples of 32, got 0 x 64; the nearest size is 32 x 64"),
        ((-64, 64), True, "got -64 x 64"),
        ((64, 512), True, r"from 0.25 to 4.0, not 64 x 512; the nearest size is 128 x 512"),
        ((2048, 256), True, "the nearest size is 512 x 128"),
    ],
)
def test_impossible_sizes_name_the_nearest_possible(pipeline, size, binning, message):
    with pytest.raises(ValueError, match=message):
        pipeline("a red circle", *size, use_resolution_binning=binning)


def test_enlarging_is_said(pipeline, caplog):
    pipeline.sizes(360, 360, True)
    assert not caplog.records
    pipeline.sizes(1024, 1024, True)
    assert "drawn at 256 x 256 and enlarged to 1024 x 1024" in caplog.text


def test_every_bucket_can_be_drawn(pipeline):
    assert len(pipeline.buckets) >= 9
    assert all(side % 32 == 0 for size in pipeline.buckets.values() for side in size)


# Failures


def test_latents_that_are_not_finite_are_an_error(draw):
    noise = torch.zeros(2, 32, 2, 2)
    noise[1, 0, 0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match=r"the latents of image\(s\) 1 are not finite.*torch.float32"):
        draw(["a red circle"] * 2, latents=noise)


def test_pixels_that_are_not_finite_are_an_error(pipeline, draw, monkeypatch):
    monkeypatch.setattr(
        pipeline.autoencoder, "decode", lambda latents: torch.full((1, 3, 64, 64), float("nan"))
    )
    with pytest.raises(NonFiniteError, match=r"the pixels of image\(s\) 0"):
        draw("a red circle")


def test_weights_are_loaded_strictly(config_path, tmp_path):
    pipeline = SanaPipeline(load_config(config_path, ["model.load_from="]))
    assert pipeline.weights is None
    assert pipeline.weights_sha256 is None
    with pytest.raises(ValueError, match="no weights are loaded: call from_pretrained"):
        pipeline("a red circle")
    state = load_file(config_path.parent / "transformer.safetensors")
    save_file(
        {name: value for name, value in state.items() if "x_embedder" not in name},
        tmp_path / "part.safetensors",
    )
    with pytest.raises(ValueError, match="x_embedder"):
        pipeline.from_pretrained(tmp_path / "part.safetensors")
    with pytest.raises(ValueError, match="no weights are loaded"):
        pipeline("a red circle")
    assert pipeline.from_pretrained(config_path.parent / "transformer.safetensors") is pipeline
    assert pipeline.weights_sha256 == hub.sha256(config_path.parent / "transformer.safetensors")
    torch.save({"state_dict": {name: 2 * value for name, value in state.items()}}, tmp_path / "double.pth")
    pipeline.from_pretrained(tmp_path / "double.pth")
    assert torch.equal(pipeline.transformer.state_dict()["t_block.1.bias"], 2 * state["t_block.1.bias"])
    assert pipeline.weights_sha256 == hub.sha256(tmp_path / "double.pth")


# Making one


def test_dtypes(config_path, pipeline):
    assert pipeline.config.model.mixed_precision == "bf16"
    assert {pipeline.dtype, pipeline.autoencoder.dtype, pipeline.text_encoder.model.dtype} == {torch.float32}
    assert pipeline.transformer.config.fp32_attention
    half = SanaPipeline(config_path, dtype="bf16", device="cpu")
    assert half.dtype == torch.bfloat16
    assert half.autoencoder.dtype == half.text_encoder.model.dtype == torch.float32
    assert not half.transformer.config.fp32_attention
    picture = half("a red circle", num_inference_steps=2)
    assert picture.dtype == torch.float32
    # bfloat16 has 8 bits: measured 1 % at 2 steps
    assert_close("bf16", picture, pipeline("a red circle", num_inference_steps=2), rel_rms=0.03)
    for settings, message in (
        ({"dtype": "int8"}, "unknown dtype 'int8'"),
        ({"device": "abacus"}, "no device 'abacus'"),
    ):
        with pytest.raises(ValueError, match=message):
            SanaPipeline(config_path, **settings)


def test_from_components(pipeline):
    other = make_transformer(seed=1)
    made = SanaPipeline.from_components(pipeline.config, other, pipeline.autoencoder, pipeline.text_encoder)
    assert made.weights_sha256 is None
    assert (
        made("a red circle", num_inference_steps=2) - pipeline("a red circle", num_inference_steps=2)
    ).std() > 0.05
    assert other.config.model_max_length == TEXT_LENGTH


def test_the_shift_of_inference_comes_first(config_path, draw):
    config = load_config(config_path, ["scheduler.inference_flow_shift=5.5"])
    assert SanaPipeline(config).flow_shift == 5.5
    assert draw.func.flow_shift == 3.0


def test_public_names(config_path):
    assert sana.SanaPipeline is SanaPipeline
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


def test_equal_prompts_are_encoded_once(pipeline):
    texts = []

    def encode(prompts):
        texts.append(prompts)
        return pipeline.text_encoder.encode(prompts)

    features = module._encode_each(encode, ["b", "a", "b"])
    assert texts == [["b", "a"]]
    assert torch.equal(features.embeds[0], features.embeds[2])
    assert not torch.equal(features.embeds[0], features.embeds[1])
