"""J = ½ Σ_ij A_ij ‖u_i − u_j‖² + λ/2 Σ_i ‖u_i − f_i‖², every difference written out: the oracle of
``ops/nonlocal_energy``."""

from __future__ import annotations

from torch import Tensor

from gaugekit.reference.shaped_combine import seen_keys


def nonlocal_energy(
    u: Tensor, q: Tensor, k: Tensor, *, target: Tensor | None = None, lam: float | Tensor | None = None,
    causal: bool = False, key_lengths: Tensor | None = None, scale: float | None = None, kernel: str = "softmax",
    gradient: str = "full",
) -> Tensor:  # fmt: skip
    """u, target [B, G or H, T, V], q [B, H, T, K], k [B, G, T, K] -> [B, H]; as in ``gaugekit.nonlocal_energy``."""
    batch, heads, rows, width = q.shape
    u, k = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (u, k))
    seen = seen_keys(batch, rows, rows, causal=causal, key_lengths=key_lengths)[0][:, None]
    real = seen_keys(batch, rows, rows, key_lengths=key_lengths)[1].any(-1)[:, None]  # [B, 1, T]
    seen = seen & real[..., None]
    scores = (q @ k.mT * (width**-0.5 if scale is None else scale)).masked_fill(~seen, float("-inf"))
    if kernel == "softmax":
        weights = scores.masked_fill(~seen.any(-1, keepdim=True), 0).softmax(-1) * seen
    else:  # the whole of exp(scores), scaled to the mass that softmax has: one for each row
        mass = real.sum(-1, keepdim=True)[..., None]
        k_ij = scores.flatten(2).masked_fill(~seen.any((2, 3))[..., None], 0).softmax(-1).view_as(scores)
        k_ij = mass * k_ij * seen
        weights = (k_ij + k_ij.mT) / 2
    other = u.detach() if gradient == "row" else u
    distance = (u[:, :, :, None] - other[:, :, None]).square().sum(-1)  # [B, H, T, T]
    energy = (weights * distance).sum((2, 3)) / 2
    if target is not None:
        f = target.repeat_interleave(heads // target.shape[1], dim=1)
        energy = energy + lam / 2 * ((u - f).square().sum(-1) * real).sum(-1)
    return energy
