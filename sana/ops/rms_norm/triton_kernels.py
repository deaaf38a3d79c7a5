"""RMS norm in Triton: one row in registers; statistics in float32, recomputed backward."""

import torch
import triton
import triton.language as tl

from sana.ops._launch import on_device, pieces, row_block, unit_stride

BACKWARD_ROWS = 8
"""The fewest rows that a program of the backward pass sums over."""


@triton.jit
def forward_kernel(x, weight, out, x_row, width, eps, BLOCK: tl.constexpr):
    """One row. Grid: (rows,)."""
    index = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < width
    row = tl.load(x + index * x_row + columns, mask=mask, other=0.0).to(tl.float32)
    factor = tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
    inverse = 1.0 / tl.sqrt(tl.sum(row * row, 0) / width + eps)
    tl.store(out + index * width + columns, (row * inverse * factor).to(out.dtype.element_ty), mask=mask)


@triton.jit
def backward_kernel(
    x, weight, grad, dx, partial, x_row, g_row, rows, width, chunk, eps, BLOCK: tl.constexpr
):  # fmt: skip
    """dx of one chunk of rows, and its share of dweight. Grid: (chunks,)."""
    piece = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < width
    factor = tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK,), tl.float32)
    for index in range(piece * chunk, tl.minimum(piece * chunk + chunk, rows)):
        row = tl.load(x + index * x_row + columns, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(grad + index * g_row + columns, mask=mask, other=0.0).to(tl.float32)
        inverse = 1.0 / tl.sqrt(tl.sum(row * row, 0) / width + eps)
        normed = row * inverse
        dweight += dy * normed
        scaled = dy * factor
        result = (scaled - normed * (tl.sum(scaled * normed, 0) / width)) * inverse
        tl.store(dx + index * width + columns, result.to(dx.dtype.element_ty), mask=mask)
    tl.store(partial + piece * width + columns, dweight, mask=mask)


def forward(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x: (rows, D); weight: (D,) -> (rows, D) in the dtype of x."""
    x = unit_stride(x)
    rows, width = x.shape
    out = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    block, warps = row_block(width)
    with on_device(x):
        forward_kernel[(rows,)](
            x, weight.contiguous(), out, x.stride(0), width, eps, BLOCK=block, num_warps=warps
        )
    return out


def backward(
    x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """dx (rows, D), and dweight (D,) in float32."""
    x, grad = unit_stride(x), unit_stride(grad)
    rows, width = x.shape
    chunks, chunk = pieces(rows, 1, multiple=BACKWARD_ROWS)
    dx = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    partial = torch.empty((chunks, width), dtype=torch.float32, device=x.device)
    block, warps = row_block(width)
    with on_device(x):
        backward_kernel[(chunks,)](
            *(x, weight.contiguous(), grad, dx, partial, x.stride(0), grad.stride(0)),
            *(rows, width, chunk, eps),
            BLOCK=block,
            num_warps=warps,
        )
    return dx, partial.sum(0)
