"""What the processor here has, for the tables that choose kernels."""

from __future__ import annotations

import functools
from pathlib import Path

# The level bf16 of csrc/common/isa.h, by the names Linux gives: products on pairs of bfloat16 numbers, and what decodes
# beside them.
PAIRS = {"avx512_bf16", "avx512_vbmi2", "avx512vbmi", "vpclmulqdq"}


@functools.cache
def flags() -> frozenset[str]:
    """The instruction sets of the processor as Linux names them ("flags", on ARM "Features"); none elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    named = (line for line in lines if line.startswith(("flags", "Features")))
    return frozenset(next(named, "").partition(":")[2].split())
