"""A projection whose gauge is fixed, y_h = x[·, P_h] + x[·, P̄_h] F_h: forward, gradient of x, gradient of F.

No list of the inputs P̄_h is needed: the k-th of them is k + #{j : p_j − #{i : p_i < p_j} ≤ k}, and an input d that is
not in P_h stands at row d − #{j : p_j < d} of F_h. Both are comparisons with the few numbers of P_h, in registers.

P_h is not checked: reading it on the host would stop the stream. Its numbers are clamped to the inputs and what is
derived from them stays inside, so that rows out of range, or repeated, give wrong numbers and read nothing outside.
"""

import torch
import triton
import triton.language as tl

from .shaped_combine_launch import interpretable

FAR = tl.constexpr(1 << 30)  # behind every input: what pads the rows of a head
ROWS_OF_A_SPLIT = 2048  # of x, that one program adds up for the gradient of F; a constant, whatever the card


@triton.jit
def _passed(ROWS, h, inputs, WIDTH: tl.constexpr, BLOCK_W: tl.constexpr):
    """P_h, clamped to the inputs, FAR behind its end."""
    c = tl.arange(0, BLOCK_W)
    passed = tl.load(ROWS + h * WIDTH + c, mask=c < WIDTH, other=0)
    return tl.where(c < WIDTH, tl.minimum(tl.maximum(passed, 0), inputs - 1), FAR)


@triton.jit
def _thresholds(ROWS, h, inputs, WIDTH: tl.constexpr, BLOCK_W: tl.constexpr):
    """p − #{i : p_i < p} for each p of P_h: the free inputs before it."""
    passed = _passed(ROWS, h, inputs, WIDTH, BLOCK_W)
    smaller = passed[:, None] < passed[None, :]
    return passed - tl.sum(smaller.to(tl.int32), 0)


@triton.jit
def _others(thresholds, k):
    """The inputs at places ``k`` of P̄_h, int64; k to k + WIDTH, whatever P_h is, since FAR adds nothing."""
    return (k + tl.sum((thresholds[None, :] <= k[:, None]).to(tl.int32), 1)).to(tl.int64)


@triton.jit
def _gauge_linear_fwd(
    X, F, ROWS, BIAS, OUT, count, depth, x_row, x_last, out_row, bias_stride,
    WIDTH: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(1)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.arange(0, BLOCK_W)
    x = X + m.to(tl.int64)[:, None] * x_row
    thresholds = _thresholds(ROWS, h, depth + WIDTH, WIDTH, BLOCK_W)
    f = F + h.to(tl.int64) * depth * WIDTH + c[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_W], tl.float32)
    for first in range(0, depth, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        inside = k < depth
        left = tl.load(
            x + _others(thresholds, k)[None, :] * x_last, (m < count)[:, None] & inside[None, :], 0.0
        )
        right = tl.load(f + k[:, None] * WIDTH, inside[:, None] & (c < WIDTH)[None, :], 0.0)
        acc = tl.dot(left, right, acc, input_precision="ieee")
    here = (m < count)[:, None] & (c < WIDTH)[None, :]
    own = _passed(ROWS, h, depth + WIDTH, WIDTH, BLOCK_W).to(tl.int64)
    acc += tl.load(x + own[None, :] * x_last, here, 0.0).to(tl.float32)
    if BIAS is not None:
        acc += tl.load(BIAS + (h * WIDTH + c).to(tl.int64) * bias_stride, c < WIDTH, 0.0).to(tl.float32)[
            None, :
        ]
    out = OUT + m.to(tl.int64)[:, None] * out_row + (h * WIDTH + c)[None, :]
    tl.store(out, acc.to(OUT.dtype.element_ty), here)


@triton.jit
def _gauge_linear_bwd_x(
    GRAD, F, ROWS, DX, count, inputs, heads, grad_row, grad_last,
    WIDTH: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    c = tl.arange(0, BLOCK_W)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    grad = GRAD + m.to(tl.int64)[:, None] * grad_row + c.to(tl.int64)[None, :] * grad_last
    for h in range(heads):
        passed = _passed(ROWS, h, inputs, WIDTH, BLOCK_W)
        own = d[:, None] == passed[None, :]
        row = d - tl.sum((passed[None, :] < d[:, None]).to(tl.int32), 1)
        inside = row.to(tl.uint32, bitcast=True) < tl.cast(inputs - WIDTH, tl.uint32)  # and not negative
        weight = tl.load(F + row[:, None] * WIDTH + c[None, :], inside[:, None] & (c < WIDTH)[None, :], 0.0)
        passes = tl.sum(own.to(tl.int32), 1) > 0
        weight = tl.where(passes[:, None], own.to(F.dtype.element_ty), weight)
        left = tl.load(grad, (m < count)[:, None] & (c < WIDTH)[None, :], 0.0)
        acc = tl.dot(left, tl.trans(weight), acc, input_precision="ieee")
        F += (inputs - WIDTH) * WIDTH
        grad += tl.cast(WIDTH, tl.int64) * grad_last
    here = (m < count)[:, None] & (d < inputs)[None, :]
    tl.store(DX + m.to(tl.int64)[:, None] * inputs + d[None, :], acc.to(DX.dtype.element_ty), here)


@triton.jit
def _gauge_linear_bwd_free(
    GRAD, X, ROWS, DF, count, depth, grad_row, grad_last, x_row, x_last, rows_each,
    WIDTH: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(1)
    split = tl.program_id(2)
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    c = tl.arange(0, BLOCK_W)
    inside = k < depth
    x = X + _others(_thresholds(ROWS, h, depth + WIDTH, WIDTH, BLOCK_W), k)[None, :] * x_last
    grad = GRAD + (h * WIDTH + c).to(tl.int64)[None, :] * grad_last
    acc = tl.zeros([BLOCK_K, BLOCK_W], tl.float32)
    for first in range(split * rows_each, tl.minimum((split + 1) * rows_each, count), BLOCK_M):
        m = first + tl.arange(0, BLOCK_M)
        row = m.to(tl.int64)[:, None]
        left = tl.load(x + row * x_row, (m < count)[:, None] & inside[None, :], 0.0)
        right = tl.load(grad + row * grad_row, (m < count)[:, None] & (c < WIDTH)[None, :], 0.0)
        acc = tl.dot(tl.trans(left), right, acc, input_precision="ieee")
    out = DF + ((split * tl.num_programs(1) + h).to(tl.int64) * depth + k[:, None]) * WIDTH + c[None, :]
    tl.store(out, acc.to(DF.dtype.element_ty), inside[:, None] & (c < WIDTH)[None, :])


def tile(width: int, wide: bool) -> dict:
    """Columns, rows and warps of a tile; ``wide``: float32, which multiplies in registers."""
    columns = max(16, triton.next_power_of_2(width))
    # Rows of F that are no power of two are loaded number by number: twice the warps hold the addresses.
    warps = 8 if columns > 64 or columns > width > 16 else 4
    if wide:
        return {"BLOCK_W": columns, "BLOCK_M": 32, "num_warps": warps, "num_stages": 2}
    return {"BLOCK_W": columns, "BLOCK_M": 128 if columns <= 64 else 64, "num_warps": warps, "num_stages": 3}


@interpretable("out")
def gauge_linear(out, x, free, rows, bias) -> None:
    """Writes y [M, heads·width] to ``out``, whose last axis is dense and whose rows may stand apart.

    x [M, D] of any strides, ``free`` [heads, D − width, width] and ``rows`` [heads, width] int32 dense, ``bias``
    [heads·width] or None; float32, bfloat16 or float16, at least one row. As in ``gaugekit.gauge_linear``; ``rows`` are
    not checked, here and below.
    """
    (heads, depth, width), count = free.shape, x.shape[0]
    sizes = tile(width, x.dtype == torch.float32)
    with torch.cuda.device_of(x):
        _gauge_linear_fwd[(triton.cdiv(count, sizes["BLOCK_M"]), heads)](
            x, free, rows, bias, out, count, depth, *x.stride(), out.stride(0),
            0 if bias is None else bias.stride(0), WIDTH=width, BLOCK_K=32, **sizes)  # fmt: skip


@interpretable("dx")
def gauge_linear_backward_x(dx, grad, free, rows) -> None:
    """Writes the gradient of x to ``dx`` [M, D], dense; ``grad`` [M, heads·width] of any strides."""
    (heads, _, width), (count, inputs) = free.shape, dx.shape
    sizes, block = tile(width, grad.dtype == torch.float32), 64
    with torch.cuda.device_of(grad):
        _gauge_linear_bwd_x[(triton.cdiv(count, sizes["BLOCK_M"]), triton.cdiv(inputs, block))](
            grad, free, rows, dx, count, inputs, heads, *grad.stride(), WIDTH=width, BLOCK_D=block, **sizes
        )


@interpretable("dfree")
def gauge_linear_backward_free(dfree, grad, x, rows) -> None:
    """Writes the gradient of F to ``dfree`` [heads, D − width, width], dense, whose last two sizes are at least one.

    Many rows of x are added up in splits, in one order whatever the card.
    """
    (heads, depth, width), count = dfree.shape, x.shape[0]
    sizes, block = tile(width, x.dtype == torch.float32), 64
    splits = max(1, triton.cdiv(count, ROWS_OF_A_SPLIT))
    parts = (
        dfree
        if splits == 1
        else torch.empty(splits, heads, depth, width, dtype=torch.float32, device=x.device)
    )
    with torch.cuda.device_of(x):
        _gauge_linear_bwd_free[(triton.cdiv(depth, block), heads, splits)](
            grad, x, rows, parts, count, depth, *grad.stride(), *x.stride(), ROWS_OF_A_SPLIT, WIDTH=width,
            **sizes | {"BLOCK_M": 32, "BLOCK_K": block})  # fmt: skip
    if splits > 1:
        dfree.copy_(parts.sum(0))
