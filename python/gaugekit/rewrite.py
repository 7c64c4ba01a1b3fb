"""The engine that streams a checkpoint through rewrites, and what a rewrite has to say."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch

from .checkpoint import Checkpoint
from .models import AttentionView, Compact


class Rewrite(ABC):
    """One change of a checkpoint, layer by layer; reading, writing, resuming and certifying are the engine's.

    ``name`` stands in reports. ``claim`` is what verify may expect: "exact" (the same function up to rounding) or
    "approximate". ``needs_statistics`` asks the engine for a calibration pass before the first layer.
    """

    name: str
    claim: str = "exact"
    needs_statistics: bool = False

    @property
    def arguments(self) -> dict[str, Any]:
        """What distinguishes this instance (JSON values): a half-done conversion is resumed only with the same."""
        return {}

    @abstractmethod
    def plan(self, config: dict) -> dict[str, int]:
        """Stored numbers that will go, by group, with their "total", from ``config.json`` alone."""

    @abstractmethod
    def layer(self, view: AttentionView, statistics: Any = None) -> AttentionView:
        """The mathematics: one layer's attention in float64, rewritten. ``statistics`` is that layer's calibration."""

    def form(self, view: AttentionView) -> dict[str, Compact]:
        """How the rewritten parts ("q", "k", "v", "o") are stored when not dense; a part left out stays dense."""
        return {}


def invariance_error(before: AttentionView, after: AttentionView, seed: int) -> float:
    """‖after(x) − before(x)‖ / ‖before(x)‖ in float64, for 32 seeded random normal tokens."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 32, before.q.weight.shape[1], dtype=torch.float64, generator=generator)
    expected = before.attend(x)
    return float((after.attend(x) - expected).norm() / expected.norm().clamp_min(torch.finfo(x.dtype).tiny))


__all__ = ["Checkpoint", "Rewrite", "invariance_error"]
