"""What a truncation is to keep, said in one of three ways."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gaugekit.calibration.moments import Moments
from gaugekit.rank.spectra import Spectrum

Ranks = list[list[int]]  # [L][G]
Text = str | Path | list[str]


@dataclass(frozen=True)
class Goal:
    """One of ``rank`` (one number, or [L][G] of them: what every key head keeps), ``energy`` (the share of its score's
    energy that each head keeps) and ``min_cosine`` (the mean cosine of embeddings to keep on held-out text).

    Raises ValueError unless one is given, and for a share or a cosine outside (0, 1].
    """

    rank: int | Ranks | None = None
    energy: float | None = None
    min_cosine: float | None = None

    def __post_init__(self) -> None:
        if sum(value is not None for value in (self.rank, self.energy, self.min_cosine)) != 1:
            raise ValueError("rank, energy, min_cosine: expected one of them, got none or several")
        if self.energy is not None:
            check_share(self.energy)
        if self.min_cosine is not None and not 0 < self.min_cosine <= 1:
            raise ValueError(f"min_cosine: expected a cosine in (0, 1], got {self.min_cosine!r}")

    @classmethod
    def asked(cls, **values: Any) -> Goal | None:
        """The goal that these name; None where all are None."""
        return cls(**values) if any(value is not None for value in values.values()) else None

    @property
    def options(self) -> dict[str, Any]:
        """All three (JSON values), for what has to tell one goal from another."""
        return {"rank": self.rank, "energy": self.energy, "min_cosine": self.min_cosine}

    def check(self, calibration: Text | None, moments: Sequence[dict[str, Moments]] | None) -> None:
        """ValueError where what is given beside the goal does not go with it, or is no text."""
        if isinstance(calibration, list | tuple) and calibration and not isinstance(calibration[0], str):
            raise ValueError(
                "calibration: expected text (a UTF-8 file or a list of strings), got a list of "
                f"{type(calibration[0]).__name__}; what gaugekit.statistics collected is given as moments="
            )
        if moments is not None and calibration is not None:
            raise ValueError("calibration, moments: expected one of them, got both")
        if self.min_cosine is not None and calibration is None:
            raise ValueError("calibration: expected text for min_cosine, half of which is held out")


def check_share(energy: float) -> None:
    """ValueError unless 0 < energy ≤ 1."""
    if not 0 < energy <= 1:
        raise ValueError(f"energy: expected a share in (0, 1], got {energy!r}")


def needed(spectra: Iterable[Spectrum], energy: float) -> Ranks:
    """[L][G]: in each head the smallest rank that keeps the share ``energy``; ValueError unless 0 < energy ≤ 1."""
    check_share(energy)
    return [spectrum.needed(energy) for spectrum in spectra]
