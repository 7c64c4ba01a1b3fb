"""Recorded launches whose machine code for sm_90 may spill registers, each with the reason. Law 7 reads this table."""

from __future__ import annotations

from typing import NamedTuple


class Spill(NamedTuple):
    """Launches of ``kernel`` with these constants and operand types; at most ``stack`` bytes a thread."""

    kernel: str
    where: dict
    stack: int
    reason: str


SPILLS: list[Spill] = []


def reason(row: dict) -> str | None:
    """Why the launch of a row of ``launches.py compile`` may spill; None where the table does not say."""
    known = row["constants"] | row["types"]
    for spill in SPILLS:
        same = row["kernel"] == spill.kernel and all(
            known.get(n) == value for n, value in spill.where.items()
        )
        if same and row["stack"] <= spill.stack:
            return spill.reason
    return None
