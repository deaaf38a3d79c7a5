"""The decoder of DC-AE without the work that diffusers' modules do twice, and in strips of rows where memory is short.

The weights stay in diffusers' modules; nothing here has any of its own. The function is the same but for rounding:

- images lie in memory with their channels last, as the convolutions and the norms over channels want them;
- a 3x3 convolution behind a nearest-neighbour doubling reads each pixel up to four times. Summing the filter's taps
  that meet the same pixel leaves a 2x2 filter for each of the four pixels that one becomes: 16 products instead of 36;
- a ReLU attention is a sum over pixels, then a product with each: a pass for the sum, which needs keys and values, and
  one for the products, which needs queries;
- norm and residual are done in blocks of pixels that stay in the processor's cache, in float32, and rounded once.

Strips: everything but the sum of the attention sees a few rows around a pixel. So the coarse stages (5, 4, 3, at most an
eighth of the image's side) run block by block, each block in strips; the fine ones, whose images would be the largest,
run all together for one strip of the picture after the other. A strip is computed with the rows around it that it
depends on, which are cut off again, so that strips leave no seam.

Inference only: memory is written in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import SanaMultiscaleLinearAttention
from diffusers.models.autoencoders.autoencoder_dc import DCUpBlock2d, Decoder, EfficientViTBlock, ResBlock
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers.sana_transformer import GLUMBConv
from torch import Tensor, nn

WORKING_BYTES = 2**31
"""What a strip may take if nothing else is said: an image of 1024 x 1024 is decoded in one piece, in float32 too."""

NORM_VALUES = {"cpu": 2**18, "cuda": 2**24}
"""Values that are normalised at a time, by type of device, others as CUDA: 1 MiB in float32 on a CPU, 64 MiB elsewhere."""

DOUBLED_PIXELS = 1024
"""Of a smaller image a doubling is computed as it stands: making the filters takes longer than what they save."""

FINE_STAGES = 3
"""Stages whose images are too large to be held whole: of a quarter of the picture's side and more."""

Image = Tensor  # (B, C, H, W) with the channels last in memory


@dataclass(frozen=True, kw_only=True)
class Step:
    """A computation whose output at row `i` depends on the rows of its input within `reach` of `i / scale`."""

    run: Callable[[Image], Tensor]
    """Leaves its input as it was."""
    reach: int
    values: int
    """Values alive at once, for every pixel of the input."""
    scale: int = 1

    def margin(self, needed: int) -> int:
        """Rows of the input beside those of a strip, if the strip's output needs `needed` beside its own."""
        return -(-needed // self.scale) + self.reach


def decode(decoder: Decoder, latents: Tensor, *, max_bytes: int = WORKING_BYTES) -> Tensor:
    """What `decoder(latents)` is: (B, C, h, w), without the scale, -> pixels (B, 3, 32 h, 32 w).

    Args:
        max_bytes: about what the tensors of one strip may take. To it come the weights, the pixels, and two images of the
            finest coarse stage (at 4096 x 4096 of the published model 0.5 GiB in half precision); a strip has at least
            one row of that stage.
    """
    x = _channels_last(latents)
    hidden = decoder.conv_in(x)
    if decoder.in_shortcut:
        hidden = hidden + x.repeat_interleave(decoder.in_shortcut_repeats, dim=1)
    coarse, fine = _divide(decoder)
    for block in coarse:
        hidden = run_block(block, _channels_last(hidden), max_bytes)
    pixels = _pixels(hidden)
    steps = [*(make_step(block, pixels) for block in fine), _make_head(decoder, pixels)]
    return _run_fine(steps, _channels_last(hidden), max_bytes)


def run_block(block: nn.Module, x: Image, max_bytes: int = WORKING_BYTES) -> Image:
    """One block of a stage, in strips where it needs them; `x` is left as it was."""
    if not isinstance(block, EfficientViTBlock):
        return _in_strips(make_step(block, _pixels(x)), x, max_bytes)
    x = _attention(block.attn, x, max_bytes)
    ffn = block.conv_out
    values = 2 * ffn.conv_inverted.out_channels + 2 * ffn.conv_point.in_channels
    return _in_strips(Step(run=lambda part: _mix_ffn(ffn, part), reach=1, values=values), x, max_bytes)


def make_step(block: ResBlock | DCUpBlock2d, pixels: int) -> Step:
    """A block of convolutions, for images of at least `pixels` pixels altogether."""
    if isinstance(block, DCUpBlock2d):
        values = 2 * block.conv.in_channels + 2 * block.conv.weight.shape[0] * (4 if block.interpolate else 1)
        return Step(run=_make_doubling(block, pixels), reach=1, values=values, scale=2)
    assert isinstance(block, ResBlock), type(block)
    return Step(run=lambda x: _res_block(block, x), reach=2, values=3 * block.conv1.in_channels)


def _make_head(decoder: Decoder, pixels: int) -> Step:
    """From the last stage's image to pixels."""
    last = decoder.conv_out
    doubles = isinstance(last, DCUpBlock2d)
    conv = _make_doubling(last, pixels) if doubles else last

    def run(x: Image) -> Tensor:
        return conv(decoder.conv_act(_norm(x, decoder.norm_out, out=torch.empty_like(x))))

    channels = decoder.norm_out.weight.shape[0]
    return Step(run=run, reach=1, values=3 * channels, scale=2 if doubles else 1)


# Strips of rows


def _divide(decoder: Decoder) -> tuple[list[nn.Module], list[nn.Module]]:
    """The blocks of the coarse stages, and those of the fine ones, which see nearby rows only; each in their order."""
    stages = [list(stage) for stage in decoder.up_blocks]  # the finest first
    attending = [
        index for index, stage in enumerate(stages) if any(isinstance(b, EfficientViTBlock) for b in stage)
    ]
    cut = min([FINE_STAGES, *attending])
    return sum(reversed(stages[cut:]), []), sum(reversed(stages[:cut]), [])


def _strip_height(x: Image, max_bytes: int, values: int, margin: int) -> int:
    """Rows of `x` in a strip, where `values` values for every pixel of it and its margins take `max_bytes`; about equal ones."""
    height = x.shape[-2]
    if len(x) * height * x.shape[-1] * values * x.element_size() <= max_bytes:
        return height
    most = max(1, max_bytes // (len(x) * x.shape[-1] * values * x.element_size()) - 2 * margin)
    return -(-height // -(-height // most))


def _strips(x: Image, rows: int, margin: int) -> Iterator[tuple[int, int, int, int]]:
    """(first, top, bottom, last): rows top to bottom of an image depend on its rows first to last.

    On "meta", where nothing but sizes is of interest, the first three stand for all: no other is larger than the second.
    """
    height = x.shape[-2]
    tops = range(0, height, rows)
    for top in tops[:3] if x.is_meta else tops:
        bottom = min(top + rows, height)
        yield max(0, top - margin), top, bottom, min(bottom + margin, height)


def _in_strips(step: Step, x: Image, max_bytes: int) -> Image:
    """`step.run(x)`."""
    height, scale = x.shape[-2], step.scale
    rows = _strip_height(x, max_bytes, step.values, step.reach)
    if rows == height:
        return step.run(x)
    output = None
    for first, top, bottom, last in _strips(x, rows, step.reach):
        part = step.run(_channels_last(x[..., first:last, :]))
        if output is None:
            output = _empty_image(part, scale * height)
        output[..., scale * top : scale * bottom, :] = part[
            ..., scale * (top - first) : scale * (bottom - first), :
        ]
    return output


def _run_fine(steps: Sequence[Step], x: Image, max_bytes: int) -> Tensor:
    """All steps, one after the other, for one strip of the picture after the other."""
    margins, scale, values = [0], 1, 0
    for step in reversed(steps):
        margins.insert(0, step.margin(margins[0]))
    for step in steps:
        values = max(values, scale**2 * step.values)
        scale *= step.scale
    height = x.shape[-2]
    rows = _strip_height(x, max_bytes, values, margins[0])
    output = None
    for first, top, bottom, last in _strips(x, rows, margins[0]):
        part, start = x[..., first:last, :], first
        for step, before, after in zip(steps, margins, margins[1:], strict=False):
            part, start = step.run(_channels_last(part)), step.scale * start
            # At an edge of the picture all rows are right; at any other, those beside it saw zeros for what is there.
            spare = step.scale * before - after
            upper, lower = spare * (first > 0), spare * (last < height)
            part, start = part[..., upper : part.shape[-2] - lower, :], start + upper
        if rows == height:
            return part
        if output is None:
            output = part.new_empty(*part.shape[:2], scale * height, part.shape[-1])
        output[..., scale * top : scale * bottom, :] = part[
            ..., scale * top - start : scale * bottom - start, :
        ]
    return output


# Blocks


def _res_block(block: ResBlock, x: Image) -> Image:
    if block.norm_type != "rms_norm":
        return block(x)
    hidden = block.conv2(block.nonlinearity(block.conv1(x)))
    return _norm(hidden, block.norm, x)


def _mix_ffn(ffn: GLUMBConv, x: Image) -> Image:
    hidden = F.silu(_pointwise(x, ffn.conv_inverted), inplace=True)
    value, gate = ffn.conv_depth(hidden).chunk(2, dim=1)
    del hidden
    hidden = _pointwise(F.silu(gate).mul_(value), ffn.conv_point)
    del value, gate
    return _norm(hidden, ffn.norm, x if ffn.residual_connection else None)


def _attention(attn: SanaMultiscaleLinearAttention, x: Image, max_bytes: int) -> Image:
    """ReLU attention of every pixel to all, per head: q (k^T v) / q (k^T 1), in float32, and the residual."""
    batch, _, height, width = x.shape
    size = attn.attention_head_dim
    if height * width <= size or attn.norm_type != "rms_norm":
        return attn(x)  # for few pixels it is computed, and rounded, in another way
    reach = max((scale.proj_in.kernel_size[0] // 2 for scale in attn.to_qkv_multiscale), default=0)
    heads = attn.to_out.in_features
    rows = _strip_height(x, max_bytes, 12 * heads, reach)

    def project(which: slice) -> Iterator[tuple[slice, Tensor]]:
        """Of every strip: its rows, and q, k, v or several of them, (B, pixels, heads, which, size)."""
        weights = _project_weights(attn, which)
        for first, top, bottom, last in _strips(x, rows, reach):
            part = _multiscale(_channels_last(x[..., first:last, :]), weights, size)
            part = part[:, top - first : bottom - first].flatten(1, 2).float()
            yield slice(top, bottom), part.unflatten(2, (heads // size, -1, size))

    sums = x.new_zeros(batch, heads // size, size, size + 1, dtype=torch.float32)
    for _, part in project(slice(1, 3)):
        key, value = part.unbind(3)
        value = F.pad(value, (0, 1), value=1.0)
        sums += torch.einsum("bnhd,bnhe->bhde", key.relu(), value)
    output = _empty_image(x, height)
    for strip, part in project(slice(0, 1)):
        mixed = torch.einsum("bnhd,bhde->bnhe", part.squeeze(3).relu_(), sums)
        mixed = mixed[..., :-1] / (mixed[..., -1:] + attn.eps)
        hidden = attn.to_out(mixed.flatten(2).to(x.dtype)).view(batch, -1, width, output.shape[1])
        residual = x[..., strip, :] if attn.residual_connection else None
        _norm(hidden.permute(0, 3, 1, 2), attn.norm_out, residual, output[..., strip, :])
    return output


def _project_weights(
    attn: SanaMultiscaleLinearAttention, which: slice
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """The matrix that makes q, k, v of a pixel, and depthwise and per-head ones of each further scale, or parts of them.

    The channels of a head lie together, q before k before v; `which` of these three are taken.
    """
    size = attn.attention_head_dim

    def take(weight: Tensor) -> Tensor:
        return weight.unflatten(0, (-1, 3, size))[:, which].flatten(0, 2)

    scales = [
        (take(scale.proj_in.weight), take(scale.proj_out.weight).view(-1, size, size).mT)
        for scale in attn.to_qkv_multiscale
    ]
    return take(torch.cat([attn.to_q.weight, attn.to_k.weight, attn.to_v.weight])), scales


def _multiscale(x: Image, weights: tuple[Tensor, list[tuple[Tensor, Tensor]]], size: int) -> Tensor:
    """Projections of all scales, (B, H, W, channels), of an image."""
    matrix, scales = weights
    plain = F.linear(x.permute(0, 2, 3, 1), matrix)
    found = [plain]
    for depthwise, heads in scales:
        mixed = F.conv2d(
            plain.permute(0, 3, 1, 2), depthwise, padding=depthwise.shape[-1] // 2, groups=len(depthwise)
        )
        mixed = _channels_last(mixed).permute(0, 2, 3, 1).reshape(-1, len(heads), size).transpose(0, 1)
        found.append(torch.bmm(mixed, heads).transpose(0, 1).reshape(plain.shape))
    return torch.cat(found, dim=-1)


def _make_doubling(block: DCUpBlock2d, pixels: int) -> Callable[[Image], Image]:
    """Twice the size along both sides; beside the convolution, the channels of a pixel spread over its four."""
    repeats, channels = block.repeats, block.conv.out_channels
    nearest = block.interpolate and block.interpolation_mode == "nearest"
    if not nearest or pixels < DOUBLED_PIXELS or (block.shortcut and repeats not in (1, 2, 4)):
        return lambda x: _channels_last(block(x))
    filters, bias = _phase_filters(block.conv.weight), block.conv.bias.repeat(4)

    def run(x: Image) -> Image:
        batch, _, height, width = x.shape
        image = x.permute(0, 2, 3, 1)
        padded = _channels_last(F.pad(x, (1, 1, 1, 1)))
        # Filter (row, column) at pixel (i, j) belongs to output (2 i - row, 2 j - column): one more row and column.
        phases = F.conv2d(padded, filters, bias).permute(0, 2, 3, 1).unflatten(-1, (4, channels))
        output = x.new_empty(batch, 2 * height, 2 * width, channels)
        for index in range(4):
            row, column = divmod(index, 2)
            mixed, place = (
                phases[:, row : row + height, column : column + width, index],
                output[:, row::2, column::2],
            )
            if block.shortcut:
                # Channel o copies channel (4 o + index) // repeats of the pixel.
                torch.add(mixed, image[..., index // repeats :: 4 // repeats], out=place)
            else:
                place.copy_(mixed)
        return output.permute(0, 3, 1, 2)

    return run


def _phase_filters(weight: Tensor) -> Tensor:
    """(O, I, 3, 3) behind a nearest-neighbour doubling -> (4 O, I, 2, 2) before it, for outputs (0, 0), (0, 1), (1, 0), (1, 1).

    Along an axis, output 2 i sees inputs i - 1, i, i, and output 2 i + 1 inputs i, i, i + 1.
    """

    def merge(taps: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        return (taps[0], taps[1] + taps[2]), (taps[0] + taps[1], taps[2])

    channels, inputs = weight.shape[:2]
    filters = weight.new_empty(2, 2, channels, 2, 2, inputs)
    for row, above in enumerate(merge(weight.permute(2, 3, 0, 1).float().contiguous())):
        for i, taps in enumerate(above):
            for column, beside in enumerate(merge(taps)):
                for j, tap in enumerate(beside):
                    filters[row, column, :, i, j] = tap
    return filters.flatten(0, 2).permute(0, 3, 1, 2)


def _pointwise(x: Image, conv: nn.Conv2d) -> Image:
    """A 1x1 convolution as a matrix product."""
    return F.linear(x.permute(0, 2, 3, 1), conv.weight.flatten(1), conv.bias).permute(0, 3, 1, 2)


def _norm(x: Image, norm: RMSNorm, residual: Image | None = None, out: Image | None = None) -> Image:
    """RMS norm over the channels of `x`, plus `residual`, written to `out` (None: over `x`); all (B, C, H, W)."""
    x = _channels_last(x)
    out, residual = x if out is None else out, None if residual is None else _channels_last(residual)
    channels = x.shape[1]
    weight, bias = norm.weight.float(), None if norm.bias is None else norm.bias.float()
    count = max(1, NORM_VALUES.get(x.device.type, NORM_VALUES["cuda"]) // channels)
    for index in range(len(x)):
        pixels, target, added = (
            None if image is None else image[index].permute(1, 2, 0).view(-1, channels)
            for image in (x, out, residual)
        )
        for start in range(0, len(pixels), count):
            part = slice(start, start + count)
            narrow = pixels[part]
            wide = narrow.float()  # itself, if it is float32
            mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(channels)
            scale = mean_square.add_(norm.eps).rsqrt_()
            wide = wide * scale if wide is narrow else wide.mul_(scale)
            wide.mul_(weight)
            if bias is not None:
                wide.add_(bias)
            if added is not None:
                wide.add_(added[part])
            target[part].copy_(wide)
    return out


def _pixels(x: Image) -> int:
    return len(x) * x.shape[-2] * x.shape[-1]


def _channels_last(x: Tensor) -> Image:
    return x.contiguous(memory_format=torch.channels_last)


def _empty_image(like: Image, height: int) -> Image:
    return torch.empty(
        *like.shape[:2],
        height,
        like.shape[-1],
        dtype=like.dtype,
        device=like.device,
        memory_format=torch.channels_last,
    )
