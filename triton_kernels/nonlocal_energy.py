"""Triton nonlocal energy: e_i = ½ s_i + ½ (A s)_i − u_i·o_i, A = softmax(scale·q kᵀ), o = A u, s_i = ‖u_i‖², u centred.

Forward: flash attention over values u, with (A s)_i as one more number a row in the loop. Backward, from g_i = ∂J/∂e_i,
ℓ_i = ∂J/∂log_i and δ_i = g_i (e_i − ½ s_i) − ℓ_i: ∂J/∂score_ij = A_ij (g_i (½ s_j − u_i·u_j) − δ_i). One program a
block of keys walks the queries that see it for dk and for what u gets as a key, and adds what it gets as a query,
g (u − o); one a block of queries walks its keys for dq. Every sum is in a fixed order. Words as in shaped_attention.
"""

import torch
import triton
import triton.language as tl

from .shaped_attention import LOG2E, LOW, _load, _product, _reach, tiles
from .shaped_combine import _head, _put, _seen, _tile
from .shaped_combine_launch import interpretable, named


@triton.jit
def _place(index, chunks, lengths, T):
    """Batch row, block and number of real tokens of program ``index``."""
    batch = index // chunks
    real = batch * 0 + T
    if lengths is not None:
        real = tl.minimum(tl.maximum(tl.load(lengths + batch), 0), T).to(tl.int32)
    return batch, index % chunks, real


@triton.jit
def _numbers(pointer, batch, heads, head, T):
    """The [T] numbers of one head in a dense [B, heads, T]."""
    return pointer + (batch.to(tl.int64) * heads + head) * T


@triton.jit
def _rows(block, real, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr):
    """The first query of a block, the queries, where the keys that each sees end (0: it sees none), where the blocks of
    keys that all of them see end, and where the last block does.
    """
    t = block * BLOCK_M
    i = t + tl.arange(0, BLOCK_M)
    lo, hi = _seen(i, real, 0, CAUSAL, False)
    hi = tl.where(i < real, hi, lo)
    _, _, n_edge, n1 = _reach(lo, hi, BLOCK_N, False)
    return t, i, hi, n_edge, n1


@triton.jit
def _walk(
    acc, spread, total, top, q, k, u, square, n0, n1, keys, hi, scale, MASKED: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The online softmax over keys [n0, n1): Σ 2^(s − top) times u, ‖u‖² and 1, s in base 2."""
    for n in range(n0, n1, BLOCK_N):
        j = n + tl.arange(0, BLOCK_N)
        s = _product(q, tl.trans(_load(k, n, keys, MASKED, K, BLOCK_N, BLOCK_K))) * scale
        if MASKED:
            s = tl.where(j[None, :] < hi[:, None], s, LOW)
            norm = tl.load(square + j, j < keys, other=0.0)
        else:
            norm = tl.load(square + j)
        highest = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - highest[:, None])
        shrink = tl.exp2(top - highest)
        total = total * shrink + tl.sum(p, 1)
        spread = spread * shrink + tl.sum(p * norm[None, :], 1)
        acc = acc * shrink[:, None]
        acc += _product(p.to(q.dtype), _load(u, n, keys, MASKED, V, BLOCK_N, BLOCK_V))
        top = highest
    return acc, spread, total, top


@triton.jit(do_not_specialize=("chunks",))
def _nonlocal_energy_fwd(
    U, Q, K, SQUARE, OUT, ENERGY, LOG, LENGTHS,
    u_b, u_h, u_t, u_d, q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, o_b, o_h, o_t, o_d, scale, T, chunks,
    U_GROUP: tl.constexpr, K_GROUP: tl.constexpr, KEY_WIDTH: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    index = tl.num_programs(0) - 1 - tl.program_id(0)  # under a causal mask the longest rows first
    h = tl.program_id(1)
    heads = tl.num_programs(1)
    batch, block, real = _place(index, chunks, LENGTHS, T)
    zero = batch * 0
    q = _head(Q, batch, h, zero, q_b, q_h, q_t, q_d)
    k = _head(K, batch, h // K_GROUP, zero, k_b, k_h, k_t, k_d)
    u = _head(U, batch, h // U_GROUP, zero, u_b, u_h, u_t, u_d)
    square = _numbers(SQUARE, batch, heads // U_GROUP, h // U_GROUP, T)
    t, i, hi, n_edge, n1 = _rows(block, real, BLOCK_M, BLOCK_N, CAUSAL)
    x = _tile(q, t, real, KEY_WIDTH, BLOCK_M, BLOCK_K)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    spread = tl.zeros([BLOCK_M], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.zeros([BLOCK_M], tl.float32) + LOW
    step = scale * LOG2E
    acc, spread, total, top = _walk(acc, spread, total, top, x, k, u, square, 0, n_edge, real, hi, step, False,
                                    KEY_WIDTH, WIDTH, BLOCK_N, BLOCK_K, BLOCK_V)  # fmt: skip
    acc, spread, total, top = _walk(acc, spread, total, top, x, k, u, square, n_edge, n1, real, hi, step, True,
                                    KEY_WIDTH, WIDTH, BLOCK_N, BLOCK_K, BLOCK_V)  # fmt: skip
    some = hi > 0
    total = tl.where(some, total, 1.0)
    acc *= tl.where(some, 1.0 / total, 0.0)[:, None]
    _put(_head(OUT, batch, h, zero, o_b, o_h, o_t, o_d), acc, t, T, WIDTH, BLOCK_M, BLOCK_V)
    own = _tile(u, t, real, WIDTH, BLOCK_M, BLOCK_V).to(tl.float32)
    norm = tl.load(square + i, some, other=0.0)
    energy = 0.5 * (norm + spread / total) - tl.sum(own * acc, 1)
    row = _numbers(LOG, batch, heads, h, T) + i
    tl.store(row, tl.where(some, (top + tl.log2(total)) / LOG2E, float("-inf")), i < T)
    tl.store(_numbers(ENERGY, batch, heads, h, T) + i, tl.where(some, energy, 0.0), i < T)


@triton.jit(do_not_specialize=("chunks",))
def _nonlocal_energy_bwd_kv(
    U, Q, K, SQUARE, OUT, LOG, GRAD, DELTA, DU, DK, LENGTHS,
    u_b, u_h, u_t, u_d, q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, o_b, o_h, o_t, o_d,
    du_b, du_h, du_t, du_d, dk_b, dk_h, dk_t, dk_d, scale, T, chunks,
    U_GROUP: tl.constexpr, K_GROUP: tl.constexpr, KEY_WIDTH: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr,
    ROW: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(1)
    heads = tl.num_programs(1)
    batch, block, real = _place(tl.program_id(0), chunks, LENGTHS, T)
    zero = batch * 0
    q = _head(Q, batch, h, zero, q_b, q_h, q_t, q_d)
    k = _head(K, batch, h // K_GROUP, zero, k_b, k_h, k_t, k_d)
    u = _head(U, batch, h // U_GROUP, zero, u_b, u_h, u_t, u_d)
    grad = _numbers(GRAD, batch, heads, h, T)
    log = _numbers(LOG, batch, heads, h, T)
    delta = _numbers(DELTA, batch, heads, h, T)
    n0 = block * BLOCK_N
    n = n0 + tl.arange(0, BLOCK_N)
    x = _tile(k, n0, real, KEY_WIDTH, BLOCK_N, BLOCK_K)
    y = _tile(u, n0, real, WIDTH, BLOCK_N, BLOCK_V)
    half = 0.5 * tl.load(_numbers(SQUARE, batch, heads // U_GROUP, h // U_GROUP, T) + n, n < real, other=0.0)
    dk = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    pulled = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    weight = tl.zeros([BLOCK_N], tl.float32)
    t0 = n0 * 0
    if CAUSAL:
        t0 = n0 // BLOCK_M * BLOCK_M
    for t in range(t0, tl.where(n0 < real, real, t0), BLOCK_M):
        i = t + tl.arange(0, BLOCK_M)
        z = _tile(q, t, real, KEY_WIDTH, BLOCK_M, BLOCK_K)
        w = _tile(u, t, real, WIDTH, BLOCK_M, BLOCK_V)
        base = tl.load(log + i, i < real, other=0.0) * LOG2E
        p = tl.exp2(_product(x, tl.trans(z)) * (scale * LOG2E) - base[None, :])
        if CAUSAL:
            p = tl.where(n[:, None] <= i[None, :], p, 0.0)
        g = tl.load(grad + i, i < real, other=0.0)
        pg = p * g[None, :]
        near = half[:, None] - _product(y, tl.trans(w))
        ds = pg * near - p * tl.load(delta + i, i < real, other=0.0)[None, :]
        dk += _product(ds.to(z.dtype), z)
        if not ROW:
            pulled += _product(pg.to(w.dtype), w)
            weight += tl.sum(pg, 1)
    there = (n < real)[:, None]
    dk = tl.where(there, dk * scale, 0.0)
    _put(_head(DK, batch, h, zero, dk_b, dk_h, dk_t, dk_d), dk, n0, T, KEY_WIDTH, BLOCK_N, BLOCK_K)
    y = y.to(tl.float32)
    out = _tile(_head(OUT, batch, h, zero, o_b, o_h, o_t, o_d), n0, real, WIDTH, BLOCK_N, BLOCK_V).to(
        tl.float32
    )
    du = tl.load(grad + n, n < real, other=0.0)[:, None] * (y - out)
    if not ROW:
        du += weight[:, None] * y - pulled
    du = tl.where(there, du, 0.0)
    _put(_head(DU, batch, h, zero, du_b, du_h, du_t, du_d), du, n0, T, WIDTH, BLOCK_N, BLOCK_V)


@triton.jit
def _gather(
    dq, q, own, k, u, square, base, g, delta, n0, n1, keys, hi, scale, MASKED: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """What keys [n0, n1) add to dq/scale."""
    for n in range(n0, n1, BLOCK_N):
        j = n + tl.arange(0, BLOCK_N)
        x = _load(k, n, keys, MASKED, K, BLOCK_N, BLOCK_K)
        p = tl.exp2(_product(q, tl.trans(x)) * scale - base[:, None])
        if MASKED:
            p = tl.where(j[None, :] < hi[:, None], p, 0.0)
            norm = tl.load(square + j, j < keys, other=0.0)
        else:
            norm = tl.load(square + j)
        y = _load(u, n, keys, MASKED, V, BLOCK_N, BLOCK_V)
        near = 0.5 * norm[None, :] - _product(own, tl.trans(y))
        ds = p * (g[:, None] * near - delta[:, None])
        dq += _product(ds.to(x.dtype), x)
    return dq


@triton.jit(do_not_specialize=("chunks",))
def _nonlocal_energy_bwd_q(
    U, Q, K, SQUARE, LOG, GRAD, DELTA, DQ, LENGTHS,
    u_b, u_h, u_t, u_d, q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, dq_b, dq_h, dq_t, dq_d, scale, T, chunks,
    U_GROUP: tl.constexpr, K_GROUP: tl.constexpr, KEY_WIDTH: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    index = tl.num_programs(0) - 1 - tl.program_id(0)
    h = tl.program_id(1)
    heads = tl.num_programs(1)
    batch, block, real = _place(index, chunks, LENGTHS, T)
    zero = batch * 0
    q = _head(Q, batch, h, zero, q_b, q_h, q_t, q_d)
    k = _head(K, batch, h // K_GROUP, zero, k_b, k_h, k_t, k_d)
    u = _head(U, batch, h // U_GROUP, zero, u_b, u_h, u_t, u_d)
    square = _numbers(SQUARE, batch, heads // U_GROUP, h // U_GROUP, T)
    t, i, hi, n_edge, n1 = _rows(block, real, BLOCK_M, BLOCK_N, CAUSAL)
    some = hi > 0
    x = _tile(q, t, real, KEY_WIDTH, BLOCK_M, BLOCK_K)
    own = _tile(u, t, real, WIDTH, BLOCK_M, BLOCK_V)
    base = tl.load(_numbers(LOG, batch, heads, h, T) + i, some, other=0.0) * LOG2E
    g = tl.load(_numbers(GRAD, batch, heads, h, T) + i, some, other=0.0)
    delta = tl.load(_numbers(DELTA, batch, heads, h, T) + i, some, other=0.0)
    dq = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    step = scale * LOG2E
    dq = _gather(dq, x, own, k, u, square, base, g, delta, 0, n_edge, real, hi, step, False,
                 KEY_WIDTH, WIDTH, BLOCK_N, BLOCK_K, BLOCK_V)  # fmt: skip
    dq = _gather(dq, x, own, k, u, square, base, g, delta, n_edge, n1, real, hi, step, True,
                 KEY_WIDTH, WIDTH, BLOCK_N, BLOCK_K, BLOCK_V)  # fmt: skip
    dq = tl.where(some[:, None], dq * scale, 0.0)
    _put(_head(DQ, batch, h, zero, dq_b, dq_h, dq_t, dq_d), dq, t, T, KEY_WIDTH, BLOCK_M, BLOCK_K)


def _launch(part: str, u, q, k, square, key_lengths) -> tuple[tuple[int, int], dict]:
    """Grid and common arguments of the kernel ``part`` (forward, keys, queries)."""
    (batch, heads, tokens, key_width), width = q.shape, u.shape[3]
    tile = tiles(part, key_width, width, q.dtype, False, False)
    if part == "keys" and q.dtype == torch.float32 and max(tile["BLOCK_K"], tile["BLOCK_V"]) > 64:
        tile |= {"BLOCK_M": 16, "BLOCK_N": 16}  # two accumulators and p beside them spill in larger tiles
    chunks = triton.cdiv(tokens, tile["BLOCK_N" if part == "keys" else "BLOCK_M"])
    groups = {"U_GROUP": heads // u.shape[1], "K_GROUP": heads // k.shape[1]}
    common = {"U": u, "Q": q, "K": k, "SQUARE": square, **named("u", u), **named("q", q), **named("k", k), "T": tokens,
              "chunks": chunks, "LENGTHS": key_lengths, "KEY_WIDTH": key_width, "WIDTH": width}  # fmt: skip
    return (batch * chunks, heads), common | groups | tile


@interpretable("out")
def nonlocal_energy(u, q, k, square, causal, key_lengths, scale, energies, log, out) -> None:
    """Writes the rows' energies and log-sum-exps, float32 [B, H, T], and o [B, H, T, V]; 0, −∞ and 0 for padding.

    u [B, ·, T, V] centred, q [B, H, T, K], k [B, ·, T, K] (heads dividing H): float32, bfloat16 or float16, widths in
    8..128, any strides. ``square`` float32 [B, ·, T], the norms ‖u‖²; ``key_lengths`` int64 [B] or None.
    """
    grid, common = _launch("forward", u, q, k, square, key_lengths)
    with torch.cuda.device_of(q):
        _nonlocal_energy_fwd[grid](
            OUT=out, ENERGY=energies, LOG=log, **named("o", out), scale=scale, CAUSAL=causal, **common
        )


@interpretable("du", "dq", "dk")
def nonlocal_energy_backward(
    grad, delta, u, q, k, square, log, out, causal, key_lengths, scale, row, du, dq, dk
) -> None:
    """Writes dq, and du [B, H, T, V] and dk [B, H, T, K], one for each query head; ``row``: u_j is held constant.

    ``grad`` and ``delta`` float32 [B, H, T] are g and δ; the rest is what the forward pass took and gave.
    """
    grid, common = _launch("keys", u, q, k, square, key_lengths)
    rows = {"LOG": log, "GRAD": grad, "DELTA": delta, "scale": scale, "CAUSAL": causal}
    with torch.cuda.device_of(q):
        _nonlocal_energy_bwd_kv[grid](
            OUT=out, DU=du, DK=dk, **named("o", out), **named("du", du), **named("dk", dk), ROW=row, **rows, **common
        )  # fmt: skip
        grid, common = _launch("queries", u, q, k, square, key_lengths)
        _nonlocal_energy_bwd_q[grid](DQ=dq, **named("dq", dq), **rows, **common)
