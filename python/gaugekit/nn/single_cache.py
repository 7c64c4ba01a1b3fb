"""Attention whose keys and values are both read off the layer's input x, which is all that is cached.

Keys are x W_Kᵀ, so a score is (W_Kᵀ q)·x_j; values are slices of x, or x W_Vᵀ, and then W_V is applied after the
weighted sum. Nothing may turn or norm the keys in between.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gaugekit.nn.identity_linear import IdentityLinear
from gaugekit.ops.single_cache_attention.operator import single_cache_attention

# Queries at once up to which the cache itself is attended to: a step, or tokens drafted ahead. Above, as in a chunk of
# a prompt, projecting the cached rows once is less work than scores as wide as the model.
FEW = 16


def attend_inputs(
    q: Tensor,
    rows: Tensor,
    key_weight: Tensor,
    value_weight: Tensor | None = None,
    value_bias: Tensor | None = None,
    **said: Any,
) -> Tensor:
    """softmax(scale·q (rows W_Kᵀ)ᵀ) (rows W_Vᵀ + b) per head, with the other terms of ``single_cache_attention``.

    q [B, H, T, K], rows [B, 1, S, D], key_weight [G, K, D] -> [B, H, T, V]. value_weight [H, V, D], and value_bias
    [H, V] where there are no gains, with which weights would no longer sum up to 1; without a weight the values of head
    h are the h-th slice of rows. A bias of the keys changes no softmax and is left out. ``said``: scale, lengths, gains
    and so on.
    """
    heads = q.shape[1]
    grouped = q.unflatten(1, (key_weight.shape[0], -1))
    absorbed = torch.einsum("bgrtk,gkd->bgrtd", grouped, key_weight).flatten(1, 2).to(rows.dtype)
    out = single_cache_attention(absorbed, rows, slices=value_weight is None, **said)
    if value_weight is None:
        return out
    out = torch.einsum("bhtd,hvd->bhtv", out, value_weight.to(out.dtype))
    return out if value_bias is None else out + value_bias.view(1, heads, 1, -1).to(out.dtype)


def watched(module: nn.Module) -> bool:
    """Whether something is hung on ``module`` that runs when it is called, and not where its weights are read."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def dense_weight(module: nn.Module) -> Tensor:
    """The matrix [out, in] a bare projection multiplies with; ValueError for a module that is none."""
    if watched(module):
        raise ValueError(
            "expected a bare projection, got one with hooks, which would not be run where only its weight is read"
        )
    if type(module) is nn.Linear:
        return module.weight
    if isinstance(module, IdentityLinear):
        return module.beta * module.weight + torch.diag(module.alpha.expand(len(module.weight)))
    raise ValueError(f"expected a plain matrix, got a {type(module).__name__}")
