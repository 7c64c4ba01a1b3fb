"""Attention whose scores have a low rank from the start."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from gaugekit.nn.shaped_attention import ShapedAttention


class LowRankAttention(ShapedAttention):
    """y = Σ_h softmax(x W_Q^h (x W_K^h)ᵀ / √R) x W_V^h W_O^h with queries and keys R wide, values D/H wide.

    x [B, T, D] -> [B, T, D]. W_Q W_Kᵀ has rank R by construction; the projections of queries and keys, and the keys of
    a ``LayerCache``, are R/(D/H) of the usual. Arguments otherwise as ``ShapedAttention``: ``groups``, ``causal``,
    ``window``, ``rotary_base`` (R even), ``std``. ``gaugekit.rank.nuclear_penalty`` takes it. Why ranks may be low:
    Truong, arXiv 2410.11500.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        rank: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **arguments: Any,
    ):
        make = {"bias": False, "device": device, "dtype": dtype}
        super().__init__(
            width,
            heads,
            key_width=rank,
            shaped=False,
            value=nn.Linear(width, width, **make),
            output=nn.Linear(width, width, **make),
            device=device,
            dtype=dtype,
            **arguments,
        )
