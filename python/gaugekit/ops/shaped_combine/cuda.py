"""``shaped_combine`` on CUDA by the Triton sweeps. triton is imported on the first call, never before."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from gaugekit import _library
from gaugekit.ops.shaped_combine.operator import (
    composition,
    composition_backward,
    composition_in_place,
    rows_like,
)

WIDEST = 256  # columns that a tile of the kernels can have
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INSTALLED = importlib.util.find_spec("triton") is not None


def fits(*tensors: Tensor) -> bool:
    """Whether the kernels take these operands; the composition answers otherwise."""
    return all(x.dtype in DTYPES and x.shape[3] <= WIDEST and x.numel() > 0 for x in tensors)


@_library.outside_autocast
def forward(a: Tensor, v: Tensor, *rest: Any) -> Tensor:
    if not fits(a, v):
        return composition(a, v, *rest)
    from gaugekit.triton_kernels.shaped_combine import shaped_combine

    out = rows_like(a)
    shaped_combine(out, a, v, *rest)
    return out


@_library.outside_autocast
def in_place(a: Tensor, v: Tensor, *rest: Any) -> None:
    if not fits(a, v):
        return composition_in_place(a, v, *rest)
    from gaugekit.triton_kernels.shaped_combine import shaped_combine

    shaped_combine(a, a, v, *rest)


@_library.outside_autocast
def backward(
    grad: Tensor,
    a: Tensor,
    v: Tensor,
    alpha: Tensor | None,
    beta: Tensor | None,
    gamma: Tensor | None,
    v0: Tensor | None,
    lam: Tensor | None,
    *mask: Any,
) -> tuple[Tensor, ...]:
    if not fits(a, v):
        return composition_backward(grad, a, v, alpha, beta, gamma, v0, lam, *mask)
    from gaugekit.triton_kernels.shaped_combine_backward import shaped_combine_backward

    da, dv = rows_like(a), per_head(v, a.shape[1])
    dv0 = None if v0 is None else per_head(v0, a.shape[1])
    total = shaped_combine_backward(grad, a, v, alpha, beta, gamma, v0, lam, *mask, da=da, dv=dv, dv0=dv0)
    dalpha, dbeta, dgamma, dlam = gradients_of_gains(grad, total, alpha, beta, gamma, lam)
    dv0 = grad.new_empty(0) if v0 is None else per_group(dv0, v0)
    return da, per_group(dv, v), dalpha, dbeta, dgamma, dv0, dlam


def per_head(x: Tensor, heads: int) -> Tensor:
    """Room for what each query head adds to the gradient of ``x`` [B, G, rows, V]; the gradient itself where H = G."""
    if x.shape[1] == heads:
        return rows_like(x)
    return x.new_empty(x.shape[0], heads, *x.shape[2:], dtype=torch.float32)


def per_group(gradient: Tensor, x: Tensor) -> Tensor:
    """What ``per_head`` gave room for, added over the heads of each group."""
    if gradient.shape == x.shape:
        return gradient
    return rows_like(x).copy_(gradient.unflatten(1, (x.shape[1], -1)).sum(2))


def gradients_of_gains(grad: Tensor, total: Tensor, *gains: Tensor | None) -> list[Tensor]:
    """Rows of ``total`` [4, H] in the gains' dtypes; ``empty(0)`` for an absent gain."""
    return [grad.new_empty(0) if x is None else row.to(x.dtype) for x, row in zip(gains, total, strict=True)]


if INSTALLED:
    for name, kernel in (("", forward), ("_", in_place), ("_backward", backward)):
        _library.library.impl(f"shaped_combine{name}", kernel, "CUDA")
