"""``shaped_combine`` on DTensors: cut by sequences or by heads."""

from __future__ import annotations

from gaugekit.ops import sharding

rules = sharding.attention(["a"])
sharding.define("shaped_combine", rules)
sharding.define(
    "shaped_combine_backward", sharding.attention(["a", "v", "alpha", "beta", "gamma", "v0", "lam"])
)
