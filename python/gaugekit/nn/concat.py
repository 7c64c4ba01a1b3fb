"""Several forms that share an input, as one module: a fused projection whose parts are no longer of one kind."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from gaugekit.nn.gauge_projection import GaugeProjection, watched


class Concat(nn.ModuleList):
    """y = part_0(x) ⊕ part_1(x) ⊕ ...: x [..., D] -> [..., sum of the parts' outputs]. Parts are named 0, 1, ...

    With ``groups`` n the outputs of each part are cut into n runs of equal length, and the first run of every part
    comes first, then the second of every part, ...: what a projection expects that keeps the query, the key and the
    value of a head together. Raises ValueError where ``groups`` is no positive integer.

    While nothing is differentiated, plain and compact projections write to their columns of y at once (in one group).
    """

    form = "concat"

    def __init__(self, parts: Iterable[nn.Module], groups: int = 1):
        super().__init__(parts)
        if not isinstance(groups, int) or isinstance(groups, bool) or groups < 1:
            raise ValueError(f"groups: expected a positive integer, got {groups!r}")
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        if self.groups > 1:
            return torch.cat([part(x).unflatten(-1, (self.groups, -1)) for part in self], dim=-1).flatten(-2)
        widths = [_outputs(part) for part in self]
        if not all(widths) or not x.numel() or watched(x, *self.parameters()):
            return torch.cat([part(x) for part in self], dim=-1)
        y, first = x.new_empty((*x.shape[:-1], sum(widths))), 0
        for part, width in zip(self, widths, strict=True):
            out, first = y.narrow(-1, first, width), first + width
            if isinstance(part, GaugeProjection):
                part.write(out, x)
            else:
                _write(out.view(-1, width), x.reshape(-1, x.shape[-1]), part)
        return y


def _outputs(part: nn.Module) -> int:
    """How wide the outputs of a part are that can write them to a wider tensor; 0 for any other, and for one on whose
    call something hangs.
    """
    if part._forward_hooks or part._forward_pre_hooks or "forward" in part.__dict__:
        return 0
    if type(part) is nn.Linear:
        return part.out_features
    if isinstance(part, GaugeProjection) and part.padded is None:
        return part.heads * part.width
    return 0


def _write(out: Tensor, x: Tensor, part: nn.Linear) -> None:
    if part.bias is None:
        torch.mm(x, part.weight.t(), out=out)
    else:
        torch.addmm(part.bias, x, part.weight.t(), out=out)
