"""What may be changed in an attention layer without being seen: four groups acting on a view.

With x the layer's input and A_h = softmax(scale · (x W_Q + b_Q)(x W_K + b_K)ᵀ), whose rows sum to one, the layer's
output is Σ_h A_h (x W_V + b_V) W_O + b_O. It does not move under

- value_output, GL(V) a key/value head: (W_V, b_V) → (W_V, b_V) E and W_O → E⁻¹ W_O
- query_key, GL(K) a key/value head, without rotary positions: (W_Q, b_Q) → (W_Q, b_Q) E and (W_K, b_K) → (W_K, b_K) E⁻ᵀ
- key_bias, R^K a key/value head, without rotary positions: b_K → b_K + e (it shifts a whole row of scores)
- value_bias, R^V a key/value head: b_V → b_V + e and b_O → b_O − Σ_h e W_O^h (the rows of A sum to one)

Norms of queries and keys take the second and the third away, whatever else holds; the other two do not ask how A came
about. A family says so by ``AttentionView.barred``, which also names a group that is left alone in it.

Source: van Nierop, "Transformer models are gauge invariant" (arXiv 2412.14543).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace

import torch
from torch import Generator, Tensor

from gaugekit.models import AttentionView, Projection
from gaugekit.symmetry import rows as choice


class Symmetry(ABC):
    """A group acting on a view, all in float64. ``name`` is the group's word in every report."""

    name: str

    @abstractmethod
    def dimension(self, view: AttentionView) -> int:
        """The numbers nobody can observe; 0 where the group does not act on this view."""

    @abstractmethod
    def random(self, view: AttentionView, generator: Generator | None = None) -> Tensor:
        """A random element, well conditioned."""

    @abstractmethod
    def act(self, view: AttentionView, element: Tensor) -> AttentionView:
        """The view moved by ``element``; ValueError where the group does not act or the shape is another."""

    @abstractmethod
    def fix(self, view: AttentionView, rows: str = "max_volume") -> AttentionView:
        """The point of the orbit with ``dimension`` entries exactly 0 or 1."""

    @abstractmethod
    def invariant(self, view: AttentionView, probe: Tensor) -> tuple[Tensor, Tensor]:
        """What the group leaves alone, applied to ``probe`` [D, n], and the size of the terms it was summed from."""

    def contains(self, view: AttentionView, other: AttentionView) -> bool:
        """Membership: whether some element carries ``view`` to ``other``, to the rounding of float64.

        The invariants are compared on eight seeded random probes (a difference escapes them with probability 0).
        """
        inputs = view.q.weight.shape[1]
        generator = torch.Generator().manual_seed(0)
        probe = torch.randn(inputs, 8, dtype=torch.float64, generator=generator)
        (mine, size), (theirs, other_size) = self.invariant(view, probe), self.invariant(other, probe)
        bound = torch.finfo(torch.float64).eps * inputs * (size + other_size)
        return mine.shape == theirs.shape and bool(((mine - theirs).abs() <= bound).all())

    def _check(self, view: AttentionView, element: Tensor, shape: tuple[int, ...]) -> None:
        if self.dimension(view) == 0:
            reason = view.barred.get(self.name, "rotary positions, or no bias")
            raise ValueError(f"{self.name}: this view has no such freedom ({reason})")
        if tuple(element.shape) != shape:
            raise ValueError(f"element of {self.name}: expected shape {shape}, got {tuple(element.shape)}")


class ValueOutput(Symmetry):
    """GL(V) between the value and the output projection of each key/value head; elements [G, V, V]."""

    name = "value_output"

    def dimension(self, view: AttentionView) -> int:
        groups, _, width = view.v.weight.shape
        return groups * width**2

    def random(self, view: AttentionView, generator: Generator | None = None) -> Tensor:
        return _random_matrices(view.groups, view.v.weight.shape[2], generator)

    def act(self, view: AttentionView, element: Tensor) -> AttentionView:
        width = view.v.weight.shape[2]
        self._check(view, element, (view.groups, width, width))
        out = torch.linalg.solve(_per_head(element, view), view.o.weight)
        return replace(view, v=_times(view.v, element), o=Projection(out, view.o.bias))

    def fix(self, view: AttentionView, rows: str = "max_volume") -> AttentionView:
        """W_V[P] = I; the chosen block M = W_V[P] goes into W_O."""
        fixed, basis = _fix(view.v, rows, self.name)
        return replace(view, v=fixed, o=Projection(_per_head(basis, view) @ view.o.weight, view.o.bias))

    def invariant(self, view: AttentionView, probe: Tensor) -> tuple[Tensor, Tensor]:
        values, out = _per_head(_with_bias(view.v), view), view.o.weight
        rest = [_flat(view.q), _flat(view.k), _bias(view.o)]
        return _compare(values @ (out @ probe), _norm(values) * _norm(out) * probe.norm(), rest)


class QueryKey(Symmetry):
    """GL(K) between queries and keys of each key/value head, without rotary positions; elements [G, K, K].

    Where only R of the K channels are in use, R² numbers a head can be fixed; where R differs among the heads, none
    are: no compact form holds identity blocks of different sizes.
    """

    name = "query_key"

    def dimension(self, view: AttentionView) -> int:
        if self.name in view.barred or view.rotary or len(set(view.ranks)) > 1:
            return 0
        return view.groups * view.ranks[0] ** 2

    def random(self, view: AttentionView, generator: Generator | None = None) -> Tensor:
        return _random_matrices(view.groups, view.k.weight.shape[2], generator)

    def act(self, view: AttentionView, element: Tensor) -> AttentionView:
        width = view.k.weight.shape[2]
        self._check(view, element, (view.groups, width, width))
        inverse = torch.linalg.inv(element).mT
        q, k = _times(view.q, _per_head(element, view)), _times(view.k, inverse)
        return replace(view, q=q, k=k, channels=None)

    def fix(self, view: AttentionView, rows: str = "max_volume") -> AttentionView:
        """W_K[P] = I; the chosen block M = W_K[P] goes into W_Q and b_Q as Mᵀ. Channels in use come to the front."""
        if self.dimension(view) == 0:
            return view
        if view.channels is None:
            fixed, basis = _fix(view.k, rows, self.name)
            return replace(view, q=_times(view.q, _per_head(basis, view).mT), k=fixed)
        kept = torch.tensor(view.channels)
        fixed, basis = _fix(_narrow(view.k, kept), "max_volume", self.name)  # they no longer fill a partition
        q = _times(_narrow(view.q, _per_head(kept, view)), _per_head(basis, view).mT)
        rank, width = kept.shape[1], view.k.weight.shape[2]
        front = (tuple(range(rank)),) * view.groups
        return replace(view, q=_widen(q, width), k=_widen(fixed, width), channels=front)

    def invariant(self, view: AttentionView, probe: Tensor) -> tuple[Tensor, Tensor]:
        queries, keys = _with_bias(view.q), _per_head(_with_bias(view.k), view)
        probe = torch.cat([probe, probe[:1]])  # one row more, for the bias
        rest = [_flat(view.v), _flat(view.o), view.q.weight.new_tensor([view.scale])]
        return _compare(queries @ (keys.mT @ probe), _norm(queries) * _norm(keys) * probe.norm(), rest)


class KeyBias(Symmetry):
    """R^K a key/value head, without rotary positions; elements [G, K]."""

    name = "key_bias"

    def dimension(self, view: AttentionView) -> int:
        if self.name in view.barred or view.rotary or view.k.bias is None:
            return 0
        return view.k.bias.numel()

    def random(self, view: AttentionView, generator: Generator | None = None) -> Tensor:
        return torch.randn(view.groups, view.k.weight.shape[2], dtype=torch.float64, generator=generator)

    def act(self, view: AttentionView, element: Tensor) -> AttentionView:
        self._check(view, element, (view.groups, view.k.weight.shape[2]))
        return replace(view, k=replace(view.k, bias=view.k.bias + element))

    def fix(self, view: AttentionView, rows: str = "max_volume") -> AttentionView:
        """No key bias. (``rows`` has no bearing on it.)"""
        return view if self.dimension(view) == 0 else replace(view, k=replace(view.k, bias=None))

    def invariant(self, view: AttentionView, probe: Tensor) -> tuple[Tensor, Tensor]:
        rest = [_flat(view.q), view.k.weight.flatten(), _flat(view.v), _flat(view.o)]
        return _compare(probe.new_zeros(0), probe.new_zeros(0), rest)


class ValueBias(Symmetry):
    """R^V a key/value head, folded into the output's bias; elements [G, V]."""

    name = "value_bias"

    def dimension(self, view: AttentionView) -> int:
        return 0 if view.v.bias is None or view.o.bias is None else view.v.bias.numel()

    def random(self, view: AttentionView, generator: Generator | None = None) -> Tensor:
        return torch.randn(view.groups, view.v.weight.shape[2], dtype=torch.float64, generator=generator)

    def act(self, view: AttentionView, element: Tensor) -> AttentionView:
        self._check(view, element, (view.groups, view.v.weight.shape[2]))
        moved = view.o.bias - _through(element, view)
        return replace(
            view, v=replace(view.v, bias=view.v.bias + element), o=Projection(view.o.weight, moved)
        )

    def fix(self, view: AttentionView, rows: str = "max_volume") -> AttentionView:
        """No value bias; the output's bias carries it. (``rows`` has no bearing on it.)"""
        if self.dimension(view) == 0:
            return view
        folded = Projection(view.o.weight, view.o.bias + _through(view.v.bias, view))
        return replace(view, v=replace(view.v, bias=None), o=folded)

    def invariant(self, view: AttentionView, probe: Tensor) -> tuple[Tensor, Tensor]:
        out, bias = view.o.bias, view.v.bias
        folded = torch.zeros_like(probe[:, 0])
        size = torch.zeros(())
        for term in (out, None if bias is None else _through(bias, view)):
            folded = folded if term is None else folded + term
            size = size if term is None else size + term.norm()
        if bias is not None:
            size = size + bias.norm() * view.o.weight.norm()
        rest = [_flat(view.q), _flat(view.k), view.v.weight.flatten(), view.o.weight.flatten()]
        return _compare(folded, size, rest)


SYMMETRIES: dict[str, Symmetry] = {
    one.name: one for one in (ValueOutput(), QueryKey(), KeyBias(), ValueBias())
}


def _per_head(tensor: Tensor, view: AttentionView) -> Tensor:
    """[G, ...] -> [H, ...]: what each query head reads."""
    return tensor.repeat_interleave(view.repeats, dim=0)


def _times(part: Projection, element: Tensor) -> Projection:
    bias = None if part.bias is None else (part.bias[:, None] @ element)[:, 0]
    return Projection(part.weight @ element, bias)


def _narrow(part: Projection, channels: Tensor) -> Projection:
    """The projection to ``channels`` [heads, R] alone."""
    index = channels[:, None].expand(-1, part.weight.shape[1], -1)
    return Projection(
        part.weight.gather(2, index), None if part.bias is None else part.bias.gather(1, channels)
    )


def _widen(part: Projection, width: int) -> Projection:
    """Zero channels behind those of ``part``, ``width`` in all."""
    more = (0, width - part.weight.shape[2])
    bias = None if part.bias is None else torch.nn.functional.pad(part.bias, more)
    return Projection(torch.nn.functional.pad(part.weight, more), bias, part.rows)


def _through(bias: Tensor, view: AttentionView) -> Tensor:
    """Σ_h bias[g(h)] W_O^h: [G, V] -> [D]."""
    return torch.einsum("hv,hvd->d", _per_head(bias, view), view.o.weight)


def _fix(part: Projection, rows: str, name: str) -> tuple[Projection, Tensor]:
    chosen = choice.choose(part.weight, rows)
    basis = choice.take(part.weight, chosen)
    if part.bias is None:
        return Projection(choice.coordinates(part.weight, chosen), None, chosen), basis
    found = choice.coordinates(_with_bias(part), chosen)
    weight, bias = found[:, :-1], found[:, -1]
    if not torch.allclose((bias[:, None] @ basis)[:, 0], part.bias, rtol=1e-9, atol=0):
        raise ValueError(
            f"{name}: a head has not full rank and its bias lies outside its span; fix the bias group first"
        )
    return Projection(weight, bias, chosen), basis


def _random_matrices(groups: int, width: int, generator: Generator | None) -> Tensor:
    """Singular values in [½, 2] between two random rotations: far from 1, yet no digits are lost to conditioning."""

    def normal() -> Tensor:
        return torch.randn(groups, width, width, dtype=torch.float64, generator=generator)

    spectrum = 2 ** (2 * torch.rand(groups, width, 1, dtype=torch.float64, generator=generator) - 1)
    return torch.linalg.qr(normal()).Q @ (spectrum * torch.linalg.qr(normal()).Q)


def _with_bias(part: Projection) -> Tensor:
    """The bias as one more row: [heads, D + 1, width]; zeros where there is none."""
    bias = (
        part.weight.new_zeros(part.weight.shape[0], part.weight.shape[2]) if part.bias is None else part.bias
    )
    return torch.cat([part.weight, bias[:, None]], 1)


def _bias(part: Projection) -> Tensor:
    return part.weight.new_zeros(0) if part.bias is None else part.bias.flatten()


def _flat(part: Projection) -> Tensor:
    return torch.cat([part.weight.flatten(), _bias(part)])


def _norm(heads: Tensor) -> Tensor:
    return heads.flatten(1).norm(dim=1)[:, None, None]


def _compare(product: Tensor, size: Tensor, rest: list[Tensor]) -> tuple[Tensor, Tensor]:
    """One flat invariant: the product, and what the group does not touch at all (size 0: it must agree exactly)."""
    untouched = torch.cat(rest)
    return (
        torch.cat([product.flatten(), untouched]),
        torch.cat([size.expand(product.shape).flatten(), torch.zeros_like(untouched)]),
    )
