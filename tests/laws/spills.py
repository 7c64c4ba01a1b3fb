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


def excused(row: dict) -> bool:
    """Whether a row of ``launches.py compile`` is in the table."""
    known = row["constants"] | row["types"]
    return any(
        row["kernel"] == spill.kernel
        and row["stack"] <= spill.stack
        and all(known.get(name) == value for name, value in spill.where.items())
        for spill in SPILLS
    )
