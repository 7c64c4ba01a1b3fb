"""The MLP of a block: two matrices without bias, or three where the activation is gated."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, relu, silu

ACTIVATIONS = {"relu": relu, "gelu": gelu, "geglu": gelu, "swiglu": silu}
GATED = {"geglu", "swiglu"}


class MLP(nn.Module):
    """y = down(f(up(x))), or down(f(gate(x)) · up(x)) for "geglu" and "swiglu": x [..., D] -> [..., D].

    ``hidden`` is the width between (4·D in the papers, 2·D or so when gated). Weights start as N(0, ``std``²). Raises
    ValueError for an activation that is not one of relu, gelu, geglu, swiglu.
    """

    def __init__(self, width: int, hidden: int, activation: str = "relu", std: float = 0.02,
                 device: torch.device | str | None = None, dtype: torch.dtype | None = None):  # fmt: skip
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}; got {activation!r}")
        make = {"bias": False, "device": device, "dtype": dtype}
        self.std, self.activation = std, activation
        self.gate = nn.Linear(width, hidden, **make) if activation in GATED else None
        self.up = nn.Linear(width, hidden, **make)
        self.down = nn.Linear(hidden, width, **make)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for weight in self.parameters():
            nn.init.normal_(weight, std=self.std)

    def forward(self, x: Tensor) -> Tensor:
        activate = ACTIVATIONS[self.activation]
        return self.down(activate(self.up(x)) if self.gate is None else activate(self.gate(x)) * self.up(x))
