"""Triton attention whose keys and values are both rows of one cache: β·softmax(scale·q kᵀ) v + α·v − γ·C v.

One program takes all heads of a group and one split of a sequence's rows. It walks the rows in tiles and each tile
twice, channels a piece at a time: for the scores, from memory, and for the weighted sums, from the cache of the second
level. The uniform attention C is one more row a query, whose scores are 0. What a split leaves is added up in order by
a second kernel, so that a result depends on no card and repeats to the bit.
"""

import torch
import triton
import triton.language as tl

from .shaped_attention import LOG2E, LOW
from .shaped_combine import _seen
from .shaped_combine_launch import Mask, interpretable, named

SPLIT = 512  # rows of the cache; a constant, whatever the card and the batch


@triton.jit
def _rows_at(cache, j, here, batch, TABLE, page, pages, stride_b, stride_t):
    """The addresses of rows ``j`` of a sequence, those of them that are ``here``."""
    if TABLE is not None:
        block = tl.load(TABLE + batch.to(tl.int64) * pages + j // page, here, 0).to(tl.int64)
        return cache + block * stride_b + (j % page).to(tl.int64) * stride_t
    return cache + batch.to(tl.int64) * stride_b + j.to(tl.int64) * stride_t


@triton.jit
def _keys_and_start(batch, START, LENGTHS, T, S, CAUSAL: tl.constexpr):
    """(keys of the sequence, position of its first query)."""
    keys = S
    if LENGTHS is not None:
        keys = tl.minimum(tl.maximum(tl.load(LENGTHS + batch), 0), S).to(tl.int32)
    start = S - T if CAUSAL else 0
    if START is not None:  # positions that 32 bits do not hold see what those far away see
        start = tl.minimum(tl.maximum(tl.load(START + batch), -(1 << 29)), 1 << 29).to(tl.int32)
    return keys, start


@triton.jit
def _turned(x, y, GAIN, COS, SIN, j, c, here, inside, HALF: tl.constexpr, PAIRS: tl.constexpr):
    """Channels ``c`` and HALF + c of the keys RoPE(gain ⊙ row), of rows ``j``, whose values are ``x`` and ``y``."""
    x, y = x.to(tl.float32), y.to(tl.float32)
    if GAIN is not None:
        x *= tl.load(GAIN + c, inside, 0.0).to(tl.float32)[None, :]
        y *= tl.load(GAIN + HALF + c, inside, 0.0).to(tl.float32)[None, :]
    place = j[:, None] * PAIRS + c[None, :]
    turns = here[:, None] & (c < PAIRS)[None, :]
    cos = tl.load(COS + place, turns, 1.0)
    sin = tl.load(SIN + place, turns, 0.0)
    return x * cos - y * sin, y * cos + x * sin


@triton.jit(do_not_specialize=("window", "rows", "means", "split"))
def _single_cache_attention_fwd(
    Q, CACHE, GAIN, COS, SIN, START, LENGTHS, TABLE, SUMS, MEANS, TOPS, TOTALS,
    q_b, q_h, q_t, q_d, x_b, x_h, x_t, x_d, scale, T, S, G, window, page, pages, rows, means, split,
    REPEATS: tl.constexpr, WIDTH: tl.constexpr, VALUES: tl.constexpr, PAIRS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    index, batch, group = tl.program_id(0), tl.program_id(1) // G, tl.program_id(1) % G
    part = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + index
    r = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    real = r < rows
    t = r % T
    head = r // T
    keys, start = _keys_and_start(batch, START, LENGTHS, T, S, CAUSAL)
    lo, hi = _seen(start + t, keys, window, CAUSAL, WINDOWED)
    hi = tl.where(r < rows + means, hi, lo)
    n1 = tl.minimum(tl.max(tl.where(hi > lo, hi, 0), 0), (index + 1) * split)
    n0 = index * split
    if WINDOWED:  # the window's first row, at the beginning of its tile
        n0 = tl.maximum(n0, tl.min(tl.where(hi > lo, lo, n1), 0) // BLOCK_N * BLOCK_N)
    cache = CACHE + group.to(tl.int64) * x_h
    q = (
        Q
        + batch.to(tl.int64) * q_b
        + ((group * REPEATS + head).to(tl.int64) * q_h + t.to(tl.int64) * q_t)[:, None]
    )
    sums = SUMS + (part * rows + r)[:, None] * VALUES
    top = tl.zeros([BLOCK_M], tl.float32) + LOW
    total = tl.zeros([BLOCK_M], tl.float32)
    c = tl.arange(0, BLOCK_C)
    for first in range(n0, n1, BLOCK_N):
        j = first + tl.arange(0, BLOCK_N)
        here = j < n1
        x = _rows_at(cache, j, here, batch, TABLE, page, pages, x_b, x_t)[:, None]
        s = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if COS is not None:
            HALF: tl.constexpr = WIDTH // 2
            for begin in range(0, HALF, BLOCK_C):
                inside = begin + c < HALF
                at = (begin + c)[None, :]
                mask = here[:, None] & inside[None, :]
                k, other = _turned(
                    tl.load(x + at * x_d, mask, 0.0), tl.load(x + (HALF + at) * x_d, mask, 0.0),
                    GAIN, COS, SIN, j, begin + c, here, inside, HALF, PAIRS,
                )  # fmt: skip
                mask = real[:, None] & inside[None, :]
                left, right = tl.load(q + at * q_d, mask, 0.0), tl.load(q + (HALF + at) * q_d, mask, 0.0)
                s = tl.dot(left, tl.trans(k.to(left.dtype)), s, input_precision="ieee")
                s = tl.dot(right, tl.trans(other.to(right.dtype)), s, input_precision="ieee")
        else:
            for begin in range(0, WIDTH, BLOCK_C):
                inside = (begin + c < WIDTH)[None, :]
                at = (begin + c)[None, :]
                k = tl.load(x + at * x_d, here[:, None] & inside, 0.0)
                left = tl.load(q + at * q_d, real[:, None] & inside, 0.0)
                s = tl.dot(left, tl.trans(k), s, input_precision="ieee")
        visible = (j[None, :] >= lo[:, None]) & (j[None, :] < hi[:, None])
        s = tl.where(visible, s * (scale * LOG2E), LOW)
        highest = tl.maximum(top, tl.max(s, 1))
        p = tl.where(visible, tl.exp2(s - highest[:, None]), 0.0)
        keep = tl.exp2(top - highest)
        total = total * keep + tl.sum(p, 1)
        top = highest
        p = p.to(CACHE.dtype.element_ty)
        for begin in range(0, WIDTH, BLOCK_C):
            at = (begin + c)[None, :]
            inside = at < WIDTH
            v = tl.load(x + at * x_d, here[:, None] & inside, 0.0)
            sum = tl.dot(p, v, input_precision="ieee")
            column = at - (head * VALUES)[:, None] if VALUES < WIDTH else at + r[:, None] * 0
            own = real[:, None] & inside & (column >= 0) & (column < VALUES)
            if first > n0:
                sum += keep[:, None] * tl.load(sums + column, own, 0.0)
            tl.store(sums + column, sum, own)
            if MEANS is not None:
                mean = MEANS + (part * T + r - rows)[:, None] * WIDTH + at
                wanted = (~real & (r < rows + means))[:, None] & inside
                if first > n0:
                    sum += keep[:, None] * tl.load(mean, wanted, 0.0)
                tl.store(mean, sum, wanted)
        tl.debug_barrier()  # what one thread left another may add to
    tl.store(TOPS + part * (rows + means) + r, top, r < rows + means)
    tl.store(TOTALS + part * (rows + means) + r, total, r < rows + means)


@triton.jit
def _split_weights(TOPS, TOTALS, part, row, splits, each, BLOCK_S: tl.constexpr):
    """(the highest of the splits' maxima, the sum of their totals beside it) of one row."""
    s = tl.arange(0, BLOCK_S)
    at = (part + s) * each + row
    top = tl.load(TOPS + at, s < splits, LOW)
    most = tl.max(top, 0)
    return most, tl.sum(tl.exp2(top - most) * tl.load(TOTALS + at, s < splits, 0.0), 0)


@triton.jit(do_not_specialize=("window", "rows", "means", "splits", "split"))
def _single_cache_attention_combine(
    SUMS, MEANS, TOPS, TOTALS, CACHE, OUT, ALPHA, BETA, GAMMA, START, LENGTHS, TABLE,
    x_b, x_h, x_t, x_d, o_b, o_h, o_t, o_d, T, S, G, window, page, pages, rows, means, splits, split,
    REPEATS: tl.constexpr, WIDTH: tl.constexpr, VALUES: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    r, batch, group = tl.program_id(0), tl.program_id(1) // G, tl.program_id(1) % G
    part = tl.program_id(1).to(tl.int64) * splits
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < VALUES
    t, head = r % T, group * REPEATS + r // T
    shift = r // T * VALUES if VALUES < WIDTH else 0
    keys, start = _keys_and_start(batch, START, LENGTHS, T, S, CAUSAL)
    position = start + t
    lo, hi = _seen(position, keys, window, CAUSAL, WINDOWED)
    some = hi > lo
    each = rows + means
    most, total = _split_weights(TOPS, TOTALS, part, r, splits, each, BLOCK_S)
    out = tl.zeros([BLOCK_C], tl.float32)
    if some:
        for s in range(lo // split, (hi - 1) // split + 1):
            weight = tl.exp2(tl.load(TOPS + (part + s) * each + r) - most)
            out += weight * tl.load(SUMS + ((part + s) * rows + r) * VALUES + c, inside, 0.0)
        out /= total
    if BETA is not None:
        out *= tl.load(BETA + head).to(tl.float32)
    if MEANS is not None:
        most, total = _split_weights(TOPS, TOTALS, part, rows + t, splits, each, BLOCK_S)
        mean = tl.zeros([BLOCK_C], tl.float32)
        if some:
            for s in range(lo // split, (hi - 1) // split + 1):
                weight = tl.exp2(tl.load(TOPS + (part + s) * each + rows + t) - most)
                mean += weight * tl.load(MEANS + ((part + s) * T + t) * WIDTH + shift + c, inside, 0.0)
            mean /= total
        out -= tl.load(GAMMA + head).to(tl.float32) * mean
    if ALPHA is not None:
        here = inside & (position >= 0) & (position < keys)
        cache = CACHE + group.to(tl.int64) * x_h
        j = tl.zeros([BLOCK_C], tl.int32) + tl.maximum(position, 0)
        own = _rows_at(cache, j, here, batch, TABLE, page, pages, x_b, x_t)
        own = tl.load(own + (shift + c) * x_d, here, 0.0).to(tl.float32)
        out += tl.load(ALPHA + head).to(tl.float32) * own
    place = OUT + batch.to(tl.int64) * o_b + head.to(tl.int64) * o_h + t.to(tl.int64) * o_t
    tl.store(place + c * o_d, out.to(OUT.dtype.element_ty), inside)


def tile(width: int, rows: int, dtype: torch.dtype, turned: bool) -> dict:
    """Query rows, cache rows and channels of a tile: its rows stay in the second level's cache between both walks.

    A piece of turned keys is two of so many channels.
    """
    queries = min(64, max(16, triton.next_power_of_2(rows)))
    sizes = {"BLOCK_M": queries, "num_warps": 8 if queries == 64 else 4}
    if dtype == torch.float32:  # multiplied in registers
        return sizes | {"BLOCK_N": 32, "BLOCK_C": 16 if turned else 32, "num_stages": 2}
    return sizes | {"BLOCK_N": 64 if width <= 1024 else 32, "BLOCK_C": 32 if turned else 64, "num_stages": 3}


@interpretable("out")
def single_cache_attention(
    q, cache, slices, alpha, beta, gamma, key_gain, cos, sin, causal, window, query_start, key_lengths, block_table,
    scale, out,
) -> None:  # fmt: skip
    """Writes β·A + α·v − γ·C v to ``out`` [B, H, T, V].

    q [B, H, T, C], cache [B, G, S, C] or pages [N, G, page, C]: float32, bfloat16 or float16, any strides; arguments
    as in ``gaugekit.single_cache_attention``, checked there. At least one query and one row of the cache.
    """
    (batch, heads, queries, width), (groups, page) = q.shape, cache.shape[1:3]
    keys, repeats = page if block_table is None else page * block_table.shape[1], heads // groups
    rows, means = repeats * queries, queries if gamma is not None else 0
    splits, values = triton.cdiv(keys, SPLIT), out.shape[3]
    mask = Mask(causal, window, query_start, key_lengths, None)
    held = {name: x for name, x in mask.tensors.items() if name != "BOUNDS"}
    held["TABLE"] = None if block_table is None else block_table.contiguous()
    flags = {name: flag for name, flag in mask.flags.items() if name != "PACKED"}
    dense = [None if x is None else x.contiguous() for x in (key_gain, cos, sin, alpha, beta, gamma)]

    def part(*shape):
        return torch.empty(batch * groups, splits, *shape, dtype=torch.float32, device=q.device)

    sums, tops, totals = part(rows, values), part(rows + means), part(rows + means)
    mean = part(means, width) if means else None
    sizes = tile(width, rows + means, q.dtype, cos is not None)
    common = dict(T=queries, S=keys, G=groups, window=mask.window, page=page, pages=keys // page, rows=rows,
                  means=means, split=SPLIT, REPEATS=repeats, WIDTH=width, VALUES=values, **flags, **held)  # fmt: skip
    with torch.cuda.device_of(q):
        _single_cache_attention_fwd[(splits, batch * groups, triton.cdiv(rows + means, sizes["BLOCK_M"]))](
            q, cache, *dense[:3], SUMS=sums, MEANS=mean, TOPS=tops, TOTALS=totals, **named("q", q), **named("x", cache),
            scale=scale, PAIRS=0 if cos is None else cos.shape[1], **common, **sizes)  # fmt: skip
        block = max(16, min(256, triton.next_power_of_2(values)))
        _single_cache_attention_combine[(rows, batch * groups, triton.cdiv(values, block))](
            sums, mean, tops, totals, cache, out, *dense[3:], **named("x", cache), **named("o", out), splits=splits,
            BLOCK_C=block, BLOCK_S=max(16, triton.next_power_of_2(splits)), num_warps=4, **common)  # fmt: skip
