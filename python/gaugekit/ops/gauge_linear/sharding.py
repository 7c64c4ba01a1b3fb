"""``gauge_linear`` on DTensors: cut by rows of x, or by heads, each of which passes its own inputs through.

With a plain ``weight`` in front the outputs of a rank are not side by side in the whole, so heads stay together then.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gaugekit.ops import sharding
from gaugekit.ops.sharding import SUM, Rule


def rules(given: Mapping[str, Any]) -> list[Rule]:
    heads = {name: 0 for name in ("free", "rows", "bias") if given.get(name) is not None}
    by_heads = Rule(heads, [given["x"].ndim - 1], even="free")
    return sharding.leading("x", given, [True]) + ([by_heads] if given.get("weight") is None else [])


def _backward(given: Mapping[str, Any]) -> list[Rule]:
    wanted, last = (given["of_x"], given["of_free"]), given["grad"].ndim - 1
    by_rows = [Rule({"grad": dim, "x": dim}, _asked([dim, SUM], wanted)) for dim in range(last)]
    return [*by_rows, Rule({"grad": last, "free": 0, "rows": 0}, _asked([SUM, 0], wanted), even="free")]


def _asked(outputs: list[int | str], wanted: tuple[bool, bool]) -> list[int | str | None]:
    """Of a gradient nobody asked for there is an empty tensor, the same on all ranks."""
    return [out if asked else None for out, asked in zip(outputs, wanted, strict=True)]


sharding.define("gauge_linear", rules)
sharding.define("gauge_linear_forward", rules)
sharding.define("gauge_linear_backward", _backward)
