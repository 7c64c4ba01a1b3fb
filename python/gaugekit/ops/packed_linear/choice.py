"""Which product packed weights take on a CPU, by kind of processor, and what is known of its speed there."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

# Rows of x up to which a product that decodes as it goes is taken; beyond, W is decoded by tiles for torch's matmul.
# Kinds of processor by what they multiply with: "16-bit" multiplies the weights' dtype itself.
FUSED_ROWS = {
    "avx2": 16,  # measured (Zen 3): 16 rows take about as long either way, 24 are faster by tiles
    "avx512": 64,  # measured (Cascade Lake)
    "16-bit": 4,  # 4 and 16 rows measured, at 0.50 and 0.34 of torch; tiles grow less with rows
    "other": 16,
}
CUDA_FUSED_ROWS = 256
FLOAT_ROWS = 16  # of float32, whatever the processor
FLAGS = {torch.bfloat16: "avx512_bf16", torch.float16: "avx512_fp16"}

NOTES = {
    "avx2": "on an AMD EPYC (Zen 3, AVX2), one thread, packed bfloat16 products ran at 0.82 to 1.0 of the speed of "
    "torch's at 1 row, 1.04 to 1.5 times it from 2 to 16 rows, more beyond; float16 ones at 0.49 at 1 row, 0.86 at 4",
    "avx512": "on a Cascade Lake (AVX-512 without 16-bit products) packed bfloat16 products ran faster than torch's "
    "at 1 to 64 rows; float16 ones at 1 row",
    "16-bit": "this processor multiplies 16-bit numbers itself; on one such (AVX512-BF16, one thread) packed products "
    "ran at 0.50 of the speed of torch's at 4 rows and 0.82 at 64: they save memory, not time",
    "other": "on this kind of processor packed products have not been measured beside torch's",
}


@functools.cache
def kind(dtype: torch.dtype) -> str:
    """The kind of this machine's processor for weights of ``dtype``, found when first asked: torch settles then which
    instructions it takes.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    if capability.startswith("AVX512") and FLAGS[dtype] in _flags():
        return "16-bit"
    return {"AVX2": "avx2", "AVX512": "avx512"}.get(capability, "other")


def _flags() -> list[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    return next((line for line in lines if line.startswith("flags")), "").split()


def plan(rows: int, dtype: torch.dtype, device: str) -> str:
    """ "fused" (W is decoded inside the product) or "decode" (by tiles, for torch's matmul), for ``rows`` rows of x of
    ``dtype``.
    """
    if dtype == torch.float64 or device not in ("cpu", "cuda"):
        return "decode"
    on_cpu = FUSED_ROWS[kind(dtype)] if dtype in FLAGS else FLOAT_ROWS
    return "fused" if rows <= (on_cpu if device == "cpu" else CUDA_FUSED_ROWS) else "decode"


def speed_note(dtype: torch.dtype = torch.bfloat16) -> str:
    """A clause for reports: what is known of the speed of packed products of ``dtype`` on this kind of processor."""
    return NOTES[kind(dtype)]
