"""A square projection written as a step away from the identity."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class IdentityLinear(nn.Module):
    """y = α·x + β·(x Wᵀ), W [D, D] trained from 0, α and β [1] trained from 1: x [..., D] -> [..., D].

    At the start it passes x through, and weight decay pulls it back to the identity rather than to 0. He and Hofmann,
    Simplifying Transformer Blocks (ICLR 2024), eq. 6 with W_init = I.
    """

    def __init__(
        self, width: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, width, device=device, dtype=dtype))
        self.alpha = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.beta = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.ones_(self.alpha)
        nn.init.ones_(self.beta)

    def forward(self, x: Tensor) -> Tensor:
        return self.alpha * x + self.beta * nn.functional.linear(x, self.weight)
