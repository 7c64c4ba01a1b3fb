"""The backward pass of the fused shaped attention: a sweep, then dK and dV, then dQ; every sum in a fixed order.

The sweep (shaped_combine_backward) leaves δ = β·⟨dO, A⟩ of each query and what V gets from the terms without softmax;
it starts from A as it was saved, not from O, where β·A has been rounded away beside α·V. Then, with
P = exp(scale·Q Kᵀ − LSE) and dS = P ∘ (β·dO Vᵀ − δ), one program a block of keys walks the queries that see it for
dV += β·Pᵀ dO and dK = scale·dSᵀ Q, and one a block of queries walks its keys for dQ = scale·dS K.
"""

import torch
import triton
import triton.language as tl

from .shaped_attention import LOG2E, _box, _load, _product, _rank_tile, _reach
from .shaped_attention_tiles import described, tiles, varied
from .shaped_combine import _gain, _head, _put, _seen, _sequence, _tile
from .shaped_combine_backward import shaped_combine_backward
from .shaped_combine_launch import Mask, interpretable, named, small


@triton.jit
def _query_reach(n0, n1, place, window, BLOCK_M: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr):
    """Bounds of the queries that see any of the keys [n0, n1)."""
    rows, keys, start = place
    n1 = tl.minimum(n1, keys)
    first = start
    stop = start + rows
    if CAUSAL:
        first = n0
        stop = tl.minimum(stop, keys)
    elif WINDOWED:
        first = n0 - window + 1
    if WINDOWED:
        stop = tl.minimum(stop, n1 - 1 + window)
    t0 = tl.maximum(first - start, 0) // BLOCK_M * BLOCK_M
    return t0, tl.where(n1 > n0, tl.maximum(stop - start, t0), t0)


@triton.jit
def _gather_keys(
    dk, dv, x, y, q, do, lse, delta, n, t0, t2, t3, t1, place, window, beta, scale,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, SPLIT: tl.constexpr, WEIGHTED: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, boxes,
):  # fmt: skip
    """What queries [t0, t1) add to dK/scale and dV of the keys ``x`` with values ``y``; [t2, t3) see them all."""
    rows = place[0]
    # One loop over all blocks: two loops over the same accumulators make ptxas serialise every product.
    for t in range(t0, t1, BLOCK_M):
        i = t + tl.arange(0, BLOCK_M)
        if boxes is None:
            z = _tile(q, t, rows, K, BLOCK_M, BLOCK_K)
            log = tl.load(lse + i, i < rows, other=0.0) * LOG2E
        else:
            z = _box(boxes[0], boxes[4], boxes[5], t, BLOCK_M, BLOCK_K)
            log = boxes[2].load([boxes[4], boxes[5], t]).reshape(BLOCK_M) * LOG2E
        p = tl.exp2(_product(x, tl.trans(z)) * scale - log[None, :])
        # Without a mask all queries see the same keys, and missing queries have dO = δ = 0.
        if SPLIT and (CAUSAL or WINDOWED):
            if (t < t2) | (t >= t3):
                p = _hide(p, n, i, place, window, CAUSAL, WINDOWED)
        elif CAUSAL or WINDOWED:
            p = _hide(p, n, i, place, window, CAUSAL, WINDOWED)
        if boxes is None:
            dz = _tile(do, t, rows, V, BLOCK_M, BLOCK_V)
            share = tl.load(delta + i, i < rows, other=0.0)
        else:
            dz = _box(boxes[1], boxes[4], boxes[5], t, BLOCK_M, BLOCK_V)
            share = boxes[3].load([boxes[4], boxes[5], t]).reshape(BLOCK_M)
        weight = p * beta if WEIGHTED else p
        dv += _product(weight.to(dz.dtype), dz)
        ds = p * (_product(y, tl.trans(dz)) * beta - share[None, :])
        dk += _product(ds.to(z.dtype), z)
    return dk, dv


@triton.jit
def _hide(p, n, i, place, window, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr):
    """``p`` [keys, queries] with zeros where query row ``i`` does not see key ``n``."""
    rows, keys, start = place
    lo, hi = _seen(start + i, keys, window, CAUSAL, WINDOWED)
    seen = n[:, None] < tl.where(i < rows, hi, 0)[None, :]
    if WINDOWED:
        seen = seen & (n[:, None] >= lo[None, :])
    return tl.where(seen, p, 0.0)


@triton.jit
def _query_whole(n0, t0, t1, place, window, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr,
                 WINDOWED: tl.constexpr):  # fmt: skip
    """Of the query blocks from t0 to t1, those [t2, t3) whose every query exists and sees all keys of the block n0."""
    rows, keys, start = place
    first = t0
    stop = tl.minimum(rows, t1)
    if CAUSAL:
        first = n0 + BLOCK_N - 1 - start
    elif WINDOWED:
        first = n0 + BLOCK_N - window - start
    if WINDOWED:
        stop = tl.minimum(stop, n0 + window - start)
    stop = tl.where(n0 + BLOCK_N <= keys, stop, t0)
    t2 = (tl.maximum(first, t0) + BLOCK_M - 1) // BLOCK_M * BLOCK_M
    return t2, tl.maximum(stop, 0) // BLOCK_M * BLOCK_M


@triton.jit(do_not_specialize=("window", "chunks"))
def _shaped_attention_bwd_kv(
    Q, K, V, DO, LSE, DELTA, DIRECT, DK, DV, BETA, BOUNDS, TABLE, START, LENGTHS,
    q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, v_b, v_h, v_t, v_d, do_b, do_h, do_t, do_d,
    direct_b, direct_h, direct_t, direct_d, dk_b, dk_h, dk_t, dk_d, dv_b, dv_h, dv_t, dv_d,
    scale, T, S, window, chunks,
    GROUP: tl.constexpr, KEY_WIDTH: tl.constexpr, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, PACKED: tl.constexpr,
    SPLIT: tl.constexpr = False, QUERIES=None, GRADIENTS=None, LOGS=None, DELTAS=None, KEYS=None, VALUES=None,
):  # fmt: skip
    index = tl.program_id(0)
    g = tl.program_id(1)
    heads = tl.num_programs(1) * GROUP
    batch, block, first, place = _sequence(index, chunks, BOUNDS, TABLE, START, LENGTHS, T, S, CAUSAL, PACKED)
    rows, keys, _ = place
    k = _head(K, batch, g, first, k_b, k_h, k_t, k_d)
    v = _head(V, batch, g, first, v_b, v_h, v_t, v_d)
    n0 = block * BLOCK_N
    n = n0 + tl.arange(0, BLOCK_N)
    if KEYS is None:
        x = _tile(k, n0, keys, KEY_WIDTH, BLOCK_N, BLOCK_K)
        y = _tile(v, n0, keys, WIDTH, BLOCK_N, BLOCK_V)
    else:
        x = _box(KEYS, batch, g, n0, BLOCK_N, BLOCK_K)
        y = _box(VALUES, batch, g, n0, BLOCK_N, BLOCK_V)
    dk = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    t0, t1 = _query_reach(n0, n0 + BLOCK_N, place, window, BLOCK_M, CAUSAL, WINDOWED)
    t2, t3 = _query_whole(n0, t0, t1, place, window, BLOCK_M, BLOCK_N, CAUSAL, WINDOWED)
    for member in range(GROUP):
        h = g * GROUP + member
        q = _head(Q, batch, h, first, q_b, q_h, q_t, q_d)
        do = _head(DO, batch, h, first, do_b, do_h, do_t, do_d)
        row = (batch.to(tl.int64) * heads + h) * T + first
        beta = _gain(BETA, h)
        boxes = None
        if QUERIES is not None:
            boxes = (QUERIES, GRADIENTS, LOGS, DELTAS, batch, h)
        dk, dv = _gather_keys(dk, dv, x, y, q, do, LSE + row, DELTA + row, n, t0, t2, t3, t1, place, window,
                              beta, scale * LOG2E, CAUSAL, WINDOWED, SPLIT, GROUP > 1, KEY_WIDTH, WIDTH,
                              BLOCK_M, BLOCK_K, BLOCK_V, boxes)  # fmt: skip
    # Rows beyond a sequence's keys exist unless sequences are packed; their gradient is zero.
    stop = rows if PACKED else rows * 0 + S
    real = (n < keys)[:, None]
    dk = tl.where(real, dk * scale, 0.0)
    _put(_head(DK, batch, g, first, dk_b, dk_h, dk_t, dk_d), dk, n0, stop, KEY_WIDTH, BLOCK_N, BLOCK_K)
    if GROUP == 1:
        dv *= _gain(BETA, g)
    dv = tl.where(real, dv, 0.0)
    if DIRECT is not None:
        for member in range(GROUP):
            direct = _head(DIRECT, batch, g * GROUP + member, first, direct_b, direct_h, direct_t, direct_d)
            dv += _tile(direct, n0, stop, WIDTH, BLOCK_N, BLOCK_V).to(tl.float32)
    _put(_head(DV, batch, g, first, dv_b, dv_h, dv_t, dv_d), dv, n0, stop, WIDTH, BLOCK_N, BLOCK_V)


@triton.jit
def _gather_query(
    dq, q, do, k, v, log, delta, n0, n1, keys, lo, hi, beta, scale, MASKED: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, rank=None, boxes=None,
):  # fmt: skip
    """What keys [n0, n1), K wide or ``rank`` where given, add to dQ/scale."""
    for n in range(n0, n1, BLOCK_N):
        if boxes is not None:
            x = _box(boxes[0], boxes[2], boxes[3], n, BLOCK_N, BLOCK_K)
        elif rank is None:
            x = _load(k, n, keys, MASKED, K, BLOCK_N, BLOCK_K)
        else:
            x = _rank_tile(k, n, keys, rank, BLOCK_N, BLOCK_K)
        p = tl.exp2(_product(q, tl.trans(x)) * scale - log[:, None])
        if MASKED:
            j = (n + tl.arange(0, BLOCK_N))[None, :]
            p = tl.where((j >= lo[:, None]) & (j < hi[:, None]), p, 0.0)
        if boxes is None:
            y = _load(v, n, keys, MASKED, V, BLOCK_N, BLOCK_V)
        else:
            y = _box(boxes[1], boxes[2], boxes[3], n, BLOCK_N, BLOCK_V)
        ds = p * (_product(do, tl.trans(y)) * beta - delta[:, None])
        dq += _product(ds.to(x.dtype), x)
    return dq


@triton.jit(do_not_specialize=("window", "chunks"))
def _shaped_attention_bwd_q(
    Q, K, V, DO, LSE, DELTA, DQ, BETA, BOUNDS, TABLE, START, LENGTHS,
    q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, v_b, v_h, v_t, v_d, do_b, do_h, do_t, do_d, dq_b, dq_h, dq_t, dq_d,
    scale, T, S, window, chunks,
    GROUP: tl.constexpr, KEY_WIDTH: tl.constexpr, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, PACKED: tl.constexpr,
    KEYS=None, VALUES=None,
):  # fmt: skip
    index = tl.num_programs(0) - 1 - tl.program_id(0)
    h = tl.program_id(1)
    batch, block, first, place = _sequence(index, chunks, BOUNDS, TABLE, START, LENGTHS, T, S, CAUSAL, PACKED)
    rows, keys, start = place
    q = _head(Q, batch, h, first, q_b, q_h, q_t, q_d)
    k = _head(K, batch, h // GROUP, first, k_b, k_h, k_t, k_d)
    v = _head(V, batch, h // GROUP, first, v_b, v_h, v_t, v_d)
    do = _head(DO, batch, h, first, do_b, do_h, do_t, do_d)
    t = block * BLOCK_M
    i = t + tl.arange(0, BLOCK_M)
    lo, hi = _seen(start + i, keys, window, CAUSAL, WINDOWED)
    hi = tl.where(i < rows, hi, lo)
    some = hi > lo
    n0, _, n_edge, n1 = _reach(lo, hi, BLOCK_N, WINDOWED)
    x = _tile(q, t, rows, KEY_WIDTH, BLOCK_M, BLOCK_K)
    y = _tile(do, t, rows, WIDTH, BLOCK_M, BLOCK_V)
    row = (batch.to(tl.int64) * tl.num_programs(1) + h) * T + first
    log = tl.load(LSE + row + i, some, other=0.0) * LOG2E
    delta = tl.load(DELTA + row + i, some, other=0.0)
    beta = _gain(BETA, h)
    dq = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    step = scale * LOG2E
    boxes = None
    if KEYS is not None:
        boxes = (KEYS, VALUES, batch, h // GROUP)
    if WINDOWED:
        dq = _gather_query(dq, x, y, k, v, log, delta, n0, n1, keys, lo, hi, beta, step, True,
                           KEY_WIDTH, WIDTH, BLOCK_N, BLOCK_K, BLOCK_V, None, boxes)  # fmt: skip
    else:
        dq = _gather_query(dq, x, y, k, v, log, delta, 0, n_edge, keys, lo, hi, beta, step, False,
                           KEY_WIDTH, WIDTH, BLOCK_N, BLOCK_K, BLOCK_V, None, boxes)  # fmt: skip
        dq = _gather_query(dq, x, y, k, v, log, delta, n_edge, n1, keys, lo, hi, beta, step, True,
                           KEY_WIDTH, WIDTH, BLOCK_N, BLOCK_K, BLOCK_V, None, boxes)  # fmt: skip
    dq = tl.where(some[:, None], dq * scale, 0.0)
    _put(_head(DQ, batch, h, first, dq_b, dq_h, dq_t, dq_d), dq, t, rows, KEY_WIDTH, BLOCK_M, BLOCK_K)


@interpretable("dq", "dk", "dv", "dv0")
def shaped_attention_backward(
    grad, q, k, v, a, lse, alpha, beta, gamma, v0, lam, causal, window, query_start, key_lengths, cu_seqlens, scale,
    dq, dk, dv, dv0=None,
) -> torch.Tensor:  # fmt: skip
    """Writes dq, dk, dv and dv0 [B, H, T, V] (one per query head); returns float64 [4, H]: dα, dβ, dγ, dλ.

    ``grad`` is the gradient of O alone; ``a`` and ``lse`` are what the forward pass returned.
    """
    (batch, heads, queries, key_width), (groups, keys, width) = q.shape, v.shape[1:]
    group = heads // groups
    arguments = (causal, window, query_start, key_lengths, cu_seqlens)
    mask = Mask(*arguments)
    delta = torch.empty(batch, heads, queries, dtype=torch.float32, device=q.device)
    direct = None
    if not (alpha is None and gamma is None and lam is None):
        direct = torch.empty(
            batch, heads, keys, width, dtype=v.dtype if group == 1 else torch.float32, device=v.device
        )
    total = shaped_combine_backward(
        grad, a, v, alpha, beta, gamma, v0, lam, *arguments, delta=delta, dv=direct, dv0=dv0
    )
    common = {"scale": scale, "T": queries, "S": keys, "window": mask.window, "GROUP": group, "KEY_WIDTH": key_width,
              "WIDTH": width, **mask.flags, **mask.tensors, **named("q", q), **named("k", k), **named("v", v),
              **named("do", grad)}  # fmt: skip
    with torch.cuda.device_of(q):
        tile = tiles("keys", key_width, width, q.dtype, window is not None, group > 1, small(q))
        tile, descriptors = varied("keys", tile, q.dtype, scale)
        if descriptors:
            of_keys, of_queries = (1, 1, tile["BLOCK_N"]), (1, 1, tile["BLOCK_M"])
            tile |= described(
                mask, KEYS=(k, [*of_keys, tile["BLOCK_K"]]), VALUES=(v, [*of_keys, tile["BLOCK_V"]]),
                QUERIES=(q, [*of_queries, tile["BLOCK_K"]]), GRADIENTS=(grad, [*of_queries, tile["BLOCK_V"]]),
                LOGS=(lse, [*of_queries]), DELTAS=(delta, [*of_queries]),
            )  # fmt: skip
        programs, table, chunks = mask.split(batch, keys, tile["BLOCK_N"])
        if programs:
            _shaped_attention_bwd_kv[(programs, groups)](
                q, k, v, grad, lse, delta, direct, dk, dv, beta, TABLE=table, chunks=chunks,
                **named("direct", direct), **named("dk", dk), **named("dv", dv), **common, **tile,
            )  # fmt: skip
        tile = tiles("queries", key_width, width, q.dtype, window is not None, group > 1, small(q))
        tile, descriptors = varied("queries", tile, q.dtype, scale)
        if descriptors:
            box = (1, 1, tile["BLOCK_N"])
            tile |= described(mask, KEYS=(k, [*box, tile["BLOCK_K"]]), VALUES=(v, [*box, tile["BLOCK_V"]]))
        programs, table, chunks = mask.split(batch, queries, tile["BLOCK_M"])
        if programs:
            _shaped_attention_bwd_q[(programs, heads)](
                q, k, v, grad, lse, delta, dq, beta, TABLE=table, chunks=chunks, **named("dq", dq), **common, **tile
            )  # fmt: skip
    return total
