"""Several forms that share an input, as one module: a fused projection whose parts are no longer of one kind."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class Concat(nn.ModuleList):
    """y = part_0(x) ⊕ part_1(x) ⊕ ...: x [..., D] -> [..., sum of the parts' outputs]. Parts are named 0, 1, ...

    With ``groups`` n the outputs of each part are cut into n runs of equal length, and the first run of every part
    comes first, then the second of every part, ...: what a projection expects that keeps the query, the key and the
    value of a head together. Raises ValueError where ``groups`` is no positive integer.
    """

    form = "concat"

    def __init__(self, parts: Iterable[nn.Module], groups: int = 1):
        super().__init__(parts)
        if not isinstance(groups, int) or isinstance(groups, bool) or groups < 1:
            raise ValueError(f"groups: expected a positive integer, got {groups!r}")
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        if self.groups == 1:
            return torch.cat([part(x) for part in self], dim=-1)
        return torch.cat([part(x).unflatten(-1, (self.groups, -1)) for part in self], dim=-1).flatten(-2)
