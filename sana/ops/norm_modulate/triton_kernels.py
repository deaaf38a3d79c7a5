"""LayerNorm and modulation in Triton: one row of a token in registers; statistics in float32, recomputed backward."""

import torch
import triton
import triton.language as tl

from sana.ops._launch import on_device, pieces, row_block, unit_stride

BACKWARD_ROWS = 8
"""The fewest rows that a program of the backward pass sums over."""


@triton.jit
def _normalised(x, mask, width, eps):
    """(x - mean) / sqrt(var + eps) and that factor, zero outside the mask."""
    centred = tl.where(mask, x - tl.sum(x, 0) / width, 0.0)
    factor = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / width + eps)
    return centred * factor, factor


@triton.jit
def forward_kernel(
    x, shift, scale, out, x_b, x_n, shift_b, scale_b, tokens, width, eps, BLOCK: tl.constexpr
):  # fmt: skip
    """One row. Grid: (N, B)."""
    token, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < width
    row = tl.load(x + batch * x_b + token * x_n + columns, mask=mask, other=0.0).to(tl.float32)
    factor = 1.0 + tl.load(scale + batch * scale_b + columns, mask=mask, other=0.0).to(tl.float32)
    offset = tl.load(shift + batch * shift_b + columns, mask=mask, other=0.0).to(tl.float32)
    normed, _ = _normalised(row, mask, width, eps)
    target = out + (batch * tokens + token) * width + columns
    tl.store(target, (normed * factor + offset).to(out.dtype.element_ty), mask=mask)


@triton.jit
def backward_kernel(
    x, scale, grad, dx, partial, x_b, x_n, scale_b, g_b, g_n, tokens, width, chunk, eps, BLOCK: tl.constexpr
):  # fmt: skip
    """dx of one chunk of rows, and its share of dshift and dscale. Grid: (chunks, B)."""
    piece, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < width
    factor = 1.0 + tl.load(scale + batch * scale_b + columns, mask=mask, other=0.0).to(tl.float32)
    dshift = tl.zeros((BLOCK,), tl.float32)
    dscale = tl.zeros((BLOCK,), tl.float32)
    for token in range(piece * chunk, tl.minimum(piece * chunk + chunk, tokens)):
        row = tl.load(x + batch * x_b + token * x_n + columns, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(grad + batch * g_b + token * g_n + columns, mask=mask, other=0.0).to(tl.float32)
        normed, inverse = _normalised(row, mask, width, eps)
        dshift += dy
        dscale += dy * normed
        scaled = dy * factor
        result = scaled - tl.sum(scaled, 0) / width - normed * (tl.sum(scaled * normed, 0) / width)
        target = dx + (batch * tokens + token) * width + columns
        tl.store(target, (result * inverse).to(dx.dtype.element_ty), mask=mask)
    target = partial + (batch * tl.num_programs(0) + piece) * 2 * width + columns
    tl.store(target, dshift, mask=mask)
    tl.store(target + width, dscale, mask=mask)


def forward(
    x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, eps: float, dtype: torch.dtype
) -> torch.Tensor:
    """x: (B, N, D); shift, scale: (B, 1, D) -> (B, N, D) of the given dtype."""
    x, shift, scale = map(unit_stride, (x, shift, scale))
    batch, tokens, width = x.shape
    out = torch.empty((batch, tokens, width), dtype=dtype, device=x.device)
    block, warps = row_block(width)
    with on_device(x):
        forward_kernel[(tokens, batch)](
            *(x, shift, scale, out, *x.stride()[:2], shift.stride(0), scale.stride(0), tokens, width, eps),
            BLOCK=block,
            num_warps=warps,
        )
    return out


def backward(
    x: torch.Tensor, scale: torch.Tensor, grad: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """dx (B, N, D), and dshift and dscale as one (B, 2, D) in float32."""
    x, scale, grad = map(unit_stride, (x, scale, grad))
    batch, tokens, width = x.shape
    chunks, chunk = pieces(tokens, batch, multiple=BACKWARD_ROWS)
    dx = torch.empty((batch, tokens, width), dtype=x.dtype, device=x.device)
    partial = torch.empty((batch, chunks, 2, width), dtype=torch.float32, device=x.device)
    block, warps = row_block(width)
    with on_device(x):
        backward_kernel[(chunks, batch)](
            *(x, scale, grad, dx, partial, *x.stride()[:2], scale.stride(0), *grad.stride()[:2]),
            *(tokens, width, chunk, eps),
            BLOCK=block,
            num_warps=warps,
        )
    return dx, partial.sum(1)
