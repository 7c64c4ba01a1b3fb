"""``packed_linear``: y = x Wᵀ + b, W kept in the lossless layout of docs/resident.md and decoded inside the product.

The layout is of one length for every block, so a product can decode where it stands. Others of the kind: ZipServ
(arXiv 2603.17435), SplitZip (arXiv 2605.01708).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from gaugekit import _library
from gaugekit.ops import sharding
from gaugekit.ops.operands import check_tensors
from gaugekit.ops.packed_linear import layout
from gaugekit.ops.packed_linear.choice import plan
from gaugekit.ops.packed_linear.sharding import rules
from gaugekit.ops.packed_linear.weight import WEIGHT, PackedWeight, check_operand


def packed_linear(x: Tensor, packed: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """x [..., K] times a packed W [N, K], plus ``bias`` [N]: [..., N] in x's dtype; sums in float32 (float64).

    x is of W's dtype, float32 or float64; for a W of float8_e5m2, whose numbers are taken as they are and unscaled, of
    float16, bfloat16, float32 or float64. Differentiable in x and ``bias``; W is frozen. For few rows W is decoded
    inside the product, with the same bits as that product on plain weights; for many, by tiles for torch's matmul
    (``plan`` says which). ValueError for shapes, dtypes or devices that do not fit.
    """
    check_tensors(x=x, bias=bias)
    if sharding.shared(x):
        return sharding.local(packed_linear, rules, {"x": x, "packed": packed, "bias": bias})
    check_operand(x, packed)
    if x.dim() < 1 or x.shape[-1] != packed.columns:
        raise ValueError(f"x: expected [..., {packed.columns}], got {list(x.shape)}")
    if x.device != packed.raw.device:
        raise ValueError(f"x: expected it on {packed.raw.device} like the weight, got {x.device}")
    if bias is not None and (
        bias.shape != packed.shape[:1] or bias.dtype != x.dtype or bias.device != x.device
    ):
        raise ValueError(
            f"bias: expected [{packed.shape[0]}] of {x.dtype} on {x.device}, "
            f"got {list(bias.shape)} of {bias.dtype} on {bias.device}"
        )
    if torch.compiler.is_compiling():  # a graph for any number of rows: which way is decided as it runs
        return torch.ops.gaugekit.packed_linear_planned(x, *packed[:5], bias)
    return planned(x, *packed[:5], bias)


def planned(
    x: Tensor,
    raw: Tensor,
    planes: Tensor,
    escapes: Tensor,
    offsets: Tensor,
    window: Tensor,
    bias: Tensor | None,
) -> Tensor:
    columns = x.shape[-1]
    rows = x.numel() // max(1, columns)
    fused = plan(rows, x.dtype, x.device.type) == "fused"
    return torch.ops.gaugekit.packed_linear(x, raw, planes, escapes, offsets, window, bias, fused)


def composition(
    x: Tensor,
    raw: Tensor,
    planes: Tensor,
    escapes: Tensor,
    offsets: Tensor,
    window: Tensor,
    bias: Tensor | None,
    fused: bool,
) -> Tensor:
    columns, n = x.shape[-1], raw.shape[0]
    out = x.new_empty((*x.shape[:-1], n))
    for start, stop in layout.slabs(n, max(1, columns)):
        at = torch.arange(start, stop, device=x.device)
        weight = layout.rows(at, raw, planes, escapes, offsets, window, columns).to(x.dtype)
        out[..., start:stop] = linear(x, weight, None if bias is None else bias[start:stop])
    return out


def composition_backward(
    grad: Tensor, raw: Tensor, planes: Tensor, escapes: Tensor, offsets: Tensor, window: Tensor, columns: int
) -> Tensor:
    weight = torch.ops.gaugekit.packed_rows(None, raw, planes, escapes, offsets, window, columns)
    return grad @ weight.to(grad.dtype)


def _save(ctx, inputs, output):
    x, *weight, bias = inputs[:7]
    ctx.save_for_backward(*weight)
    ctx.columns, ctx.biased = x.shape[-1], bias is not None


def _backward(ctx, grad):
    dx = db = None
    if ctx.needs_input_grad[0]:
        dx = torch.ops.gaugekit.packed_linear_backward(grad, *ctx.saved_tensors, ctx.columns)
    if ctx.biased and ctx.needs_input_grad[6]:
        db = grad.flatten(0, -2).sum(0) if grad.dim() > 1 else grad.clone()
    return dx, None, None, None, None, None, db


def _backward_fused(ctx, grad):
    return *_backward(ctx, grad), None


_library.define(
    f"packed_linear(Tensor x, {WEIGHT}, Tensor? bias, bool fused) -> Tensor",
    composition,
    lambda x, raw, *_: x.new_empty((*x.shape[:-1], raw.shape[0])),
)
_library.define(
    f"packed_linear_backward(Tensor grad, {WEIGHT}, int columns) -> Tensor",
    composition_backward,
    lambda grad, raw, *rest: grad.new_empty((*grad.shape[:-1], rest[-1])),
)
_library.define(
    f"packed_linear_planned(Tensor x, {WEIGHT}, Tensor? bias) -> Tensor",
    planned,
    lambda x, raw, *_: x.new_empty((*x.shape[:-1], raw.shape[0])),
)
torch.library.register_autograd(
    "gaugekit::packed_linear", _backward_fused, setup_context=_save, lib=_library.library
)
torch.library.register_autograd(
    "gaugekit::packed_linear_planned", _backward, setup_context=_save, lib=_library.library
)
