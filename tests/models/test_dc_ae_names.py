"""The authors' names of the DC-AE, against the conversion that diffusers ships and at the published size."""

import pytest
import torch
from diffusers import AutoencoderDC
from diffusers.loaders.single_file_utils import convert_autoencoder_dc_checkpoint_to_diffusers

from sana.models.dc_ae_names import from_native, is_native, layout
from tests.models.native_dc_ae import FULL, LAYOUTS, LITE, build_published, native_state, small


@pytest.mark.parametrize("kind", LAYOUTS)
def test_names_and_layout_come_back(kind):
    model = build_published(small(LAYOUTS[kind]))
    native = native_state(model)
    assert is_native(native)
    assert not is_native(model.state_dict())
    state = from_native(native)
    assert state.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(state[name], value), name
    expected = small(LAYOUTS[kind])
    found = layout(state)
    if kind == "lite":  # the width of a stage that is not there cannot be seen
        assert found.pop("decoder_block_out_channels") == (4, 8, 16, 16, 32, 32)
        expected.pop("decoder_block_out_channels")
    assert found == expected


def test_names_are_those_of_diffusers_own_conversion():
    native = native_state(build_published(small(FULL)))
    theirs = convert_autoencoder_dc_checkpoint_to_diffusers(dict(native))
    ours = from_native(native)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


@pytest.mark.parametrize("kind", LAYOUTS)
def test_published_size(kind):
    """Every name and shape of DC-AE 1.0 and 1.1 (153,027,104 + 159,223,171 parameters), and of Lite."""
    with torch.device("meta"):
        twin = AutoencoderDC(**LAYOUTS[kind])
    state = from_native(native_state(twin))
    found = layout(state)
    assert found == LAYOUTS[kind]
    with torch.device("meta"):
        model = AutoencoderDC(**found)
    expected = {name: value.shape for name, value in twin.state_dict().items()}
    assert {name: value.shape for name, value in state.items()} == expected
    assert {name: value.shape for name, value in model.state_dict().items()} == expected
    sizes = [sum(value.numel() for value in part.parameters()) for part in (model.encoder, model.decoder)]
    assert sizes[0] == 153_027_104
    if kind == "1.0":
        assert sizes[1] == 159_223_171
        assert native_state(twin)["decoder.stages.5.op_list.0.context_module.main.qkv.conv.weight"].shape == (
            *(3072, 1024),
            *(1, 1),
        )
    assert sum(sizes) == sum(value.numel() for value in state.values())


def test_other_networks_are_refused():
    native = native_state(build_published(small(LITE)))
    with pytest.raises(ValueError, match="no published DC-AE for Sana has a tensor 'encoder.stem.weight'"):
        from_native({**native, "encoder.stem.weight": torch.zeros(1)})
    for lost in ("decoder.stages", "encoder.project_out", "encoder.stages.0.op_list.2"):
        part = {name: value for name, value in native.items() if not name.startswith(lost)}
        with pytest.raises(ValueError, match="no complete DC-AE for Sana"):
            layout(from_native(part))
