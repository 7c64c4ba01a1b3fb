"""``gauge_linear`` on CUDA by the Triton kernels. triton is imported on the first call, never before."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from gaugekit import _library
from gaugekit.ops.gauge_linear.operator import composition, composition_backward

# By dtype, the widest head whose tiles fit the registers (tests/laws compiles them): the composition takes wider ones.
WIDEST = {torch.float32: 32, torch.bfloat16: 128, torch.float16: 128}


def fits(x: Tensor, free: Tensor) -> bool:
    """Whether the kernels take these operands; the composition answers otherwise."""
    return free.shape[2] <= WIDEST.get(x.dtype, 0) and x.numel() > 0 and free.numel() > 0


@_library.outside_autocast
def forward(
    x: Tensor, free: Tensor, rows: Tensor, bias: Tensor | None, weight: Tensor | None,
    weight_bias: Tensor | None,
) -> Tensor:  # fmt: skip
    if not fits(x, free):
        return composition(x, free, rows, bias, weight, weight_bias)
    from gaugekit.triton_kernels.gauge_linear import gauge_linear

    flat, first = x.reshape(-1, x.shape[-1]), 0 if weight is None else weight.shape[0]
    out = x.new_empty(len(flat), first + rows.numel())
    if weight_bias is not None:
        torch.addmm(weight_bias, flat, weight.t(), out=out[:, :first])
    elif weight is not None:
        torch.mm(flat, weight.t(), out=out[:, :first])
    gauge_linear(out[:, first:], flat, free.contiguous(), rows.contiguous(), bias)
    return out.view(*x.shape[:-1], -1)


@_library.outside_autocast
def backward(
    grad: Tensor, x: Tensor, free: Tensor, rows: Tensor, of_x: bool, of_free: bool
) -> tuple[Tensor, Tensor]:
    if not fits(x, free):
        return composition_backward(grad, x, free, rows, of_x, of_free)
    from gaugekit.triton_kernels.gauge_linear import gauge_linear_backward_free, gauge_linear_backward_x

    of_heads, flat = (y.reshape(-1, y.shape[-1]) for y in (grad, x))
    free, rows, dx, dfree = free.contiguous(), rows.contiguous(), grad.new_empty(0), grad.new_empty(0)
    if of_x:
        dx = flat.new_empty(flat.shape)
        gauge_linear_backward_x(dx, of_heads, free, rows)
        dx = dx.view(x.shape)
    if of_free:
        dfree = torch.empty_like(free)
        gauge_linear_backward_free(dfree, of_heads, flat, rows)
    return dx, dfree


if importlib.util.find_spec("triton") is not None:
    _library.library.impl("gauge_linear", forward, "CUDA")
    _library.library.impl("gauge_linear_backward", backward, "CUDA")
