"""The autoencoder's face: scale, sizes, folders; the arithmetic itself is diffusers'."""

import json

import pytest
import torch
from diffusers import AutoencoderDC
from safetensors.torch import save_file

from sana.models.autoencoder import PUBLISHED, Autoencoder, AutoencoderConfig, find_autoencoder
from tests.factories import make_autoencoder
from tests.models.native_dc_ae import LAYOUTS, LITE, build_published, native_state, small, write_native
from tests.numerics import assert_close


def test_scale_is_the_config_s_and_applied_both_ways():
    model = make_autoencoder()
    autoencoder = Autoencoder(model)
    images = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        latents = autoencoder.encode(images)
        assert latents.shape == (2, 32, 2, 3)
        raw = model.encode(images).latent
        assert torch.equal(latents, raw * 0.5) and raw.std() > 0.01
        assert_close("pixels", autoencoder.decode(latents), model.decode(raw).sample, rel_rms=4e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_not_less_exact_than_diffusers(dtype):
    model = make_autoencoder()
    raw = torch.randn(1, 32, 2, 3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = model.decode(raw).sample
        theirs = model.to(dtype).decode(raw.to(dtype)).sample
        ours = Autoencoder(model).decode(raw * 0.5)
    assert ours.dtype == dtype
    assert (ours - exact).norm() <= 1.2 * (theirs - exact).norm()


def test_with_gradients_it_is_the_library_s():
    """Which keeps what a backward pass needs; ours writes over it."""
    autoencoder = Autoencoder(make_autoencoder())
    latents = torch.randn(1, 32, 2, 2, requires_grad=True)
    pixels = autoencoder.decode(latents)
    assert torch.equal(pixels, autoencoder.model.decode(latents / 0.5).sample)
    pixels.square().mean().backward()
    assert latents.grad.abs().sum() > 0


def test_an_offloading_hook_is_called():
    """As AutoencoderDC.decode does: accelerate moves the weights in it."""

    class Hook:
        calls = 0

        def pre_forward(self, module):
            self.calls += 1

    autoencoder = Autoencoder(make_autoencoder())
    autoencoder.model._hf_hook = Hook()
    with torch.no_grad():
        autoencoder.decode(torch.zeros(1, 32, 1, 1))
    assert autoencoder.model._hf_hook.calls == 1


def test_published_layout_has_the_published_size():
    """DC-AE 1.0 and 1.1: 312,250,275 parameters."""
    with torch.device("meta"):
        autoencoder = Autoencoder.from_config(PUBLISHED)
    assert sum(p.numel() for p in autoencoder.parameters()) == 312_250_275
    assert (autoencoder.downsample, autoencoder.latent_channels, autoencoder.scaling_factor) == (
        32,
        32,
        0.41407,
    )


def test_tiny_is_small():
    with torch.device("meta"):
        autoencoder = Autoencoder.from_config(AutoencoderConfig())
    assert 4.0e6 < sum(p.numel() for p in autoencoder.parameters()) < 4.3e6
    assert autoencoder.downsample == 32


@pytest.mark.parametrize("size", [(64, 48), (33, 64)])
def test_sides_that_are_no_multiple_are_named(size):
    with pytest.raises(ValueError, match=f"multiples of 32, got {size[0]} x {size[1]}"):
        Autoencoder(make_autoencoder()).encode(torch.zeros(1, 3, *size))


def test_folder_round_trip_in_half_precision(tmp_path):
    autoencoder = Autoencoder(make_autoencoder())
    autoencoder.save_pretrained(tmp_path / "ae", torch.float16)
    loaded = Autoencoder.from_pretrained(tmp_path / "ae")
    assert loaded.dtype == torch.float32 and loaded.scaling_factor == 0.5
    assert not any(p.requires_grad for p in loaded.parameters()) and not loaded.training
    for (name, before), after in zip(
        autoencoder.state_dict().items(), loaded.state_dict().values(), strict=True
    ):
        assert torch.equal(before.half().float(), after), name


def test_nothing_there_is_one_clear_error(tmp_path):
    with pytest.raises(ValueError, match="no such file or folder"):
        Autoencoder.from_pretrained(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="cannot load an AutoencoderDC from"):
        Autoencoder.from_pretrained(tmp_path / "empty")


def test_truncated_weights_are_one_clear_error(tmp_path):
    Autoencoder(make_autoencoder()).save_pretrained(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cannot load an AutoencoderDC from"):
        Autoencoder.from_pretrained(tmp_path)


def test_a_saved_copy_names_no_folder(tmp_path):
    Autoencoder(make_autoencoder()).save_pretrained(tmp_path / "first")
    Autoencoder.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second", torch.float16)
    text = (tmp_path / "second" / "config.json").read_text()
    assert str(tmp_path) not in text
    assert json.loads(text)["scaling_factor"] == 0.5
    assert Autoencoder.from_pretrained(tmp_path / "second", dtype=None).dtype == torch.float16


# The authors' releases


@pytest.mark.parametrize("kind", LAYOUTS)
def test_native_release_is_its_diffusers_twin_bit_for_bit(kind, tmp_path):
    twin = build_published(small(LAYOUTS[kind]))
    folder = write_native(tmp_path / "native", native_state(twin))
    twin.save_pretrained(tmp_path / "diffusers")
    native, reference = (Autoencoder.from_pretrained(path) for path in (folder, tmp_path / "diffusers"))
    assert native.scaling_factor == 0.41407
    assert not any(p.requires_grad for p in native.parameters()) and not native.training
    images = torch.rand(2, 3, 192, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        latents = native.encode(images)
        assert latents.shape == (2, 16, 6, 2)
        assert latents.std() > 0.01
        assert torch.equal(latents, 0.41407 * twin.encode(images).latent)
        assert torch.equal(latents, reference.encode(images))
        assert torch.equal(native.decode(latents), reference.decode(latents))
        assert_close("pixels", native.decode(latents), twin.decode(latents / 0.41407).sample, rel_rms=4e-6)
        # The attention has another form where there are few latents.
        assert torch.equal(native.decode(latents[..., :2, :]), reference.decode(latents[..., :2, :]))


def test_native_release_becomes_a_diffusers_folder(tmp_path):
    twin = build_published(small(LITE)).half()
    folder = write_native(tmp_path / "native", native_state(twin), scaling_factor=0.25)
    loaded = Autoencoder.from_pretrained(folder, dtype=None)
    assert loaded.dtype == torch.float16
    assert Autoencoder.from_pretrained(folder).dtype == torch.float32
    loaded.save_pretrained(tmp_path / "diffusers")
    again = AutoencoderDC.from_pretrained(tmp_path / "diffusers", torch_dtype=torch.float16)
    assert again.config.scaling_factor == 0.25
    for name, value in twin.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    for path in (folder, tmp_path / "diffusers"):
        assert find_autoencoder(str(path)) == path
    assert find_autoencoder(tmp_path) is None


def test_broken_native_releases_are_one_clear_error(tmp_path):
    native = native_state(build_published(small(LITE)))
    lost = "decoder.stages.2.op_list.1.main.conv2.norm.bias"
    folder = write_native(tmp_path / "lost", {key: value for key, value in native.items() if key != lost})
    with pytest.raises(ValueError, match=r"cannot load .*decoder\.up_blocks\.2\.1\.norm\.bias") as caught:
        Autoencoder.from_pretrained(folder)
    assert "\n" not in str(caught.value)
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-10])
    with pytest.raises(ValueError, match="cannot load"):
        Autoencoder.from_pretrained(folder)
    write_native(tmp_path / "other", {"weight": torch.zeros(1)})
    assert find_autoencoder(tmp_path / "other") is None
    with pytest.raises(ValueError, match="model.safetensors holds no DC-AE"):
        Autoencoder.from_pretrained(tmp_path / "other")
    save_file(native, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="config.json"):
        Autoencoder.from_pretrained(tmp_path)
