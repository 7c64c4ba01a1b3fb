"""``nonlocal_energy`` on DTensors: cut by sequences or by heads."""

from __future__ import annotations

from gaugekit.ops import sharding

rules = sharding.attention(["q"])
sharding.define("nonlocal_energy", sharding.attention(["q", "q", "u"]))  # energies, log-sum-exps, A u
sharding.define("nonlocal_energy_backward", sharding.attention(["u", "q", "k"]))
