"""2048 and 4096: every bucket, the position embedding, sizes between buckets, and the flow shift, with narrow networks."""

import pytest
import torch

from sana.config import load_config
from sana.models.layers import position_embedding
from sana.models.transformer import SanaTransformer
from sana.pipeline import SanaPipeline
from sana.resolution import TABLES
from tests.factories import make_transformer, write_model

CONFIGS = {
    2048: "configs/sana_config/2048ms/Sana_1600M_img2048_bf16.yaml",
    4096: "configs/sana_config/4096ms/Sana_1600M_img4096_bf16.yaml",
}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return SanaPipeline(write_model(tmp_path_factory.mktemp("model")), device="cpu")


@pytest.fixture(params=CONFIGS)
def pipeline(request, parts):
    """The published config's sizes, position embedding and flow shift, over a network of one narrow block."""
    published = load_config(CONFIGS[request.param])
    narrow = {
        "model.model": "SanaMS_Tiny_P1_D8",
        "model.load_from": "null",
        "text_encoder.caption_channels": 32,
    }
    config = load_config(CONFIGS[request.param], [f"{key}={value}" for key, value in narrow.items()])
    base = request.param // 32
    pe = {"use_pe": True, "pe_base_size": base, "pe_interpolation": published.model.pe_interpolation}
    transformer = make_transformer(depth=1, hidden_size=64, num_heads=2, **pe).requires_grad_(False)
    return SanaPipeline.from_components(config, transformer, parts.autoencoder, parts.text_encoder)


def drawn(monkeypatch) -> list[tuple[int, ...]]:
    """The sizes of the latents that the network is called with."""
    seen, usual = [], SanaTransformer.forward

    def forward(self, latents, *arguments, **settings):
        seen.append(tuple(latents.shape[-2:]))
        return usual(self, latents, *arguments, **settings)

    monkeypatch.setattr(SanaTransformer, "forward", forward)
    return seen


def test_every_bucket_is_drawn_at_its_size(pipeline, monkeypatch):
    """Those of generation, and the extreme ones that only training has, which are drawn if they are asked for as they are."""
    seen = drawn(monkeypatch)
    own = pipeline.config.model.image_size
    assert pipeline.buckets == TABLES[f"ASPECT_RATIO_{own}_TEST"]
    features = pipeline.encode(["a red circle"], [""])
    settings = {"num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "latent"}
    settings |= {"features": features, "sampler": "flow_euler"}
    sizes = {tuple(map(int, size)) for size in pipeline.buckets.values()}
    extreme = {tuple(map(int, size)) for size in TABLES[f"ASPECT_RATIO_{own}"].values()} - sizes
    for binning, group in ((True, sizes), (False, extreme)):
        for height, width in group:
            seen.clear()
            latents = pipeline("a red circle", height, width, use_resolution_binning=binning, **settings)
            assert latents.shape == (1, 32, height // 32, width // 32) and latents.isfinite().all()
            assert seen == [(height // 32, width // 32)]


def test_a_size_between_buckets_is_drawn_at_the_next_and_cropped(pipeline, monkeypatch):
    seen = drawn(monkeypatch)
    own = pipeline.config.model.image_size
    height, width = own // 2 - 7, own // 2 + 33  # multiples of nothing
    bucket = pipeline.sizes(height, width, True)[1]
    across = torch.linspace(-1, 1, bucket[1]).expand(
        1, 3, *bucket
    )  # what stands at a column tells where it was
    monkeypatch.setattr(pipeline.autoencoder, "decode", lambda x, **_: across)
    pixels = pipeline("a red circle", height, width, num_inference_steps=1, sampler="flow_euler")
    assert pixels.shape == (1, 3, height, width)
    # Scaled as much both ways, so that it covers; the middle is kept, and an equal part of both sides cut off.
    shown = width * bucket[0] / height / bucket[1] if bucket[0] * width < bucket[1] * height else 1.0
    assert pixels[0, 0, height // 2, -1].item() == pytest.approx(shown, abs=0.01)
    assert pixels[0, 0, height // 2, 0].item() == pytest.approx(-shown, abs=0.01)
    assert set(seen) == {tuple(side // 32 for side in bucket)} and bucket in pipeline.buckets.values()
    with pytest.raises(ValueError, match=f"multiples of 32, got {height} x {width}; the nearest size is "):
        pipeline("a red circle", height, width, use_resolution_binning=False)


def test_positions_span_the_same_whatever_the_ratio(pipeline):
    """The coordinates of a wide picture are those of the square one, more densely on the longer side."""
    config = pipeline.transformer.config
    base, scale = config.pe_base_size, config.pe_interpolation
    assert (base, scale) == {2048: (64, 1.0), 4096: (128, 2.0)}[pipeline.config.model.image_size]
    settings = {"base_size": base, "interpolation": scale}
    for height, width in ((base, base), (base // 2, 2 * base)):
        table = position_embedding(8, (height, width), **settings).view(height, width, 8)
        row, column = height - 1, width - 1
        # 8 channels: for columns, then rows, the sine and cosine of two frequencies, 1 and 1/100.
        for place, side, channel in ((column, width, 0), (row, height, 4)):
            angle = torch.tensor(place / (side / base) / scale, dtype=torch.float64)
            assert torch.allclose(table[row, column, channel], angle.sin())
            assert torch.allclose(table[row, column, channel + 3], (angle / 100).cos())


def test_the_flow_shift_is_that_of_the_size(pipeline):
    assert pipeline.flow_shift == {2048: 3.0, 4096: 6.0}[pipeline.config.model.image_size]


def test_a_network_with_positions_draws_a_wide_picture(pipeline):
    """At a sixteenth of the area: all of it, but for the size, is that of the large ones."""
    side = 8 * 32
    settings = {"num_inference_steps": 2, "use_resolution_binning": False}
    picture = pipeline("a red circle", side, 2 * side, **settings)
    assert picture.shape == (1, 3, side, 2 * side) and picture.isfinite().all()
    without = make_transformer(depth=1, hidden_size=64, num_heads=2).requires_grad_(False)
    parts = (pipeline.config, without, pipeline.autoencoder, pipeline.text_encoder)
    assert not torch.equal(
        picture, SanaPipeline.from_components(*parts)("a red circle", side, 2 * side, **settings)
    )
