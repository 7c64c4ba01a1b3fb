"""Several forms that share an input, as one module: a fused projection whose parts are no longer of one kind."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Concat(nn.ModuleList):
    """y = part_0(x) ⊕ part_1(x) ⊕ ...: x [..., D] -> [..., sum of the parts' outputs]. Parts are named 0, 1, ..."""

    form = "concat"

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self], dim=-1)
