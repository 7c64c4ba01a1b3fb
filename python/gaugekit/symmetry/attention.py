"""The groups of an attention layer that gauge fixing removes.

With x the layer's input and A_h = softmax(scale · (x W_Q + b_Q)(x W_K + b_K)ᵀ), whose rows sum to one, the layer's
output is Σ_h A_h (x W_V + b_V) W_O + b_O. It does not move under

- value_output, GL(V) a key/value head: (W_V, b_V) → (W_V, b_V) E and W_O → E⁻¹ W_O
- query_key, GL(K) a key/value head, without rotary positions: (W_Q, b_Q) → (W_Q, b_Q) E and (W_K, b_K) → (W_K, b_K) E⁻ᵀ
- key_bias, R^K a key/value head, without rotary positions: b_K → b_K + e (it shifts a whole row of scores)
- value_bias, R^V a key/value head: b_V → b_V + e and b_O → b_O − Σ_h e W_O^h (the rows of A sum to one)

Rotary positions and norms of queries and keys take the second and the third away (``symmetry.rotary`` and
``symmetry.norms`` have what is left); the other two do not ask how A came about. A family says so by
``AttentionView.barred``, which also names a group that is left alone in it.

Source: van Nierop, "Transformer models are gauge invariant" (arXiv 2412.14543).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Generator, Tensor

from gaugekit.models import AttentionView, Projection
from gaugekit.symmetry.action import (
    Symmetry,
    bias_of,
    compare,
    fix_rows,
    flat,
    narrow,
    per_head,
    random_matrices,
    shared,
    size_of,
    through,
    times,
    widen,
    with_bias,
)
from gaugekit.symmetry.rows import removed


class ValueOutput(Symmetry):
    """GL(V) between the value and the output projection of each key/value head; elements [G, V, V]."""

    name = "value_output"

    def dimension(self, view: AttentionView) -> int:
        groups, _, width = view.v.weight.shape
        return groups * width**2

    def random(self, view: AttentionView, generator: Generator | None = None) -> Tensor:
        return random_matrices(view.groups, view.v.weight.shape[2], generator)

    def act(self, view: AttentionView, element: Tensor) -> AttentionView:
        width = view.v.weight.shape[2]
        self._check(view, element, (view.groups, width, width))
        out = torch.linalg.solve(per_head(element, view), view.o.weight)
        return replace(view, v=times(view.v, element), o=Projection(out, view.o.bias))

    def removed(self, view: AttentionView, rows: str = "balanced") -> int:
        return view.groups * removed(view.v.weight.shape[2], rows)

    def fix(self, view: AttentionView, rows: str = "balanced") -> AttentionView:
        """W_V[P] = I; the chosen block M = W_V[P] goes into W_O. With rows "triangular" W_V[P] is lower triangular; the
        rotation that made it so goes into W_O, turned back.
        """
        fixed, basis = fix_rows(view.v, shared(view.o.weight, view), rows, self.name)
        return replace(view, v=fixed, o=Projection(per_head(basis, view) @ view.o.weight, view.o.bias))

    def invariant(self, view: AttentionView, probe: Tensor) -> tuple[Tensor, Tensor]:
        values, out = per_head(with_bias(view.v), view), view.o.weight
        rest = [flat(view.q), flat(view.k), bias_of(view.o)]
        probe = probe[: out.shape[2]]
        return compare(values @ (out @ probe), size_of(values) * size_of(out) * probe.norm(), rest)


class QueryKey(Symmetry):
    """GL(K) between queries and keys of each key/value head, without rotary positions; elements [G, K, K].

    Where only R of the K channels are in use, R² numbers a head can be fixed; where R differs among the heads, none
    are: no compact form holds identity blocks of different sizes.
    """

    name = "query_key"
    absent = "rotary positions"

    def dimension(self, view: AttentionView) -> int:
        if self.name in view.barred or view.rotary or len(set(view.ranks)) > 1:
            return 0
        return view.groups * view.ranks[0] ** 2

    def random(self, view: AttentionView, generator: Generator | None = None) -> Tensor:
        return random_matrices(view.groups, view.k.weight.shape[2], generator)

    def act(self, view: AttentionView, element: Tensor) -> AttentionView:
        width = view.k.weight.shape[2]
        self._check(view, element, (view.groups, width, width))
        inverse = torch.linalg.inv(element).mT
        q, k = times(view.q, per_head(element, view)), times(view.k, inverse)
        return replace(view, q=q, k=k, channels=None)

    def removed(self, view: AttentionView, rows: str = "balanced") -> int:
        return view.groups * removed(view.ranks[0], rows) if self.dimension(view) else 0

    def fix(self, view: AttentionView, rows: str = "balanced") -> AttentionView:
        """W_K[P] = I; the chosen block M = W_K[P] goes into W_Q and b_Q as Mᵀ. Channels in use come to the front. With
        rows "triangular" W_K[P] is lower triangular, and W_Q and b_Q turn as W_K does.
        """
        if self.dimension(view) == 0:
            return view
        queries = shared(with_bias(view.q).mT, view)
        if view.channels is None:
            fixed, basis = fix_rows(view.k, queries, rows, self.name)
            return replace(view, q=times(view.q, per_head(basis, view).mT), k=fixed)
        kept = torch.tensor(view.channels)
        if rows == "shared_partition":
            rows = "max_volume"  # fewer channels no longer fill a partition
        used = queries.gather(1, kept[..., None].expand(-1, -1, queries.shape[2]))
        fixed, basis = fix_rows(narrow(view.k, kept), used, rows, self.name)
        q = times(narrow(view.q, per_head(kept, view)), per_head(basis, view).mT)
        rank, width = kept.shape[1], view.k.weight.shape[2]
        front = (tuple(range(rank)),) * view.groups
        return replace(view, q=widen(q, width), k=widen(fixed, width), channels=front)

    def invariant(self, view: AttentionView, probe: Tensor) -> tuple[Tensor, Tensor]:
        queries, keys = with_bias(view.q), per_head(with_bias(view.k), view)
        probe = torch.cat([probe[: view.k.weight.shape[1]], probe[:1]])  # one row more, for the bias
        rest = [flat(view.v), flat(view.o), view.q.weight.new_tensor([view.scale])]
        return compare(queries @ (keys.mT @ probe), size_of(queries) * size_of(keys) * probe.norm(), rest)


class KeyBias(Symmetry):
    """R^K a key/value head, without rotary positions; elements [G, K]."""

    name = "key_bias"
    absent = "rotary positions, or no bias"

    def dimension(self, view: AttentionView) -> int:
        if self.name in view.barred or view.rotary or view.k.bias is None:
            return 0
        return view.k.bias.numel()

    def random(self, view: AttentionView, generator: Generator | None = None) -> Tensor:
        return torch.randn(view.groups, view.k.weight.shape[2], dtype=torch.float64, generator=generator)

    def act(self, view: AttentionView, element: Tensor) -> AttentionView:
        self._check(view, element, (view.groups, view.k.weight.shape[2]))
        return replace(view, k=replace(view.k, bias=view.k.bias + element))

    def fix(self, view: AttentionView, rows: str = "balanced") -> AttentionView:
        """No key bias. (``rows`` has no bearing on it.)"""
        return view if self.dimension(view) == 0 else replace(view, k=replace(view.k, bias=None))

    def invariant(self, view: AttentionView, probe: Tensor) -> tuple[Tensor, Tensor]:
        rest = [flat(view.q), view.k.weight.flatten(), flat(view.v), flat(view.o)]
        return compare(probe.new_zeros(0), probe.new_zeros(0), rest)


class ValueBias(Symmetry):
    """R^V a key/value head, folded into the output's bias; elements [G, V]."""

    name = "value_bias"
    absent = "no bias of values or of the output"

    def dimension(self, view: AttentionView) -> int:
        return 0 if view.v.bias is None or view.o.bias is None else view.v.bias.numel()

    def random(self, view: AttentionView, generator: Generator | None = None) -> Tensor:
        return torch.randn(view.groups, view.v.weight.shape[2], dtype=torch.float64, generator=generator)

    def act(self, view: AttentionView, element: Tensor) -> AttentionView:
        self._check(view, element, (view.groups, view.v.weight.shape[2]))
        moved = view.o.bias - through(element, view)
        return replace(
            view, v=replace(view.v, bias=view.v.bias + element), o=Projection(view.o.weight, moved)
        )

    def fix(self, view: AttentionView, rows: str = "balanced") -> AttentionView:
        """No value bias; the output's bias carries it. (``rows`` has no bearing on it.)"""
        if self.dimension(view) == 0:
            return view
        folded = Projection(view.o.weight, view.o.bias + through(view.v.bias, view))
        return replace(view, v=replace(view.v, bias=None), o=folded)

    def invariant(self, view: AttentionView, probe: Tensor) -> tuple[Tensor, Tensor]:
        out, bias = view.o.bias, view.v.bias
        folded = probe.new_zeros(view.o.weight.shape[2])
        size = torch.zeros(())
        for term in (out, None if bias is None else through(bias, view)):
            folded = folded if term is None else folded + term
            size = size if term is None else size + term.norm()
        if bias is not None:
            size = size + bias.norm() * view.o.weight.norm()
        rest = [flat(view.q), flat(view.k), view.v.weight.flatten(), view.o.weight.flatten()]
        return compare(folded, size, rest)
