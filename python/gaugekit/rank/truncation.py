"""Truncating the scores: fewer query and key channels a head, the others exactly zero and not stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gaugekit.calibration.moments import Moments, digest
from gaugekit.models import AttentionView, Projection, family
from gaugekit.rank.goal import Ranks
from gaugekit.rank.spectra import Spectrum, check, spectrum
from gaugekit.rewrite import Rewrite


class Truncate(Rewrite):
    """Keeps ``ranks`` of the K query/key channels of each key head: one number, or [L][G] of them.

    The parts that go are the smallest of W_Q W_Kᵀ or, better, of the scores the activations make: ``aware`` lets the
    engine ask for calibration text, ``moments`` is what ``gaugekit.statistics`` collected. Heads at full rank keep
    their numbers; elsewhere W_Q and W_K become U√Σ and V√Σ (``rank.spectra``), and the key bias, which nobody can see,
    goes. The scale of the scores stays that of the old K. Rotary channels go in whole pairs, chosen by energy: an odd
    number of them raises ValueError. A fixed gauge would be lost: truncate first. The result is approximate. Source:
    arXiv 2410.11500 (rank of W_Q W_Kᵀ).
    """

    name = "rank"
    claim = "approximate"

    def __init__(
        self,
        ranks: int | Ranks,
        aware: bool = False,
        moments: Sequence[dict[str, Moments]] | None = None,
    ):
        if not isinstance(aware, bool):
            raise ValueError(
                f"aware: expected True or False, got {type(aware).__name__}; what gaugekit.statistics collected is "
                "given as moments="
            )
        if aware and moments is not None:
            raise ValueError("aware, moments: expected one of them, got both")
        self.ranks, self.moments = ranks, moments
        self.aware = aware or moments is not None
        self.needs_statistics = ("q",) if aware else ()
        self._last: tuple[AttentionView, Spectrum] | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        return {"ranks": self.ranks, "aware": self.aware}

    @property
    def digests(self) -> dict[str, str]:
        """That of the moments this was given, where it was given them."""
        return {} if self.moments is None else {"moments": digest(self.moments)}

    def plan(self, config: dict) -> dict[str, int]:
        """{query, key, key_bias, total}: stored numbers that go."""
        adapter = family(config)
        gone = {"query": 0, "key": 0, "key_bias": 0}
        for layer in range(adapter.layers):
            view = replace(adapter.outline(layer), layer=layer)
            ranks = self._ranks(view)
            width = view.k.weight.shape[2]
            dropped = sum(width - rank for rank in ranks)
            gone["query"] += dropped * view.repeats * _rows(view.q)
            gone["key"] += dropped * view.k.weight.shape[1]
            if view.k.bias is not None:
                keeps = sum(ranks) if view.rotary or not dropped else 0
                gone["key_bias"] += view.k.bias.numel() - keeps
        return gone | {"total": sum(gone.values())}

    def of(self, config: dict) -> Ranks:
        """[L][G] the ranks a model of this config is left with; ValueError where they do not fit."""
        adapter = family(config)
        layers = range(adapter.layers)
        return [self._ranks(replace(adapter.outline(layer), layer=layer)) for layer in layers]

    def layer(self, view: AttentionView, statistics: dict[str, Moments] | None = None) -> AttentionView:
        ranks = self._ranks(view)
        if view.k.rows is not None:
            raise ValueError("rank: expected keys whose gauge is not fixed yet; truncate first, then fix it")
        return view if ranks == view.ranks else cut(view, self._spectrum(view, statistics), ranks)

    def note(self, view: AttentionView, statistics: dict[str, Moments] | None = None) -> dict[str, Any]:
        """{ranks [G], energy_kept [G], singular_values [G][K] descending: the square roots of the energies}."""
        parts, ranks = self._spectrum(view, statistics), self._ranks(view)
        sizes = parts.energies.sqrt().sort(1, descending=True).values
        rounded = [[float(f"{size:.6g}") for size in row] for row in sizes.tolist()]
        return {"ranks": ranks, "energy_kept": parts.shares(ranks), "singular_values": rounded}

    def _spectrum(self, view: AttentionView, statistics: dict[str, Moments] | None) -> Spectrum:
        """The spectrum of a view; that of the last view asked for is remembered, since ``note`` asks again."""
        if self._last is None or self._last[0] is not view:
            inputs = statistics if self.moments is None else self.moments[view.layer]
            self._last = view, spectrum(view, inputs["q"] if self.aware else None)
        return self._last[1]

    def _ranks(self, view: AttentionView) -> list[int]:
        """[G] the ranks of this layer; ValueError where they do not fit it."""
        check(view)
        width, ranks = view.k.weight.shape[2], self.ranks
        if isinstance(ranks, int):
            ranks = [ranks] * view.groups
        elif not 0 <= view.layer < len(ranks) or len(ranks[view.layer]) != view.groups:
            raise ValueError(f"rank: expected {view.groups} ranks for layer {view.layer}, got {ranks}")
        else:
            ranks = list(ranks[view.layer])
        for rank in ranks:
            if not isinstance(rank, int) or not 1 <= rank <= width:
                raise ValueError(f"rank: expected 1 to {width}, the width of a head, got {rank!r}")
            if view.rotary == width and rank % 2:
                raise ValueError(
                    f"rank: expected an even number, since rotary channels go in whole pairs; got {rank}"
                )
        return ranks


def cut(view: AttentionView, parts: Spectrum, ranks: Sequence[int]) -> AttentionView:
    """The view with ``ranks`` [G] channels a key head, the others zero; heads at full rank keep their numbers."""
    width, rotary = view.k.weight.shape[2], view.rotary
    kept = parts.kept(list(ranks))
    full = torch.tensor([rank == width for rank in ranks])
    mask = torch.zeros(view.groups, width, dtype=torch.float64)
    for group, channels in enumerate(kept):
        mask[group, channels] = 1.0
    q = _turned(view.q, parts.turn_q, mask, full, rotary, view.repeats)
    k = _turned(view.k, parts.turn_k, mask, full, rotary, 1)
    if k.bias is not None:
        bias = torch.cat([k.bias[:, :rotary], torch.zeros_like(k.bias[:, rotary:])], 1)
        k = Projection(k.weight, bias if rotary else None)
    return replace(view, q=q, k=k, channels=tuple(tuple(channels) for channels in kept))


def _turned(
    part: Projection, turn: Tensor, mask: Tensor, full: Tensor, rotary: int, repeats: int
) -> Projection:
    """The channels of ``part`` as components, those that ``mask`` [G, K] leaves out zero."""
    turn, mask, full = (x.repeat_interleave(repeats, dim=0) for x in (turn, mask, full))

    def apply(x: Tensor) -> Tensor:  # [heads, rows, K]
        moved = torch.cat([x[..., :rotary], x[..., rotary:] @ turn], -1) * mask[:, None]
        return torch.where(full[:, None, None], x, moved)

    bias = None if part.bias is None else apply(part.bias[:, None])[:, 0]
    return Projection(apply(part.weight), bias)


def _rows(part: Projection) -> int:
    return part.weight.shape[1] + (part.bias is not None)
