"""Linear attention in Triton: two kernels forward, two backward, memory-bound, deterministic.

For each head, with q' = relu(q), k' = relu(k) and D = 32 channels: S = sum_n k'_n v_n^T (D, D), z = sum_n k'_n (D,).

Precision. Sums are float32. A product of input values with sums takes the sums in two bfloat16 parts for bfloat16 inputs,
else in TF32 with error correction ("tf32x3"): plain TF32 or bfloat16 would do for the output, but the gradient of q is a
small difference of large terms where v has a mean. It is centred besides, exactly in algebra: with c the mean of v under
the weights k' (a D-vector) and S' = S - z c^T,

    o_n = q'_n S' / den_n + c (q'_n . z) / den_n,    den_n = q'_n . z + eps
    dq'_n = S' do_n / den_n + r_n z,    r_n = -do_n . (o_n - c) / den_n = (eps do_n . c - q'_n . S' do_n) / den_n^2
    dS = sum_n q'_n do_n^T / den_n,    dz = sum_n r_n q'_n - dS c
    dk'_n = dS v_n + dz,    dv_n = dS^T k'_n

so that every term is as small as v - c.
"""

import torch
import triton
import triton.language as tl

from sana.ops._backend import interpreted
from sana.ops._launch import TOKEN_BLOCK, ceil_div, on_device, pieces, unit_stride

STREAM_TOKENS = 256
"""Tokens of a program in the two kernels that do not reduce over tokens."""
QUERY_GRADIENT_BLOCK = 32
"""Tokens in a tile of the kernel with the most registers; 64 would spill in float32."""
WARPS = 4


@triton.jit
def _wide_dot(a, b, SPLIT: tl.constexpr):
    """a @ b to about float32 accuracy; `a` holds input values, `b` float32. SPLIT: `a` is bfloat16."""
    if SPLIT:
        high = b.to(tl.bfloat16)
        low = (b - high.to(tl.float32)).to(tl.bfloat16)
        return tl.dot(a, low, tl.dot(a, high))
    else:
        return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def _load_tile(pointer, rows, stride, mask, D: tl.constexpr, RAW: tl.constexpr):
    """A (BLOCK, D) tile, zero outside the mask; RAW keeps the dtype (the interpreter cannot compute in bfloat16)."""
    tile = tl.load(pointer + rows[:, None] * stride + tl.arange(0, D)[None, :], mask=mask[:, None], other=0.0)
    return tile if RAW else tile.to(tl.float32)


@triton.jit
def _relu(tile):
    return tl.where(tile > 0, tile, 0.0).to(tile.dtype)


@triton.jit
def _store_state(pointer, matrix, vector, D: tl.constexpr):
    d = tl.arange(0, D)
    tl.store(pointer + d[:, None] * D + d[None, :], matrix)
    tl.store(pointer + D * D + d, vector)


@triton.jit
def _sum_states(pointer, head, splits, D: tl.constexpr):
    """The (D, D) and (D,) sums of a head over all splits, in fixed order."""
    d = tl.arange(0, D)
    matrix = tl.zeros((D, D), tl.float32)
    vector = tl.zeros((D,), tl.float32)
    pointer += head.to(tl.int64) * splits * (D + 1) * D
    for _ in range(splits):
        matrix += tl.load(pointer + d[:, None] * D + d[None, :])
        vector += tl.load(pointer + D * D + d)
        pointer += (D + 1) * D
    return matrix, vector


@triton.jit
def _centred(state, head, splits, D: tl.constexpr):
    """S' = S - z c^T, z and c of a head; c = 0 where no key is alive."""
    matrix, z = _sum_states(state, head, splits, D)
    total = tl.sum(z)
    c = tl.where(total > 0, tl.sum(matrix, 0) / tl.where(total > 0, total, 1.0), 0.0)
    return matrix - z[:, None] * c[None, :], z, c


@triton.jit
def state_kernel(
    k, v, state, k_b, k_h, k_n, v_b, v_h, v_n, heads, tokens, chunk,
    D: tl.constexpr, BLOCK: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """S and z of one chunk of tokens. Grid: (B H, splits)."""
    head, split = tl.program_id(0), tl.program_id(1)
    batch = (head // heads).to(tl.int64)
    k += batch * k_b + (head % heads) * k_h
    v += batch * v_b + (head % heads) * v_h
    matrix = tl.zeros((D, D), tl.float32)
    z = tl.zeros((D,), tl.float32)
    for first in range(0, chunk, BLOCK):
        rows = split * chunk + first + tl.arange(0, BLOCK)
        mask = rows < tokens
        key = _relu(_load_tile(k, rows, k_n, mask, D, NATIVE))
        value = _load_tile(v, rows, v_n, mask, D, NATIVE)
        if NATIVE:  # products of half-precision inputs are exact
            matrix = tl.dot(tl.trans(key), value, matrix)
        else:
            matrix += tl.dot(tl.trans(key), value, input_precision="tf32x3")
        z += tl.sum(key.to(tl.float32), 0)
    program = head.to(tl.int64) * tl.num_programs(1) + split
    _store_state(state + program * (D + 1) * D, matrix, z, D)


@triton.jit
def output_kernel(
    q, state, out, q_b, q_h, q_n, heads, tokens, chunk, splits, eps,
    D: tl.constexpr, BLOCK: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """o of one chunk of tokens, into (B, N, H, D). Grid: (B H, chunks)."""
    head = tl.program_id(0)
    batch = (head // heads).to(tl.int64)
    q += batch * q_b + (head % heads) * q_h
    out += batch * tokens * heads * D + (head % heads) * D
    centred, z, c = _centred(state, head, splits, D)
    for first in range(0, chunk, BLOCK):
        rows = tl.program_id(1) * chunk + first + tl.arange(0, BLOCK)
        mask = rows < tokens
        query = _relu(_load_tile(q, rows, q_n, mask, D, SPLIT))
        length = tl.sum(query.to(tl.float32) * z[None, :], 1)
        inverse = 1.0 / (length + eps)
        result = _wide_dot(query, centred, SPLIT) * inverse[:, None]
        result += (length * inverse)[:, None] * c[None, :]
        target = out + rows[:, None] * (heads * D) + tl.arange(0, D)[None, :]
        tl.store(target, result.to(out.dtype.element_ty), mask=mask[:, None])


@triton.jit
def query_gradient_kernel(
    q, grad, state, dqkv, dstate, q_b, q_h, q_n, g_b, g_h, g_n, heads, tokens, chunk, splits, eps,
    D: tl.constexpr, BLOCK: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """dq of one chunk of tokens, and its share of dS and dz. Grid: (B H, splits)."""
    head, split = tl.program_id(0), tl.program_id(1)
    batch = (head // heads).to(tl.int64)
    q += batch * q_b + (head % heads) * q_h
    grad += batch * g_b + (head % heads) * g_h
    dqkv += batch * tokens * 3 * heads * D + (head % heads) * D
    centred, z, c = _centred(state, head, splits, D)
    dmatrix = tl.zeros((D, D), tl.float32)
    dz = tl.zeros((D,), tl.float32)
    for first in range(0, chunk, BLOCK):
        rows = split * chunk + first + tl.arange(0, BLOCK)
        mask = rows < tokens
        query = _relu(_load_tile(q, rows, q_n, mask, D, SPLIT))
        do = _load_tile(grad, rows, g_n, mask, D, SPLIT)
        wide, wide_do = query.to(tl.float32), do.to(tl.float32)
        length = tl.sum(wide * z[None, :], 1)
        inverse = 1.0 / (length + eps)
        image = _wide_dot(do, tl.trans(centred), SPLIT)  # S' do, and do . (q' S') = q' . (S' do)
        r = (eps * tl.sum(wide_do * c[None, :], 1) - tl.sum(wide * image, 1)) * inverse * inverse
        dq = image * inverse[:, None] + r[:, None] * z[None, :]
        target = dqkv + rows[:, None] * (3 * heads * D) + tl.arange(0, D)[None, :]
        # Chosen, not multiplied by the mask: where no query channel is alive 1 / den is 1 / eps, and inf * 0 is NaN.
        tl.store(target, tl.where(wide > 0, dq, 0.0).to(dqkv.dtype.element_ty), mask=mask[:, None])
        alive = length > 0
        ratio = tl.where(alive[:, None], wide_do * inverse[:, None], 0.0)
        dmatrix += _wide_dot(tl.trans(query), ratio, SPLIT)
        dz += tl.sum(tl.where(alive, r, 0.0)[:, None] * wide, 0)
    program = head.to(tl.int64) * tl.num_programs(1) + split
    _store_state(dstate + program * (D + 1) * D, dmatrix, dz - tl.sum(dmatrix * c[None, :], 1), D)


@triton.jit
def key_value_gradient_kernel(
    k, v, dstate, dqkv, k_b, k_h, k_n, v_b, v_h, v_n, heads, tokens, chunk, splits,
    D: tl.constexpr, BLOCK: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """dk and dv of one chunk of tokens. Grid: (B H, chunks)."""
    head = tl.program_id(0)
    batch = (head // heads).to(tl.int64)
    k += batch * k_b + (head % heads) * k_h
    v += batch * v_b + (head % heads) * v_h
    dqkv += batch * tokens * 3 * heads * D + (head % heads) * D
    dmatrix, dz = _sum_states(dstate, head, splits, D)
    for first in range(0, chunk, BLOCK):
        rows = tl.program_id(1) * chunk + first + tl.arange(0, BLOCK)
        mask = rows < tokens
        key = _relu(_load_tile(k, rows, k_n, mask, D, SPLIT))
        value = _load_tile(v, rows, v_n, mask, D, SPLIT)
        dk = tl.where(key > 0, _wide_dot(value, tl.trans(dmatrix), SPLIT) + dz[None, :], 0.0)
        dv = _wide_dot(key, dmatrix, SPLIT)
        target = dqkv + rows[:, None] * (3 * heads * D) + tl.arange(0, D)[None, :]
        tl.store(target + heads * D, dk.to(dqkv.dtype.element_ty), mask=mask[:, None])
        tl.store(target + 2 * heads * D, dv.to(dqkv.dtype.element_ty), mask=mask[:, None])


def _strides(*tensors: torch.Tensor) -> tuple[int, ...]:
    return tuple(stride for tensor in tensors for stride in tensor.stride()[:3])


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """q, k, v: (B, H, N, 32) -> o (B, N, H, 32) and the partial states (B H, splits, 33, 32) in float32."""
    q, k, v = map(unit_stride, (q, k, v))
    batch, heads, tokens, dim = q.shape
    splits, chunk = pieces(tokens, batch * heads, multiple=TOKEN_BLOCK)
    out = torch.empty((batch, tokens, heads, dim), dtype=v.dtype, device=v.device)
    state = torch.empty((batch * heads, splits, dim + 1, dim), dtype=torch.float32, device=v.device)
    native = v.dtype != torch.float32 and not interpreted()
    shared = {"D": dim, "BLOCK": TOKEN_BLOCK, "num_warps": WARPS}
    with on_device(v):
        state_kernel[(batch * heads, splits)](
            k, v, state, *_strides(k, v), heads, tokens, chunk, NATIVE=native, **shared
        )
        output_kernel[(batch * heads, ceil_div(tokens, STREAM_TOKENS))](
            *(q, state, out, *_strides(q), heads, tokens, STREAM_TOKENS, splits, eps),
            SPLIT=native and v.dtype == torch.bfloat16,
            **shared,
        )
    return out, state


def backward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, state: torch.Tensor, grad: torch.Tensor, eps: float
) -> torch.Tensor:
    """grad: (B, H, N, 32), of o -> dq, dk, dv as one (B, N, 3, H, 32)."""
    q, k, v, grad = map(unit_stride, (q, k, v, grad))
    batch, heads, tokens, dim = q.shape
    splits, chunk = pieces(tokens, batch * heads, multiple=TOKEN_BLOCK)
    dqkv = torch.empty((batch, tokens, 3, heads, dim), dtype=v.dtype, device=v.device)
    dstate = torch.empty_like(state)
    split = v.dtype == torch.bfloat16 and not interpreted()
    shared = {"D": dim, "SPLIT": split, "num_warps": WARPS}
    with on_device(v):
        query_gradient_kernel[(batch * heads, splits)](
            *(q, grad, state, dqkv, dstate, *_strides(q, grad)),
            *(heads, tokens, chunk, splits, eps),
            BLOCK=QUERY_GRADIENT_BLOCK,
            **shared,
        )
        key_value_gradient_kernel[(batch * heads, ceil_div(tokens, STREAM_TOKENS))](
            *(k, v, dstate, dqkv, *_strides(k, v), heads, tokens, STREAM_TOKENS, splits),
            BLOCK=TOKEN_BLOCK,
            **shared,
        )
    return dqkv
