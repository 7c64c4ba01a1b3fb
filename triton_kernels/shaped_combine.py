"""Triton sweeps of shaped_combine: O = β·A + α·V − γ·C V + λ·(V⁰ − V), the softmax output A given.

C is the uniform attention under the mask of A, so C V at a query is the mean of the keys it sees. Those keys are always
one interval [lo, hi) that moves with the query, and its sum is a running one. A program sweeps a chunk of rows of one
head in tiles: within a tile the sums are a product with a 0/1 matrix (exact, accumulated in float32), a float64 row
carries on from tile to tile. The forward sweep reads A and V and writes O. The backward sweep reads dO, A and V and
writes dV and dA (or, for the fused attention, one number a row instead of dA). Where there are few heads the rows are
split in two levels: a first kernel sums every chunk, so that each sweep knows what lies outside its own.

In kernels a matrix is the tuple (address, row stride, column stride); strides count elements, addresses have 64 bits.
"""

import torch
import triton
import triton.language as tl

from .shaped_combine_launch import FURTHEST, Mask, chunk_rows, interpretable, named, sweep_tile

FAR = tl.constexpr(FURTHEST)


@triton.jit
def _sequence(
    index, chunks, bounds, table, query_start, key_lengths, T, S, CAUSAL: tl.constexpr, PACKED: tl.constexpr
):
    """Of program ``index``: batch row, chunk, first row in memory, and (queries, keys, position of the first query)."""
    if PACKED:
        sequence = tl.load(table + 2 * index)
        chunk = tl.load(table + 2 * index + 1)
        first = tl.load(bounds + tl.maximum(sequence, 0))
        rows = tl.where(sequence < 0, 0, tl.load(bounds + tl.maximum(sequence, 0) + 1) - first)
        keys = rows
        start = rows * 0
        batch = index * 0
    else:
        batch = index // chunks
        chunk = index % chunks
        first = index * 0
        rows = first + T
        keys = first + S
        start = first
        if CAUSAL:
            start = keys - rows
        if query_start is not None:
            start = tl.minimum(tl.maximum(tl.load(query_start + batch), -FAR), FAR).to(tl.int32)
        if key_lengths is not None:
            keys = tl.minimum(tl.maximum(tl.load(key_lengths + batch), 0), S).to(tl.int32)
    return batch, chunk, first, (rows, keys, start)


@triton.jit
def _seen(p, keys, window, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr):
    """The keys [lo, hi) that queries at positions ``p`` see; lo = hi for none."""
    lo = p * 0
    if CAUSAL:
        hi = tl.where((p >= 0) & (p < keys), p + 1, 0)
    elif WINDOWED:
        hi = tl.minimum(p + window, keys)
    else:
        hi = lo + keys
    if WINDOWED:
        lo = tl.maximum(p - window + 1, 0)
    return lo, tl.maximum(hi, lo)


@triton.jit
def _weights(t, place, window, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr):
    """1/n of query rows ``t``, n the number of keys seen; 0 where there is no key or no such row."""
    rows, keys, start = place
    lo, hi = _seen(start + t, keys, window, CAUSAL, WINDOWED)
    real = (t >= 0) & (t < rows) & (hi > lo)
    return tl.where(real, 1.0 / tl.maximum(hi - lo, 1).to(tl.float32), 0.0)


@triton.jit
def _head(pointer, batch, head, first, stride_b, stride_h, stride_t, stride_d):
    """The matrix of one head, from row ``first`` on."""
    base = pointer + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
    return base + first.to(tl.int64) * stride_t, stride_t, stride_d


@triton.jit
def _tile(matrix, first, stop, WIDTH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK: tl.constexpr):
    """Rows [first, first + BLOCK_T); zero outside [0, stop) and beyond column WIDTH."""
    pointer, stride, stride_last = matrix
    row = first + tl.arange(0, BLOCK_T)
    column = tl.arange(0, BLOCK)
    mask = ((row >= 0) & (row < stop))[:, None]
    if WIDTH < BLOCK:
        mask = mask & (column < WIDTH)[None, :]
    return tl.load(
        pointer + row.to(tl.int64)[:, None] * stride + column[None, :] * stride_last, mask, other=0.0
    )


@triton.jit
def _put(matrix, x, first, stop, WIDTH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK: tl.constexpr):
    """Writes ``x`` to rows [first, first + BLOCK_T), those inside [0, stop)."""
    pointer, stride, stride_last = matrix
    row = first + tl.arange(0, BLOCK_T)
    column = tl.arange(0, BLOCK)
    mask = ((row >= 0) & (row < stop))[:, None]
    if WIDTH < BLOCK:
        mask = mask & (column < WIDTH)[None, :]
    address = pointer + row.to(tl.int64)[:, None] * stride + column[None, :] * stride_last
    tl.store(address, x.to(pointer.dtype.element_ty), mask)


@triton.jit
def _gain(pointer, h):
    if pointer is None:
        return 1.0
    else:
        return tl.load(pointer + h).to(tl.float32)


@triton.jit
def _select(mask, x):
    """Sums of the rows of ``x`` that the 0/1 matrix ``mask`` selects, accumulated in float32."""
    return tl.dot(mask.to(x.dtype), x, input_precision="ieee")


@triton.jit
def _add_rows(
    total, matrix, r0, r1, place, window, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, WEIGHTED: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``total`` plus rows [r0, r1) of V or, WEIGHTED, of dO each over its n."""
    for r in range(r0, r1, BLOCK_T):
        x = _tile(matrix, r, r1, WIDTH, BLOCK_T, BLOCK).to(tl.float32)
        if WEIGHTED:
            x *= _weights(r + tl.arange(0, BLOCK_T), place, window, CAUSAL, WINDOWED)[:, None]
        total += tl.sum(x, 0).to(tl.float64)
    return total


@triton.jit
def _sum(
    matrix, sums, stride_sums, chunk_rows, r0, r1, stop, place, window, CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr, WEIGHTED: tl.constexpr, WIDTH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Float64 sum of rows [r0, r1) inside [0, stop): whole chunks from ``sums`` if there are any, else row by row."""
    total = tl.zeros([BLOCK], tl.float64)
    r0 = tl.minimum(tl.maximum(r0, 0), stop)
    r1 = tl.maximum(tl.minimum(r1, stop), r0)
    if sums is None:
        total = _add_rows(
            total, matrix, r0, r1, place, window, CAUSAL, WINDOWED, WEIGHTED, WIDTH, BLOCK_T, BLOCK
        )
    else:
        left = tl.minimum((r0 + chunk_rows - 1) // chunk_rows * chunk_rows, r1)
        right = tl.maximum(r1 // chunk_rows * chunk_rows, left)
        total = _add_rows(
            total, matrix, r0, left, place, window, CAUSAL, WINDOWED, WEIGHTED, WIDTH, BLOCK_T, BLOCK
        )
        column = tl.arange(0, BLOCK)
        for c in range(left // chunk_rows, right // chunk_rows):
            total += tl.load(sums + c * stride_sums + column, column < WIDTH, other=0.0)
        total = _add_rows(
            total, matrix, right, r1, place, window, CAUSAL, WINDOWED, WEIGHTED, WIDTH, BLOCK_T, BLOCK
        )
    return total


@triton.jit
def _chunk_sums(
    sums, index, chunk, batch, head, heads, key_chunks, WIDTH: tl.constexpr, PACKED: tl.constexpr
):
    """Where the sums of this sequence's chunks begin: sums [programs, heads, WIDTH]."""
    if PACKED:
        return sums + ((index - chunk).to(tl.int64) * heads + head) * WIDTH
    else:
        return sums + (batch.to(tl.int64) * key_chunks * heads + head) * WIDTH


@triton.jit(do_not_specialize=("window", "chunks"))
def _shaped_combine_sums(
    X, SUMS, BOUNDS, TABLE, START, LENGTHS, x_b, x_h, x_t, x_d, T, S, window, chunks, chunk_rows,
    WEIGHTED: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, BLOCK_T: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Float64 sums of each chunk: rows of V that are keys or, WEIGHTED, rows of dO each over its n."""
    index = tl.program_id(0)
    head = tl.program_id(1)
    batch, chunk, first, place = _sequence(index, chunks, BOUNDS, TABLE, START, LENGTHS, T, S, CAUSAL, PACKED)
    stop = place[0] if WEIGHTED else place[1]
    r0 = tl.minimum(chunk * chunk_rows, stop)
    r1 = tl.minimum(r0 + chunk_rows, stop)
    x = _head(X, batch, head, first, x_b, x_h, x_t, x_d)
    total = tl.zeros([BLOCK], tl.float64)
    total = _add_rows(total, x, r0, r1, place, window, CAUSAL, WINDOWED, WEIGHTED, WIDTH, BLOCK_T, BLOCK)
    column = tl.arange(0, BLOCK)
    out = SUMS + (index.to(tl.int64) * tl.num_programs(1) + head) * WIDTH
    tl.store(out + column, total, column < WIDTH)


@triton.jit(do_not_specialize=("window", "chunks", "key_chunks"))
def _shaped_combine_fwd(
    A, V, V0, OUT, ALPHA, BETA, GAMMA, LAM, SUMS, BOUNDS, TABLE, START, LENGTHS,
    a_b, a_h, a_t, a_d, v_b, v_h, v_t, v_d, v0_b, v0_h, v0_t, v0_d, o_b, o_h, o_t, o_d,
    T, S, window, chunks, key_chunks, chunk_rows,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, BLOCK_T: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0)
    h = tl.program_id(1)
    batch, chunk, first, place = _sequence(index, chunks, BOUNDS, TABLE, START, LENGTHS, T, S, CAUSAL, PACKED)
    rows, keys, start = place
    a = _head(A, batch, h, first, a_b, a_h, a_t, a_d)
    v = _head(V, batch, h // GROUP, first, v_b, v_h, v_t, v_d)
    out = _head(OUT, batch, h, first, o_b, o_h, o_t, o_d)
    # The newest key that a query at p sees stands at p + ahead, and it sees ``span`` of them.
    ahead = 0
    span = window
    if WINDOWED and not CAUSAL:
        ahead = window - 1
        span = 2 * window - 1
    i = tl.arange(0, BLOCK_T)
    t0 = chunk * chunk_rows
    newest = start + t0 + ahead
    if GAMMA is not None:
        gamma = _gain(GAMMA, h)
        groups = tl.num_programs(1) // GROUP
        sums = None
        if SUMS is not None:
            sums = _chunk_sums(SUMS, index, chunk, batch, h // GROUP, groups, key_chunks, WIDTH, PACKED)
        r0 = keys * 0
        r1 = newest
        if WINDOWED:
            r0 = newest - span
        elif not CAUSAL:
            r1 = keys
        carry = _sum(v, sums, groups * WIDTH, chunk_rows, r0, r1, keys, place, window,
                     CAUSAL, WINDOWED, False, WIDTH, BLOCK_T, BLOCK)  # fmt: skip
    for t in range(t0, tl.minimum(t0 + chunk_rows, rows), BLOCK_T):
        p = start + t + i
        lo, hi = _seen(p, keys, window, CAUSAL, WINDOWED)
        x = tl.where((hi > lo)[:, None], _tile(a, t, rows, WIDTH, BLOCK_T, BLOCK).to(tl.float32), 0.0)
        if BETA is not None:
            x *= _gain(BETA, h)
        if ALPHA is not None or LAM is not None or (GAMMA is not None and CAUSAL):
            own = _tile(v, start + t, keys, WIDTH, BLOCK_T, BLOCK)
        if GAMMA is not None:
            if WINDOWED:
                entering = own if CAUSAL else _tile(v, start + t + ahead, keys, WIDTH, BLOCK_T, BLOCK)
                leaving = _tile(v, start + t + ahead - span, keys, WIDTH, BLOCK_T, BLOCK)
                # carry: the keys that every row of the tile sees and that entered before it
                carry -= tl.sum(leaving.to(tl.float64), 0)
                age = i[:, None] - i[None, :]
                total = _select((age >= 0) & (age < span), entering)
                total += _select((age < 0) & (i < span)[None, :], leaving)
                total += tl.where(span >= BLOCK_T, carry, 0.0).to(tl.float32)[None, :]
                carry += tl.sum(entering.to(tl.float64), 0)
            elif CAUSAL:
                if own.dtype == tl.float32:
                    total = tl.cumsum(own.to(tl.float32), 0)
                else:
                    total = _select(i[:, None] >= i[None, :], own)
                total += carry.to(tl.float32)[None, :]
                carry += tl.sum(own.to(tl.float32), 0).to(tl.float64)
            else:
                total = tl.zeros([BLOCK_T, BLOCK], tl.float32) + carry.to(tl.float32)[None, :]
            x -= total * (gamma * _weights(t + i, place, window, CAUSAL, WINDOWED))[:, None]
        if ALPHA is not None:
            x += _gain(ALPHA, h) * own.to(tl.float32)
        if LAM is not None:
            v0 = _head(V0, batch, h // GROUP, first, v0_b, v0_h, v0_t, v0_d)
            goal = _tile(v0, t, rows, WIDTH, BLOCK_T, BLOCK).to(tl.float32)
            x += _gain(LAM, h) * tl.where(((p >= 0) & (p < keys))[:, None], goal - own.to(tl.float32), 0.0)
        _put(out, x, t, rows, WIDTH, BLOCK_T, BLOCK)


def chunk_sums(
    x: torch.Tensor, queries: int, keys: int, mask: Mask, chunk: int, weighted: bool
) -> torch.Tensor | None:
    """Float64 sums of the chunks of ``x`` [B, heads, rows, V]; None where one chunk is all there is."""
    batch, heads, rows, width = x.shape
    programs, table, chunks = mask.split(batch, rows, chunk)
    if chunks <= 1 and table is None:
        return None
    sums = torch.empty(programs, heads, width, dtype=torch.float64, device=x.device)
    _shaped_combine_sums[(programs, heads)](
        x, sums, TABLE=table, **mask.tensors, **named("x", x), T=queries, S=keys, window=mask.window,
        chunks=chunks, chunk_rows=chunk, WEIGHTED=weighted, WIDTH=width,
        **sweep_tile(width, x.dtype, mask.flags["WINDOWED"]), **mask.flags,
    )  # fmt: skip
    return sums


@interpretable("out")
def shaped_combine(
    out, a, v, alpha, beta, gamma, v0, lam, causal, window, query_start, key_lengths, cu_seqlens
) -> None:
    """Writes the combination to ``out`` [B, H, T, V], which may be ``a``. v [B, G, S, V], v0 [B, G, T, V], gains [H].

    float32, bfloat16 and float16, V ≤ 256, any strides; arguments as in ``gaugekit.shaped_attention``, checked there.
    """
    (batch, heads, queries, width), (groups, keys) = a.shape, v.shape[1:3]
    if out.numel() == 0:
        return
    mask = Mask(causal, window, query_start, key_lengths, cu_seqlens)
    tile = sweep_tile(width, a.dtype, window is not None)
    chunk = chunk_rows(max(queries, keys), batch * heads, tile["BLOCK_T"])
    programs, table, chunks = mask.split(batch, queries, chunk)
    with torch.cuda.device_of(a):
        sums = None if gamma is None else chunk_sums(v, queries, keys, mask, chunk, False)
        _shaped_combine_fwd[(programs, heads)](
            a, v, v0, out, alpha, beta, gamma, lam, sums, TABLE=table, **mask.tensors,
            **named("a", a), **named("v", v), **named("v0", v0), **named("o", out),
            T=queries, S=keys, window=mask.window, chunks=chunks, key_chunks=triton.cdiv(keys, chunk),
            chunk_rows=chunk, GROUP=heads // groups, WIDTH=width,
            **mask.flags, **tile,
        )  # fmt: skip
