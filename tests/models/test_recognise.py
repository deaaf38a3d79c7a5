"""The architecture is read off the weights; what fits nothing is refused with the nearest."""

import pytest
import torch

from sana.models.key_names import to_diffusers
from sana.models.state_dict import load_into, require_fit
from sana.models.zoo import TRANSFORMERS, build_transformer, recognise

TINY = "SanaMS_Tiny_P1_D8"
NORMS = {"qk_norm": True, "cross_norm": True}


def weights(name: str, **overrides) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        return build_transformer(name, **overrides).state_dict()


@pytest.fixture(scope="module")
def tiny():
    return weights(TINY)


@pytest.mark.parametrize("name", ["SanaMS_600M_P2_D28", "SanaMSCM_600M_P1_D28", TINY])
def test_the_architecture_itself(name):
    assert recognise(weights(name)) == (name, {})


@pytest.mark.parametrize(
    "overrides",
    [
        NORMS,
        {"qk_norm": True},
        {"cross_norm": True},
        {"y_norm": False},
        {"caption_channels": 96, "model_max_length": 30},
        {"in_channels": 8, "out_channels": 16},
        {"mlp_ratio": 2.0},
    ],
    ids="+".join,
)
def test_settings_that_tensors_tell(overrides):
    state = weights(TINY, **overrides)
    assert recognise(state) == (TINY, overrides)
    with torch.device("meta"):
        load_into(build_transformer(TINY, **overrides), state)


def test_settings_that_tensors_do_not_tell(tiny):
    assert recognise(weights(TINY, use_pe=True, timestep_norm_scale_factor=1000.0)) == (TINY, {})
    assert recognise({**tiny, "pos_embed": torch.empty(1, 64, 64)}) == (TINY, {})
    assert recognise({key: value for key, value in tiny.items() if "y_embedding" not in key}) == (TINY, {})


def test_names_of_diffusers():
    assert recognise(to_diffusers(weights(TINY, **NORMS))) == (TINY, NORMS)


def test_what_fits_nothing_names_the_nearest(tiny):
    deep = weights("SanaMS_600M_P1_D28", depth=9)
    with pytest.raises(
        ValueError, match="1152 wide and 9 blocks deep with patches of 1; the nearest is SanaMS_600M"
    ):
        recognise(deep)
    adaln = {**tiny, "blocks.0.adaLN_modulation.weight": torch.empty(1)}
    with pytest.raises(
        ValueError, match=f"the nearest is {TINY}, but the model has no blocks.0.adaLN_modulation"
    ):
        recognise(adaln)
    with pytest.raises(ValueError, match="it lacks blocks.3.attn.proj.bias"):
        recognise({key: value for key, value in tiny.items() if key != "blocks.3.attn.proj.bias"})


@pytest.mark.parametrize("key", ["x_embedder.proj.weight", "blocks.0.mlp.point_conv.conv.weight"])
def test_other_networks_are_no_transformer(tiny, key):
    for state in (
        {"encoder.conv_in.weight": torch.empty(1)},
        {name: value for name, value in tiny.items() if name != key},
        {**tiny, key: torch.empty(3)},
    ):
        with pytest.raises(ValueError, match="not the weights of a Sana transformer: no ") as caught:
            recognise(state)
        assert "\n" not in str(caught.value)


def test_a_misfit_begins_with_the_architecture_that_would_fit(tiny):
    with torch.device("meta"):
        model = build_transformer("SanaMS_Tiny_P1_D8", depth=7)
    start = "^the checkpoint fits SanaMS_Tiny_P1_D8"
    with pytest.raises(ValueError, match=rf"{start}, not this model: the model has no blocks\.7\..* more$"):
        load_into(model, tiny)
    state = weights(TINY, **NORMS)
    with pytest.raises(ValueError, match=rf"{start} with qk_norm=True, cross_norm=True, not this model: "):
        load_into(model, state)
    wide = weights(TINY, caption_channels=96)
    message = (
        rf"{start} with caption_channels=96, .*y_embedding is \(64, 96\), in the model \(64, 128\) and 1 more"
    )
    with pytest.raises(ValueError, match=message):
        load_into(model, wide)
    with pytest.raises(ValueError, match="^a.pth does not fit the SanaMS_X of the config: it lacks "):
        require_fit(
            model.state_dict(), {"a": torch.empty(1)}, file="a.pth", model="the SanaMS_X of the config"
        )


def test_every_name_is_told_from_the_others():
    """What is compared tells all of them apart, so that a state can fit only one."""
    marks = [(c.hidden_size, c.depth, c.patch_size, c.cfg_embed) for c in TRANSFORMERS.values()]
    assert len(set(marks)) == len(marks)
