"""The decoder's own arithmetic and its strips against diffusers' modules, on the layouts of all published autoencoders."""

import pytest
import torch
from diffusers import AutoencoderDC

from sana.models import dc_ae_decoder
from sana.runtime.memory import peak_of
from tests.numerics import assert_close

VIT = {
    "decoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
    "decoder_qkv_multiscales": ((), (), (), (5,), (5,), (5,)),
    "attention_head_dim": 8,
}
LAYOUTS = {
    "dc-ae 1.0 and 1.1": {**VIT, "decoder_block_out_channels": (8, 16, 32, 32, 32, 32), "upsample_block_type": "interpolate", "decoder_layers_per_block": (3,) * 6},
    "attention and pixel shuffle": {**VIT, "decoder_block_out_channels": (8, 8, 16, 16, 32, 32), "upsample_block_type": "pixel_shuffle", "decoder_layers_per_block": (0, 2, 1, 1, 1, 1)},
    "lite": {"decoder_block_out_channels": (8, 16, 16, 32, 32, 32), "upsample_block_type": "pixel_shuffle", "decoder_layers_per_block": (0, 3, 5, 4, 4, 4), "decoder_conv_act_fn": "silu"},
    "plain": {"decoder_block_out_channels": (8, 16, 32, 32, 64, 64), "upsample_block_type": "interpolate", "decoder_layers_per_block": (0, 2, 1, 1, 1, 1), "decoder_in_shortcut": False, "latent_channels": 16},
}  # fmt: skip
SMALL_ENCODER = {
    "encoder_block_out_channels": (8, 8, 8, 8, 32, 32),
    "encoder_layers_per_block": (1, 1, 1, 1, 1, 1),
    "latent_channels": 32,
}


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch):
    """Blocks of the norm are several, the last one short; doublings are made into filters at this size."""
    monkeypatch.setitem(dc_ae_decoder.NORM_VALUES, "cpu", 10_000)
    monkeypatch.setattr(dc_ae_decoder, "DOUBLED_PIXELS", 50)


def make_decoder(layout: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = AutoencoderDC(**(SMALL_ENCODER | LAYOUTS[layout])).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith(("norm.weight", "norm_out.weight", "norm.bias", "norm_out.bias", "conv.bias")):
            parameter.normal_(mean=float(name.endswith("weight")), std=0.3)  # as if trained
    return model.decoder


def make_latents(decoder: torch.nn.Module, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape[0], decoder.conv_in.in_channels, *shape[1:], generator=generator)


@pytest.mark.parametrize("shape", [(2, 3, 2), (1, 1, 3), (1, 5, 4)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_diffusers(layout, shape):
    decoder = make_decoder(layout)
    latents = make_latents(decoder, *shape)
    before = latents.clone()
    with torch.no_grad():
        expected, pixels = decoder(latents), dc_ae_decoder.decode(decoder, latents)
    assert_close("pixels", pixels, expected, rel_rms=4e-6)
    assert torch.equal(latents, before)


@pytest.mark.parametrize(("shape", "rows"), [((1, 2, 1), 1), ((1, 5, 2), 3), ((2, 3, 1), 8), ((1, 5, 1), 11)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strips_of_any_height_are_the_whole(layout, shape, rows, monkeypatch):
    """The finest coarse stage has four rows for each of the latents."""
    decoder = make_decoder(layout)
    latents = make_latents(decoder, *shape)
    with torch.no_grad():
        whole = dc_ae_decoder.decode(decoder, latents)
        monkeypatch.setattr(dc_ae_decoder, "_strip_height", lambda x, *_: min(rows, x.shape[-2]))
        strips = dc_ae_decoder.decode(decoder, latents)
    assert_close("pixels", strips, whole, rel_rms=4e-6)
    # A seam would be a row of large errors among small ones.
    assert (strips - whole).abs().max() < 1e-4 * whole.std()


@pytest.mark.parametrize("rows", [None, 3], ids=["whole", "strips"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_is_no_less_exact_than_diffusers_in_bfloat16(layout, rows, monkeypatch):
    decoder = make_decoder(layout)
    latents = make_latents(decoder, 1, 4, 3)
    if rows is not None:
        monkeypatch.setattr(dc_ae_decoder, "_strip_height", lambda x, *_: min(rows, x.shape[-2]))
    with torch.no_grad():
        exact = decoder(latents)
        half = decoder.bfloat16()
        theirs = (half(latents.bfloat16()).float() - exact).norm()
        ours = (dc_ae_decoder.decode(half, latents.bfloat16()).float() - exact).norm()
    assert ours <= 1.2 * theirs, f"{ours:.4f}, diffusers {theirs:.4f}, of {exact.norm():.1f}"


@pytest.mark.parametrize("share", [3, 8])
@pytest.mark.parametrize("layout", ["dc-ae 1.0 and 1.1", "lite"])
def test_strips_keep_to_their_memory(layout, share):
    """Measured: 0.44 to 0.68 of it beside the coarse images and the pixels."""
    decoder = make_decoder(layout)
    latents = make_latents(decoder, 1, 32, 2)
    coarse, pixels = 2 * 32 * 4 * (4 * 32) * (4 * 2), 3 * 4 * 1024 * 64
    whole = peak_of(lambda: dc_ae_decoder.decode(decoder, latents))
    budget = whole // share
    peak = peak_of(lambda: dc_ae_decoder.decode(decoder, latents, max_bytes=budget))
    assert 0.4 * budget < peak - coarse - pixels < budget


def test_strips_are_about_equal_and_cover_the_image():
    x = torch.empty(1, 4, 100, 50)
    row = 50 * 10 * 4  # bytes of ten values a pixel
    assert dc_ae_decoder._strip_height(x, 100 * row, 10, 3) == 100  # all of it fits
    assert dc_ae_decoder._strip_height(x, 61 * row, 10, 3) == 50  # 55 rows and margins: twice 50
    assert dc_ae_decoder._strip_height(x, 1, 10, 3) == 1
    image = torch.empty(1, 1, 7, 1)
    assert list(dc_ae_decoder._strips(image, 3, 2)) == [(0, 0, 3, 5), (1, 3, 6, 7), (4, 6, 7, 7)]
    assert len(list(dc_ae_decoder._strips(image, 1, 2))) == 7
    assert len(list(dc_ae_decoder._strips(image.to("meta"), 1, 2))) == 3


@pytest.mark.parametrize("layout", ["dc-ae 1.0 and 1.1", "lite"])
def test_a_block_leaves_its_input(layout):
    for stage in make_decoder(layout).up_blocks:
        for block in stage:
            channels = block.conv.in_channels if hasattr(block, "conv") else None
            channels = channels or next(p for p in block.parameters()).shape[1]
            x = torch.randn(1, channels, 8, 8).contiguous(memory_format=torch.channels_last)
            before = x.clone()
            with torch.no_grad():
                dc_ae_decoder.run_block(block, x)
            assert torch.equal(x, before), type(block).__name__
