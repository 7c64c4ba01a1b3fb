"""Triton shaped attention, the softmax inside: O = β·A + α·V − γ·C V + λ·(V⁰ − V), A = softmax(scale·Q Kᵀ) V.

Forward: one program a block of queries and head walks the keys it can see; keys that all its queries see need no mask.
The mean C V comes from the sums of whole blocks of V, made by a first kernel, and from 0/1 products at the mask's
edges. The terms meet in float32 before anything is rounded: at initialisation A and C V cancel. Words and helpers as
in shaped_combine.
"""

import torch
import triton
import triton.language as tl

from .shaped_attention_tiles import described, tiles, varied
from .shaped_combine import (
    _chunk_sums,
    _gain,
    _head,
    _put,
    _seen,
    _select,
    _sequence,
    _tile,
    _weights,
    chunk_sums,
)
from .shaped_combine_launch import Mask, interpretable, named, small

LOG2E = tl.constexpr(1.4426950408889634)
# Numbers that change from call to call: one kernel serves them all. T and S are not among them: that multiples of 16
# align what is indexed with them saves registers, and in the keys' kernel a quarter of the loop's instructions.
NUMBERS = ("window", "chunks", "key_chunks")
LOW = tl.constexpr(-1.0e30)  # below every score, and finite: a row that has met no key yet stays free of NaN


@triton.jit
def _load(
    matrix, first, stop, MASKED: tl.constexpr, WIDTH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK: tl.constexpr
):
    """A tile; unless MASKED, all its rows exist."""
    if MASKED:
        x = _tile(matrix, first, stop, WIDTH, BLOCK_T, BLOCK)
    else:
        pointer, stride, stride_last = matrix
        column = tl.arange(0, BLOCK)
        row = first + tl.arange(0, BLOCK_T)
        address = pointer + row.to(tl.int64)[:, None] * stride + column[None, :] * stride_last
        x = tl.load(address, (column < WIDTH)[None, :], other=0.0) if WIDTH < BLOCK else tl.load(address)
    return x


@triton.jit
def _box(descriptor, batch, group, first, BLOCK_T: tl.constexpr, BLOCK: tl.constexpr):
    """Rows [first, first + BLOCK_T) of a head by the tensor memory accelerator; zero where the tensor ends."""
    return descriptor.load([batch, group, first, 0]).reshape(BLOCK_T, BLOCK)


@triton.jit
def _rank_tile(matrix, first, stop, rank, BLOCK_T: tl.constexpr, BLOCK: tl.constexpr):
    """Rows [first, first + BLOCK_T); zero outside [0, stop) and from column ``rank``, a number of run time, on."""
    pointer, stride, stride_last = matrix
    row = first + tl.arange(0, BLOCK_T)
    column = tl.arange(0, BLOCK)
    mask = ((row >= 0) & (row < stop))[:, None] & (column < rank)[None, :]
    return tl.load(
        pointer + row.to(tl.int64)[:, None] * stride + column[None, :] * stride_last, mask, other=0.0
    )


@triton.jit
def _product(x, y):
    """x y accumulated in float32; float32 operands are not rounded to the tensor cores' ten bits."""
    return tl.dot(x, y, input_precision="ieee")


@triton.jit
def _reach(lo, hi, BLOCK_N: tl.constexpr, WINDOWED: tl.constexpr):
    """Bounds n0 ≤ a ≤ b ≤ n1 of the keys that queries with keys [lo, hi) need: all of them see all keys of [a, b)."""
    some = hi > lo
    n1 = tl.max(tl.where(some, hi, 0), 0)
    b = tl.min(tl.where(some, hi, n1), 0) // BLOCK_N * BLOCK_N
    n0 = n1 * 0
    a = n1 * 0
    if WINDOWED:
        n0 = tl.min(tl.where(some, lo, n1), 0) // BLOCK_N * BLOCK_N
        a = (tl.max(tl.where(some, lo, 0), 0) + BLOCK_N - 1) // BLOCK_N * BLOCK_N
        a = tl.minimum(a, n1)
    return n0, a, tl.maximum(a, b), n1


@triton.jit
def _soften(s, step, top, total, FOLD: tl.constexpr):
    """(2^(s − new top), its rows' sums added to ``total``, the new top, 2^(top − new top)), s in base 2.

    With FOLD ``s`` is yet to be multiplied by ``step`` > 0: one multiply-add an element does it and subtracts the top.
    """
    if FOLD:
        highest = tl.maximum(top, tl.max(s, 1) * step)
        p = tl.exp2(s * step - highest[:, None])
    else:
        highest = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - highest[:, None])
    shrink = tl.exp2(top - highest)
    return p, total * shrink + tl.sum(p, 1), highest, shrink


@triton.jit
def _attend(
    acc, total, top, q, k, v, n0, n1, keys, lo, hi, scale, MASKED: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, rank=None,
    FOLD: tl.constexpr = False, boxes=None,
):  # fmt: skip
    """The online softmax over keys [n0, n1): ``acc`` = Σ 2^(s − top) v, ``total`` = Σ 2^(s − top), s in base 2.

    Keys are K wide or, where given, ``rank``.
    """
    for n in range(n0, n1, BLOCK_N):
        if boxes is not None:
            x = _box(boxes[0], boxes[2], boxes[3], n, BLOCK_N, BLOCK_K)
        elif rank is None:
            x = _load(k, n, keys, MASKED, K, BLOCK_N, BLOCK_K)
        else:
            x = _rank_tile(k, n, keys, rank, BLOCK_N, BLOCK_K)
        s = _product(q, tl.trans(x))
        if MASKED or not FOLD:
            s = s * scale
        if MASKED:
            j = (n + tl.arange(0, BLOCK_N))[None, :]
            s = tl.where((j >= lo[:, None]) & (j < hi[:, None]), s, LOW)
        p, total, top, shrink = _soften(s, scale, top, total, FOLD and not MASKED)
        acc = acc * shrink[:, None]
        if boxes is not None:
            y = _box(boxes[1], boxes[2], boxes[3], n, BLOCK_N, BLOCK_V)
        else:
            y = _load(v, n, keys, MASKED, V, BLOCK_N, BLOCK_V)
        acc += _product(p.to(q.dtype), y)
    return acc, total, top


@triton.jit(do_not_specialize=NUMBERS)
def _shaped_attention_fwd(
    Q, K, V, V0, OUT, A, LSE, ALPHA, BETA, GAMMA, LAM, SUMS, BOUNDS, TABLE, START, LENGTHS,
    q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, v_b, v_h, v_t, v_d, v0_b, v0_h, v0_t, v0_d,
    o_b, o_h, o_t, o_d, a_b, a_h, a_t, a_d, scale, T, S, window, chunks, key_chunks,
    GROUP: tl.constexpr, KEY_WIDTH: tl.constexpr, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, PACKED: tl.constexpr, FOLD: tl.constexpr = False,
    KEYS=None, VALUES=None,
):  # fmt: skip
    index = tl.num_programs(0) - 1 - tl.program_id(0)  # under a causal mask the longest rows first
    h = tl.program_id(1)
    groups = tl.num_programs(1) // GROUP
    batch, block, first, place = _sequence(index, chunks, BOUNDS, TABLE, START, LENGTHS, T, S, CAUSAL, PACKED)
    rows, keys, start = place
    q = _head(Q, batch, h, first, q_b, q_h, q_t, q_d)
    k = _head(K, batch, h // GROUP, first, k_b, k_h, k_t, k_d)
    v = _head(V, batch, h // GROUP, first, v_b, v_h, v_t, v_d)
    out = _head(OUT, batch, h, first, o_b, o_h, o_t, o_d)
    a = _head(A, batch, h, first, a_b, a_h, a_t, a_d)
    t = block * BLOCK_M
    i = t + tl.arange(0, BLOCK_M)
    lo, hi = _seen(start + i, keys, window, CAUSAL, WINDOWED)
    hi = tl.where(i < rows, hi, lo)
    n0, _, n_edge, n1 = _reach(lo, hi, BLOCK_N, WINDOWED)

    boxes = None
    if KEYS is not None:
        boxes = (KEYS, VALUES, batch, h // GROUP)
    x = _tile(q, t, rows, KEY_WIDTH, BLOCK_M, BLOCK_K)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.zeros([BLOCK_M], tl.float32) + LOW
    step = scale * LOG2E
    if WINDOWED:  # most of what a window sees lies at its edges
        acc, total, top = _attend(acc, total, top, x, k, v, n0, n1, keys, lo, hi, step, True,
                                  KEY_WIDTH, WIDTH, BLOCK_N, BLOCK_K, BLOCK_V)  # fmt: skip
    else:
        acc, total, top = _attend(acc, total, top, x, k, v, 0, n_edge, keys, lo, hi, step, False,
                                  KEY_WIDTH, WIDTH, BLOCK_N, BLOCK_K, BLOCK_V, None, FOLD, boxes)  # fmt: skip
        acc, total, top = _attend(acc, total, top, x, k, v, n_edge, n1, keys, lo, hi, step, True,
                                  KEY_WIDTH, WIDTH, BLOCK_N, BLOCK_K, BLOCK_V, None, False, boxes)  # fmt: skip

    total = tl.where(hi > lo, total, 1.0)
    acc *= tl.where(hi > lo, 1.0 / total, 0.0)[:, None]
    _put(a, acc, t, rows, WIDTH, BLOCK_M, BLOCK_V)
    lse = tl.where(hi > lo, (top + tl.log2(total)) / LOG2E, float("-inf"))
    tl.store(LSE + (batch.to(tl.int64) * tl.num_programs(1) + h) * T + first + i, lse, i < rows)
    if BETA is not None:
        acc *= _gain(BETA, h)
    if GAMMA is not None:
        sums = None
        if SUMS is not None:
            sums = _chunk_sums(SUMS, index, block, batch, h // GROUP, groups, key_chunks, WIDTH, PACKED)
        mean = _uniform(v, sums, groups * WIDTH, lo, hi, keys, WIDTH, BLOCK_M, BLOCK_N, BLOCK_V, WINDOWED)
        acc -= mean * (_gain(GAMMA, h) * _weights(i, place, window, CAUSAL, WINDOWED))[:, None]
    if ALPHA is not None or LAM is not None:
        own = _tile(v, start + t, keys, WIDTH, BLOCK_M, BLOCK_V).to(tl.float32)
        if ALPHA is not None:
            acc += _gain(ALPHA, h) * own
        if LAM is not None:
            v0 = _head(V0, batch, h // GROUP, first, v0_b, v0_h, v0_t, v0_d)
            goal = _tile(v0, t, rows, WIDTH, BLOCK_M, BLOCK_V).to(tl.float32)
            there = (start + i >= 0) & (start + i < keys)
            acc += _gain(LAM, h) * tl.where(there[:, None], goal - own, 0.0)
    _put(out, acc, t, rows, WIDTH, BLOCK_M, BLOCK_V)


@triton.jit
def _uniform(
    v, sums, stride_sums, lo, hi, keys, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """Sums of the rows [lo, hi) of v for each query: whole blocks of BLOCK_M rows from ``sums``, edges by products."""
    n0, a, b, n1 = _reach(lo, hi, BLOCK_M, WINDOWED)
    column = tl.arange(0, BLOCK_V)
    inner = tl.zeros([BLOCK_V], tl.float64)
    if sums is None:  # there is one block, so it is an edge
        b = a
    else:
        for c in range(a // BLOCK_M, b // BLOCK_M):
            inner += tl.load(sums + c * stride_sums + column, column < WIDTH, other=0.0)
    total = tl.zeros([BLOCK_M, BLOCK_V], tl.float32) + inner.to(tl.float32)[None, :]
    if WINDOWED:
        total = _add_edge(total, v, n0, a, lo, hi, keys, WIDTH, BLOCK_N, BLOCK_V)
    return _add_edge(total, v, b, n1, lo, hi, keys, WIDTH, BLOCK_N, BLOCK_V)


@triton.jit
def _add_edge(
    total, v, n0, n1, lo, hi, keys, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr
):
    for n in range(n0, n1, BLOCK_N):
        j = (n + tl.arange(0, BLOCK_N))[None, :]
        seen = (j >= lo[:, None]) & (j < hi[:, None])
        total += _select(seen, _tile(v, n, keys, WIDTH, BLOCK_N, BLOCK_V))
    return total


@interpretable("out", "a")
def shaped_attention(
    q,
    k,
    v,
    alpha,
    beta,
    gamma,
    v0,
    lam,
    causal,
    window,
    query_start,
    key_lengths,
    cu_seqlens,
    scale,
    out,
    a,
    lse,
) -> None:
    """Writes O to ``out`` and A to ``a``, both [B, H, T, V], and the rows' log-sum-exp to ``lse`` [B, H, T] float32.

    q [B, H, T, K], k [B, G, S, K], v [B, G, S, V]: float32, bfloat16 or float16, K and V in 8..256, any strides;
    arguments as in ``gaugekit.shaped_attention``, checked there. A row that sees no key has A = 0 and lse = −∞.
    """
    (batch, heads, queries, key_width), (groups, keys, width) = q.shape, v.shape[1:]
    if lse.numel() == 0:
        return
    mask = Mask(causal, window, query_start, key_lengths, cu_seqlens)
    tile = tiles("forward", key_width, width, q.dtype, window is not None, heads > groups, small(q))
    tile, descriptors = varied("forward", tile, q.dtype, scale)
    if descriptors:
        box = (1, 1, tile["BLOCK_N"])
        tile |= described(mask, KEYS=(k, [*box, tile["BLOCK_K"]]), VALUES=(v, [*box, tile["BLOCK_V"]]))
    programs, table, chunks = mask.split(batch, queries, tile["BLOCK_M"])
    with torch.cuda.device_of(q):
        sums = None if gamma is None else chunk_sums(v, queries, keys, mask, tile["BLOCK_M"], False)
        _shaped_attention_fwd[(programs, heads)](
            q, k, v, v0, out, a, lse, alpha, beta, gamma, lam, sums, TABLE=table, **mask.tensors,
            **named("q", q), **named("k", k), **named("v", v), **named("v0", v0), **named("o", out), **named("a", a),
            scale=scale, T=queries, S=keys, window=mask.window, chunks=chunks,
            key_chunks=triton.cdiv(keys, tile["BLOCK_M"]), GROUP=heads // groups, KEY_WIDTH=key_width, WIDTH=width,
            **mask.flags, **tile,
        )  # fmt: skip
