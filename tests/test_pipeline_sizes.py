"""Sizes: from what is asked for to what is drawn."""

from dataclasses import replace

import pytest
import torch

from sana.pipeline import SanaPipeline
from sana.resolution import TABLES
from tests.factories import write_model


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return SanaPipeline(write_model(tmp_path_factory.mktemp("model")))


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
    noise = torch.randn((1, 32, 8, 8), generator=torch.Generator().manual_seed(2))
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


class Still:
    """A network without motion, for shapes: the latents are the noise."""

    dtype = torch.float32

    def __init__(self, config):
        self.config = config

    def __call__(self, latents, time, embeds, mask, *, text_cache, perturbed_blocks):
        return torch.zeros_like(latents)


def at_size(pipeline, image_size, network):
    """The pipeline as a model of another size."""
    config = replace(pipeline.config, model=replace(pipeline.config.model, image_size=image_size))
    return SanaPipeline.from_components(config, network, pipeline.autoencoder, pipeline.text_encoder)


ONE_STEP = {"sampler": "flow_euler", "num_inference_steps": 1, "guidance_scale": 1.0}


@pytest.mark.parametrize("image_size", [256, 512, 768, 1024, 1280, 1536, 2048, 2880, 4096])
def test_every_bucket_can_be_drawn(pipeline, image_size):
    drawing = at_size(pipeline, image_size, Still(pipeline.transformer.config))
    table = TABLES[f"ASPECT_RATIO_{image_size}_TEST"]
    assert len(drawing.buckets) == (9 if image_size == 256 else len(table))
    for height, width in drawing.buckets.values():
        latents = drawing("", height, width, output_type="latent", **ONE_STEP)
        assert latents.shape == (1, 32, height // 32, width // 32)
        assert height % 32 == width % 32 == 0


def test_every_bucket_of_a_small_table_is_drawn_by_a_network(pipeline):
    for height, width in pipeline.buckets.values():
        pixels = pipeline("a red circle", height, width, **ONE_STEP)
        assert pixels.shape == (1, 3, height, width)
        assert pixels.isfinite().all()


@pytest.mark.slow
def test_every_bucket_at_512_is_drawn_by_a_network(pipeline):
    drawing = at_size(pipeline, 512, pipeline.transformer)
    for height, width in drawing.buckets.values():
        assert drawing("a red circle", height, width, **ONE_STEP).shape == (1, 3, height, width)


@pytest.mark.parametrize(
    ("option", "size"),
    [("--ar 1:4", (128, 512)), ("--aspect_ratio=4:1", (512, 128)), ("--hw 96:160", (96, 160))],
)
def test_size_options_in_a_prompt(pipeline, option, size):
    settings = {"num_inference_steps": 2, "output_type": "latent"}
    asked = pipeline(f"a red {option} circle", 64, 64, **settings)
    assert torch.equal(asked, pipeline("a red circle", *size, **settings))
    both = pipeline([f"a red circle {option}", f"{option} a blue star"], num_images_per_prompt=2, **settings)
    assert both.shape == (4, *asked.shape[1:])
