"""``nonlocal_energy``: J = ½ Σ_ij A_ij ‖u_i − u_j‖² + λ/2 Σ_i ‖u_i − f_i‖², without a T×T array.

With s_i = ‖u_i‖² and rows of A that add up to 1, the energy of row i is ½ s_i + ½ (A s)_i − u_i·(A u)_i: one softmax
core whose values have s as one more column. Where tokens are nearly alike that difference cancels (in float32 nothing
is left at a spread of 1e-4 around a common vector), and J is blind to a common vector: so it is taken off first.

Sources: Nguyen, Nguyen, Baraniuk, Mitigating Over-smoothing in Transformers via Regularized Nonlocal Functionals
(NeurIPS 2023).
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from gaugekit.ops import sharding
from gaugekit.ops.mask import Mask
from gaugekit.ops.nonlocal_energy import rows
from gaugekit.ops.nonlocal_energy.sharding import rules as by_rank
from gaugekit.ops.operands import Gain, Integers, check_tensors, gains, integers
from gaugekit.ops.shaped_attention.core import softmax_core

KERNELS, GRADIENTS = ("softmax", "symmetric"), ("full", "row")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def nonlocal_energy(
    u: Tensor, q: Tensor, k: Tensor, *, target: Tensor | None = None, lam: Gain | None = None, causal: bool = False,
    key_lengths: Integers | None = None, scale: float | None = None, kernel: str = "softmax", gradient: str = "full",
) -> Tensor:  # fmt: skip
    """½ Σ_ij A_ij ‖u_i − u_j‖² + λ/2 Σ_i ‖u_i − f_i‖², [B, H]: float32 (float64 for float64), one number a head.

    u [B, G or H, T, V] tokens (an attention's values, say); q [B, H, T, K]; k [B, G, T, K], H a multiple of G: head h
    reads group h // (H/G). ``target`` f, of u's shape, comes with ``lam``, a number, a list or a tensor [] or [H].
    ``causal``: token i sees tokens j ≤ i. With ``key_lengths`` int64 [B] rows i and j ≥ key_lengths[b] are left out of
    both sums; they must hold finite numbers. ``scale`` None means K^-0.5. Differentiable in u, q, k, target, lam.

    ``kernel``: "softmax", A = softmax(scale·q kᵀ); "symmetric", A = (E + Eᵀ)/2 with E = n·exp(scale·q kᵀ)/Σ exp(…) over
    the n real tokens: the nonlocal functional with the kernel k(x, y) + k(y, x) of the paper, scaled to softmax's mass.
    ``gradient``: "full", or "row", which holds u_j constant: then u − ∂J/∂u = A u + λ(f − u) with the softmax kernel,
    which is NeuTRENO's update. With the symmetric kernel the row gradient of u is half the full one.

    float32, float64, bfloat16, float16 (sums in float32); torch.autocast is not heeded. Raises ValueError for arguments
    that do not fit. Source: NeuTRENO (NeurIPS 2023), the functionals J and E.
    """
    check_tensors(u=u, q=q, k=k, target=target)
    if sharding.shared(u, q, k):
        return sharding.local(nonlocal_energy, by_rank, dict(
            u=u, q=q, k=k, target=target, lam=lam, causal=causal, key_lengths=key_lengths, scale=scale,
            kernel=kernel, gradient=gradient))  # fmt: skip
    if not isinstance(lam, (int, float)):
        (lam,) = gains(q, lam=lam)
    key_lengths = integers("key_lengths", key_lengths, torch.int64, q.device)
    _check(u, q, k, target, lam, causal, key_lengths, kernel, gradient)
    scale = float(q.shape[3] ** -0.5 if scale is None else scale)
    dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    length = None if key_lengths is None else key_lengths.clamp(0, u.shape[2])
    real = None if length is None else (torch.arange(u.shape[2], device=u.device) < length[:, None])[:, None]
    row = gradient == "row" and kernel == "softmax"
    whole = u
    with _full_precision(u.device.type):
        if gradient == "row" and not row:  # the symmetric kernel's row gradient is half the full one
            u = (u + u.detach()) / 2
        if kernel == "symmetric" or rows.kernel_takes(u, q, k):
            energies, log = rows.of(centred(u, real), q, k, causal, length, scale, row)
            if kernel == "symmetric":
                count = u.shape[2] if length is None else length[:, None]
                share = log if real is None else log.masked_fill(~real, torch.finfo(dtype).min)
                energies = energies * share.softmax(-1) * (count if real is None else count[..., None])
        else:
            energies = _core_rows(centred(u.to(dtype), real), q.to(dtype), k.to(dtype), causal, length,
                                  scale, row)  # fmt: skip
        energy = (energies if real is None else energies.where(real, 0)).sum(-1)
        if target is None:
            return energy
        distance = (whole.to(dtype) - target.to(dtype)).square().sum(-1)
        distance = (distance if real is None else distance.where(real, 0)).sum(-1)
        return energy + lam / 2 * distance.repeat_interleave(q.shape[1] // u.shape[1], dim=1)


def centred(u: Tensor, real: Tensor | None) -> Tensor:
    """u without the mean of its real rows, zero at the others.

    The mean is held constant: J does not depend on it, so that is its exact derivative.
    """
    if real is None:
        return u - u.detach().mean(2, keepdim=True, dtype=_wide(u)).to(u.dtype) if u.shape[2] else u
    seen = torch.where(real[..., None], u, 0)
    mean = seen.detach().sum(2, keepdim=True, dtype=_wide(u)) / real.sum(-1).clamp(min=1)[..., None, None]
    return torch.where(real[..., None], u - mean.to(u.dtype), 0)


def _wide(u: Tensor) -> torch.dtype:
    return torch.float64 if u.dtype == torch.float64 else torch.float32


def _core_rows(u, q, k, causal: bool, key_lengths: Tensor | None, scale: float, row: bool) -> Tensor:
    """The energy of each row [B, H, T], u centred: by torch's attention, with autograd through it."""
    width, heads = u.shape[3], q.shape[1]
    square = u.square().sum(-1, keepdim=True)
    filling = max(q.shape[3] - width - 1, 0)  # so that the core finds one width and copies nothing
    if u.device.type == "cuda":  # whose kernels want whole groups of eight
        filling = -(width + 1) % 8
    values = torch.nn.functional.pad(torch.cat([u, square], -1), (0, filling))
    if u.shape[1] != k.shape[1]:  # the core takes one number of groups
        k = k.repeat_interleave(heads // k.shape[1], dim=1)
    out = softmax_core(q, k, values.detach() if row else values, Mask(causal, None, None, key_lengths), scale)
    own, square = (x.repeat_interleave(heads // x.shape[1], dim=1) if x.shape[1] != heads else x
                   for x in (u, square[..., 0]))  # fmt: skip
    return (square + out[..., width]) / 2 - (own * out[..., :width]).sum(-1)


def _full_precision(device: str):
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


def _check(u, q, k, target, lam, causal, key_lengths, kernel, gradient) -> None:
    if q.dim() != 4 or q.shape[1] < 1 or q.shape[3] < 1:
        raise ValueError(f"q: expected [B, H, T, K], got {list(q.shape)}")
    batch, heads, tokens, width = q.shape
    if (
        k.dim() != 4
        or (k.shape[0], *k.shape[2:]) != (batch, tokens, width)
        or k.shape[1] < 1
        or heads % k.shape[1]
    ):
        raise ValueError(
            f"k: expected [B, G, T, K], G dividing H, beside q {list(q.shape)}; got {list(k.shape)}"
        )
    if u.dim() != 4 or (u.shape[0], u.shape[2]) != (batch, tokens) or u.shape[1] not in (k.shape[1], heads):
        raise ValueError(f"u: expected [B, G or H, T, V] beside q and k {list(k.shape)}; got {list(u.shape)}")
    if u.dtype not in DTYPES:
        raise ValueError(f"u: expected float32, float64, bfloat16 or float16, got {u.dtype}")
    for name, x in (("q", q), ("k", k), ("target", target)):
        if x is not None and (x.dtype != u.dtype or x.device != u.device):
            raise ValueError(f"{name}: expected {u.dtype} on {u.device} as u, got {x.dtype} on {x.device}")
    if (target is None) != (lam is None):
        missing, given = ("lam", "target") if lam is None else ("target", "lam")
        raise ValueError(f"{missing}: expected beside {given}, got None")
    if target is not None and target.shape != u.shape:
        raise ValueError(f"target: expected the shape of u {list(u.shape)}, got {list(target.shape)}")
    if isinstance(lam, Tensor) and lam.shape not in ((), (heads,)):
        raise ValueError(f"lam: expected a number or [] or [H] = [{heads}], got {list(lam.shape)}")
    for name, value, known in (("kernel", kernel, KERNELS), ("gradient", gradient, GRADIENTS)):
        if value not in known:
            raise ValueError(f"{name}: expected one of {', '.join(known)}; got {value!r}")
    Mask(causal, None, None, key_lengths).check(batch, tokens, tokens)
