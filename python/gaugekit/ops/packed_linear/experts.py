"""``packed_experts``: rows of x, grouped by expert, each times its expert's packed matrix; the others are not decoded.

What ``torch.nn.functional.grouped_mm`` is to plain matrices. The matrices of all experts are packed as one, one below
the other (docs/resident.md), and every row is packed by itself: an expert's rows are views of the parts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gaugekit import _library
from gaugekit.ops.operands import check_tensors
from gaugekit.ops.packed_linear import layout, operator
from gaugekit.ops.packed_linear.weight import WEIGHT, PackedWeight, check_operand


def packed_experts(x: Tensor, packed: PackedWeight, ends: Tensor) -> Tensor:
    """x [S, K], sorted by expert, times W [E, N, K], which is packed as [E · N, K]: [S, N] in x's dtype.

    Expert e multiplies the rows from ``ends[e - 1]`` (0 for the first) up to ``ends[e]``, as ``packed_linear`` would by
    itself. ``ends`` int64 or int32 [E], never falling; rows at ``ends[-1]`` and beyond give zeros. Differentiable in x.
    ValueError for shapes, dtypes or devices that do not fit.
    """
    check_tensors(x=x, ends=ends)
    check_operand(x, packed)
    if x.dim() != 2 or x.shape[1] != packed.columns:
        raise ValueError(f"x: expected [S, {packed.columns}], got {list(x.shape)}")
    if x.device != packed.raw.device:
        raise ValueError(f"x: expected it on {packed.raw.device} like the weight, got {x.device}")
    if ends.dtype not in (torch.int64, torch.int32) or ends.dim() != 1:
        raise ValueError(f"ends: expected int64 or int32 [E], got {ends.dtype} {list(ends.shape)}")
    if ends.shape[0] == 0 or packed.shape[0] % ends.shape[0]:
        raise ValueError(
            f"ends: expected one for each expert of {packed.shape[0]} packed rows, got {ends.shape[0]}"
        )
    return torch.ops.gaugekit.packed_experts(x, ends, *packed[:5])


def _groups(rows: int, ends: Tensor) -> list[tuple[int, int, int]]:
    """(expert, first row, row behind the last) of the experts that have rows. ValueError for ends that fall or pass the
    last row."""
    groups, begin = [], 0
    for expert, end in enumerate(ends.tolist()):
        if not begin <= end <= rows:
            raise ValueError(
                f"ends: expected numbers from 0 to {rows} that never fall, got {end} after {begin}"
            )
        if begin < end:
            groups.append((expert, begin, end))
        begin = end
    return groups


def _expert(index: int, count: int, columns: int, parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The parts of one expert's matrix: views, among all experts' escapes."""
    raw, planes, escapes, offsets, window = parts
    rows, segments = raw.shape[0] // count, layout.segments_of(columns)
    begin, end = index * rows, (index + 1) * rows
    return (
        raw[begin:end],
        planes[begin:end],
        escapes,
        offsets[begin * segments : end * segments + 1],
        window[begin:end],
    )


def composition(x: Tensor, ends: Tensor, *parts: Tensor) -> Tensor:
    count, groups = ends.shape[0], _groups(x.shape[0], ends)
    out = x.new_empty((x.shape[0], parts[0].shape[0] // count))
    out[groups[-1][2] if groups else 0 :] = 0
    for expert, begin, end in groups:
        out[begin:end] = operator.planned(x[begin:end], *_expert(expert, count, x.shape[1], parts), None)
    return out


def composition_backward(grad: Tensor, ends: Tensor, *rest) -> Tensor:
    *parts, columns = rest
    count, groups = ends.shape[0], _groups(grad.shape[0], ends)
    dx = grad.new_empty((grad.shape[0], columns))
    dx[groups[-1][2] if groups else 0 :] = 0
    for expert, begin, end in groups:
        own = _expert(expert, count, columns, parts)
        dx[begin:end] = torch.ops.gaugekit.packed_linear_backward(grad[begin:end], *own, columns)
    return dx


def _save(ctx, inputs, output):
    x, *rest = inputs
    ctx.save_for_backward(*rest)
    ctx.columns = x.shape[1]


def _backward(ctx, grad):
    dx = None
    if ctx.needs_input_grad[0]:
        dx = torch.ops.gaugekit.packed_experts_backward(grad, *ctx.saved_tensors, ctx.columns)
    return dx, None, None, None, None, None, None


_library.define(
    f"packed_experts(Tensor x, Tensor ends, {WEIGHT}) -> Tensor",
    composition,
    lambda x, ends, raw, *_: x.new_empty((x.shape[0], raw.shape[0] // ends.shape[0])),
)
_library.define(
    f"packed_experts_backward(Tensor grad, Tensor ends, {WEIGHT}, int columns) -> Tensor",
    composition_backward,
    lambda grad, ends, *rest: grad.new_empty((grad.shape[0], rest[-1])),
)
torch.library.register_autograd(
    "gaugekit::packed_experts", _backward, setup_context=_save, lib=_library.library
)
