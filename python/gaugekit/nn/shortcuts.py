"""What leads the residual stream from one sliced basis into the next, ``x ← x S``, in the forms S can be stored in.

Each adds ``x S − x`` to what its junction's writer answers, since the block itself adds x. Where S is wider than x (the
last junction of a model whose head is not sliced), the block adds x padded with zeros, and so it is here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional

from gaugekit.nn.kept import Keeping
from gaugekit.nn.triangle import triangle_size, unpack_triangle


class Shortcut(nn.Module):
    """``shortcut(y, x)`` [..., outputs] is ``y + x S − x``: y [..., outputs], x [..., inputs]."""


class DenseShortcut(Shortcut):
    """S [inputs, outputs] as it is."""

    def __init__(self, inputs: int, outputs: int, device=None, dtype=None):
        super().__init__()
        self.matrix = nn.Parameter(torch.empty(inputs, outputs, device=device, dtype=dtype))

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        return _add(y, x, self.matrix)


class Unpacked(Keeping, Shortcut, ABC):
    """A shortcut whose parameters are stored without their zeros; ``matrix()`` is made of them once, then kept.

    It is made anew after its parameters change, and in every call that trains them. A change past autograd's eyes
    (``parameter.data.copy_(...)``, as moving averages of weights do) is seen after the next ``train()`` or ``eval()``.
    It is no part of a state_dict, of a pickle or of a copy.
    """

    @abstractmethod
    def unpack(self) -> Tensor:
        """The matrix of the parameters as they are now."""

    def matrix(self) -> Tensor:
        """``unpack()``, or what it gave last time."""
        return self.kept(
            self.unpack, *self._parameters.values()
        )  # no walk over submodules: every token pays for it


class TriangularShortcut(Unpacked):
    """S [width, width] lower triangular; ``packed`` [width (width + 1) / 2] holds its rows without their zeros."""

    def __init__(self, width: int, device=None, dtype=None):
        super().__init__()
        self.width = width
        self.packed = nn.Parameter(torch.empty(triangle_size(width), device=device, dtype=dtype))

    def unpack(self) -> Tensor:
        return unpack_triangle(self.packed, self.width)

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        return _add(y, x, self.matrix())


class PolarShortcut(Unpacked):
    """S = I − Y Yᵀ, Y [width, rank]; its first ``rank`` rows are lower triangular: ``packed`` [rank (rank + 1) / 2]
    holds them without their zeros, ``rest`` [width − rank, rank] the others.

    ``rank`` 0 leaves the stream as it is. Multiply-adds a token: 2·width·rank instead of width².
    """

    def __init__(self, width: int, rank: int, device=None, dtype=None):
        super().__init__()
        self.rank = rank
        if rank:
            self.packed = nn.Parameter(torch.empty(triangle_size(rank), device=device, dtype=dtype))
            self.rest = nn.Parameter(torch.empty(width - rank, rank, device=device, dtype=dtype))

    def unpack(self) -> Tensor:
        """Yᵀ [rank, width]: both products of one row then read it row by row, a third faster than Y."""
        return torch.cat([unpack_triangle(self.packed, self.rank), self.rest]).mT.contiguous()

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        if not self.rank:
            return y
        factor = self.matrix()
        inner = functional.linear(x.flatten(0, -2), factor)
        return torch.addmm(y.flatten(0, -2), inner, factor, alpha=-1).view(y.shape)


def _add(y: Tensor, x: Tensor, matrix: Tensor) -> Tensor:
    """y + x S − x, x padded to the width of y."""
    rest = y - functional.pad(x, (0, y.shape[-1] - x.shape[-1]))
    return torch.addmm(rest.flatten(0, -2), x.flatten(0, -2), matrix).view(y.shape)
