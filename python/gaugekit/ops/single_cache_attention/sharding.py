"""``single_cache_attention`` on DTensors: cut by sequences or by heads.

A cache in pages stays whole where sequences are cut: their tables name pages of all of it. With one group the cache is
what all heads share, so it stays whole where heads are cut; with ``slices`` heads are then columns of its rows, and a
rank's heads would not be the first of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gaugekit.ops import sharding
from gaugekit.ops.sharding import GAINS, POSITIONS, Rule


def rules(given: Mapping[str, Any]) -> list[Rule]:
    there = [name for name, value in given.items() if hasattr(value, "ndim") and value.ndim]
    stored = "cache" if given.get("block_table") is None else "block_table"
    sequences = {"q": 0, stored: 0} | {name: 0 for name in there if name in POSITIONS}
    heads = {"q": 1} | {name: 0 for name in there if name in GAINS}
    cache = given["cache"]
    if cache.ndim == 4 and cache.shape[1] > 1:
        by_heads = [Rule(heads | {"cache": 1}, [1], even="cache")]
    else:
        by_heads = [] if given["slices"] else [Rule(heads, [1], even="q")]
    return [Rule(sequences, [0]), *by_heads]


sharding.define("single_cache_attention", rules)
