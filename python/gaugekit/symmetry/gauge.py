"""Fixing the gauge: every number that no output depends on becomes exactly 0 or 1, and need not be stored."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from gaugekit.models import AttentionView, Live, family, left_alone
from gaugekit.report import Report
from gaugekit.rewrite import Rewrite, invariance_error
from gaugekit.symmetry.groups import REMOVED, SYMMETRIES
from gaugekit.symmetry.rows import CHOICES

ORDER = ("key_bias", "value_bias", "value_output", "query_key")  # biases first: then the other two carry none


class GaugeFix(Rewrite):
    """The first rewrite: fixes the four groups of every layer whose fixed form stores less, exactly.

    Keys lose their bias and W_K[P] = I, values theirs and W_V[P] = I; queries, output and output bias take it up.
    Counts are exact: (V² + K² + K + V) numbers a key/value head (without rotary positions, with biases).
    ``rows`` chooses P: "balanced" (per head, the least that rounding does to what leaves it), "max_volume" (per head,
    entries ≤ 1.02) or "shared_partition" (one partition of the inputs a layer; needs heads·width = D). After a
    truncation of the keys to rank R (``rank.Truncate``) the freedom is R², not K², a head; ``key_ranks`` [L][G] tells
    the plan so. Source: arXiv 2412.14543; rows: see ``symmetry.rows``.
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
                removed[name] += SYMMETRIES[name].dimension(view)
        return {**removed, "total": sum(removed.values())}

    def layer(self, view: AttentionView, statistics: object = None) -> AttentionView:
        for name in ORDER:
            view = SYMMETRIES[name].fix(view, rows=self.rows)
        return view


@torch.no_grad()
def fix(model: nn.Module, *, rows: str = "balanced") -> Report:
    """Fixes the gauge of a live model in place: the same classes, dense weights, the same function.

    The float64 result is rounded once to each parameter's dtype; the removed entries are exactly 0 or 1 afterwards.
    ``rows`` is "balanced", "max_volume" or "shared_partition" (see ``GaugeFix``). Do it before training or saving, not
    under an optimizer that already holds moments of these parameters: those belong to the old weights.

    Returns a Report: ``parameters``; ``removed`` {group: count, total}; ``layers`` [{layer, value_rows, key_rows:
    [head][width] input indices, invariance_error (float64, before rounding)}]. Raises ValueError for a model that is
    none of transformers' or of an unknown family; layers fixed before an error stay fixed, the function unchanged.
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
