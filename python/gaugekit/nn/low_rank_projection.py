"""A query or key projection of which only some channels are in use."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gaugekit.nn.gauge_projection import widen


class LowRankProjection(nn.Module):
    """y[..., h·width + c] = x w + b for the R_h channels c of head h that are in use, 0 elsewhere.

    x [..., D] -> [..., heads·width]. ``weight`` [ΣR, D] and ``bias`` [ΣR] hold the channels in use, head by head; the
    buffer ``places`` [ΣR] int32 says where among the outputs each stands. ``ranks`` is [heads] of R_h; ``leading``:
    every head uses its first channels. The zeros let any attention that expects ``width`` channels run unchanged.
    """

    form = "low_rank_projection"

    def __init__(self, inputs: int, width: int, ranks: Sequence[int], bias: bool = True, leading: bool = True,
                 device: torch.device | str | None = None, dtype: torch.dtype | None = None):  # fmt: skip
        super().__init__()
        ranks = list(ranks)
        if not ranks or not all(isinstance(rank, int) and 1 <= rank <= width for rank in ranks):
            raise ValueError(f"ranks: expected one of 1 to width={width} for each head, got {ranks}")
        self.inputs, self.width, self.ranks, self.leading = inputs, width, ranks, leading
        total = sum(ranks)
        self.weight = nn.Parameter(torch.zeros(total, inputs, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(total, device=device, dtype=dtype)) if bias else None
        heads = (torch.arange(h * width, h * width + rank, device=device) for h, rank in enumerate(ranks))
        self.register_buffer("places", torch.cat(list(heads)).to(torch.int32))

    @property
    def arguments(self) -> dict:
        """What ``config.json`` keeps of this module."""
        arguments = {"inputs": self.inputs, "width": self.width, "ranks": self.ranks}
        return arguments | {"bias": self.bias is not None, "leading": self.leading}

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.linear(x, self.weight, self.bias)
        if self.leading and len(set(self.ranks)) == 1:
            return widen(y, len(self.ranks), self.width)
        out = y.new_zeros(*y.shape[:-1], len(self.ranks) * self.width)
        return out.index_copy(-1, self.places.long(), y)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.arguments.items())
