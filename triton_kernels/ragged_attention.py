"""Triton attention in which every head has a rank of its own: A = softmax(scale·Q_h K_hᵀ) V.

Queries [B, T, ΣR] and keys [B, S, ΣR] hold their heads one after the other. Heads whose rank rounds up to the same
tile (16, 32, 64, 128, 256 columns) share a launch; inside it the rank is a number read at run time that masks the
tile's last columns, so that no head pays for the widest and no rank costs a compilation. Words and helpers as in
shaped_attention.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .shaped_attention import LOG2E, LOW, _attend, _rank_tile, _reach, tiles
from .shaped_combine import _head, _put, _seen, _sequence
from .shaped_combine_launch import Mask, interpretable, named, small


@triton.jit
def _rank_put(matrix, x, first, stop, rank, BLOCK_T: tl.constexpr, BLOCK: tl.constexpr):
    """Writes ``x`` to rows [first, first + BLOCK_T), those inside [0, stop), columns before ``rank``."""
    pointer, stride, stride_last = matrix
    row = first + tl.arange(0, BLOCK_T)
    column = tl.arange(0, BLOCK)
    mask = ((row >= 0) & (row < stop))[:, None] & (column < rank)[None, :]
    address = pointer + row.to(tl.int64)[:, None] * stride + column[None, :] * stride_last
    tl.store(address, x.to(pointer.dtype.element_ty), mask)


@triton.jit
def _columns(pointer, batch, first, offset, stride_b, stride_t, stride_d):
    """The matrix of the head whose columns start at ``offset``, from row ``first`` on."""
    base = pointer + batch.to(tl.int64) * stride_b + offset.to(tl.int64) * stride_d
    return base + first.to(tl.int64) * stride_t, stride_t, stride_d


@triton.jit(do_not_specialize=("window", "chunks"))
def _ragged_attention_fwd(
    Q, K, V, A, LSE, HEADS, RANKS, Q_OFFSETS, K_OFFSETS, BOUNDS, TABLE, START, LENGTHS,
    q_b, q_t, q_d, k_b, k_t, k_d, v_b, v_h, v_t, v_d, a_b, a_h, a_t, a_d, scale, T, S, H, window, chunks,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    index = tl.num_programs(0) - 1 - tl.program_id(0)  # under a causal mask the longest rows first
    h = tl.load(HEADS + tl.program_id(1) // GROUP) * GROUP + tl.program_id(1) % GROUP
    rank = tl.load(RANKS + h // GROUP)
    batch, block, first, place = _sequence(index, chunks, BOUNDS, TABLE, START, LENGTHS, T, S, CAUSAL, PACKED)
    rows, keys, start = place
    q = _columns(Q, batch, first, tl.load(Q_OFFSETS + h), q_b, q_t, q_d)
    k = _columns(K, batch, first, tl.load(K_OFFSETS + h // GROUP), k_b, k_t, k_d)
    v = _head(V, batch, h // GROUP, first, v_b, v_h, v_t, v_d)
    t = block * BLOCK_M
    i = t + tl.arange(0, BLOCK_M)
    lo, hi = _seen(start + i, keys, window, CAUSAL, WINDOWED)
    hi = tl.where(i < rows, hi, lo)
    n0, _, n_edge, n1 = _reach(lo, hi, BLOCK_N, WINDOWED)
    x = _rank_tile(q, t, rows, rank, BLOCK_M, BLOCK_K)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.zeros([BLOCK_M], tl.float32) + LOW
    step = scale * LOG2E
    if WINDOWED:
        n_edge = n0
    else:
        acc, total, top = _attend(acc, total, top, x, k, v, 0, n_edge, keys, lo, hi, step, False,
                                  BLOCK_K, WIDTH, BLOCK_N, BLOCK_K, BLOCK_V, rank)  # fmt: skip
    acc, total, top = _attend(acc, total, top, x, k, v, n_edge, n1, keys, lo, hi, step, True,
                              BLOCK_K, WIDTH, BLOCK_N, BLOCK_K, BLOCK_V, rank)  # fmt: skip
    total = tl.where(hi > lo, total, 1.0)
    acc *= tl.where(hi > lo, 1.0 / total, 0.0)[:, None]
    _put(_head(A, batch, h, first, a_b, a_h, a_t, a_d), acc, t, rows, WIDTH, BLOCK_M, BLOCK_V)
    lse = tl.where(hi > lo, (top + tl.log2(total)) / LOG2E, float("-inf"))
    tl.store(LSE + (batch.to(tl.int64) * H + h) * T + first + i, lse, i < rows)


def flat(name: str, x: torch.Tensor) -> dict[str, int]:
    """The strides of ``x`` [B, T, ΣR] under the names its kernels give them."""
    return {f"{name}_{axis}": stride for axis, stride in zip("btd", x.stride(), strict=True)}


class Layout(NamedTuple):
    """Where the heads stand, on the device: ``places`` by head, ``launches`` (widest rank, key heads) by tile."""

    places: dict[str, torch.Tensor]
    launches: list[tuple[int, torch.Tensor]]


@functools.lru_cache(maxsize=1024)
def _layout(ranks: tuple[int, ...], repeats: int, device: torch.device) -> Layout:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"ragged_attention meets the ranks {list(ranks)} for the first time while a CUDA graph is being captured, "
            "and cannot copy them to the device then: run the call once before capturing it"
        )
    begins = [sum(ranks[:group]) for group in range(len(ranks))]
    queries = [b * repeats + m * rank for b, rank in zip(begins, ranks, strict=True) for m in range(repeats)]

    def held(numbers):
        return torch.tensor(numbers, dtype=torch.int32, device=device)

    places = {"RANKS": held(ranks), "Q_OFFSETS": held(queries), "K_OFFSETS": held(begins)}
    return Layout(places, [(rank, held(members)) for rank, members in launches(ranks)])


def layout(ranks: Sequence[int], repeats: int, device: torch.device) -> Layout:
    """RANKS and K_OFFSETS by key head, Q_OFFSETS by query head, int32, and the key heads of each launch.

    Made once for these ranks on this device: to move a list there waits for the device, and a CUDA graph that is being
    captured forbids it. RuntimeError for ranks that such a graph is the first to use.
    """
    return _layout(tuple(ranks), repeats, device)


def launches(ranks: Sequence[int]) -> list[tuple[int, list[int]]]:
    """(widest rank, key heads) of each launch: heads whose ranks round up to the same tile."""
    sizes = [max(16, triton.next_power_of_2(rank)) for rank in ranks]
    return [(size, [g for g, one in enumerate(sizes) if one == size]) for size in sorted(set(sizes))]


@interpretable("a")
def ragged_attention(
    q, k, v, ranks, causal, window, query_start, key_lengths, cu_seqlens, scale, a, lse
) -> None:  # fmt: skip
    """Writes A to ``a`` [B, H, T, V] and the rows' log-sum-exp to ``lse`` [B, H, T] float32.

    q [B, T, Σ_h R], k [B, S, Σ_g R], v [B, G, S, V]: float32, bfloat16 or float16, any strides; ``ranks`` [G];
    arguments as in ``gaugekit.ragged_attention``, checked there. A row that sees no key has A = 0 and lse = −∞.
    """
    (batch, groups, keys, width), (_, heads, queries, _) = v.shape, a.shape
    if lse.numel() == 0:
        return
    repeats = heads // groups
    mask = Mask(causal, window, query_start, key_lengths, cu_seqlens)
    heads_of = layout(ranks, repeats, q.device)
    with torch.cuda.device_of(q):
        for rank, members in heads_of.launches:
            tile = tiles("forward", rank, width, q.dtype, window is not None, repeats > 1, small(q))
            programs, table, chunks = mask.split(batch, queries, tile["BLOCK_M"])
            _ragged_attention_fwd[(programs, len(members) * repeats)](
                q, k, v, a, lse, members, **heads_of.places, TABLE=table, **mask.tensors,
                **flat("q", q), **flat("k", k), **named("v", v), **named("a", a), scale=scale,
                T=queries, S=keys, H=heads, window=mask.window, chunks=chunks, GROUP=repeats, WIDTH=width,
                **mask.flags, **tile,
            )  # fmt: skip
