"""What every transformer block has: a norm, attention, an MLP and gains of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from gaugekit.nn.mlp import MLP
from gaugekit.nn.shaped_attention import ShapedAttention

NORMS = {"rms": nn.RMSNorm, "layer": nn.LayerNorm, "none": lambda width, **_: nn.Identity()}


def make_norm(
    kind: str,
    width: int,
    eps: float,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """The norm called ``kind``: "rms", "layer" or "none" (the identity); ValueError for another."""
    if kind not in NORMS:
        raise ValueError(f"norm: expected one of {', '.join(NORMS)}; got {kind!r}")
    return NORMS[kind](width, eps=eps, device=device, dtype=dtype)


class Block(nn.Module):
    """``norm``, ``attention``, ``mlp``, with two norms ``mlp_norm``, and a trained [1] for each of ``gains``.

    ``hidden`` is the MLP's width, 4·D unless given. What is not named here goes to ``ShapedAttention``.
    """

    def __init__(self, width: int, heads: int, *, gains: dict[str, float], norms: int = 2, hidden: int | None = None,
                 norm: str = "rms", activation: str = "relu", eps: float = 1e-8, std: float = 0.02,
                 device: torch.device | str | None = None, dtype: torch.dtype | None = None,
                 **attention: Any):  # fmt: skip
        super().__init__()
        make = {"device": device, "dtype": dtype}
        self.norm = make_norm(norm, width, eps, **make)
        self.attention = ShapedAttention(width, heads, std=std, **attention, **make)
        if norms == 2:
            self.mlp_norm = make_norm(norm, width, eps, **make)
        self.mlp = MLP(width, 4 * width if hidden is None else hidden, activation, std, **make)
        self.initial_gains = gains
        for name in gains:
            setattr(self, name, nn.Parameter(torch.empty(1, **make)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for name, value in self.initial_gains.items():
            nn.init.constant_(getattr(self, name), value)
