"""``ragged_attention`` on DTensors: cut by sequences. Heads of different ranks have no even cut of their columns, and
the list of ranks is the same on every rank of the mesh."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gaugekit.ops import sharding
from gaugekit.ops.sharding import Rule, Rules


def _by_sequences(outputs: list[str]) -> Rules:
    def rules(given: Mapping[str, Any]) -> list[Rule]:
        return [rule for rule in sharding.attention(outputs)(given) if rule.even is None]

    return rules


rules = _by_sequences(["q"])
sharding.define("ragged_attention", _by_sequences(["v", "v"]))
sharding.define("ragged_attention_backward", _by_sequences(["q", "k", "v"]))
