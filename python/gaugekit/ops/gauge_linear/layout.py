"""Between the compact form of a projection, ``free`` and ``rows``, and the dense weight [D, heads·width]."""

from __future__ import annotations

import torch
from torch import Tensor


def free_rows(rows: Tensor, inputs: int) -> Tensor:
    """The inputs not in ``rows`` [heads, width], ascending: [heads, inputs − width] int64."""
    taken = torch.zeros(rows.shape[0], inputs, dtype=torch.uint8, device=rows.device).scatter(
        1, rows.long(), 1
    )
    return taken.argsort(dim=1, stable=True)[:, : inputs - rows.shape[1]]


def dense(free: Tensor, rows: Tensor, block: Tensor | None = None) -> Tensor:
    """The weight [D, heads·width] that ``free`` [heads, D − width, width] and ``rows`` [heads, width] stand for.

    ``block`` [heads, width, width] is what stands in those rows: None where it is the identity.
    """
    heads, depth, width = free.shape
    inputs, rows = depth + width, rows.long()
    # Where each row of the weight stands in the list of all free rows followed by those of the block.
    slot = torch.arange(width, device=rows.device).expand_as(rows) + heads * depth
    if block is None:
        block = torch.eye(width, dtype=free.dtype, device=free.device)
    else:
        slot = slot + width * torch.arange(heads, device=rows.device)[:, None]
    place = torch.full((heads, inputs), -1, device=rows.device).scatter(1, rows, slot)
    rank = (place < 0).cumsum(1) - 1 + depth * torch.arange(heads, device=rows.device)[:, None]
    place = torch.where(place < 0, rank, place)
    stacked = torch.cat([free.flatten(0, 1), block.flatten(0, -2)])
    return stacked.index_select(0, place.mT.flatten()).view(inputs, heads * width)


def free_of(weight: Tensor, rows: Tensor) -> Tensor:
    """What of ``weight`` [D, heads·width] is not the identity's: [heads, D − width, width]."""
    (heads, width), inputs = rows.shape, weight.shape[0]
    place = free_rows(rows, inputs) * heads + torch.arange(heads, device=rows.device)[:, None]
    rows_of_heads = weight.reshape(inputs * heads, width)
    return rows_of_heads.index_select(0, place.flatten()).view(heads, inputs - width, width)
