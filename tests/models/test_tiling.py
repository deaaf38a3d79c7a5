"""Tiles: their places, their blending, and what they leave of a function that sees only its own pixel."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from sana.models.autoencoder import Autoencoder
from sana.models.tiling import _starts, in_tiles
from tests.factories import make_autoencoder
from tests.numerics import assert_close


@pytest.mark.parametrize(
    ("length", "tile", "overlap", "expected"),
    [(8, 8, 2, [0]), (5, 8, 2, [0]), (9, 8, 2, [0, 1]), (20, 8, 2, [0, 6, 12]), (21, 8, 2, [0, 4, 9, 13])],
)
def test_tiles_are_spread_evenly(length, tile, overlap, expected):
    starts = _starts(length, tile, overlap)
    assert starts == expected
    ends = [start + tile for start in starts]
    assert all(end - following >= overlap for end, following in zip(ends, starts[1:], strict=False))


@pytest.mark.parametrize("cell", [(1, 4), (4, 1)], ids=["decode", "encode"])
@pytest.mark.parametrize("overlap", [0, 1, 3])
def test_a_function_of_single_cells_is_left_as_it_is(overlap, cell):
    x = torch.randn(2, 3, 13 * cell[0], 9 * cell[0])

    def resize(x):
        assert max(x.shape[-2:]) <= 4 * cell[0], "larger than a tile"
        return whole(x)

    whole = partial(F.interpolate, scale_factor=4) if cell[1] > 1 else partial(F.avg_pool2d, kernel_size=4)
    assert_close("image", in_tiles(resize, x, tile=4, overlap=overlap, cell=cell), whole(x), rel_rms=1e-6)


@pytest.mark.parametrize("shape", [(1, 8), (8, 1)], ids=["beside", "above"])
def test_overlaps_are_blended_linearly(shape):
    values = iter((0.0, 1.0))
    x = torch.zeros(1, 1, *shape)
    image = in_tiles(lambda x: torch.full_like(x, next(values)), x, tile=6, overlap=4, cell=(1, 1))
    assert_close("line", image.flatten(), torch.tensor([0, 0, 1, 3, 5, 7, 8, 8]) / 8, rel_rms=1e-6)


def test_an_overlap_as_long_as_a_tile_is_refused():
    with pytest.raises(ValueError, match="tiles of 4 cannot overlap by 4"):
        in_tiles(lambda x: x, torch.zeros(1, 1, 8, 8), tile=4, overlap=4, cell=(1, 1))


def test_an_autoencoder_decodes_and_encodes_in_tiles():
    """Measured: 0.15 and 0.09 of the values; a tile in a wrong place gives 1 and more."""
    autoencoder = Autoencoder(make_autoencoder()).requires_grad_(False)
    images = torch.rand(1, 3, 256, 320, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        latents = autoencoder.encode(images)
        assert_close("latents", autoencoder.encode(images, tile=192, overlap=128), latents, rel_rms=0.3)
        pixels = autoencoder.decode(latents)
        assert_close("pixels", autoencoder.decode(latents, tile=192, overlap=128), pixels, rel_rms=0.3)
        assert torch.equal(autoencoder.decode(latents, tile=320), pixels)
    with pytest.raises(ValueError, match="multiples of 32, got 100 and 32"):
        autoencoder.decode(latents, tile=100)
