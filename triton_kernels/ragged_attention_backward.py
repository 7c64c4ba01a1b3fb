"""The backward pass of the attention with a rank of its own for each head; every sum in a fixed order.

With P = exp(scale·Q Kᵀ − LSE), δ = ⟨dA, A⟩ of each query and dS = P ∘ (dA Vᵀ − δ), one program a block of keys walks
the queries that see it for dV = Pᵀ dA and dK = scale·dSᵀ Q, and one a block of queries walks its keys for dQ =
scale·dS K. Launches by tile as in the forward pass.
"""

import torch
import triton
import triton.language as tl

from .ragged_attention import _columns, _rank_put, flat, layout
from .shaped_attention import LOG2E, _product, _rank_tile, _reach, tiles
from .shaped_attention_backward import _gather_query, _query_reach
from .shaped_combine import _head, _put, _seen, _sequence, _tile
from .shaped_combine_launch import Mask, interpretable, named, small


@triton.jit(do_not_specialize=("window", "chunks"))
def _ragged_attention_bwd_kv(
    Q, K, V, DA, LSE, DELTA, DK, DV, HEADS, RANKS, Q_OFFSETS, K_OFFSETS, BOUNDS, TABLE, START, LENGTHS,
    q_b, q_t, q_d, k_b, k_t, k_d, v_b, v_h, v_t, v_d, da_b, da_h, da_t, da_d, dk_b, dk_t, dk_d,
    dv_b, dv_h, dv_t, dv_d, scale, T, S, H, window, chunks,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    g = tl.load(HEADS + tl.program_id(1))
    rank = tl.load(RANKS + g)
    batch, block, first, place = _sequence(
        tl.program_id(0), chunks, BOUNDS, TABLE, START, LENGTHS, T, S, CAUSAL, PACKED
    )
    rows, keys, start = place
    n0 = block * BLOCK_N
    n = n0 + tl.arange(0, BLOCK_N)
    offset = tl.load(K_OFFSETS + g)
    x = _rank_tile(_columns(K, batch, first, offset, k_b, k_t, k_d), n0, keys, rank, BLOCK_N, BLOCK_K)
    y = _tile(_head(V, batch, g, first, v_b, v_h, v_t, v_d), n0, keys, WIDTH, BLOCK_N, BLOCK_V)
    dk = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    t0, t1 = _query_reach(n0, n0 + BLOCK_N, place, window, BLOCK_M, CAUSAL, WINDOWED)
    for member in range(GROUP):
        h = g * GROUP + member
        q = _columns(Q, batch, first, tl.load(Q_OFFSETS + h), q_b, q_t, q_d)
        da = _head(DA, batch, h, first, da_b, da_h, da_t, da_d)
        row = (batch.to(tl.int64) * H + h) * T + first
        for t in range(t0, t1, BLOCK_M):
            i = t + tl.arange(0, BLOCK_M)
            z = _rank_tile(q, t, rows, rank, BLOCK_M, BLOCK_K)
            log = tl.load(LSE + row + i, i < rows, other=0.0) * LOG2E
            p = tl.exp2(_product(x, tl.trans(z)) * (scale * LOG2E) - log[None, :])
            if (
                CAUSAL or WINDOWED
            ):  # otherwise all queries see the same keys, and missing ones have dA = δ = 0
                lo, hi = _seen(start + i, keys, window, CAUSAL, WINDOWED)
                seen = n[:, None] < tl.where(i < rows, hi, 0)[None, :]
                if WINDOWED:
                    seen = seen & (n[:, None] >= lo[None, :])
                p = tl.where(seen, p, 0.0)
            dz = _tile(da, t, rows, WIDTH, BLOCK_M, BLOCK_V)
            dv += _product(p.to(dz.dtype), dz)
            delta = tl.load(DELTA + row + i, i < rows, other=0.0)
            ds = p * (_product(y, tl.trans(dz)) - delta[None, :])
            dk += _product(ds.to(z.dtype), z)
    # Rows beyond a sequence's keys exist unless sequences are packed; their gradient is zero.
    stop = rows if PACKED else rows * 0 + S
    real = (n < keys)[:, None]
    dk = tl.where(real, dk * scale, 0.0)
    _rank_put(_columns(DK, batch, first, offset, dk_b, dk_t, dk_d), dk, n0, stop, rank, BLOCK_N, BLOCK_K)
    dv = tl.where(real, dv, 0.0)
    _put(_head(DV, batch, g, first, dv_b, dv_h, dv_t, dv_d), dv, n0, stop, WIDTH, BLOCK_N, BLOCK_V)


@triton.jit(do_not_specialize=("window", "chunks"))
def _ragged_attention_bwd_q(
    Q, K, V, DA, LSE, DELTA, DQ, HEADS, RANKS, Q_OFFSETS, K_OFFSETS, BOUNDS, TABLE, START, LENGTHS,
    q_b, q_t, q_d, k_b, k_t, k_d, v_b, v_h, v_t, v_d, da_b, da_h, da_t, da_d, dq_b, dq_t, dq_d,
    scale, T, S, H, window, chunks,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    index = tl.num_programs(0) - 1 - tl.program_id(0)
    h = tl.load(HEADS + tl.program_id(1) // GROUP) * GROUP + tl.program_id(1) % GROUP
    rank = tl.load(RANKS + h // GROUP)
    batch, block, first, place = _sequence(index, chunks, BOUNDS, TABLE, START, LENGTHS, T, S, CAUSAL, PACKED)
    rows, keys, start = place
    offset = tl.load(Q_OFFSETS + h)
    k = _columns(K, batch, first, tl.load(K_OFFSETS + h // GROUP), k_b, k_t, k_d)
    v = _head(V, batch, h // GROUP, first, v_b, v_h, v_t, v_d)
    t = block * BLOCK_M
    i = t + tl.arange(0, BLOCK_M)
    lo, hi = _seen(start + i, keys, window, CAUSAL, WINDOWED)
    hi = tl.where(i < rows, hi, lo)
    some = hi > lo
    n0, _, n_edge, n1 = _reach(lo, hi, BLOCK_N, WINDOWED)
    x = _rank_tile(_columns(Q, batch, first, offset, q_b, q_t, q_d), t, rows, rank, BLOCK_M, BLOCK_K)
    y = _tile(_head(DA, batch, h, first, da_b, da_h, da_t, da_d), t, rows, WIDTH, BLOCK_M, BLOCK_V)
    row = (batch.to(tl.int64) * H + h) * T + first
    log = tl.load(LSE + row + i, some, other=0.0) * LOG2E
    delta = tl.load(DELTA + row + i, some, other=0.0)
    dq = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    step = scale * LOG2E
    if WINDOWED:
        n_edge = n0
    else:
        dq = _gather_query(dq, x, y, k, v, log, delta, 0, n_edge, keys, lo, hi, 1.0, step, False,
                           BLOCK_K, WIDTH, BLOCK_N, BLOCK_K, BLOCK_V, rank)  # fmt: skip
    dq = _gather_query(dq, x, y, k, v, log, delta, n_edge, n1, keys, lo, hi, 1.0, step, True,
                       BLOCK_K, WIDTH, BLOCK_N, BLOCK_K, BLOCK_V, rank)  # fmt: skip
    dq = tl.where(some[:, None], dq * scale, 0.0)
    _rank_put(_columns(DQ, batch, first, offset, dq_b, dq_t, dq_d), dq, t, rows, rank, BLOCK_M, BLOCK_K)


@interpretable("dq", "dk", "dv")
def ragged_attention_backward(
    grad, q, k, v, a, lse, ranks, causal, window, query_start, key_lengths, cu_seqlens, scale, dq, dk, dv
) -> None:  # fmt: skip
    """Writes dq, dk and dv; ``grad`` is the gradient of A, ``a`` and ``lse`` are what the forward pass returned."""
    (batch, groups, keys, width), (_, heads, queries, _) = v.shape, grad.shape
    repeats = heads // groups
    mask = Mask(causal, window, query_start, key_lengths, cu_seqlens)
    delta = (grad.float() * a.float()).sum(-1)
    heads_of = layout(ranks, repeats, q.device)
    common = {"scale": scale, "T": queries, "S": keys, "H": heads, "window": mask.window, "GROUP": repeats,
              "WIDTH": width, **heads_of.places, **mask.flags, **mask.tensors, **flat("q", q),
              **flat("k", k), **named("v", v), **named("da", grad)}  # fmt: skip
    with torch.cuda.device_of(q):
        for rank, members in heads_of.launches:
            operands = (q, k, v, grad, lse, delta)
            tile = tiles("keys", rank, width, q.dtype, window is not None, repeats > 1, small(q))
            programs, table, chunks = mask.split(batch, keys, tile["BLOCK_N"])
            _ragged_attention_bwd_kv[(programs, len(members))](
                *operands, dk, dv, members, **common, **flat("dk", dk), **named("dv", dv), TABLE=table, chunks=chunks,
                **tile,
            )  # fmt: skip
            tile = tiles("queries", rank, width, q.dtype, window is not None, repeats > 1, small(q))
            programs, table, chunks = mask.split(batch, queries, tile["BLOCK_M"])
            _ragged_attention_bwd_q[(programs, len(members) * repeats)](
                *operands, dq, members, **common, **flat("dq", dq), TABLE=table, chunks=chunks, **tile
            )
