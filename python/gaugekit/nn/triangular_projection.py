"""A projection whose gauge is fixed by turning each head, so that one block of it is lower triangular."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gaugekit.nn.gauge_projection import GaugeProjection
from gaugekit.nn.triangle import triangle_size, unpack_triangle


class TriangularProjection(GaugeProjection):
    """y_h = x[..., P_h] L_h + x[..., P̄_h] F_h (+ b): x [..., D] -> [..., heads·width].

    L_h is lower triangular: the parameter ``triangle`` [heads, width (width + 1) / 2] holds its rows without their
    zeros. Everything else is as in ``GaugeProjection``, where L_h is the identity; but no product is left out, so that
    torch always multiplies a dense weight.
    """

    form = "triangular_projection"

    def __init__(self, inputs: int, heads: int, width: int, bias: bool = False, padded: int | None = None,
                 device: torch.device | str | None = None, dtype: torch.dtype | None = None):  # fmt: skip
        super().__init__(inputs, heads, width, bias, padded, device, dtype)
        self.triangle = nn.Parameter(torch.zeros(heads, triangle_size(width), device=device, dtype=dtype))

    def _block(self) -> Tensor:
        return unpack_triangle(self.triangle, self.width)

    def _made_of(self) -> tuple[Tensor, ...]:
        return self.free, self.triangle, self.rows

    def _plan(self, dtype: torch.dtype, device: str) -> tuple[str, str]:
        return "dense", "a triangle leaves no product out"
