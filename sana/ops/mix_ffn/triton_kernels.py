"""The middle of the Mix-FFN in Triton, channels last: one pass forward, two backward, deterministic.

A program walks down the rows of a strip of COLUMNS pixels by CHANNELS channels. An input row adds to the three output rows
around it, whose float32 sums move along (prev, cur, next), so that each value is loaded for three columns, not nine taps;
the rows ahead are on their way into shared memory meanwhile (STAGES). With SILU the input is the output of the 1x1 convolution and its SiLU is
taken here, three times each; FAST takes it by one instruction (tanh, relative error 5e-4) for bfloat16 on NVIDIA GPUs,
where the usual two would be slower than memory.

Backward, dc being the gradient of the convolution's output: pass 1 computes the convolution again and writes dc; pass 2 turns
dc into dx, dweight and dbias.
"""

import torch
import triton
import triton.language as tl

from sana.ops._backend import interpreted
from sana.ops._launch import ceil_div, on_device

COLUMNS, CHANNELS, WARPS, STAGES = 8, 64, 4, 4
ROWS = 8
"""The fewest rows of a strip, where the image has as many: two more are read."""
PROGRAMS = 1056
"""Programs that fill a large GPU: eight for each of the 132 multiprocessors of an H100 or H200."""


@triton.jit
def _sigmoid(x, FAST: tl.constexpr):
    if FAST:
        half = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [0.5 * x], dtype=tl.float32, is_pure=True, pack=1
        )
        return 0.5 * half + 0.5
    else:
        return tl.sigmoid(x)


@triton.jit
def _active(tile, SILU: tl.constexpr, FAST: tl.constexpr):
    """The convolution's input in float32."""
    tile = tile.to(tl.float32)
    return tile * _sigmoid(tile, FAST) if SILU else tile


@triton.jit
def _load_pixels(image, row, columns, channels, height, width, total, stop):
    """(COLUMNS, CHANNELS) of one row of an image (height, width, total); zero outside it and beyond `stop`."""
    mask = (row >= 0) & (row < height) & (columns >= 0) & (columns < width)
    mask = mask[:, None] & (channels < stop)[None, :]
    return tl.load(image + (row * width + columns)[:, None] * total + channels[None, :], mask=mask, other=0.0)


@triton.jit
def _load_three(image, row, columns, channels, height, width, total, stop):
    """The pixels to the left, in place and to the right."""
    left = _load_pixels(image, row, columns - 1, channels, height, width, total, stop)
    centre = _load_pixels(image, row, columns, channels, height, width, total, stop)
    right = _load_pixels(image, row, columns + 1, channels, height, width, total, stop)
    return left, centre, right


@triton.jit
def _load_tap(weight, tap: tl.constexpr, channels, stop):
    """One tap of the filters, (1, CHANNELS)."""
    return tl.load(weight + channels * 9 + tap, mask=channels < stop, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _load_filters(weight, channels, stop):
    """The nine taps, row by row."""
    return (
        _load_tap(weight, 0, channels, stop),
        _load_tap(weight, 1, channels, stop),
        _load_tap(weight, 2, channels, stop),
        _load_tap(weight, 3, channels, stop),
        _load_tap(weight, 4, channels, stop),
        _load_tap(weight, 5, channels, stop),
        _load_tap(weight, 6, channels, stop),
        _load_tap(weight, 7, channels, stop),
        _load_tap(weight, 8, channels, stop),
    )


@triton.jit
def _add_row(a, b, c, taps, base, prev, cur):
    """Add an input row to the output rows around it: the finished one, and the two that still grow."""
    done = prev + (a * taps[6] + b * taps[7] + c * taps[8])
    prev = cur + (a * taps[3] + b * taps[4] + c * taps[5])
    return done, prev, base + (a * taps[0] + b * taps[1] + c * taps[2])


@triton.jit
def _half_row(
    image, taps, base, row, prev, cur, columns, channels, height, width, total, stop,
    SILU: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """`_add_row` of input row `row`."""
    a, b, c = _load_three(image, row, columns, channels, height, width, total, stop)
    a, b, c = _active(a, SILU, FAST), _active(b, SILU, FAST), _active(c, SILU, FAST)
    return _add_row(a, b, c, taps, base, prev, cur)


@triton.jit
def depthwise_glu_kernel(
    x, weight, bias, grad, out, height, width, inner, strips, rows,
    COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, SILU: tl.constexpr, FAST: tl.constexpr, BACKWARD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y of one strip or, with BACKWARD, dc. Grid: (channel tiles of F, columns, B x strips)."""
    batch = (tl.program_id(2) // strips).to(tl.int64)
    first = (tl.program_id(2) % strips) * rows
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    values = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    gates = values + inner
    total = 2 * inner
    x += batch * height * width * total
    value_bias = tl.load(bias + values, mask=values < inner, other=0.0).to(tl.float32)[None, :]
    gate_bias = tl.load(bias + gates, mask=gates < total, other=0.0).to(tl.float32)[None, :]
    value_taps = _load_filters(weight, values, inner)
    gate_taps = _load_filters(weight, gates, total)
    v_prev = tl.zeros((COLUMNS, CHANNELS), tl.float32)
    v_cur = v_prev
    g_prev = v_prev
    g_cur = v_prev
    last = tl.minimum(first + rows, height)
    for row in tl.range(first - 1, last + 1, num_stages=STAGES):
        value, v_prev, v_cur = _half_row(
            x, value_taps, value_bias, row, v_prev, v_cur, columns, values, height, width, total, inner, SILU, FAST,
        )  # fmt: skip
        gate, g_prev, g_cur = _half_row(
            x, gate_taps, gate_bias, row, g_prev, g_cur, columns, gates, height, width, total, total, SILU, FAST,
        )  # fmt: skip
        pixels = ((row - 1) * width + columns)[:, None]
        mask = ((row > first) & (columns < width))[:, None] & (values < inner)[None, :]
        sigmoid = _sigmoid(gate, FAST)
        if BACKWARD:
            source = grad + batch * height * width * inner + pixels * inner + values[None, :]
            dy = tl.load(source, mask=mask, other=0.0).to(tl.float32)
            target = out + batch * height * width * total + pixels * total + values[None, :]
            tl.store(target, (dy * gate * sigmoid).to(out.dtype.element_ty), mask=mask)
            slope = sigmoid * (1.0 + gate * (1.0 - sigmoid))
            tl.store(target + inner, (dy * value * slope).to(out.dtype.element_ty), mask=mask)
        else:
            target = out + batch * height * width * inner + pixels * inner + values[None, :]
            tl.store(target, (value * gate * sigmoid).to(out.dtype.element_ty), mask=mask)


@triton.jit
def depthwise_gradient_kernel(
    x, weight, dc, dx, partial, height, width, total, strips, rows,
    COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, SILU: tl.constexpr, FAST: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dx of some rows, and their share of dweight (9 rows) and dbias (1). Grid: (channel tiles of 2F, B x strips)."""
    batch = (tl.program_id(1) // strips).to(tl.int64)
    first = (tl.program_id(1) % strips) * rows
    last = tl.minimum(first + rows, height)
    channels = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    x += batch * height * width * total
    dc += batch * height * width * total
    dx += batch * height * width * total
    taps = _load_filters(weight, channels, total)
    zero = tl.zeros((COLUMNS, CHANNELS), tl.float32)
    dl0, dc0, dr0, dl1, dc1 = zero, zero, zero, zero, zero
    dr1, dl2, dc2, dr2, dbias = zero, zero, zero, zero, zero
    for left in range(0, width, COLUMNS):
        columns = left + tl.arange(0, COLUMNS)
        # Input rows: prev = row - 1, cur = row, next = row + 1, those of other strips zero.
        prev = _load_pixels(x, -1, columns, channels, height, width, total, total)
        cur = prev
        s_prev, s_cur, sum_prev, sum_cur = zero, zero, zero, zero
        for row in tl.range(first - 1, last + 1, num_stages=STAGES):
            inside = tl.where(row + 1 < last, row + 1, -1)
            following = _load_pixels(x, inside, columns, channels, height, width, total, total)
            a, b, c = _load_three(dc, row, columns, channels, height, width, total, total)
            a, b, c = a.to(tl.float32), b.to(tl.float32), c.to(tl.float32)
            s_next = _active(following, SILU, FAST)
            # dc of row r came from input row r + d by tap d, and from column j + e by tap e.
            result = sum_prev + (c * taps[0] + b * taps[1] + a * taps[2])
            sum_prev = sum_cur + (c * taps[3] + b * taps[4] + a * taps[5])
            sum_cur = c * taps[6] + b * taps[7] + a * taps[8]
            dl0, dc0, dr0 = dl0 + c * s_prev, dc0 + b * s_prev, dr0 + a * s_prev
            dl1, dc1, dr1 = dl1 + c * s_cur, dc1 + b * s_cur, dr1 + a * s_cur
            dl2, dc2, dr2 = dl2 + c * s_next, dc2 + b * s_next, dr2 + a * s_next
            dbias += tl.where((row >= first) & (row < last), b, 0.0)
            if SILU:
                wide = prev.to(tl.float32)
                sigmoid = _sigmoid(wide, FAST)
                result *= sigmoid * (1.0 + wide * (1.0 - sigmoid))
            mask = ((row > first) & (columns < width))[:, None] & (channels < total)[None, :]
            target = dx + ((row - 1) * width + columns)[:, None] * total + channels[None, :]
            tl.store(target, result.to(dx.dtype.element_ty), mask=mask)
            prev, cur, s_prev, s_cur = cur, following, s_cur, s_next
    mask = channels < total
    partial += tl.program_id(1).to(tl.int64) * 10 * total + channels
    tl.store(partial, tl.sum(dl0, 0), mask=mask)
    tl.store(partial + total, tl.sum(dc0, 0), mask=mask)
    tl.store(partial + 2 * total, tl.sum(dr0, 0), mask=mask)
    tl.store(partial + 3 * total, tl.sum(dl1, 0), mask=mask)
    tl.store(partial + 4 * total, tl.sum(dc1, 0), mask=mask)
    tl.store(partial + 5 * total, tl.sum(dr1, 0), mask=mask)
    tl.store(partial + 6 * total, tl.sum(dl2, 0), mask=mask)
    tl.store(partial + 7 * total, tl.sum(dc2, 0), mask=mask)
    tl.store(partial + 8 * total, tl.sum(dr2, 0), mask=mask)
    tl.store(partial + 9 * total, tl.sum(dbias, 0), mask=mask)


def strips_of(height: int, others: int) -> tuple[int, int]:
    """(strips of an image, rows in each), so that strips x `others` programs fill a GPU."""
    rows = min(height, max(ROWS, ceil_div(height * others, PROGRAMS)))
    return ceil_div(height, rows), rows


def _fast(x: torch.Tensor) -> bool:
    return x.dtype == torch.bfloat16 and not interpreted() and torch.version.hip is None


def forward(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, silu: bool) -> torch.Tensor:
    """x: (B, h, w, 2F) -> y (B, h, w, F)."""
    x = x.contiguous()
    out = torch.empty((*x.shape[:3], x.shape[3] // 2), dtype=x.dtype, device=x.device)
    _launch_glu(x, weight, bias, out, out, silu=silu, backward=False)
    return out


def _launch_glu(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, grad: torch.Tensor, out: torch.Tensor, *,
    silu: bool, backward: bool,
) -> None:  # fmt: skip
    batch, height, width, total = x.shape
    tiles = ceil_div(total // 2, CHANNELS), ceil_div(width, COLUMNS)
    strips, rows = strips_of(height, tiles[0] * tiles[1] * batch)
    with on_device(x):
        depthwise_glu_kernel[(*tiles, batch * strips)](
            *(x, weight.contiguous(), bias.contiguous(), grad, out, height, width, total // 2, strips, rows),
            COLUMNS=COLUMNS,
            CHANNELS=CHANNELS,
            SILU=silu,
            FAST=_fast(x),
            STAGES=STAGES,
            BACKWARD=backward,
            num_warps=WARPS,
        )


def backward(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, grad: torch.Tensor, silu: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """grad: (B, h, w, F), of y -> dx, and in float32 dweight (2F, 1, 3, 3) and dbias (2F,)."""
    x, weight, grad = x.contiguous(), weight.contiguous(), grad.contiguous()
    batch, height, width, total = x.shape
    dc, dx = torch.empty_like(x), torch.empty_like(x)
    _launch_glu(x, weight, bias, grad, dc, silu=silu, backward=True)
    tiles = ceil_div(total, CHANNELS)
    strips, rows = strips_of(height, tiles * batch)
    partial = torch.empty((batch * strips, 10, total), dtype=torch.float32, device=x.device)
    with on_device(x):
        depthwise_gradient_kernel[(tiles, batch * strips)](
            *(x, weight, dc, dx, partial, height, width, total, strips, rows),
            COLUMNS=COLUMNS,
            CHANNELS=CHANNELS,
            SILU=silu,
            FAST=_fast(x),
            STAGES=STAGES,
            num_warps=WARPS,
        )
    sums = partial.sum(0)
    return dx, sums[:9].t().reshape(weight.shape), sums[9].clone()
