"""The 0.6B transformer at its real size, from a file as it is released, against diffusers' model. Needs 6 GB of memory."""

import gc

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import SanaTransformer2DModel

from sana.models.state_dict import load_into, load_transformer_state, to_diffusers
from sana.models.zoo import build_transformer
from tests.models.twin import make_generic
from tests.numerics import assert_close

BOUND = 3e-6  # relative RMS in float32; measured: 8e-7
PARAMETERS = 590_000_000  # at least; the file holds four bytes of each

# The config of the released diffusers folder (Sana_600M_512px_diffusers).
DIFFUSERS = dict(
    in_channels=32,
    out_channels=32,
    num_attention_heads=36,
    attention_head_dim=32,
    num_layers=28,
    num_cross_attention_heads=16,
    cross_attention_head_dim=72,
    cross_attention_dim=1152,
    caption_channels=2304,
    mlp_ratio=2.5,
    sample_size=16,
    patch_size=1,
)


@pytest.fixture
def inputs():
    """One prompt of 300 tokens, 120 of them valid, at 512 pixels."""
    generator = torch.Generator().manual_seed(1)
    return {
        "latents": torch.randn(1, 32, 16, 16, generator=generator),
        "timestep": torch.tensor([421.0]),
        "text_embeds": 2 * torch.randn(1, 300, 2304, generator=generator),
        "text_mask": torch.arange(300)[None] < 120,
    }


@pytest.mark.slow
def test_a_released_file_of_full_size_computes_what_diffusers_computes(tmp_path, inputs):
    path = tmp_path / "Sana_600M_512px.pth"
    try:
        model = make_generic(build_transformer("SanaMS_600M_P1_D28")).eval()
        torch.save({"state_dict": model.state_dict() | {"pos_embed": torch.zeros(1, 256, 1152)}}, path)
        assert path.stat().st_size > 4 * PARAMETERS
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.fill_(torch.nan)  # whatever the load leaves out is seen
        load_into(model, load_transformer_state(path))
        with torch.no_grad():
            velocity = model(**inputs)
        del model
        gc.collect()  # the twin takes its place: both at once, with the state, do not fit in 6 GB
        state = to_diffusers(load_transformer_state(path))
    finally:
        path.unlink(missing_ok=True)  # 2.4 GB, and pytest keeps the folders of three runs

    with init_empty_weights(include_buffers=False):
        twin = SanaTransformer2DModel(**DIFFUSERS)
    twin.load_state_dict(state, strict=True, assign=True)
    with torch.no_grad():
        reference = twin.eval()(
            inputs["latents"],
            encoder_hidden_states=inputs["text_embeds"],
            timestep=inputs["timestep"],
            encoder_attention_mask=inputs["text_mask"].float(),
            return_dict=False,
        )[0]
    assert velocity.shape == (1, 32, 16, 16)
    assert_close("velocity", velocity, reference, rel_rms=BOUND)
