"""A DC-AE as its authors release it: diffusers' network with random weights, renamed by rules of our own.

The rules undo, one by one, the published substitutions from the authors' names to those of diffusers.
"""

import json
import re
from pathlib import Path

import torch
from diffusers import AutoencoderDC
from safetensors.torch import save_file

from tests.models.twin import make_generic

# The arguments of the published networks; "lite" has another decoder.
FULL = dict(
    encoder_block_types=("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
    decoder_block_types=("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
    encoder_block_out_channels=(128, 256, 512, 512, 1024, 1024),
    decoder_block_out_channels=(128, 256, 512, 512, 1024, 1024),
    encoder_layers_per_block=(2, 2, 2, 3, 3, 3),
    decoder_layers_per_block=(3, 3, 3, 3, 3, 3),
    encoder_qkv_multiscales=((), (), (), (5,), (5,), (5,)),
    decoder_qkv_multiscales=((), (), (), (5,), (5,), (5,)),
    downsample_block_type="Conv",
    upsample_block_type="interpolate",
    decoder_conv_act_fn="relu",
    attention_head_dim=32,
    latent_channels=32,
)
LITE = FULL | dict(
    decoder_block_types=("ResBlock",) * 6,
    decoder_layers_per_block=(0, 3, 5, 4, 4, 4),
    decoder_qkv_multiscales=((),) * 6,
    upsample_block_type="pixel_shuffle",
    decoder_conv_act_fn="silu",
)
LAYOUTS = {"1.0": FULL, "lite": LITE}

_RULES = (
    (r"^encoder\.conv_in\.", "encoder.project_in.conv."),
    (r"^encoder\.conv_out\.", "encoder.project_out.main.op_list.0.conv."),
    (r"^decoder\.conv_in\.", "decoder.project_in.main.conv."),
    (r"^decoder\.norm_out\.", "decoder.project_out.op_list.0."),
    (r"^decoder\.conv_out\.", "decoder.project_out.op_list.2.conv."),
    (r"^(encoder)\.down_blocks\.(\d)\.(\d)\.", r"\1.stages.\2.op_list.\3."),
    (r"^(decoder)\.up_blocks\.(\d)\.(\d)\.", r"\1.stages.\2.op_list.\3."),
    (r"attn\.to_qkv_multiscale\.0\.proj_in\.", "context_module.main.aggreg.0.0."),
    (r"attn\.to_qkv_multiscale\.0\.proj_out\.", "context_module.main.aggreg.0.1."),
    (r"attn\.to_qkv\.", "context_module.main.qkv.conv."),
    (r"attn\.to_out\.", "context_module.main.proj.conv."),
    (r"attn\.norm_out\.", "context_module.main.proj.norm."),
    (r"(op_list\.\d)\.conv_out\.conv_(inverted|depth|point)\.", r"\1.local_module.main.\2_conv.conv."),
    (r"(op_list\.\d)\.conv_out\.norm\.", r"\1.local_module.main.point_conv.norm."),
    (r"(op_list\.\d)\.conv([12])\.", r"\1.main.conv\2.conv."),
    (r"(op_list\.\d)\.norm\.", r"\1.main.conv2.norm."),
    (r"^(encoder\.stages\.\d\.op_list\.\d)\.conv\.", r"\1.main.conv."),
    (r"^(decoder\.stages\.\d\.op_list\.\d)\.conv\.", r"\1.main.conv.conv."),
)


def small(layout: dict) -> dict:
    """The same structure, as narrow as it can be; two attention heads in the middle and four at the bottom."""
    widths = (8, 8, 16, 16, 32, 32)
    narrow = dict(encoder_block_out_channels=widths, decoder_block_out_channels=widths)
    return layout | narrow | dict(attention_head_dim=8, latent_channels=16)


def build_published(layout: dict) -> AutoencoderDC:
    """diffusers' network with generic weights; like ours without gradients, which change how convolutions are computed."""
    return make_generic(AutoencoderDC(**layout, scaling_factor=0.41407)).eval().requires_grad_(False)


def native_state(model: AutoencoderDC) -> dict[str, torch.Tensor]:
    """The weights of `model` under the authors' names, in their shapes."""
    state = model.state_dict()
    for key in [key for key in state if key.endswith(".to_q.weight")]:
        parts = [state.pop(key.replace("to_q", f"to_{part}")) for part in "qkv"]
        state[key.replace("to_q", "to_qkv")] = torch.cat(parts)[:, :, None, None]
    renamed = {}
    for key, value in state.items():
        name = key
        for pattern, replacement in _RULES:
            name = re.sub(pattern, replacement, name)
        renamed[name] = value[:, :, None, None] if key.endswith(".to_out.weight") else value
    return renamed


def write_native(folder: Path, state: dict[str, torch.Tensor], **config: object) -> Path:
    """A released folder: weights, and a config that says little."""
    folder.mkdir(parents=True)
    save_file({name: value.contiguous() for name, value in state.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_name": "dc-ae-f32c32-sana-1.0"} | config))
    return folder
