"""``gaugekit::canonical_qr``: the one QR factorisation with a positive diagonal, in one order of roundings."""

from __future__ import annotations

import torch

from gaugekit import _library
from gaugekit.reference import canonical_qr as reference


def _composition(matrix, path=-1):
    q, r = reference.canonical_qr(matrix.numpy())
    return torch.from_numpy(q), torch.from_numpy(r)


_library.define(
    "canonical_qr(Tensor matrix, int path=-1) -> (Tensor, Tensor)",
    _composition,
    lambda matrix, path=-1: (
        matrix.new_empty((matrix.shape[1], matrix.shape[0])).transpose(0, 1),
        matrix.new_empty((matrix.shape[1], matrix.shape[1])),
    ),
)


def canonical_qr(matrix: torch.Tensor, path: int = -1) -> tuple[torch.Tensor, torch.Tensor]:
    """(Q, R) with matrix = Q R, Qᵀ Q = I, R upper triangular with a diagonal ≥ 0: the same bits on any machine.

    Householder's reflectors in panels of 64, every sum in a fixed order (reference/canonical_qr.py): neither the
    processor, the width of its registers, the compiler nor the number of threads changes a bit. No LAPACK.

    matrix: float64 [m, n] on the CPU, finite, m ≥ n. A column that depends on those before it gets a diagonal element
        near zero and a column of Q that completes the others.
    path: of the C++ code, 0 portable, 1 AVX2, 2 AVX-512, −1 the widest there is; changes the speed, never a bit.

    Returns Q [m, n] and R [n, n]. ValueError for anything else.
    """
    if matrix.dtype != torch.float64 or matrix.device.type != "cpu":
        raise ValueError(f"matrix: expected float64 on the CPU, got {matrix.dtype} on {matrix.device}")
    if matrix.dim() != 2 or matrix.shape[0] < matrix.shape[1]:
        raise ValueError(f"matrix: expected [m, n] with m >= n, got {list(matrix.shape)}")
    if not torch.isfinite(matrix).all():
        raise ValueError("matrix: expected finite numbers")
    return torch.ops.gaugekit.canonical_qr(matrix, path)
