"""What norms of queries and keys leave of the freedom between them.

Queries are A n(x W_Q + b_Q) with gains A, keys B n(x W_K + b_K) with gains B, and n(u) = u/√(mean u² + ε) divides out
no more than a length. No scale of W_Q or W_K passes n, so the scores do not move under

- query_key_gains: A → A E and B → B / E with a diagonal E that commutes with every turn: one number a rotary pair, one
  a channel that does not turn. Where all heads share one gain there is one E for the layer, else one a key/value head.
- query_key_turns: W_Q → W_Q O, W_K → W_K O with a rotation O that passes n and both gains: by an angle in each rotary
  pair whose gains agree, in A and in B (up to signs, by which O differs for a query head); among the channels that do
  not turn wherever the products of their gains agree. Gains as they are drawn agree, trained ones do not: on trained
  weights it has dimension 0. Norms that subtract the mean (LayerNorm) leave none.
- query_key_means, where the norm subtracts the mean: W_Q → W_Q + c 1ᵀ, a number for each input and head.

Signs of channels and permutations of pairs pass too; they are finite, and no number less is stored for them. A scale of
W_Q would pass n but for ε, so it is no symmetry.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Generator, Tensor

from gaugekit.models import AttentionView, Projection
from gaugekit.symmetry.action import Symmetry, compare, flat, per_head, times, with_bias
from gaugekit.symmetry.rotary import pair_products, plain_products

AGREE = 4 * torch.finfo(torch.float64).eps  # what two gains that are meant to be the same may differ by


class QueryKeyGains(Symmetry):
    """What gains of queries may pass on to gains of keys; elements [1 or G, rotary/2 + K − rotary], none of them 0."""

    name, moves_norms = "query_key_gains", True
    absent = "no norms of queries and keys, or of a kind without a view"

    def dimension(self, view: AttentionView) -> int:
        return 0 if view.norms is None else _sets(view) * _units(view)

    def random(self, view: AttentionView, generator: Generator | None = None) -> Tensor:
        size = torch.rand(_sets(view), _units(view), dtype=torch.float64, generator=generator)
        return 2 ** (2 * size - 1)

    def act(self, view: AttentionView, element: Tensor) -> AttentionView:
        sets = 0 if view.norms is None else _sets(view)
        self._check(view, element, (sets, _units(view)))
        by, norms = _by_channel(view, element), view.norms
        of_q = by if len(norms.q) == 1 else per_head(by.expand(view.groups, -1), view)
        q, k = norms.gain("q") * of_q - norms.offset, norms.gain("k") / by - norms.offset
        return replace(view, norms=replace(norms, q=q, k=k))

    def fix(self, view: AttentionView, rows: str = "balanced") -> AttentionView:
        """The first gain of a pair of keys, or a channel's, becomes 1; a 0 stays. (``rows`` has no bearing on it.)"""
        if view.norms is None:
            return view
        gains = view.norms.gain("k")
        first = torch.cat([gains[:, view.pairs[0]], gains[:, view.rotary :]], 1)
        return self.act(view, torch.where(first == 0, 1.0, first)[: _sets(view)])

    def invariant(self, view: AttentionView, probe: Tensor) -> tuple[Tensor, Tensor]:
        rest = [flat(part) for part in (view.q, view.k, view.v, view.o)]
        if view.norms is None:
            return compare(probe.new_zeros(0), probe.new_zeros(0), rest)
        q, k = (
            view.norms.gain(part).expand(heads, -1) for part, heads in (("q", view.heads), ("k", view.groups))
        )
        left, right = q[:, view.pairs], per_head(k, view)[:, view.pairs]
        within = torch.einsum("hip,hjp->hijp", left, right).flatten(1)
        product = torch.cat([within, (q * per_head(k, view))[:, view.rotary :]], 1)
        return compare(product, product.abs(), rest)


class QueryKeyTurns(Symmetry):
    """Rotations of channels whose gains agree; elements [G, K, K], a rotation of keys for each key/value head."""

    name = "query_key_turns"
    absent = "no norms of queries and keys, or no two gains that agree"

    def dimension(self, view: AttentionView) -> int:
        return int(_alike(view).triu(1).sum())

    def random(self, view: AttentionView, generator: Generator | None = None) -> Tensor:
        shape = (view.groups, view.k.weight.shape[2], view.k.weight.shape[2])
        angles = torch.randn(shape, dtype=torch.float64, generator=generator) * _alike(view)
        return torch.linalg.matrix_exp(angles - angles.mT)

    def act(self, view: AttentionView, element: Tensor) -> AttentionView:
        width = view.k.weight.shape[2]
        self._check(view, element, (view.groups, width, width))
        if bool((element * ~(_alike(view) | torch.eye(width, dtype=torch.bool))).any()):
            raise ValueError(f"element of {self.name}: expected zeros between channels whose gains differ")
        signs = (view.norms.gain("q") * per_head(_all_heads(view, "k"), view)).sign()
        of_q = signs[:, :, None] * per_head(element, view) * signs[:, None]
        return replace(view, q=times(view.q, of_q), k=times(view.k, element))

    def fix(self, view: AttentionView, rows: str = "balanced") -> AttentionView:
        """In each set of m channels that agree, the first m rows of W_K become lower triangular, with a diagonal that
        is not negative (its last entry aside in a rotary pair, which no reflection passes). (``rows`` has no bearing.)
        """
        if self.dimension(view) == 0:
            return view
        element = torch.eye(view.k.weight.shape[2], dtype=torch.float64).repeat(view.groups, 1, 1)
        for group, alike in enumerate(_alike(view)):
            for first in range(len(alike)):
                channels = torch.cat([torch.tensor([first]), alike[first].nonzero().flatten()])
                if len(channels) == 1 or bool((channels[1:] < first).any()):
                    continue
                block = view.k.weight[group, : len(channels)][:, channels]
                turn, upper = torch.linalg.qr(block.mT)
                turn = turn * torch.where(upper.diagonal() < 0, -1.0, 1.0).to(turn)
                if first < view.rotary and torch.linalg.det(turn) < 0:
                    turn[:, -1] *= -1
                element[group, channels[:, None], channels] = turn
        return self.act(view, element)

    def invariant(self, view: AttentionView, probe: Tensor) -> tuple[Tensor, Tensor]:
        rest = [flat(view.v), flat(view.o)]
        terms = [pair_products(view, probe), plain_products(view, probe)]
        for part in (view.q, view.k):
            weight = with_bias(part)
            read = torch.cat([probe[: part.weight.shape[1]], probe[:1]])
            size = weight.flatten(1).norm(dim=1).square()[:, None, None] * read.norm()
            terms.append((weight @ (weight.mT @ read), size))
        product = torch.cat([value.flatten() for value, _ in terms])
        size = torch.cat([size.expand(value.shape).flatten() for value, size in terms])
        return compare(product, size, rest)


class QueryKeyMeans(Symmetry):
    """The mean over the channels of a head, which a LayerNorm of queries and keys subtracts.

    Elements are one row of numbers: for each query head, then each key head (once, where the norm runs over all heads),
    one a row of W and one for the bias where there is one.
    """

    name = "query_key_means"
    absent = "no norms of queries and keys that subtract the mean"

    def dimension(self, view: AttentionView) -> int:
        return sum(self._sizes(view))

    def random(self, view: AttentionView, generator: Generator | None = None) -> Tensor:
        return torch.randn(self.dimension(view), dtype=torch.float64, generator=generator)

    def act(self, view: AttentionView, element: Tensor) -> AttentionView:
        self._check(view, element, (self.dimension(view),))
        moved = []
        for part, piece in zip((view.q, view.k), element.split(self._sizes(view)), strict=True):
            heads, inputs, _ = part.weight.shape
            piece = piece.view(1 if view.norms.whole else heads, -1, 1)
            bias = None if part.bias is None else part.bias + piece[:, inputs]
            moved.append(replace(part, weight=part.weight + piece[:, :inputs], bias=bias))
        return replace(view, q=moved[0], k=moved[1])

    def fix(self, view: AttentionView, rows: str = "balanced") -> AttentionView:
        """Means of zero. (``rows`` has no bearing on it.)"""
        if self.dimension(view) == 0:
            return view
        return replace(view, q=_centred(view.q, view), k=_centred(view.k, view))

    def invariant(self, view: AttentionView, probe: Tensor) -> tuple[Tensor, Tensor]:
        rest = [flat(view.v), flat(view.o)]
        parts = (view.q, view.k)
        centred = parts if view.norms is None else [_centred(part, view) for part in parts]
        product = torch.cat([flat(part) for part in centred])
        return compare(product, torch.cat([flat(part).norm()[None] for part in parts]).max(), rest)

    def _sizes(self, view: AttentionView) -> list[int]:
        """How many numbers of an element are for queries, and for keys."""
        if view.norms is None or not view.norms.centred:
            return [0, 0]
        return [
            (1 if view.norms.whole else part.weight.shape[0])
            * (part.weight.shape[1] + (part.bias is not None))
            for part in (view.q, view.k)
        ]


def _centred(part: Projection, view: AttentionView) -> Projection:
    """The projection without the means that the norm subtracts."""
    over = (0, 2) if view.norms.whole else (2,)
    weight = part.weight - part.weight.mean(over, keepdim=True)
    bias = (
        None
        if part.bias is None
        else part.bias - part.bias.mean((0, 1) if view.norms.whole else 1, keepdim=True)
    )
    return replace(part, weight=weight, bias=bias)


def _all_heads(view: AttentionView, part: str) -> Tensor:
    """The gains of queries or keys for every head of theirs: [heads, K]."""
    return view.norms.gain(part).expand(view.heads if part == "q" else view.groups, -1)


def _sets(view: AttentionView) -> int:
    """How many gains of keys there are that may change apart from each other."""
    return min(len(view.norms.q), len(view.norms.k))


def _units(view: AttentionView) -> int:
    """The rotary pairs, and the channels that do not turn."""
    return view.k.weight.shape[2] - view.rotary // 2


def _by_channel(view: AttentionView, element: Tensor) -> Tensor:
    """[.., rotary/2 + K − rotary] -> [.., K]: each pair's number for both its channels."""
    pairs, plain = element.split([view.rotary // 2, view.k.weight.shape[2] - view.rotary], 1)
    by = torch.cat([pairs, pairs, plain], 1)
    by[:, view.pairs[0]] = by[:, view.pairs[1]] = pairs
    return by


def _alike(view: AttentionView) -> Tensor:
    """[G, K, K] whether a rotation among two channels of a key head passes its norm and the gains on both sides."""
    width = view.k.weight.shape[2]
    none = torch.zeros(view.groups, width, width, dtype=torch.bool)
    if view.norms is None or view.norms.centred or view.k.weight.is_meta:
        return none
    a = _all_heads(view, "q").abs().unflatten(0, (view.groups, -1))
    b = _all_heads(view, "k").abs()[:, None]
    both, product = _agree(a).all(1) & _agree(b).all(1), _agree(a * b).all(1)
    turns = none.clone()
    turns[:, view.pairs[0], view.pairs[1]] = both[:, view.pairs[0], view.pairs[1]]
    plain = torch.arange(width) >= view.rotary
    return turns | turns.mT | (product & plain & plain[:, None] & ~torch.eye(width, dtype=torch.bool))


def _agree(gains: Tensor) -> Tensor:
    """[..., K] -> [..., K, K] whether two of them are the same to rounding."""
    left, right = gains[..., :, None], gains[..., None, :]
    return (left - right).abs() <= AGREE * torch.maximum(left, right)
