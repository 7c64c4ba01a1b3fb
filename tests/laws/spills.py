"""Recorded launches whose machine code for sm_90 may spill registers, each with the reason. Law 7 reads this table."""

from __future__ import annotations

from typing import NamedTuple


class Spill(NamedTuple):
    """Launches of ``kernel`` with these constants and operand types; at most ``stack`` bytes a thread."""

    kernel: str
    where: dict
    stack: int
    reason: str


ODD_HEADS = (
    "heads of 136 numbers are padded to 256 and loaded under a mask, number by number, and the addresses take the "
    "registers; published heads are 64, 80, 96, 128 or 256 wide"
)
FEW_BYTES = "ptxas keeps up to 24 bytes on the stack with registers to spare"
ODD_ROWS = "rows of W of no multiple of 16 bytes are loaded byte by byte; published matrices are not like it"
SPILLS = [
    Spill("_shaped_attention_fwd", {"WIDTH": 136}, 1700, ODD_HEADS),
    Spill("_shaped_attention_bwd_kv", {"WIDTH": 136}, 900, ODD_HEADS),
    Spill("_shaped_attention_bwd_q", {"WIDTH": 136}, 420, ODD_HEADS),
    Spill("_shaped_combine_bwd", {"WIDTH": 136}, 20, ODD_HEADS),
    Spill("_shaped_attention_fwd", {"Q": "fp32"}, 16, FEW_BYTES),
    Spill("_shaped_attention_bwd_kv", {"Q": "fp32"}, 16, FEW_BYTES),
    Spill("_shaped_attention_bwd_q", {"Q": "fp32"}, 16, FEW_BYTES),
    Spill("_ragged_attention_bwd_kv", {"Q": "fp32"}, 16, FEW_BYTES),
    Spill("_shaped_combine_fwd", {"WIDTH": 128}, 8, FEW_BYTES),
    Spill("_shaped_combine_bwd", {"V": "fp32"}, 8, FEW_BYTES),
    Spill("_single_cache_attention_fwd", {}, 24, FEW_BYTES),
    Spill("_packed_linear", {"HALF": True, "BLOCK_M": 1}, 40, ODD_ROWS),
    Spill("_packed_linear", {"HALF": True, "BLOCK_M": 16}, 80, ODD_ROWS),
    Spill("_packed_linear", {"E5M2": True, "BLOCK_M": 16}, 128, ODD_ROWS),
    Spill("_packed_linear", {"HALF": True, "BLOCK_M": 64}, 16, ODD_ROWS),
    Spill("_packed_linear", {"BLOCK_M": 256}, 500, ODD_ROWS),
]


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
