"""Gated residual in Triton: x and the branch read once, y written once."""

import torch
import triton
import triton.language as tl

from sana.ops._launch import on_device, pieces, row_block, unit_stride

BACKWARD_ROWS = 8
"""The fewest rows that a program of the backward pass sums over."""


@triton.jit
def forward_kernel(
    x, gate, branch, out, x_b, x_n, gate_b, br_b, br_n, tokens, width, BLOCK: tl.constexpr
):  # fmt: skip
    """One row. Grid: (N, B)."""
    token, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < width
    row = tl.load(x + batch * x_b + token * x_n + columns, mask=mask, other=0.0).to(tl.float32)
    added = tl.load(branch + batch * br_b + token * br_n + columns, mask=mask, other=0.0).to(tl.float32)
    factor = tl.load(gate + batch * gate_b + columns, mask=mask, other=0.0).to(tl.float32)
    target = out + (batch * tokens + token) * width + columns
    tl.store(target, (row + factor * added).to(out.dtype.element_ty), mask=mask)


@triton.jit
def backward_kernel(
    gate, branch, grad, dbranch, partial, gate_b, br_b, br_n, g_b, g_n, tokens, width, chunk,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """dbranch of one chunk of rows, and its share of dgate. Grid: (chunks, B)."""
    piece, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < width
    factor = tl.load(gate + batch * gate_b + columns, mask=mask, other=0.0).to(tl.float32)
    dgate = tl.zeros((BLOCK,), tl.float32)
    for token in range(piece * chunk, tl.minimum(piece * chunk + chunk, tokens)):
        dy = tl.load(grad + batch * g_b + token * g_n + columns, mask=mask, other=0.0).to(tl.float32)
        added = tl.load(branch + batch * br_b + token * br_n + columns, mask=mask, other=0.0).to(tl.float32)
        dgate += dy * added
        target = dbranch + (batch * tokens + token) * width + columns
        tl.store(target, (dy * factor).to(dbranch.dtype.element_ty), mask=mask)
    tl.store(partial + (batch * tl.num_programs(0) + piece) * width + columns, dgate, mask=mask)


def forward(x: torch.Tensor, gate: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
    """x, branch: (B, N, D); gate: (B, 1, D) -> (B, N, D) in the widest dtype."""
    x, gate, branch = map(unit_stride, (x, gate, branch))
    batch, tokens, width = x.shape
    dtype = torch.promote_types(torch.promote_types(x.dtype, gate.dtype), branch.dtype)
    out = torch.empty((batch, tokens, width), dtype=dtype, device=x.device)
    block, warps = row_block(width)
    with on_device(x):
        forward_kernel[(tokens, batch)](
            *(x, gate, branch, out, *x.stride()[:2], gate.stride(0), *branch.stride()[:2], tokens, width),
            BLOCK=block,
            num_warps=warps,
        )
    return out


def backward(
    gate: torch.Tensor, branch: torch.Tensor, grad: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """dbranch (B, N, D), and dgate (B, 1, D) in float32."""
    gate, branch, grad = map(unit_stride, (gate, branch, grad))
    batch, tokens, width = branch.shape
    chunks, chunk = pieces(tokens, batch, multiple=BACKWARD_ROWS)
    dbranch = torch.empty((batch, tokens, width), dtype=branch.dtype, device=branch.device)
    partial = torch.empty((batch, chunks, width), dtype=torch.float32, device=branch.device)
    block, warps = row_block(width)
    with on_device(branch):
        backward_kernel[(chunks, batch)](
            *(gate, branch, grad, dbranch, partial, gate.stride(0), *branch.stride()[:2], *grad.stride()[:2]),
            *(tokens, width, chunk),
            BLOCK=block,
            num_warps=warps,
        )
    return dbranch, partial.sum(1, keepdim=True)
