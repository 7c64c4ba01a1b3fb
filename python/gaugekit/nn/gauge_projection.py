"""A projection whose gauge is fixed: it holds only what can be observed."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def free_rows(rows: Tensor, inputs: int) -> Tensor:
    """The inputs not in ``rows`` [heads, width], ascending: [heads, inputs − width] int64."""
    taken = torch.zeros(rows.shape[0], inputs, dtype=torch.uint8, device=rows.device).scatter(1, rows, 1)
    return taken.argsort(dim=1, stable=True)[:, : inputs - rows.shape[1]]


def widen(y: Tensor, heads: int, padded: int) -> Tensor:
    """y [..., heads·width] with zeros behind each head's outputs: [..., heads·padded]."""
    y = y.unflatten(-1, (heads, -1))
    return nn.functional.pad(y, (0, padded - y.shape[-1])).flatten(-2)


class GaugeProjection(nn.Module):
    """y_h = x[..., P_h] + x[..., P̄_h] F_h (+ b): x [..., D] -> [..., heads·width].

    P_h, the ``rows`` [heads, width] int32, are the inputs that pass through; F_h, the parameter ``free``
    [heads, D − width, width], takes the others in ascending order. A forward scatters both into a dense weight for one
    matmul: smaller at rest, no faster. ``bias`` [heads·width] is there only on request: keys and values need none.
    With ``padded`` each head's outputs are followed by zeros up to that width (keys of lower rank than their queries'
    module expects).
    """

    form = "gauge_projection"

    def __init__(self, inputs: int, heads: int, width: int, bias: bool = False, padded: int | None = None,
                 device: torch.device | str | None = None, dtype: torch.dtype | None = None):  # fmt: skip
        super().__init__()
        for name, size in (("inputs", inputs), ("heads", heads), ("width", width)):
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{name}: expected a positive integer, got {size!r}")
        if width > inputs:
            raise ValueError(f"width: expected at most inputs={inputs}, got {width}")
        if padded is not None and padded < width:
            raise ValueError(f"padded: expected at least width={width}, got {padded}")
        self.inputs, self.heads, self.width, self.padded = inputs, heads, width, padded
        self.free = nn.Parameter(torch.zeros(heads, inputs - width, width, device=device, dtype=dtype))
        first = torch.arange(width, dtype=torch.int32, device=device).repeat(heads, 1)
        self.register_buffer("rows", first)
        self.bias = nn.Parameter(torch.zeros(heads * width, device=device, dtype=dtype)) if bias else None

    @property
    def arguments(self) -> dict:
        """What ``config.json`` keeps of this module."""
        arguments = {"inputs": self.inputs, "heads": self.heads, "width": self.width}
        arguments["bias"] = self.bias is not None
        return arguments if self.padded is None else arguments | {"padded": self.padded}

    @property
    def weight(self) -> Tensor:
        """The dense weight [heads·width, D], as nn.Linear has it (a transposed view)."""
        rows = self.rows.long()
        free = self.inputs - self.width
        # Where each row of the weight stands in the list of all free rows followed by the identity's rows.
        slot = torch.arange(self.width, device=rows.device).expand_as(rows) + self.heads * free
        place = torch.full((self.heads, self.inputs), -1, device=rows.device).scatter(1, rows, slot)
        rank = (place < 0).cumsum(1) - 1 + free * torch.arange(self.heads, device=rows.device)[:, None]
        place = torch.where(place < 0, rank, place)
        identity = torch.eye(self.width, dtype=self.free.dtype, device=self.free.device)
        stacked = torch.cat([self.free.flatten(0, 1), identity])
        return stacked.index_select(0, place.mT.flatten()).view(self.inputs, self.heads * self.width).mT

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.linear(x, self.weight, self.bias)
        return y if self.padded is None else widen(y, self.heads, self.padded)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.arguments.items())
