"""Where a projection whose gauge is fixed takes our kernel, by kind of processor, and what is known of its speed."""

from __future__ import annotations

import functools

import torch

from gaugekit import _library
from gaugekit.ops import processor

AVX512_BF16 = "AVX512-BF16"
# By the kind of processor and the dtype: the most inputs measured, and the most heads as wide as these that would span
# them, each of which saves its part of the products.
MEASURED = {("AVX2", torch.float32): (768, 12), (AVX512_BF16, torch.float32): (768, 12)}
REGISTER = {"AVX2": 8, AVX512_BF16: 16}  # numbers of float32 that a head's width is a multiple of

TRAINED = {(AVX512_BF16, torch.float32)}

FASTER = {
    "AVX2": "on an AMD EPYC (Zen 3, AVX2), one thread, the kernel ran at 1.08 times the speed of the dense product or "
    "more in every shape measured, at up to 1.5 times where heads are few",
    AVX512_BF16: "on an AMD EPYC (Zen 4, AVX512-BF16), one thread and two, the kernel ran at 1.1 to 1.7 times the "
    "speed of the dense product in every shape measured, at 0.97 to 1.6 times for a single row; in training, both "
    "ways, at 1.0 to 1.27 times, at 0.45 to 0.9 times for a single row",
}


@functools.cache
def kind() -> str:
    """The kernel's kind of processor here: the instructions torch takes ("AVX2", "AVX512", ...), with "-BF16" on AMD's
    that have AVX512-BF16; settled when first asked, "" where the binary is missing.
    """
    if not _library.implementation("gauge_linear"):
        return ""
    capability = torch.backends.cpu.get_cpu_capability()
    return AVX512_BF16 if capability == "AVX512" and processor.multiplies_pairs_alone() else capability


def trains(kind_of_processor: str, dtype: torch.dtype) -> bool:
    """Whether forward and backward of the kernel together were measured not to be slower than the dense product's."""
    return (kind_of_processor, dtype) in TRAINED


def plan(
    kind_of_processor: str, inputs: int, heads: int, width: int, dtype: torch.dtype, device: str
) -> tuple[str, str]:
    """("kernel" or "dense", the reason): how a projection of these sizes is computed on a ``device`` ("cpu", ...).

    ``kind_of_processor`` is its ``kind()``. It does not depend on the rows of x, so it is the same under
    ``torch.compile``.
    """
    if device != "cpu":
        return "dense", f"the kernel has not been measured on {device}"
    if not kind_of_processor:
        return "dense", "the C++ binary is missing (gaugekit doctor says why)"
    most = MEASURED.get((kind_of_processor, dtype))
    if most is None:
        what = str(dtype).removeprefix("torch.")
        return (
            "dense",
            f"the kernel has not been measured to be faster for {what} on {kind_of_processor} processors",
        )
    if width % REGISTER[kind_of_processor]:
        return "dense", f"heads of {width} numbers do not fill the registers"
    if inputs > most[0] or inputs > most[1] * width:
        limit = f"{most[0]} inputs, or for heads narrower than 1/{most[1]} of them,"
        return "dense", f"beyond {limit} the kernel has not been measured to be faster"
    return "kernel", FASTER[kind_of_processor]
