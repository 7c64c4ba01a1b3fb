"""The backward sweep of shaped_combine; words and helpers as in shaped_combine.

With g_t = dO_t / n_t, key j gets −γ Σ g_t over the queries that see it, one interval again: the same running sum,
walked from the last key to the first. dγ = −Σ_j ⟨v_j, Σ g_t⟩ is the same sum once more, so the mean is never
recomputed. Every program keeps its share of dα, dβ, dγ, dλ in a row of its own; the rows are added in a fixed order.
"""

import torch
import triton
import triton.language as tl

from .shaped_combine import (
    _chunk_sums,
    _gain,
    _head,
    _put,
    _seen,
    _select,
    _sequence,
    _sum,
    _tile,
    _weights,
    chunk_sums,
)
from .shaped_combine_launch import Mask, chunk_rows, interpretable, named, sweep_tile


@triton.jit
def _query_rows(
    t, h, g, a, da, dv0, delta, BETA, LAM, place, window,
    WIDTH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """dA = β·dO, or δ = β·⟨dO, A⟩ for each row, and dV⁰ = λ·dO; returns dO·A summed over the rows."""
    rows, keys, start = place
    i = t + tl.arange(0, BLOCK_T)
    p = start + i
    lo, hi = _seen(p, keys, window, CAUSAL, WINDOWED)
    seeing = tl.where((hi > lo)[:, None], g.to(tl.float32), 0.0)
    product = seeing * _tile(a, t, rows, WIDTH, BLOCK_T, BLOCK).to(tl.float32)
    beta = _gain(BETA, h)
    if da is not None:
        _put(da, beta * seeing, t, rows, WIDTH, BLOCK_T, BLOCK)
    if delta is not None:
        tl.store(delta + i, beta * tl.sum(product, 1), i < rows)
    if dv0 is not None:
        own = tl.where(((p >= 0) & (p < keys))[:, None], g.to(tl.float32), 0.0)
        _put(dv0, _gain(LAM, h) * own, t, rows, WIDTH, BLOCK_T, BLOCK)
    return tl.sum(product, 0)


@triton.jit(do_not_specialize=("window", "chunks"))
def _shaped_combine_bwd(
    DO, A, V, V0, DA, DELTA, DV, DV0, PARTIAL, ALPHA, BETA, GAMMA, LAM, SUMS, BOUNDS, TABLE, START, LENGTHS,
    do_b, do_h, do_t, do_d, a_b, a_h, a_t, a_d, v_b, v_h, v_t, v_d, v0_b, v0_h, v0_t, v0_d,
    da_b, da_h, da_t, da_d, dv_b, dv_h, dv_t, dv_d, dv0_b, dv0_h, dv0_t, dv0_d,
    T, S, window, chunks, query_chunks, chunk_rows,
    KEYS: tl.constexpr, QUERIES: tl.constexpr,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, BLOCK_T: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """KEYS: dV, dα, dγ, dλ of a chunk of keys. QUERIES: dA or δ, dV⁰, dβ of a chunk of queries. Both together, reading
    dO once, where query t stands at position t and T = S."""
    index = tl.program_id(0)
    h = tl.program_id(1)
    heads = tl.num_programs(1)
    batch, chunk, first, place = _sequence(index, chunks, BOUNDS, TABLE, START, LENGTHS, T, S, CAUSAL, PACKED)
    rows, keys, start = place
    do = _head(DO, batch, h, first, do_b, do_h, do_t, do_d)
    v = _head(V, batch, h // GROUP, first, v_b, v_h, v_t, v_d)
    i = tl.arange(0, BLOCK_T)
    dalpha = tl.zeros([BLOCK], tl.float32)
    dbeta = tl.zeros([BLOCK], tl.float32)
    dgamma = tl.zeros([BLOCK], tl.float32)
    dlam = tl.zeros([BLOCK], tl.float32)
    a = None
    da = None
    delta = None
    v0 = None
    dv0 = None
    if LAM is not None:
        v0 = _head(V0, batch, h // GROUP, first, v0_b, v0_h, v0_t, v0_d)
    if QUERIES:
        a = _head(A, batch, h, first, a_b, a_h, a_t, a_d)
        if DA is not None:
            da = _head(DA, batch, h, first, da_b, da_h, da_t, da_d)
        if DELTA is not None:
            delta = DELTA + (batch.to(tl.int64) * heads + h) * T + first
        if DV0 is not None:
            dv0 = _head(DV0, batch, h, first, dv0_b, dv0_h, dv0_t, dv0_d)
    # Rows of V beyond the keys of a sequence still get a gradient: zero.
    total_rows = rows if (PACKED or not KEYS) else rows * 0 + S
    j0 = tl.minimum(chunk * chunk_rows, total_rows)
    tiles = (tl.minimum(j0 + chunk_rows, total_rows) - j0 + BLOCK_T - 1) // BLOCK_T
    if KEYS:
        dv = _head(DV, batch, h, first, dv_b, dv_h, dv_t, dv_d)
        # The oldest query that sees key j stands at j − behind, and ``span`` of them do.
        behind = 0
        span = window
        if WINDOWED and not CAUSAL:
            behind = window - 1
            span = 2 * window - 1
        if GAMMA is not None:
            gamma = _gain(GAMMA, h)
            sums = None
            if SUMS is not None:
                sums = _chunk_sums(SUMS, index, chunk, batch, h, heads, query_chunks, WIDTH, PACKED)
            r0 = j0 + tiles * BLOCK_T - behind - start
            r1 = rows
            if WINDOWED:
                r1 = r0 + span
            elif not CAUSAL:
                r0 = rows * 0
            carry = _sum(do, sums, heads * WIDTH, chunk_rows, r0, r1, rows, place, window,
                         CAUSAL, WINDOWED, True, WIDTH, BLOCK_T, BLOCK)  # fmt: skip
    for m in range(tiles):
        j = j0 + (tiles - 1 - m) * BLOCK_T
        g = _tile(do, j - start if KEYS else j, rows, WIDTH, BLOCK_T, BLOCK)
        if KEYS:
            real = ((j + i) < keys)[:, None]
            x = tl.zeros([BLOCK_T, BLOCK], tl.float32)
            if ALPHA is not None or GAMMA is not None or LAM is not None:
                value = _tile(v, j, keys, WIDTH, BLOCK_T, BLOCK).to(tl.float32)
            if GAMMA is not None:
                if WINDOWED:
                    t = j - behind - start
                    entering = g if CAUSAL else _tile(do, t, rows, WIDTH, BLOCK_T, BLOCK)
                    entering = (
                        entering.to(tl.float32) * _weights(t + i, place, window, CAUSAL, WINDOWED)[:, None]
                    )
                    t += span
                    leaving = _tile(do, t, rows, WIDTH, BLOCK_T, BLOCK).to(tl.float32)
                    leaving *= _weights(t + i, place, window, CAUSAL, WINDOWED)[:, None]
                    carry -= tl.sum(leaving.to(tl.float64), 0)
                    age = i[None, :] - i[:, None]
                    total = _select((age >= 0) & (age < span), entering)
                    total += _select((age < 0) & (i >= BLOCK_T - span)[None, :], leaving)
                    total += tl.where(span >= BLOCK_T, carry, 0.0).to(tl.float32)[None, :]
                    carry += tl.sum(entering.to(tl.float64), 0)
                elif CAUSAL:
                    entering = (
                        g.to(tl.float32) * _weights(j - start + i, place, window, CAUSAL, WINDOWED)[:, None]
                    )
                    total = tl.cumsum(entering, 0, reverse=True) + carry.to(tl.float32)[None, :]
                    carry += tl.sum(entering, 0).to(tl.float64)
                else:
                    total = tl.zeros([BLOCK_T, BLOCK], tl.float32) + carry.to(tl.float32)[None, :]
                total = tl.where(real, total, 0.0)
                dgamma -= tl.sum(total * value, 0)
                x -= gamma * total
            if ALPHA is not None or LAM is not None:
                own = tl.where(real, g.to(tl.float32), 0.0)
                if ALPHA is not None:
                    x += _gain(ALPHA, h) * own
                    dalpha += tl.sum(own * value, 0)
                if LAM is not None:
                    x -= _gain(LAM, h) * own
                    goal = _tile(v0, j - start, rows, WIDTH, BLOCK_T, BLOCK).to(tl.float32)
                    dlam += tl.sum(own * (goal - value), 0)
            _put(dv, x, j, total_rows, WIDTH, BLOCK_T, BLOCK)
        if QUERIES:
            dbeta += _query_rows(j, h, g, a, da, dv0, delta, BETA, LAM, place, window,
                                 WIDTH, BLOCK_T, BLOCK, CAUSAL, WINDOWED)  # fmt: skip
    partial = PARTIAL + (index.to(tl.int64) * heads + h) * 4
    tl.store(partial, tl.sum(dalpha.to(tl.float64), 0))
    tl.store(partial + 1, tl.sum(dbeta.to(tl.float64), 0))
    tl.store(partial + 2, tl.sum(dgamma.to(tl.float64), 0))
    tl.store(partial + 3, tl.sum(dlam.to(tl.float64), 0))


@interpretable("da", "dv", "dv0")
def shaped_combine_backward(
    grad, a, v, alpha, beta, gamma, v0, lam, causal, window, query_start, key_lengths, cu_seqlens,
    da=None, delta=None, dv=None, dv0=None,
) -> torch.Tensor:  # fmt: skip
    """Gradients of ``shaped_combine`` where the gradient of its output is ``grad`` [B, H, T, V].

    Written where given: ``da`` = β·grad [B, H, T, V] and, for a fused attention, ``delta`` = β·⟨grad, a⟩ [B, H, T]
    float32 contiguous; ``dv`` [B, H, S, V], one per query head; ``dv0`` [B, H, T, V], likewise. Returns float64 [4, H]:
    dα, dβ, dγ, dλ (zero for an absent gain).
    """
    (batch, heads, queries, width), (groups, keys) = a.shape, v.shape[1:3]
    mask = Mask(causal, window, query_start, key_lengths, cu_seqlens)
    tile = sweep_tile(width, a.dtype, window is not None)
    chunk = chunk_rows(max(queries, keys), batch * heads, tile["BLOCK_T"])
    total = torch.zeros(4, heads, dtype=torch.float64, device=a.device)
    parts = [(True, True)] if queries == keys and query_start is None else [(True, False), (False, True)]
    if dv is None:
        parts = [(False, True)]
    with torch.cuda.device_of(a):
        sums = None if gamma is None else chunk_sums(grad, queries, keys, mask, chunk, True)
        for key_part, query_part in parts:
            rows = keys if key_part else queries
            programs, table, chunks = mask.split(batch, rows, chunk)
            if programs == 0:
                continue
            partial = torch.empty(programs, heads, 4, dtype=torch.float64, device=a.device)
            of_keys = dv if key_part else None
            of_queries = (da, delta, dv0) if query_part else (None, None, None)
            _shaped_combine_bwd[(programs, heads)](
                grad, a, v, v0, *of_queries[:2], of_keys, of_queries[2], partial, alpha, beta, gamma, lam,
                sums if key_part else None, TABLE=table, **mask.tensors, **named("do", grad), **named("a", a),
                **named("v", v), **named("v0", v0), **named("da", of_queries[0]), **named("dv", of_keys),
                **named("dv0", of_queries[2]), T=queries, S=keys, window=mask.window, chunks=chunks,
                query_chunks=triton.cdiv(queries, chunk), chunk_rows=chunk, KEYS=key_part, QUERIES=query_part,
                GROUP=heads // groups, WIDTH=width, **mask.flags, **tile,
            )  # fmt: skip
            total += partial.sum(0).T
    return total
