"""The forms of a sliced model's rotations: which basis to take within each junction's subspace, to store least.

A basis Q_j [D, D′] of the subspace that junction j keeps may be turned by any orthogonal G_j without a change of the
model: T_j = Q_j G_j. What leads from one junction to the next is S_j = T_{j−1}ᵀ T_j. He et al., Getting Free Bits Back
from Rotational Symmetries in LLMs (2024), section 2, states the freedom; here it is spent, in one of three ways:

- dense: G_j = I, the bases as they were found;
- triangular: S_j is lower triangular, by a QR decomposition;
- polar: S_j = I − Y_j Y_jᵀ with Y_j [D′, D − D′]. Of T_{j−1}ᵀ Q_j = U Σ Vᵀ, G_j = V Uᵀ makes S_j = U Σ Uᵀ, and two
  subspaces of dimension D′ in D share at least 2 D′ − D directions, in which σ is 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gaugekit.nn.triangle import pack_triangle, triangle_size


@dataclass(frozen=True)
class Frame:
    """``basis`` T_j [D, D′] of a junction, the tensors of the shortcut that leads to it (by the names its module has
    for them; none for the first), and the columns of its Y (polar only).
    """

    basis: Tensor
    shortcut: dict[str, Tensor]
    rank: int | None = None


def frames(bases: Iterable[Tensor], form: str, *, drop: float = 0.0) -> Iterator[Frame]:
    """Of each Q_j [D, D′] (float64) in turn, its frame.

    ``drop``: of a polar form, columns of Y whose 1 − σ is below it go (0: only those that are rounding). That changes
    the model.
    """
    before: Tensor | None = None
    for basis in bases:
        frame = Frame(basis, {}) if before is None else MAKERS[form](before, basis, drop)
        before = frame.basis
        yield frame


def last(before: Tensor) -> Frame:
    """The frame of a stream that is not sliced, all D directions in their own order, after one that is."""
    size = before.shape[0]
    return Frame(torch.eye(size, dtype=before.dtype), {"matrix": before.mT.contiguous()})


def _dense(before: Tensor, basis: Tensor, drop: float) -> Frame:
    return Frame(basis, {"matrix": before.mT @ basis})


def _triangular(before: Tensor, basis: Tensor, drop: float) -> Frame:
    turn, upper = torch.linalg.qr((before.mT @ basis).mT)
    signs = torch.where(upper.diagonal() < 0, -1.0, 1.0).to(upper)
    return Frame(basis @ (turn * signs), {"packed": pack_triangle((signs[:, None] * upper).mT)})


def _polar(before: Tensor, basis: Tensor, drop: float) -> Frame:
    size, width = basis.shape
    u, sigma, vt = torch.linalg.svd(before.mT @ basis)
    most = polar_rank(size, width)
    short = (1 - sigma).clamp_min(0)[width - most :]
    rank = int((short >= drop).sum()) if drop else most
    turned = basis @ (vt.mT @ u.mT)
    if not rank:
        return Frame(turned, {}, 0)
    factor = u[:, width - rank :] * short[most - rank :].sqrt()
    turn, _ = torch.linalg.qr(factor[:rank].mT)
    factor = factor @ turn  # Y R: the same Y Yᵀ, its first rows lower triangular
    return Frame(turned, {"packed": pack_triangle(factor[:rank]), "rest": factor[rank:].contiguous()}, rank)


MAKERS = {"dense": _dense, "triangular": _triangular, "polar": _polar}


def polar_rank(size: int, width: int) -> int:
    """The columns of Y: directions that two subspaces of dimension ``width`` in ``size`` need not share."""
    return min(size - width, width)


def shortcut_numbers(size: int, width: int, form: str, rank: int | None = None) -> int:
    """The numbers a shortcut between two sliced bases stores; ``rank`` of its Y, where it is not the full one."""
    if form == "dense":
        return width * width
    if form == "triangular":
        return triangle_size(width)
    rank = polar_rank(size, width) if rank is None else rank
    return triangle_size(rank) + (width - rank) * rank


def shortcut_products(size: int, width: int, form: str, rank: int | None = None) -> int:
    """The multiply-adds of a shortcut between two sliced bases for one token."""
    if form != "polar":
        return width * width
    return 2 * width * (polar_rank(size, width) if rank is None else rank)
