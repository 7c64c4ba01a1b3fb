"""How far a single attention layer's held-out loss can lie above its training loss, by the rank of its scores.

The setting is that of Truong, "On Rank-Dependent Generalisation Error Bounds for Transformers" (arXiv 2410.11500): one
layer, read at one token. **The bound below is our own derivation**, in the spirit of that paper and with constants
that can all be checked here; it is not his theorem, whose constants we have not seen. His bound grows with log r, this
one with √r.

    f(X) = wᵀ σ(W_Vᵀ Xᵀ softmax(s · X W x_cls)),   ‖x_t‖ ≤ B_x,  rank W ≤ r,  σ L_σ-Lipschitz with σ(0) = 0.

Softmax is 2-Lipschitz from ℓ_∞ to ℓ_1 whatever its length, so no T appears:

    |Δf| ≤ L_W ‖ΔW‖ + L_V ‖ΔW_V‖ + L_w ‖Δw‖,
    L_W = 2 s ‖w‖ L_σ ‖W_V‖ B_x³,   L_V = ‖w‖ L_σ B_x,   L_w = L_σ ‖W_V‖_F B_x.

A Frobenius ball of radius F among matrices [D, D] of rank r has log N(η) ≤ r (2D + 1) log(9 F / η) (Candès and Plan
2011, lemma 3.1); one among m free numbers log N(η) ≤ m log(9 F / η). With a third of the accuracy for each part,
Dudley's integral (constant 12) gives, since ∫₀¹ √log(9/u) du = √log 9 + (√π/2) 9 erfc(√log 9) = 1.770,

    Rad_n ≤ 36 · 1.770 / √n · [L_W F_W √(r (2D + 1)) + L_V F_V √(D V) + L_w F_w √V],

and with probability 1 − δ, for a loss that is L_ℓ-Lipschitz in f with values in an interval of length b,

    gap ≤ 2 L_ℓ Rad_n + b √(log(1/δ) / (2 n)).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from gaugekit.models import Live
from gaugekit.rank.spectra import check, head_ranks, rounding_norm
from gaugekit.report import Report, spread

INTEGRAL = math.sqrt(math.log(9)) + math.sqrt(math.pi) / 2 * 9 * math.erfc(math.sqrt(math.log(9)))


def covering_bound(
    scores: Tensor,
    value: Tensor,
    readout: Tensor,
    n_samples: int,
    *,
    input_norm: float,
    rank: int | None = None,
    scale: float = 1.0,
    lipschitz: float = 1.0,
    loss_lipschitz: float = 1.0,
    loss_range: float = 1.0,
    delta: float = 0.05,
) -> dict[str, float]:
    """The bound of this module for the class of layers whose norms and rank are those of the given weights.

    ``scores`` W = W_Q W_Kᵀ [D, D], ``value`` W_V [D, V], ``readout`` w [V]; ``input_norm`` B_x bounds every token's
    norm; ``rank`` r (default: W's numerical rank, rounding of its dtype apart); ``scale`` s multiplies the scores;
    ``lipschitz`` L_σ; ``loss_lipschitz`` L_ℓ, ``loss_range`` b, ``delta`` δ. The norms are taken from the trained
    weights, as if the class had been fixed before: a union bound over norms would add a logarithm. Returns {gap,
    rademacher, rank, scores, values, readout, chance}: the last four are the parts of the gap, which is their sum.
    Raises ValueError for arguments that do not fit.
    """
    if not isinstance(n_samples, int) or n_samples < 1:
        raise ValueError(f"n_samples: expected a positive integer, got {n_samples!r}")
    if not 0 < delta < 1:
        raise ValueError(f"delta: expected a probability between 0 and 1, got {delta!r}")
    inputs, width = value.shape
    if scores.shape != (inputs, inputs) or readout.shape != (width,):
        raise ValueError(
            f"scores, readout: expected [{inputs}, {inputs}] and [{width}] beside value [{inputs}, {width}], "
            f"got {list(scores.shape)} and {list(readout.shape)}"
        )
    stored = scores.dtype
    scores, value, readout = (x.detach().double() for x in (scores, value, readout))
    if rank is None:
        rounding = float(rounding_norm(scores[None], stored))
        rank = int(
            torch.linalg.matrix_rank(scores, atol=rounding, rtol=inputs * torch.finfo(scores.dtype).eps)
        )
    size, through = float(readout.norm()), float(torch.linalg.matrix_norm(value, 2))
    whole = float(value.norm())
    steps = {
        "scores": 2 * scale * size * lipschitz * through * input_norm**3
        * float(scores.norm()) * math.sqrt(rank * (2 * inputs + 1)),
        "values": size * lipschitz * input_norm * whole * math.sqrt(inputs * width),
        "readout": lipschitz * whole * input_norm * size * math.sqrt(width),
    }  # fmt: skip
    constant = 36 * INTEGRAL / math.sqrt(n_samples)
    parts = {name: 2 * loss_lipschitz * constant * step for name, step in steps.items()}
    parts["chance"] = loss_range * math.sqrt(math.log(1 / delta) / (2 * n_samples))
    rademacher = constant * sum(steps.values())
    return {"gap": sum(parts.values()), "rademacher": rademacher, "rank": rank, **parts}


def bound(
    model: nn.Module, n_samples: int, *, input_norm: float | None = None, delta: float = 0.05
) -> Report:
    """The bound and simple proxies of it for each layer and head of a live transformers model.

    Each head stands for itself, its values read through W_O by the unit vector that hears them best (‖w‖ = 1, σ the
    identity, loss range 1). ``input_norm`` B_x defaults to √D, the norm of a normalised token. These numbers are far
    above 1 for real models: compare them, do not believe them. ``layers``: [{layer, ranks [H], stable_ranks [H]
    ‖W‖_F²/‖W‖², spectral_norms [H], log_rank_sum Σ_h log r_h over heads that are not zero,
    bounds [H]}]. Raises ValueError for an unknown family.
    """
    live = Live(model)
    rows = []
    for layer in range(len(live)):
        view = live.attention(layer)
        check(view)
        inputs = view.q.weight.shape[1]
        norm = math.sqrt(inputs) if input_norm is None else input_norm
        keys, values = (part.weight.repeat_interleave(view.repeats, 0) for part in (view.k, view.v))
        found, ranks = [], head_ranks(view)
        for head in range(view.heads):
            product = view.q.weight[head] @ keys[head].mT
            spectrum = torch.linalg.svdvals(product)
            width = min(view.ranks[head // view.repeats], ranks[head])
            through = values[head] @ view.o.weight[head]
            reader = torch.linalg.svd(through, full_matrices=False)[2][0]
            limits = covering_bound(product, through, reader, n_samples, input_norm=norm, rank=width, scale=view.scale,
                                    delta=delta)  # fmt: skip
            stable = float(spectrum.square().sum() / spectrum[0] ** 2) if spectrum[0] else 0.0
            found.append((width, stable, float(spectrum[0]), limits["gap"]))
        ranks, stable, norms, bounds = map(list, zip(*found, strict=True))
        rows.append(
            {
                "layer": layer,
                "ranks": ranks,
                "stable_ranks": stable,
                "spectral_norms": norms,
                "log_rank_sum": sum(math.log(rank) for rank in ranks if rank),
                "bounds": bounds,
            }
        )
    report = Report(
        "bound", {"n_samples": n_samples, "delta": delta, "layers": rows}, ["our derivation: rank.bounds"]
    )
    report.lines = [
        ("samples", f"{n_samples:,}"),
        ("certainty", f"{1 - delta:g}: the bound may fail with the rest"),
    ]
    report.tables = {
        "layers": [
            f"layer {row['layer']}: gap at most {spread(row['bounds'])}, ranks {spread(row['ranks'])}"
            for row in rows
        ]
    }
    report.done = "Bounded the gap between training and test error of every head; nothing was written."
    report.next = "gaugekit.rank.truncate(model, ...): a lower rank has a lower bound"
    return report


def nuclear_penalty(*factors: nn.Module | tuple[Tensor, Tensor]) -> Tensor:
    """½ (‖W_Q‖² + ‖W_K‖²), summed: at its least over all factorisations it is the nuclear norm of W_Q W_Kᵀ.

    ``factors`` are pairs (W_Q, W_K), or modules: every one inside with ``query`` and ``key`` projections counts. Added
    to a loss it drives singular values to zero, so that a factorised layer finds its own rank (Srebro et al. 2004).
    Differentiable; ValueError where nothing is found.
    """
    pairs: list[tuple[Tensor, Tensor]] = []
    for one in factors:
        if isinstance(one, nn.Module):
            pairs += [
                (module.query.weight, module.key.weight)
                for module in one.modules()
                if hasattr(module, "query") and hasattr(module, "key")
            ]
        else:
            pairs.append(one)
    if not pairs:
        raise ValueError("factors: expected pairs (W_Q, W_K) or modules with query and key, found none")
    return 0.5 * sum(part.square().sum() for pair in pairs for part in pair)
