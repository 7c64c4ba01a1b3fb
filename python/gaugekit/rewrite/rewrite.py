"""What a rewrite has to say; reading, writing, resuming and certifying are the engine's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gaugekit.models import AttentionView


class Step(ABC):
    """One change of a checkpoint, as reports and certificates tell of it.

    ``name`` stands in reports. ``claim`` is what verify may expect: "exact" (the same function up to rounding) or
    "approximate". ``needs_statistics`` names the modules whose input moments the change asks for.
    """

    name: str
    claim: str = "exact"
    needs_statistics: tuple[str, ...] = ()

    @property
    def arguments(self) -> dict[str, Any]:
        """What distinguishes this instance (JSON values): a half-done conversion is resumed only with the same."""
        return {}

    @property
    def digests(self) -> dict[str, str]:
        """Digests of numbers this instance was given and ``arguments`` does not hold, by what they are for: a half-done
        conversion is resumed only with the same.
        """
        return {}

    @abstractmethod
    def plan(self, config: dict) -> dict[str, int]:
        """Stored numbers that will go, by group, with their "total", from ``config.json`` alone."""


class Rewrite(Step):
    """A change of each layer's attention; reading, writing, resuming and certifying are the engine's.

    Where ``needs_statistics`` names modules ("q", "k", "v", "o", or a path inside a block), the engine makes a
    calibration pass first (``gaugekit.calibration.collect``) and gives ``layer`` the moments of what enters them.
    """

    @abstractmethod
    def layer(self, view: AttentionView, statistics: Any = None) -> AttentionView:
        """The mathematics: one layer's attention in float64, rewritten.

        ``statistics`` is {module: Moments} of this layer, where ``needs_statistics`` names any.
        """

    def note(self, view: AttentionView, statistics: Any = None) -> dict[str, Any]:
        """What the certificate is to say of a layer (JSON values); arguments as ``layer`` was given them."""
        return {}


@dataclass(frozen=True)
class Later:
    """Steps that take work to find: ``find(folder)`` returns them, once the engine has the target to itself.

    ``folder`` is the conversion's own: what ``find`` leaves there is there again after a kill, and gone from the
    result. ``arguments`` (JSON values) says what the rewrites depend on beside source and calibration text.
    """

    arguments: dict[str, Any]
    find: Callable[[Path], Sequence[Step]]


@dataclass(frozen=True)
class Calibration:
    """Where the engine gets statistics from: ``collect(modules, folder)`` gives {module: Moments} of each layer.

    ``digest`` is that of the text behind them. ``folder`` is the conversion's own, so that a second call goes on after
    a kill.
    """

    digest: str
    collect: Callable[[list[str], Path], Sequence[dict]]


def invariance_error(before: AttentionView, after: AttentionView, seed: int) -> float:
    """‖after(x) − before(x)‖ / ‖before(x)‖ in float64, for 32 seeded random normal tokens; cross-attention reads as
    many others.
    """
    generator = torch.Generator().manual_seed(seed)
    read = (before.q, before.k) if before.cross else (before.q,)
    x = [torch.randn(1, 32, part.weight.shape[1], dtype=torch.float64, generator=generator) for part in read]
    expected = before.attend(*x)
    return float(
        (after.attend(*x) - expected).norm() / expected.norm().clamp_min(torch.finfo(torch.float64).tiny)
    )
