"""Lower triangular matrices without their zeros."""

from __future__ import annotations

import torch
from torch import Tensor


def triangle_size(size: int) -> int:
    """How many numbers a triangle of ``size`` rows has, its diagonal included."""
    return size * (size + 1) // 2


def pack_triangle(matrix: Tensor) -> Tensor:
    """The rows of lower triangular matrices [..., size, size], one after the other, without their zeros."""
    rows, columns = torch.tril_indices(*matrix.shape[-2:], device=matrix.device)
    return matrix[..., rows, columns]


def unpack_triangle(packed: Tensor, size: int) -> Tensor:
    """The inverse of ``pack_triangle``: [..., size, size]."""
    rows, columns = torch.tril_indices(size, size, device=packed.device)
    square = packed.new_zeros(*packed.shape[:-1], size * size)
    return square.index_copy(-1, size * rows + columns, packed).unflatten(-1, (size, size))
