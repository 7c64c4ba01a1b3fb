"""softmax(scale·q kᵀ) v on torch's ``scaled_dot_product_attention``, under every mask of shaped attention.

No array of B·H·T·S elements is made: a mask, where a case needs one, is Boolean [block, S'] or [B, 1, block, S'] for at
most 1,024 queries at a time and the keys S' they can see.
"""

from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor
from torch._C import _get_tracing_state
from torch.nn.functional import pad, scaled_dot_product_attention

from gaugekit.ops.mask import Mask, keys_of_queries
from gaugekit.ops.shaped_attention.choice import BACKENDS, TORCH, cpu_core

BLOCK = 1024  # queries a mask covers at most
SMALLEST_BLOCK = 128  # shorter calls of the core cost more than the keys they save


def mask_kind(queries: int, keys: int, mask: Mask) -> tuple[str, int]:
    # While compiling, the bounds of packed sequences cannot be read on the host.
    if mask.cu_seqlens is not None and not torch.compiler.is_compiling():
        return "sequences", queries
    here = mask.query_start is None and mask.cu_seqlens is None
    narrow = mask.window is not None and not (here and mask.window >= max(queries, keys))
    if not narrow and not mask.causal and mask.cu_seqlens is None:
        return ("none" if mask.key_lengths is None else "keys"), queries
    if not narrow and here and queries == keys:
        return "is_causal", queries
    if not narrow and here and mask.key_lengths is None and queries == 1:
        return "none", queries
    return "blocks", max(SMALLEST_BLOCK, min(BLOCK, mask.window)) if narrow else BLOCK


def as_it_is(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> dict | None:
    """The options of torch's attention where it answers by itself: on a CPU, operands of one width, no terms, and every
    key seen, or with ``causal`` those up to the query's own. None elsewhere, and for what does not fit.

    It asks for little: beside a token of a small model, reading shapes takes as long as attention.
    """
    if not (q.is_cpu and k.is_cpu and v.is_cpu and q.dtype is k.dtype is v.dtype):
        return None
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu") or _get_tracing_state() is not None:
        return None
    try:
        return _as_it_is(q.shape, k.shape, v.shape, q.dtype, causal)
    except TypeError:  # sizes that a tracer leaves open have no place in a table
        return None


@functools.lru_cache(maxsize=1024)
def _as_it_is(q: torch.Size, k: torch.Size, v: torch.Size, dtype: torch.dtype, causal: bool) -> dict | None:
    fits = len(q) == len(k) == 4 and k == v and q[0] == k[0] and q[3] == k[3] and 0 not in (*q, *k)
    if not (fits and dtype in BACKENDS and q[1] % k[1] == 0 and q[2] <= k[2]):
        return None
    kind, _ = mask_kind(q[2], k[2], Mask(causal))
    if (
        kind not in ("none", "is_causal")
        or cpu_core(dtype, q[2], k[2], q[3], v[3], kind == "is_causal") != TORCH
    ):
        return None
    return {"is_causal": kind == "is_causal"}


def softmax_core(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> Tensor:
    """softmax(scale·q kᵀ) v under the mask; rows that see no key hold any finite numbers."""
    if q.numel() == 0 or v.numel() == 0:
        return nothing(q, k, v)
    kind, block = mask_kind(q.shape[2], k.shape[2], mask)
    if kind in ("none", "is_causal"):
        return sdpa(q, k, v, scale, is_causal=kind == "is_causal")
    if kind == "keys":
        j = torch.arange(k.shape[2], device=q.device)
        lengths = mask.key_lengths.clamp(min=1)
        return sdpa(q, k, v, scale, attn_mask=(j < lengths[:, None])[:, None, None, :])
    seen = keys_of_queries(q.shape[2], k.shape[2], mask, q.device)
    parts = []
    for begin in range(0, q.shape[2], block):
        end = min(begin + block, q.shape[2])
        low, high = _reach(begin, end, q.shape[2], k.shape[2], mask)
        j = torch.arange(low, high, device=q.device)
        first, last = (x[:, begin:end, None] for x in (seen.first, seen.last))
        visible = ((j >= first) & (j < last)) | (first == last)
        visible = visible[0] if visible.shape[0] == 1 else visible[:, None]
        part = (q[:, :, begin:end], k[:, :, low:high], v[:, :, low:high])
        parts.append(sdpa(*part, scale, attn_mask=visible))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def nothing(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The result where there is no query, key or channel: zeros, differentiable in all three. A gradient that were None
    here would leave the other ranks waiting for this one's part of it.
    """
    return q.new_zeros(*q.shape[:3], v.shape[3]) + sum(x[:0].sum() for x in (q, k, v))


def _reach(begin: int, end: int, queries: int, keys: int, mask: Mask) -> tuple[int, int]:
    """At least the keys that queries begin ≤ t < end can see, never none."""
    if mask.query_start is None:
        nearest = farthest = keys - queries if mask.causal else 0
    elif mask.query_start.device.type != "cpu" or torch.compiler.is_compiling():
        return 0, keys  # the positions are not on the host
    else:
        nearest, farthest = int(mask.query_start.min()), int(mask.query_start.max())
    low, high = 0, keys
    if mask.window is not None:
        low, high = nearest + begin - mask.window + 1, farthest + end - 1 + mask.window
    if mask.causal:
        high = farthest + end
    low = min(max(low, 0), keys - 1)
    return low, min(max(high, low + 1), keys)


def sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, **options) -> Tensor:
    width, narrow, device = v.shape[3], q.shape[3] - v.shape[3], q.device.type
    if device == "cpu" and narrow > 0:
        v = pad(v, (0, narrow))
    elif device == "cpu" and narrow < 0:
        q, k = pad(q, (0, -narrow)), pad(k, (0, -narrow))
    options["enable_gqa"] = bool(q.shape[1] != k.shape[1])  # a tracer's sizes compare to something else
    if device == "cuda":
        out = _pinned(q, k, v, scale=scale, **options)
    else:
        out = scaled_dot_product_attention(q, k, v, scale=scale, **options)
    return out if out.shape[3] == width else out[..., :width].contiguous()


def _pinned(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
    """torch's kernels in the plan's order: left alone, torch may take a slower one first."""
    from torch.nn.attention import SDPBackend, sdpa_kernel  # imports more than a CPU needs

    with sdpa_kernel([getattr(SDPBackend, name) for name in BACKENDS[q.dtype]], set_priority=True):
        return scaled_dot_product_attention(q, k, v, **options)


def packed_core(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> Tensor:
    """One call of the core a sequence, whose bounds are read on the host."""
    bounds = mask.cu_seqlens.tolist()
    parts = [
        softmax_core(*(x[:, :, begin:end] for x in (q, k, v)), Mask(mask.causal, mask.window), scale)
        for begin, end in itertools.pairwise(bounds)
        if end > begin
    ]
    return torch.cat(parts, dim=2) if parts else softmax_core(q, k, v, Mask(), scale)
