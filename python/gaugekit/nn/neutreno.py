"""Layers that share the first one's values: a block, and the container that hands the values on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gaugekit.nn.block import make_norm
from gaugekit.nn.cache import LayerCache
from gaugekit.nn.mlp import MLP
from gaugekit.nn.neutreno_attention import NeutrenoAttention


class NeutrenoBlock(nn.Module):
    """a = x + attention(norm(x), V⁰); y = a + MLP(norm(a)): x [B, T, D] -> (y [B, T, D], V⁰).

    ``hidden`` is the MLP's width, 4·D unless given; ``norm`` "layer" or "rms"; other arguments go to NeutrenoAttention.
    """

    def __init__(self, width: int, heads: int, *, hidden: int | None = None, norm: str = "layer",
                 activation: str = "gelu", eps: float = 1e-5, std: float = 0.02,
                 device: torch.device | str | None = None, dtype: torch.dtype | None = None,
                 **attention: Any):  # fmt: skip
        super().__init__()
        make = {"device": device, "dtype": dtype}
        self.norm, self.mlp_norm = (make_norm(norm, width, eps, **make) for _ in range(2))
        self.attention = NeutrenoAttention(width, heads, std=std, **attention, **make)
        self.mlp = MLP(width, 4 * width if hidden is None else hidden, activation, std, **make)

    def forward(self, x: Tensor, v0: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor]:
        y, v0 = self.attention(self.norm(x), v0, **options)
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), v0


class ValueSharing(nn.Module):
    """``layers`` in order, each (x, V⁰) -> (x, V⁰): the first is called without V⁰ and makes it, the others get it.

    V⁰ goes through arguments and results only: gradient checkpointing and compilation find no hidden state.
    ``checkpoint``: keep each layer's input alone while training, and run the layer again in the backward pass.
    """

    def __init__(self, layers: Iterable[nn.Module], *, checkpoint: bool = False):
        super().__init__()
        self.layers, self.checkpoint = nn.ModuleList(layers), checkpoint

    def forward(self, x: Tensor, *, caches: Sequence[LayerCache] | None = None, states: list[Tensor] | None = None,
                **options: Any) -> Tensor:  # fmt: skip
        """``caches``: a LayerCache for each layer. ``states``, a list, gets what enters each layer, and the result."""
        v0 = None
        for index, layer in enumerate(self.layers):
            if states is not None:
                states.append(x)
            if caches is not None:
                x, v0 = layer(x, v0, cache=caches[index], **options)
            elif self.checkpoint and self.training and torch.is_grad_enabled():
                x, v0 = checkpoint(layer, x, v0, use_reentrant=False, **options)
            else:
                x, v0 = layer(x, v0, **options)
        if states is not None:
            states.append(x)
        return x
