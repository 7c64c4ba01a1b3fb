"""Attention in which every head has a rank of its own, head by head as the equation says.

The oracle of ``ops/ragged_attention``.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gaugekit.reference.shaped_attention import shaped_attention


def ragged_attention(
    q: Tensor, k: Tensor, v: Tensor, ranks: Sequence[int], *, scale: float, **options: Any
) -> Tensor:
    """q [B, T, Σ_h R_g(h)], k [B, S, Σ_g R_g], v [B, G, S, V] -> [B, H, T, V]; as ``gaugekit.ragged_attention``.

    Gains [H] and v0 [B, G, T, V] among the options are cut to the head at hand.
    """
    groups, repeats = v.shape[1], q.shape[2] // k.shape[2]
    ends = [0, *itertools.accumulate(ranks)]
    outputs = []
    for head in range(groups * repeats):
        group = head // repeats
        rank, before = ranks[group], ends[group] * repeats + (head % repeats) * ranks[group]
        own = {name: x[head : head + 1] if name in ("alpha", "beta", "gamma", "lam") and x is not None else x
               for name, x in options.items()}  # fmt: skip
        if own.get("v0") is not None:
            own["v0"] = own["v0"][:, group : group + 1]
        query = q[:, None, :, before : before + rank]
        key = k[:, None, :, ends[group] : ends[group] + rank]
        outputs.append(shaped_attention(query, key, v[:, group : group + 1], scale=scale, **own))
    return torch.cat(outputs, 1)
