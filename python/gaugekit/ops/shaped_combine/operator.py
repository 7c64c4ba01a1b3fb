"""``shaped_combine``: O = β·A + α·V − γ·C V + λ·(V⁰ − V), the softmax output A given.

C is the uniform attention under the mask of A (causal: the mean over the prefix), so C V needs running sums and never a
T×S array. Sources: He and Hofmann, Simplifying Transformer Blocks, eq. 5 (α, β, γ); Nguyen, Nguyen, Baraniuk,
Mitigating Over-smoothing in Transformers via Regularized Nonlocal Functionals: NeuTRENO (λ).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gaugekit import _library
from gaugekit.ops import sharding
from gaugekit.ops.mask import Mask, check, gather, keys_of_queries, queries_of_keys, sums
from gaugekit.ops.operands import Gain, Integers, check_tensors, gains
from gaugekit.ops.shaped_combine.sharding import rules

TERMS = "Tensor v, Tensor? alpha, Tensor? beta, Tensor? gamma, Tensor? v0, Tensor? lam"
MASK = "bool causal, int? window, Tensor? query_start, Tensor? key_lengths, Tensor? cu_seqlens"


def shaped_combine(
    a: Tensor, v: Tensor, *, alpha: Gain | None = None, beta: Gain | None = None, gamma: Gain | None = None,
    v0: Tensor | None = None, lam: Gain | None = None, causal: bool = False, window: int | None = None,
    query_start: Integers | None = None, key_lengths: Integers | None = None, cu_seqlens: Integers | None = None,
) -> Tensor:  # fmt: skip
    """β·a + α·v − γ·C v + λ·(v0 − v) as a new tensor [B, H, T, V]; differentiable in a, v, v0 and the gains.

    ``a`` [B, H, T, V] is the softmax output, ``v`` [B, G, S, V] its values, ``v0`` [B, G, T, V]; gains are [H]. The
    arguments mean what they mean in ``gaugekit.shaped_attention``; a row that sees no key ignores ``a``. float32,
    float64, bfloat16, float16; sums in float32 (float64 for float64). ValueError for arguments that do not fit.
    """
    check_tensors(a=a, v=v, v0=v0)
    if sharding.shared(a, v):
        return sharding.local(shaped_combine, rules, dict(
            a=a, v=v, alpha=alpha, beta=beta, gamma=gamma, v0=v0, lam=lam, causal=causal, window=window,
            query_start=query_start, key_lengths=key_lengths, cu_seqlens=cu_seqlens))  # fmt: skip
    alpha, beta, gamma, lam = gains(a, alpha=alpha, beta=beta, gamma=gamma, lam=lam)
    mask = Mask.of(a.device, causal, window, query_start, key_lengths, cu_seqlens)
    check(a, v, alpha, beta, gamma, v0, lam, mask)
    if a.shape[3] != v.shape[3]:
        raise ValueError(f"a: expected [B, H, T, V] with V = {v.shape[3]} as in v, got {list(a.shape)}")
    return torch.ops.gaugekit.shaped_combine(a, v, alpha, beta, gamma, v0, lam, *mask)


def composition(
    a: Tensor, v: Tensor, alpha: Tensor | None, beta: Tensor | None, gamma: Tensor | None, v0: Tensor | None,
    lam: Tensor | None, *mask: Any,
) -> Tensor:  # fmt: skip
    terms = _Terms(a, v, alpha, beta, gamma, v0, lam, Mask(*mask))
    return rows_like(a).copy_(terms.output())


def composition_in_place(
    a: Tensor, v: Tensor, alpha: Tensor | None, beta: Tensor | None, gamma: Tensor | None, v0: Tensor | None,
    lam: Tensor | None, *mask: Any,
) -> None:  # fmt: skip
    a.copy_(_Terms(a, v, alpha, beta, gamma, v0, lam, Mask(*mask)).output())


def composition_backward(
    grad: Tensor, a: Tensor, v: Tensor, alpha: Tensor | None, beta: Tensor | None, gamma: Tensor | None,
    v0: Tensor | None, lam: Tensor | None, *mask: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    return _Terms(a, v, alpha, beta, gamma, v0, lam, Mask(*mask)).gradients(grad)


class _Terms:
    """The operands in the accumulator's dtype, heads split as [B, G, H/G, T, V]."""

    def __init__(
        self,
        a: Tensor,
        v: Tensor,
        alpha: Tensor | None,
        beta: Tensor | None,
        gamma: Tensor | None,
        v0: Tensor | None,
        lam: Tensor | None,
        mask: Mask,
    ):
        self.a, self.v, self.v0 = a, v, v0
        self.given = {"alpha": alpha, "beta": beta, "gamma": gamma, "lam": lam}
        self.queries, self.keys, self.groups, self.mask = a.shape[2], v.shape[2], v.shape[1], mask
        self.dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
        seen = keys_of_queries(self.queries, self.keys, mask, v.device)
        self.count = (seen.last - seen.first)[:, None, None, :, None]
        self.mean = None
        if gamma is not None:
            self.mean = (sums(v, seen, self.dtype)[:, :, None] / self.count.clamp(min=1)).to(self.dtype)
        self.own = None
        if alpha is not None or lam is not None:
            self.has_own = seen.has_own[:, None, None, :, None]
            self.own = torch.where(self.has_own, gather(v, seen.own).to(self.dtype)[:, :, None], 0)
            if lam is not None:
                self.reference = torch.where(self.has_own, v0.to(self.dtype)[:, :, None], 0)

    def gain(self, name: str) -> Tensor:
        return self.given[name].to(self.dtype).view(1, self.groups, -1, 1, 1)

    def split(self, x: Tensor) -> Tensor:
        return x.to(self.dtype).unflatten(1, (self.groups, -1))

    def output(self) -> Tensor:
        out = torch.where(self.count > 0, self.split(self.a), 0)
        if self.given["beta"] is not None:
            out = self.gain("beta") * out
        if self.mean is not None:
            out = out - self.gain("gamma") * self.mean
        if self.given["alpha"] is not None:
            out = out + self.gain("alpha") * self.own
        if self.given["lam"] is not None:
            out = out + self.gain("lam") * (self.reference - self.own)
        return out.flatten(1, 2)

    def gradients(self, grad: Tensor) -> tuple[Tensor, ...]:
        g = self.split(grad)
        seeing = torch.where(self.count > 0, g, 0)
        seen_by = queries_of_keys(self.queries, self.keys, self.mask, grad.device)
        products = {"beta": lambda: seeing * self.split(self.a), "gamma": lambda: -g * self.mean,
                    "alpha": lambda: g * self.own, "lam": lambda: g * (self.reference - self.own)}  # fmt: skip
        gains = {
            name: grad.new_empty(0) if x is None else products[name]().sum((0, 3, 4)).flatten().to(x.dtype)
            for name, x in self.given.items()
        }
        dv = torch.zeros(self.v.shape, dtype=self.dtype, device=grad.device)
        if self.mean is not None:
            shares = (self.gain("gamma") * g / self.count.clamp(min=1)).sum(2)
            dv = dv - sums(shares, seen_by, self.dtype)
        dv0 = grad.new_empty(0)
        for name, sign in (("alpha", 1), ("lam", -1)):
            if self.given[name] is not None:
                direct = (self.gain(name) * g).sum(2)
                dv = dv + sign * torch.where(
                    seen_by.has_own[:, None, :, None], gather(direct, seen_by.own), 0
                )
        if self.v0 is not None:
            dv0 = rows_like(self.v0).copy_(torch.where(self.has_own, self.gain("lam") * g, 0).sum(2))
        da = seeing if self.given["beta"] is None else self.gain("beta") * seeing
        return (rows_like(self.a).copy_(da.flatten(1, 2)), rows_like(self.v).copy_(dv),
                gains["alpha"], gains["beta"], gains["gamma"], dv0, gains["lam"])  # fmt: skip


def rows_like(x: Tensor) -> Tensor:
    """A new tensor laid out as x is, or densely where that would leave the last axis with a stride."""
    like = torch.empty_like(x)
    return like if like.shape[-1] <= 1 or like.stride(-1) == 1 else x.new_empty(x.shape)


def _fake_backward(grad, a, v, alpha, beta, gamma, v0, lam, *mask):
    gains = [grad.new_empty(0) if x is None else torch.empty_like(x) for x in (alpha, beta, gamma, lam)]
    dv0 = grad.new_empty(0) if v0 is None else rows_like(v0)
    return rows_like(a), rows_like(v), *gains[:3], dv0, gains[3]


def _save(ctx, inputs, output):
    *tensors, ctx.causal, ctx.window, query_start, key_lengths, cu_seqlens = inputs
    ctx.save_for_backward(*tensors, query_start, key_lengths, cu_seqlens)


def _backward(ctx, grad):
    *tensors, query_start, key_lengths, cu_seqlens = ctx.saved_tensors
    mask = (ctx.causal, ctx.window, query_start, key_lengths, cu_seqlens)
    gradients = torch.ops.gaugekit.shaped_combine_backward(grad, *tensors, *mask)
    return *(None if x is None else g for x, g in zip(tensors, gradients, strict=True)), *[None] * 5


_library.define(
    f"shaped_combine(Tensor a, {TERMS}, {MASK}) -> Tensor", composition, lambda a, *rest: rows_like(a)
)
_library.define(
    f"shaped_combine_(Tensor(a!) a, {TERMS}, {MASK}) -> ()", composition_in_place, lambda *_: None
)
_library.define(
    f"shaped_combine_backward(Tensor grad, Tensor a, {TERMS}, {MASK})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    composition_backward,
    _fake_backward,
)
torch.library.register_autograd(
    "gaugekit::shaped_combine", _backward, setup_context=_save, lib=_library.library
)
