"""What the processor here has, for the tables that choose kernels."""

from __future__ import annotations

import functools
from pathlib import Path

# The level bf16 of csrc/common/isa.h, by the names Linux gives: products on pairs of bfloat16 numbers, and what decodes
# beside them.
PAIRS = {"avx512_bf16", "avx512_vbmi2", "avx512vbmi", "vpclmulqdq"}
OTHERS = {
    "amx_tile",
    "amx_bf16",
    "avx512_fp16",
}  # other products of 16-bit numbers, which Intel's have beside PAIRS


@functools.cache
def flags() -> frozenset[str]:
    """The instruction sets of the processor as Linux names them ("flags", on ARM "Features"); none elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    named = (line for line in lines if line.startswith(("flags", "Features")))
    return frozenset(next(named, "").partition(":")[2].split())


def multiplies_pairs_alone() -> bool:
    """Whether the processor has ``PAIRS`` and no other products of 16-bit numbers, as AMD's from Zen 4 on, which the
    tables of that kind were measured on.
    """
    return flags() >= PAIRS and not flags() & OTHERS
