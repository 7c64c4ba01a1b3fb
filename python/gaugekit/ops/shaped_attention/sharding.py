"""``shaped_attention`` on DTensors: cut by sequences or by heads."""

from __future__ import annotations

from gaugekit.ops import sharding

rules = sharding.attention(["q"])
sharding.define("shaped_attention", sharding.attention(["q", "q", "q"]))  # O, A and the log-sum-exps
sharding.define(
    "shaped_attention_backward",
    sharding.attention(["q", "k", "v", "alpha", "beta", "gamma", "v0", "lam"]),
)
