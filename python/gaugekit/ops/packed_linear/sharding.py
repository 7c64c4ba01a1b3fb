"""``packed_linear`` on DTensors: the rows of x are cut. A packed matrix is not: its rows have different lengths, so a
rank's share of a weight is cut first and packed then."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gaugekit.ops import sharding
from gaugekit.ops.sharding import Rule


def rules(given: Mapping[str, Any]) -> list[Rule]:
    return sharding.leading("x", given, [True])


def _backward(given: Mapping[str, Any]) -> list[Rule]:
    return sharding.leading("grad", given, [True])


def _grouped(given: Mapping[str, Any]) -> list[Rule]:
    """None: rows are sorted by expert, so a rank's share of them has other ends."""
    return []


def _rows(given: Mapping[str, Any]) -> list[Rule]:
    return [] if given["index"] is None else [Rule({"index": 0}, [0])]


sharding.define("packed_linear", rules)
sharding.define("packed_linear_planned", rules)
sharding.define("packed_linear_backward", _backward)
sharding.define("packed_rows", _rows)
sharding.define("packed_experts", _grouped)
sharding.define("packed_experts_backward", _grouped)
