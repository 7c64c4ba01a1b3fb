"""Which inputs carry the identity, or a triangle: the choice of rows that decides whether a fixed gauge survives bf16.

A projection W [D, K] of full rank is W = C M with M = W[P] for any K rows P that span it, and C[P] = I. Rounding C
costs accuracy in proportion to its entries, so P is chosen to keep them small. The first K rows are never taken: they
break bf16. Where no such choice is good, a head is turned, W = (W Q) Qᵀ with Q orthogonal, until W[P] Q is lower
triangular: its entries are then no larger than its rows were long, whatever P is.
"""

from __future__ import annotations

import torch
from torch import Tensor

BOUND = 1.02  # entries of C that a swap may leave; 1 would be a local maximum of the volume |det M|
SMALLEST_PIVOT = 1e-3  # a swap divides by such an entry; a smaller one would spoil the digits of C
CHOICES = ("balanced", "max_volume", "shared_partition", "triangular")
STILL_FIXED = 1.024  # BOUND as bfloat16 may round it
NOISE = 64  # of a computed entry that nearly cancelled, in units of the least singular value that counts


def choose(weight: Tensor, how: str, partner: Tensor) -> Tensor:
    """Rows [heads, K] int64 for ``weight`` [heads, D, K] float64, by one of ``CHOICES``.

    ``partner`` [heads, D] is what "balanced" weighs a row by. A weight that was fixed so before keeps its rows,
    whatever its dtype rounded: a second fix changes nothing.
    """
    if how not in CHOICES:
        raise ValueError(f"rows: expected one of {', '.join(CHOICES)}; got {how!r}")
    if how == "triangular":
        return triangular(weight)
    fixed = _fixed(weight)
    if how == "balanced":
        return balanced(weight, partner) if fixed is None else fixed
    if how == "max_volume":
        return max_volume(weight) if fixed is None or weight.abs().max() > STILL_FIXED else fixed
    partition = fixed is not None and fixed.numel() == len(fixed.unique()) == weight.shape[1]
    return fixed if partition else shared_partition(weight)


def balanced(weight: Tensor, partner: Tensor) -> Tensor:
    """Per head, rows that keep small what rounding does to a head's product W B: [heads, K] int64.

    Fixed, the product is C (M B). What is rounded in channel j comes to ‖C_j‖ in size and is then multiplied by row j
    of M B, which is row P_j of W B, so that the rounded product errs in proportion to the root of

        Σ_j ‖C_j‖² ‖(W B)[P_j]‖²

    Starting from ``max_volume``, one row is swapped for another, always the best pair, while that lowers the sum by
    more than a thousandth. Entries of C may exceed 1. Without this B would be made of rows that nearly cancel.

    weight: W [heads, D, K], float64.
    partner: ‖(W B)[i]‖² for every row i, [heads, D]; B is what takes up the block: W_O of all heads that share it, or
        the queries.

    Raises ValueError where D < K.
    """
    rows = max_volume(weight)
    for head, costs in enumerate(partner):
        if _full_rank(weight[head, rows[head]]):
            _balance(coordinates(weight[head : head + 1], rows[head : head + 1])[0], rows[head], costs)
    return rows


def _balance(current: Tensor, rows: Tensor, costs: Tensor) -> None:
    """Swaps ``rows`` [K] in place; ``current`` is C [D, K], ``costs`` [D]."""
    while True:
        gram, weights = current.mT @ current, costs[rows]
        squares = gram.diagonal()
        total = (squares * weights).sum()
        # Row r takes the place of column j: C_j becomes C_j / C[r, j], and each other column C_k loses C[r, k] of it.
        weighted = current * weights
        crossed = weighted @ gram - weighted * squares
        grown = (weighted * current).sum(1, keepdim=True) - weighted * current + costs[:, None]
        after = (total - squares * weights) - 2 * crossed / current + squares / current.square() * grown
        after = after.masked_fill(current.abs() < SMALLEST_PIVOT, torch.inf)
        after[rows] = torch.inf
        row, column = divmod(int(after.argmin()), len(rows))
        if not after[row, column] < 0.999 * total:
            return
        rows[column] = row
        _swap(current, row, column)


def max_volume(weight: Tensor) -> Tensor:
    """Per head, rows of locally maximal volume |det W[P]|: every entry of C is then at most 1.02 in size.

    Column-pivoted QR of Wᵀ, then swaps of one row for another while some |C[i, j]| > 1.02: each multiplies the volume
    by that entry (Goreinov et al., "How to find a good submatrix", 2010). ``weight`` [heads, D, K] float64; returns
    [heads, K] int64. Raises ValueError where D < K.
    """
    rows = _pivots(weight)
    for head in range(len(weight)):
        if not _full_rank(weight[head, rows[head]]):
            continue  # a rank-deficient head has no volume to raise; its pivots span it already
        current = coordinates(weight[head : head + 1], rows[head : head + 1])[0]
        while True:
            row, column = divmod(int(current.abs().argmax()), weight.shape[2])
            if current[row, column].abs() <= BOUND:
                break
            rows[head, column] = row
            _swap(current, row, column)
    return rows


def shared_partition(weight: Tensor) -> Tensor:
    """One partition of the D inputs for all heads (heads·K = D): a kernel then gathers x once for the layer.

    Starts with heads taking pivots in turn; then inputs of two heads change places while that raises
    Σ_h log|det W_h[P_h]|, the best pair first. ``weight`` [heads, D, K] -> rows [heads, K] int64, a permutation of D.
    Raises ValueError where heads·K ≠ D, or a head has not full rank.
    """
    heads, inputs, width = weight.shape
    if heads * width != inputs:
        raise ValueError(
            f"rows: 'shared_partition' expects heads·width = inputs, got {heads}·{width} and {inputs}"
        )
    rows = _pivots(weight, in_turn=True)
    if not all(_full_rank(weight[head, rows[head]]) for head in range(heads)):
        raise ValueError("rows: 'shared_partition' expects heads of full rank; choose 'max_volume'")
    current = coordinates(weight, rows)
    while True:
        # volume[s, t]: by what the volume of slot s's head changes when its row gives way to the row of slot t
        volume = current[:, rows.flatten()].movedim(1, 2).reshape(inputs, inputs).abs()
        best = int((volume * volume.mT).argmax())
        first, second = divmod(best, inputs)
        if volume[first, second] * volume[second, first] <= BOUND:
            return rows
        (a, i), (b, j) = divmod(first, width), divmod(second, width)
        rows[a, i], rows[b, j] = rows[b, j].clone(), rows[a, i].clone()
        _swap(current[a], int(rows[a, i]), i)
        _swap(current[b], int(rows[b, j]), j)


def removed(width: int, how: str) -> int:
    """How many numbers of a head of ``width`` are exactly 0 or 1 once its rows are chosen by one of ``CHOICES``."""
    return width * (width - 1) // 2 if how == "triangular" else width**2


def triangular(weight: Tensor) -> Tensor:
    """Per head, rows for ``turned``: the pivots of Wᵀ, each with the longest part outside the span of those before.

    They depend on W Wᵀ alone, which no rotation changes, and span the head, so that the triangle is the same wherever
    on the orbit it starts, and none of its diagonal is 0 unless the head has a lower rank. A head that is triangular
    already in some rows keeps these, whatever its dtype rounded. ``weight`` [heads, D, K] float64; returns [heads, K]
    int64. Raises ValueError where D < K.
    """
    rows = _pivots(weight)
    for head, one in enumerate(weight):
        rows[head] = _stairs(one, rows[head])
    return rows


def _stairs(weight: Tensor, pivots: Tensor) -> Tensor:
    """Rows P [K] with ``weight[P]`` lower triangular, its diagonal above 0 but in channels that are idle and nowhere
    less than the channel's other entries, to rounding; the ``pivots`` where there are none. ``weight`` [D, K].
    """
    there = weight != 0
    last = (there * torch.arange(1, weight.shape[1] + 1, device=weight.device)).amax(1) - 1
    rows, free = pivots.clone(), torch.ones_like(last, dtype=torch.bool)
    for channel, used in enumerate(there.any(0).tolist()):
        fits = free & ((last == channel) & (weight[:, channel] > 0) if used else last < channel)
        if not fits.any():
            return pivots
        rows[channel] = weight[:, channel].masked_fill(~fits, -torch.inf).argmax()
        free[rows[channel]] = False
    diagonal, noise = weight[rows].diagonal(), NOISE * _tolerance(weight) * weight.abs().max()
    return rows if bool((weight.abs().amax(0) <= STILL_FIXED * diagonal + noise).all()) else pivots


def turned(weight: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """(C, Q) with C = W Q, Q orthogonal and C[P] lower triangular with a diagonal ≥ 0, all exactly.

    With the rows of ``triangular`` no entry of a channel exceeds its diagonal. A head that is so already stays as it
    is, and channels beyond its rank become 0. ``weight`` [heads, n, K], ``rows`` [heads, K]; C [heads, n, K], Q [heads,
    K, K].
    """
    block = take(weight, rows)
    turn, upper = torch.linalg.qr(block.mT)
    signs = torch.where(upper.diagonal(dim1=1, dim2=2) < 0, -1.0, 1.0).to(upper)[:, None]
    turn, triangle = turn * signs, (upper.mT * signs).tril()
    fixed = (weight @ turn).scatter(1, rows[..., None].expand_as(block), triangle)
    sizes = triangle.diagonal(dim1=1, dim2=2)[:, None]
    fixed = fixed.masked_fill(sizes <= sizes.amax(2, keepdim=True) * _tolerance(block), 0)
    done = (block.tril() == block).all((1, 2)) & (block.diagonal(dim1=1, dim2=2) >= 0).all(1)
    identity = torch.eye(rows.shape[1], dtype=weight.dtype, device=weight.device)
    return torch.where(done[:, None, None], weight, fixed), torch.where(done[:, None, None], identity, turn)


def coordinates(weight: Tensor, rows: Tensor) -> Tensor:
    """C with C M = W, M = W[P], and C[P] = I exactly. ``weight`` [heads, n, K], ``rows`` [heads, K] -> [heads, n, K].

    Where M is singular (a head of lower rank) C is the least-norm solution outside P, and C M = W still.
    """
    basis = take(weight, rows)
    if all(_full_rank(one) for one in basis):
        found = torch.linalg.solve(basis, weight, left=False)
    else:
        found = weight @ torch.linalg.pinv(basis, rtol=_tolerance(basis))
    identity = torch.eye(rows.shape[1], dtype=weight.dtype, device=weight.device).expand_as(basis)
    return found.scatter(1, rows[..., None].expand_as(basis), identity)


def _fixed(weight: Tensor) -> Tensor | None:
    """Rows [heads, K] where ``weight`` is the identity already, None where a head has none."""
    ones = (weight == 1) & ((weight != 0).sum(2, keepdim=True) == 1)  # [heads, D, K]: row i is unit vector j
    return ones.to(torch.uint8).argmax(1) if bool(ones.any(1).all()) else None


def take(weight: Tensor, rows: Tensor) -> Tensor:
    """M = W[P]: [heads, n, K], [heads, K] -> [heads, K, K]."""
    return weight.gather(1, rows[..., None].expand(-1, -1, weight.shape[2]))


def _pivots(weight: Tensor, in_turn: bool = False) -> Tensor:
    """Column-pivoted QR of Wᵀ: always the row with the longest part outside the span of those taken.

    Lengths are kept by subtraction, and computed anew before cancellation can spoil them.
    """
    heads, inputs, width = weight.shape
    if inputs < width:
        raise ValueError(
            f"weight: expected at least as many inputs as the head is wide, got {inputs} < {width}"
        )
    rows = torch.empty(heads, width, dtype=torch.int64)
    basis = torch.zeros(heads, width, width, dtype=weight.dtype)  # one orthonormal row a step
    squares = weight.square().sum(-1)
    exact = squares.amax(1)  # the largest square when the lengths were last computed
    free = torch.ones(heads, inputs, dtype=torch.bool)
    turns = [slice(head, head + 1) for head in range(heads)] if in_turn else [slice(None)]
    for step in range(width):
        for turn in turns:
            taken = basis[turn, :step]
            if bool((squares[turn].masked_fill(~free[turn], 0).amax(1) < 1e-6 * exact[turn]).any()):
                squares[turn] = (weight[turn] - weight[turn] @ taken.mT @ taken).square().sum(-1)
                exact[turn] = squares[turn].masked_fill(~free[turn], 0).amax(1)
            row = squares[turn].masked_fill(~free[turn], -1).argmax(1)
            rows[turn, step] = row
            if in_turn:
                free[:, row] = False
            else:
                free[torch.arange(heads), row] = False
            direction = weight[turn].gather(1, row[:, None, None].expand(-1, 1, width))
            for _ in range(2):  # once is not enough where little is left
                direction = direction - direction @ taken.mT @ taken
            direction = torch.nn.functional.normalize(direction, dim=-1, eps=torch.finfo(weight.dtype).tiny)
            basis[turn, step] = direction[:, 0]
            squares[turn] -= (weight[turn] @ direction.mT)[..., 0].square()
    return rows


def _swap(current: Tensor, row: int, column: int) -> None:
    """C after ``row`` has replaced the row of ``column`` in P: one rank-one update, in place."""
    change = current[row].clone()
    change[column] -= 1
    current -= torch.outer(current[:, column], change / current[row, column])


def _tolerance(basis: Tensor) -> float:
    return basis.shape[-1] * torch.finfo(basis.dtype).eps


def _full_rank(basis: Tensor) -> bool:
    spectrum = torch.linalg.svdvals(basis)
    return bool(spectrum[-1] > spectrum[0] * _tolerance(basis))
