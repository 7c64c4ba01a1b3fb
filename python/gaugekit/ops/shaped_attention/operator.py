"""``shaped_attention``: a softmax core, then ``shaped_combine``; or, on GPUs, one fused operator.

The core is torch's ``scaled_dot_product_attention`` with its own autograd (``shaped_attention_core``), its
FlexAttention (``shaped_attention_flex``), ``gaugekit::ragged_attention`` with one rank for all heads (on CPUs), or the
operator ``gaugekit::shaped_attention`` (``shaped_attention_fused``); ``shaped_attention_plan`` chooses, and
``use_core`` overrules it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gaugekit.ops import sharding
from gaugekit.ops.mask import Mask, check, keys_of_queries
from gaugekit.ops.operands import Gain, Integers, check_tensors, gains
from gaugekit.ops.shaped_attention.choice import (
    BACKENDS,
    FEWEST_QUERIES,
    FLEX,
    FUSED,
    RAGGED,
    asked_core,
    cpu_core,
    gpu_core,
)
from gaugekit.ops.shaped_attention.choice import use_core as use_core
from gaugekit.ops.shaped_attention.core import as_it_is, mask_kind, packed_core, sdpa, softmax_core
from gaugekit.ops.shaped_attention.flex import flex_core
from gaugekit.ops.shaped_attention.sharding import rules
from gaugekit.ops.shaped_combine.cuda import INSTALLED


class Plan(NamedTuple):
    """What a call uses: ``core``, torch's, "flex", "ragged" or "fused"; ``mask``: "none", "is_causal" (no array),
    "keys" ([B, 1, 1, S]), "blocks" (an array a block of ``block`` queries) or "sequences" (one call a sequence), where
    the other cores need no array for any; ``width``: what K and V are zero-padded to; ``combine``: whether
    ``shaped_combine`` follows; ``tiles``: of the fused kernels, {part: sizes, warps and stages}."""

    core: str
    mask: str
    block: int
    width: int
    combine: bool
    tiles: dict | None = None


def shaped_attention(
    q: Tensor, k: Tensor, v: Tensor, *, alpha: Gain | None = None, beta: Gain | None = None, gamma: Gain | None = None,
    v0: Tensor | None = None, lam: Gain | None = None, causal: bool = False, window: int | None = None,
    query_start: Integers | None = None, key_lengths: Integers | None = None, cu_seqlens: Integers | None = None,
    scale: float | None = None,
) -> Tensor:  # fmt: skip
    """β·softmax(scale·q kᵀ) v + α·v − γ·C v + λ·(v0 − v), per head; differentiable in everything but the mask.

    q [B, H, T, K], k [B, G, S, K], v [B, G, S, V], H a multiple of G: head h reads group h // (H/G). v0 [B, G, T, V].
    Gains alpha, beta, gamma, lam are [H], float32 or v's dtype, or a number for all heads, or a list; beta None means
    1, the others 0; lam and v0 come together. ``scale`` None means K^-0.5. C is the uniform attention under the same
    mask. Returns [B, H, T, V].

    Query t of sequence b stands at position p = query_start[b] + t (int64 [B]; None: S − T when causal, else 0). It
    sees keys j < key_lengths[b] (int64 [B]; None: S); with ``causal`` j ≤ p; with ``window`` w p − w < j (and, without
    causal, j < p + w). When causal, a query with p < 0 or p ≥ key_lengths[b] is padding and sees nothing. A row that
    sees nothing gets zero from the softmax and from C; alpha and lam act on row p of v where 0 ≤ p < key_lengths[b],
    and without causal need T = S. ``cu_seqlens`` (int32 [N+1], B = 1, T = S) packs N sequences. Padding must hold
    finite numbers.

    float32, float64, bfloat16, float16. Raises ValueError for arguments that do not fit. Sources: He and Hofmann,
    Simplifying Transformer Blocks (ICLR 2024), eq. 5; NeuTRENO (NeurIPS 2023) for lam.
    """
    check_tensors(q=q, k=k, v=v, v0=v0)
    if sharding.shared(q, k, v):
        return sharding.local(shaped_attention, rules, dict(
            q=q, k=k, v=v, alpha=alpha, beta=beta, gamma=gamma, v0=v0, lam=lam, causal=causal, window=window,
            query_start=query_start, key_lengths=key_lengths, cu_seqlens=cu_seqlens, scale=scale))  # fmt: skip
    nothing_else = (
        alpha is beta is gamma is v0 is lam is window is query_start is key_lengths is cu_seqlens is None
    )
    if nothing_else and asked_core() is None and (options := as_it_is(q, k, v, causal)) is not None:
        return sdpa(q, k, v, q.shape[3] ** -0.5 if scale is None else scale, **options)
    alpha, beta, gamma, lam = gains(q, alpha=alpha, beta=beta, gamma=gamma, lam=lam)
    mask = Mask.of(q.device, causal, window, query_start, key_lengths, cu_seqlens)
    if torch.is_autocast_enabled(q.device.type):
        q, k, v, v0 = (None if x is None else x.to(_autocast(x)) for x in (q, k, v, v0))
    uses = _plan(q, k, v, alpha, beta, gamma, v0, lam, mask)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if uses.core == FUSED:
        return torch.ops.gaugekit.shaped_attention(q, k, v, alpha, beta, gamma, v0, lam, *mask, float(scale))[
            0
        ]
    if uses.core == RAGGED:
        a = _ragged_core(q, k, v, mask, float(scale))
    else:
        core = packed_core if uses.mask == "sequences" else softmax_core
        a = (flex_core if uses.core == FLEX else core)(q, k, v, mask, scale)
    if uses.combine:
        operands = (v, alpha, beta, gamma, v0, lam, *mask)
        differentiable = (a, v, alpha, beta, gamma, v0, lam)
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in differentiable):
            return torch.ops.gaugekit.shaped_combine(a, *operands)
        torch.ops.gaugekit.shaped_combine_(a, *operands)
        return a
    some_blind = mask.query_start is not None or mask.key_lengths is not None or q.shape[2] > k.shape[2]
    if some_blind and uses.core != RAGGED:
        seen = keys_of_queries(q.shape[2], k.shape[2], mask, q.device)
        a = a.masked_fill((seen.last == seen.first)[:, None, :, None], 0)
    return a


def plan(
    q: Tensor, k: Tensor, v: Tensor, *, alpha: Gain | None = None, beta: Gain | None = None, gamma: Gain | None = None,
    v0: Tensor | None = None, lam: Gain | None = None, causal: bool = False, window: int | None = None,
    query_start: Integers | None = None, key_lengths: Integers | None = None, cu_seqlens: Integers | None = None,
    scale: float | None = None,
) -> Plan:  # fmt: skip
    """What ``shaped_attention`` with these arguments would use; reads dtypes, shapes and which arguments are given."""
    check_tensors(q=q, k=k, v=v, v0=v0)
    alpha, beta, gamma, lam = gains(q, alpha=alpha, beta=beta, gamma=gamma, lam=lam)
    mask = Mask.of(q.device, causal, window, query_start, key_lengths, cu_seqlens)
    uses = _plan(q, k, v, alpha, beta, gamma, v0, lam, mask)
    if uses.core != FUSED or not INSTALLED:
        return uses
    from gaugekit.triton_kernels.shaped_attention import small, tiles

    operands = (q.shape[3], v.shape[3], q.dtype, window is not None, q.shape[1] > v.shape[1], small(q))
    return uses._replace(tiles={part: tiles(part, *operands) for part in ("forward", "keys", "queries")})


def _plan(q, k, v, alpha, beta, gamma, v0, lam, mask: Mask) -> Plan:
    check(q, v, alpha, beta, gamma, v0, lam, mask)
    (queries, key_width), (batch, groups, keys, width) = q.shape[2:], v.shape
    if k.shape != (batch, groups, keys, key_width) or key_width < 1:
        expected = [batch, groups, keys, key_width]
        raise ValueError(f"k: expected [B, G, S, K] = {expected} beside q and v, got {list(k.shape)}")
    if k.dtype != q.dtype or k.device != q.device:
        raise ValueError(f"k: expected {q.dtype} on {q.device}, got {k.dtype} on {k.device}")
    kind, block = mask_kind(queries, keys, mask)
    combine = any(gain is not None for gain in (alpha, beta, gamma, lam))
    core = "torch scaled_dot_product_attention"
    asked, device = asked_core(), q.device.type
    if asked in (FUSED, FLEX):
        return Plan(asked, kind, queries, width, asked == FLEX and combine)
    on_cpu = asked is None and device == "cpu"
    # While compiling, torch's kernels would be given all packed sequences as one, and blocks want a number of rows.
    if on_cpu and kind == "blocks" and torch.compiler.is_compiling():
        asked = RAGGED if mask.cu_seqlens is not None or isinstance(queries, torch.SymInt) else asked
    sizes = (queries, keys, key_width, width)
    if asked == RAGGED or (on_cpu and cpu_core(_autocast(q), *sizes, kind == "is_causal") == RAGGED):
        return Plan(RAGGED, kind, queries, width, combine)
    if device == "cuda":
        if asked is None and gpu_core(q.dtype, *sizes, kind, combine) == FUSED:
            return Plan(FUSED, kind, queries, width, False)
        core += ": " + ", ".join(BACKENDS[q.dtype])
    # torch's CPU kernels take only K = V; its general path is 9 to 28 times slower than zeros appended to the narrower.
    return Plan(core, kind, block, max(key_width, width) if device == "cpu" else width, combine)


def _ragged_core(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> Tensor:
    """``gaugekit::ragged_attention``, whose heads stand side by side in a row. For a few queries on a cache that holds
    head after head, each key head is a sequence of its own, so that no key is copied."""
    batch, groups, _, width = k.shape
    # A number that a graph leaves open is not asked for: the graph would hold on one side only.
    few = not isinstance(q.shape[2], torch.SymInt) and q.shape[2] < FEWEST_QUERIES
    few = few and groups > 1 and mask.cu_seqlens is None
    if not few or k.stride(1) < k.stride(2) or (batch > 1 and k.stride(0) != groups * k.stride(1)):
        rows = (x.transpose(1, 2).flatten(2) for x in (q, k))
        return torch.ops.gaugekit.ragged_attention(*rows, v, [width] * groups, *mask, scale)[0]
    q = q.unflatten(1, (groups, -1)).transpose(2, 3).flatten(3).flatten(0, 1)
    places = (None if x is None else x.repeat_interleave(groups) for x in mask[2:4])
    mask = Mask(*mask[:2], *places, None)
    k, v = k.flatten(0, 1), v.flatten(0, 1)[:, None]
    a = torch.ops.gaugekit.ragged_attention(q, k, v, [width], *mask, scale)[0]
    return a.unflatten(0, (batch, groups)).flatten(1, 2)


def _autocast(x: Tensor) -> torch.dtype:
    """The dtype torch.autocast has attention run in."""
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(x.device.type):
        return x.dtype
    return torch.get_autocast_dtype(x.device.type)
