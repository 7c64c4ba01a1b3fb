"""How the pages write numbers; what cannot be written as one says why."""

from __future__ import annotations

import math
from collections.abc import Sequence

from gaugekit.pages.charts import is_number, superscript


def change(part: float) -> str:
    """A ratio of after to before as a change: 0.66 gives −34.0 %."""
    return f"{100 * (part - 1):+.1f} %".replace("-", "−")


def over_noise(row: dict) -> str:
    """How many times the noise the error is, or why that is no number."""
    if not (is_number(row["relative_error"]) and is_number(row["noise"])):
        return "not finite"
    if row["noise"] == 0:  # a model without noise: nothing to measure an error by
        return "no error" if row["relative_error"] == 0 else "error beside no noise"
    return f"{row['relative_error'] / row['noise']:.2f} ×"


def power_of_ten(value: float | None) -> str:
    """A small number as a person writes it: 2.7e-07 gives 2.7 · 10⁻⁷."""
    if not is_number(value):
        return "not finite"
    if value == 0:
        return "0"
    power = math.floor(math.log10(value))
    return f"{value / 10.0**power:.1f} · 10{superscript(power)}"


def cosine(value: float | None) -> str:
    """A cosine, near 1 as it is."""
    return f"{value:.7f}" if is_number(value) else "not finite"


def span(values: Sequence[int]) -> str:
    """From the least to the largest of ``values``."""
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"
