"""Attention whose keys and values are both read from one cached tensor, with every key and value written out.

The oracle of ``ops/single_cache_attention``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gaugekit.reference.shaped_attention import shaped_attention


def rows_of_pages(cache: Tensor, block_table: Tensor) -> Tensor:
    """The pages of ``cache`` [N, G, page, C] that ``block_table`` [B, P] names, one after the other: [B, G, S, C]."""
    return torch.stack([torch.cat([cache[page] for page in pages], 1) for pages in block_table.tolist()])


def rotated(rows: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Row j of ``rows`` [B, G, S, C] with the pair (i, i + C/2) turned by the angle of cos[j, i], sin[j, i]."""
    half, count = rows.shape[3] // 2, rows.shape[2]
    turned = rows.clone()
    for i in range(cos.shape[1]):
        first, second = rows[..., i], rows[..., half + i]
        turned[..., i] = first * cos[:count, i] - second * sin[:count, i]
        turned[..., half + i] = second * cos[:count, i] + first * sin[:count, i]
    return turned


def single_cache_attention(
    q: Tensor,
    cache: Tensor,
    *,
    scale: float,
    slices: bool = False,
    key_gain: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    block_table: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """q [B, H, T, C], cache [B, G, S, C] -> [B, H, T, V]; as ``gaugekit.single_cache_attention``, causal by default."""
    rows = cache if block_table is None else rows_of_pages(cache, block_table)
    rows = rows.to(q.dtype)
    keys = rows if key_gain is None else rows * key_gain.to(q.dtype)
    keys = keys if cos is None else rotated(keys, cos.to(q.dtype), sin.to(q.dtype))
    repeats = q.shape[1] // rows.shape[1]
    keys, values = keys.repeat_interleave(repeats, 1), rows.repeat_interleave(repeats, 1)
    if slices:
        width = rows.shape[3] // repeats
        cut = [values[:, h, :, h % repeats * width :][:, :, :width] for h in range(q.shape[1])]
        values = torch.stack(cut, 1)
    options = {"causal": True, **options}
    if options["causal"] and options.get("query_start") is None and options.get("key_lengths") is not None:
        options["query_start"] = options["key_lengths"] - q.shape[2]  # the queries are the last rows
    return shaped_attention(q, keys, values, scale=scale, **options)
