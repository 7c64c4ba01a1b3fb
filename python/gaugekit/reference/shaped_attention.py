"""O = β·softmax(scale·Q Kᵀ) V + α·V − γ·C V + λ·(V⁰ − V), every matrix written out.

The oracle of ``ops/shaped_attention``.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gaugekit.reference.shaped_combine import seen_keys, shaped_combine


def shaped_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    alpha: Tensor | None = None,
    beta: Tensor | None = None,
    gamma: Tensor | None = None,
    v0: Tensor | None = None,
    lam: Tensor | None = None,
    scale: float | None = None,
    **mask: Any,
) -> Tensor:
    """q [B, H, T, K], k [B, G, S, K], v [B, G, S, V] -> [B, H, T, V]; arguments as in ``gaugekit.shaped_attention``."""
    (batch, heads, queries, width), (groups, keys) = q.shape, k.shape[1:3]
    seen = seen_keys(batch, queries, keys, **mask)[0][:, None]
    scores = q @ k.repeat_interleave(heads // groups, dim=1).mT * (width**-0.5 if scale is None else scale)
    # A row that sees no key has no softmax: its scores are left alone here, and its result is set to zero below.
    scores = scores.masked_fill(~seen & seen.any(-1, keepdim=True), float("-inf"))
    a = scores.softmax(-1) @ v.repeat_interleave(heads // groups, dim=1)
    return shaped_combine(a, v, alpha=alpha, beta=beta, gamma=gamma, v0=v0, lam=lam, **mask)
