"""Which product packed weights take on a CPU, by kind of processor, and what is known of its speed there."""

from __future__ import annotations

import functools
import os
import platform

import torch

from gaugekit.ops import processor

# Rows of x up to which a product that decodes as it goes is taken; beyond, W is decoded by tiles for torch's matmul.
# Kinds of processor by what they multiply with: "pairs" has AVX512-BF16 and VBMI2 and no AMX, "16-bit" multiplies the
# weights' dtype in another way; "arm" is 64-bit ARM, "arm-bf16" one that multiplies pairs of bfloat16 numbers.
FUSED_ROWS = {
    "avx2": 16,  # measured (Zen 3): 16 rows take about as long either way, 24 are faster by tiles
    "avx512": 64,  # measured (Cascade Lake)
    "pairs": 2048,  # measured (Zen 4): faster at all numbers of rows up to these, with 576 to 14,336 inputs
    "16-bit": 4,  # not measured; AMX's own product (csrc/cpu/packed_linear_amx.h) waits for such a processor
    "arm": 16,  # not measured, nor the next: what "other" takes
    "arm-bf16": 16,
    "other": 16,
}
CUDA_FUSED_ROWS = 256
FLOAT_ROWS = 16  # of float32, whatever the processor
FLAGS = {torch.bfloat16: "avx512_bf16", torch.float16: "avx512_fp16"}
ARM = ("aarch64", "arm64")  # as Linux and macOS name it

NOTES = {
    "avx2": "on an AMD EPYC (Zen 3, AVX2), one thread, packed bfloat16 products ran at 0.82 to 1.0 of the speed of "
    "torch's at 1 row, 1.04 to 1.5 times it from 2 to 16 rows, more beyond; float16 ones at 0.49 at 1 row, 0.86 at 4",
    "avx512": "on a Cascade Lake (AVX-512 without 16-bit products) packed bfloat16 products ran faster than torch's "
    "at 1 to 64 rows; float16 ones at 1 row",
    "pairs": "on an AMD EPYC (Zen 4, AVX512-BF16) packed bfloat16 products ran at 1.7 to 2.6 times the speed of "
    "torch's at 1 row, 1.1 to 1.2 times it at 16, 1.01 to 1.08 at 64 and 0.97 to 1.01 at 128 and 256",
    "16-bit": "this processor multiplies 16-bit numbers itself, by instructions with which packed products have not "
    "been measured beside torch's: they save memory",
    "arm": "on ARM processors packed products are tested in an emulator only: their speed has not been measured",
    "arm-bf16": "on ARM processors with BF16 packed products, of pairs of bfloat16 numbers there, are tested in an "
    "emulator only: their speed has not been measured",
    "other": "on this kind of processor packed products have not been measured beside torch's",
}
E5M2_NOTES = {
    "pairs": "on an AMD EPYC (Zen 4, AVX512-BF16) products of bfloat16 rows with packed float8_e5m2 weights ran at "
    "1.87 to 2.0 times the speed of torch's with the weights widened to bfloat16 at 1 row, 1.11 to 1.17 times it at "
    "16, 1.0 at 64 and 256; of float16 rows at 0.80 to 0.82 at 1 row, 1.6 at 16",
}
E5M2_UNMEASURED = "on this kind of processor products with packed float8_e5m2 weights have not been measured"


@functools.cache
def kind(dtype: torch.dtype) -> str:
    """The kind of this machine's processor for weights of ``dtype``, found when first asked: torch settles then which
    instructions it takes.
    """
    capability, flags = torch.backends.cpu.get_cpu_capability(), processor.flags()
    if platform.machine() in ARM and os.environ.get("ATEN_CPU_CAPABILITY") != "default":
        return "arm-bf16" if dtype == torch.bfloat16 and "bf16" in flags else "arm"
    if capability.startswith("AVX512") and FLAGS[dtype] in flags:
        return "pairs" if dtype == torch.bfloat16 and processor.multiplies_pairs_alone() else "16-bit"
    return {"AVX2": "avx2", "AVX512": "avx512"}.get(capability, "other")


def plan(rows: int, dtype: torch.dtype, device: str) -> str:
    """ "fused" (W is decoded inside the product) or "decode" (by tiles, for torch's matmul), for ``rows`` rows of x of
    ``dtype``.
    """
    if dtype == torch.float64 or device not in ("cpu", "cuda"):
        return "decode"
    if device == "cuda":
        return "fused" if rows <= CUDA_FUSED_ROWS else "decode"
    here = kind(dtype) if dtype in FLAGS else None
    most = FLOAT_ROWS if here is None else FUSED_ROWS[here]
    return "fused" if rows <= most else "decode"


def speed_note(dtype: torch.dtype = torch.bfloat16) -> str:
    """A clause for reports: what is known of the speed of products with packed weights of ``dtype`` on this kind of
    processor."""
    if dtype == torch.float8_e5m2:
        return E5M2_NOTES.get(kind(torch.bfloat16), E5M2_UNMEASURED)
    return NOTES[kind(dtype)]
