"""``ragged_attention``: ``shaped_attention`` with a rank of its own for each head, heads stored side by side.

The operator ``gaugekit::ragged_attention`` lets no head pay for the widest: in C++ on CPUs, on CUDA by a Triton kernel
for each tile. Where it was not measured to be faster, or is not there, the heads are spread to the width torch's
kernels want, those that fit the values' in one call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gaugekit import _library
from gaugekit.ops import sharding
from gaugekit.ops.mask import Mask, check
from gaugekit.ops.operands import Gain, Integers, check_tensors, gain
from gaugekit.ops.ragged_attention.layout import buckets, dense, gather, spread
from gaugekit.ops.ragged_attention.sharding import rules
from gaugekit.ops.shaped_attention import fused
from gaugekit.ops.shaped_attention.choice import RAGGED, asked_core, cpu_core
from gaugekit.ops.shaped_attention.core import mask_kind
from gaugekit.ops.shaped_attention.operator import shaped_attention
from gaugekit.ops.shaped_combine import cuda as sweeps
from gaugekit.ops.shaped_combine.operator import MASK

NO_TERMS = (None,) * 5


def ragged_attention(
    q: Tensor, k: Tensor, v: Tensor, ranks: Sequence[int], *, scale: float,
    alpha: Gain | None = None, beta: Gain | None = None, gamma: Gain | None = None,
    v0: Tensor | None = None, lam: Gain | None = None, causal: bool = False, window: int | None = None,
    query_start: Integers | None = None, key_lengths: Integers | None = None, cu_seqlens: Integers | None = None,
) -> Tensor:  # fmt: skip
    """β·softmax(scale·q_h k_hᵀ) v + α·v − γ·C v + λ·(v0 − v) with q_h and k_h of rank ``ranks[g]``, g = h // (H/G).

    q [B, T, Σ_h R_g(h)] and k [B, S, Σ_g R_g] hold their heads one after the other; v [B, G, S, V]; ``ranks`` are G
    integers from 1. ``scale`` is the model's, that of the width before ranks were cut, and has no default. Everything
    else, and what is returned, [B, H, T, V], as in ``gaugekit.shaped_attention``. Raises ValueError for arguments that
    do not fit.
    """
    check_tensors(q=q, k=k, v=v, v0=v0)
    if sharding.shared(q, k, v):
        return sharding.local(ragged_attention, rules, dict(
            q=q, k=k, v=v, ranks=ranks, scale=scale, alpha=alpha, beta=beta, gamma=gamma, v0=v0, lam=lam,
            causal=causal, window=window, query_start=query_start, key_lengths=key_lengths,
            cu_seqlens=cu_seqlens))  # fmt: skip
    ranks = _check(q, k, v, ranks)
    repeats = q.shape[2] // k.shape[2]
    mask = Mask.of(q.device, causal, window, query_start, key_lengths, cu_seqlens)
    given = {"alpha": alpha, "beta": beta, "gamma": gamma, "lam": lam}
    terms = {name: gain(name, value, repeats * len(ranks), q) for name, value in given.items()}
    if _operator(q, v, ranks, mask):
        heads = q[:, :, : repeats * len(ranks), None].transpose(1, 2)
        check(heads, v, *[terms[name] for name in ("alpha", "beta", "gamma")], v0, terms["lam"], mask)
        a = torch.ops.gaugekit.ragged_attention(q, k, v, ranks, *mask, float(scale))[0]
        if all(gain is None for gain in terms.values()):
            return a
        alpha, beta, gamma, lam = terms.values()
        return torch.ops.gaugekit.shaped_combine(a, v, alpha, beta, gamma, v0, lam, *mask)
    parts, order = [], []
    options = {"v0": v0, "scale": scale, **mask._asdict()}
    for width, groups in buckets(ranks, v.shape[3]):
        heads = [group * repeats + member for group in groups for member in range(repeats)]
        whole = len(groups) == len(ranks)
        own = terms if whole else {name: None if x is None else x[heads] for name, x in terms.items()}
        if not whole and v0 is not None:
            options["v0"] = v0[:, groups]
        parts.append(
            shaped_attention(
                spread(q, ranks, repeats, groups, width),
                spread(k, ranks, 1, groups, width),
                v if whole else v[:, groups],
                **own,
                **options,
            )
        )
        order += heads
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts, 1)[:, sorted(range(len(order)), key=order.__getitem__)]


def _operator(q: Tensor, v: Tensor, ranks: list[int], mask: Mask) -> bool:
    if q.device.type == "cuda":
        return sweeps.INSTALLED and q.dtype in sweeps.DTYPES and max(ranks) <= sweeps.WIDEST
    if asked_core() is not None or torch.is_autocast_enabled(q.device.type):
        return asked_core() == RAGGED
    if q.device.type != "cpu":
        return False
    queries, keys = q.shape[1], v.shape[2]
    causal = mask_kind(queries, keys, mask)[0] == "is_causal"
    return cpu_core(q.dtype, queries, keys, sum(ranks) / len(ranks), v.shape[3], causal) == RAGGED


def composition(q: Tensor, k: Tensor, v: Tensor, ranks: Sequence[int], *rest: Any) -> tuple[Tensor, Tensor]:
    _, a, lse = fused.composition(*dense(q, k, ranks), v, *NO_TERMS, *rest)
    return a, lse


def composition_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, a: Tensor, lse: Tensor, ranks: Sequence[int], *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv, *_ = fused.composition_backward(grad, *dense(q, k, ranks), v, a, lse, *NO_TERMS, *rest)
    return gather(dq, ranks, q.shape[2] // k.shape[2]), gather(dk, ranks, 1), dv


def _fake(q, k, v, ranks, *rest):
    heads = v.shape[1] * (q.shape[2] // k.shape[2])
    a = torch.empty_permuted(
        (q.shape[0], heads, q.shape[1], v.shape[3]), (0, 2, 1, 3), dtype=q.dtype, device=q.device
    )
    return a, q.new_empty(a.shape[:3], dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)


def _fake_backward(grad, q, k, v, *rest):
    return q.new_empty(q.shape), k.new_empty(k.shape), fused.rows_like(v)


@_library.outside_autocast
def _triton(q, k, v, ranks, *rest):
    if not sweeps.fits(v) or q.numel() == 0 or max(ranks) > sweeps.WIDEST:
        return composition(q, k, v, ranks, *rest)
    from gaugekit.triton_kernels.ragged_attention import ragged_attention as kernel

    outputs = _fake(q, k, v, ranks)
    kernel(q, k, v, ranks, *rest, *outputs)
    return outputs


@_library.outside_autocast
def _triton_backward(grad, q, k, v, a, lse, ranks, *rest):
    if not sweeps.fits(v) or q.numel() == 0 or max(ranks) > sweeps.WIDEST:
        return composition_backward(grad, q, k, v, a, lse, ranks, *rest)
    from gaugekit.triton_kernels.ragged_attention_backward import ragged_attention_backward

    gradients = _fake_backward(grad, q, k, v)
    ragged_attention_backward(grad, q, k, v, a, lse, ranks, *rest, *gradients)
    return gradients


def _save(ctx, inputs, output):
    q, k, v, ctx.ranks, ctx.causal, ctx.window, *mask, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, *mask)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad, _):
    *tensors, query_start, key_lengths, cu_seqlens = ctx.saved_tensors
    rest = (ctx.ranks, ctx.causal, ctx.window, query_start, key_lengths, cu_seqlens, ctx.scale)
    return *torch.ops.gaugekit.ragged_attention_backward(grad, *tensors, *rest), *[None] * 7


def _check(q: Tensor, k: Tensor, v: Tensor, ranks) -> list[int]:
    ranks = [int(rank) for rank in ranks]
    if v.dim() != 4 or len(ranks) != v.shape[1] or min(ranks, default=0) < 1:
        raise ValueError(f"ranks: expected one from 1 for each key head of v [B, G, S, V], got {ranks}")
    expected = [v.shape[0], v.shape[2], sum(ranks)]
    if list(k.shape) != expected or k.dtype != v.dtype:
        raise ValueError(
            f"k: expected [B, S, ΣR] = {expected} of {v.dtype}, got {list(k.shape)} of {k.dtype}"
        )
    if (
        q.dim() != 3
        or q.shape[0] != v.shape[0]
        or q.shape[2] < 1
        or q.shape[2] % sum(ranks)
        or q.dtype != v.dtype
    ):
        raise ValueError(
            f"q: expected [B, T, a multiple of {sum(ranks)}] of {v.dtype}, got {list(q.shape)} of {q.dtype}"
        )
    return ranks


_library.define(
    f"ragged_attention(Tensor q, Tensor k, Tensor v, int[] ranks, {MASK}, float scale) -> (Tensor, Tensor)",
    composition,
    _fake,
)
_library.define(
    "ragged_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor a, Tensor lse, int[] ranks,"
    f" {MASK}, float scale) -> (Tensor, Tensor, Tensor)",
    composition_backward,
    _fake_backward,
)
torch.library.register_autograd(
    "gaugekit::ragged_attention", _backward, setup_context=_save, lib=_library.library
)
if sweeps.INSTALLED:
    _library.library.impl("ragged_attention", _triton, "CUDA")
    _library.library.impl("ragged_attention_backward", _triton_backward, "CUDA")
