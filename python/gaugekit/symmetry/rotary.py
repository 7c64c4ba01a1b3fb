"""What rotary positions leave of the freedom between queries and keys.

A rotary pair of channels is one complex number, z = x_i + i x_j, which position t turns by e^{iωt}. The score of a pair
is Re(conj(z_q) e^{iω(s−t)} z_k), so that a head's scores do not move under

- rotary_pairs, GL(1, C) a pair and key/value head: z_q → z_q c and z_k → z_k / conj(c)
- plain_query_key, GL(K − rotary) a key/value head, on the channels that do not turn: as ``query_key``
- plain_key_bias, R^(K − rotary) a key/value head: as ``key_bias``

Whatever else commutes with every turn is one of these: numbers of turns differ from pair to pair. Fixed, they store
nothing less: a pair's chosen row becomes (1, 0), which no compact form leaves out.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Generator, Tensor

from gaugekit.models import AttentionView, Projection
from gaugekit.symmetry.action import (
    Symmetry,
    compare,
    fix_rows,
    flat,
    merged,
    narrow,
    per_head,
    random_matrices,
    shared,
    size_of,
    times,
    with_bias,
)


class RotaryPairs(Symmetry):
    """One complex scale a rotary pair and key/value head; elements complex128 [G, rotary/2]."""

    name, rests_on = "rotary_pairs", "query_key"
    absent = "no rotary positions"

    def dimension(self, view: AttentionView) -> int:
        if self.barred(view):
            return 0
        if view.channels is None:
            return view.groups * view.rotary
        return sum(channel < view.rotary for kept in view.channels for channel in kept)

    def random(self, view: AttentionView, generator: Generator | None = None) -> Tensor:
        size, angle = torch.rand(2, view.groups, view.rotary // 2, dtype=torch.float64, generator=generator)
        return torch.polar(2 ** (2 * size - 1), 2 * torch.pi * angle)

    def act(self, view: AttentionView, element: Tensor) -> AttentionView:
        self._check(view, element, (view.groups, view.rotary // 2))
        k = _scaled(view.k, view.pairs, 1 / element.conj())
        return replace(view, q=_scaled(view.q, view.pairs, per_head(element, view)), k=k)

    def fix(self, view: AttentionView, rows: str = "balanced") -> AttentionView:
        """In each pair of keys the longest row of W_K becomes (1, 0), so that none is longer than 1; a pair of zeros
        stays. (``rows`` has no bearing on it.)
        """
        if self.dimension(view) == 0:
            return view
        numbers = _complex(view.k.weight, view.pairs)
        chosen = numbers.abs().argmax(1, keepdim=True)
        longest = numbers.gather(1, chosen)[:, 0]
        fixed = self.act(view, torch.where(longest == 0, 1, longest.conj()))
        weight = fixed.k.weight.clone()
        for channels, value in zip(view.pairs, (1.0, 0.0), strict=True):  # exactly, not to rounding
            here = weight[..., channels]
            weight[..., channels] = here.scatter(
                1, chosen, torch.where(longest == 0, 0, value)[:, None].to(here)
            )
        return replace(fixed, k=replace(fixed.k, weight=weight))

    def invariant(self, view: AttentionView, probe: Tensor) -> tuple[Tensor, Tensor]:
        plain = torch.arange(view.rotary, view.k.weight.shape[2])
        rest = [flat(narrow(part, plain)) for part in (view.q, view.k)]
        product, size = pair_products(view, probe)
        return compare(product, size, [*rest, flat(view.v), flat(view.o)])


class PlainQueryKey(Symmetry):
    """GL(K − rotary) between channels of queries and keys that do not turn; elements [G, K − rotary, K − rotary]."""

    name, rests_on = "plain_query_key", "query_key"
    absent = "every channel turns, or none does"

    def dimension(self, view: AttentionView) -> int:
        if self.barred(view) or not 0 < view.rotary < view.k.weight.shape[2]:
            return 0
        used = view.channels or [range(view.k.weight.shape[2])] * view.groups
        return sum(sum(channel >= view.rotary for channel in kept) ** 2 for kept in used)

    def random(self, view: AttentionView, generator: Generator | None = None) -> Tensor:
        return random_matrices(view.groups, len(_plain(view)), generator)

    def act(self, view: AttentionView, element: Tensor) -> AttentionView:
        plain = _plain(view)
        self._check(view, element, (view.groups, len(plain), len(plain)))
        q = times(narrow(view.q, plain), per_head(element, view))
        k = times(narrow(view.k, plain), torch.linalg.inv(element).mT)
        return replace(view, q=merged(view.q, plain, q), k=merged(view.k, plain, k), channels=None)

    def fix(self, view: AttentionView, rows: str = "balanced") -> AttentionView:
        """W_K[P] = I on those channels, P of maximal volume; nothing where some of them are idle.

        The identity rows stay stored: the compact forms are for whole heads. (``rows`` has no bearing on it.)
        """
        if self.dimension(view) == 0 or view.channels is not None:
            return view
        plain = _plain(view)
        queries = shared(with_bias(narrow(view.q, plain)).mT, view)
        fixed, basis = fix_rows(narrow(view.k, plain), queries, "max_volume", self.name)
        q = times(narrow(view.q, plain), per_head(basis, view).mT)
        return replace(view, q=merged(view.q, plain, q), k=merged(view.k, plain, fixed))

    def invariant(self, view: AttentionView, probe: Tensor) -> tuple[Tensor, Tensor]:
        turned = torch.arange(view.rotary)
        rest = [flat(narrow(part, turned)) for part in (view.q, view.k)]
        product, size = plain_products(view, probe)
        return compare(product, size, [*rest, flat(view.v), flat(view.o)])


class PlainKeyBias(Symmetry):
    """R^(K − rotary) a key/value head: the bias of keys' channels that do not turn; elements [G, K − rotary]."""

    name, rests_on = "plain_key_bias", "key_bias"
    absent = "every channel turns, or none does, or keys have no bias"

    def dimension(self, view: AttentionView) -> int:
        if self.barred(view) or view.k.bias is None or not 0 < view.rotary < view.k.weight.shape[2]:
            return 0
        return view.groups * len(_plain(view))

    def random(self, view: AttentionView, generator: Generator | None = None) -> Tensor:
        return torch.randn(view.groups, len(_plain(view)), dtype=torch.float64, generator=generator)

    def act(self, view: AttentionView, element: Tensor) -> AttentionView:
        self._check(view, element, (view.groups, len(_plain(view))))
        moved = torch.nn.functional.pad(element, (view.rotary, 0))
        return replace(view, k=replace(view.k, bias=view.k.bias + moved))

    def fix(self, view: AttentionView, rows: str = "balanced") -> AttentionView:
        """Zeros in its place. (``rows`` has no bearing on it.)"""
        if self.dimension(view) == 0:
            return view
        bias = view.k.bias.index_fill(1, _plain(view), 0.0)
        return replace(view, k=replace(view.k, bias=bias))

    def invariant(self, view: AttentionView, probe: Tensor) -> tuple[Tensor, Tensor]:
        biases = view.k.bias if view.k.bias is None else view.k.bias[:, : view.rotary]
        rest = [flat(view.q), flat(Projection(view.k.weight, biases)), flat(view.v), flat(view.o)]
        return compare(probe.new_zeros(0), probe.new_zeros(0), rest)


def pair_products(view: AttentionView, probe: Tensor) -> tuple[Tensor, Tensor]:
    """conj(z_q) z_kᵀ of each head and pair, applied to ``probe``: what the scores are made of; and the terms' size.

    Gains of norms count as part of queries and keys.
    """
    queries, keys = (_complex(weight, view.pairs) for weight in _weights(view))
    probe = torch.cat([probe[: view.k.weight.shape[1]], probe[:1]])  # one row more, for the bias
    read = torch.einsum("hdp,dn->hpn", keys, probe.to(keys.dtype))
    product = torch.einsum("hdp,hpn->hdpn", queries.conj(), read)
    size = queries.norm(dim=1) * keys.norm(dim=1) * probe.norm()
    return torch.view_as_real(product), size[:, None, :, None, None]


def plain_products(view: AttentionView, probe: Tensor) -> tuple[Tensor, Tensor]:
    """W_Q W_Kᵀ of each head over the channels that do not turn, applied to ``probe``; and the terms' size."""
    queries, keys = (weight[..., view.rotary :] for weight in _weights(view))
    probe = torch.cat([probe[: view.k.weight.shape[1]], probe[:1]])
    return queries @ (keys.mT @ probe), size_of(queries) * size_of(keys) * probe.norm()


def _weights(view: AttentionView) -> tuple[Tensor, Tensor]:
    """What queries and keys of each query head are made of, biases in the last row: [H, D + 1, K] each."""
    q, k = with_bias(view.q), with_bias(view.k)
    if view.norms is not None:
        q, k = q * view.norms.gain("q")[:, None], k * view.norms.gain("k")[:, None]
    return q, per_head(k, view)


def _plain(view: AttentionView) -> Tensor:
    """The channels that do not turn."""
    return torch.arange(view.rotary, view.k.weight.shape[2])


def _complex(x: Tensor, pairs: Tensor) -> Tensor:
    """[..., K] -> complex [..., rotary/2]."""
    return torch.complex(x[..., pairs[0]], x[..., pairs[1]])


def _scaled(part: Projection, pairs: Tensor, by: Tensor) -> Projection:
    """The projection, the pairs of each head times ``by`` [heads, rotary/2]."""

    def scaled(x: Tensor, by: Tensor) -> Tensor:
        numbers, x = _complex(x, pairs) * by, x.clone()
        x[..., pairs[0]], x[..., pairs[1]] = numbers.real, numbers.imag
        return x

    bias = None if part.bias is None else scaled(part.bias, by)
    return replace(part, weight=scaled(part.weight, by[:, None]), bias=bias)
