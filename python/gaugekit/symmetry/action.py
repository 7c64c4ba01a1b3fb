"""A group acting on the view of an attention layer: what each has to say, and the algebra that they share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace

import torch
from torch import Generator, Tensor

from gaugekit.models import AttentionView, Projection
from gaugekit.symmetry import rows as choice


class Symmetry(ABC):
    """A group acting on a view, all in float64. ``name`` is the group's word in every report, ``absent`` why a view may
    have no such freedom although its family does not bar it, ``rests_on`` the group without which it does not hold,
    ``moves_norms`` whether it acts on the gains of norms of queries and keys.
    """

    name: str
    absent = "the parts it acts on are not there"
    rests_on: str | None = None
    moves_norms = False

    def barred(self, view: AttentionView) -> str | None:
        """Why the group is left alone in the view's family; None where it is not."""
        return view.barred.get(self.name) or (self.rests_on and view.barred.get(self.rests_on))

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
    def fix(self, view: AttentionView, rows: str = "balanced") -> AttentionView:
        """The point of the orbit with ``removed`` entries exactly 0 or 1."""

    def removed(self, view: AttentionView, rows: str = "balanced") -> int:
        """How many numbers ``fix`` with these ``rows`` leaves exactly 0 or 1: ``dimension``, or fewer."""
        return self.dimension(view)

    @abstractmethod
    def invariant(self, view: AttentionView, probe: Tensor) -> tuple[Tensor, Tensor]:
        """What the group leaves alone, applied to ``probe`` [D, n], and the size of the terms it was summed from."""

    def contains(self, view: AttentionView, other: AttentionView) -> bool:
        """Membership: whether some element carries ``view`` to ``other``, to the rounding of float64.

        The invariants are compared on eight seeded random probes (a difference escapes them with probability 0).
        """
        if not (self.moves_norms or _same_norms(view, other)):
            return False
        if self.dimension(view) == 0:  # nothing but the identity
            return all(torch.equal(flat(getattr(view, part)), flat(getattr(other, part))) for part in "qkvo")
        inputs = max(view.q.weight.shape[1], view.k.weight.shape[1], view.o.weight.shape[2])
        generator = torch.Generator().manual_seed(0)
        probe = torch.randn(inputs, 8, dtype=torch.float64, generator=generator)
        (mine, size), (theirs, other_size) = self.invariant(view, probe), self.invariant(other, probe)
        bound = torch.finfo(torch.float64).eps * inputs * (size + other_size)
        return mine.shape == theirs.shape and bool(((mine - theirs).abs() <= bound).all())

    def _check(self, view: AttentionView, element: Tensor, shape: tuple[int, ...]) -> None:
        if self.dimension(view) == 0:
            reason = self.barred(view) or self.absent
            raise ValueError(f"{self.name}: this view has no such freedom ({reason})")
        if tuple(element.shape) != shape:
            raise ValueError(f"element of {self.name}: expected shape {shape}, got {tuple(element.shape)}")


def _same_norms(view: AttentionView, other: AttentionView) -> bool:
    if view.norms is None or other.norms is None:
        return view.norms is other.norms
    return torch.equal(view.norms.q, other.norms.q) and torch.equal(view.norms.k, other.norms.k)


def per_head(tensor: Tensor, view: AttentionView) -> Tensor:
    """[G, ...] -> [H, ...]: what each query head reads."""
    return tensor.repeat_interleave(view.repeats, dim=0)


def times(part: Projection, element: Tensor) -> Projection:
    bias = None if part.bias is None else (part.bias[:, None] @ element)[:, 0]
    return Projection(part.weight @ element, bias)


def narrow(part: Projection, channels: Tensor) -> Projection:
    """The projection to ``channels`` [heads, R], or [R] of every head, alone."""
    channels = channels.expand(part.weight.shape[0], -1)
    index = channels[:, None].expand(-1, part.weight.shape[1], -1)
    return Projection(
        part.weight.gather(2, index), None if part.bias is None else part.bias.gather(1, channels)
    )


def merged(part: Projection, channels: Tensor, new: Projection) -> Projection:
    """``part`` with its ``channels`` [R] taken from ``new``, which has these alone."""
    weight = part.weight.index_copy(2, channels, new.weight)
    if part.bias is None:
        return Projection(weight)
    bias = torch.zeros_like(part.bias[:, channels]) if new.bias is None else new.bias
    return Projection(weight, part.bias.index_copy(1, channels, bias))


def widen(part: Projection, width: int) -> Projection:
    """Zero channels behind those of ``part``, ``width`` in all."""
    more = (0, width - part.weight.shape[2])
    bias = None if part.bias is None else torch.nn.functional.pad(part.bias, more)
    return replace(part, weight=torch.nn.functional.pad(part.weight, more), bias=bias)


def shared(tensor: Tensor, view: AttentionView) -> Tensor:
    """[H, width, n] -> [G, width, repeats·n]: side by side, what the query heads have that read one key/value head."""
    return tensor.unflatten(0, (view.groups, -1)).movedim(1, 2).flatten(2)


def through(bias: Tensor, view: AttentionView) -> Tensor:
    """Σ_h bias[g(h)] W_O^h: [G, V] -> [D]."""
    return torch.einsum("hv,hvd->d", per_head(bias, view), view.o.weight)


def fix_rows(part: Projection, partner: Tensor, rows: str, name: str) -> tuple[Projection, Tensor]:
    """(the projection C with the identity in ``rows``, the block M that stood there), or with rows "triangular" (the
    turned projection C with a triangle in them, the M that turns it back): the projection was C M.

    ``partner`` [G, V, n] is what is multiplied by M: its n columns stand for all heads that share the part.
    """
    gram = partner @ partner.mT  # ‖(W B)[i]‖² = W[i] (B Bᵀ) W[i]ᵀ, without making W B
    chosen = choice.choose(part.weight, rows, (part.weight @ gram * part.weight).sum(2))
    if rows == "triangular":
        weight, turn = choice.turned(part.weight, chosen)
        bias = None if part.bias is None else (part.bias[:, None] @ turn)[:, 0]
        return Projection(weight, bias, chosen, triangular=True), turn.mT
    basis = choice.take(part.weight, chosen)
    if part.bias is None:
        return Projection(choice.coordinates(part.weight, chosen), None, chosen), basis
    found = choice.coordinates(with_bias(part), chosen)
    weight, bias = found[:, :-1], found[:, -1]
    if not torch.allclose((bias[:, None] @ basis)[:, 0], part.bias, rtol=1e-9, atol=0):
        raise ValueError(
            f"{name}: a head has not full rank and its bias lies outside its span; fix the bias group first"
        )
    return Projection(weight, bias, chosen), basis


def random_matrices(groups: int, width: int, generator: Generator | None) -> Tensor:
    """Singular values in [½, 2] between two random rotations: far from 1, yet no digits are lost to conditioning."""

    def normal() -> Tensor:
        return torch.randn(groups, width, width, dtype=torch.float64, generator=generator)

    spectrum = 2 ** (2 * torch.rand(groups, width, 1, dtype=torch.float64, generator=generator) - 1)
    return torch.linalg.qr(normal()).Q @ (spectrum * torch.linalg.qr(normal()).Q)


def with_bias(part: Projection) -> Tensor:
    """The bias as one more row: [heads, D + 1, width]; zeros where there is none."""
    bias = (
        part.weight.new_zeros(part.weight.shape[0], part.weight.shape[2]) if part.bias is None else part.bias
    )
    return torch.cat([part.weight, bias[:, None]], 1)


def bias_of(part: Projection) -> Tensor:
    return part.weight.new_zeros(0) if part.bias is None else part.bias.flatten()


def flat(part: Projection) -> Tensor:
    return torch.cat([part.weight.flatten(), bias_of(part)])


def size_of(heads: Tensor) -> Tensor:
    return heads.flatten(1).norm(dim=1)[:, None, None]


def compare(product: Tensor, size: Tensor, rest: list[Tensor]) -> tuple[Tensor, Tensor]:
    """One flat invariant: the product, and what the group does not touch at all (size 0: it must agree exactly)."""
    untouched = torch.cat(rest)
    return (
        torch.cat([product.flatten(), untouched]),
        torch.cat([size.expand(product.shape).flatten(), torch.zeros_like(untouched)]),
    )
