"""How much of W_Q W_Kᵀ each head needs: its singular values, as the weights say or as the activations feel them.

The scores of a head are (x W_Q + b_Q)(x' W_K + b_K)ᵀ. b_K shifts a whole row of them and cannot be seen, so what
counts is M = [W_Q; b_Q] W_Kᵀ, and with inputs of second moments C_q = E x̃ x̃ᵀ (x̃ = [x, 1]) and C_k = E x xᵀ − E x E xᵀ
(a constant key cannot be seen either) the mean squared error of the scores under M' is ‖C_q^½ (M − M') C_k^½‖².
Neither M nor the roots are ever inverted: with R_q and R_k from thin QRs of C_q^½ [W_Q; b_Q] and C_k^½ W_K and R_q
R_kᵀ = U Σ Vᵀ, the best M' of rank r is (W_Q R_kᵀ V_r Σ_r^−½)(W_K R_qᵀ U_r Σ_r^−½)ᵀ. The heads that share a key take
one factor: their queries are stacked. Channels turned by position commute with no such mixing; of them only whole
pairs may go, and a pair is worth the energy of its part of the score, ½ E|q|² E|k|², at a random angle.

Stored weights are rounded, and rounding gives a product of low rank small singular values of its own. What lies below
them says nothing about the model: ``rounding_norm`` is their size, and everything here that decides a rank compares
with it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gaugekit.calibration.moments import Moments
from gaugekit.models import AttentionView
from gaugekit.models.view import rotary_pairs


@dataclass(frozen=True)
class Spectrum:
    """What each key head of one layer is made of, float64.

    ``pairs`` [G, rotary/2]: the energy of each rotary pair; ``values`` [G, K − rotary]: singular values of the rest,
    descending; ``turn_q``, ``turn_k`` [G, K − rotary, K − rotary]: what turns those channels of W_Q and W_K into
    components in that order. ``noise`` [G]: the singular value that the rounding of the stored weights alone can make.
    ``interleaved``: which channels a pair is (``AttentionView.pairs``).
    """

    pairs: Tensor
    values: Tensor
    turn_q: Tensor
    turn_k: Tensor
    noise: Tensor
    interleaved: bool = False

    @property
    def energies(self) -> Tensor:
        """[G, K] the energy of each channel: half its pair's, or its singular value squared."""
        rotary = torch.cat([self.pairs / 2, self.pairs / 2], 1)
        rotary[:, self._channels.flatten()] = rotary.clone()
        return torch.cat([rotary, self.values.square()], 1)

    @property
    def _channels(self) -> Tensor:
        """[2, rotary/2] the channels of each pair."""
        return rotary_pairs(2 * self.pairs.shape[1], self.interleaved)

    def kept(self, ranks: list[int]) -> list[list[int]]:
        """[G][R_g] the channels to keep, the most energetic first that fit, ascending; a pair stays whole."""
        pairs = self._channels.mT.tolist()
        chosen = []
        for group, (energies, rank) in enumerate(zip(self.energies, ranks, strict=True)):
            units = pairs + [[i] for i in range(2 * len(pairs), len(energies))]
            taken: list[int] = []
            for unit in sorted(units, key=lambda unit: (-energies[unit[0]].item(), unit)):
                if len(taken) + len(unit) <= rank:
                    taken += unit
            if len(taken) != rank:
                raise ValueError(
                    f"rank: expected an even number, since rotary channels go in whole pairs; got {rank} "
                    f"(key head {group})"
                )
            chosen.append(sorted(taken))
        return chosen

    def shares(self, ranks: list[int]) -> list[float]:
        """[G] the share of each head's energy that its ``kept`` channels hold; 1 for a head that has none."""
        rows = zip(self.energies, self.kept(ranks), strict=True)
        return [float(row[channels].sum() / row.sum()) if row.any() else 1.0 for row, channels in rows]

    def needed(self, energy: float) -> list[int]:
        """[G] the smallest ranks that keep at least the share ``energy`` of each head's energy.

        Singular values that rounding alone explains hold none: all the energy of a head is that of its numerical rank.
        """
        ranks = []
        seen = torch.where(self.values > self.noise[:, None], self.values, 0.0)
        for pairs, values in zip(self.pairs, seen.square(), strict=True):
            units = [(e / 2, 2, e) for e in pairs.tolist()] + [(e, 1, e) for e in values.tolist()]
            total, held, rank = sum(unit[2] for unit in units), 0.0, 0
            for _, width, mass in sorted(units, reverse=True):
                if rank and held >= energy * total:
                    break
                held, rank = held + mass, rank + width
            ranks.append(rank)
        return ranks


def spectrum(view: AttentionView, moments: Moments | None = None) -> Spectrum:
    """The components of one layer's scores, seen by the activations' ``moments``, or plain where None.

    Plain means C = I: the singular values of [W_Q; b_Q] W_Kᵀ. Cost: two eigendecompositions of [D, D] a layer and QRs
    of [D, K] a head, in float64.
    """
    check(view)
    plain = slice(view.rotary, None)
    inputs = view.q.weight.shape[1]
    eye = torch.eye(inputs + 1, dtype=torch.float64)
    augmented = eye if moments is None else _augmented(moments)
    root_q = eye if moments is None else _root(augmented)
    root_k = eye[:-1, :-1] if moments is None else _root(moments.covariance)
    queries, keys = _stacked(view.q), _stacked(view.k)
    tall = (root_q @ queries[..., plain]).unflatten(0, (view.groups, -1)).flatten(1, 2)
    r_q = torch.linalg.qr(tall, mode="r").R
    r_k = torch.linalg.qr(root_k @ view.k.weight[..., plain], mode="r").R
    u, values, v = torch.linalg.svd(r_q @ r_k.mT)
    floor = values[:, :1] * torch.finfo(torch.float64).eps * inputs if values.shape[1] else values
    scale = torch.where(values > floor, values, torch.inf).rsqrt()[:, None]
    turn_q, turn_k = (r_k.mT @ v.mT) * scale, (r_q.mT @ u) * scale
    left, right = view.pairs
    size_q, size_k = (
        torch.einsum("hdk,de,hek->hk", part[..., : view.rotary], augmented, part[..., : view.rotary])
        for part in (queries, keys)
    )
    size_q = size_q.unflatten(0, (view.groups, -1)).sum(1)
    of_q, of_k = (size[:, left] + size[:, right] for size in (size_q, size_k))
    noise = values.new_zeros(view.groups)
    if values.shape[1]:
        rounded_q = rounding_norm(queries[..., plain].unflatten(0, (view.groups, -1)), view.q.dtype, root_q)
        rounded_k = rounding_norm(view.k.weight[..., plain], view.k.dtype, root_k)
        noise = _product_noise((r_q, rounded_q), (r_k, rounded_k), inputs)
    return Spectrum(of_q * of_k / 2, values, turn_q, turn_k, noise, view.interleaved)


def check(view: AttentionView) -> None:
    """ValueError, with the reason, where the scores of a family are no matter of W_Q W_Kᵀ alone."""
    reason = view.barred.get("query_key")
    if view.k.bias is not None and view.rotary < view.k.weight.shape[2]:  # it goes with the channels
        reason = reason or view.barred.get("key_bias")
    if reason is not None:
        raise ValueError(
            f"rank: expected scores that are a function of W_Q W_Kᵀ, got a model in which {reason}"
        )


def rounding_norm(weight: Tensor, dtype: torch.dtype, root: Tensor | None = None) -> Tensor:
    """τ(W), the spectral norm of what rounding W [m, n] to ``dtype`` has added to it: max_j ‖e_j‖ + max_i ‖e_i‖.

    A number rounded to a multiple of its ulp is off by something between −ulp/2 and ulp/2, evenly: e_ij = ulp_ij/√12
    on average (root mean square), where ulp_ij is that of the stored number, subnormal ones included, and 0 of a zero.
    Errors of different entries are independent, and the norm of such a matrix is the largest norm of a column of e
    plus that of a row (Gordon; Bandeira and van Handel 2016 for unequal entries). For entries of like size that is

        τ(W) = ½ u (√m + √n) ‖W‖_F / √(mn),   u = eps/2: 2⁻⁸ for bfloat16, 2⁻¹¹ for float16, 2⁻²⁴ for float32,

    since ulp/√12 is 0.41 u |w| on average over all mantissas (true rounding of normal matrices: 0.82 of it). Seen
    through ``root`` A [p, m] a column of e is long by the lengths of A's columns, and a row by ‖A‖.

    ``weight`` [heads, m, n], or [groups, heads, m, n] for heads stacked on one another, with at least one column;
    returns [heads] or [groups], float64.
    """
    weight = weight if weight.dim() == 4 else weight[:, None]
    kind = torch.finfo(dtype)
    exponent = torch.frexp(weight).exponent - 1
    ulp = torch.ldexp(torch.full_like(weight, kind.eps), exponent)
    ulp = ulp.clamp(min=kind.smallest_normal * kind.eps).masked_fill(weight == 0, 0.0)
    variance = ulp.square() / 12
    lengths = weight.new_ones(weight.shape[2]) if root is None else root.square().sum(0)
    spectral = 1.0 if root is None else float(torch.linalg.matrix_norm(root, 2))
    columns = torch.einsum("ghmn,m->gn", variance, lengths).amax(1).sqrt()
    return columns + spectral * variance.sum(3).flatten(1).amax(1).sqrt()


def head_values(view: AttentionView) -> Tensor:
    """[H, K] singular values of W_Q W_Kᵀ = Q_q (R_q R_kᵀ) Q_kᵀ by head, descending: [D, K] never becomes [D, D]."""
    r_q, r_k = _triangles(view)
    return torch.linalg.svdvals(r_q @ r_k.mT)


def head_ranks(view: AttentionView, values: Tensor | None = None) -> list[int]:
    """[H] the numerical rank of W_Q W_Kᵀ by head: how many of ``values`` the rounding of the weights cannot explain.

    Both factors were rounded, W_Q + E_Q and W_K + E_K, so a product of rank r has a singular value number r + 1 of up
    to τ(W_Q) ‖W_K‖ + ‖W_Q‖ τ(W_K) + τ(W_Q) τ(W_K) (``rounding_norm``, ``Projection.dtype``; Weyl's inequality). To that
    comes D · eps(float64) · σ₁, the arithmetic here. A head of zeros has rank 0.
    """
    values = head_values(view) if values is None else values
    r_q, r_k = _triangles(view)
    noise_k = rounding_norm(view.k.weight, view.k.dtype).repeat_interleave(view.repeats)
    noise_q = rounding_norm(view.q.weight, view.q.dtype)
    noise = _product_noise((r_q, noise_q), (r_k, noise_k), view.q.weight.shape[1])
    return (values > noise[:, None]).sum(1).tolist()


def _triangles(view: AttentionView) -> tuple[Tensor, Tensor]:
    """(R_q, R_k) [H, K, K] of thin QRs, those of the keys repeated for the query heads that share them."""
    r_q = torch.linalg.qr(view.q.weight, mode="r").R
    return r_q, torch.linalg.qr(view.k.weight, mode="r").R.repeat_interleave(view.repeats, dim=0)


def _product_noise(q: tuple[Tensor, Tensor], k: tuple[Tensor, Tensor], inputs: int) -> Tensor:
    """[heads] the noise of Q Kᵀ for (factor or its R [heads, ·, K], τ [heads]) of each, and of float64 itself."""
    (factor_q, tau_q), (factor_k, tau_k) = q, k
    norm_q, norm_k = (torch.linalg.matrix_norm(factor, 2) for factor in (factor_q, factor_k))
    arithmetic = inputs * torch.finfo(torch.float64).eps * norm_q * norm_k
    return tau_q * norm_k + norm_q * tau_k + tau_q * tau_k + arithmetic


def _stacked(part) -> Tensor:
    """[W; b]: [heads, D + 1, K]."""
    weight = part.weight
    bias = weight.new_zeros(weight.shape[0], weight.shape[2]) if part.bias is None else part.bias
    return torch.cat([weight, bias[:, None]], 1)


def _augmented(moments: Moments) -> Tensor:
    """E x̃ x̃ᵀ of x̃ = [x, 1]: [D + 1, D + 1]."""
    mean = moments.mean
    one = torch.ones(1, dtype=mean.dtype)
    top = torch.cat([moments.second, mean[:, None]], 1)
    return torch.cat([top, torch.cat([mean, one])[None]])


def _root(moment: Tensor) -> Tensor:
    """Some L with Lᵀ L = ``moment``; directions that rounding left negative count as absent."""
    values, vectors = torch.linalg.eigh(moment)
    return values.clamp(min=0).sqrt()[:, None] * vectors.mT
