"""Choosing the gauge: so that what no output depends on is exactly 0 or 1, or so that few bits suffice."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from gaugekit.models import AttentionView, Live, family, left_alone
from gaugekit.report import Report
from gaugekit.rewrite import Rewrite, invariance_error
from gaugekit.symmetry.action import shared, with_bias
from gaugekit.symmetry.groups import REMOVED, SYMMETRIES
from gaugekit.symmetry.rows import CHOICES

ORDER = ("key_bias", "value_bias", "value_output", "query_key")  # biases first: then the other two carry none
STEPS, RATE, MEMORY = 200, 0.05, (0.9, 0.99)  # of ``rotation``: its sum has settled to two or three digits


class GaugeFix(Rewrite):
    """The first rewrite: fixes the four groups of every layer whose fixed form stores less, exactly.

    Keys lose their bias and W_K[P] = I, values theirs and W_V[P] = I; queries, output and output bias take it up.
    Counts are exact: (V² + K² + K + V) numbers a key/value head (without rotary positions, with biases).
    ``rows`` chooses P: "balanced" (per head, the least that rounding does to what leaves it), "max_volume" (per head,
    entries ≤ 1.02) or "shared_partition" (one partition of the inputs a layer; needs heads·width = D). With
    "triangular" W_K[P] and W_V[P] are lower triangular instead: every head is only turned, by which no rounding error
    grows, and V(V − 1)/2 and K(K − 1)/2 numbers go in place of V² and K². After a truncation of the keys to rank R
    (``rank.Truncate``) read R for K; ``key_ranks`` [L][G] tells the plan so. Source: arXiv 2412.14543; rows: see
    ``symmetry.rows``.
    """

    name = "gauge"
    claim = "exact"

    def __init__(self, rows: str = "balanced", key_ranks: list[list[int]] | None = None):
        if rows not in CHOICES:
            raise ValueError(f"rows: expected one of {', '.join(CHOICES)}; got {rows!r}")
        self.rows, self.key_ranks = rows, key_ranks

    @property
    def arguments(self) -> dict:
        return {"rows": self.rows}

    def plan(self, config: dict) -> dict[str, int]:
        adapter = family(config)
        removed = dict.fromkeys(REMOVED, 0)
        for layer in range(adapter.layers):
            view = adapter.outline(layer)
            if self.key_ranks is not None:
                kept = tuple(tuple(range(rank)) for rank in self.key_ranks[layer])
                bias = None if self.key_ranks[layer] != view.ranks else view.k.bias
                view = replace(view, k=replace(view.k, bias=bias), channels=kept)
            for name in REMOVED:
                removed[name] += SYMMETRIES[name].removed(view, self.rows)
        return {**removed, "total": sum(removed.values())}

    def layer(self, view: AttentionView, statistics: object = None) -> AttentionView:
        for name in ORDER:
            view = SYMMETRIES[name].fix(view, rows=self.rows)
        return view


class QuantizationGauge(Rewrite):
    """Moves every layer to the point of its orbit that rounding to few bits harms least; nothing is removed.

    A head's product W B (values and outputs, or queries and keys) is the same from W E and E⁻¹ B for every invertible
    E. Rounding to a few bits errs by a share of a group's largest entry, and errors of one factor are multiplied by the
    other. So ``balance`` first makes both Gram matrices one diagonal matrix, which brings Σ‖W‖² + ‖B‖² down to its
    least, 2 ‖W B‖_*; then ``rotation`` spreads what stands out: it minimises the sum of the fourth powers of all
    entries, as OptRot does (arXiv 2512.24124), which rotates alone.

    Biases that nobody can observe are folded first, then values with outputs and, where no rotary positions or norms
    stand between them, queries with keys are moved by ``balance`` and ``rotation``. Exact: convert with ``dense=True``,
    verify, then quantise the result with any tool. Only weights decide, no text.

    balanced: whether ``balance`` comes first; without it this is OptRot's rotation of heads.
    seed: of the rotation that the search starts from; another seed ends in another local minimum.
    """

    name = "quantization gauge"
    claim = "exact"

    def __init__(self, balanced: bool = True, seed: int = 0):
        self.balanced, self.seed = balanced, seed

    @property
    def arguments(self) -> dict:
        return {"balanced": self.balanced, "seed": self.seed}

    def plan(self, config: dict) -> dict[str, int]:
        return {"total": 0}

    def layer(self, view: AttentionView, statistics: object = None) -> AttentionView:
        for name in ("key_bias", "value_bias"):
            view = SYMMETRIES[name].fix(view)
        view = self._moved(view, "value_output", view.v.weight, shared(view.o.weight, view))
        if SYMMETRIES["query_key"].dimension(view) and view.channels is None:
            # E acts on the queries; what the keys take up is its inverse, transposed.
            queries, keys = shared(with_bias(view.q).mT, view).mT, view.k.weight.mT
            view = self._moved(view, "query_key", queries, keys)
        return view

    def _moved(self, view: AttentionView, name: str, left: Tensor, right: Tensor) -> AttentionView:
        element = (
            balance(left, right)
            if self.balanced
            else torch.eye(left.shape[2]).to(left).expand(len(left), -1, -1)
        )
        turn = rotation(left @ element, torch.linalg.solve(element, right), self.seed)
        return SYMMETRIES[name].act(view, element @ turn)


def balance(left: Tensor, right: Tensor) -> Tensor:
    """E [G, K, K] with (W E)ᵀ(W E) = (E⁻¹ B)(E⁻¹ B)ᵀ = S, the singular values of W B; the identity where a factor has
    not full rank.

    left: W [G, n, K], float64.
    right: B [G, K, m], float64.
    """
    upper, lower = torch.linalg.qr(left).R, torch.linalg.qr(right.mT).R
    u, spectrum, _ = torch.linalg.svd(upper @ lower.mT)
    whole = spectrum[:, -1] > spectrum[:, 0] * spectrum.shape[1] * torch.finfo(spectrum.dtype).eps
    identity = torch.eye(left.shape[2], dtype=left.dtype).expand(len(left), -1, -1)
    upper = torch.where(whole[:, None, None], upper, identity)
    element = torch.linalg.solve(upper, u * spectrum.sqrt()[:, None])
    return torch.where(whole[:, None, None], element, identity)


def rotation(left: Tensor, right: Tensor, seed: int = 0) -> Tensor:
    """R [G, K, K] orthogonal for which the fourth powers of the entries of W R and Rᵀ B sum to least, each over the
    square of what their second powers sum to.

    A local minimum: 200 steps along the gradient on the orthogonal group, with momentum and in proportion to its size
    as in Adam, from a rotation that mixes all channels. The same on every call with one ``seed``.

    left: W [G, n, K], float64.
    right: B [G, K, m], float64.
    """
    left, right = (
        part / part.square().mean((1, 2), keepdim=True).sqrt().clamp_min(1e-300) for part in (left, right)
    )
    turn = _mixing(left.shape[2], seed).to(left).expand(len(left), -1, -1)
    identity = torch.eye(left.shape[2], dtype=left.dtype)
    mean, square = torch.zeros_like(turn), torch.zeros_like(turn[:, :1, :1])
    for step in range(1, STEPS + 1):
        one, other = left @ turn, turn.mT @ right
        slope = left.mT @ one.pow(3) / one[0].numel() + right @ other.pow(3).mT / other[0].numel()
        skew = turn.mT @ slope
        skew = skew - skew.mT  # what is tangent to the group
        mean = MEMORY[0] * mean + (1 - MEMORY[0]) * skew
        square = MEMORY[1] * square + (1 - MEMORY[1]) * skew.square().mean((1, 2), keepdim=True)
        size = (square / (1 - MEMORY[1] ** step)).sqrt().clamp_min(1e-300)
        move = RATE / 2 * mean / (1 - MEMORY[0] ** step) / size
        turn = turn @ torch.linalg.solve(identity + move, identity - move)  # Cayley's: orthogonal to rounding
    return turn


def _mixing(width: int, seed: int) -> Tensor:
    """A rotation that spreads every channel over all others: the seeded Q of a random matrix."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(width, width, dtype=torch.float64, generator=generator)).Q


@torch.no_grad()
def fix(model: nn.Module, *, rows: str = "balanced") -> Report:
    """Fixes the gauge of a live model in place: the same classes, dense weights, the same function.

    The float64 result is rounded once to each parameter's dtype; the removed entries are exactly 0 or 1 afterwards.
    ``rows`` is "balanced", "max_volume", "shared_partition" or "triangular" (see ``GaugeFix``). Do it once a
    model is trained: Adam learns more slowly from here, and moments that an optimizer holds belong to the old weights.

    Returns a Report: ``parameters``; ``removed`` {group: count, total}; ``layers`` [{layer, value_rows, key_rows:
    [head][width] input indices, invariance_error (float64, before rounding)}]. Raises ValueError for a model that is
    none of transformers' or of an unknown family, whose layers share some of their projections, or whose dtype the
    result does not fit; layers fixed before an error stay fixed, the function unchanged.
    """
    live = Live(model)
    gauge = GaugeFix(rows)
    removed = gauge.plan(live.config)
    layers, barred = [], []
    for layer in range(len(live)):
        before = live.attention(layer)
        barred.append(before.barred)
        after = gauge.layer(before)
        found = {
            "layer": layer,
            "value_rows": None if after.v.rows is None else after.v.rows.tolist(),
            "key_rows": None if after.k.rows is None else after.k.rows.tolist(),
            "invariance_error": invariance_error(before, after, seed=layer),
        }
        live.write(live.family.store(layer, after).tensors)
        layers.append(found)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    report = Report(
        "fix", {"parameters": parameters, "removed": removed, "layers": layers}, left_alone(barred)
    )
    worst = max((layer["invariance_error"] for layer in layers), default=0.0)
    report.lines = [
        ("parameters", f"{parameters:,}, of which {removed['total']:,} are now exactly 0 or 1"),
        ("error of a layer", f"{worst:.1e} of its output at most, in float64 and before rounding"),
    ]
    report.done = f"Fixed {len(layers)} layers of this {type(model).__name__} in place; nothing was written."
    report.next = "gaugekit.verify(original, model), or gaugekit.fuse(model), which stops storing them"
    return report
