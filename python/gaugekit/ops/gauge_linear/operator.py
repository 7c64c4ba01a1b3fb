"""``gauge_linear``: a projection whose gauge is fixed, y_h = x[·, P_h] + x[·, P̄_h] F_h, all heads in one call.

The identity block of each head is an addition, not a product: of H heads that span the model's width it saves 1/H of
the multiplications. MatShrink (OpenMachine, transformer-tricks) stores and multiplies that block densely and leaves
the saving to future work.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad
from torch.nn.functional import linear

from gaugekit import _library
from gaugekit.ops import sharding
from gaugekit.ops.gauge_linear.layout import dense, free_of
from gaugekit.ops.gauge_linear.sharding import rules as by_rank
from gaugekit.ops.operands import check_tensors

ARGUMENTS = "Tensor x, Tensor free, Tensor rows, Tensor? bias, Tensor? weight, Tensor? weight_bias"
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
DIFFERENT = (
    "rows: expected different inputs for each head, 0 to"  # the binary's words, which a number follows
)


def gauge_linear(
    x: Tensor, free: Tensor, rows: Tensor, bias: Tensor | None = None, weight: Tensor | None = None,
    weight_bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """y_h = x[..., P_h] + x[..., P̄_h] F_h (+ b_h) for every head h, side by side: [..., heads·width] in x's dtype.

    ``x`` [..., D] float32, float64, bfloat16 or float16; sums are in float32 (float64 for float64).
    ``free`` [heads, D − width, width]: F_h, whose rows are the inputs not in P_h, ascending.
    ``rows`` [heads, width] int32: P_h, different inputs for each head; the i-th passes through to output i of the head.
    On a GPU their values are not checked: those out of range are clamped, repeated ones give wrong numbers.
    ``bias`` [heads·width], or None.
    ``weight`` [N, D], or None: a plain projection computed with the others, whose N outputs x Wᵀ come first (a layer's
    queries before its keys and values). ``weight_bias`` [N] goes with it.
    Differentiable in all but ``rows``, by backward and by forward mode, and ready for ``torch.func``. ValueError for
    shapes, dtypes, devices or rows that do not fit. Source: van Nierop, arXiv 2412.14543.
    """
    check_tensors(x=x, free=free, rows=rows, bias=bias, weight=weight, weight_bias=weight_bias)
    if sharding.shared(x, free):
        return sharding.local(gauge_linear, by_rank, dict(
            x=x, free=free, rows=rows, bias=bias, weight=weight, weight_bias=weight_bias))  # fmt: skip
    _check(x, free, rows, bias, weight, weight_bias)
    given = (x, free, rows, bias, weight, weight_bias)
    if transforms():
        return _composed(*given)
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return torch.ops.gaugekit.gauge_linear(*given)
    learns = torch.is_grad_enabled() and any(y is not None and y.requires_grad for y in given)
    try:
        return differentiable(*given) if learns else _FORWARD(*given)
    except RuntimeError as error:
        if DIFFERENT in str(error):
            raise _refusal(x) from None
        raise


def differentiable(*given: Tensor | None) -> Tensor:
    """The operator with ``gauge_linear``'s arguments where something is differentiated: without the time that an
    operator's own way to its gradient takes, unless a compiler or a tracer looks on."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return torch.ops.gaugekit.gauge_linear(*given)
    return _Differentiable.apply(*given)


def transforms() -> bool:
    """Whether vmap or forward-mode differentiation is at work, which know torch's operators and not ours."""
    return forward_ad._current_level >= 0 or _functorch.peek_interpreter_stack() is not None


# Dynamo would take the absent interpreter for one. It guards on both levels itself, and so may ask while it traces;
# torch.compiler.assume_constant_result does no more than this, after importing Dynamo.
transforms._dynamo_marked_constant = True


def composition(
    x: Tensor, free: Tensor, rows: Tensor, bias: Tensor | None, weight: Tensor | None,
    weight_bias: Tensor | None,
) -> Tensor:  # fmt: skip
    y = linear(x, dense(free, rows).mT, bias)
    return y if weight is None else torch.cat([linear(x, weight, weight_bias), y], -1)


def composition_backward(
    grad: Tensor, x: Tensor, free: Tensor, rows: Tensor, of_x: bool, of_free: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of x and ``free`` that ``grad`` [..., heads·width] stands for; ``empty(0)`` where not asked for."""
    dx = grad @ dense(free, rows).mT if of_x else grad.new_empty(0)
    if not of_free:
        return dx, grad.new_empty(0)
    return dx, free_of(_rows(x).mT @ _rows(grad), rows)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _check(x, free, rows, bias, weight, weight_bias) -> None:
    if x.dtype not in DTYPES or x.dim() < 1:
        raise ValueError(
            f"x: expected [..., D] of float32, float64, bfloat16 or float16, got {list(x.shape)} of {x.dtype}"
        )
    if rows.dim() != 2 or rows.dtype != torch.int32 or rows.shape[0] < 1 or rows.shape[1] < 1:
        raise ValueError(
            f"rows: expected [heads, width] of torch.int32, got {list(rows.shape)} of {rows.dtype}"
        )
    heads, width = rows.shape
    if x.shape[-1] < width:
        raise ValueError(f"rows: expected a width of at most D = {x.shape[-1]}, got {width}")
    expected = {
        "free": (free, [heads, x.shape[-1] - width, width]),
        "bias": (bias, [heads * width]),
        "weight": (weight, [weight.shape[0] if weight is not None and weight.dim() else 0, x.shape[-1]]),
        "weight_bias": (weight_bias, [0 if weight is None else weight.shape[0]]),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and (list(tensor.shape) != shape or tensor.dtype != x.dtype):
            raise ValueError(
                f"{name}: expected {shape} of {x.dtype}, got {list(tensor.shape)} of {tensor.dtype}"
            )
    for name, tensor in (("rows", rows), *((name, tensor) for name, (tensor, _) in expected.items())):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name}: expected it on {x.device} like x, got {tensor.device}")
    if weight is None and weight_bias is not None:
        raise ValueError("weight_bias: expected a weight beside it, got None")
    if rows.device.type == "cpu" and not torch.compiler.is_compiling() and not _binary_checks(x):
        _check_values(x, rows)


def _binary_checks(x: Tensor) -> bool:
    """Whether the C++ operator will be called and looks at the rows: it does where there is something to compute."""
    return _library.implementation("gauge_linear") and not transforms() and x.numel() > 0


def _check_values(x: Tensor, rows: Tensor) -> None:
    while _functorch.is_batchedtensor(rows):  # vmap lets nobody look at values: those of every call, then
        rows = _functorch.get_unwrapped(rows).movedim(_functorch.maybe_get_bdim(rows), 0)
    ordered = rows.sort(-1).values
    if ordered[..., 0].min() < 0 or ordered[..., -1].max() >= x.shape[-1] or not ordered.diff().all():
        raise _refusal(x)


def _refusal(x: Tensor) -> ValueError:
    return ValueError(f"{DIFFERENT} {x.shape[-1] - 1}")


def _fake(x, free, rows, bias, weight, weight_bias):
    before = 0 if weight is None else weight.shape[0]
    return x.new_empty((*x.shape[:-1], before + rows.shape[0] * rows.shape[1]))


def _fake_backward(grad, x, free, rows, of_x, of_free):
    dx = grad.new_empty(x.shape) if of_x else grad.new_empty(0)
    return dx, grad.new_empty(free.shape) if of_free else grad.new_empty(0)


def _save(ctx, inputs, output):
    x, free, rows, bias, weight, weight_bias = inputs
    ctx.save_for_backward(x, free, rows, weight)
    ctx.biased, ctx.weight_biased = bias is not None, weight_bias is not None


def _backward(ctx, grad):
    x, free, rows, weight = ctx.saved_tensors
    of_x, of_free, _, of_bias, of_weight, of_weight_bias = ctx.needs_input_grad
    first = 0 if weight is None else weight.shape[0]
    before, of_heads = grad[..., :first], grad[..., first:]
    dx = dfree = None
    if of_x or of_free:
        # Whoever differentiates this once more needs torch's own operators.
        product = composition_backward if torch.is_grad_enabled() else _BACKWARD
        dx, dfree = product(of_heads, x, free, rows, of_x, of_free)
    if of_x and weight is not None:
        dx = dx + before @ weight
    return (
        dx if of_x else None,
        dfree if of_free else None,
        None,
        _rows(of_heads).sum(0) if ctx.biased and of_bias else None,
        _rows(before).mT @ _rows(x) if weight is not None and of_weight else None,
        _rows(before).sum(0) if ctx.weight_biased and of_weight_bias else None,
    )


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *given):
        _save(ctx, given, None)
        return _FORWARD(*given)

    backward = staticmethod(_backward)


_library.define(f"gauge_linear({ARGUMENTS}) -> Tensor", composition, _fake)
# Without a gradient, and so without the detour through Python that one costs: what is called in evaluation.
_library.define(f"gauge_linear_forward({ARGUMENTS}) -> Tensor", composition, _fake)
_library.define(
    "gauge_linear_backward(Tensor grad, Tensor x, Tensor free, Tensor rows, bool of_x, bool of_free)"
    " -> (Tensor, Tensor)",
    composition_backward,
    _fake_backward,
)
torch.library.register_autograd(
    "gaugekit::gauge_linear", _backward, setup_context=_save, lib=_library.library
)
_composed = _library.outside_autocast(composition)
_FORWARD = torch.ops.gaugekit.gauge_linear_forward.default
_BACKWARD = torch.ops.gaugekit.gauge_linear_backward.default
