"""``gaugekit::shaped_attention``: softmax and terms in one operator, (O, A, LSE); on CUDA one Triton kernel.

``shaped_attention`` uses it where ``plan`` says "fused". Everywhere else the composition below answers: blocks of at
most 1,024 queries, the softmax written out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gaugekit import _library
from gaugekit.ops.mask import Mask, keys_of_queries
from gaugekit.ops.shaped_combine import cuda as sweeps
from gaugekit.ops.shaped_combine.operator import MASK, TERMS, rows_like

BLOCK = 1024


def _blocks(q: Tensor, k: Tensor, mask: Mask, scale: float):
    """(queries, scores [B, G, H/G, block, S] in the accumulator's dtype, −∞ where the key is not seen)."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    seen = keys_of_queries(q.shape[2], k.shape[2], mask, q.device)
    j = torch.arange(k.shape[2], device=q.device)
    for begin in range(0, q.shape[2], BLOCK):
        rows = slice(begin, begin + BLOCK)
        scores = _split(q, k, dtype)[..., rows, :] @ k.to(dtype)[:, :, None].mT * scale
        visible = (j >= seen.first[:, rows, None]) & (j < seen.last[:, rows, None])
        yield rows, scores.masked_fill(~visible[:, None, None], float("-inf"))


def _split(x: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).unflatten(1, (like.shape[1], -1))


def composition(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor | None,
    beta: Tensor | None,
    gamma: Tensor | None,
    v0: Tensor | None,
    lam: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    *mask, scale = rest
    out, a, lse = _fake(q, k, v)
    for rows, scores in _blocks(q, k, Mask(*mask), scale):
        top = scores.logsumexp(-1)
        p = (scores - top.masked_fill(top.isinf(), 0)[..., None]).exp()
        a[:, :, rows] = (p @ v.to(p.dtype)[:, :, None]).flatten(1, 2)
        lse[:, :, rows] = top.flatten(1, 2)
    out.copy_(torch.ops.gaugekit.shaped_combine(a, v, alpha, beta, gamma, v0, lam, *mask))
    return out, a, lse


def composition_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    lse: Tensor,
    alpha: Tensor | None,
    beta: Tensor | None,
    gamma: Tensor | None,
    v0: Tensor | None,
    lam: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    *mask, scale = rest
    terms = (alpha, beta, gamma, v0, lam)
    da, dv, *others = torch.ops.gaugekit.shaped_combine_backward(grad, a, v, *terms, *mask)
    dq, dk, dv = rows_like(q), torch.zeros_like(k, dtype=lse.dtype), dv.to(lse.dtype)
    values, keys = v.to(lse.dtype)[:, :, None], k.to(lse.dtype)[:, :, None]
    slope, log = _split(da, v, lse.dtype), lse.unflatten(1, (v.shape[1], -1))[..., None]
    share = (slope * _split(a, v, lse.dtype)).sum(-1, keepdim=True)
    for rows, scores in _blocks(q, k, Mask(*mask), scale):
        p = (scores - log[..., rows, :].masked_fill(log[..., rows, :].isinf(), 0)).exp()
        ds = p * (slope[..., rows, :] @ values.mT - share[..., rows, :]) * scale
        dq[:, :, rows] = (ds @ keys).flatten(1, 2)
        dk += (ds.mT @ _split(q, k, lse.dtype)[..., rows, :]).sum(2)
        dv += (p.mT @ slope[..., rows, :]).sum(2)
    return dq, rows_like(k).copy_(dk), rows_like(v).copy_(dv), *others


def _fake(q, k, v, *rest):
    """O and A lie as [B, T, H, V], so that joining the heads copies nothing."""
    batch, heads, queries, _ = q.shape
    shape = (batch, heads, queries, v.shape[3])
    out, a = (torch.empty_permuted(shape, (0, 2, 1, 3), dtype=q.dtype, device=q.device) for _ in range(2))
    return out, a, q.new_empty(shape[:3], dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)


def _fake_backward(grad, q, k, v, a, lse, alpha, beta, gamma, v0, lam, *rest):
    gains = [grad.new_empty(0) if x is None else torch.empty_like(x) for x in (alpha, beta, gamma, lam)]
    dv0 = grad.new_empty(0) if v0 is None else rows_like(v0)
    return rows_like(q), rows_like(k), rows_like(v), *gains[:3], dv0, gains[3]


@_library.outside_autocast
def _triton(q, k, v, *rest) -> tuple[Tensor, Tensor, Tensor]:
    if not sweeps.fits(q, k, v):
        return composition(q, k, v, *rest)
    from gaugekit.triton_kernels.shaped_attention import shaped_attention

    outputs = _fake(q, k, v)
    shaped_attention(q, k, v, *rest, *outputs)
    return outputs


@_library.outside_autocast
def _triton_backward(grad, q, k, v, a, lse, alpha, beta, gamma, v0, lam, *rest) -> tuple[Tensor, ...]:
    terms = (alpha, beta, gamma, v0, lam)
    if not sweeps.fits(q, k, v):
        return composition_backward(grad, q, k, v, a, lse, *terms, *rest)
    from gaugekit.triton_kernels.shaped_attention_backward import shaped_attention_backward

    dq, dk, dv = (rows_like(x) for x in (q, k, v))
    dv0 = None if v0 is None else sweeps.per_head(v0, q.shape[1])
    total = shaped_attention_backward(grad, q, k, v, a, lse, *terms, *rest, dq, dk, dv, dv0)
    dalpha, dbeta, dgamma, dlam = sweeps.gradients_of_gains(grad, total, alpha, beta, gamma, lam)
    dv0 = grad.new_empty(0) if v0 is None else sweeps.per_group(dv0, v0)
    return dq, dk, dv, dalpha, dbeta, dgamma, dv0, dlam


def _save(ctx, inputs, output):
    q, k, v, alpha, beta, gamma, v0, lam, ctx.causal, ctx.window, *mask, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output[1:], alpha, beta, gamma, v0, lam, *mask)
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, grad, *_):
    *tensors, query_start, key_lengths, cu_seqlens = ctx.saved_tensors
    mask = (ctx.causal, ctx.window, query_start, key_lengths, cu_seqlens)
    gradients = torch.ops.gaugekit.shaped_attention_backward(grad, *tensors, *mask, ctx.scale)
    inputs = (*tensors[:3], *tensors[5:])
    return *(None if x is None else g for x, g in zip(inputs, gradients, strict=True)), *[None] * 6


_library.define(
    f"shaped_attention(Tensor q, Tensor k, {TERMS}, {MASK}, float scale) -> (Tensor, Tensor, Tensor)",
    composition,
    _fake,
)
_library.define(
    "shaped_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor a, Tensor lse,"
    f" {TERMS.removeprefix('Tensor v, ')}, {MASK}, float scale)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    composition_backward,
    _fake_backward,
)
torch.library.register_autograd(
    "gaugekit::shaped_attention", _backward, setup_context=_save, lib=_library.library
)
if sweeps.INSTALLED:
    _library.library.impl("shaped_attention", _triton, "CUDA")
    _library.library.impl("shaped_attention_backward", _triton_backward, "CUDA")
