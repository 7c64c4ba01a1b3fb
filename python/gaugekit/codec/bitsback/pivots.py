"""Which rows of a group say where its rotation is: the encoder's choice, which the payload tells.

Column j of the rotation is read off the part of pivot row j that the rows before it leave over, against the rounding of
the whole row: bits are lost where little is left over. Evenly spaced rows lose little in most weights; where they lose
more, rows are chosen greedily.
"""

from __future__ import annotations

import numpy as np
import torch

from gaugekit.codec.bitsback.model import Group
from gaugekit.ops.bitsback.operator import Stack

BLOCK = 64
POOL = 3  # candidates of the greedy choice, as multiples of D
FAINT = 2.0**-9  # of a row's length: what must be left over for a row to be worth choosing
TOLERATED_LOSS = 0.25  # bits a degree of freedom; choosing takes as long as the rest of the encoding


def gather(group: Group, rows: torch.Tensor) -> torch.Tensor:
    """float64 [n, D]: rows of the group's parts, counted through all of them."""
    out = torch.empty(rows.numel(), group.dimension, dtype=torch.float64)
    for part, first, count in spans(group):
        inside = (rows >= first) & (rows < first + count)
        if inside.any():
            weight = part.weight.view(1, -1) if part.weight.dim() == 1 else part.weight
            out[inside] = weight[rows[inside] - first].double()
    return out


def spans(group: Group):
    """(part, its first row, how many) of each part."""
    first = 0
    for part in group.parts:
        count = 1 if part.weight.dim() == 1 else part.weight.shape[0]
        yield part, first, count
        first += count


def row_count(group: Group) -> int:
    return sum(count for *_, count in spans(group))


def evenly(total: int, count: int) -> torch.Tensor:
    """``count`` of ``total`` rows, at equal distances."""
    return (torch.arange(count) * total + total // 2) // max(1, count)


def loss(rows: torch.Tensor, r: torch.Tensor) -> float:
    """Bits a degree of freedom that these pivots cost beside rows at right angles; r as ``canonical_qr`` gives it."""
    p, dimension = rows.shape
    if p == 0 or dimension < 2:
        return 0.0
    weight = torch.arange(dimension - 1, dimension - 1 - p, -1).double()
    even = rows.norm(dim=1) * ((weight + 1) / dimension).sqrt()
    lost = (even / r.diagonal().clamp_min(1e-300)).clamp(1e-300, 2.0**16).log2()
    return float((lost * weight).sum() / weight.sum().clamp_min(1))


def greedy(group: Group) -> torch.Tensor:
    """Rows chosen one block after another for what is left of them beside those before; fewer than D where the others
    lie within the span of the chosen ones.
    """
    total, dimension = row_count(group), group.dimension
    pool = evenly(total, min(total, POOL * dimension))
    left = gather(group, pool)
    length = left.norm(dim=1)
    left = (left / torch.where(length > 0, length, 1)[:, None]).float()
    free = length > 0
    chosen: list[int] = []
    while len(chosen) < dimension:
        size = torch.where(free, left.norm(dim=1), torch.zeros(()))
        candidates = size.argsort(descending=True, stable=True)[: min(BLOCK, dimension - len(chosen))]
        candidates = candidates[size[candidates] > FAINT]
        if not candidates.numel():
            break
        directions: list[torch.Tensor] = []
        best = float(size[candidates[0]])
        for i in candidates.tolist():
            rest = left[i].clone()
            for _ in range(2 if directions else 0):
                basis = torch.stack(directions)
                rest -= basis.T @ (basis @ rest)
            if float(rest.norm()) > max(FAINT, best / 2) or not directions:
                directions.append(rest / rest.norm())
                chosen.append(int(pool[i]))
                free[i] = False
        basis = torch.stack(directions)
        left -= (left @ basis.T) @ basis
    return torch.tensor(chosen, dtype=torch.int64)


def push(stack: Stack, rows: torch.Tensor, total: int) -> str:
    """Pushes the choice where it is not the even one; returns its name."""
    if torch.equal(rows, evenly(total, rows.numel())):
        return "even"
    bits = max(1, (total - 1).bit_length())
    for low in range(0, bits, 16):
        stack.push_uniform((rows >> low & 0xFFFF).int(), min(16, bits - low))
    return "listed"


def pop(stack: Stack, choice: str, count: int, total: int) -> torch.Tensor:
    if choice == "even":
        return evenly(total, count)
    bits = max(1, (total - 1).bit_length())
    rows = np.zeros(count, np.int64)
    for low in reversed(range(0, bits, 16)):
        rows |= stack.pop_uniform(count, min(16, bits - low)).numpy().astype(np.int64) << low
    return torch.from_numpy(rows)
