"""``single_cache_attention``: decoding from one cached tensor, which serves as keys and as values.

A layer without rotary positions can keep its input x: scores are (W_Kᵀ q)·x_j, and the values are slices of x (blocks
without a value projection) or come from projecting Σ_j p_j x_j (multi-head attention). A layer whose keys are its
values, scaled and rotated, K = RoPE(g ⊙ V), can keep V and rotate what it reads. Either is half of keys and values.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gaugekit import _library
from gaugekit.ops import sharding
from gaugekit.ops.mask import Mask, check_gains, keys_of_queries
from gaugekit.ops.operands import Gain, Integers, check_tensors, gains, integers
from gaugekit.ops.single_cache_attention.sharding import rules

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
BLOCK = 64  # queries whose scores the composition holds at a time


def single_cache_attention(
    q: Tensor, cache: Tensor, *, scale: float, slices: bool = False,
    alpha: Gain | None = None, beta: Gain | None = None, gamma: Gain | None = None,
    key_gain: Tensor | None = None, cos: Tensor | None = None, sin: Tensor | None = None,
    causal: bool = True, window: int | None = None, query_start: Integers | None = None,
    key_lengths: Integers | None = None, block_table: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """β·softmax(scale·q kᵀ) v + α·v − γ·C v per head, with keys k and values v both read from ``cache``: [B, H, T, V].

    ``q`` [B, H, T, C]: queries, already rotated, or absorbed: W_{K,h}ᵀ q_h, where the cache holds the layer's input.
    ``cache`` [B, G, S, C], or [B, S, C] for G = 1, any strides; head h reads group g = h // (H/G).
    ``slices``: with False v is the whole row, V = C (project it afterwards, head by head); with True head h takes the
    columns [i·V, (i+1)·V) of its group's row, i = h % (H/G) and V = C / (H/G).
    ``cos``, ``sin`` [P, R/2], P ≥ S: k is RoPE(``key_gain`` ⊙ row), the pair of channels (i, i + C/2) of row j turned
    by the angle of cos[j, i] and sin[j, i]; the pairs from R/2 on stay. float32 (float64 beside a float64 cache).
    ``key_gain`` [C], beside them, or None for 1. Without all three k is the row itself.
    ``scale`` is the model's, and has no default, since C is not the width it is taken from.
    ``alpha``, ``beta``, ``gamma``: as in ``gaugekit.shaped_attention``; C is the uniform attention under the same mask.

    Query t of sequence b stands at position p = query_start[b] + t. ``query_start`` int64 [B] None means that the
    queries are the last rows, p = key_lengths[b] − T + t (0 + t without ``causal``). It sees rows j < key_lengths[b]
    (int64 [B]; None: S), with ``causal`` j ≤ p, with ``window`` w p − w < j; the rest as in
    ``gaugekit.shaped_attention``. Rows that no query of the call sees may hold anything.

    ``block_table`` int32 [B, P] makes the cache paged: ``cache`` is [N, G, page, C] (or [N, page, C]) then, and row j
    of sequence b is row j % page of page block_table[b, j // page]; S is P·page. Entries past a sequence's rows may
    hold anything.

    float32, float64, bfloat16 and float16, one dtype for q and cache; sums in float32 (float64). Differentiable, at the
    price of a copy of the cache: this is for decoding, ``shaped_attention`` for training. Raises ValueError for
    arguments that do not fit. Sources: He and Hofmann (ICLR 2024) for slices, XQuant (arXiv 2508.10395) for caching x.
    """
    check_tensors(q=q, cache=cache, key_gain=key_gain, cos=cos, sin=sin, block_table=block_table)
    if sharding.shared(q, cache):
        return sharding.local(single_cache_attention, rules, dict(
            q=q, cache=cache, scale=scale, slices=slices, alpha=alpha, beta=beta, gamma=gamma, key_gain=key_gain,
            cos=cos, sin=sin, causal=causal, window=window, query_start=query_start, key_lengths=key_lengths,
            block_table=block_table))  # fmt: skip
    alpha, beta, gamma = gains(q, alpha=alpha, beta=beta, gamma=gamma)
    lengths = integers("key_lengths", key_lengths, torch.int64, q.device)
    cache = cache[:, None] if cache.dim() == 3 else cache
    _check(q, cache, slices, block_table)
    _check_pages(q, cache, block_table)
    keys = cache.shape[2] * (1 if block_table is None else block_table.shape[1])
    mask = Mask.of(q.device, causal, window, query_start, lengths, None)
    mask.check(q.shape[0], q.shape[2], keys)
    check_gains(q, mask.causal, keys, alpha=alpha, beta=beta, gamma=gamma)
    _check_rotation(cache, key_gain, cos, sin, keys)
    _check_entries(cache, block_table, lengths)
    if causal and mask.query_start is None and lengths is not None:
        mask = mask._replace(query_start=lengths - q.shape[2])
    given = (q, cache, slices, alpha, beta, gamma, key_gain, cos, sin, *mask[:4], block_table, float(scale))
    learns = (q, cache, alpha, beta, gamma, key_gain)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in learns):
        with torch.autocast(q.device.type, enabled=False):
            return composition(*given)
    return torch.ops.gaugekit.single_cache_attention.default(*given)


def composition(
    q: Tensor, cache: Tensor, slices: bool, alpha: Tensor | None, beta: Tensor | None, gamma: Tensor | None,
    key_gain: Tensor | None, cos: Tensor | None, sin: Tensor | None, causal: bool, window: int | None,
    query_start: Tensor | None, key_lengths: Tensor | None, block_table: Tensor | None, scale: float,
) -> Tensor:  # fmt: skip
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    rows = (cache if block_table is None else paged(cache, block_table)).to(dtype)
    groups, keys = rows.shape[1:3]
    seen = keys_of_queries(q.shape[2], keys, Mask(causal, window, query_start, key_lengths), q.device)
    if q.numel() and keys:  # what nobody sees may be no number
        j, last = torch.arange(keys, device=q.device), seen.last.amax(1, keepdim=True)
        first = seen.first.masked_fill(seen.last <= seen.first, keys).amin(1, keepdim=True)
        rows = rows.masked_fill(((j < first) | (j >= last))[:, None, :, None], 0)
    k = rows if cos is None else rotated(rows, key_gain, cos[:keys], sin[:keys])
    queries = q.to(dtype).unflatten(1, (groups, -1))
    v = rows.unflatten(3, (queries.shape[2], -1)).permute(0, 1, 3, 2, 4) if slices else rows[:, :, None]
    parts = [
        _weights(queries[:, :, :, block] @ k[:, :, None].mT * scale, block, seen, alpha, beta, gamma) @ v
        for block in _blocks(q.shape[2])
    ]
    out = torch.cat(parts, 3) if parts else queries.new_zeros(*queries.shape[:4], v.shape[-1])
    # As [B, T, H, V] in memory, so that joining the heads copies nothing.
    return out.flatten(1, 2).to(q.dtype).transpose(1, 2).contiguous().transpose(1, 2)


def _blocks(queries: int) -> Iterator[slice]:
    return (slice(begin, min(begin + BLOCK, queries)) for begin in range(0, queries, BLOCK))


def _weights(scores, block, seen, alpha, beta, gamma):
    """β·softmax(scores) + α·I − γ·C for the queries of ``block``: scores [B, G, H/G, T, S]."""
    j = torch.arange(scores.shape[4], device=scores.device)
    first, last, own, has_own = (x[:, block, None] for x in seen)
    visible = (j >= first) & (j < last)
    some = (last > first)[:, None, None]
    weights = scores.masked_fill(~visible[:, None, None] & some, float("-inf")).softmax(-1) * some

    def of_heads(gain):
        return gain.to(scores.dtype).view(scores.shape[1], -1, 1, 1)

    if beta is not None:
        weights = weights * of_heads(beta)
    if gamma is not None:
        uniform = visible.to(scores.dtype) / (last - first).clamp(min=1)
        weights = weights - of_heads(gamma) * uniform[:, None, None]
    if alpha is not None:
        weights = weights + of_heads(alpha) * ((j == own) & has_own)[:, None, None]
    return weights


def paged(cache: Tensor, block_table: Tensor) -> Tensor:
    """The rows of each sequence, [B, G, P·page, C]: a copy. Entries that name no page read the first one."""
    pages = block_table.long()
    pages = pages.masked_fill((pages < 0) | (pages >= cache.shape[0]), 0)
    return cache[pages].transpose(1, 2).flatten(2, 3)


def rotated(rows: Tensor, gain: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE(gain ⊙ rows): rows [B, G, S, C], cos and sin [S, R/2] or [B, 1, S, R/2]."""
    rows = rows if gain is None else rows * gain.to(rows.dtype)
    pairs = cos.shape[-1]
    first, second = rows.chunk(2, -1)
    cos, sin = cos.to(rows.dtype), sin.to(rows.dtype)
    turned = first[..., :pairs] * cos - second[..., :pairs] * sin
    other = second[..., :pairs] * cos + first[..., :pairs] * sin
    return torch.cat([turned, first[..., pairs:], other, second[..., pairs:]], -1)


def _check(q: Tensor, cache: Tensor, slices: bool, block_table: Tensor | None) -> None:
    if q.dim() != 4 or q.dtype not in DTYPES or q.shape[3] < 1 or q.shape[1] < 1:
        raise ValueError(
            "q: expected [B, H, T, C] of float32, float64, bfloat16 or float16, "
            f"got {list(q.shape)} of {q.dtype}"
        )
    batch, heads, _, width = q.shape
    layout = f"[B, G, S, C], B = {batch}" if block_table is None else "[N, G, page, C]"
    fits = cache.dim() == 4 and cache.shape[3] == width and cache.shape[1] > 0 and not heads % cache.shape[1]
    if not fits or (block_table is None and cache.shape[0] != batch):
        raise ValueError(
            f"cache: expected {layout}, G dividing H = {heads} and C = {width}, got {list(cache.shape)}"
        )
    if cache.dtype != q.dtype or cache.device != q.device:
        raise ValueError(
            f"cache: expected {q.dtype} on {q.device} like q, got {cache.dtype} on {cache.device}"
        )
    if slices and width % (heads // cache.shape[1]):
        raise ValueError(f"slices: expected C divisible by H/G = {heads // cache.shape[1]}, got C = {width}")


def _check_rotation(
    cache: Tensor, gain: Tensor | None, cos: Tensor | None, sin: Tensor | None, keys: int
) -> None:
    width = cache.shape[3]
    if (cos is None) != (sin is None):
        raise ValueError(
            f"{'cos' if cos is None else 'sin'}: expected beside {'sin' if cos is None else 'cos'}, got None"
        )
    if gain is not None and cos is None:
        raise ValueError(
            "key_gain: expected beside cos and sin, got them None (without a rotation multiply q by it)"
        )
    if gain is not None and (gain.shape != (width,) or gain.dtype not in (torch.float32, cache.dtype)):
        raise ValueError(
            f"key_gain: expected [C] = [{width}], float32 or {cache.dtype}, got {list(gain.shape)}, {gain.dtype}"
        )
    if cos is None:
        return
    dtype = torch.float64 if cache.dtype == torch.float64 else torch.float32
    for name, table in (("cos", cos), ("sin", sin)):
        fits = table.dim() == 2 and table.shape == cos.shape and table.shape[0] >= keys
        if not fits or not 1 <= table.shape[1] <= width / 2 or width % 2 or table.dtype != dtype:
            raise ValueError(
                f"{name}: expected [P, R/2] of {dtype}, P at least {keys} and R at most an even C, got "
                f"{list(table.shape)} of {table.dtype}, C = {width}"
            )
    for name, x in (("key_gain", gain), ("cos", cos), ("sin", sin)):
        if x is not None and x.device != cache.device:
            raise ValueError(f"{name}: expected it on {cache.device} like cache, got {x.device}")


def _check_pages(q: Tensor, cache: Tensor, block_table: Tensor | None) -> None:
    if block_table is None:
        return
    if block_table.dtype != torch.int32 or block_table.dim() != 2 or block_table.shape[0] != q.shape[0]:
        raise ValueError(
            f"block_table: expected int32 [B, P], B = {q.shape[0]}, got {block_table.dtype} "
            f"{list(block_table.shape)}"
        )
    if block_table.device != cache.device or cache.shape[2] < 1:
        raise ValueError(
            f"block_table: expected it on {cache.device} like cache, and pages of at least one row, got "
            f"{block_table.device} and {cache.shape[2]} rows"
        )


def _check_entries(cache: Tensor, block_table: Tensor | None, lengths: Tensor | None) -> None:
    """On the host; on a GPU reading them would stop the stream."""
    if block_table is None or block_table.device.type != "cpu" or torch.compiler.is_compiling():
        return
    wrong = (block_table < 0) | (block_table >= cache.shape[0])
    if lengths is not None:
        wrong &= torch.arange(block_table.shape[1]) * cache.shape[2] < lengths[:, None]
    if wrong.any():
        raise ValueError(
            f"block_table: expected pages 0 to {cache.shape[0] - 1}, got {block_table[wrong].tolist()[:4]}"
        )


def fake(q, cache, slices, *rest):
    width = q.shape[3] // (q.shape[1] // cache.shape[1]) if slices else q.shape[3]
    shape = (q.shape[0], q.shape[1], q.shape[2], width)
    return torch.empty_permuted(shape, (0, 2, 1, 3), dtype=q.dtype, device=q.device)


ARGUMENTS = (
    "Tensor q, Tensor cache, bool slices, Tensor? alpha, Tensor? beta, Tensor? gamma, Tensor? key_gain, Tensor? cos, "
    "Tensor? sin, bool causal, int? window, Tensor? query_start, Tensor? key_lengths, Tensor? block_table, float scale"
)
_library.define(f"single_cache_attention({ARGUMENTS}) -> Tensor", composition, fake)
