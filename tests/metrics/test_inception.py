"""Our Inception against those of pytorch-fid and torch-fidelity, on random weights under the published names."""

import logging
import re
import shutil

import numpy as np
import pytest
import pytorch_fid.inception
import torch
from PIL import Image
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x
from torchvision.transforms import functional as pictures

from sana.metrics.inception import DIMS, WEIGHTS, Preset, load_inception
from sana.metrics.weights import Published
from tests.scorers import truncate, write_inception


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_inception(tmp_path_factory.mktemp("inception") / "random.pth")


@pytest.fixture(scope="module")
def network(weights):
    return load_inception(weights)


@pytest.fixture(scope="module")
def picture():
    """Neither square nor of a size that a grid likes, with detail of all scales."""
    noise = np.random.default_rng(0).integers(0, 256, (553, 700, 3), dtype=np.uint8)
    smooth = Image.fromarray(noise[:35, :44]).resize((700, 553), Image.Resampling.BICUBIC)
    return Image.blend(Image.fromarray(noise), smooth, 0.6)


@torch.inference_mode()
def ours(network, preset, picture, dims):
    return network(Preset(preset)(picture)[None], dims)[0]


@torch.inference_mode()
def test_published_protocol_equals_pytorch_fid(weights, network, picture, monkeypatch):
    """Shorter side to 512 by Pillow, middle square, then pytorch-fid's own resize: as Sana's numbers were made."""
    state = torch.load(weights, weights_only=True)
    monkeypatch.setattr(pytorch_fid.inception, "load_state_dict_from_url", lambda *_, **__: state)
    theirs = pytorch_fid.inception.InceptionV3([0, 1, 2, 3]).eval()
    square = pictures.center_crop(pictures.resize(picture, 512), [512, 512])
    outputs = theirs(pictures.to_tensor(square)[None])
    for dims, output in zip(DIMS, outputs, strict=True):
        expected = output.mean((2, 3))[0]
        assert expected.std() > 0.1, "features that say nothing would agree too"
        found = ours(network, "pytorch-fid@512", picture, dims)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)  # measured: equal
    small = theirs(pictures.to_tensor(picture)[None])[-1].mean((2, 3))[0]
    torch.testing.assert_close(ours(network, "pytorch-fid", picture, 2048), small, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_equals_torch_fidelity(weights, network, picture):
    names = [str(dims) for dims in DIMS]
    theirs = FeatureExtractorInceptionV3(
        "inception", list(names), feature_extractor_weights_path=str(weights)
    )
    outputs = theirs(pictures.pil_to_tensor(picture)[None])
    for dims, output in zip(DIMS, outputs, strict=True):
        assert output.std() > 0.1
        found = ours(network, "torch-fidelity", picture, dims)
        torch.testing.assert_close(found, output[0], atol=1e-4, rtol=1e-4)  # measured: 2e-5


def test_grids_differ_as_the_libraries_do(picture):
    """The resize is what makes numbers of libraries differ: each preset is its own, and the right one."""
    pixels = pictures.pil_to_tensor(picture)[None].float()
    tensorflow = interpolate_bilinear_2d_like_tensorflow1x(pixels, (299, 299), align_corners=False)[0]
    torch.testing.assert_close(Preset("torch-fidelity")(picture), (tensorflow - 128) / 128, atol=1e-5, rtol=0)
    red = np.asarray(picture)[..., 0].astype(np.float32)
    clean = np.asarray(Image.fromarray(red).resize((299, 299), Image.Resampling.BICUBIC)).clip(0, 255)
    found = Preset("clean")(picture)[0]
    torch.testing.assert_close(found, torch.from_numpy((clean - 128) / 128), atol=1e-6, rtol=0)
    stripes = Image.fromarray(np.tile(np.repeat(np.uint8([0, 255]), 20), (40, 1))).convert("RGB")
    edges = Preset("clean")(stripes)  # a cubic filter overshoots at edges
    assert (edges.min(), edges.max()) == (-1, 127 / 128)
    results = [
        Preset(name)(picture) for name in ("pytorch-fid", "torch-fidelity", "clean", "pytorch-fid@512")
    ]
    for place, first in enumerate(results):
        assert first.shape == (3, 299, 299) and first.dtype == torch.float32
        for second in results[place + 1 :]:
            assert (first - second).abs().mean() > 0.01


def test_batches_do_not_matter(network):
    pixels = torch.rand(3, 3, 299, 299, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.inference_mode():
        together = network(pixels, 192)
        alone = torch.cat([network(one[None], 192) for one in pixels])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_wrong_input(weights, network, tmp_path):
    with pytest.raises(
        ValueError, match="unknown preset 'bicubic'; choose from pytorch-fid, torch-fidelity, clean"
    ):
        Preset("bicubic")
    with pytest.raises(ValueError, match="unknown preset 'clean@00'"):
        Preset("clean@00")
    with pytest.raises(ValueError, match="64, 192, 768, 2048 numbers, not of 100"):
        network(torch.zeros(1, 3, 299, 299), 100)
    state = torch.load(weights, weights_only=True)
    torch.save({name: value for name, value in state.items() if name != "fc.bias"}, tmp_path / "part.pth")
    with pytest.raises(ValueError, match="part.pth is not the FID Inception: it lacks 1 tensors, fc.bias"):
        load_inception(tmp_path / "part.pth")
    torch.save(state | {"fc.bias": torch.zeros(1000)}, tmp_path / "other.pth")  # torchvision's classes
    with pytest.raises(ValueError, match="other.pth is not the FID Inception: size mismatch for fc.bias"):
        load_inception(tmp_path / "other.pth")
    shutil.copy(tmp_path / "other.pth", tmp_path / "half.pth")
    truncate(tmp_path / "half.pth")
    with pytest.raises(ValueError, match="half.pth: cannot be read as the weights of the FID Inception"):
        load_inception(tmp_path / "half.pth")


def test_copies_of_the_file_without_counters(weights, network, tmp_path):
    """The counts of batches are not in every copy, and have no effect."""
    state = torch.load(weights, weights_only=True)
    bare = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    assert len(state) - len(bare) == 94
    torch.save(bare, tmp_path / "bare.pth")
    pixels = torch.zeros(1, 3, 299, 299)
    with torch.inference_mode():
        assert torch.equal(load_inception(tmp_path / "bare.pth")(pixels, 64), network(pixels, 64))


def test_weights_are_found_and_checked(tmp_path, caplog):
    name = WEIGHTS.place.rpartition("/")[2]
    assert WEIGHTS.sha256 in name and name in WEIGHTS.fetch
    published = Published("the network", str(tmp_path / "net.pth"), "curl -o net.pth URL", sha256="2cf24dba")
    with pytest.raises(ValueError, match=re.escape("net.pth'") + ".*; to fetch it: curl -o net.pth URL"):
        published.find()
    with pytest.raises(ValueError, match="holds no net.pth; to fetch it: curl"):
        published.find(tmp_path)
    (tmp_path / "net.pth").write_bytes(b"hello")  # its sha256 begins so
    with caplog.at_level(logging.WARNING):
        assert published.find() == published.find(tmp_path) == tmp_path / "net.pth"
    assert not caplog.text
    (tmp_path / "own.pth").write_bytes(b"other")
    with caplog.at_level(logging.WARNING):
        assert published.find(tmp_path / "own.pth") == tmp_path / "own.pth"
    assert "compare with no published ones" in caplog.text
    (tmp_path / "net.pth").write_bytes(b"hell")
    with pytest.raises(ValueError, match="does not begin with 2cf24dba; a damaged download"):
        published.find()
