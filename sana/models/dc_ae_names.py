"""The DC-AE of its authors' releases: their tensor names to those of diffusers' `AutoencoderDC`, and its arguments.

The published 1.0, 1.1 and Lite name their tensors after nested containers ("decoder.stages.1.op_list.0.main...");
their config.json holds little more than a name, so the layout is read off the tensors.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

State = Mapping[str, torch.Tensor]

SCALING_FACTOR = 0.41407
"""Of every published DC-AE for Sana; their config.json does not hold it."""

_STAGE = re.compile(r"(encoder|decoder)\.stages\.(\d+)\.op_list\.(\d+)\.(.+)")
_STAGES = {"encoder": "encoder.down_blocks", "decoder": "decoder.up_blocks"}
# Modules before and after the stages. An end that also changes the resolution has one more "conv" on both sides.
_ENDS = {
    "encoder.project_in.conv": "encoder.conv_in",
    "encoder.project_in.conv.conv": "encoder.conv_in.conv",
    "encoder.project_out.main.op_list.0.conv": "encoder.conv_out",
    "decoder.project_in.main.conv": "decoder.conv_in",
    "decoder.project_out.op_list.0": "decoder.norm_out",
    "decoder.project_out.op_list.2.conv": "decoder.conv_out",
    "decoder.project_out.op_list.2.conv.conv": "decoder.conv_out.conv",
}
_QKV = "context_module.main.qkv.conv"
# Modules of one operation of a stage; "main" is what the residual is added to.
_OPERATIONS = {
    # ResBlock
    "main.conv1.conv": "conv1",
    "main.conv2.conv": "conv2",
    "main.conv2.norm": "norm",
    # halving (a strided convolution) and doubling (a convolution behind or before a rearrangement)
    "main.conv": "conv",
    "main.conv.conv": "conv",
    # EfficientViT block: attention, then Mix-FFN
    _QKV: "attn",
    "context_module.main.aggreg.0.0": "attn.to_qkv_multiscale.0.proj_in",
    "context_module.main.aggreg.0.1": "attn.to_qkv_multiscale.0.proj_out",
    "context_module.main.proj.conv": "attn.to_out",
    "context_module.main.proj.norm": "attn.norm_out",
    "local_module.main.inverted_conv.conv": "conv_out.conv_inverted",
    "local_module.main.depth_conv.conv": "conv_out.conv_depth",
    "local_module.main.point_conv.conv": "conv_out.conv_point",
    "local_module.main.point_conv.norm": "conv_out.norm",
}


def is_native(names: Iterable[str]) -> bool:
    """Whether tensors have the names of the authors' releases."""
    return any(name.startswith(("encoder.stages.", "decoder.stages.")) for name in names)


def from_native(state: State) -> dict[str, torch.Tensor]:
    """Rename to `AutoencoderDC`, bit for bit. The rows of a fused matrix are divided, 1 x 1 kernels become matrices.

    Raises:
        ValueError: a name that no published DC-AE for Sana has.
    """
    renamed: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        native, _, leaf = key.rpartition(".")
        found = _STAGE.fullmatch(native)
        module = (_OPERATIONS if found else _ENDS).get(found[4] if found else native)
        if module is None:
            raise ValueError(f"no published DC-AE for Sana has a tensor {key!r}")
        if found:
            module = f"{_STAGES[found[1]]}.{found[2]}.{found[3]}.{module}"
        if native.endswith(_QKV):
            # diffusers joins the thirds again before it takes the heads apart, so they need not be q, k and v.
            for part, rows in zip("qkv", value.flatten(1).chunk(3), strict=True):
                renamed[f"{module}.to_{part}.{leaf}"] = rows.clone()
        else:
            renamed[f"{module}.{leaf}"] = value.flatten(1) if module.endswith("attn.to_out") else value
    return renamed


def layout(state: State) -> dict[str, Any]:
    """The arguments of `AutoencoderDC` for a state that `from_native` returned, but for the `scaling_factor`.

    Raises:
        ValueError: layers are missing.
    """
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    try:
        encoder, decoder = _stages(shapes, "encoder.down_blocks"), _stages(shapes, "decoder.up_blocks")
        strided = (
            shapes[f"encoder.down_blocks.0.{encoder['layers'][0]}.conv.weight"][0] == encoder["widths"][1]
        )
        interpolated = shapes["decoder.up_blocks.1.0.conv.weight"][0] == decoder["widths"][1]
        latent_channels = shapes["encoder.conv_out.weight"][0]
    except LookupError as error:
        raise ValueError(f"no complete DC-AE for Sana (1.0, 1.1 or Lite): nothing at {error}") from error
    attention = [shape[1] for key, shape in shapes.items() if key.endswith("multiscale.0.proj_out.weight")]
    sides = {"encoder": encoder, "decoder": decoder}
    names = {
        "widths": "block_out_channels",
        "layers": "layers_per_block",
        "types": "block_types",
        "scales": "qkv_multiscales",
    }
    return {
        **{f"{side}_{name}": found[key] for side, found in sides.items() for key, name in names.items()},
        "latent_channels": latent_channels,
        "attention_head_dim": attention[0] if attention else 32,
        "downsample_block_type": "Conv" if strided else "pixel_unshuffle",
        "upsample_block_type": "interpolate" if interpolated else "pixel_shuffle",
        # No tensor tells the last activation: of the published ones the Lite decoder, which alone has no attention, has SiLU.
        "decoder_conv_act_fn": "relu" if "EfficientViTBlock" in decoder["types"] else "silu",
    }


def _stages(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> dict[str, tuple]:
    """Width, number of blocks, type of block and attention kernels of every stage below `prefix`."""
    count = 1 + max((int(key.split(".")[2]) for key in shapes if key.startswith(prefix)), default=-1)
    found: dict[str, list] = {"widths": [], "layers": [], "types": [], "scales": []}
    for stage in reversed(range(count)):
        inside = {key: shape for key, shape in shapes.items() if key.startswith(f"{prefix}.{stage}.")}
        plain = [shape[0] for key, shape in inside.items() if key.endswith(".conv2.weight")]
        attending = [shape[0] for key, shape in inside.items() if key.endswith(".attn.to_out.weight")]
        kernels = {shape[-1] for key, shape in inside.items() if key.endswith("multiscale.0.proj_in.weight")}
        # A stage without blocks has no tensors; its width is not used, and half the next one's in the published models.
        found["widths"].append([*plain, *attending, *([] if inside else [found["widths"][-1] // 2])][0])
        found["layers"].append(len(plain) + len(attending))
        found["types"].append("EfficientViTBlock" if attending else "ResBlock")
        found["scales"].append(tuple(sorted(kernels)))
    return {key: tuple(reversed(values)) for key, values in found.items()}
