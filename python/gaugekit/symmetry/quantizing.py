"""The gauge that makes a model cheapest to quantise: equal shares for both factors of a head, and no entry that stands out.

A head's product W B (values and outputs, or queries and keys) is the same from W E and E⁻¹ B for every invertible E.
Rounding to a few bits errs by a share of a group's largest entry, and errors of one factor are multiplied by the other.
So E first makes both Gram matrices one diagonal matrix, which brings Σ‖W‖² + ‖B‖² down to its least, 2 ‖W B‖_*; then
a rotation spreads what stands out: the one that minimises the sum of the fourth powers of all entries, as OptRot does
(arXiv 2512.24124), which rotates alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gaugekit.models import AttentionView
from gaugekit.rewrite import Rewrite
from gaugekit.symmetry.action import shared, with_bias
from gaugekit.symmetry.groups import SYMMETRIES

STEPS, RATE = 300, 2e-2  # of Adam on the rotation: the sum has settled to three digits


class QuantizationGauge(Rewrite):
    """Moves every layer to the point of its orbit that rounding to few bits harms least; nothing is removed.

    Biases that nobody can observe are folded first, then values with outputs and, where no rotary positions or norms
    stand between them, queries with keys are moved by ``balance`` and ``rotation``. Exact: convert with ``dense=True``,
    verify, then quantise the result with any tool. Only weights decide, no text.

    balanced: whether ``balance`` comes first; without it this is OptRot's rotation of heads.
    """

    name = "quantization gauge"
    claim = "exact"

    def __init__(self, balanced: bool = True):
        self.balanced = balanced

    @property
    def arguments(self) -> dict:
        return {"balanced": self.balanced}

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
        turn = rotation(left @ element, torch.linalg.solve(element, right))
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


def rotation(left: Tensor, right: Tensor) -> Tensor:
    """R [G, K, K] orthogonal for which the fourth powers of the entries of W R and Rᵀ B sum to least, each over the
    square of what their second powers sum to.

    A local minimum: 300 steps of Adam on a skew-symmetric logarithm, from a rotation that mixes all channels. The same
    on every call.

    left: W [G, n, K], float64.
    right: B [G, K, m], float64.
    """
    left, right = (
        part / part.square().mean((1, 2), keepdim=True).sqrt().clamp_min(1e-300) for part in (left, right)
    )
    start = _mixing(left.shape[2]).to(left).expand(len(left), -1, -1)
    with torch.enable_grad():
        skew = torch.zeros_like(start).requires_grad_()
        optimizer = torch.optim.Adam([skew], lr=RATE)
        for _ in range(STEPS):
            turn = _turn(start, skew)
            loss = ((left @ turn).pow(4).mean((1, 2)) + (turn.mT @ right).pow(4).mean((1, 2))).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return _turn(start, skew.detach())


def _turn(start: Tensor, skew: Tensor) -> Tensor:
    upper = skew.triu(1)
    return start @ torch.linalg.matrix_exp(upper - upper.mT)


def _mixing(width: int) -> Tensor:
    """A rotation that spreads every channel over all others: the seeded Q of a random matrix."""
    generator = torch.Generator().manual_seed(0)
    return torch.linalg.qr(torch.randn(width, width, dtype=torch.float64, generator=generator)).Q
