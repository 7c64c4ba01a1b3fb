"""encode and decode: a sliced model onto the stack, group by group, each rotation taken from what lies there already.

He, Flamich, Hernández-Lobato, "Getting Free Bits Back from Rotational Symmetries in LLMs" (arXiv:2410.01309), with a
code for the rotations that loses nothing: the message comes back to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import torch

from gaugekit.codec.bitsback import payload as form
from gaugekit.codec.bitsback import pivots, weights
from gaugekit.codec.bitsback.model import (
    BITS,
    Coupling,
    Group,
    GroupReport,
    ModelReport,
    Progress,
    check,
    scale_name,
)
from gaugekit.ops.bitsback.operator import Stack, integers_of, rotate
from gaugekit.ops.canonical_qr import canonical_qr


def encode(
    groups: list[Group],
    others: dict[str, torch.Tensor] | None = None,
    couplings: Iterable[Coupling] = (),
    progress: Progress | None = None,
    path: int = -1,
) -> tuple[torch.Tensor, ModelReport]:
    """(payload, report): the model's tensors, in a gauge that the payload's own bits choose.

    Of each group the stored tensors are round(weight · G) with a G in O(D) that is read from the stack: any G is as
    good, so the bits that chose it need not be stored. They come back when the group is decoded.

    groups: in the order of coding; the first takes its bits from ``others``, each later one from those before it.
    others: {name: tensor} of any dtype, stored as they are.
    couplings: matrices between two groups.
    progress: called with (groups done, groups in all).
    path: of the C++ code, 0 portable, 1 AVX2, 2 AVX-512, −1 the widest there is; changes the speed, never a byte.

    Returns uint8 [bytes] and what every group came to. ValueError for what does not fit. All is held in memory. The
    tensors, and with them the bytes, follow from torch's float32 product on this machine; a payload is decoded to the
    same bits on every other.
    """
    others, couplings = dict(others or {}), list(couplings)
    check(groups, others, couplings)
    stack, report = Stack(path=path), ModelReport()
    header = {"others": [weights.push(stack, name, tensor) for name, tensor in others.items()], "groups": []}
    gauges: dict[int, torch.Tensor] = {}
    for index, group in enumerate(groups):
        arriving = [c for c in couplings if c.right == index]
        entry, gauge, group_report = _encode_group(stack, group, arriving, gauges, path)
        header["groups"].append(entry)
        report.groups.append(group_report)
        gauges[index] = gauge
        for left in {c.left for c in couplings} | set(gauges):
            if left in gauges and not any(c.left == left and c.right > index for c in couplings):
                del gauges[left]
        if progress:
            progress(index + 1, len(groups))
    header["seeds"] = stack.seeds
    result = form.build(header, stack)
    report.payload_bytes, report.seed_bits = result.numel(), 16 * stack.seeds
    return result, report


def _reference_gauge(group: Group, path: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(pivot rows [p], the gauge [D, D] in which they are lower triangular with a positive diagonal)."""
    total = pivots.row_count(group)

    def factored(rows: torch.Tensor):
        matrix = torch.zeros(group.dimension, group.dimension, dtype=torch.float64)
        matrix[: rows.numel()] = pivots.gather(group, rows)
        q, r = canonical_qr(matrix.T, path)
        return q, pivots.loss(matrix[: rows.numel()], r[: rows.numel(), : rows.numel()])

    even = pivots.evenly(total, min(total, group.dimension))
    q, lost = factored(even)
    if lost > pivots.TOLERATED_LOSS:
        chosen = pivots.greedy(group)
        other_q, other_lost = factored(chosen)
        told = 16 / max(1, group.dimension)
        if chosen.numel() < even.numel() or other_lost + told < lost:
            return chosen, other_q
    return even, q


def _encode_group(
    stack: Stack, group: Group, couplings: list[Coupling], gauges: dict[int, torch.Tensor], path: int
) -> tuple[dict, torch.Tensor, GroupReport]:
    rows, q = _reference_gauge(group, path)
    largest = max(group.parts, key=lambda part: part.weight.numel()).dtype
    count, bits = rows.numel(), BITS[largest]
    marks, seeds = [stack.bits], stack.seeds
    integers, signs = stack.pop_random_rotation(count, group.dimension, bits)
    marks.append(stack.bits)
    gauge = rotate(q, integers, signs, bits, path).float()
    stored = []
    for part in group.parts:
        rotated = part.weight.float() @ gauge
        stored.append(
            weights.store(
                part.name, rotated.T if part.axis == 0 and rotated.dim() == 2 else rotated, part.dtype
            )
        )
    matrix, variance = pivot_rows(stored, [part.axis for part in group.parts], rows)
    stack.push_corrections(matrix, variance, integers, signs, bits)
    marks.append(stack.bits)
    choice = pivots.push(stack, rows, pivots.row_count(group))
    marks.append(stack.bits)
    parts = [
        {"axis": part.axis, "tensors": _push_stored(stack, part.name, tensors)}
        for part, tensors in zip(group.parts, stored, strict=True)
    ]
    between = []
    for c in couplings:
        rotated = gauges[c.left].T @ c.weight.float() @ gauge
        between.append(_push_stored(stack, c.name, weights.store(c.name, rotated, c.dtype)))
    marks.append(stack.bits)
    sizes = [after - before for before, after in pairwise(marks)]
    free = integers_of(count, group.dimension)
    nominal = free * largest.itemsize * 8
    report = GroupReport(
        group.dimension, free, nominal, -sizes[0], *sizes[1:3], 16 * (stack.seeds - seeds), sizes[3]
    )
    entry = {"dimension": group.dimension, "bits": bits, "pivots": count, "choice": choice}
    return entry | {"parts": parts, "couplings": between}, gauge, report


def _push_stored(stack: Stack, name: str, tensors: list[torch.Tensor]) -> list[dict]:
    names = [name, scale_name(name)]
    return [weights.push(stack, n, tensor) for n, tensor in zip(names, tensors, strict=False)]


def pivot_rows(stored: list[list[torch.Tensor]], axes: list[int], rows: torch.Tensor):
    """(rows float64 [p, D], the variance of their rounding float64 [p]) of the stored parts."""
    matrices, variances, places, first = [], [], [], 0
    for tensors, axis in zip(stored, axes, strict=True):
        shape = tensors[0].shape
        count = shape[1 - axis] if len(shape) == 2 else 1
        inside = ((rows >= first) & (rows < first + count)).nonzero().view(-1)
        if inside.numel():
            matrix, variance = weights.rows_of(tensors, axis, rows[inside] - first)
            matrices.append(matrix), variances.append(torch.from_numpy(variance)), places.append(inside)
        first += count
    if not places:
        return torch.zeros(0, 0, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)
    order = torch.cat(places).argsort()
    return torch.cat(matrices)[order].contiguous(), torch.cat(variances)[order].contiguous()


def decode(
    payload: torch.Tensor, progress: Progress | None = None, path: int = -1
) -> dict[str, torch.Tensor]:
    """{name: tensor}: every tensor of ``encode``'s groups, couplings and others, as it was stored.

    payload: uint8 [bytes]. CorruptFile where a bit of it is not as it was: nothing is then returned.
    """
    if not isinstance(payload, torch.Tensor) or payload.dtype != torch.uint8 or payload.dim() != 1:
        raise ValueError("payload: expected a uint8 tensor of one axis")
    header, stack = form.parse(payload.contiguous(), path)
    tensors: dict[str, torch.Tensor] = {}
    groups = header["groups"]
    for done, entry in enumerate(reversed(groups)):
        _decode_group(stack, entry, tensors)
        if progress:
            progress(done + 1, len(groups))
    for entry in reversed(header["others"]):
        tensors[entry["name"]] = weights.pop(stack, entry)
    if not stack.holds_the_seed(header["seeds"]):
        raise form.damaged("what is left of the stack is not the seed")
    return {entry["name"]: tensors[entry["name"]] for entry in _entries(header)}


def _entries(header: dict):
    """Every tensor's entry, in the order of coding."""
    yield from header["others"]
    for group in header["groups"]:
        for part in group["parts"]:
            yield from part["tensors"]
        for coupling in group["couplings"]:
            yield from coupling


def _decode_group(stack: Stack, group: dict, tensors: dict[str, torch.Tensor]) -> None:
    """Pops a group's tensors into ``tensors``, and gives its rotation back to the stack."""
    for coupling in reversed(group["couplings"]):
        _pop_stored(stack, coupling, tensors)
    stored = [_pop_stored(stack, part["tensors"], tensors) for part in reversed(group["parts"])][::-1]
    axes = [part["axis"] for part in group["parts"]]
    total = sum(t[0].shape[1 - a] if t[0].dim() == 2 else 1 for t, a in zip(stored, axes, strict=True))
    rows = pivots.pop(stack, group["choice"], group["pivots"], total)
    if rows.numel() and int(rows.max()) >= total:
        raise form.damaged("a pivot row is none of its group's")
    matrix, variance = pivot_rows(stored, axes, rows)
    matrix = matrix if rows.numel() else matrix.new_zeros(0, group["dimension"])
    integers, signs = stack.recover_rotation(matrix, variance, group["bits"])
    stack.push_random_rotation(integers, signs, group["bits"])


def _pop_stored(stack: Stack, entries: list[dict], tensors: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    popped = [weights.pop(stack, entry) for entry in reversed(entries)][::-1]
    tensors |= {entry["name"]: tensor for entry, tensor in zip(entries, popped, strict=True)}
    return popped
