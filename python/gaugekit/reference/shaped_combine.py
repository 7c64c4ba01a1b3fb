"""O = β·A + α·V − γ·C V + λ·(V⁰ − V), with C written out as a T×S matrix: the oracle of ``ops/shaped_combine``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def seen_keys(
    batch: int,
    queries: int,
    keys: int,
    causal: bool = False,
    window: int | None = None,
    query_start: Tensor | None = None,
    key_lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """seen [B, T, S]: whether the query sees the key; own [B, T, S]: whether the key stands at the query's position."""
    if cu_seqlens is not None:
        sequence = torch.repeat_interleave(torch.arange(len(cu_seqlens) - 1), cu_seqlens.diff().long())
        seen, own = seen_keys(1, queries, keys, causal, window)
        together = sequence[:, None] == sequence[None, :]
        return seen & together, own & together
    if query_start is None:
        query_start = torch.full((batch,), keys - queries if causal else 0)
    if key_lengths is None:
        key_lengths = torch.full((batch,), keys)
    p = (query_start[:, None] + torch.arange(queries))[:, :, None]
    j = torch.arange(keys)[None, None, :]
    length = key_lengths[:, None, None]
    seen = j < length
    if causal:
        seen = seen & (j <= p) & (p >= 0) & (p < length)
    if window is not None:
        seen = seen & (p - window < j) & (j < p + window)
    return seen.expand(batch, queries, keys), ((j == p) & (j < length)).expand(batch, queries, keys)


def shaped_combine(
    a: Tensor,
    v: Tensor,
    *,
    alpha: Tensor | None = None,
    beta: Tensor | None = None,
    gamma: Tensor | None = None,
    v0: Tensor | None = None,
    lam: Tensor | None = None,
    **mask: Any,
) -> Tensor:
    """a [B, H, T, V], v [B, G, S, V], v0 [B, G, T, V], gains [H] -> [B, H, T, V], in the dtype of a."""
    (batch, heads, queries, _), (groups, keys) = a.shape, v.shape[1:3]
    seen, own = (x[:, None].to(a.dtype) for x in seen_keys(batch, queries, keys, **mask))
    v = v.repeat_interleave(heads // groups, dim=1)
    uniform = seen / seen.sum(-1, keepdim=True).clamp(min=1)
    value = own @ v
    out = (a if beta is None else _gain(beta, a) * a) * (seen.sum(-1, keepdim=True) > 0)
    if alpha is not None:
        out = out + _gain(alpha, a) * value
    if gamma is not None:
        out = out - _gain(gamma, a) * (uniform @ v)
    if lam is not None:
        v0 = v0.repeat_interleave(heads // groups, dim=1) * own.sum(-1, keepdim=True)
        out = out + _gain(lam, a) * (v0 - value)
    return out


def _gain(gain: Tensor, like: Tensor) -> Tensor:
    return gain.to(like.dtype).view(1, -1, 1, 1)
